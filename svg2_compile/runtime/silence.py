"""Nothing stays dense silently: a video without one sparse call, or attentions that no compiled graph ran, are said."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from svg2_compile.logs.logger import Once
from svg2_compile.passes.error_guard import HIGHEST
from svg2_compile.runtime.model_call import ModelCall
from svg2_compile.runtime.request import Request

__all__ = ["SilenceWatch"]

_WAYS_OUT = {
    "dense_steps": "fewer dense_steps leave steps to be sparse",
    "dense_last_steps": "fewer dense_last_steps leave steps to be sparse",
    "dense_timesteps": "a smaller dense_timesteps leaves steps to be sparse",
    "dense_layers": "fewer dense_layers leave layers to be sparse",
    "dense_layer": "fewer dense_layers leave layers to be sparse",
    "no_timestep": "svg2_compile.denoising(step=...) says the step",
    "target_error": "a larger target_error leaves layers to be sparse",
    "ranks_differ": "every rank needs the same options",
    "cost": "min_tokens=<int> overrides the cost model",
    "short_sequence": "a smaller min_tokens includes it",
}


class SilenceWatch:
    """Says once, and keeps for the report, that nothing was sparse, and why.

    Args:
        once: what speaks.
    """

    def __init__(self, once: Once) -> None:
        self._once = once
        self._quiet = 0
        self._notes: list[str] = []
        self._missed: list[str] = []
        # Since the last schedule was over: calls of the whole model, and compiled graphs that have attentions.
        self._calls = self._with_attention = 0
        self._left: set[int] = set()

    def leave(self, module: Any, why: str) -> None:
        """``module`` is not compiled, and that is said here."""
        self._left.add(id(module))
        self._say(("left", id(module)), why)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """While inside, nothing is said: videos are given up on purpose."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    def ran(self, call: ModelCall | None, has_attention: bool) -> None:
        """A compiled graph runs, in ``call`` if that is known."""
        self._with_attention += has_attention
        if call is not None:
            call.graphs += 1
            call.graphs_with_attention += has_attention

    def video_over(self, request: Request, programs: Iterable[Any]) -> None:
        """A video came to its end."""
        if request.sparse_calls == 0 and request.step > 0:
            self._say_dense_video(request.dense_reasons, programs)

    def schedule_over(self) -> None:
        """The scheduler of the target has made all its steps."""
        if not self._calls and not self._with_attention:
            self._say(
                "never called",
                "the scheduler has made all its steps, but the model was never called. A pipeline that calls the "
                "blocks of its model itself needs enable(pipe, regional=True); one that was given another model needs "
                "to be enabled anew.",
            )
        elif not self._with_attention and not self._left:
            self._say_no_attention_ran("the model")
        self._calls = self._with_attention = 0

    def after_call(self, call: ModelCall, programs: Iterable[Any]) -> None:
        """A call of the whole model has returned."""
        self._calls += 1
        if id(call.module) in self._left:
            return
        self._watch_text(call)
        # A cache may answer a call in the stead of the model.
        if not call.graphs_with_attention and not getattr(call.module, "is_cache_enabled", False):
            if not call.graphs:
                self._say_no_graph_ran(call)
            else:
                self._say_no_attention_ran(type(call.module).__name__)
        standing, request = call.standing, call.request
        if standing is not None and standing.is_last and standing.step > 0 and request.sparse_calls == 0:
            self._say_dense_video(request.dense_reasons, programs)

    def _watch_text(self, call: ModelCall) -> None:
        """Blocks compiled alone may be handed text in one row with the video, and nothing in them shows it."""
        seen: set[int] = call.memo.setdefault("video_tokens", set())
        new = call.video_tokens - seen
        seen |= new
        patches = call.patches() if new else None
        if patches is not None and max(new) > patches:
            self._say(
                ("text in video", id(call.module)),
                f"blocks of {type(call.module).__name__} cluster {max(new)} tokens, but its video has {patches} "
                "patches: text or references that lie in one row with the video are clustered with it, as nothing in "
                "a block tells them apart. enable(..., regional=False) compiles the whole model, which does.",
            )

    def graph_failed(self, name: str, error: Exception) -> None:
        """The sparse graph of a program raised; the dense one runs from now on."""
        self._say(
            ("failed", name),
            f"{name} stays dense from here on: its sparse graph failed with {type(error).__name__}: {error}. "
            "strict=True raises it.",
        )

    def target_missed(self, name: str, target: float | None) -> None:
        """An attention has missed its target for several steps with all the density that it may have."""
        if name in self._missed:
            return
        self._missed.append(name)
        self._once.warning(
            "target missed",
            "%s cannot meet target_error=%s: at a density of %g its error was above it for several steps. It stays "
            "dense for the rest of the video. A larger target_error leaves it sparse; svg2_compile.report() lists all "
            "such layers.",
            *(name, target, HIGHEST),
        )

    @property
    def notes(self) -> list[str]:
        """What was said, for the report."""
        missed = [f"stay dense because they missed target_error in some video: {', '.join(self._missed)}"]
        return self._notes + (missed if self._missed else [])

    def _say_no_graph_ran(self, call: ModelCall) -> None:
        self._say(
            ("no graph", id(call.module)),
            f"{type(call.module).__name__} runs eagerly and dense: Dynamo handed over no graph of it, or runs none. "
            "After too many recompilations it gives a function up for good (torch._dynamo.reset() starts over); "
            "TORCH_LOGS=recompiles,graph_breaks says why.",
        )

    def _say_no_attention_ran(self, model: str) -> None:
        self._say(
            "no attention",
            f"no attention of {model} ran in a compiled graph: all stay dense. In code that Dynamo gave up on, or may "
            "not look into, only scaled_dot_product_attention is found; svg2_compile.explain(...) shows the graph "
            "breaks.",
        )

    def _say_dense_video(self, reasons: Counter[str], programs: Iterable[Any]) -> None:
        sites = [site for program in programs for site in program.sites]
        if not any(site.decision == "sparse" for site in sites):
            reasons = Counter(site.reason for site in sites if site.reason != "cross_attention")
        why = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        ways = [_WAYS_OUT[reason] for reason in reasons if reason in _WAYS_OUT]
        self._say(
            "dense video",
            f"a whole video ran without one sparse attention{f': {why}' if why else ''}."
            + (f" {'; '.join(ways)}." if ways else "")
            + " svg2_compile.report() says more.",
        )

    def _say(self, key: Any, text: str) -> None:
        if not self._quiet and self._once.warning(key, "%s", text):
            self._notes.append(text)

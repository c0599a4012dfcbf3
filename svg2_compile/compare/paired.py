"""Run one generation dense and sparse, in a pair: same noise, same compiled dense graph, same inner backend."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from svg2_compile.api import Enabled, enable
from svg2_compile.compare.attention_maps import AttentionMaps, attention_maps
from svg2_compile.compare.capture import Captured, MapRequest, captured_attention
from svg2_compile.compare.comparison import Comparison
from svg2_compile.compare.density import DensityTable, density_table
from svg2_compile.compare.metrics import MIN_SIDE, multiscale_ssim, psnr, psnr_per_frame, ssim_per_frame
from svg2_compile.compare.pair import Run
from svg2_compile.compare.progress import PHASES, Progress, Tell
from svg2_compile.compare.subjects import Subject, pipeline_subject
from svg2_compile.compare.videos import same_range
from svg2_compile.reporting.machine import describe_device, version_of
from svg2_compile.runtime.scheduler import SchedulerHook

__all__ = ["compare_subject", "compare_with_dense"]

EVERY_STEP = 10**9
"""As dense_steps: more steps than any schedule has."""

PACKAGES = ("svg2-compile", "torch", "diffusers", "transformers")


def compare_with_dense(
    pipe: Any,
    arguments: Mapping[str, Any],
    *,
    seed: int = 0,
    maps: MapRequest | bool = False,
    regional: bool = False,
    tell: Tell | None = None,
    **options: Any,
) -> Comparison:
    """Generate one video with a diffusers pipeline dense and sparse, and measure what differs.

    Args:
        pipe: a diffusers pipeline with a scheduler.
        arguments: of ``pipe(...)``: prompt, height, num_frames, num_inference_steps ...
        seed: of the generator that both runs are given.
        maps: also look into one attention (a MapRequest says which; True takes one in the middle): a third run, which
            ends there.
        regional, **options: as of ``svg2_compile.enable``.
        tell: called with a Progress at the start of every phase and after every step.

    Returns:
        A Comparison: ``print`` shows the numbers, ``write_html(path)`` writes the page.

    Raises:
        ImportError: the extra ``quality`` is missing.
        TypeError, ValueError: ``pipe``, an argument or an option is not valid.
    """
    subject = pipeline_subject(pipe, arguments, seed)
    request = MapRequest() if maps is True else maps or None
    return compare_subject(subject, request, regional=regional, tell=tell, **options)


def compare_subject(
    subject: Subject,
    maps: MapRequest | None = None,
    *,
    regional: bool = False,
    tell: Tell | None = None,
    **options: Any,
) -> Comparison:
    """:func:`compare_with_dense` of anything that can generate a video."""
    _need_extras()
    options = {**subject.option_defaults, **options}
    if str(options.get("collect_stats", True)).strip().lower() in ("false", "0", "no", "off"):
        raise ValueError("collect_stats=False: a comparison shows densities. Valid: True.")
    # Comparisons in one process would otherwise add up to Dynamo's limit of recompilations.
    torch._dynamo.reset()
    pictures = None
    with enable(subject.target, regional, scheduler=subject.scheduler, **options) as enabled:
        teller = _Teller(tell)
        _warm_up(subject, enabled, teller)
        dense = _timed(subject, enabled, EVERY_STEP, teller)
        sparse = _timed(subject, enabled, None, teller)
        report = enabled.report()
        density = density_table(report, len(sparse.step_seconds))
        if maps is not None:
            teller.begin(PHASES[4])
            pictures = _maps(subject, enabled, density, maps)
        settings = enabled.session.config.to_dict()
        device = next((p.device for module in enabled.modules for p in module.parameters()), torch.device("cpu"))
    if subject.latent:
        shown = same_range(sparse.video, dense.video)
        sparse, dense = Run(shown[0], sparse.step_seconds), Run(shown[1], dense.step_seconds)
    return Comparison(
        name=subject.name,
        facts=subject.facts,
        settings=settings | {"regional": regional},
        versions={"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        hardware=describe_device(device),
        dense=dense,
        sparse=sparse,
        **_quality(sparse.video, dense.video),
        density=density,
        report=report,
        latent=subject.latent,
        maps=pictures,
    )


def _need_extras() -> None:
    try:
        import PIL  # noqa: F401
        import skimage  # noqa: F401
    except ImportError as error:
        raise ImportError("a comparison needs scikit-image and Pillow: svg2-compile[quality]") from error


class _Teller:
    """Tells how far a comparison is, and estimates from the steps so far how long the rest takes."""

    def __init__(self, tell: Tell | None) -> None:
        self._tell = tell
        self._phase = ""

    def begin(self, phase: str) -> None:
        self._phase = phase
        if self._tell is not None:
            self._tell(Progress(phase, 0, 0))

    def step(self, seconds: Sequence[float], num_steps: int) -> None:
        """``seconds``: of the steps done in this phase. A sparse step is taken to last as long as a dense one."""
        if self._tell is None:
            return
        phases_left = PHASES[2:4].index(self._phase) == 0
        steps_left = num_steps - len(seconds) + phases_left * num_steps
        left = statistics.median(seconds) * steps_left
        self._tell(Progress(self._phase, len(seconds), num_steps, left))


class _StepTimer:
    """Notes the seconds from one step's end to the next; the first begins when the schedule is set."""

    def __init__(self, scheduler: Any, teller: _Teller) -> None:
        self.seconds: list[float] = []
        self._scheduler = scheduler
        self._teller = teller
        self._begin = time.perf_counter()

    def begin_video(self) -> None:
        self.seconds = []
        self._begin = time.perf_counter()

    def end_step(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._begin)
        self._teller.step(self.seconds, len(self._scheduler.timesteps))
        self._begin = now


def _with_dense_steps(enabled: Enabled, dense_steps: int | float) -> None:
    """One session serves both runs, so that they share the compiled dense graph: not even its compilation differs."""
    session = enabled.session
    session.config = session.config.replace(dense_steps=dense_steps)
    enabled.reset()
    session.history.clear()


def _warm_up(subject: Subject, enabled: Enabled, teller: _Teller) -> None:
    """Run both graphs once, so that no compilation is in the times."""
    asked = enabled.session.config.dense_steps
    for phase, dense_steps in zip(PHASES, (EVERY_STEP, 0), strict=False):
        teller.begin(phase)
        _with_dense_steps(enabled, dense_steps)
        with enabled.session.watch.quiet():  # one of them is dense on purpose
            subject.generate(subject.warm_up_steps)
    _with_dense_steps(enabled, asked)


def _timed(subject: Subject, enabled: Enabled, dense_steps: int | None, teller: _Teller) -> Run:
    """One video and its times. None: with the ``dense_steps`` that were asked for."""
    asked = enabled.session.config.dense_steps
    teller.begin(PHASES[3] if dense_steps is None else PHASES[2])
    timer = _StepTimer(subject.scheduler, teller)
    # Wrapped around the session's own hook, so it is taken off first.
    hook = SchedulerHook(subject.scheduler, timer.begin_video, timer.end_step)
    try:
        _with_dense_steps(enabled, asked if dense_steps is None else dense_steps)
        with enabled.session.watch.quiet() if dense_steps is not None else contextlib.nullcontext():
            video = subject.generate(None)
    finally:
        hook.remove()
        enabled.session.config = enabled.session.config.replace(dense_steps=asked)
    return Run(video, timer.seconds)


def _quality(video: Tensor, reference: Tensor) -> dict[str, Any]:
    large_enough = min(video.shape[2:]) >= MIN_SIDE
    return {
        "psnr": psnr(video, reference),
        "psnr_per_frame": psnr_per_frame(video, reference),
        "ssim_per_frame": ssim_per_frame(video, reference) if large_enough else None,
        "ms_ssim": multiscale_ssim(video, reference) if large_enough else None,
    }


def _maps(subject: Subject, enabled: Enabled, density: DensityTable, request: MapRequest) -> AttentionMaps:
    """Generate once more, up to the attention that is asked for."""
    layer, step, head = request.choose(density)
    _with_dense_steps(enabled, enabled.session.config.dense_steps)
    try:
        with captured_attention(enabled.session, layer, step, head):
            subject.generate(None)
    except Captured as captured:
        maps = attention_maps(captured.inputs)
        return AttentionMaps(**{**vars(maps), "site": layer, "step": step, "head": head})
    raise RuntimeError(f"maps: {layer} did not run sparse in step {step}")

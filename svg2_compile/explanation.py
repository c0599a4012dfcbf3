"""explain: what the compiler would do with every attention of a model, without running anything sparse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from svg2_compile.hosts.dynamo import enabled_dynamo_settings, forgotten_frames, noted_breaks
from svg2_compile.passes.device_profile import DeviceProfile, profile_named
from svg2_compile.passes.graph.builder import copy_graph_module
from svg2_compile.passes.graph.values import graph_device
from svg2_compile.pipeline import ANALYSES, Compilation, run_passes
from svg2_compile.reporting.describe import describe
from svg2_compile.reporting.report import Report
from svg2_compile.settings.config import Svg2Config

__all__ = ["explain"]


def explain(
    module: nn.Module,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    estimate_for: str | None = None,
    **kwargs: Any,
) -> Report:
    """Say what the compiler would do with every attention of ``module``, without running anything sparse.

    The module is traced with the given inputs, which runs it once densely. Under FakeTensorMode (weights and inputs
    without memory) that stops where the model asks for the value of a tensor; the report then says so.

    Args:
        module: the model, or one of its blocks.
        *args, **kwargs: inputs of one call.
        options: the fields of Svg2Config.
        estimate_for: the device to decide and to predict speed for, which need not be here: "cpu", "cuda",
            "cuda:sm_90" ... None is the device of the inputs.

    Returns:
        A Report; ``print`` shows it as a table. A model that is whole only as ``enable`` runs it is reported whole,
        with the graph breaks of a plain torch.compile and a note.

    Raises:
        ValueError: an option or ``estimate_for`` is not valid.
    """
    config = Svg2Config.from_options(options)
    target = None if estimate_for is None else profile_named(estimate_for)
    module = getattr(module, "_orig_mod", module)
    limit = torch._dynamo.config.patch(recompile_limit=max(64, torch._dynamo.config.recompile_limit))
    plain = _explain_once(module, config, target, args, kwargs, limit)
    if not plain.graph_breaks:
        return plain
    enabled = _explain_once(module, config, target, args, kwargs, enabled_dynamo_settings())
    if len(enabled.graph_breaks) >= len(plain.graph_breaks):
        return plain
    dynamic = any("Dynamic shape operator" in reason for reason in plain.graph_breaks)
    enabled.notes.append(
        f"Plain torch.compile breaks this model into {len(plain.graphs)} graphs and leaves attention in between to "
        "eager. As shown here it runs with svg2_compile.enable()"
        + (", or with torch._dynamo.config.capture_dynamic_output_shape_ops = True." if dynamic else ".")
    )
    enabled.graph_breaks = plain.graph_breaks
    return enabled


def _explain_once(
    module: nn.Module,
    config: Svg2Config,
    target: tuple[torch.device, DeviceProfile] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: Any,
) -> Report:
    """Trace ``module`` under ``settings`` and analyse every graph that Dynamo hands over."""
    result = Report()

    def analyse(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        device, profile = target or (graph_device(gm), None)
        compilation = Compilation(copy_graph_module(gm), config, device, profile=profile)
        run_passes(compilation, ANALYSES)
        number = len(result.graphs)
        result.sites.extend(describe(compilation.decisions, number, config, compilation.device))
        result.graphs.append(compilation.graph_report(f"graph_{number}"))
        return gm.forward

    counters = torch._dynamo.utils.counters
    frames_before = dict(counters["frames"])
    try:
        with torch.no_grad(), settings, forgotten_frames(), noted_breaks() as breaks:
            torch.compile(module._call_impl, backend=analyse)(*args, **kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        if not result.graphs:
            raise
        result.notes.append(
            f"The run after the first {len(result.graphs)} graph(s) needs the values of tensors ({error}), which fake "
            "tensors do not have: attentions after a graph break are missing here."
        )
    result.graph_breaks = [f"{place}: {reason}" for place, reason in breaks.items()]
    total, traced = (counters["frames"][key] - frames_before.get(key, 0) for key in ("total", "ok"))
    if total > traced:
        # A graph break inside a loop leaves the whole function to eager, without an entry among the breaks.
        result.graph_breaks.append(
            f"{total - traced} function(s) run eagerly; TORCH_LOGS=graph_breaks says which and why"
        )
    return result

"""What every rank of a pool does; every check returns plain values or raises."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers.models import attention_dispatch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import svg2_compile
from svg2_compile import backend
from svg2_compile.codegen import inner_backend
from svg2_compile.runtime import program
from tests.distributed.models import parallel_build, split, tensor_parallel
from tests.e2e.pipelines import SmallPipeline
from tests.support import IDENTITY

STEPS = 2


def diffusers_alone(name: str) -> float:
    """The largest difference that diffusers itself makes between one process and several."""
    expected = parallel_build(name).run(steps=STEPS)
    actual = split(parallel_build(name), name).run(steps=STEPS)
    return (actual - expected).abs().max().item() / expected.abs().max().item()


def videos(name: str, options: dict[str, Any], how: str = "ulysses", regional: bool = False) -> dict[str, Any]:
    """Two videos on all ranks, compared with dense attention in one process and with the same options there.

    how: a key of HOW.
    """
    small = parallel_build(name)
    dense = small.run(steps=STEPS)
    with svg2_compile.enable(small.pipe, regional=regional, **options):
        alone = small.run(steps=STEPS)
    torch._dynamo.reset()
    small = HOW[how](parallel_build(name), name)
    with svg2_compile.enable(small.pipe, regional=regional, **options) as enabled:
        first, second = small.run(steps=STEPS), small.run(steps=STEPS)
        report = enabled.report()
    return {
        "dense": _error(first, dense),
        "alone": _error(first, alone),
        "second": _error(first, second),
        "runs": collections.Counter((run.site, run.graph) for run in report.runs),
        "sites": {site.name: (site.reason, site.num_heads) for site in report.sites},
        "notes": report.notes,
    }


def _fully_sharded(small: SmallPipeline, name: str) -> SmallPipeline:
    for block in small.pipe.transformer.blocks:
        fully_shard(block, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return small


def _ring(small: SmallPipeline, name: str) -> SmallPipeline:
    # Diffusers' native backend gives no log-sum-exp, and those that do need a GPU: PyTorch's kernel for the CPU does.
    attention_dispatch._native_attention_forward_op = _with_log_sum_exp
    degrees = {"ring_degree": 2, "ulysses_degree": 2} if dist.get_world_size() == 4 else {"ring_degree": 2}
    return split(small, name, **degrees)


_native_forward = attention_dispatch._native_attention_forward_op


def _with_log_sum_exp(ctx: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    *_, return_lse = args
    if not return_lse:
        return _native_forward(ctx, query, key, value, *args, **kwargs)
    tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors)
    return out.transpose(1, 2), lse.transpose(1, 2)


HOW: dict[str, Callable[[SmallPipeline, str], SmallPipeline]] = {
    "ulysses": split,
    "anything": lambda small, name: split(small, name, ulysses_degree=dist.get_world_size(), ulysses_anything=True),
    "ring": _ring,
    "tensor parallel": lambda small, name: tensor_parallel(small),
    "fully sharded": _fully_sharded,
}


def balanced(name: str, options: dict[str, Any], how: str = "ulysses") -> dict[str, Any]:
    """As :func:`videos` with balanced heads. orders: that were dealt, by call."""
    orders: list[list[list[int]]] = []
    plain = program.rebalanced

    def watched(*args: Any) -> Any:
        result = plain(*args)
        orders.append([order.tolist() for order in result[1]])
        return result

    with mock.patch.object(program, "rebalanced", watched):
        return {**videos(name, {**options, "balance_heads": True}, how), "orders": orders}


def plainly_compiled(name: str) -> dict[str, Any]:
    """torch.compile(backend="svg2") by itself, compared with dense attention in one process."""
    small = parallel_build(name)
    dense = small.run(steps=STEPS)
    small = split(parallel_build(name), name)
    small.pipe.transformer.compile(backend="svg2", options=IDENTITY)
    result = small.run(steps=STEPS)
    runs = svg2_compile.report(small.pipe.transformer).runs
    return {"dense": _error(result, dense), "graphs": {run.graph for run in runs}, "runs": len(runs)}


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual - expected).abs().max().item() / expected.abs().max().item()


def with_other_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Two videos where rank 1 was given other options."""
    small = parallel_build(name)
    dense = small.run(steps=STEPS)
    small = split(parallel_build(name), name)
    own = {**IDENTITY, **(options if dist.get_rank() == 1 else {})}
    with svg2_compile.enable(small.pipe, **own) as enabled:
        results = [small.run(steps=STEPS) for _ in range(2)]
        runs = enabled.report().runs
    return {"dense": max(_error(result, dense) for result in results), "reasons": {run.reason for run in runs}}


def with_a_failing_compiler(name: str, when: str) -> dict[str, Any]:
    """Three videos where the inner backend of rank 1 fails: on every graph, or on the sparse one when it is needed."""
    small = parallel_build(name)
    dense = small.run(steps=STEPS)
    small = split(parallel_build(name), name)
    options = {**IDENTITY, "strict": False}
    if when == "lazily":
        options["dense_steps"] = 1
    plain = inner_backend.compile_inner
    failing = functools.partial(_failing, plain) if dist.get_rank() == 1 else plain
    with mock.patch.object(backend, "compile_inner", failing), svg2_compile.enable(small.pipe, **options) as enabled:
        results = [small.run(steps=STEPS) for _ in range(3)]
        runs = enabled.report().runs
    reasons = [sorted({run.reason for run in runs if run.video == video}) for video in range(3)]
    return {"dense": max(_error(result, dense) for result in results), "reasons": reasons}


def _failing(plain: Any, gm: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    if any("svg2" in str(node.target) for node in gm.graph.nodes):
        raise RuntimeError("this rank has no compiler")
    return plain(gm, *args, **kwargs)

"""First-order compensation with parts of it left out, to see what each is worth; and other published slopes.

An implementation of the ``svg2::`` operators: the CPU's, but the mass, the residual or the slope of skipped clusters is
replaced. Selection and attention are the same code, so that only that part differs.

    with parts(mass=True, residual=True, slope="none"):
        model(...)  # compiled with compensation="first_order"
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.quality.implementations import implementation
from svg2_compile.kernels.dispatch import IMPLEMENTATIONS, implementation_for

__all__ = ["Parts", "parts"]


class Parts(NamedTuple):
    """mass: exact at the centroid (part A), or that of the mean key. residual: part B. slope: "cluster" is q - q_i
    times the head's slope (part J); "head" is the whole query times it, PISA's global slope; or "none". members: a
    layer's budget (part P) looks at far members of query clusters, or at variances alone."""

    mass: bool
    residual: bool
    slope: str
    members: bool = True


# What serves the CPU, so that parts are as fast as what they are compared with.
cpu: Any = importlib.import_module(IMPLEMENTATIONS[implementation_for(torch.device("cpu"))].module)

_active: ContextVar[Parts | None] = ContextVar("bench_parts", default=None)


def __getattr__(name: str) -> Any:
    """Every other operator is the CPU's."""
    return getattr(cpu, name)


@contextmanager
def parts(chosen: Parts) -> Iterator[None]:
    """Run every ``svg2::`` operator inside the ``with`` block on the CPU, with these parts."""
    token = _active.set(chosen)
    try:
        with implementation("parts", __name__):
            yield
    finally:
        _active.reset(token)


def _chosen() -> Parts:
    active = _active.get()
    if active is None:
        raise RuntimeError("the implementation 'parts' runs inside `with parts(...)` only")
    return active


def block_estimates(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The exact mass, or n_j exp(s q_i.c_j), which makes the bias of a skipped cluster ln n_j."""
    means = (q_centroids, k_centroids, v_centroids)
    log_mass, log_error = cpu.block_estimates(key, value, k_offsets, *means, scale)
    if not _chosen().mass:
        sharing = q_centroids.shape[1] // k_centroids.shape[1]
        keys, offsets = (x.repeat_interleave(sharing, dim=1) for x in (k_centroids, k_offsets))
        sizes = offsets.diff(dim=-1)[..., : keys.shape[2]].unsqueeze(2)
        log_mass[..., : keys.shape[2]] = scale * (q_centroids @ keys.transpose(-1, -2)) + sizes.log()
    return log_mass, log_error


def first_order_estimates(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """These, and nothing known of all clusters: their residual belongs to exact masses."""
    log_mass, log_error = block_estimates(*arguments)
    value_dim = arguments[5].shape[3]
    return log_mass, log_error, log_mass.new_full((*log_mass.shape[:3], value_dim), torch.nan)


def select_blocks_of_layer(*arguments: Any) -> Tensor:
    """The CPU's selection, without its last argument where members do not count."""
    return cpu.select_blocks_of_layer(*(arguments if _chosen().members else arguments[:-1]))


def first_order_terms(
    key: Tensor,
    value: Tensor,
    k_offsets: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    log_mass: Tensor,
    block_map: Tensor,
    scale: float,
    residual_of_all: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The CPU's terms with what is left out set to 0; always summed over what is skipped."""
    means = (q_centroids, k_centroids, v_centroids)
    residual, slope = cpu.first_order_terms(key, value, k_offsets, *means, log_mass, block_map, scale)
    chosen = _chosen()
    if not chosen.residual:
        residual.zero_()
    if chosen.slope == "none":
        slope.zero_()
    if chosen.slope == "head":  # (q - q_i) G + q_i G
        residual += q_centroids @ slope.repeat_interleave(q_centroids.shape[1] // slope.shape[1], dim=1)
    return residual, slope


def slopes_of_clusters(
    key: Tensor, value: Tensor, sizes: Tensor, k_centroids: Tensor, v_centroids: Tensor, scale: float
) -> Tensor:
    """s Cov_j(k, v) of every cluster of one head, [Ck, D, Dv]: what a slope per query cluster (J0) averages."""
    covariances = key.new_zeros(sizes.shape[0], key.shape[1], value.shape[1])
    begin = 0
    for j, size in enumerate(sizes.tolist()):
        run = slice(begin, begin + size)
        covariances[j] = (key[run] - k_centroids[j]).T @ (value[run] - v_centroids[j]) * (scale / max(size, 1))
        begin += size
    return torch.nan_to_num(covariances)

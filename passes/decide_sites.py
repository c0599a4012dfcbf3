"""Analysis: which attentions become sparse, and why the others do not.

Needs: the attentions of find_attention, the layouts of token_layout on the same graph. Changes nothing.

An attention becomes a Site where its queries and keys are the same tokens, a part of them is video, nothing but key
padding masks it, and it is long enough to gain. Everything else becomes a Skip with a stable reason. In doubt: dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Max, Min

from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS, CountRule
from svg2_compile.kernels.dispatch import DEFAULT_IMPLEMENTATION, IMPLEMENTATIONS
from svg2_compile.passes.attention.call import AttentionCall, UnreadableAttention
from svg2_compile.passes.attention.masks import KeyPadding, MaskSkip, read_key_padding
from svg2_compile.passes.cost_model import (
    REFERENCE,
    CostInputs,
    crossover_tokens,
    expected_density,
    profile_for,
    speedup,
)
from svg2_compile.passes.graph.values import fake_mode_of_values, node_value
from svg2_compile.passes.layout.axes import Factor, same_length, size_expr
from svg2_compile.passes.token_layout import TokenLayouts

__all__ = ["Site", "SitePolicy", "Skip", "decide_sites"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SitePolicy:
    """The part of the configuration that decides which attentions become sparse (see Svg2Config)."""

    min_tokens: int | str
    dense_layers: int | float
    num_q_clusters: int | None
    num_k_clusters: int | None
    step_iters: int
    top_p: float
    density: float | None
    min_k_ratio: float
    compensation: str
    routing: str


@dataclass(frozen=True)
class Site:
    """An attention that becomes sparse. Token and cluster counts are ints, or sympy expressions if symbolic."""

    index: int
    name: str
    call: AttentionCall
    batch: Any
    num_heads: Any
    num_kv_heads: Any
    head_dim: int
    num_tokens: Any
    video_start: Any
    video_tokens: Any
    key_padding: KeyPadding | None
    num_q_clusters: Any
    num_k_clusters: Any
    predicted_speedup: float | None


@dataclass(frozen=True)
class Skip:
    """An attention that stays dense. reason: a stable code; detail: in words. Numbers are None where unknown."""

    name: str
    reason: str
    detail: str
    video_tokens: Any = None
    context_tokens: Any = None
    num_heads: Any = None
    head_dim: Any = None
    predicted_speedup: float | None = None


class _Dense(Exception):
    """Why an attention stays dense."""

    def __init__(self, reason: str, detail: str, **numbers: Any) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.numbers = numbers


def decide_sites(
    calls: Sequence[AttentionCall],
    unreadable: Sequence[UnreadableAttention],
    layouts: TokenLayouts,
    policy: SitePolicy,
    device: torch.device,
    regional: bool = False,
) -> list[Site | Skip]:
    """Decide every attention, in the order of the graph.

    Args:
        calls, unreadable: of find_attention.
        layouts: of token_layout, on the same graph.
        policy: thresholds and cluster counts.
        device: what the cost model is asked about.
        regional: the graph is one layer among many: dense_layers is then decided at run time, not here.
    """
    decisions: list[tuple[Any, Site | Skip]] = [
        (found.node, Skip(found.name, found.reason, found.detail)) for found in unreadable
    ]
    decisions += [(call.node, _decide(call, layouts, policy, device)) for call in calls]
    position = {node: i for i, node in enumerate(next(iter(decisions))[0].graph.nodes)} if decisions else {}
    ordered = [decision for _, decision in sorted(decisions, key=lambda pair: position[pair[0]])]
    if not regional:
        ordered = _leave_first_layers_dense(ordered, policy.dense_layers)
    return _numbered(ordered)


def _leave_first_layers_dense(decisions: list[Site | Skip], dense_layers: int | float) -> list[Site | Skip]:
    sites = [decision for decision in decisions if isinstance(decision, Site)]
    count = dense_layers if isinstance(dense_layers, int) else math.ceil(dense_layers * len(sites) - 1e-9)
    first = {id(site) for site in sites[:count]}
    detail = f"the first {count} attentions over the video stay dense (dense_layers={dense_layers})"
    return [_skip_site(d, "dense_layer", detail) if isinstance(d, Site) and id(d) in first else d for d in decisions]


def _numbered(decisions: list[Site | Skip]) -> list[Site | Skip]:
    result: list[Site | Skip] = []
    index = 0
    for decision in decisions:
        if isinstance(decision, Site):
            decision = replace(decision, index=index)
            index += 1
        result.append(decision)
    return result


def _skip_site(site: Site, reason: str, detail: str) -> Skip:
    return Skip(
        *(site.name, reason, detail, site.video_tokens, site.num_tokens - site.video_tokens),
        *(site.num_heads, site.head_dim, site.predicted_speedup),
    )


def _decide(call: AttentionCall, layouts: TokenLayouts, policy: SitePolicy, device: torch.device) -> Site | Skip:
    numbers: dict[str, Any] = {}
    try:
        if device.type not in (*DEFAULT_IMPLEMENTATION, "meta"):
            raise _Dense("unsupported_device", f"{device.type}; supported: {', '.join(DEFAULT_IMPLEMENTATION)}")
        batch, num_heads, num_kv_heads, head_dim, tokens = _dimensions(call)
        numbers |= {"num_heads": num_heads, "head_dim": head_dim}
        _check_head_dim(call, head_dim, device)
        start, video = _video_part(call, layouts)
        numbers |= {"video_tokens": video, "context_tokens": tokens - video}
        padding = _check_call(call)
        clusters = _cluster_counts(policy, video)
        site = Site(
            *(-1, call.name, call, batch, num_heads, num_kv_heads, head_dim, tokens, start, video, padding, *clusters),
            predicted_speedup=None,
        )
        return _check_length(site, policy, device)
    except _Dense as dense:
        return Skip(call.name, dense.reason, dense.detail, **{**numbers, **dense.numbers})


def _check_head_dim(call: AttentionCall, head_dim: int, device: torch.device) -> None:
    value = node_value(call.value)
    widest = max(head_dim, value.shape[-1]) if isinstance(value, torch.Tensor) else head_dim
    name = DEFAULT_IMPLEMENTATION.get(device.type)
    limit = IMPLEMENTATIONS[name].max_head_dim if name is not None else None
    if limit is not None and widest > limit:
        raise _Dense("head_dim", f"head_dim {widest}; the {name} kernels take at most {limit}")


def _dimensions(call: AttentionCall) -> tuple[Any, Any, Any, int, Any]:
    """Batch, query heads, key heads, head_dim and tokens."""
    query, key = node_value(call.query), node_value(call.key)
    if not isinstance(query, torch.Tensor) or not isinstance(key, torch.Tensor):
        raise _Dense("unreadable", "query or key is no tensor of the graph")
    rank = 3 if call.axes == "gnd" else 4
    if query.dim() != rank or key.dim() != rank:
        raise _Dense("unreadable", f"query of rank {query.dim()} and key of rank {key.dim()}; readable: {rank}")
    if call.axes == "gnd":
        heads = call.num_heads or 1
        batch: Any = FloorDiv(size_expr(query.shape[0]), heads)
        kv_heads: Any = heads
    else:
        head_dim_at = 1 if call.axes == "bhnd" else 2
        batch, heads, kv_heads = query.shape[0], query.shape[head_dim_at], key.shape[head_dim_at]
    head_dim = query.shape[-1]
    if not isinstance(head_dim, int):
        raise _Dense("unreadable", "a symbolic head_dim")
    values = (batch, heads, kv_heads)
    return *(_plain(size_expr(value)) for value in values), head_dim, _plain(size_expr(query.shape[call.token_dim]))


def _plain(size: Any) -> Any:
    """An int where a size is known, else the expression."""
    return int(size) if isinstance(size, int) or size.is_Integer else size


def _video_part(call: AttentionCall, layouts: TokenLayouts) -> tuple[Any, Any]:
    """Start and length of the video on the token axis that queries and keys share."""
    query = layouts.segments(call.query, call.token_dim)
    key = layouts.segments(call.key, call.key_token_dim)
    if query is None or key is None or not layouts.latent:
        raise _Dense("unknown_layout", "it could not be shown where the tokens come from")
    query_parts, key_parts = _parts(query, layouts), _parts(key, layouts)
    has_video = [any(is_video for is_video, _ in parts) for parts in (query_parts, key_parts)]
    if not any(has_video):
        raise _Dense("not_video", "queries and keys are no video tokens")
    if not all(has_video):
        raise _Dense("cross_attention", "queries and keys are different tokens")
    if len(query_parts) != len(key_parts) or not all(
        mine[0] == other[0] and same_length(mine[1], other[1])
        for mine, other in zip(query_parts, key_parts, strict=True)
    ):
        raise _Dense("layout_mismatch", "queries and keys are made of different parts")
    positions = [index for index, (is_video, _) in enumerate(query_parts) if is_video]
    if len(positions) != 1:
        raise _Dense("multiple_video_segments", "the video is not one piece on the token axis")
    start = sympy.Add(*(length for _, length in query_parts[: positions[0]]))
    return _plain(start), _plain(query_parts[positions[0]][1])


def _parts(segments: Factor, layouts: TokenLayouts) -> list[tuple[bool, sympy.Expr]]:
    """The segments as (is video, length), neighbours of one kind joined."""
    parts: list[tuple[bool, sympy.Expr]] = []
    for segment in segments:
        is_video = bool(segment.sources & layouts.latent)
        if parts and parts[-1][0] == is_video:
            parts[-1] = (is_video, parts[-1][1] + segment.length)
        else:
            parts.append((is_video, segment.length))
    return parts


def _check_call(call: AttentionCall) -> KeyPadding | None:
    if call.is_causal:
        raise _Dense("causal", "a causal mask: later tokens must not be attended")
    if call.dropout_p:
        raise _Dense("dropout", f"dropout_p={call.dropout_p}: call model.eval()")
    dtype = node_value(call.node).dtype
    if dtype not in _DTYPES:
        raise _Dense("unsupported_dtype", f"{dtype}; supported: float32, bfloat16, float16")
    padding = read_key_padding(call)
    if isinstance(padding, MaskSkip):
        raise _Dense(padding.reason, padding.detail)
    if padding is not None and call.axes == "gnd" and call.num_heads is None:
        raise _Dense("unreadable", "a mask on an attention whose batch and heads cannot be told apart")
    return padding


def _cluster_counts(policy: SitePolicy, video: Any) -> tuple[Any, Any]:
    """Clusters of queries and keys: as configured, else from the number of tokens; never more than tokens."""
    q_clusters = policy.num_q_clusters or _default_count(QUERY_CLUSTERS, video)
    k_clusters = policy.num_k_clusters or _default_count(KEY_CLUSTERS, video)
    return _plain(Min(q_clusters, video)), _plain(Min(k_clusters, video))


def _default_count(rule: CountRule, video: Any) -> Any:
    """``rule.count``, of a symbolic number of tokens as well."""
    wanted = rule.base + FloorDiv(video, rule.tokens_per_cluster)
    return Min(wanted, rule.most, Max(1, FloorDiv(video, rule.fewest_tokens)))


def _check_length(site: Site, policy: SitePolicy, device: torch.device) -> Site:
    """Compare with min_tokens; symbolic lengths are judged by the size that was traced, without a guard."""
    video, tokens = _hint(site, site.video_tokens), _hint(site, site.num_tokens)
    batch, heads = _hint(site, site.batch), _hint(site, site.num_heads)
    if isinstance(policy.min_tokens, int):
        if video is not None and video < policy.min_tokens:
            raise _Dense("short_sequence", f"{video} video tokens, fewer than min_tokens={policy.min_tokens}")
        if site.video_tokens == 0:
            raise _Dense("short_sequence", "no video tokens")
    if video is None or tokens is None or batch is None or heads is None:
        if policy.min_tokens == "auto":
            raise _Dense("cost", "the size depends on data: give min_tokens as an integer to make it sparse")
        return site
    cost = CostInputs(
        video=video,
        context=tokens - video,
        groups=batch * heads,
        head_dim=site.head_dim,
        num_q_clusters=_hint(site, site.num_q_clusters),
        num_k_clusters=_hint(site, site.num_k_clusters),
        iters=policy.step_iters,
        density=expected_density(policy.top_p, policy.density, policy.min_k_ratio),
        bytes_per_element=node_value(site.call.node).dtype.itemsize,
        compensation=policy.compensation == "centroid",
        error_routing=policy.routing == "error",
    )
    profile = profile_for(device)
    gain = float(speedup(cost, profile)) if cost.groups and video else 0.0
    if policy.min_tokens == "auto" and profile is REFERENCE:
        raise _Dense("cost", f"no fast kernels for {device.type} devices: min_tokens=<int> runs the slow reference")
    if policy.min_tokens == "auto" and gain <= 1.0:
        crossover = crossover_tokens(cost, profile) if cost.groups else None
        where = f"from about {crossover} tokens on" if crossover else "at no length"
        raise _Dense(
            "cost",
            f"{video} video tokens: sparse attention is expected to gain on {profile.name} {where} "
            f"(expected density {cost.density:.0%}); min_tokens=<int> overrides this",
            predicted_speedup=gain,
        )
    return replace(site, predicted_speedup=gain)


def _hint(site: Site, size: Any) -> int | None:
    """The size that was traced; None for one that depends on data. Reads no guard."""
    if isinstance(size, int):
        return size
    mode = fake_mode_of_values(node_value(site.call.node))
    shape_env = mode.shape_env if mode is not None else None
    if shape_env is None:
        return None
    # Named var_to_val before torch 2.13.
    known = shape_env.backed_var_to_val if hasattr(shape_env, "backed_var_to_val") else shape_env.var_to_val
    value = size.xreplace({symbol: known[symbol] for symbol in size.free_symbols if symbol in known})
    return None if value.free_symbols else int(value)

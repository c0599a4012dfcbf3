"""Analysis: which attentions become sparse, and why the others do not.

Needs: the attentions of find_attention, the layouts of token_layout on the same graph. Changes nothing.

    attn1 = scaled_dot_product_attention(query, key, value)              ->  Site: tokens 0 to 8192 are the video
    attn2 = scaled_dot_product_attention(query, text_key, text_value)    ->  Skip: "cross_attention"

An attention becomes a Site where its queries and keys are the same tokens, a part of them is video (in one piece or in
several), nothing but key padding masks it, and it is long enough to gain. Everything else becomes a Skip with a stable
reason. In doubt: dense. Where the length is symbolic, a Site is asked anew at every size whether it is long enough.
Guarantees: every attention has one decision, in the order of the graph; no guard is added.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from svg2_compile.kernels.dispatch import DEFAULT_IMPLEMENTATION, IMPLEMENTATIONS
from svg2_compile.passes.attention.call import AttentionCall, UnreadableAttention
from svg2_compile.passes.attention.masks import KeyPadding, MaskSkip, read_key_padding
from svg2_compile.passes.device_profile import DeviceProfile, profile_for
from svg2_compile.passes.expected_gain import cluster_counts, traced_video_tokens, with_expected_gain
from svg2_compile.passes.graph.nodes import is_projected
from svg2_compile.passes.graph.sizes import plain_size
from svg2_compile.passes.graph.values import node_value
from svg2_compile.passes.layout.axes import Factor
from svg2_compile.passes.layout.lengths import same_length, size_expr
from svg2_compile.passes.picked_tokens import as_picked, check_picks
from svg2_compile.passes.sites import Site, SitePolicy, Skip, dense_layer_count, dense_layer_detail
from svg2_compile.passes.stays_dense import StaysDense
from svg2_compile.passes.token_layout import TokenLayouts, segments_of

__all__ = ["Parts", "decide_call", "decide_sites", "numbered", "video_parts"]

Parts = tuple[tuple[Any, Any], ...]
"""Start and length of every piece of the video on the token axis that queries and keys share."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def decide_sites(
    calls: Sequence[AttentionCall],
    unreadable: Sequence[UnreadableAttention],
    layouts: TokenLayouts,
    policy: SitePolicy,
    device: torch.device,
    regional: bool = False,
    profile: DeviceProfile | None = None,
    first_dense: Callable[[Sequence[str]], int] | None = None,
    numbers: Mapping[sympy.Symbol, Any] | None = None,
) -> list[Site | Skip]:
    """Decide every attention, in the order of the graph.

    Args:
        calls, unreadable: of find_attention.
        layouts: of token_layout, on the same graph.
        policy: thresholds and cluster counts.
        device: whose kernels will run.
        regional: the graph is one layer among many: dense_layers is then decided at run time, not here.
        profile: what the cost model is asked about; None is that of ``device``.
        first_dense: how many of the first of these attentions stay dense, for a caller who knows what comes before
            the graph; None is by ``policy.dense_layers`` of this graph alone.
        numbers: of all symbols, if the layouts hold for these sizes alone.
    """
    decisions: list[tuple[Any, Site | Skip]] = [
        (found.node, Skip(found.name, found.reason, found.detail)) for found in unreadable
    ]
    profile = profile or profile_for(device)
    for call in (as_picked(call, layouts) for call in calls):
        find_parts = functools.partial(video_parts, call, layouts)
        decisions.append((call.node, _decide(call, find_parts, policy, device, profile, numbers or {})))
    position = {node: i for i, node in enumerate(next(iter(decisions))[0].graph.nodes)} if decisions else {}
    ordered = [decision for _, decision in sorted(decisions, key=lambda pair: position[pair[0]])]
    ordered = _settle_the_shorter(ordered)
    if not regional:
        names = [decision.name for decision in ordered if isinstance(decision, Site)]
        count = first_dense(names) if first_dense is not None else dense_layer_count(policy.dense_layers, len(names))
        ordered = _leave_first_layers_dense(ordered, count, dense_layer_detail(count, policy.dense_layers))
    return numbered(ordered)


def _settle_the_shorter(decisions: list[Site | Skip]) -> list[Site | Skip]:
    """A graph is sparse at a size where all of its sites are. So of those that are too short at the traced size only
    the longest wait for another one: a short one beside them would keep them dense."""
    sites = [decision for decision in decisions if isinstance(decision, Site)]
    all_short = all(site.too_short is not None for site in sites)
    longest = max(map(traced_video_tokens, sites), default=None) if all_short else None

    def settle(decision: Site | Skip) -> Site | Skip:
        if not isinstance(decision, Site) or decision.too_short is None or traced_video_tokens(decision) == longest:
            return decision
        return _skip_site(decision, decision.too_short.reason, decision.too_short.detail)

    return [settle(decision) for decision in decisions]


def _leave_first_layers_dense(decisions: list[Site | Skip], count: int, detail: str) -> list[Site | Skip]:
    sites = [decision for decision in decisions if isinstance(decision, Site)]
    first = {id(site) for site in sites[:count]}
    return [_skip_site(d, "dense_layer", detail) if isinstance(d, Site) and id(d) in first else d for d in decisions]


def numbered(decisions: list[Site | Skip]) -> list[Site | Skip]:
    """The decisions, their sites numbered in order."""
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
        name=site.name,
        reason=reason,
        detail=detail,
        video_tokens=site.video_tokens,
        context_tokens=site.num_tokens - site.video_tokens,
        num_heads=site.num_heads,
        head_dim=site.head_dim,
        predicted_speedup=site.predicted_speedup,
        expected_density=site.expected_density,
    )


def decide_call(
    call: AttentionCall,
    parts: Parts | StaysDense,
    policy: SitePolicy,
    device: torch.device,
    profile: DeviceProfile | None = None,
) -> Site | Skip:
    """Decide one attention of which it is known where the video is, or why not; the rest as of decide_sites."""

    def known_parts() -> Parts:
        lengths = [node_value(call.query).shape[call.token_dim], node_value(call.key).shape[call.key_token_dim]]
        if lengths[0] != lengths[1]:
            raise StaysDense("cross_attention", f"{lengths[0]} queries and {lengths[1]} keys are different tokens")
        if isinstance(parts, StaysDense):
            raise parts
        return parts

    return _decide(call, known_parts, policy, device, profile or profile_for(device), {})


def _decide(
    call: AttentionCall,
    find_parts: Callable[[], Parts],
    policy: SitePolicy,
    device: torch.device,
    profile: DeviceProfile,
    known: Mapping[sympy.Symbol, Any],
) -> Site | Skip:
    numbers: dict[str, Any] = {}
    try:
        if device.type not in (*DEFAULT_IMPLEMENTATION, "meta"):
            raise StaysDense("unsupported_device", f"{device.type}; supported: {', '.join(DEFAULT_IMPLEMENTATION)}")
        batch, num_heads, num_kv_heads, head_dim, tokens = _dimensions(call, known)
        numbers |= {"num_heads": num_heads, "head_dim": head_dim}
        _check_head_dim(call, head_dim, device)
        parts = find_parts()
        video_tokens = plain_size(sympy.Add(*(length for _, length in parts)))
        numbers |= {"video_tokens": video_tokens, "context_tokens": tokens - video_tokens}
        key_padding = _check_call(call)
        num_q_clusters, num_k_clusters = cluster_counts(policy, video_tokens)
        site = Site(
            index=-1,  # numbered when all are decided
            name=call.name,
            call=call,
            batch=batch,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_tokens=tokens,
            video_start=parts[0][0] if len(parts) == 1 else 0,
            video_parts=parts,
            video_tokens=video_tokens,
            key_padding=key_padding,
            num_q_clusters=num_q_clusters,
            num_k_clusters=num_k_clusters,
            predicted_speedup=None,
        )
        return with_expected_gain(site, policy, profile)
    except StaysDense as dense:
        return Skip(call.name, dense.reason, dense.detail, **{**numbers, **dense.numbers})


def _check_head_dim(call: AttentionCall, head_dim: int, device: torch.device) -> None:
    value = node_value(call.value)
    widths = [head_dim, value.shape[-1]] if isinstance(value, torch.Tensor) else [head_dim]
    widest = max(width for width in widths if isinstance(width, int))
    name = DEFAULT_IMPLEMENTATION.get(device.type)
    limit = IMPLEMENTATIONS[name].max_head_dim if name is not None else None
    if limit is not None and widest > limit:
        raise StaysDense("head_dim", f"head_dim {widest}; the {name} kernels take at most {limit}")


def _dimensions(call: AttentionCall, known: Mapping[sympy.Symbol, Any]) -> tuple[Any, Any, Any, int, Any]:
    """Batch, query heads, key heads, head_dim and tokens."""
    query, key = node_value(call.query), node_value(call.key)
    if not isinstance(query, torch.Tensor) or not isinstance(key, torch.Tensor):
        raise StaysDense("unreadable", "query or key is no tensor of the graph")
    rank = 3 if call.axes in ("gnd", "nhd") else 4
    if query.dim() != rank or key.dim() != rank:
        raise StaysDense("unreadable", f"query of rank {query.dim()} and key of rank {key.dim()}; readable: {rank}")
    if call.axes == "gnd":
        heads = kv_heads = call.num_heads or 1
        batch: Any = FloorDiv(size_expr(query.shape[0]), size_expr(heads))
    elif call.axes == "nhd":
        batch, heads, kv_heads = call.sequences, query.shape[1], key.shape[1]
    else:
        heads_dim = 1 if call.axes == "bhnd" else 2
        batch, heads, kv_heads = query.shape[0], query.shape[heads_dim], key.shape[heads_dim]
    head_dim = _number(query.shape[-1], known)
    if not isinstance(head_dim, int):
        raise StaysDense("unknown_layout", f"a symbolic head_dim, {head_dim}")
    rows = query.shape[call.token_dim] if call.picked is None else call.picked.queries.length
    sizes = (batch, heads, kv_heads, FloorDiv(size_expr(rows), call.sequences))
    batch, heads, kv_heads, tokens = (_number(size, known) for size in sizes)
    return batch, heads, kv_heads, head_dim, tokens


def _number(size: Any, known: Mapping[sympy.Symbol, Any]) -> Any:
    """A size as an int where it is one, or is known to be one; else the expression."""
    return plain_size(size_expr(size).xreplace({symbol: sympy.sympify(number) for symbol, number in known.items()}))


def video_parts(call: AttentionCall, layouts: TokenLayouts) -> Parts:
    """Where the video is, by the layouts of queries and keys."""
    if call.picked is not None:
        query, key = (segments_of(axis, call.sequences) for axis in (call.picked.queries, call.picked.keys))
    else:
        check_picks(call, layouts)
        query = layouts.segments(call.query, call.token_dim, call.sequences)
        key = layouts.segments(call.key, call.key_token_dim, call.sequences)
    if query is None or key is None or not layouts.latent:
        raise StaysDense("unknown_layout", layouts.why_unknown(call.query))
    if call.picked is None and _arrive_as_they_are(query, key, call, layouts):
        return ((0, plain_size(query[0].length)),)
    query_parts, key_parts = _parts(query, layouts), _parts(key, layouts)
    has_video = [any(is_video for is_video, _ in parts) for parts in (query_parts, key_parts)]
    if not any(has_video):
        raise StaysDense("not_video", "queries and keys are no video tokens")
    if not all(has_video):
        raise StaysDense("cross_attention", "queries and keys are different tokens")
    if len(query_parts) != len(key_parts) or not all(
        mine[0] == other[0] and same_length(mine[1], other[1])
        for mine, other in zip(query_parts, key_parts, strict=True)
    ):
        raise StaysDense("layout_mismatch", "queries and keys are made of different parts")
    starts = itertools.accumulate((length for _, length in query_parts), initial=sympy.Integer(0))
    pieces = [(start, length) for start, (is_video, length) in zip(starts, query_parts, strict=False) if is_video]
    return tuple((plain_size(start), plain_size(length)) for start, length in pieces)


def _arrive_as_they_are(query: Factor, key: Factor, call: AttentionCall, layouts: TokenLayouts) -> bool:
    """Whether queries, keys and values are three inputs of the graph of one length.

    A graph break left their projections to another graph. Text that a video attends to is not as long as the video, and
    tokens that attend to equally many others are clustered as well as those that attend to themselves. What queries and
    keys both take in, such as rotary embeddings, tells neither from the other.
    """
    value = layouts.segments(call.value, call.token_dim, call.sequences)
    tensors = (query, key, value or ())
    if any(len(segments) != 1 for segments in tensors):
        return False
    common = query[0].sources & key[0].sources
    own = [segments[0].sources - common for segments in tensors]
    if any(len(sources) != 1 for sources in own):
        return False
    if any(is_projected(node) for node in (call.query, call.key, call.value)):
        return False
    names = frozenset().union(*own)
    lengths = [segments[0].length for segments in tensors]
    if len(names) < 3 or not names <= layouts.inputs:
        return False
    if all(same_length(length, lengths[0]) for length in lengths):
        return True
    if any(length.free_symbols for length in lengths):
        raise StaysDense("layout_mismatch", "it is not known whether queries and keys are equally many")
    return False


def _parts(segments: Factor, layouts: TokenLayouts) -> list[tuple[bool, sympy.Expr]]:
    """The segments as (is video, length), neighbours of one kind joined."""
    parts: list[tuple[bool, sympy.Expr]] = []
    for segment, is_video in zip(segments, _are_video(segments, layouts), strict=True):
        if parts and parts[-1][0] == is_video:
            parts[-1] = (is_video, parts[-1][1] + segment.length)
        else:
            parts.append((is_video, segment.length))
    return parts


def _are_video(segments: Factor, layouts: TokenLayouts) -> list[bool]:
    """Which segments are video. A block may be handed video and text as one tensor: what of it has no position is text.

    [tokens, rotary: 480 | tokens: 24]  ->  the first 480
    """
    videos = [segment.sources & layouts.latent for segment in segments]
    positions = [segment.sources - layouts.latent for segment in segments]

    def lacks_position(index: int) -> bool:
        alike = [positions[i] for i, video in enumerate(videos) if video == videos[index]]
        return any(positions[index] < other for other in alike)

    return [bool(video) and not lacks_position(index) for index, video in enumerate(videos)]


def _check_call(call: AttentionCall) -> KeyPadding | None:
    if call.is_causal:
        raise StaysDense("causal", "a causal mask: later tokens must not be attended")
    if call.dropout_p:
        raise StaysDense("dropout", f"dropout_p={call.dropout_p}: call model.eval()")
    dtype = node_value(call.node).dtype
    if dtype not in _DTYPES:
        raise StaysDense("unsupported_dtype", f"{dtype}; supported: float32, bfloat16, float16")
    padding = read_key_padding(call)
    if isinstance(padding, MaskSkip):
        raise StaysDense(padding.reason, padding.detail)
    if padding is not None and call.axes == "gnd" and call.num_heads is None:
        raise StaysDense("unreadable", "a mask on an attention whose batch and heads cannot be told apart")
    return padding

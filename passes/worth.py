"""Whether an attention is long enough to gain from becoming sparse, and with how many clusters.

    900 video tokens, min_tokens=1       ->  the site with its predicted speedup
    900 video tokens, min_tokens="auto"  ->  StaysDense("cost"): where the cost model predicts no gain

Guarantees: symbolic lengths are judged by the size that was traced, and no guard is added.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.utils._sympy.functions import FloorDiv, Max, Min

from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS, CountRule
from svg2_compile.passes.cost_model import (
    REFERENCE,
    CostInputs,
    DeviceProfile,
    crossover_tokens,
    expected_density,
    speedup,
)
from svg2_compile.passes.graph.sizes import plain_size
from svg2_compile.passes.graph.values import fake_mode_of_values, node_value
from svg2_compile.passes.layout.lengths import known_number
from svg2_compile.passes.sites import Site, SitePolicy, StaysDense

__all__ = ["cluster_counts", "with_expected_gain"]


def cluster_counts(policy: SitePolicy, video: Any) -> tuple[Any, Any]:
    """Clusters of queries and keys: as configured, else from the number of tokens; never more than tokens."""
    q_clusters = policy.num_q_clusters or _default_count(QUERY_CLUSTERS, video)
    k_clusters = policy.num_k_clusters or _default_count(KEY_CLUSTERS, video)
    return plain_size(Min(q_clusters, video)), plain_size(Min(k_clusters, video))


def _default_count(rule: CountRule, video: Any) -> Any:
    """``rule.count``, of a symbolic number of tokens as well."""
    wanted = rule.base + FloorDiv(video, rule.tokens_per_cluster)
    return Min(wanted, rule.most, Max(1, FloorDiv(video, rule.fewest_tokens)))


def with_expected_gain(site: Site, policy: SitePolicy, profile: DeviceProfile) -> Site:
    """The site with its predicted speedup, if the size is known. Raises StaysDense where it is too short to gain."""
    video = _hint(site, site.video_tokens)
    if isinstance(policy.min_tokens, int):
        if video is not None and video < policy.min_tokens:
            raise StaysDense("short_sequence", f"{video} video tokens, fewer than min_tokens={policy.min_tokens}")
        if site.video_tokens == 0:
            raise StaysDense("short_sequence", "no video tokens")
    cost = _cost_inputs(site, policy)
    if cost is None:
        if policy.min_tokens == "auto":
            raise StaysDense("cost", "the size depends on data: give min_tokens as an integer to make it sparse")
        return site
    gain = float(speedup(cost, profile)) if cost.groups and video else 0.0
    if policy.min_tokens == "auto":
        _check_gain(cost, profile, gain)
    return replace(site, predicted_speedup=gain, expected_density=cost.density)


def _check_gain(cost: CostInputs, profile: DeviceProfile, gain: float) -> None:
    if profile is REFERENCE:
        raise StaysDense("cost", "no fast kernels for this device: min_tokens=<int> runs the slow reference")
    if gain <= 1.0:
        crossover = crossover_tokens(cost, profile) if cost.groups else None
        where = f"from about {crossover} tokens on" if crossover else "at no length"
        raise StaysDense(
            "cost",
            f"{cost.video} video tokens: sparse attention is expected to gain on {profile.name} {where} "
            f"(expected density {cost.density:.0%}); min_tokens=<int> overrides this",
            predicted_speedup=gain,
            expected_density=cost.density,
        )


def _cost_inputs(site: Site, policy: SitePolicy) -> CostInputs | None:
    """What the cost model is asked about; None where a size depends on data."""
    video, tokens = _hint(site, site.video_tokens), _hint(site, site.num_tokens)
    batch, heads = _hint(site, site.batch), _hint(site, site.num_heads)
    if video is None or tokens is None or batch is None or heads is None:
        return None
    return CostInputs(
        video=video,
        context=tokens - video,
        groups=batch * heads,
        head_dim=site.head_dim,
        num_q_clusters=_hint(site, site.num_q_clusters),
        num_k_clusters=_hint(site, site.num_k_clusters),
        iters=policy.step_iters,
        density=expected_density(policy.top_p, policy.density, policy.min_k_ratio),
        bytes_per_element=node_value(site.call.node).dtype.itemsize,
        compensation=policy.compensation != "none",
        error_routing=policy.routing == "error",
        first_order=policy.compensation == "first_order",
    )


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
    return known_number(size, known)

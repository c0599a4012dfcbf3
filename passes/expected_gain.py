"""What an attention is expected to gain from becoming sparse, and with how many clusters.

    900 video tokens    ->  the site with its predicted speedup, or StaysDense where it is too short
    s0 * s1             ->  the same for the sizes that were traced, and the site keeps the question for others (Worth)

Guarantees: no guard is added.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Max, Min

from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS, CountRule
from svg2_compile.passes.cost_model import CostInputs, expected_density
from svg2_compile.passes.device_profile import DeviceProfile
from svg2_compile.passes.graph.sizes import input_sizes, plain_size, traced_sizes
from svg2_compile.passes.graph.values import fake_mode_of_values, node_value
from svg2_compile.passes.layout.lengths import known_number
from svg2_compile.passes.sites import Site, SitePolicy
from svg2_compile.passes.stays_dense import StaysDense
from svg2_compile.passes.worth import Sizes, Worth

__all__ = ["cluster_counts", "traced_video_tokens", "with_expected_gain"]


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
    """The site with its predicted speedup, and with its Worth if other sizes may have another answer.

    Raises:
        StaysDense: it is too short to gain, and no other size of this graph may be longer.
    """
    worth = Worth(_cost_inputs(site, policy), policy.min_tokens, profile)
    shape_env = _shape_env(site)
    traced = traced_sizes(shape_env)
    open_to_change = (
        shape_env is not None
        and _is_known_at_run_time(site, worth, traced)
        and worth.may_change(traced, shape_env.var_to_range)
    )
    site = replace(site, worth=worth if open_to_change else None, expected_density=worth.cost.density)
    try:
        return replace(site, predicted_speedup=worth.gain(traced))
    except StaysDense as dense:
        if not open_to_change:
            raise
        return replace(site, predicted_speedup=dense.numbers.get("predicted_speedup"), too_short=dense)


def _cost_inputs(site: Site, policy: SitePolicy) -> CostInputs:
    """What the cost model is asked about; symbolic where the graph is."""
    return CostInputs(
        video=site.video_tokens,
        context=plain_size(site.num_tokens - site.video_tokens),
        groups=plain_size(site.batch * site.num_heads),
        head_dim=site.head_dim,
        num_q_clusters=site.num_q_clusters,
        num_k_clusters=site.num_k_clusters,
        iters=policy.step_iters,
        density=expected_density(policy.top_p, policy.density, policy.min_k_ratio),
        bytes_per_element=node_value(site.call.node).dtype.itemsize,
        compensation=policy.compensation != "none",
        error_routing=policy.routing == "error",
        first_order=policy.compensation == "first_order",
    )


def traced_video_tokens(site: Site) -> int:
    """The video tokens of the call that was traced; 0 where they depend on data."""
    return known_number(site.video_tokens, traced_sizes(_shape_env(site))) or 0


def _is_known_at_run_time(site: Site, worth: Worth, traced: Sizes) -> bool:
    """Whether all sizes that the answer depends on can be read off the inputs of the graph."""
    return worth.symbols <= traced.keys() and (
        not worth.symbols or worth.symbols <= input_sizes(site.call.node.graph).keys()
    )


def _shape_env(site: Site) -> ShapeEnv | None:
    mode = fake_mode_of_values(node_value(site.call.node))
    return mode.shape_env if mode is not None else None

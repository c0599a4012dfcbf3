"""Whether an attention is long enough to gain from becoming sparse, and with how many clusters.

    900 video tokens, min_tokens=1       ->  the site with its predicted speedup
    900 video tokens, min_tokens="auto"  ->  StaysDense("cost"): where the cost model predicts no gain
    s0 * s1 video tokens                 ->  the site with a Worth, which is asked at every new size

Guarantees: no guard is added. Sizes that depend on data pass for an integer min_tokens, and stay dense for "auto".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Max, Min
from torch.utils._sympy.value_ranges import bound_sympy

from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS, CountRule
from svg2_compile.passes.cost_model import (
    REFERENCE,
    CostInputs,
    DeviceProfile,
    crossover_tokens,
    expected_density,
    speedup,
)
from svg2_compile.passes.graph.sizes import input_sizes, plain_size, traced_sizes
from svg2_compile.passes.graph.values import fake_mode_of_values, node_value
from svg2_compile.passes.layout.lengths import known_number
from svg2_compile.passes.sites import Site, SitePolicy, StaysDense

__all__ = ["Worth", "cluster_counts", "traced_video_tokens", "with_expected_gain"]

Sizes = Mapping[sympy.Symbol, Any]


def cluster_counts(policy: SitePolicy, video: Any) -> tuple[Any, Any]:
    """Clusters of queries and keys: as configured, else from the number of tokens; never more than tokens."""
    q_clusters = policy.num_q_clusters or _default_count(QUERY_CLUSTERS, video)
    k_clusters = policy.num_k_clusters or _default_count(KEY_CLUSTERS, video)
    return plain_size(Min(q_clusters, video)), plain_size(Min(k_clusters, video))


def _default_count(rule: CountRule, video: Any) -> Any:
    """``rule.count``, of a symbolic number of tokens as well."""
    wanted = rule.base + FloorDiv(video, rule.tokens_per_cluster)
    return Min(wanted, rule.most, Max(1, FloorDiv(video, rule.fewest_tokens)))


@dataclass(frozen=True)
class Worth:
    """The question whether an attention is long enough, for sizes that another call may change.

    cost: of CostInputs; its sizes are ints, or sympy expressions over the sizes of the graph's inputs.
    min_tokens: as of SitePolicy. profile: of the device.
    """

    cost: CostInputs
    min_tokens: int | str
    profile: DeviceProfile

    @property
    def symbols(self) -> frozenset[sympy.Symbol]:
        """What the answer depends on."""
        sizes = [self.cost.video] if isinstance(self.min_tokens, int) else vars(self.cost).values()
        return frozenset().union(*(size.free_symbols for size in sizes if _is_symbolic(size)))

    def at(self, sizes: Sizes) -> CostInputs | None:
        """The attention at these sizes; None where one is missing or is no whole number."""
        numbers: dict[str, Any] = {
            name: known_number(size, sizes) for name, size in vars(self.cost).items() if _is_symbolic(size)
        }
        return None if None in numbers.values() else replace(self.cost, **numbers)

    def gain(self, sizes: Sizes) -> float | None:
        """The predicted speedup at these sizes; None where they are not known.

        Raises:
            StaysDense: too short to gain, or too short for min_tokens.
        """
        cost = self.at(sizes)
        if isinstance(self.min_tokens, int):
            video = known_number(self.cost.video, sizes)
            if video is not None and video < self.min_tokens:
                raise StaysDense("short_sequence", f"{video} video tokens, fewer than min_tokens={self.min_tokens}")
            if video == 0:
                raise StaysDense("short_sequence", "no video tokens")
        if cost is None:
            if self.min_tokens == "auto":
                raise StaysDense("cost", "the size depends on data: give min_tokens as an integer to make it sparse")
            return None
        gain = float(speedup(cost, self.profile)) if cost.groups and cost.video else 0.0
        if self.min_tokens == "auto":
            _check_gain(cost, self.profile, gain)
        return gain

    def may_change(self, traced: Sizes, ranges: Mapping[sympy.Symbol, Any]) -> bool:
        """Whether other sizes within ``ranges`` may have another answer than those that were traced."""
        if not self.symbols:
            return False
        if self.min_tokens == "auto":
            cost = self.at(traced)
            if self.profile is REFERENCE or cost is None:
                return False
            return not cost.groups or crossover_tokens(cost, self.profile) is not None
        if not _is_symbolic(self.cost.video):
            return False
        bounds = bound_sympy(self.cost.video, {s: r for s, r in ranges.items() if s in self.cost.video.free_symbols})
        return bool(bounds.lower < max(self.min_tokens, 1) <= bounds.upper)


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


def _is_symbolic(size: Any) -> bool:
    return isinstance(size, sympy.Expr) and bool(size.free_symbols)

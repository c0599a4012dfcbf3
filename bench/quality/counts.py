"""What the number of clusters is worth: recall and output error at equal density, for fewer and more than default.

A block map has a row per query cluster, so that all its queries share one selection: the wider the cluster, the less
the selection fits each of them, and the less its centroid tells their error. Smaller key clusters are better
approximated by their mean. Compensation costs a key per skipped cluster, which density does not count: "extra_keys" is
the most that it can be, relative to all keys.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from bench.quality.capture import Attention
from bench.quality.clusters import Budget, SparseAttention, cluster
from bench.quality.exact import block_mass, recall, sampled_rows
from bench.quality.measure import VARIANTS, average, error_curves, interpolate
from svg2_compile.settings.config import Svg2Config

__all__ = ["DENSITIES", "FACTORS", "SHOWN", "CountStudy"]

FACTORS = ((1 / 5, 1 / 4), (1 / 5, 1), (3 / 5, 1), (1, 1 / 4), (1, 1 / 2), (1, 1), (2, 1), (2, 2))
"""How many times the default number of query and of key clusters."""
SHOWN = (0.10, 0.15, 0.25)
DENSITIES = (0.05, 0.10, 0.15, 0.20, 0.25)  # budgets end with a whole block: values are interpolated below
SAMPLED_QUERIES = 512


class CountStudy:
    """Measures attentions over several numbers of clusters, each made by a cold start with ``iters`` iterations."""

    def __init__(self, counts: tuple[int, int], iters: int = Svg2Config().init_iters) -> None:
        self.counts, self.iters = counts, iters
        self._measured: dict[tuple[int, int], list[dict[str, float]]] = defaultdict(list)

    def add(self, attention: Attention) -> None:
        """Measure one attention."""
        num_tokens = attention.query.shape[2]
        rows = sampled_rows(attention, SAMPLED_QUERIES)
        for factors in FACTORS:
            counts = (round(self.counts[0] * factors[0]), round(self.counts[1] * factors[1]))
            clustering = cluster(attention, counts, self.iters)
            sparse = SparseAttention(attention, clustering)
            (mass,) = block_mass(attention, [clustering], rows)
            maps = [sparse.select(Budget(density)) for density in DENSITIES]
            recalls = {"density": [sparse.density(m) for m in maps], "recall": [recall(mass, m) for m in maps]}
            errors = error_curves(attention, {"svg2": clustering}, DENSITIES)
            measured = {"extra_keys": counts[1] / num_tokens}
            measured |= {f"recall at {density:.0%}": interpolate(recalls, "recall", density) for density in SHOWN}
            for variant in VARIANTS:
                curve = errors["svg2" + variant]
                for density in SHOWN:
                    measured[f"svg2{variant} error at {density:.0%}"] = interpolate(curve, "error", density)
            self._measured[counts].append(measured)

    def results(self) -> list[dict[str, Any]]:
        """A row per number of clusters, averaged over what was added."""
        return [
            {"num_q_clusters": counts[0], "num_k_clusters": counts[1], **average(measured)}
            for counts, measured in self._measured.items()
        ]

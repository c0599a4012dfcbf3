"""What the centroid cache is worth: clusters carried from step to step against clusters made anew (SVG2, figure 7)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from bench.quality.capture import Attention
from bench.quality.clusters import Budget, Clustering, SparseAttention, cluster, keep_labels
from bench.quality.exact import block_mass, recall, sampled_rows
from bench.quality.measure import average, variance_within
from svg2_compile.settings.config import Svg2Config

__all__ = ["CARRIED_ITERS", "COLD_ITERS", "ReuseStudy"]

CARRIED_ITERS = (0, 1, 2, 5)
"""k-means iterations per step that continue from the step before; 0 keeps every token's label."""
COLD_ITERS = (1, 2, 10, 50)
FIRST_ITERS = Svg2Config().init_iters
FIXED_DENSITY = 0.25
TOP_P = 0.9
SAMPLED_QUERIES = 512


class ReuseStudy:
    """Follows every layer over consecutive steps, from a cold start with the default iterations on.

    Give it the attentions of one video in order; it keeps clusters, never tokens.
    """

    def __init__(self, counts: tuple[int, int]) -> None:
        self.counts = counts
        self._carried: dict[int, dict[int, Clustering]] = {}
        self._first_step: int | None = None
        self._measured: dict[tuple[str, int, int], list[dict[str, float]]] = defaultdict(list)

    def add(self, attention: Attention) -> None:
        """Carry this layer's clusters to this step, and measure them beside cold ones."""
        if self._first_step is None:
            self._first_step = attention.step
        clusterings = {("cold", iters): cluster(attention, self.counts, iters) for iters in COLD_ITERS}
        before = self._carried.get(attention.layer)
        now = {iters: self._carry(attention, iters, before, clusterings) for iters in CARRIED_ITERS}
        self._carried[attention.layer] = now
        clusterings |= {("carried", iters): clustering for iters, clustering in now.items()}
        rows = sampled_rows(attention, SAMPLED_QUERIES)
        masses = block_mass(attention, list(clusterings.values()), rows)
        age = attention.step - self._first_step
        for ((start, iters), clustering), mass in zip(clusterings.items(), masses, strict=True):
            sparse = SparseAttention(attention, clustering)
            fixed, by_mass = sparse.select(Budget(FIXED_DENSITY)), sparse.select(Budget(None, TOP_P))
            self._measured[start, iters, age].append(
                {
                    "density_fixed": sparse.density(fixed),
                    "recall_fixed": recall(mass, fixed),
                    "density_top_p": sparse.density(by_mass),
                    "recall_top_p": recall(mass, by_mass),
                    "key_variance_within": variance_within(attention.key, clustering.key),
                }
            )

    def _carry(
        self,
        attention: Attention,
        iters: int,
        before: dict[int, Clustering] | None,
        clusterings: dict[tuple[str, int], Clustering],
    ) -> Clustering:
        if before is None:
            return clusterings["cold", FIRST_ITERS]
        if iters == 0:
            return keep_labels(attention, before[0])
        return cluster(attention, self.counts, iters, before[iters])

    def results(self) -> list[dict[str, Any]]:
        """A row per start ("carried" or "cold"), iterations and age (steps since the first), averaged over layers."""
        return [
            {"start": start, "iters": iters, "age": age, **average(measured)}
            for (start, iters, age), measured in sorted(self._measured.items())
        ]

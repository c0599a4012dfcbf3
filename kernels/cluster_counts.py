"""How many clusters an attention gets when nobody says: functions of its video tokens through the published settings.

Published are 300 query and 1,000 key clusters for 75,600 tokens, and 400 and 1,000 for 118,800 (the SVG2 scripts for
Wan 2.1 and HunyuanVideo at 720p). A constant number of tokens per cluster would leave shorter videos with few, coarse
clusters; on the trained small model (docs/quality.md) that is what costs most at equal density. So a part of the count
does not depend on the length, and the rest grows with it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KEY_CLUSTERS", "QUERY_CLUSTERS", "CountRule"]


@dataclass(frozen=True)
class CountRule:
    """``base + tokens // tokens_per_cluster`` clusters; at most ``most``, and of ``fewest_tokens`` on average."""

    base: int
    tokens_per_cluster: int
    most: int
    fewest_tokens: int

    def count(self, num_tokens: int) -> int:
        """Clusters for ``num_tokens`` tokens, at least one."""
        wanted = self.base + num_tokens // self.tokens_per_cluster
        return max(1, min(wanted, self.most, num_tokens // self.fewest_tokens))


QUERY_CLUSTERS = CountRule(base=64, tokens_per_cluster=320, most=400, fewest_tokens=32)
KEY_CLUSTERS = CountRule(base=200, tokens_per_cluster=94, most=1000, fewest_tokens=12)

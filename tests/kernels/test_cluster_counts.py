"""The default numbers of clusters go through the published settings and stay sensible for short videos."""

from __future__ import annotations

import itertools

import pytest

from svg2_compile.kernels.cluster_counts import KEY_CLUSTERS, QUERY_CLUSTERS


@pytest.mark.parametrize(("tokens", "queries", "keys"), [(75_600, 300, 1000), (118_800, 400, 1000), (10**6, 400, 1000)])
def test_published_settings(tokens, queries, keys):
    assert (QUERY_CLUSTERS.count(tokens), KEY_CLUSTERS.count(tokens)) == (queries, keys)


@pytest.mark.parametrize("rule", [QUERY_CLUSTERS, KEY_CLUSTERS])
def test_short_videos_keep_tokens_in_their_clusters(rule):
    assert rule.count(1) == 1
    for tokens in (32, 100, 1000, 2000):
        assert tokens / rule.count(tokens) >= rule.fewest_tokens
    counts = [rule.count(tokens) for tokens in range(1, 100_000, 37)]
    assert all(later >= earlier for earlier, later in itertools.pairwise(counts))

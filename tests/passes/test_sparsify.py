"""The rewrite: which operators, in which order, with the shape, dtype and strides that were there."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from svg2_compile.passes.graph.nodes import operator_name
from svg2_compile.passes.graph.values import node_value
from tests.passes.attention_graphs import KEEP_ALL, dynamo_graph, exported_graph, model_of, rewritten, sdpa, video

GOLDEN = """\
query_cold_centroids = new_zeros(getitem)
query_cold_flag = new_zeros(getitem)
query_kmeans = kmeans(getitem, query_cold_centroids, query_cold_flag)
query_labels = getitem(query_kmeans)
query_centroids = getitem(query_kmeans)
query_sizes = getitem(query_kmeans)
key_cold_centroids = new_zeros(getitem_1)
key_cold_flag = new_zeros(getitem_1)
key_kmeans = kmeans(getitem_1, key_cold_centroids, key_cold_flag)
key_labels = getitem(key_kmeans)
key_centroids = getitem(key_kmeans)
key_sizes = getitem(key_kmeans)
query_ordering = cluster_order(query_labels)
query_order = getitem(query_ordering)
query_offsets = getitem(query_ordering)
key_ordering = cluster_order(key_labels)
key_order = getitem(key_ordering)
key_offsets = getitem(key_ordering)
key_permuted = permute_tokens(getitem_1, key_order)
value_permuted = permute_tokens(getitem_2, key_order)
block_map = select_blocks(query_centroids, key_centroids, query_sizes, key_sizes)
attended = block_sparse_attention(
    getitem, key_permuted, value_permuted, query_offsets, key_offsets, block_map, query_order)
out = getitem(attended)"""


FIRST_ORDER = {"compensation": "first_order", "routing": "error", "budget": "layer", "density": 1.0}
FIRST_ORDER_COUNTS = {
    "cluster_means": 1,
    "cluster_variances": 1,
    "farthest_members": 1,
    "first_order_estimates": 1,
    "select_blocks": 0,
    "select_blocks_of_layer": 1,
    "first_order_terms": 1,
    "block_sparse_attention": 0,
    "first_order_attention": 1,
}
FIRST_ORDER_GOLDEN = """\
value_centroids = cluster_means(value_permuted, key_offsets)
estimates = first_order_estimates(
    key_permuted, value_permuted, key_offsets, query_centroids, key_centroids, value_centroids)
log_mass = getitem(estimates)
log_error = getitem(estimates)
residual_of_all = getitem(estimates)
query_variances = cluster_variances(getitem, query_order, query_offsets, query_centroids)
far_members = farthest_members(getitem, query_order, query_offsets, query_centroids)
budget = new_full(query_centroids)
block_map = select_blocks_of_layer(
    log_mass, log_error, query_variances, key_centroids, query_sizes, key_offsets, budget, far_members)
terms = first_order_terms(
    key_permuted, value_permuted, key_offsets, query_centroids, key_centroids, value_centroids, log_mass, block_map, \
residual_of_all)
residual = getitem(terms)
slope = getitem(terms)
attended = first_order_attention(
    getitem, key_permuted, value_permuted, query_offsets, key_offsets, block_map, query_centroids, key_centroids, \
value_centroids, log_mass, residual, slope, query_order)
out = getitem(attended)"""


def _operators(gm):
    return Counter(
        operator_name(node) for node in gm.graph.nodes if "svg2::" in str(getattr(node.target, "_schema", ""))
    )


@pytest.mark.parametrize(("changes", "golden"), [({}, GOLDEN), (FIRST_ORDER, FIRST_ORDER_GOLDEN)])
def test_golden_text(changes, golden):
    gm, _ = dynamo_graph(model_of(lambda query, key, value: sdpa(query, key, value)), video())
    copied, (site,) = rewritten(gm, dataclasses.replace(KEEP_ALL, **changes))
    assert (site.budget is not None) == bool(changes)
    names = {n.name: f"getitem{'' if i == 0 else f'_{i}'}" for i, n in enumerate(_qkv(gm))}
    lines = []
    for node in copied.graph.nodes:
        if node.name.startswith("svg2_0_"):
            inputs = ", ".join(names.get(n.name, n.name.removeprefix("svg2_0_")) for n in node.all_input_nodes)
            lines.append(f"{node.name.removeprefix('svg2_0_')} = {operator_name(node)}({inputs})")
    expected = golden.replace("(\n    ", "(")
    assert "\n".join(lines[-len(expected.splitlines()) :]) == expected


def _qkv(gm):
    (attention,) = [n for n in gm.graph.nodes if operator_name(n) == "scaled_dot_product_attention"]
    return attention.all_input_nodes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"collect_stats": True}, {"block_density": 1}),
        ({"compensation": "centroid"}, {"cluster_means": 1}),
        (
            {"compensation": "centroid", "routing": "error"},
            {"cluster_means": 1, "select_blocks": 0, "select_blocks_by_error": 1},
        ),
        (
            {"compensation": "first_order", "routing": "error"},
            {"cluster_means": 1, "first_order_estimates": 1, "select_blocks": 0, "select_blocks_by_error": 1,
             "first_order_terms": 1, "block_sparse_attention": 0, "first_order_attention": 1},
        ),
        ({**FIRST_ORDER}, FIRST_ORDER_COUNTS),
        (
            {**FIRST_ORDER, "compensation": "centroid"},
            {**FIRST_ORDER_COUNTS, "first_order_estimates": 0, "block_estimates": 1, "first_order_terms": 0,
             "first_order_attention": 0, "block_sparse_attention": 1},
        ),
    ],
)  # fmt: skip
def test_operator_counts(changes, expected):
    gm, inputs = dynamo_graph(model_of(sdpa), video())
    copied, _ = rewritten(gm, dataclasses.replace(KEEP_ALL, **changes))
    base = {"kmeans": 2, "cluster_order": 2, "permute_tokens": 2, "select_blocks": 1, "block_sparse_attention": 1}
    counts = {**base, **expected}
    assert _operators(copied) == Counter({name: count for name, count in counts.items() if count})
    assert all(operator_name(node) != "scaled_dot_product_attention" for node in copied.graph.nodes)
    # The original is untouched, and with every cluster kept neither option changes the result.
    assert _operators(gm) == Counter()
    torch.testing.assert_close(copied(*inputs)[0], gm(*inputs)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("contiguous", [False, True])
def test_shape_dtype_and_strides_are_kept(contiguous):
    def attend(query, key, value):
        attended = sdpa(query, key, value)
        return attended.contiguous().view(attended.shape) if contiguous else attended

    gm, inputs = dynamo_graph(model_of(attend), video())
    (attention,) = [n for n in gm.graph.nodes if operator_name(n) == "scaled_dot_product_attention"]
    before = node_value(attention)
    copied, (site,) = rewritten(gm)
    replacement = next(n for n in copied.graph.nodes if n.name == "svg2_0_out")
    values = [node_value(n) for n in (replacement, *replacement.users)]
    kept = [v for v in values if v.shape == before.shape and v.stride() == before.stride() and v.dtype == before.dtype]
    assert kept and site.site.index == 0
    torch.testing.assert_close(copied(*inputs)[0], gm(*inputs)[0], rtol=1e-5, atol=1e-6)


def test_autocast_computes_in_the_dtype_of_the_dense_attention():
    model = model_of(sdpa)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gm, inputs = dynamo_graph(model, video())
        copied, _ = rewritten(gm)
        attended = next(n for n in copied.graph.nodes if n.name == "svg2_0_out")
        assert node_value(attended).dtype == torch.bfloat16
        torch.testing.assert_close(copied(*inputs)[0], gm(*inputs)[0], rtol=3e-2, atol=3e-2)


def test_dynamic_shapes_serve_every_size():
    model = model_of(sdpa)
    gm, inputs = dynamo_graph(model, video(2, 21), dynamic=True)
    copied, (site,) = rewritten(gm)
    assert not isinstance(site.site.num_tokens, int)
    for batch, tokens in ((2, 21), (3, 40)):
        changed = _resized(gm, inputs, batch, tokens)
        torch.testing.assert_close(copied(*changed)[0], gm(*changed)[0], rtol=1e-5, atol=1e-6)


def _resized(gm, inputs, batch, tokens):
    """The same inputs with another video: symbolic ints are told apart by their values in the capture (2 and 21)."""
    sizes = {2: batch, 21: tokens}
    return [
        sizes[value] if isinstance(value, int) else video(batch, tokens) if value.shape == (2, 21, 16) else value
        for value in inputs
    ]


@pytest.mark.parametrize("decomposed", [False, True])
def test_the_rewritten_exported_graph_has_complete_metadata(decomposed):
    gm, _ = exported_graph(model_of(sdpa), video(), decomposed=decomposed)
    copied, _ = rewritten(gm)
    new = [node for node in copied.graph.nodes if node.name.startswith("svg2_")]
    assert new and all("val" in node.meta and "example_value" not in node.meta for node in new)

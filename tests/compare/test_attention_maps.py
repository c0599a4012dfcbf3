"""Maps add up: one is a permutation of the other, and the recovered one is what the sparse operator computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from svg2_compile.compare.attention_maps import AttentionInputs, attention_maps
from svg2_compile.compare.capture import MapRequest
from svg2_compile.compare.paired import compare_subject
from svg2_compile.kernels import ops
from tests.support import SELECTION

NUM_TOKENS, VIDEO, START, Q_CLUSTERS, K_CLUSTERS, HEAD_DIM = 60, 48, 5, 4, 6, 8


def made(compensation=False, masked=0):
    """Inputs of the operator, the same as AttentionInputs, and the operator's result [N, D]."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (2 * torch.randn(1, 1, NUM_TOKENS, HEAD_DIM, generator=generator) for _ in range(3))
    valid = torch.ones(1, 1, NUM_TOKENS, dtype=torch.bool)
    valid[..., NUM_TOKENS - masked :] = False
    video = slice(START, START + VIDEO)
    flag = torch.tensor(False)
    q_labels, q_centroids, q_sizes = ops.kmeans(query[:, :, video], torch.zeros(1, 1, Q_CLUSTERS, HEAD_DIM), flag, 4)
    k_labels, k_centroids, k_sizes = ops.kmeans(key[:, :, video], torch.zeros(1, 1, K_CLUSTERS, HEAD_DIM), flag, 4)
    q_order, q_offsets = ops.cluster_order(q_labels, Q_CLUSTERS, START, NUM_TOKENS)
    k_order, k_offsets = ops.cluster_order(k_labels, K_CLUSTERS, START, NUM_TOKENS, valid)
    block_map = ops.select_blocks(q_centroids, k_centroids, q_sizes, k_sizes, HEAD_DIM**-0.5, 0.6, 0.0)
    permuted = [ops.permute_tokens(tensor, k_order) for tensor in (key, value)]
    extra = (k_centroids, ops.cluster_means(permuted[1], k_offsets)) if compensation else (None, None)
    out, _ = ops.block_sparse_attention(
        *(query, *permuted, q_offsets, k_offsets, block_map, HEAD_DIM**-0.5, *extra), q_order=q_order
    )
    inputs = AttentionInputs(
        *(query[0, 0], key[0, 0], q_order[0, 0], k_order[0, 0], q_offsets[0, 0], k_offsets[0, 0], block_map[0, 0]),
        scale=HEAD_DIM**-0.5,
        k_centroids=k_centroids[0, 0] if compensation else None,
    )
    return inputs, value[0, 0], out[0, 0]


def test_the_permuted_map_is_a_permutation_of_the_original():
    inputs, _, _ = made()
    maps = attention_maps(inputs)
    assert maps.original.shape == (NUM_TOKENS, NUM_TOKENS)
    expected = maps.original[inputs.q_order.long()][:, inputs.k_order.long()]
    assert torch.equal(maps.permuted, expected)
    assert not torch.equal(maps.permuted, maps.original)


@pytest.mark.parametrize("masked", [0, 4])
@pytest.mark.parametrize("compensation", [False, True])
def test_the_recovered_map_is_what_the_operator_computes(compensation, masked):
    inputs, value, out = made(compensation, masked)
    maps = attention_maps(inputs)
    weights = maps.recovered / NUM_TOKENS
    assert torch.allclose(weights.sum(1), torch.ones(NUM_TOKENS), atol=1e-5)
    if masked:
        assert (weights[:, -masked:] == 0).all()
    if not compensation:
        assert torch.allclose(weights @ value, out, atol=1e-5)
        return
    # A cluster that was left out takes part through the mean of its values.
    assert torch.allclose(weights @ value, out, atol=1e-4)


def test_density_and_recall_are_those_of_the_block_map():
    inputs, _, _ = made()
    maps = attention_maps(inputs)
    offsets = [offsets[None, None] for offsets in (inputs.q_offsets, inputs.k_offsets)]
    expected = ops.block_density(*offsets, inputs.block_map[None, None]).item()
    assert maps.density == pytest.approx(expected)
    selected = maps.recovered > 0
    assert maps.recall == pytest.approx((maps.original * selected).sum().item() / NUM_TOKENS**2, rel=1e-5)
    assert 0.4 < maps.density < maps.recall < 1


def test_pooled_maps_are_means_of_the_whole_ones():
    inputs, _, _ = made()
    whole, pooled = attention_maps(inputs), attention_maps(inputs, max_side=15)
    for name in ("original", "permuted", "recovered"):
        blocks = getattr(whole, name).reshape(15, 4, 15, 4).mean((1, 3))
        assert torch.allclose(getattr(pooled, name), blocks, atol=1e-5), name


def test_the_captured_attention_is_the_one_that_ran(comparison):
    maps = comparison.maps
    assert (maps.site, maps.step, maps.head, maps.num_tokens) == ("blocks.2.attn1", 3, 0, 6 * 8 * 8)
    first_branch = next(
        run for run in comparison.report.runs if (run.site, run.step, run.context) == (maps.site, maps.step, 0)
    )
    assert maps.density == pytest.approx(first_branch.density_per_head[0][0], abs=1e-6)


def test_layers_that_share_one_graph_are_told_apart(subject):
    request = MapRequest(layer="blocks.1.attn1", step=2, head=1)
    compared = compare_subject(subject, request, regional=True, **SELECTION)
    maps = compared.maps
    run = next(run for run in compared.report.runs if (run.site, run.step, run.context) == (maps.site, 2, 0))
    assert maps.density == pytest.approx(run.density_per_head[0][1], abs=1e-6)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (MapRequest(layer="blocks.9.attn1"), "layer 'blocks.9.attn1' is not sparse. Valid: blocks.1.attn1, blocks.2"),
        (MapRequest(layer="2"), "layer '2' is not sparse. Valid: .* or 0 to 1"),
        (MapRequest(step=0), "step 0 is not sparse. Valid: 2 to 4"),
        (MapRequest(head=2), "no head 2. Valid: 0 to 1"),
    ],
)
def test_what_did_not_run_cannot_be_shown(comparison, request_, message):
    with pytest.raises(ValueError, match=message):
        request_.choose(comparison.density)


def test_layers_go_by_path_or_by_number(comparison):
    for layer in ("blocks.1.attn1", "0", 0):
        assert MapRequest(layer, 4, 1).choose(comparison.density) == ("blocks.1.attn1", 4, 1)


def test_the_picture_is_written(comparison, tmp_path):
    from PIL import Image

    path = comparison.write_maps(tmp_path / "maps.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 2.5 * picture.height


def test_to_first_order_a_query_at_its_centroid_gives_every_cluster_its_exact_weight():
    inputs, value, _ = made(compensation=True)
    rows = inputs.q_order[: int(inputs.q_offsets[-3])].long()
    query = inputs.query.clone()
    q_centroids = torch.zeros(Q_CLUSTERS, HEAD_DIM)
    for own, members in enumerate(rows.split(inputs.q_offsets.diff()[:Q_CLUSTERS].tolist())):
        q_centroids[own] = query[members].mean(dim=0)
        query[members] = q_centroids[own]
    key, value = inputs.key[inputs.k_order.long()], value[inputs.k_order.long()]
    k_offsets = inputs.k_offsets[None, None]
    v_centroids = ops.cluster_means(value[None, None], k_offsets)
    means = (q_centroids[None, None], inputs.k_centroids[None, None], v_centroids)
    log_mass, _ = ops.block_estimates(key[None, None], value[None, None], k_offsets, *means, inputs.scale)
    moved = replace(inputs, query=query, log_mass=log_mass[0, 0], q_centroids=q_centroids)
    maps = attention_maps(moved)
    assert not torch.allclose(maps.recovered[rows], maps.original[rows], atol=1e-3)
    columns = torch.repeat_interleave(torch.arange(K_CLUSTERS + 2), inputs.k_offsets.diff())
    by_block = [
        torch.zeros(NUM_TOKENS, K_CLUSTERS + 2).index_add_(1, columns, weights[:, inputs.k_order.long()])
        for weights in (maps.recovered, maps.original)
    ]
    torch.testing.assert_close(by_block[0][rows], by_block[1][rows], rtol=1e-4, atol=1e-4)
    plain = attention_maps(replace(moved, log_mass=None)).recovered
    assert not torch.allclose(plain[rows], maps.recovered[rows], atol=1e-3)

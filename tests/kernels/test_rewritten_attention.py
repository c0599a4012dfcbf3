"""The rewritten attention from end to end, as a graph has it: all ops in a row against dense attention."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svg2_compile.kernels import ops
from tests.kernels.helpers import attention_pipeline, check_identity, masked_dense


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    layout=st.tuples(st.integers(0, 9), st.integers(12, 120), st.integers(0, 9)),
    clusters=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    head_dim=st.integers(1, 24),
    masked=st.booleans(),
    compensation=st.booleans(),
    by_error=st.booleans(),
    first_order=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    implementation=st.sampled_from(["cpu", "reference"]),
)
def test_identity_when_every_cluster_is_kept(
    seed: int,
    batch: int,
    kv_heads: int,
    group: int,
    layout: tuple[int, int, int],
    clusters: tuple[int, int],
    head_dim: int,
    masked: bool,
    compensation: bool,
    by_error: bool,
    first_order: bool,
    dtype: torch.dtype,
    implementation: str,
) -> None:
    torch.manual_seed(seed)
    before, video, after = layout
    num_tokens = before + video + after
    q = torch.randn(batch, kv_heads * group, num_tokens, head_dim).to(dtype)
    k, v = (torch.randn(batch, kv_heads, num_tokens, head_dim).to(dtype) for _ in range(2))
    valid = torch.rand(batch, 1, num_tokens) < 0.8 if masked else None
    if valid is not None:
        valid[..., 0] = True
    with ops.use_implementation(implementation):
        check_identity(
            *(q, k, v, valid),
            num_q_clusters=clusters[0],
            num_k_clusters=clusters[1],
            video=(before, before + video),
            compensation=compensation,
            by_error=by_error,
            first_order=first_order,
        )


def test_less_density_means_more_error_and_compensation_less() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(1, 2, 12, 16, generator=generator)
    topic = torch.randint(0, 12, (400,), generator=generator)
    q, k, v = (1.5 * centers[:, :, topic] + torch.randn(1, 2, 400, 16, generator=generator) / 2 for _ in range(3))
    exact = masked_dense(q, k, v, None)

    def error(density: float, compensation: bool, by_error: bool, first_order: bool = False) -> float:
        out, _ = attention_pipeline(
            q,
            k,
            v,
            num_q_clusters=8,
            num_k_clusters=24,
            iters=5,
            density=density,
            compensation=compensation,
            by_error=by_error,
            first_order=first_order,
        )
        return float((out - exact).square().mean())

    plain = [error(density, False, False) for density in (0.1, 0.25, 0.5, 1.0)]
    assert plain == sorted(plain, reverse=True)
    assert plain[-1] < 1e-10
    for density in (0.1, 0.25):
        compensated, routed = error(density, True, False), error(density, True, True)
        assert compensated < error(density, False, False)
        assert routed < compensated
        assert error(density, True, True, True) < routed


def test_nan_in_a_query_or_key_shows_as_in_dense_attention() -> None:
    for broken_query in (True, False):
        q, k, v = (torch.randn(1, 1, 60, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
        (q if broken_query else k)[0, 0, 11, 3] = float("nan")
        options: dict[str, Any] = {"num_q_clusters": 3, "num_k_clusters": 6, "top_p": 0.3, "density": 0.2}
        for first_order in (False, True):
            out, _ = attention_pipeline(q, k, v, first_order=first_order, **options)
            assert torch.equal(out.isnan(), masked_dense(q, k, v, None).isnan())

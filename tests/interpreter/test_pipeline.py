"""The rewritten attention, whole, with every op in Triton: with all clusters kept it equals dense attention."""

from __future__ import annotations

import pytest
import torch

from svg2_compile.kernels import ops
from tests.kernels.helpers import attention_pipeline, check_identity


@pytest.mark.parametrize(
    ("before", "video", "after", "masked", "by_error", "dtype"),
    [
        (0, 61, 0, False, False, torch.float32),
        (5, 40, 0, False, True, torch.float32),
        (0, 45, 9, True, False, torch.bfloat16),
        (3, 33, 4, True, True, torch.float16),
    ],
)
def test_identity_when_every_cluster_is_kept(
    before: int, video: int, after: int, masked: bool, by_error: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    num_tokens = before + video + after
    q = torch.randn(2, 2, num_tokens, 24, generator=generator).to(dtype)
    k, v = (torch.randn(2, 1, num_tokens, 24, generator=generator).to(dtype) for _ in range(2))
    valid = torch.rand(2, 1, num_tokens, generator=generator) < 0.8 if masked else None
    with ops.use_implementation("triton"):
        check_identity(
            *(q, k, v, valid),
            num_q_clusters=3,
            num_k_clusters=7,
            video=(before, before + video),
            compensation=by_error,
            by_error=by_error,
        )


def test_selection_is_that_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(1, 1, 6, 16, generator=generator)
    topic = torch.randint(0, 6, (120,), generator=generator)
    q, k, v = (centres[:, :, topic] + 0.4 * torch.randn(1, 1, 120, 16, generator=generator) for _ in range(3))
    options = {"num_q_clusters": 5, "num_k_clusters": 12, "iters": 3, "density": 0.4}
    results = {}
    for name in ("triton", "reference"):
        with ops.use_implementation(name):
            results[name] = attention_pipeline(q, k, v, compensation=True, by_error=True, **options)  # type: ignore[arg-type]
    assert torch.equal(results["triton"][1], results["reference"][1])
    torch.testing.assert_close(results["triton"][0], results["reference"][0], rtol=1e-4, atol=1e-5)
    assert not bool(results["triton"][1][..., :-1].all())

"""One comparison of the shipped model's architecture, shared by the tests that look at its page."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("skimage", reason="needs scikit-image (extra quality)")
pytest.importorskip("diffusers", reason="needs diffusers")

HOSTILE = '"><script>alert(1)</script><img src="https://example.org/x.png" onerror=alert(1)> {{ 7 * 7 }} </script>'


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads cost more than they bring at these sizes; other tests get them back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_transformer():
    """The smallest transformer that is like the shipped one: pixels in, two layers, random weights."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = diffusers.WanTransformer3DModel(
            **{"patch_size": (1, 4, 4), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3},
            **{"out_channels": 3, "text_dim": 8, "freq_dim": 32, "ffn_dim": 24, "num_layers": 3},
            rope_max_seq_len=32,
        )
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def subject(small_transformer):
    """A plain sampling loop with two guidance branches, and a prompt that tries to break out of the page."""
    import diffusers

    from svg2_compile.compare.subjects import Subject

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    @torch.no_grad()
    def generate(steps):
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 3, 6, 32, 32, generator=generator)
        prompts = torch.randn(2, 1, 4, 8, generator=generator)
        scheduler.set_timesteps(steps or 5)
        for timestep in scheduler.timesteps:
            asked, empty = (
                small_transformer(latents, timestep[None], prompt, return_dict=False)[0] for prompt in prompts
            )
            latents = scheduler.step(empty + 3 * (asked - empty), timestep, latents, return_dict=False)[0]
        return latents[0].clamp(-1, 1)

    return Subject("a <b>small</b> model", small_transformer, scheduler, generate, {"prompt": HOSTILE, "seed": 0})


@pytest.fixture(scope="session")
def comparison(subject):
    """With a real selection, and maps."""
    from svg2_compile.compare.capture import MapRequest
    from svg2_compile.compare.paired import compare_subject
    from tests.support import SELECTION

    return compare_subject(subject, MapRequest(), **{**SELECTION, "dense_steps": 2, "dense_layers": 1})


@pytest.fixture(scope="session")
def page(comparison, tmp_path_factory):
    return comparison.write_html(tmp_path_factory.mktemp("compare") / "report.html")

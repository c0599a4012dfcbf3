"""Ten kinds of model code that once failed, each as small as it can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svg2_compile

DIM, HEADS = 32, 2
SPARSE: dict[str, Any] = {"min_tokens": 0, "dense_steps": 0, "dense_layers": 0, "top_p": 1.0, "inner_backend": "eager"}
TIME = torch.tensor([900.0])


def embedded(timestep: Tensor) -> Tensor:
    return (timestep[..., None] / 10 ** torch.linspace(0, 4, DIM)).sin()


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, N, H, D] -> [B, N, H * D]."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Self-attention with what a case changes: ``rope`` of queries and keys, ``attention`` itself."""

    def __init__(self, rope: Callable[..., Tensor] | None = None, attention: Callable[..., Tensor] = attend) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.rope, self.attention = rope, attention

    def forward(self, x: Tensor, time: Tensor, *rest: Any) -> Tensor:
        scale = time[:, None] if time.dim() == 2 else time.repeat_interleave(x.shape[1] // time.shape[1], 1)
        query, key, value = self.qkv(x * (1 + scale)).unflatten(2, (3, HEADS, -1)).unbind(2)
        if self.rope is not None:
            query, key = self.rope(query, *rest), self.rope(key, *rest)
        return x + self.out(self.attention(query, key, value))


class Model(nn.Module):
    def __init__(self, *block: Any, depth: int = 2) -> None:
        super().__init__()
        self.inp, self.time, self.head = nn.Linear(16, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 16)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(depth))

    def forward(self, x: Any, timestep: Any, *_: Any) -> Tensor:
        time, y = self.time(embedded(timestep)), self.inp(x)
        for block in self.blocks:
            y = block(y, time)
        return self.head(y)


def tokens(count: int = 60) -> Tensor:
    return torch.randn(1, count, 16, generator=torch.Generator().manual_seed(0))


def sites_of(model: nn.Module, calls: list[tuple[Any, ...]], regional: bool = False) -> list[Any]:
    """The attentions of an enabled model after its calls, each of which gives what the model gives."""
    with torch.no_grad():
        expected = [model(*args) for args in calls]
        with svg2_compile.enable(model, regional=regional, **SPARSE) as enabled:
            for args, wanted in zip(calls, expected, strict=True):
                torch.testing.assert_close(model(*args), wanted, rtol=1e-4, atol=1e-5)
            return enabled.report().sites


def reasons(sites: list[Any]) -> set[str]:
    return {site.reason for site in sites}


def rope(x: Tensor) -> Tensor:
    return x * torch.cos(torch.arange(x.shape[1]).float())[None, :, None, None]


@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("disabled", ["rope", "attention"])
def test_functions_under_compiler_disable(disabled: str, regional: bool) -> None:
    functions = {"rope": rope, "attention": attend}
    functions[disabled] = torch.compiler.disable(functions[disabled])
    model = Model(*functions.values()).eval()
    explained = svg2_compile.explain(model, tokens(), TIME, options=SPARSE)
    assert [site.reason for site in explained.sites] == ["sparse"] * 2
    torch._dynamo.reset()
    assert reasons(sites_of(model, [(tokens(), TIME)], regional)) == {"sparse"}


def test_a_disabled_function_that_tracing_changes_is_obeyed(caplog: pytest.LogCaptureFixture) -> None:
    @torch.compiler.disable
    def differs(x: Tensor) -> Tensor:
        return x * (2.0 if torch.compiler.is_compiling() else 1.0)

    model = Model(differs).eval()
    sites_of(model, [(tokens(), TIME)] * 2)
    assert "differs: traced" in caplog.text


def test_a_statement_that_dynamo_does_not_know_is_named() -> None:
    def forgetful(query: Tensor, key: Tensor, value: Tensor, lengths: Any = None) -> Tensor:
        if lengths is not None:
            query = [query[i : i + 1, : lengths[i]] for i in range(len(lengths))]  # type: ignore[assignment]
        x = attend(query, key, value)
        del query, key, value
        return x

    model = Model(None, forgetful).eval()
    report = svg2_compile.explain(model, tokens(), TIME, options=SPARSE)
    assert report.sites and "cross_attention" not in reasons(report.sites)
    if report.graph_breaks:  # before Python 3.12
        assert __file__ in report.graph_breaks[0] and "Way out" in report.graph_breaks[0]
    torch._dynamo.reset()
    assert reasons(sites_of(model, [(tokens(), TIME)])) == {"sparse"}


class FlashFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rest = (0.0, query.shape[-1] ** -0.5, False, -1, -1, 0.0, None, False)
        return torch.ops.flash_attn._flash_attn_forward(query, key, value, *rest)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, grad, grad


@pytest.mark.parametrize("regional", [False, True])
def test_flash_attention_as_its_package_wraps_it(regional: bool) -> None:
    from tests.passes.attention import stand_ins  # noqa: F401  (registers the operator)

    model = Model(None, lambda *qkv: FlashFunction.apply(*qkv).flatten(2)).eval()
    calls = [(tokens(count), TIME) for count in (60, 48, 54)]
    assert reasons(sites_of(model, calls, regional)) == {"sparse"}


class Patched(nn.Module):
    """[B, 4, F, H, W]; ``text`` is joined and cut off again at a number made of the sizes."""

    def __init__(self, mode: str | None) -> None:
        super().__init__()
        self.patch, self.text = nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2)), nn.Linear(16, DIM)
        self.time, self.block, self.head = nn.Linear(DIM, DIM), Block(), nn.Linear(DIM, 16)
        self.mode = mode

    def forward(self, x: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        if self.mode is not None:
            x = F.pad(x, (0, (2 - x.shape[-1] % 2) % 2, 0, (2 - x.shape[-2] % 2) % 2, 0, 0), mode=self.mode)
        video, text, time = self.patch(x).flatten(2).transpose(1, 2), self.text(text), self.time(embedded(timestep))
        for _ in range(2):
            joint = self.block(torch.cat([video, text], 1), time)
            video, text = joint[:, : video.shape[1]], joint[:, video.shape[1] :]
        return self.head(video)


@pytest.mark.parametrize("mode", [None, "circular", "constant"])
def test_a_second_resolution(mode: str | None) -> None:
    text = torch.randn(1, 6, 16)
    calls = [(torch.randn(1, 4, *size), text, TIME) for size in ((3, 8, 12), (5, 12, 8), (2, 6, 10))]
    sites = sites_of(Patched(mode).eval(), calls)
    assert reasons(sites) == {"sparse"} and len(sites) >= 4


def test_a_single_stream_block_is_handed_text_as_well() -> None:
    def video_only(x: Tensor, cos: Tensor, text: int) -> Tensor:
        return torch.cat([x[:, :-text] * cos[None, :, None], x[:, -text:]], 1)

    class Joint(Model):
        def forward(self, x: Any, timestep: Any, *rest: Any) -> Tensor:
            text, cos = rest
            y, time = self.inp(torch.cat([x, text], 1)), self.time(embedded(timestep))
            for block in self.blocks:
                y = block(y, time, cos, text.shape[1])
            return self.head(y[:, : x.shape[1]])

    call = (tokens(60), TIME, tokens(6), torch.randn(60, DIM // HEADS))
    for regional in (False, True):
        torch._dynamo.reset()
        sites = sites_of(Joint(video_only).eval(), [call], regional)
        assert {(site.reason, site.video_tokens, site.context_tokens) for site in sites} == {("sparse", 60, 6)}


@pytest.mark.parametrize("regional", [False, True])
def test_grid_sizes_are_read_from_a_tensor(regional: bool) -> None:
    def by_grid(x: Tensor, grid: Tensor) -> Tensor:
        rows = []
        for index, (frames, height, width) in enumerate(grid.tolist()):
            count = frames * height * width
            phase = torch.arange(count)[:, None, None] * torch.linspace(1, 0.1, x.shape[-1])
            rows.append(torch.cat([x[index, :count] * phase.cos(), x[index, count:]]))
        return torch.stack(rows)

    class Videos(Model):
        def forward(self, x: Any, timestep: Any, *_: Any) -> Tensor:
            grid = torch.stack([torch.tensor(video.shape[:3], dtype=torch.long) for video in x])
            y, time = self.inp(torch.stack([video.flatten(0, 2) for video in x])), self.time(embedded(timestep))
            for block in self.blocks:
                y = block(y, time, grid)
            return self.head(y)

    calls = [([torch.randn(*size, 16)], TIME) for size in ((3, 4, 6), (5, 4, 4), (2, 6, 5))]
    assert reasons(sites_of(Videos(by_grid).eval(), calls, regional)) == {"sparse"}


def loop(model: nn.Module, timesteps: list[Tensor], **options: Any) -> Counter[str]:
    with torch.no_grad(), svg2_compile.enable(model, min_tokens=0, inner_backend="eager", **options) as enabled:
        for timestep in timesteps:
            model(tokens(), timestep)
        return Counter(run.graph for run in enabled.report().runs)


def test_a_short_schedule_of_blocks_becomes_sparse() -> None:
    steps = [torch.tensor([999.0 - 125 * step]) for step in range(8)]
    assert loop(Model().eval(), steps, regional=True, dense_layers=0)["sparse"] >= 8


@pytest.mark.parametrize("regional", [False, True])
def test_a_timestep_for_every_frame(regional: bool) -> None:
    steps = [torch.full((1, 5), 999.0 - 33 * step) for step in range(30)]
    assert loop(Model().eval(), steps, regional=regional, dense_layers=0)["sparse"] >= 30


def test_dense_layers_count_over_all_graphs() -> None:
    class Broken(Model):
        def forward(self, x: Any, timestep: Any, *_: Any) -> Tensor:
            time, y = self.time(embedded(timestep)), self.inp(x)
            for index, block in enumerate(self.blocks):
                if x.sum().item() > -1e9 - index:
                    y = block(y, time)
            return self.head(y)

    steps = [torch.tensor([999.0 - 49 * step]) for step in range(20)]
    assert loop(Broken(depth=8).eval(), steps, dense_steps=2)["sparse"] >= 100

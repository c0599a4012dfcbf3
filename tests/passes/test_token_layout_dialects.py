"""The analysis on the other forms that a model's graph has: symbolic sizes, one block alone, torch.export."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from svg2_compile.passes.layout.axes import Axis, collapse
from svg2_compile.passes.time_inputs import modulation_inputs
from svg2_compile.passes.token_layout import TokenLayouts
from tests.zoo.graphs import Analysed, attention_operands, compiled, exported, latents, self_attentions, short, spelled


def unruled(analysed: list[Analysed]) -> Counter[str]:
    return sum((layouts.unruled_ops for _, layouts in analysed), Counter())


# model -> query layouts of its self-attentions with dynamic=True; s* are the symbols of frames, text tokens, batch.
DYNAMIC = {
    "wan_t2v": ["hidden_states:64*s"] * 2,
    "hunyuan_video": ["encoder_hidden_states:s"] + ["hidden_states:64*s|encoder_hidden_states:s"] * 2,
    "cogvideox": ["encoder_hidden_states:8|hidden_states:16*s"] * 2,
    "ltx_video": ["hidden_states:s*s*s"],
    "allegro": ["hidden_states:16*s"],
    "easyanimate": ["encoder_hidden_states:16|hidden_states:128"],
    "cosmos": ["hidden_states:64*s"] * 2,
}


def without_numbers(text: str | None) -> str:
    """`64*s22` -> `64*s`: which number a symbol has is Dynamo's affair."""
    return re.sub(r"\bs\d+", "s", str(text))


@pytest.mark.parametrize("name", DYNAMIC)
def test_symbolic_sizes(name: str) -> None:
    analysed = compiled(name, dynamic=True)
    assert [without_numbers(text) for text in self_attentions(analysed)] == DYNAMIC[name]
    assert latents(analysed) == {"hidden_states"}
    assert unruled(analysed) == {}


# model -> the segments (first source only) of every self-attention of its blocks, compiled alone.
BLOCKS = {
    "wan_t2v": [["hidden_states:128"]],
    "wan_i2v": [["hidden_states:128"]],
    "hunyuan_video": [["hidden_states:12"]] + [["hidden_states:128", "encoder_hidden_states:12"]] * 2,
    "ltx_video": [["hidden_states:128"]],
    "ltx2": [["hidden_states:128"], ["audio_hidden_states:9"]],
    "flux": [["encoder_hidden_states:12", "hidden_states:64"]] * 2,
    "qwen_image": [["encoder_hidden_states:12", "hidden_states:64"]],
}


def token_segments(gm_and_layouts: Analysed) -> list[list[str]]:
    """Segments of the self-attentions by their token input: rotary embeddings derive from inputs too."""
    gm, layouts = gm_and_layouts
    result = []
    for _, query, key in attention_operands(gm):
        if spelled(layouts, query) != spelled(layouts, key):
            continue
        segments = layouts.segments(query, -2) or ()
        result.append([f"{token_input(layouts, s.sources)}:{s.length}" for s in segments])
    return result


def token_input(layouts: TokenLayouts, sources: frozenset[str]) -> str:
    names = [short(name) for name in sources]
    (name,) = [name for name in names if name.endswith("hidden_states")]
    return name


@pytest.mark.parametrize("name", BLOCKS)
def test_one_block_compiled_alone(name: str) -> None:
    analysed = compiled(name, regional=True)
    assert [segments for graph in analysed for segments in token_segments(graph)] == BLOCKS[name]
    assert latents(analysed) == {"hidden_states"}
    assert unruled(analysed) == {}


@pytest.mark.parametrize("name", ["wan_t2v", "hunyuan_video", "ltx_video", "flux"])
def test_a_block_sees_modulation_instead_of_the_timestep(name: str) -> None:
    gm, layouts = compiled(name, regional=True)[-1]
    (found,) = modulation_inputs(layouts, gm)
    assert (short(found.name), found.kind, found.per_token) == ("temb", "modulation", False)


EXPORTED = {
    "wan_t2v": ["hidden_states:128"] * 2,
    "hunyuan_video": ["encoder_hidden_states:12"] + ["hidden_states:128|encoder_hidden_states:12"] * 2,
    "ltx_video": ["hidden_states:128"],
    "mochi": [f"hidden_states:128|encoder_attention_mask+encoder_hidden_states:u{index}" for index in range(4)],
    "easyanimate": ["encoder_hidden_states:16|hidden_states:128"],
}


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_graph(name: str) -> None:
    analysed = exported(name)
    assert self_attentions([analysed]) == EXPORTED[name]
    assert latents([analysed]) == {"hidden_states"}
    assert unruled([analysed]) == {}


@pytest.mark.parametrize("name", ["wan_t2v", "hunyuan_video"])
def test_decomposed_attention_has_the_same_tokens(name: str) -> None:
    gm, layouts = exported(name, decompose=True)
    whole = exported(name)[1]
    assert layouts.latent == {"hidden_states"}
    assert layouts.unruled_ops == {}
    assert token_axes(layouts) == token_axes(whole)
    assert [t.name for t in modulation_inputs(layouts, gm)][:1] == ["timestep"]


def token_axes(layouts: TokenLayouts) -> set[tuple[str, str]]:
    """Query and key tokens of all attentions; a mask is part of the decomposed scores, so it is left out."""

    def spell(axis: Axis) -> str:
        parts = [(sorted(s.sources - {"encoder_attention_mask"}), s.length) for s in collapse(axis) or ()]
        return "|".join(f"{names}:{length}" for names, length in parts)

    return {(spell(attention.query), spell(attention.key)) for attention in layouts.attentions}

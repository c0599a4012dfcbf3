"""The analysis on diffusers' models compiled whole: segments of the attentions, latent, timestep, operators."""

from __future__ import annotations

from collections import Counter

import pytest

from svg2_compile.passes.time_inputs import modulation_inputs
from tests.zoo.graphs import Analysed, attention_operands, compiled, latents, self_attentions, short, spelled
from tests.zoo.models import ZOO

_ROPE = "+visual_rope_pos_0+visual_rope_pos_1+visual_rope_pos_2"
_IMAGE_ROPE = "+image_rotary_emb_0+image_rotary_emb_1"

# model -> query layouts of its self-attentions, in the order of the graph.
SELF_ATTENTIONS: dict[str, list[str]] = {
    "wan_t2v": ["hidden_states:128"] * 2,
    "wan_i2v": ["hidden_states:128"] * 2,
    "wan_t2v_batch2": ["hidden_states:128"] * 2,
    "wan_ti2v": ["hidden_states+timestep:128"] * 2,
    "wan_vace": ["control_hidden_states+hidden_states:128"] * 2
    + ["hidden_states:128", "control_hidden_states+hidden_states:128"],
    "skyreels_v2": ["hidden_states:128"] * 2,
    "chronoedit": ["hidden_states:128"] * 2,
    "hunyuan_video": ["encoder_hidden_states:12"] + ["hidden_states:128|encoder_hidden_states:12"] * 2,
    "cogvideox": ["encoder_hidden_states:8|hidden_states:32"] * 2,
    "cogvideox_rope": [f"encoder_hidden_states:8|hidden_states{_IMAGE_ROPE}:32"] * 2,
    "ltx_video": ["hidden_states:128"],
    "ltx2": ["hidden_states:128", "audio_hidden_states:9"] * 2,
    "allegro": ["hidden_states:32"],
    "easyanimate": ["encoder_hidden_states:16|hidden_states:128"],
    "latte": ["hidden_states:16", "hidden_states:3"],
    "cosmos": ["hidden_states:128"] * 2,
    "motif_video": ["hidden_states:128|encoder_hidden_states:12"] * 2,
    "kandinsky5": ["encoder_hidden_states+text_rope_pos:12"] + [f"hidden_states{_ROPE}:128"] * 2,
    "sana_video": [],
    "flux": ["encoder_hidden_states+txt_ids:12|hidden_states+img_ids:64"] * 2,
    "qwen_image": ["encoder_hidden_states:12|hidden_states:64"],
}
# Models that Dynamo breaks into pieces: a piece knows intermediate tensors, not the model's inputs.
IN_PIECES: dict[str, list[str]] = {
    "framepack": ["encoder_hidden_states:12"]
    + ["freqs_cis_0+freqs_cis_1+hidden_states:193|encoder_hidden_states:17"]
    + [f"hidden_states{_IMAGE_ROPE}:193|encoder_hidden_states:17"],
    "hunyuan_video15": ["encoder_hidden_states:12"]
    + ["freqs_cis_0+freqs_cis_1+hidden_states:128|encoder_hidden_states:20"],
    "mochi": [],
}
TIMESTEPS = {
    "hunyuan_video": ["timestep", "guidance"],  # a guidance scale embeds like a timestep
    "framepack": ["indices_latents", "indices_latents_clean", "indices_latents_history_2x"]
    + ["indices_latents_history_4x", "timestep", "guidance"],  # its attentions are in other pieces
}
# Frames that come before, and a video that controls: their tokens are a video's as well.
OTHER_VIDEOS = {
    "wan_vace": ["control_hidden_states"],
    "framepack": ["latents_clean", "latents_history_2x", "latents_history_4x"],
}
GRAPHS: dict[str, list[Analysed]] = {}


@pytest.fixture(params=ZOO)
def model(request: pytest.FixtureRequest) -> tuple[str, list[Analysed]]:
    """Name and analysed graphs of a model, compiled once."""
    name = request.param
    if name not in GRAPHS:
        GRAPHS[name] = compiled(name)
    return name, GRAPHS[name]


def test_self_attentions_latent_and_timestep(model: tuple[str, list[Analysed]]) -> None:
    name, analysed = model
    assert self_attentions(analysed) == {**SELF_ATTENTIONS, **IN_PIECES}[name]
    if name != "mochi":
        assert latents(analysed) == {"hidden_states", *OTHER_VIDEOS.get(name, ())}
    times = [modulation_inputs(layouts, gm) for gm, layouts in analysed]
    found = [short(t.name) for inputs in times for t in inputs if t.kind == "timestep"]
    assert found == TIMESTEPS.get(name, ["timestep"])


def test_every_operator_of_the_zoo_has_a_rule(model: tuple[str, list[Analysed]]) -> None:
    _, analysed = model
    assert sum((layouts.unruled_ops for _, layouts in analysed), Counter()) == {}


def test_cross_attention_has_other_keys() -> None:
    (analysed,) = GRAPHS.setdefault("wan_i2v", compiled("wan_i2v"))
    gm, layouts = analysed
    keys = [spelled(layouts, key) for _, _, key in attention_operands(gm)]
    assert keys == ["hidden_states:128", "encoder_hidden_states_image:7", "encoder_hidden_states:512"] * 2

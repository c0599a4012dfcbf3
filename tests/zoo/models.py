"""Diffusers' own transformers in configurations that run in milliseconds: random weights, one set of inputs each.

    module, inputs = build("wan_t2v")
    module(**inputs)

`ZOO` maps names to factories. Weights and inputs are the same in every process (seeded in `build`). The models of
`VIDEO_MODELS` are what the compiler is for; the others check that no rule knows a model by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.zoo.models_joint import (
    allegro,
    cogvideox,
    cogvideox_rope,
    easyanimate,
    framepack,
    hunyuan_video,
    hunyuan_video15,
    ltx2,
    ltx_video,
    mochi,
)
from tests.zoo.models_other import (
    cosmos,
    flux,
    kandinsky5,
    latte,
    motif_video,
    qwen_image,
    sana_video,
)
from tests.zoo.models_wan import (
    chronoedit,
    skyreels_v2,
    wan_i2v,
    wan_t2v,
    wan_t2v_batch2,
    wan_ti2v,
    wan_vace,
)
from tests.zoo.sample import Sample


def build(name: str, seed: int = 0) -> Sample:
    """The model `name` in eval mode and keyword arguments of its forward. The global random state stays as it is."""
    if name not in ZOO:
        raise ValueError(f"unknown model {name!r}; the zoo has {', '.join(ZOO)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, inputs = ZOO[name]()
    return module.eval(), inputs


VIDEO_MODELS: dict[str, Callable[[], Sample]] = {
    "wan_t2v": wan_t2v,
    "wan_i2v": wan_i2v,
    "hunyuan_video": hunyuan_video,
    "cogvideox": cogvideox,
    "ltx_video": ltx_video,
    "mochi": mochi,
    "allegro": allegro,
    "easyanimate": easyanimate,
    "skyreels_v2": skyreels_v2,
}
OTHER_MODELS: dict[str, Callable[[], Sample]] = {
    "wan_t2v_batch2": wan_t2v_batch2,
    "wan_ti2v": wan_ti2v,
    "wan_vace": wan_vace,
    "chronoedit": chronoedit,
    "cogvideox_rope": cogvideox_rope,
    "framepack": framepack,
    "hunyuan_video15": hunyuan_video15,
    "ltx2": ltx2,
    "latte": latte,
    "cosmos": cosmos,
    "motif_video": motif_video,
    "kandinsky5": kandinsky5,
    "sana_video": sana_video,
    "flux": flux,
    "qwen_image": qwen_image,
}
ZOO: dict[str, Callable[[], Sample]] = {**VIDEO_MODELS, **OTHER_MODELS}

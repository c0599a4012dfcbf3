"""Which public model code is tried, and how (see bench/models.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bench.checkouts.builders import (
    diffsynth,
    fastvideo,
    hunyuan,
    hunyuan_1_5,
    hunyuan_flash,
    longcat,
    ltx,
    mochi,
    musubi,
    open_sora,
    skyreels,
    step_video,
    videox_fun,
    wan,
    wan_wrapper,
)
from bench.checkouts.inputs import (
    Call,
    batched,
    by_frames,
    captioned,
    counted,
    listed,
    listed_with_table,
    numbered,
    packed,
    padded,
    patched,
    streamed,
    towers,
    worded,
)


@dataclass(frozen=True)
class Recipe:
    """How to try a repository. prepare: from its checkout to a builder. inputs: of a call, by frames, height and width.
    note: what had to be put in the place of something that is not there on a CPU. folder: of the checkout, where one
    repository is tried in several ways. autocast: to bfloat16."""

    url: str
    prepare: Callable[[Path], Callable[[], nn.Module]]
    inputs: Callable[[int, int, int], Call]
    note: str = ""
    folder: str = ""
    autocast: bool = False


_SDPA = "its own way without flash-attn"


RECIPES: dict[str, Recipe] = {
    "Wan2.1": Recipe("https://github.com/Wan-Video/Wan2.1", wan, listed, f"{_SDPA}, in float32"),
    "Wan2.2": Recipe("https://github.com/Wan-Video/Wan2.2", wan, listed, f"{_SDPA}, in float32"),
    "SkyReels-V2": Recipe("https://github.com/SkyworkAI/SkyReels-V2", skyreels, batched, "cross attention by SDPA"),
    "musubi-tuner": Recipe("https://github.com/kohya-ss/musubi-tuner", musubi, listed, "Wan, attn_mode=torch"),
    "LongCat-Video": Recipe("https://github.com/meituan-longcat/LongCat-Video", longcat, captioned, "xformers by SDPA"),
    "HunyuanVideo": Recipe("https://github.com/Tencent-Hunyuan/HunyuanVideo", hunyuan, streamed, "mode=torch, no mask"),
    "HunyuanVideo, flash": Recipe(
        "https://github.com/Tencent-Hunyuan/HunyuanVideo",
        hunyuan_flash,
        padded,
        "its default mode: flash-attn's operator by a plain one, 9 of 16 text tokens valid",
        "HunyuanVideo",
    ),
    "HunyuanVideo-1.5": Recipe(
        "https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5", hunyuan_1_5("torch"), towers, "attn_mode=torch"
    ),
    "HunyuanVideo-1.5, flash": Recipe(
        "https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5",
        hunyuan_1_5("flash"),
        towers,
        "flash-attn's operator by a plain one",
        "HunyuanVideo-1.5",
    ),
    "mochi": Recipe(
        "https://github.com/genmoai/mochi",
        mochi("sdpa"),
        packed(1),
        "attention_mode=sdpa, autocast to bfloat16",
        autocast=True,
    ),
    "mochi, flash": Recipe(
        "https://github.com/genmoai/mochi",
        mochi("flash"),
        packed(2),
        "flash-attn's operator by a plain one, batch of 2, autocast to bfloat16",
        "mochi",
        autocast=True,
    ),
    "Step-Video-T2V": Recipe("https://github.com/stepfun-ai/Step-Video-T2V", step_video, by_frames, "on one device"),
    "VideoX-Fun": Recipe("https://github.com/aigc-apps/VideoX-Fun", videox_fun, counted, f"Wan, {_SDPA}"),
    "ComfyUI-WanVideoWrapper": Recipe(
        "https://github.com/kijai/ComfyUI-WanVideoWrapper", wan_wrapper, listed_with_table, "SDPA in float32"
    ),
    "DiffSynth-Studio": Recipe("https://github.com/modelscope/DiffSynth-Studio", diffsynth, batched, f"Wan, {_SDPA}"),
    "FastVideo": Recipe(
        "https://github.com/hao-ai-lab/FastVideo",
        fastvideo,
        worded,
        "Wan, SDPA, outside of graphs (its default)",
    ),
    "LTX-Video": Recipe("https://github.com/Lightricks/LTX-Video", ltx, patched),
    "Open-Sora": Recipe(
        "https://github.com/hpcaitech/Open-Sora", open_sora, numbered, "flash-attn's operator and norms by plain ones"
    ),
}

"""Sample a small model of ComfyUI's own code, plain and through the node, and print what came out as JSON.

python tests/integrations/comfyui_host.py CHECKOUT MODEL BLOCKS

MODEL: wan, hunyuan or ltx. BLOCKS: 0 or 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

CHECKOUT, MODEL, BLOCKS = sys.argv[1:]
sys.path.insert(0, CHECKOUT)
sys.argv = ["ComfyUI", "--cpu"]  # ComfyUI reads its options when it is imported; attention on a CPU is in chunks

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402

from svg2_compile.integrations.comfyui import NODE_CLASS_MAPPINGS  # noqa: E402
from tests.support import IDENTITY, SELECTION  # noqa: E402

WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 48,
    "ffn_dim": 64,
    "freq_dim": 32,
    "text_dim": 16,
    "num_heads": 2,
    "num_layers": 3,
    "in_dim": 16,
    "out_dim": 16,
    "text_len": 12,
}
HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "hidden_size": 32,
    "num_heads": 2,
    "context_in_dim": 16,
    "vec_in_dim": 8,
    "mlp_ratio": 2.0,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6],
    "theta": 256,
    "patch_size": [1, 2, 2],
    "qkv_bias": True,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
}
LTX = {
    "image_model": "ltxv",
    "in_channels": 128,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_channels": 16,
    "num_layers": 3,
}
MODELS: dict[str, tuple[Any, dict[str, Any], tuple[int, ...]]] = {
    "wan": (comfy.supported_models.WAN21_T2V, WAN, (1, 16, 2, 16, 16)),
    "hunyuan": (comfy.supported_models.HunyuanVideo, HUNYUAN, (1, 16, 2, 16, 16)),
    "ltx": (comfy.supported_models.LTXV, LTX, (1, 128, 4, 6, 6)),
}


def patcher() -> Any:
    kind, config, _ = MODELS[MODEL]
    torch.manual_seed(0)
    supported = kind(config)
    supported.set_inference_dtype(torch.float32, None)
    model = supported.get_model({}, device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # ComfyUI leaves weights as memory was
    return comfy.model_patcher.ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


def sample(model: Any, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(MODELS[MODEL][2], generator=generator)
    texts = [torch.randn(1, 12, 16, generator=generator) for _ in range(2)]
    mask = torch.ones(1, 12, dtype=torch.int64)
    mask[:, 9:] = 0
    more: dict[str, torch.Tensor] = {}
    if MODEL == "ltx":
        more = {"attention_mask": mask}
    elif MODEL == "hunyuan":
        more = {"pooled_output": torch.randn(1, 8, generator=generator)}
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*([[text, {**more}]] for text in texts))
    guider.set_cfg(3.0)
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=seed)


def run(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    lines = "\n".join(f"{name}={value}" for name, value in options.items())
    compiled, handle = NODE_CLASS_MAPPINGS["Svg2CompileModel"]().compile(model, "none", 0.0, 0.0, BLOCKS == "1", lines)
    plain = sample(model)
    sparse = [sample(compiled), sample(compiled)]
    shown = NODE_CLASS_MAPPINGS["Svg2Report"]().show(handle, {"samples": sparse[0]})
    import svg2_compile

    report = svg2_compile.report(compiled.get_model_object("diffusion_model"))
    names = ("site", "step", "branch", "graph", "reason", "seeded", "video", "source", "density")
    return {
        "error": ((sparse[0] - plain).abs().max() / plain.abs().max()).item(),
        "again": ((sparse[1] - plain).abs().max() / plain.abs().max()).item(),
        "still_plain": torch.equal(sample(model), plain),
        "finite": bool(plain.isfinite().all()),
        "runs": [{name: getattr(run, name) for name in names} for run in report.runs],
        "reasons": sorted({site.reason for site in report.sites}),
        "text": shown["result"][1],
    }


if __name__ == "__main__":
    assert Path(CHECKOUT, "comfyui_version.py").is_file(), "no checkout of ComfyUI"
    results = {"exact": run(patcher(), IDENTITY), "selection": run(patcher(), {**SELECTION, "dense_steps": 1})}
    print("RESULT " + json.dumps(results))

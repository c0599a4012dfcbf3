"""Model code of public repositories, tried as it is: which attentions become sparse, at three sizes, and how exactly.

    git clone https://github.com/Wan-Video/Wan2.1 checkouts/Wan2.1 ...
    python bench/models.py checkouts > docs/models.md

Every model is small, with random weights, and runs with all clusters kept, so that its result must be that of dense
attention. Whole and regional are enabled models. Nothing of a repository is kept here but the names that build its
model. Its own requirements must be installed, or the line says what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

SIZES = ((5, 16, 24), (3, 24, 32), (2, 16, 20))
OPTIONS: dict[str, Any] = {
    "min_tokens": 0,
    "dense_steps": 0,
    "dense_layers": 0,
    "top_p": 1.0,
    "inner_backend": "eager",
}
Call = tuple[tuple[Any, ...], dict[str, Any]]
WAN: dict[str, Any] = {
    "model_type": "t2v",
    "dim": 64,
    "ffn_dim": 128,
    "freq_dim": 32,
    "text_dim": 32,
    "text_len": 16,
    "num_heads": 2,
    "num_layers": 3,
    "in_dim": 4,
    "out_dim": 4,
}


@dataclass(frozen=True)
class Recipe:
    """How to try a repository. prepare: from its checkout to a builder. inputs: of a call, by frames, height and width.
    note: what had to be put in the place of something that is not there on a CPU."""

    url: str
    prepare: Callable[[Path], Callable[[], nn.Module]]
    inputs: Callable[[int, int, int], Call]
    note: str = ""


def package(name: str, path: Path) -> None:
    """A package without its __init__, which imports all of a repository."""
    module = types.ModuleType(name)
    module.__path__ = [str(path)]
    sys.modules[name] = module


def fused(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """What the repositories call where flash-attn is missing: [B, N, H, D]."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.08)
    return module.float().eval()


def wan(checkout: Path) -> Callable[[], nn.Module]:
    package("wan", checkout / "wan")
    package("wan.modules", checkout / "wan/modules")
    attention: Any = importlib.import_module("wan.modules.attention")

    def fallback(**arguments: Any) -> Tensor:
        return attention.attention(**{**arguments, "dtype": torch.float32})

    attention.flash_attention = lambda q, k, v, **rest: fallback(q=q, k=k, v=v, **rest)
    model: Any = importlib.import_module("wan.modules.model")
    model.flash_attention = attention.flash_attention
    return lambda: randomised(model.WanModel(**WAN))


def skyreels(checkout: Path) -> Callable[[], nn.Module]:
    package("skyreels_v2_infer", checkout / "skyreels_v2_infer")
    package("skyreels_v2_infer.modules", checkout / "skyreels_v2_infer/modules")
    model: Any = importlib.import_module("skyreels_v2_infer.modules.transformer")
    model.flash_attention = fused
    return lambda: randomised(model.WanModel(**WAN))


def musubi(checkout: Path) -> Callable[[], nn.Module]:
    sys.path.insert(0, str(checkout / "src"))
    model: Any = importlib.import_module("musubi_tuner.wan.modules.model")
    return lambda: randomised(model.WanModel(**WAN, attn_mode="torch"))


def longcat(checkout: Path) -> Callable[[], nn.Module]:
    package("longcat_video", checkout / "longcat_video")
    mask = types.SimpleNamespace(BlockDiagonalMask=types.SimpleNamespace(from_seqlens=lambda *_: None))
    xformers, xops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    vars(xops).update(memory_efficient_attention=fused, fmha=types.SimpleNamespace(attn_bias=mask))
    vars(xformers).update(ops=xops)
    model: Any = importlib.import_module("longcat_video.modules.longcat_video_dit")
    sys.modules.update({"xformers": xformers, "xformers.ops": xops})
    sizes = {"in_channels": 4, "out_channels": 4, "hidden_size": 64, "depth": 3, "num_heads": 2}
    rest = {"caption_channels": 32, "adaln_tembed_dim": 32, "frequency_embedding_size": 32, "cp_split_hw": [1, 1]}
    return lambda: randomised(model.LongCatVideoTransformer3DModel(**sizes, **rest, enable_xformers=True))


def hunyuan(checkout: Path) -> Callable[[], nn.Module]:
    package("hyvideo", checkout / "hyvideo")
    package("hyvideo.modules", checkout / "hyvideo/modules")
    attention = importlib.import_module("hyvideo.modules.attenion")
    model: Any = importlib.import_module("hyvideo.modules.models")
    refiner: Any = importlib.import_module("hyvideo.modules.token_refiner")
    packed = ("cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv", "batch_size")

    def plain(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        kept = {name: value for name, value in rest.items() if name not in packed}
        return attention.attention(q, k, v, **{**kept, "mode": "torch"})

    model.attention = refiner.attention = plain
    model.get_cu_seqlens = lambda mask, _: torch.zeros(2 * mask.shape[0] + 1, dtype=torch.int32)
    text = types.SimpleNamespace(text_states_dim=32, text_states_dim_2=24)
    sizes = {"in_channels": 4, "out_channels": 4, "hidden_size": 64, "heads_num": 2, "mlp_width_ratio": 2.0}
    rest = {"mm_double_blocks_depth": 2, "mm_single_blocks_depth": 2, "rope_dim_list": [8, 12, 12]}
    return lambda: randomised(model.HYVideoDiffusionTransformer(text, **sizes, **rest, guidance_embed=True))


def _count(frames: int, height: int, width: int) -> int:
    return frames * (height // 2) * (width // 2)


def listed(*size: int) -> Call:
    return ([torch.randn(4, *size)], torch.tensor([900.0]), [torch.randn(12, 32)], _count(*size)), {}


def batched(*size: int) -> Call:
    return (torch.randn(1, 4, *size), torch.tensor([900.0]), torch.randn(1, 12, 32)), {}


def captioned(*size: int) -> Call:
    mask = torch.ones(1, 12, dtype=torch.int64)
    return (torch.randn(1, 4, *size), torch.tensor([900.0]), torch.randn(1, 1, 12, 32)), {
        "encoder_attention_mask": mask
    }


def streamed(*size: int) -> Call:
    count = _count(*size)
    text = {"text_states": torch.randn(1, 16, 32), "text_mask": torch.ones(1, 16, dtype=torch.int64)}
    rotary = {"freqs_cos": torch.randn(count, 32), "freqs_sin": torch.randn(count, 32)}
    rest = {"text_states_2": torch.randn(1, 24), "guidance": torch.tensor([6000.0]), "return_dict": False}
    return (torch.randn(1, 4, *size), torch.tensor([900.0])), {**text, **rotary, **rest}


_SDPA = "its own way without flash-attn"
RECIPES: dict[str, Recipe] = {
    "Wan2.1": Recipe("https://github.com/Wan-Video/Wan2.1", wan, listed, f"{_SDPA}, in float32"),
    "Wan2.2": Recipe("https://github.com/Wan-Video/Wan2.2", wan, listed, f"{_SDPA}, in float32"),
    "SkyReels-V2": Recipe("https://github.com/SkyworkAI/SkyReels-V2", skyreels, batched, "cross attention by SDPA"),
    "musubi-tuner": Recipe("https://github.com/kohya-ss/musubi-tuner", musubi, listed, "Wan, attn_mode=torch"),
    "LongCat-Video": Recipe("https://github.com/meituan-longcat/LongCat-Video", longcat, captioned, "xformers by SDPA"),
    "HunyuanVideo": Recipe("https://github.com/Tencent-Hunyuan/HunyuanVideo", hunyuan, streamed, "mode=torch, no mask"),
}


def try_one(name: str, checkout: Path, regional: bool) -> dict[str, Any]:
    """What happens to the attentions of one repository."""
    import svg2_compile

    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: 0  # default arguments of some text encoders
    recipe = RECIPES[name]
    torch.manual_seed(0)
    module = recipe.prepare(checkout)()
    errors, ran = [], []
    with torch.no_grad():
        references = []
        for size in SIZES:
            torch.manual_seed(1)
            args, kwargs = recipe.inputs(*size)
            references.append(module(*args, **kwargs))
        with svg2_compile.enable(module, regional=regional, **OPTIONS) as enabled:
            for size, expected in zip(SIZES, references, strict=True):
                torch.manual_seed(1)
                args, kwargs = recipe.inputs(*size)
                before = len(enabled.report().runs)
                errors.append(_error(module(*args, **kwargs), expected))
                runs = enabled.report().runs[before:]
                ran.append(sum(run.graph == "sparse" for run in runs))
            sites = enabled.report().sites
    dense = Counter(site.reason for site in sites if site.decision == "dense")
    return {"sparse": ran, "error": max(errors), "dense": sorted(dense)}


def _error(actual: Any, expected: Any) -> float:
    pairs = [(a, b) for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True) if isinstance(a, Tensor)]
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-9)) for a, b in pairs)


def version_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h, %cs"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def in_a_process(name: str, checkout: Path, regional: bool) -> dict[str, Any]:
    """Repositories replace each other's modules: each has a process of its own."""
    command = [sys.executable, __file__, str(checkout.parent), "--only", name, *(["--regional"] if regional else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    with contextlib.suppress(json.JSONDecodeError, IndexError):
        return dict(json.loads(done.stdout.splitlines()[-1]))
    return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1]}


def page(folder: Path) -> str:
    """docs/models.md."""
    sizes = ", ".join("x".join(map(str, size)) for size in SIZES)
    lines = [
        "# Model code that was tried",
        "",
        "Public model code outside diffusers, as it is, with small configurations and random weights on a CPU, by "
        "`python bench/models.py CHECKOUTS` (which says how every model is built). All clusters are kept, so that the "
        "result must be that of dense attention: the error is the largest difference, relative to the largest value.",
        "",
        f"Sparse: attentions that ran sparse in one call at each of three latent sizes ({sizes}).",
        "",
        "| repository | version | enabled | sparse | error | stays dense | as tried |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, recipe in RECIPES.items():
        checkout = folder / name
        if not checkout.is_dir():
            lines.append(f"| [{name}]({recipe.url}) | - | - | no checkout | - | - | {recipe.note} |")
            continue
        for regional in (False, True):
            found = in_a_process(name, checkout, regional)
            kind = "regional" if regional else "whole"
            result = (
                f"{' / '.join(map(str, found['sparse']))} | {found['error']:.0e} | {', '.join(found['dense']) or '-'}"
                if "sparse" in found
                else f"{found['failed']} | - | -"
            )
            head = f"[{name}]({recipe.url}) | {version_of(checkout)}"
            lines.append(f"| {head} | {kind} | {result} | {recipe.note} |")
    lines += ["", *_NOT_YET]
    return "\n".join(lines)


_NOT_YET = (
    "`cross_attention` and `not_video` (text that attends to itself) are dense by design.",
    "",
    "What stays dense in such code, and why:",
    "",
    "- Packed rows with flash-attn, in which the padding of the text is a sequence of its own (HunyuanVideo's default "
    "mode): `several_sequences`. With `mode=torch` and a mask, or without padding, they are sparse.",
    "- Attention behind a graph break whose queries, keys and values are not of one length: the warning names the line "
    "and the way out.",
    "- A block that is compiled alone and is handed video and text as one tensor, all of it with positions: nothing in "
    "it shows where the text begins, and it is clustered with the video. Compile the whole model.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, help="folder with a checkout of each repository, by its name")
    parser.add_argument("--only", choices=RECIPES, help="one repository, as JSON")
    parser.add_argument("--regional", action="store_true", help="with --only: compile blocks")
    chosen = parser.parse_args()
    if chosen.only:
        print(json.dumps(try_one(chosen.only, chosen.checkouts / chosen.only, chosen.regional)))
    else:
        print(page(chosen.checkouts))


if __name__ == "__main__":
    main()

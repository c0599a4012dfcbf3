"""How the model code of public repositories is built small on a CPU, and what it is called with: see models.py.

Nothing of a repository is kept here but the names that build its model. What it imports and does not need for one call
on a CPU (kernels, distributed training, other models of it) is left empty.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    note: what had to be put in the place of something that is not there on a CPU. folder: of the checkout, where one
    repository is tried in several ways. autocast: to bfloat16."""

    url: str
    prepare: Callable[[Path], Callable[[], nn.Module]]
    inputs: Callable[[int, int, int], Call]
    note: str = ""
    folder: str = ""
    autocast: bool = False


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
    return _hunyuan_model(model)


def _hunyuan_model(model: Any) -> Callable[[], nn.Module]:
    text = types.SimpleNamespace(text_states_dim=32, text_states_dim_2=24)
    sizes = {"in_channels": 4, "out_channels": 4, "hidden_size": 64, "heads_num": 2, "mlp_width_ratio": 2.0}
    rest = {"mm_double_blocks_depth": 2, "mm_single_blocks_depth": 2, "rope_dim_list": [8, 12, 12]}
    return lambda: randomised(model.HYVideoDiffusionTransformer(text, **sizes, **rest, guidance_embed=True))


class _Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that a model does not need for one call on a CPU: whatever is imported from them is a mock."""

    def __init__(self, roots: tuple[str, ...]) -> None:
        self.roots = roots

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        wanted = any(name == root or name.startswith(root + ".") for root in self.roots)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        vars(module).update(__path__=[], __getattr__=lambda name: _mocked(name))
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _mocked(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return mock.MagicMock(name=name)


def missing(*roots: str) -> None:
    sys.meta_path.insert(0, _Missing(roots))


def module(name: str, **attributes: Any) -> Any:
    sys.modules[name] = made = types.ModuleType(name)
    vars(made).update(attributes)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__path__ = []
    return made


# flash-attn's operators (2.8), computed plainly: every sequence by itself.


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


def flash_attn_package() -> Any:
    """flash-attn for a CPU, as its functions and operators are named."""
    rest = "float dropout_p, float softmax_scale, bool causal) -> (Tensor, Tensor)"
    library = torch.library.Library("flash_attn", "DEF")
    library.define(
        "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
        f"SymInt max_seqlen_q, SymInt max_seqlen_k, {rest}"
    )
    library.define(f"_flash_attn_forward(Tensor q, Tensor k, Tensor v, {rest}")

    def varlen(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, *rest: Any) -> Any:
        _, _, _, scale, _ = rest
        out, (queries, keys) = torch.full_like(q, math.nan), (starts.tolist() for starts in (starts_q, starts_k))
        for begin, end, first, last in zip(queries, queries[1:], keys, keys[1:], strict=False):
            out[begin:end] = _softmax_attention(q[begin:end], k[first:last], v[first:last], scale)
        return out, q.new_zeros(q.shape[:-1], dtype=torch.float32)

    def dense(q: Tensor, k: Tensor, v: Tensor, _dropout: float, scale: float, _causal: bool) -> Any:
        out = torch.stack([_softmax_attention(*row, scale) for row in zip(q, k, v, strict=True)])
        return out, q.new_zeros(q.shape[:-1], dtype=torch.float32)

    for name, run in (("_flash_attn_varlen_forward", varlen), ("_flash_attn_forward", dense)):
        library.impl(name, run, "CPU")
        torch.library.register_fake(f"flash_attn::{name}", lambda q, *_: (torch.empty_like(q), q[..., 0].float()))
    package = module("flash_attn", __version__="2.8.3", library=library)
    operators = torch.ops.flash_attn

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return operators._flash_attn_forward(q, k, v, 0.0, q.shape[-1] ** -0.5, False)[0]

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> Any:
        packed = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return operators._flash_attn_varlen_forward(*packed, 0.0, softmax_scale or q.shape[-1] ** -0.5, False)[0]

    def flash_attn_varlen_qkvpacked_func(
        qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0, **rest: Any
    ) -> Any:
        packed = (*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return flash_attn_varlen_func(*packed, softmax_scale=rest.get("softmax_scale"))

    functions = (flash_attn_func, flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func)
    vars(package).update({function.__name__: function for function in functions})
    module("flash_attn.flash_attn_interface", _flash_attn_forward=None, **{f.__name__: f for f in functions})
    module("flash_attn.bert_padding", unpad_input=_unpad, pad_input=_pad)
    return package


def _unpad(hidden_states: Tensor, attention_mask: Tensor) -> tuple[Any, ...]:
    """flash_attn.bert_padding.unpad_input: [B, N, ...] -> the tokens that a mask [B, N] keeps, and where they were."""
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    places = torch.nonzero(attention_mask.flatten(), as_tuple=False).flatten()
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[places], places, starts, int(lengths.max()), lengths


def _pad(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """flash_attn.bert_padding.pad_input: the way back, with zeros."""
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    out[indices] = hidden_states
    return out.unflatten(0, (batch, seqlen))


def hunyuan_flash(checkout: Path) -> Callable[[], nn.Module]:
    flash_attn_package()
    package("hyvideo", checkout / "hyvideo")
    package("hyvideo.modules", checkout / "hyvideo/modules")
    attention: Any = importlib.import_module("hyvideo.modules.attenion")
    model: Any = importlib.import_module("hyvideo.modules.models")
    _on_cpu(attention)
    return _hunyuan_model(model)


class _Cpu:
    """torch, whose zeros are on a CPU whatever device is named."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(*args, **{**kwargs, "device": "cpu"})


def _on_cpu(module: Any) -> None:
    module.torch = _Cpu()


def hunyuan_1_5(mode: str) -> Callable[[Path], Callable[[], nn.Module]]:
    def prepare(checkout: Path) -> Callable[[], nn.Module]:
        if mode == "flash":
            flash_attn_package()
        for name in ("", ".models", ".models.transformers", ".models.transformers.modules", ".utils"):
            package(f"hyvideo{name}", checkout / f"hyvideo{name.replace('.', '/')}")
        state = types.SimpleNamespace(sp_enabled=False, sp=1)
        missing("hyvideo.models.text_encoders", "hyvideo.commons.parallel_states")
        importlib.import_module("hyvideo.commons.parallel_states").get_parallel_state = lambda: state
        encoder: Any = importlib.import_module("hyvideo.models.text_encoders.byT5")
        encoder.ByT5Mapper = lambda in_dim, out_dim1, **_: nn.Linear(in_dim, out_dim1)
        model: Any = importlib.import_module("hyvideo.models.transformers.hunyuanvideo_1_5_transformer")
        sizes = {"in_channels": 4, "out_channels": 4, "hidden_size": 64, "heads_num": 2, "mlp_width_ratio": 2.0}
        rest = {"mm_double_blocks_depth": 3, "mm_single_blocks_depth": 0, "rope_dim_list": [8, 12, 12]}
        text = {"text_states_dim": 32, "text_states_dim_2": 24, "vision_projection": "linear", "vision_states_dim": 32}
        more = {"attn_mode": mode, "attn_param": {}, "concat_condition": False, "use_cond_type_embedding": True}
        more = {**more, "glyph_byT5_v2": True}
        return lambda: randomised(model.HunyuanVideo_1_5_DiffusionTransformer(**sizes, **rest, **text, **more))

    return prepare


def mochi(mode: str) -> Callable[[Path], Callable[[], nn.Module]]:
    def prepare(checkout: Path) -> Callable[[], nn.Module]:
        flash_attn_package()
        torch.cuda.get_device_properties = lambda _: types.SimpleNamespace(major=8)  # type: ignore[method-assign,assignment]
        sys.path.insert(0, str(checkout / "src"))
        for name in ("genmo.mochi_preview", "genmo.mochi_preview.dit"):
            package(name, checkout / "src" / name.replace(".", "/"))
        model: Any = importlib.import_module("genmo.mochi_preview.dit.joint_model.asymm_models_joint")
        model.sdpa_kernel = mock.MagicMock()  # the fused kernels of a GPU alone
        sizes = {"in_channels": 4, "hidden_size_x": 96, "hidden_size_y": 64, "depth": 3, "num_heads": 2}
        widths = {"mlp_ratio_x": 128.0, "mlp_ratio_y": 2.0, "t5_feat_dim": 32, "t5_token_length": 16}
        rest = {"qk_norm": True, "qkv_bias": False, "attention_mode": mode}

        def build() -> nn.Module:
            built = randomised(model.AsymmDiTJoint(**sizes, **widths, **rest))
            for parameter in built.parameters():
                if parameter.dim() == 1:  # of norms; they come without a value
                    nn.init.uniform_(parameter, 0.5, 1.0)
            return built

        return build

    return prepare


def step_video(checkout: Path) -> Callable[[], nn.Module]:
    missing("xfuser.core")
    customised = "xfuser.model_executor.models.customized.step_video_t2v"
    package("stepvideo", checkout / "stepvideo")
    package("stepvideo.modules", checkout / "stepvideo/modules")
    for name in ("xfuser", "xfuser.model_executor", "xfuser.model_executor.models"):
        module(name)
    module("xfuser.model_executor.models.customized")
    module("xfuser.core", distributed=None)
    module("stepvideo.utils", with_empty_init=lambda function: function)
    package(customised, checkout / "stepvideo/modules")
    for name in ("blocks", "normalization"):
        sys.modules[f"{customised}.{name}"] = importlib.import_module(f"stepvideo.modules.{name}")
    model: Any = importlib.import_module("stepvideo.modules.model")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 128, "in_channels": 4, "out_channels": 4, "num_layers": 3}
    rest = {"caption_channels": 32, "attention_type": "torch", "patch_size": 2}
    return lambda: randomised(model.StepVideoModel(**sizes, **rest))


def videox_fun(checkout: Path) -> Callable[[], nn.Module]:
    package("videox_fun", checkout / "videox_fun")
    package("videox_fun.models", checkout / "videox_fun/models")
    missing("videox_fun.dist", "videox_fun.models.attention_kernel")
    dist: Any = importlib.import_module("videox_fun.dist")
    dist.get_sequence_parallel_world_size = lambda: 1
    module("videox_fun.utils", cfg_skip=lambda: lambda function: function)
    model: Any = importlib.import_module("videox_fun.models.wan_transformer3d")
    return lambda: randomised(model.WanTransformer3DModel(**WAN, in_channels=4, hidden_size=64))


def wan_wrapper(checkout: Path) -> Callable[[], nn.Module]:
    management = {"get_torch_device": lambda: torch.device("cpu"), "get_autocast_device": lambda _: "cpu"}
    module("comfy", model_management=module("comfy.model_management", **management))
    for name in ("wrapper", "wrapper.wanvideo", "wrapper.wanvideo.modules", "wrapper.enhance_a_video"):
        package(name, checkout / name.removeprefix("wrapper").strip(".").replace(".", "/"))
    model: Any = importlib.import_module("wrapper.wanvideo.modules.model")
    model.attention = lambda q, k, v, **_: fused(q, k, v)  # in float32: its own casts to bfloat16
    model.WanSelfAttention.forward.__globals__["attention"] = model.attention
    return lambda: randomised(model.WanModel(**WAN, main_device=torch.device("cpu")))


def diffsynth(checkout: Path) -> Callable[[], nn.Module]:
    for name in ("diffsynth", "diffsynth.models", "diffsynth.core"):
        package(name, checkout / name.replace(".", "/"))
    model: Any = importlib.import_module("diffsynth.models.wan_video_dit")
    rest = {"eps": 1e-6, "patch_size": (1, 2, 2), "has_image_input": False}
    kept = {name: value for name, value in WAN.items() if name not in ("model_type", "text_len")}
    patchify = model.WanModel.patchify

    def flattened(self: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """As its pipeline does between the methods of the model, whose own forward lags behind."""
        x = patchify(self, x)
        return x.flatten(2).transpose(1, 2).contiguous(), tuple(x.shape[2:])

    model.WanModel.patchify = flattened
    return lambda: randomised(model.WanModel(**kept, **rest))


def ltx(checkout: Path) -> Callable[[], nn.Module]:
    sys.path.insert(0, str(checkout))
    model: Any = importlib.import_module("ltx_video.models.transformers.transformer3d")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "num_layers": 3}
    text = {"cross_attention_dim": 64, "caption_channels": 32, "attention_bias": True, "qk_norm": "rms_norm"}
    norms = {"adaptive_norm": "single_scale_shift", "standardization_norm": "rms_norm", "norm_eps": 1e-6}
    rope = {"positional_embedding_theta": 10000.0, "positional_embedding_max_pos": [20, 2048, 2048]}
    rest = {"activation_fn": "gelu-approximate", "norm_elementwise_affine": False, "timestep_scale_multiplier": 1000}
    return lambda: randomised(model.Transformer3DModel(**sizes, **text, **norms, **rope, **rest))


def open_sora(checkout: Path) -> Callable[[], nn.Module]:
    flash_attn_package()
    missing("colossalai", "mmengine", "tensornvme", "liger_kernel", "opensora.registry", "opensora.utils")
    package("opensora", checkout / "opensora")
    package("opensora.models", checkout / "opensora/models")
    package("opensora.models.mmdit", checkout / "opensora/models/mmdit")
    module("opensora.acceleration")
    module("opensora.acceleration.checkpoint", auto_grad_checkpoint=lambda function, *args: function(*args))
    layers: Any = importlib.import_module("opensora.models.mmdit.layers")
    layers.FusedRMSNorm = layers.RMSNorm  # Liger's is a Triton kernel
    layers.QKNorm.__init__.__globals__["FusedRMSNorm"] = layers.RMSNorm
    model: Any = importlib.import_module("opensora.models.mmdit.model")
    text = {"vec_in_dim": 24, "context_in_dim": 32, "axes_dim": [8, 12, 12], "theta": 10000}
    sizes = {"in_channels": 16, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2}
    rest = {"depth_single_blocks": 2, "qkv_bias": True, "guidance_embed": False, "from_pretrained": "", "cache_dir": ""}
    return lambda: randomised(model.MMDiTModel(model.MMDiTConfig(**text, **sizes, **rest)))


def _count(frames: int, height: int, width: int) -> int:
    return frames * (height // 2) * (width // 2)


def listed(*size: int) -> Call:
    return ([torch.randn(4, *size)], torch.tensor([900.0]), [torch.randn(12, 32)], _count(*size)), {}


def batched(*size: int) -> Call:
    return (torch.randn(1, 4, *size), torch.tensor([900.0]), torch.randn(1, 12, 32)), {}


def counted(*size: int) -> Call:
    args, _ = listed(*size)
    return (torch.stack(args[0]), *args[1:]), {}


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


def padded(*size: int) -> Call:
    """Of the text, 9 tokens of 16 are valid."""
    args, kwargs = streamed(*size)
    mask = (torch.arange(16) < 9).to(torch.int64)[None]
    return args, {**kwargs, "text_mask": mask}


def towers(*size: int) -> Call:
    mask = (torch.arange(16) < 9).to(torch.int64)[None]
    text = {"text_states": torch.randn(1, 16, 32), "text_states_2": None, "encoder_attention_mask": mask}
    glyphs = {
        "byt5_text_states": torch.randn(1, 8, 1472),
        "byt5_text_mask": (torch.arange(8) < 3).to(torch.int64)[None],
    }
    rest = {"vision_states": torch.randn(1, 5, 32), "extra_kwargs": glyphs}
    return (torch.randn(1, 4, *size), torch.tensor([900.0])), {**text, **rest}


def packed(batch: int) -> Callable[..., Call]:
    """Video, and text of 9 and of 6 valid tokens, packed."""

    def inputs(*size: int) -> Call:
        count = _count(*size)
        mask = torch.arange(16) < torch.tensor([9, 6])[:batch, None]
        valid = F.pad(mask, (count, 0), value=True)
        lengths = valid.sum(-1, dtype=torch.int32)
        indices = {
            "cu_seqlens_kv": F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            "max_seqlen_in_batch_kv": int(lengths.max()),
            "valid_token_indices_kv": torch.nonzero(valid.flatten(), as_tuple=False).flatten(),
        }
        video, text = torch.randn(batch, 4, *size), torch.randn(batch, 16, 32)
        return (video, torch.full((batch,), 0.9), [text], [mask]), {"packed_indices": indices}

    return inputs


def by_frames(*size: int) -> Call:
    """[B, F, C, H, W]."""
    text = {"encoder_hidden_states": torch.randn(1, 12, 32), "encoder_attention_mask": torch.ones(1, 12)}
    frames, height, width = size
    video = torch.randn(1, frames, 4, height, width)
    return (video,), {**text, "timestep": torch.tensor([900.0]), "return_dict": False}


def listed_with_table(*size: int) -> Call:
    args, kwargs = listed(*size)
    angles = torch.outer(torch.arange(64.0), 0.9 ** torch.arange(16.0)).double()
    freqs = torch.polar(torch.ones_like(angles), angles)
    return args, {**kwargs, "device": torch.device("cpu"), "freqs": freqs}


def patched(*size: int) -> Call:
    """Tokens of a video, and their places."""
    count = _count(*size)
    text = {"encoder_hidden_states": torch.randn(1, 12, 32), "encoder_attention_mask": torch.ones(1, 12)}
    places = torch.rand(1, 3, count) * 16
    return (torch.randn(1, count, 4), places), {**text, "timestep": torch.tensor([[0.9]]), "return_dict": False}


def numbered(*size: int) -> Call:
    count = _count(*size)
    ids = {"img_ids": torch.randint(0, 16, (1, count, 3)).float(), "txt_ids": torch.zeros(1, 12, 3)}
    rest = {"txt": torch.randn(1, 12, 32), "timesteps": torch.tensor([0.9]), "y_vec": torch.randn(1, 24)}
    return (), {"img": torch.randn(1, count, 16), **ids, **rest}


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
    "LTX-Video": Recipe("https://github.com/Lightricks/LTX-Video", ltx, patched),
    "Open-Sora": Recipe(
        "https://github.com/hpcaitech/Open-Sora", open_sora, numbered, "flash-attn's operator and norms by plain ones"
    ),
}

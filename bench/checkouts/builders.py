"""How the model of every repository is built: nothing of one is kept here but the names that build its model."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench.checkouts.missing import flash_attn_package, fused, missing, module, on_cpu, package, randomised

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


def hunyuan_flash(checkout: Path) -> Callable[[], nn.Module]:
    flash_attn_package()
    package("hyvideo", checkout / "hyvideo")
    package("hyvideo.modules", checkout / "hyvideo/modules")
    attention: Any = importlib.import_module("hyvideo.modules.attenion")
    model: Any = importlib.import_module("hyvideo.modules.models")
    on_cpu(attention)
    return _hunyuan_model(model)


def hunyuan_1_5(mode: str) -> Callable[[Path], Callable[[], nn.Module]]:
    def prepare(checkout: Path) -> Callable[[], nn.Module]:
        if mode == "flash":
            flash_attn_package()
        for name in ("", ".models", ".models.transformers", ".models.transformers.modules", ".utils"):
            package(f"hyvideo{name}", checkout / f"hyvideo{name.replace('.', '/')}")
        state = types.SimpleNamespace(sp_enabled=False, sp=1)
        missing("hyvideo.models.text_encoders", "hyvideo.commons.parallel_states")
        parallel: Any = importlib.import_module("hyvideo.commons.parallel_states")
        parallel.get_parallel_state = lambda: state
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
        cuda: Any = torch.cuda
        cuda.get_device_properties = lambda _: types.SimpleNamespace(major=8)
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


def fastvideo(checkout: Path) -> Callable[[], nn.Module]:
    package("fastvideo", checkout / "fastvideo")
    missing("cloudpickle", "torchvision", "imageio", "av", "cv2", "ray", "zmq", "flash_attn", "remote_pdb")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel: Any = importlib.import_module("fastvideo.distributed.parallel_state")
    parallel.maybe_init_distributed_environment_and_model_parallel(1, 1)
    platform: Any = importlib.import_module("fastvideo.platforms").current_platform
    sdpa = "fastvideo.attention.backends.sdpa.SDPABackend"  # its CPU platform names no attention
    type(platform).get_attn_backend_cls = classmethod(lambda *_, **__: sdpa)
    context: Any = importlib.import_module("fastvideo.forward_context")
    # Its pipelines set one around every call.
    context._forward_context = context.ForwardContext(current_timestep=0, attn_metadata=None)
    configs: Any = importlib.import_module("fastvideo.configs.models.dits.wanvideo")
    model: Any = importlib.import_module("fastvideo.models.dits.wanvideo")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "in_channels": 4, "out_channels": 4}
    text = {"text_dim": 32, "freq_dim": 32, "ffn_dim": 128}

    def build() -> nn.Module:
        config = configs.WanVideoConfig(arch_config=configs.WanVideoArchConfig(**sizes, **text))
        made = randomised(model.WanTransformer3DModel(config, {}))
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:  # left uninitialised
                nn.init.constant_(parameter, float("bias" not in name))
        return made

    return build

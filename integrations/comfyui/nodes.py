"""The nodes: one compiles a MODEL, one shows afterwards what ran. ComfyUI is imported where they run, not before."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

from .steps import tell_steps

__all__ = ["CompileModel", "Handle", "Report"]

_KEY = "svg2"
# What Dynamo's graphs show as one attention; others split the tokens in chunks.
_READABLE = ("attention_pytorch", "attention_sage", "attention_flash", "attention_xformers")


class Handle:
    """What the report node is handed: the model that was compiled."""

    def __init__(self, module: Any) -> None:
        self._module = weakref.ref(module)

    def text(self) -> str:
        """What was decided and what ran since the model was compiled."""
        import svg2_compile

        module = self._module()
        return "the model is gone" if module is None else str(svg2_compile.report(module))


class CompileModel:
    """Compile a video model so that its self-attention is sparse."""

    CATEGORY = "model_patches/svg2"
    DESCRIPTION = "SVG2 sparse attention by torch.compile. Put it behind LoRA nodes and in front of the sampler."
    FUNCTION = "compile"
    RETURN_TYPES = ("MODEL", "SVG2")
    RETURN_NAMES = ("model", "svg2")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from svg2_compile.settings.presets import load_presets

        hints = {
            "preset": "the settings of a model; density and dense steps below override it where they are not 0",
            "density": "part of the (query, key) pairs computed exactly; 0: as the preset or the default has it",
            "dense_steps": "part of the steps that stays dense at the start; 0: as the preset or the default has it",
            "blocks": "compile one block for all: a short first step. Off: the whole model in one graph",
            "options": "further options of svg2_compile, one name=value a line",
        }
        return {
            "required": {
                "model": ("MODEL",),
                "preset": (["none", *load_presets()], {"tooltip": hints["preset"]}),
                "density": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": hints["density"]},
                ),
                "dense_steps": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 0.99, "step": 0.05, "tooltip": hints["dense_steps"]},
                ),
                "blocks": ("BOOLEAN", {"default": True, "tooltip": hints["blocks"]}),
            },
            "optional": {"options": ("STRING", {"default": "", "multiline": True, "tooltip": hints["options"]})},
        }

    def compile(
        self, model: Any, preset: str, density: float, dense_steps: float, blocks: bool, options: str = ""
    ) -> tuple[Any, Handle]:
        """A clone of ``model`` that samples sparse, and what its report is asked of.

        Raises:
            ValueError: an option is unknown or out of range.
        """
        from comfy.patcher_extension import WrappersMP
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        from svg2_compile import Svg2Config

        chosen = _options(preset, density, dense_steps, options)
        Svg2Config.from_options(chosen)
        patched = model.clone()
        module = patched.get_model_object("diffusion_model")
        keys = _block_keys(module) if blocks else ["diffusion_model"]
        set_torch_compile_wrapper(model=patched, backend="svg2", options=chosen, keys=keys)
        patched.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, _KEY)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, tell_steps())
        _make_readable(patched)
        return patched, Handle(module)


class Report:
    """Shows what the compiled model did; connect the latent that the sampler gives, so that it runs afterwards."""

    CATEGORY = "model_patches/svg2"
    FUNCTION = "show"
    OUTPUT_NODE = True
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("latent", "report")
    INPUT_IS_LIST: ClassVar[bool] = False

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"svg2": ("SVG2",), "latent": ("LATENT",)}}

    def show(self, svg2: Handle, latent: Any) -> dict[str, Any]:
        text = svg2.text()
        return {"ui": {"text": [text]}, "result": (latent, text)}


def _options(preset: str, density: float, dense_steps: float, more: str) -> dict[str, Any]:
    """What the inputs of the node say, as options of svg2_compile."""
    options: dict[str, Any] = {}
    if preset != "none":
        options["preset"] = preset
    if density:
        options["density"] = density
    if dense_steps:
        options["dense_steps"] = dense_steps
    for line in filter(None, (line.strip() for line in more.splitlines())):
        name, separator, value = line.partition("=")
        if not separator:
            raise ValueError(f"options: {line!r} is no option. Valid: name=value, one a line.")
        options[name.strip()] = value.strip()
    return options


def _block_keys(module: Any) -> list[str]:
    """The repeated blocks of a model, by the paths that ComfyUI knows them by."""
    from svg2_compile.hosts.diffusers import repeated_blocks

    try:
        paths = list(repeated_blocks(module))
    except ValueError as error:
        raise ValueError(f"blocks: {type(module).__name__} has no repeated blocks. Valid: off.") from error
    # Blocks of a part (a refiner of the text) are no layers of the video.
    depth = min(path.count(".") for path in paths)
    return [f"diffusion_model.{path}" for path in paths if path.count(".") == depth]


def _make_readable(patched: Any) -> None:
    """Let attention be PyTorch's where ComfyUI would compute it in chunks, unless another node has chosen one."""
    from comfy.ldm.modules import attention

    options = patched.model_options.setdefault("transformer_options", {})
    if attention.optimized_attention.__name__ not in _READABLE:
        options.setdefault("optimized_attention_override", _pytorch_attention)


def _pytorch_attention(function: Any, *args: Any, **kwargs: Any) -> Any:
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(*args, **kwargs)

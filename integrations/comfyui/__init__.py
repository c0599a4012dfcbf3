"""Custom nodes for ComfyUI. This folder is what goes into ``ComfyUI/custom_nodes``; see docs/comfyui.md."""

from __future__ import annotations

from typing import Any

from .nodes import CompileModel, Report

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

NODE_CLASS_MAPPINGS: dict[str, Any] = {"Svg2CompileModel": CompileModel, "Svg2Report": Report}
NODE_DISPLAY_NAME_MAPPINGS = {
    "Svg2CompileModel": "Compile Model (SVG2 sparse attention)",
    "Svg2Report": "SVG2 Report",
}

"""The modules of a diffusers pipeline: its transformers, and the blocks that repeat in them. Imports no diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["repeated_blocks", "transformers_of"]


def transformers_of(target: Any) -> dict[str, nn.Module]:
    """The modules to compile, by name: the transformers (or UNets) of a pipeline. A single one needs no name."""
    if isinstance(target, nn.Module):
        return {"": getattr(target, "_orig_mod", target)}
    components = getattr(target, "components", None)
    if not isinstance(components, Mapping):
        raise TypeError(
            f"pipe_or_module: expected a torch.nn.Module or a diffusers pipeline (an object with components), "
            f"got {type(target).__name__}"
        )
    found = {
        name: getattr(component, "_orig_mod", component)
        for name, component in components.items()
        if isinstance(component, nn.Module) and ("transformer" in name or "unet" in name)
    }
    if not found:
        raise TypeError(
            f"pipe_or_module: {type(target).__name__} has no transformer among its components {sorted(components)}"
        )
    return found if len(found) > 1 else {"": next(iter(found.values()))}


def repeated_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The blocks that repeat, by path: those that a diffusers class declares, else composite items of ModuleLists."""
    declared = getattr(module, "_repeated_blocks", None)
    if declared:
        blocks = {path: child for path, child in module.named_modules() if type(child).__name__ in declared}
    else:
        blocks = {
            f"{path}.{index}": block
            for path, child in module.named_modules()
            if isinstance(child, nn.ModuleList) and len({type(item) for item in child}) == 1
            for index, block in enumerate(child)
            if len(list(block.children())) > 1
        }
        inner = {id(part) for block in blocks.values() for part in block.modules() if part is not block}
        blocks = {path: block for path, block in blocks.items() if id(block) not in inner}
    if not blocks:
        raise ValueError(f"regional=True: {type(module).__name__} has no repeated blocks; use regional=False")
    return blocks

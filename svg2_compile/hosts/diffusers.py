"""The modules of a diffusers pipeline: its transformers, and the blocks that repeat in them. Imports no diffusers."""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import nn

from svg2_compile.runtime.standing import branch_named

__all__ = ["expected_layers", "name_branches", "repeated_blocks", "transformers_of"]


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
        blocks = {path: child for path, child in module.named_modules() if _is_any_of(child, declared)}
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


def _is_any_of(module: nn.Module, names: Collection[str]) -> bool:
    """Whether the class of a module has one of the names. FSDP makes a subclass of it, with another name."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def expected_layers(module: nn.Module) -> int | None:
    """How many layers a model has, as far as its modules tell."""
    try:
        return len(repeated_blocks(module))
    except ValueError:
        return None


class _NamedBranches:
    """``cache_context(name)`` of a model of diffusers, which also names the guidance branch of the calls inside it.

    A deep copy of the model gets the plain method back.
    """

    def __init__(self, owner: nn.Module) -> None:
        self._owner = owner
        self.users = 0

    @contextlib.contextmanager
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        plain: Any = type(self._owner)
        with plain.cache_context(self._owner, name, *args, **kwargs), branch_named(name):
            yield

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._owner))
        return self if copied is None else types.MethodType(type(copied).cache_context, copied)


def name_branches(module: nn.Module) -> Callable[[], None]:
    """Let ``module.cache_context("cond")`` name the guidance branch. Returns how to undo it."""
    named = vars(module).get("cache_context")
    if not isinstance(named, _NamedBranches):
        named = vars(module)["cache_context"] = _NamedBranches(module)
    named.users += 1
    reference = weakref.ref(module)

    def undo() -> None:
        alive = reference()
        present = None if alive is None else vars(alive).get("cache_context")
        if alive is not None and isinstance(present, _NamedBranches):
            present.users -= 1
            if not present.users:
                del vars(alive)["cache_context"]

    return undo

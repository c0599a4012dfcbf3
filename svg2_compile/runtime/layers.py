"""Layer identity: which weights does this call of a graph belong to?

One compiled graph may serve every layer of a model (regional compilation, models that hooks break into pieces) or
several models (two experts of one class). What tells the calls apart, the best first:

    the part     ``enable`` compiles known modules and says which one runs
    the weights  the Parameter objects among the inputs: their identity survives offloading that moves the data under
                 them. Inside a known model they go by their path in it, which survives offloading that replaces them
    the order    the n-th call of the graph in a call of the model
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from svg2_compile.runtime.model_call import ModelCall, Part

__all__ = ["Layer", "LayerTable", "ParameterPaths"]

# So many of the Parameters of a call stand for all of them: a graph may have thousands.
_WITNESSES = 3


class Layer:
    """Stands for the weights of one call.

    ordinal: position among the layers that the graph serves, in the order in which they were first met.
    label: module path of the layer, such as "blocks.3"; empty where nobody said.
    """

    __slots__ = ("__weakref__", "_references", "label", "ordinal")

    def __init__(self, ordinal: int, label: str = "") -> None:
        self.ordinal = ordinal
        self.label = label
        self._references: list[weakref.ref[Any]] = []


class ParameterPaths:
    """Paths of the Parameters of a model. Those that appear later are looked up when they are first asked for."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = weakref.ref(module)
        self._paths: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def of(self, parameter: torch.nn.Parameter) -> str | None:
        """The path of ``parameter``; None if it is none of the model's."""
        path: str | None = self._paths.get(parameter)
        if path is None:
            module = self._module()
            if module is not None:
                for name, found in module.named_parameters():
                    self._paths[found] = name
                path = self._paths.get(parameter)
        return path


class LayerTable:
    """Finds the Layer of a call, for one compiled graph.

    Args:
        forget: called with a layer whose weights are gone.
    """

    def __init__(self, forget: Callable[[Layer], None] = lambda layer: None) -> None:
        self._forget = forget
        self._layers: dict[Hashable, Layer] = {}
        self._witnesses: tuple[int, ...] | None = None

    def find(
        self,
        args: Sequence[Any],
        part: Part | None,
        call: ModelCall | None,
        paths: ParameterPaths | None,
    ) -> Layer:
        """The Layer of a call with these inputs.

        Args:
            args: all inputs of the graph.
            part: the module that was compiled on its own and runs now, if that is known.
            call: the call of the whole model that is under way, if that is known.
            paths: of the Parameters of that model.
        """
        if part is None:
            return self._of_weights(args, call, paths)
        key: Hashable = ("part", id(part.module))
        if call is not None:
            # One module may stand at several places of a model.
            number = call.occurrences[self, key]
            call.occurrences[self, key] += 1
            key = (key, number)
        return self._of(key, part.label, [part.module])

    def parameter_ids(self) -> set[int]:
        """The ids of all Parameters met among the inputs and still alive."""
        references = (reference() for layer in self._layers.values() for reference in layer._references)
        return {id(found) for found in references if isinstance(found, torch.nn.Parameter)}

    def labels(self) -> list[str]:
        """Module paths of the layers met so far, where known."""
        return [layer.label for layer in list(self._layers.values()) if layer.label]

    def _of_weights(self, args: Sequence[Any], call: ModelCall | None, paths: ParameterPaths | None) -> Layer:
        parameters = self._witnesses_of(args)
        if not parameters:
            number = 0
            if call is not None:
                number = call.anonymous[self]
                call.anonymous[self] += 1
                return self._of(("order", id(call.module), number), call.label, [call.module])
            return self._of(("order", number), "", [])
        names = [paths.of(parameter) for parameter in parameters] if paths is not None else [None]
        known = [name for name in names if name is not None]
        if call is None or len(known) < len(names):
            key: Hashable = ("weights", *map(id, parameters))
            kept, label = list[Any](parameters), "" if call is None else call.label
        else:
            key, kept = ("paths", id(call.module), *known), [call.module]
            label = ".".join(filter(None, (call.label, _common_module(known))))
        if call is not None:
            # Tied layers have the same weights, and are called several times in one call of the model.
            number = call.occurrences[self, key]
            call.occurrences[self, key] += 1
            key = (key, number)
        return self._of(key, label, kept)

    def _witnesses_of(self, args: Sequence[Any]) -> list[torch.nn.Parameter]:
        """A few of the Parameters among the inputs, at the same places in every call."""
        if self._witnesses is None:
            found = [index for index, arg in enumerate(args) if isinstance(arg, torch.nn.Parameter)]
            stride = max(1, (len(found) - 1) // max(1, _WITNESSES - 1))
            self._witnesses = tuple(found[::stride][:_WITNESSES])
        return [args[index] for index in self._witnesses if isinstance(args[index], torch.nn.Parameter)]

    def _of(self, key: Hashable, label: str, kept: Sequence[Any]) -> Layer:
        """The layer that goes by ``key``; a new one lives as long as all of ``kept``."""
        layer = self._layers.get(key)
        if layer is None:
            layer = self._layers[key] = Layer(len(self._layers), label)
            layer._references = [weakref.ref(item, self._on_death(key)) for item in kept]
        return layer

    def _on_death(self, key: Hashable) -> Callable[[weakref.ref[Any]], None]:
        table = weakref.ref(self)

        def died(_: weakref.ref[Any]) -> None:
            alive = table()
            layer = None if alive is None else alive._layers.pop(key, None)
            if alive is not None and layer is not None:
                alive._forget(layer)

        return died


def _common_module(names: Sequence[str]) -> str:
    """The path of the smallest module that holds all of these Parameters."""
    common: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)

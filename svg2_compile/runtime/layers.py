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

__all__ = ["Layer", "LayerTable", "Layers", "ParameterPaths"]

# So many of the Parameters of a call stand for all of them: a graph may have thousands.
_WITNESSES = 3


class Layer:
    """Stands for the weights of one call.

    ordinal: position among the layers of the session, in the order in which they were first met.
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


class Layers:
    """The layers of a session, whatever graphs serve them: a model is compiled anew for another size, or another dtype.

    Args:
        forget: a method, called with a layer whose weights are gone.
    """

    def __init__(self, forget: Callable[[Layer], None]) -> None:
        # Held weakly: whoever holds the layers is to be freed at once with its centroids, not when cycles are.
        self._forget = weakref.WeakMethod(forget)
        self._layers: dict[Hashable, Layer] = {}

    def of(self, key: Hashable, label: str, kept: Callable[[], Sequence[Any]]) -> Layer:
        """The layer that goes by ``key``; a new one lives as long as all that ``kept`` gives."""
        layer = self._layers.get(key)
        if layer is None:
            layer = self._layers[key] = Layer(len(self._layers), label)
            layer._references = [weakref.ref(item, self._on_death(key)) for item in kept()]
        return layer

    def parameter_ids(self) -> set[int]:
        """The ids of all Parameters that layers live with and that are still alive."""
        references = (reference() for layer in self._layers.values() for reference in layer._references)
        return {id(found) for found in references if isinstance(found, torch.nn.Parameter)}

    def _on_death(self, key: Hashable) -> Callable[[weakref.ref[Any]], None]:
        layers = weakref.ref(self)

        def died(_: weakref.ref[Any]) -> None:
            alive = layers()
            layer = None if alive is None else alive._layers.pop(key, None)
            forget = None if alive is None else alive._forget()
            if layer is not None and forget is not None:
                forget(layer)

        return died


# Key, label, and what yields the objects that the layer lives with.
_Found = tuple[Hashable, str, Callable[[], Sequence[Any]]]


class LayerTable:
    """Finds the Layer of a call, for one compiled graph.

    Args:
        layers: of the session.
        signature: tells graphs apart that serve the same weights, such as the names of their attentions. A graph that
            is compiled again has the same.
    """

    def __init__(self, layers: Layers, signature: Hashable = ()) -> None:
        self._layers = layers
        self._signature = signature
        self._parameters: tuple[int, ...] | None = None
        self._witnesses: tuple[int, ...] = ()
        # Ids of the witnesses -> the witnesses themselves, held weakly, and what was found of all weights.
        self._known: dict[tuple[int, ...], tuple[list[weakref.ref[Any]], tuple[Hashable, str | None]]] = {}
        self._served: weakref.WeakSet[Layer] = weakref.WeakSet()

    def find(
        self, args: Sequence[Any], part: Part | None, call: ModelCall | None, paths: ParameterPaths | None
    ) -> Layer:
        """The Layer of a call with these inputs.

        Args:
            args: all inputs of the graph.
            part: the module that was compiled on its own and runs now, if that is known.
            call: the call of the whole model that is under way, if that is known.
            paths: of the Parameters of that model.
        """
        found = self._by_part(part) if part is not None else self._by_weights(args, call, paths)
        key: Hashable = (found[0], self._signature)
        if call is not None:
            # Tied layers have the same weights, and a module may stand at several places: they are called several times
            # in one call of the model.
            number = call.occurrences[key]
            call.occurrences[key] += 1
            key = (key, number)
        layer = self._layers.of(key, *found[1:])
        self._served.add(layer)
        return layer

    def labels(self) -> list[str]:
        """Module paths of the layers met so far, where known."""
        served = sorted(self._served, key=lambda layer: layer.ordinal)
        return list(dict.fromkeys(layer.label for layer in served if layer.label))

    @staticmethod
    def _by_part(part: Part) -> _Found:
        return ("part", id(part.module)), part.label, lambda: [part.module]

    def _by_weights(self, args: Sequence[Any], call: ModelCall | None, paths: ParameterPaths | None) -> _Found:
        if self._parameters is None:
            found = [index for index, arg in enumerate(args) if isinstance(arg, torch.nn.Parameter)]
            stride = max(1, (len(found) - 1) // max(1, _WITNESSES - 1))
            self._parameters, self._witnesses = tuple(found), tuple(found[::stride][:_WITNESSES])
        label, module = ("", None) if call is None else (call.label, call.module)
        if not self._parameters:
            return ("order", id(module)), label, lambda: [] if module is None else [module]
        witnesses = tuple(id(args[index]) for index in self._witnesses)
        known = self._known.get(witnesses)
        if known is None or any(reference() is None for reference in known[0]):
            identity = _identity([args[index] for index in self._parameters], paths)
            known = self._known[witnesses] = ([weakref.ref(args[index]) for index in self._witnesses], identity)
        key, path = known[1]
        if path is None:
            return key, label, lambda: [args[index] for index in self._parameters or ()]
        return (key, id(module)), ".".join(filter(None, (label, path))), lambda: [module]


def _identity(parameters: Sequence[torch.nn.Parameter], paths: ParameterPaths | None) -> tuple[Hashable, str | None]:
    """What the weights of a layer go by, and the path of their smallest common module; None if no model is known."""
    names = [] if paths is None else [paths.of(parameter) for parameter in parameters]
    known = [name for name in names if name is not None]
    if len(known) < len(parameters):
        return ("weights", frozenset(map(id, parameters))), None
    path = _common_module(known)
    return ("path", path), path


def _common_module(names: Sequence[str]) -> str:
    """The path of the smallest module that holds all of these Parameters."""
    common: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)

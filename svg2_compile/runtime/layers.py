"""Layer identity: which weights does this call of a graph belong to?

One compiled graph may serve every layer of a model (regional compilation) or several models (two experts of one
class). What tells the calls apart is the Parameter objects among their inputs: their identity survives offloading,
which moves the data under them. Where the caller knows better (``enable`` compiles known modules), it says so.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Layer", "LayerTable"]


class Layer:
    """Stands for the weights of one call. Dies with them.

    ordinal: position among the layers that the same graph served in the model call in which this one was first met.
    label: module path of the layer, such as "blocks.3"; empty where nobody said.
    """

    __slots__ = ("__weakref__", "_references", "label", "ordinal")

    def __init__(self, ordinal: int, label: str = "") -> None:
        self.ordinal = ordinal
        self.label = label
        self._references: list[weakref.ref[Any]] = []


class ModuleScope:
    """The module that is being run, for callers that know it. Nested scopes restore what was there."""

    def __init__(self) -> None:
        self.module: torch.nn.Module | None = None
        self.label = ""

    @contextlib.contextmanager
    def running(self, module: torch.nn.Module, label: str = "") -> Iterator[None]:
        """While inside, calls belong to ``module``, whose path is ``label``."""
        before = self.module, self.label
        self.module, self.label = module, label
        try:
            yield
        finally:
            self.module, self.label = before


class LayerTable:
    """Finds the Layer of a call, for one compiled graph."""

    def __init__(self) -> None:
        self._by_parameters: dict[tuple[int, ...], Layer] = {}
        self._by_module: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._anonymous: Layer | None = None
        self._in_model_call = 0
        self._model_call: Any = None
        self.most_in_model_call = 0

    def find(self, args: Sequence[Any], scope: ModuleScope, model_call: Any) -> Layer:
        """The Layer of a call with these inputs.

        Args:
            args: all inputs of the graph.
            scope: knows the module that is being run, or nothing.
            model_call: any value that is the same for all layers of one call of the whole model.
        """
        if model_call != self._model_call:
            self._model_call = model_call
            self._in_model_call = 0
        layer = self._find_module(scope.module, scope.label) if scope.module is not None else self._find(args)
        self._in_model_call += 1
        self.most_in_model_call = max(self.most_in_model_call, self._in_model_call)
        return layer

    def parameter_ids(self) -> set[int]:
        """The ids of all Parameters met among the inputs and still alive."""
        return {identity for identities in self._by_parameters for identity in identities}

    def labels(self) -> list[str]:
        """Module paths of the layers met so far, where known."""
        return [layer.label for layer in self._by_module.values() if layer.label]

    def _find_module(self, module: torch.nn.Module, label: str) -> Layer:
        layer: Layer | None = self._by_module.get(module)
        if layer is None:
            layer = self._by_module[module] = Layer(self._in_model_call, label)
        return layer

    def _find(self, args: Sequence[Any]) -> Layer:
        parameters = [arg for arg in args if isinstance(arg, torch.nn.Parameter)]
        if not parameters:
            if self._anonymous is None:
                self._anonymous = Layer(0)
            return self._anonymous
        identity = tuple(map(id, parameters))
        layer = self._by_parameters.get(identity)
        if layer is None:
            layer = self._by_parameters[identity] = Layer(self._in_model_call)
            layer._references = [weakref.ref(parameter, self._forget(identity)) for parameter in parameters]
        return layer

    def _forget(self, identity: tuple[int, ...]) -> Any:
        table = weakref.ref(self)

        def on_death(_: weakref.ref[Any]) -> None:
            alive = table()
            if alive is not None:
                alive._by_parameters.pop(identity, None)

        return on_death

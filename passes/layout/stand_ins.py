"""Fresh fake tensors that stand for what a graph's metadata describes, and its sizes as they are asked for.

example_value: f32[2, s0, 64], axes   ->   a new fake tensor [2, s0, 64] that carries these axes
                                           the same at the traced sizes, [2, 480, 64], where ``concrete``
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from svg2_compile.passes.graph.values import copy_number, has_number, node_value
from svg2_compile.passes.layout.axes import Axes
from svg2_compile.passes.layout.lengths import known_number
from svg2_compile.passes.layout.mode import LayoutMode
from svg2_compile.passes.layout.op_call import fit, sizes_of
from svg2_compile.passes.layout.shared_values import SharedValues

__all__ = ["StandIns"]


class StandIns:
    """Makes the tensors of one interpretation.

    known: the sizes that were traced, by symbol. concrete: they take the place of symbols. values: what is shared, None
    where nothing is. written: nodes whose tensors the graph writes to, which are never shared.
    """

    def __init__(
        self,
        mode: LayoutMode,
        values: SharedValues | None,
        known: Mapping[sympy.Symbol, Any],
        concrete: bool,
        written: Collection[fx.Node],
    ) -> None:
        self._mode = mode
        self._values = values
        self._known = known
        self.concrete = concrete
        self._written = written

    def fresh(self, like: torch.Tensor, axes: Axes, node: fx.Node) -> torch.Tensor:
        """A new fake tensor with the metadata of `like`: in-place operators must not touch that of the graph."""
        values = self._values if node not in self._written and not has_number(like) else None
        known = values.find(like, axes) if values is not None else None
        if known is not None:
            return known
        shape, stride = self.number(like.shape), self.number(like.stride())
        tensor = torch.empty_strided(shape, stride, dtype=like.dtype, device=like.device)
        self._mode.set_axes(tensor, axes)
        if not self.concrete:
            copy_number(like, tensor)
        return tensor if values is None else values.canonical(tensor)

    def number(self, value: Any) -> Any:
        """Metadata with the sizes that were traced in the place of symbols, if that is asked for."""
        if not self.concrete:
            return value
        if isinstance(value, (tuple, list)):
            return (
                type(value)([self.number(item) for item in value])
                if type(value) in (tuple, list)
                else tuple(self.number(item) for item in value)
            )
        if isinstance(value, torch.SymInt):
            number = known_number(value.node.expr, self._known)
            if number is None:
                raise ValueError(f"the size {value} depends on data")
            return number
        if isinstance(value, (torch.SymFloat, torch.SymBool)) and value.node.hint is not None:
            return value.node.hint
        return value

    def of_metadata(self, node: fx.Node, axes_of: Callable[[torch.Tensor], Axes]) -> Any:
        """What the metadata says that a node yields."""
        return tree_map(
            lambda v: self.fresh(v, axes_of(v), node) if isinstance(v, torch.Tensor) else self.number(v),
            node_value(node),
        )

    def with_symbols_of_graph(self, node: fx.Node, result: Any) -> Any:
        """A result of data-dependent size has new symbols; the nodes after it know those of the graph's metadata. None
        where the metadata has another structure."""
        leaves, spec = tree_flatten(result)
        known = tree_leaves(node_value(node))
        if len(known) != len(leaves):
            return None
        for index, (leaf, like) in enumerate(zip(leaves, known, strict=True)):
            if isinstance(leaf, torch.Tensor) and isinstance(like, torch.Tensor):
                axes = zip(self._mode.axes_of(leaf), sizes_of(leaf), sizes_of(like), strict=True)
                new_axes = tuple(a if old == new else fit(a, new) for a, old, new in axes)
                leaves[index] = self.fresh(like, new_axes, node)
            else:
                leaves[index] = like
        return tree_unflatten(leaves, spec)

"""Runs a graph on fake tensors under `LayoutMode`: placeholders, nodes and metadata on one side, axes on the other.

Speed: the layers of a transformer are the same computation on the same abstract values, so tensors are *shared*
(`shared_values`) and a node with the arguments of an earlier node takes its result: the cost of a graph is that of its
distinct nodes. Values that the graph writes in place are not shared before their last write. A graph that turns out to
write to a shared value all the same runs once more, without sharing.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from svg2_compile.passes.graph.collectives import rank_groups, sharding_nodes
from svg2_compile.passes.graph.foreign_attention import ForeignAttention, read_foreign
from svg2_compile.passes.graph.nodes import may_write
from svg2_compile.passes.graph.sizes import traced_sizes
from svg2_compile.passes.graph.values import copy_number, fake_mode_of, is_parameter, node_value
from svg2_compile.passes.layout.axes import Axes, single
from svg2_compile.passes.layout.in_place import last_writes
from svg2_compile.passes.layout.mode import AttentionAxes, LayoutMode, SharedValueWritten
from svg2_compile.passes.layout.op_call import constant_axes, fit, sizes_of, unknown_axes
from svg2_compile.passes.layout.picked import axes_of_moved_rows
from svg2_compile.passes.layout.rules.collective import resharded, sharded
from svg2_compile.passes.layout.shared_values import SharedValues
from svg2_compile.passes.layout.stand_ins import StandIns

log = logging.getLogger(__name__)

_SCALAR = (int, float, bool, complex, str, torch.SymInt, torch.SymFloat, torch.SymBool)
_AUTOCAST_ENTER = torch.amp.autocast_mode._enter_autocast
_AUTOCAST_EXIT = torch.amp.autocast_mode._exit_autocast
_FUNCTORCH = frozenset({"torch._C._functorch", "torch._functorch.predispatch", "torch._functorch.vmap"})
_INLINED = frozenset(
    {
        "wrap",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
        "wrap_activation_checkpoint",
        "tag_activation_checkpoint",
    }
)
_WITHOUT_RESULT = ("_set_grad_enabled", "_enter_inference", "_exit_inference", "_check", "_assert", "sym_constrain")


@dataclass(slots=True)
class Interpretation:
    """Axes and sizes of every node's tensor, attentions met, non-parameter inputs, operators without a rule."""

    axes: dict[fx.Node, Axes] = field(default_factory=dict)
    sizes: dict[fx.Node, list[sympy.Expr]] = field(default_factory=dict)
    attentions: list[AttentionAxes] = field(default_factory=list)
    inputs: frozenset[str] = frozenset()
    unruled_ops: Counter[str] = field(default_factory=Counter)
    example_of: dict[sympy.Symbol, sympy.Expr] = field(default_factory=dict)
    """The size that a symbol had in the example inputs; none for sizes that depend on data."""


def interpret(gm: fx.GraphModule, parameters: Collection[str] | None, concrete: bool = False) -> Interpretation:
    """Interprets `gm` abstractly, with `concrete` at the sizes that were traced.

    Raises ValueError where a placeholder has no metadata, or where `concrete` finds a size that depends on data.
    """
    try:
        return _Interpreter(gm, parameters, concrete, share=True).interpretation()
    except SharedValueWritten:
        return _Interpreter(gm, parameters, concrete, share=False).interpretation()


class _Interpreter:
    def __init__(self, gm: fx.GraphModule, parameters: Collection[str] | None, concrete: bool, share: bool) -> None:
        self._gm = gm
        self._parameters = parameters
        self._mode = LayoutMode()
        self._values = SharedValues(self._mode) if share else None
        own_mode = fake_mode_of(gm)
        self._known = traced_sizes(own_mode.shape_env)
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True) if concrete else own_mode
        self._env: dict[fx.Node, Any] = {}
        self._last_write = last_writes(gm.graph)
        self._made = StandIns(self._mode, self._values, self._known, concrete, self._last_write)
        self._written_by: dict[fx.Node, list[fx.Node]] = {}
        for value, writer in self._last_write.items():
            self._written_by.setdefault(writer, []).append(value)
        self._shards = sharding_nodes(gm, rank_groups(gm))
        self._results: dict[Any, Any] = {}
        self._autocasts: list[tuple[Any, Any]] = []
        self._found = Interpretation(unruled_ops=self._mode.unruled_ops)

    def interpretation(self) -> Interpretation:
        """Runs the graph."""
        with self._contexts():
            for node in self._gm.graph.nodes:
                if node.op == "placeholder":
                    self._set(node, self._placeholder(node))
                elif node.op != "output":
                    self._set(node, self._run_node(node, self._gm))
                    self._settle_written_by(node)
        self._found.attentions = list(self._mode.attentions)
        self._found.example_of = self._known
        return self._found

    @contextlib.contextmanager
    def _contexts(self) -> Iterator[None]:
        shape_env = self._fake_mode.shape_env
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if shape_env is not None:
                stack.enter_context(enable_python_dispatcher())  # its kernels take symbolic sizes
                stack.enter_context(shape_env.suppress_guards())
                stack.enter_context(shape_env.ignore_fresh_unbacked_symbols())
            stack.enter_context(self._fake_mode)
            stack.enter_context(self._mode)
            try:
                yield
            finally:
                while self._autocasts:
                    _AUTOCAST_EXIT(self._autocasts.pop()[0])

    def _set(self, node: fx.Node, value: Any) -> None:
        self._env[node] = value
        if isinstance(value, torch.Tensor):
            self._found.axes[node] = self._mode.axes_of(value)
            self._found.sizes[node] = sizes_of(value)

    def _settle_written_by(self, writer: fx.Node) -> None:
        """Values that `writer` was the last to write to take part in sharing from here on."""
        for node in self._written_by.get(writer, ()):
            value = self._env[node]
            self._set(node, self._values.canonical(value) if self._values is not None else value)

    def _run_node(self, node: fx.Node, owner: torch.nn.Module) -> Any:
        if node.op == "get_attr":
            return self._attribute(node, owner)
        value = self._made.number(node_value(node))
        if isinstance(value, _SCALAR):
            return value  # the symbols of the graph itself, where running the node could make new ones
        name = getattr(node.target, "__name__", str(node.target))
        if name.startswith(_WITHOUT_RESULT) and not node.users:
            return None
        args: tuple[Any, ...] = tuple(fx.node.map_arg(argument, self._env.__getitem__) for argument in node.args)
        kwargs: dict[str, Any] = {k: fx.node.map_arg(v, self._env.__getitem__) for k, v in node.kwargs.items()}
        if node.target is operator.getitem and not isinstance(args[0], torch.Tensor):
            return args[0][args[1]]
        if node.target in (_AUTOCAST_ENTER, _AUTOCAST_EXIT):
            return self._autocast(node.target, args)
        if getattr(node.target, "__module__", None) in _FUNCTORCH:
            return self._from_metadata(node, name)  # entering a vmap for real would leave it entered on an error
        foreign = read_foreign(node)
        if foreign is not None:
            return self._foreign_attention(node, foreign)
        if name in ("from_local", "redistribute", "to_local") and isinstance(args[0], torch.Tensor):
            return self._made.fresh(value, resharded(self._mode.axes_of(args[0]), args[0], value), node)
        if node.op == "call_module" or isinstance(node.target, HigherOrderOperator):
            return self._call_subgraph(node, name, args, owner)
        moved = axes_of_moved_rows(node, lambda source: self._mode.axes_of(self._env[source]))
        result = self._compute(node, args, kwargs, shared=moved is None)
        return result if moved is None else self._with_axes(node, result, moved)

    def _with_axes(self, node: fx.Node, result: Any, axes: Axes) -> Any:
        """The result of a node of which more is known than by the rules of its operators."""
        if not may_write(node):
            return self._made.fresh(node_value(node), axes, node)
        self._mode.set_axes(self._env[node.all_input_nodes[0]], axes)
        return result

    def _autocast(self, target: Any, args: tuple[Any, ...]) -> Any:
        if target is _AUTOCAST_ENTER:
            self._autocasts.append((_AUTOCAST_ENTER(*args), args))
            return self._autocasts[-1][0]
        self._autocasts = [entry for entry in self._autocasts if entry[0] is not args[0]]
        return _AUTOCAST_EXIT(args[0])

    def _call_subgraph(self, node: fx.Node, name: str, args: tuple[Any, ...], owner: torch.nn.Module) -> Any:
        """A region that torch keeps as a graph of its own (autocast, no_grad, checkpoint) is interpreted in place."""
        if name.startswith("flex_attention"):
            return self._flex_attention(node, args)
        if node.op == "call_module":
            args = (owner.get_submodule(str(node.target)), *args)
        bodies = [index for index, argument in enumerate(args) if isinstance(argument, fx.GraphModule)]
        inlined = name in _INLINED or node.op == "call_module"
        if not inlined or len(bodies) != 1:
            return self._from_metadata(node, name)
        entered = self._autocast(_AUTOCAST_ENTER, args[:4]) if name == "wrap_with_autocast" else None
        result = self._interpret_body(args[bodies[0]], args[bodies[0] + 1 :])
        if entered is not None:
            self._autocast(_AUTOCAST_EXIT, (entered,))
        return result

    def _interpret_body(self, body: fx.GraphModule, operands: tuple[Any, ...]) -> Any:
        remaining = iter(operands)
        for node in body.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], self._env.__getitem__)
            self._set(node, next(remaining) if node.op == "placeholder" else self._run_node(node, body))
        return None

    def _flex_attention(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        query, key, value = (self._mode.axes_of(tensor) for tensor in args[:3])
        self._mode.note_attention(query[-2], key[-2], [value[-2]])
        axes = {4: (*query[:-1], value[-1]), 3: query[:-1]}  # the output, and its statistics
        return self._made.of_metadata(node, lambda v: axes.get(v.dim(), unknown_axes(v)))

    def _foreign_attention(self, node: fx.Node, call: ForeignAttention) -> Any:
        """Another library's operator, which need not run on fake tensors."""
        query, key, value = (self._mode.axes_of(self._env[operand]) for operand in (call.query, call.key, call.value))
        token = {"bhnd": -2, "bnhd": 1, "nhd": 0}[call.layout]
        self._mode.note_attention(query[token], key[token], [value[token]])
        output = (*query[:-1], value[-1])
        first = next(leaf for leaf in tree_leaves(node_value(node)) if isinstance(leaf, torch.Tensor))
        return self._made.of_metadata(node, lambda v: output if v is first else unknown_axes(v))

    def _placeholder(self, node: fx.Node) -> Any:
        if "example_value" not in node.meta and "val" not in node.meta:
            raise ValueError(
                f"placeholder {node.name!r} of the graph has no fake-tensor metadata (`example_value` or `val`): pass "
                "a graph from torch.compile or torch.export, or run FakeTensorProp on it first"
            )
        value = self._made.number(node_value(node))
        constant = is_parameter(node) if self._parameters is None else node.name in self._parameters
        if not constant:
            self._found.inputs |= {node.name}
        if not isinstance(value, torch.Tensor):
            return value
        shape = self._made.number(value.shape)
        axes = tuple(single(() if constant else {node.name}, size) for size in shape)
        return self._made.fresh(value, axes, node)

    def _attribute(self, node: fx.Node, owner: torch.nn.Module) -> Any:
        value: Any = owner
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return self._made.fresh(value, constant_axes(value), node) if isinstance(value, torch.Tensor) else value

    def _compute(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], shared: bool) -> Any:
        key = self._key(node, args, kwargs) if shared else None
        if key is not None and key in self._results:
            return self._results[key]
        self._mode.data_dependent = False
        try:
            if node.op == "call_method":
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                assert callable(node.target)
                result = node.target(*args, **kwargs)
        except SharedValueWritten:
            raise
        except Exception as error:  # noqa: BLE001  (whatever fails on fake tensors must not break a compile)
            log.debug("node %s failed in the token-layout analysis: %s", node.name, error)
            return self._from_metadata(node, f"{node.target} ({type(error).__name__})")
        if node in self._shards:
            self._take_shard(args, kwargs, result, self._shards[node])
        if self._mode.data_dependent:
            known = self._made.with_symbols_of_graph(node, result)
            return self._from_metadata(node, f"{node.target} (metadata)") if known is None else known
        if not self._made.concrete and copy_number(node_value(node), result):
            return result
        if key is not None and self._values is not None:
            result = tree_map(self._values.canonical, result)
            self._results[key] = result
        return result

    def _take_shard(self, args: tuple[Any, ...], kwargs: dict[str, Any], parts: Any, ranks: int) -> None:
        """Parts of a tensor for all ranks: which of them a rank has tells nothing about those of others."""
        whole = args[0] if args else next(v for v in kwargs.values() if isinstance(v, torch.Tensor))
        axes, sizes = self._mode.axes_of(whole), sizes_of(whole)
        for part in parts:
            pairs = zip(axes, sizes, sizes_of(part), strict=True)
            own = tuple(axis if size == new else sharded(axis, size, ranks) for axis, size, new in pairs)
            self._mode.declare(part, tuple(fit(axis, size) for axis, size in zip(own, sizes_of(part), strict=True)))

    def _key(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._values is None or node in self._last_write:
            return None
        autocasts = tuple(arguments for _, arguments in self._autocasts)
        return self._values.key(node.op, node.target, args, kwargs, autocasts, self._shards.get(node))

    def _from_metadata(self, node: fx.Node, name: str) -> Any:
        """What the metadata says that the node yields, with unknown axes."""
        value = node_value(node)
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)):
            self._found.unruled_ops[name] += 1
        return self._made.of_metadata(node, unknown_axes)

"""Analysis: where the video is in the attentions of a model that is not a graph.

The model's own code runs once on fake tensors, under the dispatch mode that carries token layouts (layout/mode.py). Who
computes its attentions reports each of them; what is reported and the inputs become a small graph, on which
`token_layout` and `decide_sites` answer as they do for the graph of a compiled model:

    def graph(hidden_states, encoder_hidden_states, timestep):
        query, key, value = ...           the layouts that were met
        attended = attention(query, key, value)
        return output

Guarantees: the model is not run on data and not changed (a copy of its modules runs, without weights and hooks). What a
model does with data, such as a branch on a value, cannot be followed: then every attention has that as its reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from svg2_compile.passes.attention.call import AttentionCall
from svg2_compile.passes.decide_sites import Parts, video_parts
from svg2_compile.passes.layout.axes import single
from svg2_compile.passes.layout.interpreter import Interpretation
from svg2_compile.passes.layout.mode import LayoutMode
from svg2_compile.passes.layout.op_call import sizes_of
from svg2_compile.passes.stays_dense import StaysDense
from svg2_compile.passes.token_layout import layouts_of

__all__ = ["EagerLayout", "lay_out"]


class EagerLayout:
    """Collects the attentions of one run of a model on fake tensors. All are [B, N, H, D].

    Attributes:
        model: the copy that runs.
        originals: by the id of every module of it, the id of that which it is a copy of.
    """

    def __init__(self, model: nn.Module, originals: Mapping[int, int]) -> None:
        self.model = model
        self.originals = originals
        self._mode = LayoutMode()
        self._graph = fx.Graph()
        self._found = Interpretation(unruled_ops=self._mode.unruled_ops)
        self._inputs: list[fx.Node] = []
        self._calls: list[tuple[Any, AttentionCall]] = []

    def note(self, place: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """An attention is computed. place: what it goes by in the answer."""
        q, k, v = (self._node(tensor) for tensor in (query, key, value))
        self._mode.note_attention(self._mode.axes_of(query)[1], self._mode.axes_of(key)[1], [])
        self._calls.append((place, AttentionCall(self._node(query), q, k, v, axes="bnhd", name=str(place))))

    def _node(self, tensor: torch.Tensor) -> fx.Node:
        node = self._graph.call_function(tuple, tuple(self._inputs))
        self._describe(node, tensor)
        return node

    def _describe(self, node: fx.Node, tensor: torch.Tensor) -> None:
        node.meta["example_value"] = tensor
        self._found.axes[node] = self._mode.axes_of(tensor)
        self._found.sizes[node] = sizes_of(tensor)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run the model on inputs like these."""
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), self._mode:
            fake_args, fake_kwargs = tree_map(self._input, (args, dict(kwargs)))
            self._found.inputs = frozenset(node.name for node in self._inputs)
            output = type(self.model).forward(self.model, *fake_args, **fake_kwargs)
            leaves = [leaf for leaf in tree_leaves(_plain(output)) if isinstance(leaf, torch.Tensor)]
            self._graph.output(tuple(self._node(leaf) for leaf in leaves))
        self._found.attentions = list(self._mode.attentions)

    def _input(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        node = self._graph.placeholder(f"input_{len(self._inputs)}")
        self._mode.set_axes(fake, tuple(single({node.name}, size) for size in fake.shape))
        self._describe(node, fake)
        self._inputs.append(node)
        return fake

    def parts(self) -> dict[Any, Parts | StaysDense]:
        """For every place where the video is, or why it stays dense; places with several answers stay dense."""
        layouts = layouts_of(fx.GraphModule(nn.Module(), self._graph), self._found)
        answers: dict[Any, Parts | StaysDense] = {}
        for place, call in self._calls:
            answer = _answer(call, layouts)
            if place in answers and _told(answers[place]) != _told(answer):
                answer = StaysDense("unknown_layout", "its calls in one call of the model have different layouts")
            answers[place] = answer
        return answers


def lay_out(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    noting: Callable[[EagerLayout], AbstractContextManager[None]],
) -> dict[Any, Parts | StaysDense] | StaysDense:
    """Where the video is in every attention of ``model``; or, where the model cannot be followed, why.

    Args:
        model: is not changed.
        args, kwargs: of a call of it.
        noting: while inside of it, who computes attentions calls ``note`` of the layout that it is given.
    """
    try:
        layout = EagerLayout(*_plain_copy(model))
        with noting(layout):
            layout.run(args, kwargs)
        return layout.parts()
    except Exception as error:  # noqa: BLE001  (whatever a model does, its attentions stay dense and say why)
        first = str(error).strip().splitlines()[:1]
        return StaysDense(
            "unknown_layout",
            f"the model could not be followed on tensors without data: {type(error).__name__}: "
            f"{first[0] if first else ''}",
        )


def _plain_copy(model: nn.Module) -> tuple[nn.Module, dict[int, int]]:
    """The model as its classes have it, with weights that are shapes alone; and which module is a copy of which.

    Hooks (caches, offloading) are left behind: they keep state, which the run must not touch, and a copy of a hooked
    module calls the hooks of the original. Shapes alone are on one device, wherever weights are offloaded to.
    """
    known: dict[int, Any] = {}
    for weight in (*model.parameters(), *model.buffers()):
        shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        is_parameter = isinstance(weight, nn.Parameter)
        known[id(weight)] = nn.Parameter(shape, requires_grad=False) if is_parameter else shape
    copied = copy.deepcopy(model, known)
    for module in copied.modules():
        vars(module).pop("forward", None)
        module._compiled_call_impl = None
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    originals = {id(known[id(module)]): id(module) for module in model.modules() if id(module) in known}
    return copied, originals


def _answer(call: AttentionCall, layouts: Any) -> Parts | StaysDense:
    try:
        return video_parts(call, layouts)
    except StaysDense as dense:
        return dense


def _told(answer: Parts | StaysDense) -> Any:
    return (answer.reason, answer.detail) if isinstance(answer, StaysDense) else answer


def _plain(output: Any) -> Any:
    """Outputs of diffusers are mappings that pytree knows only once they are registered."""
    return list(output.values()) if isinstance(output, Mapping) else output

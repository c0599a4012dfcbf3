"""Graphs of the zoo's models, with their token layouts as analysed where a backend would: inside the compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from svg2_compile.passes.token_layout import TokenLayouts, analyse_token_layout
from tests.zoo.models import build

Analysed = tuple[fx.GraphModule, TokenLayouts]
_ATTENTION = ("scaled_dot_product_attention", "scaled_dot_product_attention.default")


def compiled(name: str, dynamic: bool = False, regional: bool = False) -> list[Analysed]:
    """The graphs that Dynamo makes of a model (or of its repeated blocks), in the order of their compilation."""
    found: list[Analysed] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append((gm, analyse_token_layout(gm)))
        return gm

    torch._dynamo.reset()
    module: Any
    module, inputs = build(name)
    with torch.no_grad():
        if regional:
            module.compile_repeated_blocks(backend=backend, dynamic=dynamic)
            module(**inputs)
        else:
            torch.compile(module, backend=backend, dynamic=dynamic)(**inputs)
    return found


def exported(name: str, decompose: bool = False) -> Analysed:
    """The graph that torch.export makes of a model, before or after `run_decompositions()`."""
    module, inputs = build(name)
    with torch.no_grad():
        program = torch.export.export(module, (), inputs)
    program = program.run_decompositions() if decompose else program
    signature = program.graph_signature
    constants = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return program.graph_module, analyse_token_layout(program.graph_module, constants)


def attention_operands(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """Node, query and key of every scaled_dot_product_attention."""
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name in _ATTENTION:
            operands = dict(zip(("query", "key"), node.args, strict=False), **node.kwargs)
            yield node, operands["query"], operands["key"]


def short(name: str) -> str:
    """A placeholder's name without what Dynamo puts around it."""
    for prefix in ("l_kwargs_", "l_"):
        if name.startswith(prefix):
            return name.removeprefix(prefix).removesuffix("_")
    return name


def spelled(layouts: TokenLayouts, node: fx.Node, dim: int = -2) -> str | None:
    """The segments of an axis as text: `hidden_states:128|encoder_hidden_states:12`; None where unknown."""
    segments = layouts.segments(node, dim)
    if segments is None:
        return None
    return "|".join(f"{'+'.join(sorted(map(short, s.sources)))}:{s.length}" for s in segments)


def self_attentions(analysed: list[Analysed]) -> list[str | None]:
    """Query layouts of the attentions whose keys have the same layout."""
    return [
        spelled(layouts, query)
        for gm, layouts in analysed
        for _, query, key in attention_operands(gm)
        if spelled(layouts, query) == spelled(layouts, key)
    ]


def latents(analysed: list[Analysed]) -> set[str]:
    """The latents of the graphs that have an attention."""
    return {
        short(name) for gm, layouts in analysed for name in layouts.latent if any(True for _ in attention_operands(gm))
    }

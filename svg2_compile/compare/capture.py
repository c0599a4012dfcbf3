"""Take the inputs of one sparse attention out of a running model, whatever the model is.

For one call the rewritten graph is run node by node instead of compiled; when it comes to the attention that is asked
for, what it was about to compute is noted and the run ends. Nothing here knows a model, and no dispatch mode is active
while the model runs, which Dynamo would answer by falling back to eager.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from svg2_compile.compare.attention_maps import AttentionInputs
from svg2_compile.compare.density import DensityTable, sparse_steps
from svg2_compile.kernels import ops
from svg2_compile.runtime.history import qualified
from svg2_compile.runtime.plan import plan_now
from svg2_compile.runtime.program import DenoisingProgram
from svg2_compile.runtime.session import Session

__all__ = ["Captured", "MapRequest", "captured_attention"]

_ATTENTIONS = (torch.ops.svg2.block_sparse_attention.default, torch.ops.svg2.first_order_attention.default)
_PERMUTE = torch.ops.svg2.permute_tokens.default
assert ops  # the import registers the operators


@dataclass(frozen=True)
class MapRequest:
    """Which attention to look into. None: the middle one of the sparse layers, of the sparse steps; the first head.

    Attributes:
        layer: path of the attention ("blocks.3.attn1"), or its number among the sparse ones.
        step: denoising step, from 0.
        head: query head, from 0.
    """

    layer: str | int | None = None
    step: int | None = None
    head: int | None = None

    def choose(self, density: DensityTable) -> tuple[str, int, int]:
        """Layer, step and head among those that ran sparse.

        Raises:
            ValueError: what was asked for did not.
        """
        steps = sparse_steps(density)
        layers = [name for name, row in zip(density.layers, density.sparse, strict=True) if row.any()]
        heads = density.values.shape[2]
        if not steps:
            raise ValueError("maps: no attention was sparse, so there is none to look into; the report says why")
        step = steps[len(steps) // 2] if self.step is None else self.step
        head = self.head or 0
        if step not in steps:
            raise ValueError(f"maps: step {step} is not sparse. Valid: {steps[0]} to {steps[-1]}.")
        if not 0 <= head < heads:
            raise ValueError(f"maps: there is no head {head}. Valid: 0 to {heads - 1}.")
        return self._layer(layers), step, head

    def _layer(self, layers: list[str]) -> str:
        asked = self.layer
        if asked is None:
            return layers[len(layers) // 2]
        if asked in layers:
            return str(asked)
        number = int(asked) if str(asked).isdecimal() else len(layers)
        if number >= len(layers):
            raise ValueError(
                f"maps: layer {asked!r} is not sparse. Valid: {', '.join(layers)}, or 0 to {len(layers) - 1}."
            )
        return layers[number]


class Captured(BaseException):
    """Ends the run: the inputs of the attention were taken.

    No Exception, after which the dense graph would run instead.
    """

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__("captured")
        self.inputs = inputs


@contextlib.contextmanager
def captured_attention(session: Session, site: str, step: int, head: int) -> Iterator[None]:
    """Within it, the first sparse call that computes ``site`` in ``step`` raises :class:`Captured`."""
    replaced: list[tuple[DenoisingProgram, Any]] = []
    try:
        for program in session.programs:
            if isinstance(program, DenoisingProgram) and program.sparse is not None:
                replaced.append((program, program.sparse))
                program.sparse = _Watched(program, site, step, head)  # type: ignore[assignment]
        yield
    finally:
        for program, graph in replaced:
            program.sparse = graph


class _Watched:
    """In the place of a compiled graph."""

    def __init__(self, program: DenoisingProgram, site: str, step: int, head: int) -> None:
        assert program.sparse is not None
        self._graph = program.sparse
        self._names = [site.name for site in program.sites if site.decision == "sparse"]
        self._site, self._step, self._head = site, step, head

    def __call__(self, *args: Any) -> Any:
        plan = plan_now()
        names = [] if plan is None else [qualified(plan.layer.label, name) for name in self._names]
        if plan is None or plan.standing is None or self._site not in names or plan.standing.step != self._step:
            return self._graph(*args)
        with torch.no_grad():
            return _Watcher(self._graph.gm, names.index(self._site), self._head).run(*args)


class _Watcher(fx.Interpreter):
    """Runs a graph up to its n-th sparse attention."""

    def __init__(self, gm: fx.GraphModule, number: int, head: int) -> None:
        super().__init__(gm)
        self._left = number
        self._head = head
        self._orders: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target in _ATTENTIONS:
            if self._left == 0:
                raise Captured(self._inputs(n))
            self._left -= 1
            self._orders.clear()
        elif n.target is _PERMUTE:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self._orders[n] = _bound(_PERMUTE, args, kwargs)["order"]
        return super().run_node(n)

    def _inputs(self, node: fx.Node) -> AttentionInputs:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        given = _bound(node.target, args, kwargs)
        nodes = _bound(node.target, node.args, node.kwargs)
        head = self._head
        kv_head = head * given["key"].shape[1] // given["query"].shape[1]
        query, q_order = self._in_token_order(given, nodes, "query", "q_order", head)
        key, k_order = self._in_token_order(given, nodes, "key", "k_order", kv_head)
        centroids = given["k_centroids"]
        return AttentionInputs(
            *(query, key, q_order, k_order),
            q_offsets=given["q_offsets"][0, head].clone(),
            k_offsets=given["k_offsets"][0, kv_head].clone(),
            block_map=given["block_map"][0, head].clone(),
            scale=float(given["scale"]),
            k_centroids=None if centroids is None else centroids[0, kv_head].clone(),
            log_mass=given["log_mass"][0, head].clone() if "log_mass" in given else None,
            q_centroids=given["q_centroids"][0, head].clone() if "q_centroids" in given else None,
        )

    def _in_token_order(
        self, given: dict[str, Any], nodes: dict[str, Any], name: str, order_name: str, head: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens [N, D] of one head of the first video, and their order [N]."""
        tokens = given[name][0, head]
        if given[order_name] is not None:
            return tokens.clone(), given[order_name][0, head].clone()
        order = self._orders[nodes[name]][0, head].clone()
        return torch.empty_like(tokens).index_copy_(0, order.long(), tokens), order


def _bound(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an operator by name, defaults included."""
    bound = {}
    for position, argument in enumerate(target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        bound[argument.name] = args[position] if position < len(args) else kwargs.get(argument.name, default)
    return bound

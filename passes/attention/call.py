"""What is known of one attention of a graph: where it is and how it computes, or why it cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from svg2_compile.passes.layout.axes import Axis

__all__ = ["AttentionCall", "KeyMask", "PickedTokens", "UnreadableAttention"]


@dataclass(frozen=True)
class KeyMask:
    """Which keys are attended, as FlexAttention says it: a graph (batch, head, query, key, *operands) -> bool that
    reads neither head nor query. operands: nodes of the graph around it."""

    body: fx.GraphModule
    operands: tuple[Any, ...]


@dataclass(frozen=True)
class PickedTokens:
    """Which tokens an attention has. places: integers [T], their places in rows one after the other. queries, keys: the
    axes of all tokens in all rows, those that were left out included."""

    places: fx.Node
    queries: Axis
    keys: Axis


@dataclass(frozen=True)
class AttentionCall:
    """One attention: softmax(scale * query @ key^T + mask) @ value.

    node: yields the attention's output alone, in the layout ``axes``. query, key, value: its inputs. axes: "bhnd"
    ([B, H, N, D]), "bnhd", "gnd" ([B * num_heads, N, D]) or "nhd" ([sequences * N, H, D]). key_transposed: the last two
    axes of key are swapped.
    attn_mask: bool (True = attend, or False = attend where mask_excludes) or additive; in "gnd" calls broadcastable to
    [B, num_heads, N, N]. scale: None means 1 / sqrt(head_dim). form: which spelling was read. name: module path.
    out_axes: of the output, where it is not ``axes``. sequences: of a "nhd" call, all of one length. ends: an int
    tensor of two, the second of which is where the only sequence ends; what follows is padding. parted: the starts of
    queries and of keys where each of ``sequences`` rows is two sequences, whose lengths are data; the first is attended
    sparsely. starts: of the sequences of a "nhd" call, of queries and of keys, where they are data. picked: the tokens
    of a "nhd" call are some of ``sequences`` rows of one length. key_mask: which keys are attended. source: the
    operator with several outputs of which ``node`` is one. quantised: it computes with fewer bits than its inputs
    have, by design.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: fx.Node | None = None
    mask_excludes: bool = False
    scale: float | None = None
    is_causal: bool = False
    dropout_p: float = 0.0
    axes: str = "bhnd"
    out_axes: str | None = None
    key_transposed: bool = False
    num_heads: int | None = None
    form: str = "sdpa"
    name: str = ""
    sequences: int = 1
    ends: fx.Node | None = None
    parted: tuple[fx.Node, fx.Node] | None = None
    starts: tuple[fx.Node, fx.Node] | None = None
    picked: PickedTokens | None = None
    key_mask: KeyMask | None = None
    source: fx.Node | None = None
    quantised: bool = False

    @property
    def token_dim(self) -> int:
        """Which axis of the query holds the tokens."""
        return {"bhnd": 2, "nhd": 0}.get(self.axes, 1)

    @property
    def key_token_dim(self) -> int:
        """Which axis of the key holds the tokens."""
        return self.token_dim + 1 if self.key_transposed else self.token_dim


@dataclass(frozen=True)
class UnreadableAttention:
    """An attention that cannot be rewritten as it is spelled. reason: a stable code; detail: the way out."""

    node: fx.Node
    name: str
    reason: str
    detail: str

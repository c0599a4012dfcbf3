"""Analysis: attention over tokens that were picked from rows by their places, as if over the rows.

    packed = flatten(x [B, N, ...])[places];  attention(packed, starts [B + 1])      ->  B sequences of N tokens

The places are followed by the layout (layout/picked.py); that the starts are theirs is asked when the graph runs.
"""

from __future__ import annotations

from dataclasses import replace

from svg2_compile.passes.attention.call import AttentionCall, PickedTokens
from svg2_compile.passes.attention.foreign import SEVERAL_SEQUENCES
from svg2_compile.passes.graph.nodes import shape_of
from svg2_compile.passes.layout.lengths import exact_quotient, same_length, size_expr
from svg2_compile.passes.stays_dense import StaysDense
from svg2_compile.passes.token_layout import TokenLayouts

__all__ = ["as_picked", "check_picks"]


def as_picked(call: AttentionCall, layouts: TokenLayouts) -> AttentionCall:
    """The call over rows where its queries, keys and values are picked from them by the same places; else as it is."""
    picks = [pick for node in (call.query, call.key, call.value) if (pick := layouts.picks.get(node)) is not None]
    shape = shape_of(call.starts[0]) if call.starts is not None else None
    if len(picks) < 3 or shape is None or not isinstance(shape[0], int) or call.axes != "nhd":
        return call
    (queries, places), (keys, _), _ = picks
    rows, length = shape[0] - 1, queries.length
    if length is None or exact_quotient(length, size_expr(rows)) is None:
        return call
    if not all(other is places and same_length(axis.length, length) for axis, other in picks if axis.length):
        return call
    return replace(call, picked=PickedTokens(places, queries, keys), sequences=rows, ends=None, parted=None)


def check_picks(call: AttentionCall, layouts: TokenLayouts) -> None:
    """Raise StaysDense for starts that nothing explains, and for tokens that were picked in a way that is not read."""
    if any(node in layouts.picks for node in (call.query, call.key, call.value)):
        raise StaysDense(
            "picked_tokens",
            "its tokens were picked by their places (a mask), and it is not read how they make up its sequences: pick "
            "queries, keys and values by the same places, in rows one after the other, with the starts of each row; or "
            "hand all tokens to attention with a mask over keys",
        )
    if call.starts is not None and call.ends is None and call.parted is None:
        raise StaysDense("several_sequences", f"{call.form}: {SEVERAL_SEQUENCES}")

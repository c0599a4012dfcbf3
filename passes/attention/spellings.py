"""Names of operators, by what they do to scores and masks, as ``operator_name`` gives them.

A name stands for the function, the method and the ATen operator alike. What a walk through these sets may rely on:

    COPIES      every value keeps its place, its dtype may change (a cast to bool is none: it changes values)
    RESHAPES    values keep their order: axes are merged, split or expanded. What a reader of scores follows
    MOVES       RESHAPES, and what moves, repeats or drops values: only for who asks which values there are, not where
"""

from __future__ import annotations

__all__ = ["ADD", "AND", "COPIES", "DIVIDE", "DROPOUT", "MASKED_FILL", "MATMUL", "MOVES", "MULTIPLY", "RESHAPES"]
__all__ += ["SOFTMAX", "TRANSPOSE"]

SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
MATMUL = frozenset({"matmul", "bmm", "__matmul__"})
DROPOUT = frozenset({"dropout", "native_dropout"})

COPIES = frozenset({"to", "_to_copy", "float", "half", "bfloat16", "type", "type_as"})
COPIES |= {"clone", "contiguous", "detach", "alias"}
RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "expand", "unflatten", "flatten"})
MOVES = RESHAPES | {"repeat", "repeat_interleave", "unsqueeze", "squeeze", "transpose", "permute"}
MOVES |= {"__getitem__", "getitem", "select", "slice", "lift_fresh_copy"}
TRANSPOSE = frozenset({"transpose", "swapaxes", "swapdims"})

ADD = frozenset({"add", "add_", "__add__", "iadd"})
MULTIPLY = frozenset({"mul", "mul_", "__mul__"})
DIVIDE = frozenset({"div", "div_", "truediv", "__truediv__"})
AND = frozenset({"and_", "__and__", "__iand__", "bitwise_and", "logical_and"})
MASKED_FILL = frozenset({"masked_fill", "masked_fill_"})

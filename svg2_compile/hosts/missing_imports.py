"""Imports inside of a forward that fail, as model code asks for optional packages.

    try:
        from flash_attn_interface import flash_attn_varlen_func
        return True
    except Exception:
        return False

Dynamo breaks the graph at such an import. Here it raises what Python raises, and the code goes on with its answer. That
a package appears while the process runs is not looked for.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable
from typing import Any

from svg2_compile.hosts.branches import Instruction, tables

__all__ = ["imports"]


@functools.cache
def imports() -> tuple[Instruction, ...]:
    """The instruction that imports, in all tables of Dynamo."""
    places = [dis.opmap["IMPORT_NAME"]]
    return tuple(Instruction(table, at, table[at], _raising(table[at])) for table, at in tables(places))


def _raising(method: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's import of a module, raising where it fails."""

    @functools.wraps(method)
    def import_name(self: Any, instruction: Any) -> Any:
        from torch._dynamo.exc import raise_observed_exception
        from torch._dynamo.variables.constant import ConstantVariable

        level, names = (variable.as_python_constant() for variable in self.stack[-2:])
        try:
            module = __import__(instruction.argval, fromlist=names, level=level, globals=self.f_globals)
            missing = next((name for name in names or () if name != "*" and not hasattr(module, name)), None)
            if missing is not None:
                raise ImportError(f"cannot import name {missing!r} from {instruction.argval!r}")
        except ImportError as error:
            raise_observed_exception(type(error), self, args=[ConstantVariable.create(str(error))])
        return method(self, instruction)

    return import_name

"""How an op is made of one function: its signature, its documentation and its fake kernel at once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef

from svg2_compile.kernels import validation
from svg2_compile.kernels.dispatch import run_implementation

__all__ = ["define"]

# No input's strides matter, so a compiler may lay out what it feeds to these ops as it likes.
_TAGS = (torch.Tag.flexible_layout,)


def define(contract: validation.Contract) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make the decorated function, the fake kernel of an op, into the op ``svg2::<its name>``.

    A call of the op is checked by ``contract`` and passed on, all arguments in order, to the function of that name in
    the implementation that serves the tensors' device.
    """

    def register(fake: Callable[..., Any]) -> CustomOpDef:
        name, parameters = fake.__name__, inspect.signature(fake).parameters
        defaults = tuple(parameter.default for parameter in parameters.values())

        def checked_call(*args: Any) -> Any:
            args += defaults[len(args) :]  # torch leaves out last arguments that equal their defaults
            device = validation.validate(name, contract, dict(zip(parameters, args, strict=True)))
            return run_implementation(name, device, *args)

        schema = torch.library.infer_schema(fake, mutates_args=())
        op = torch.library.custom_op(f"svg2::{name}", checked_call, mutates_args=(), schema=schema, tags=_TAGS)
        op.register_fake(fake)
        functools.update_wrapper(op, fake)  # for help() and inspect.signature()
        return op

    return register

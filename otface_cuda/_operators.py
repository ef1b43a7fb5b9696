"""Operators that are written in Python: torch.ops.otface.*, opaque to tracing.

`torch.library.custom_op` would do as much, but imports the compiler of torch, some 800 modules, at the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

_library = torch.library.Library("otface", "FRAGMENT")


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Function], Function]:
    """Registers a function under this name, for all devices. It changes none of its arguments, and no result is one.

    Autograd does not see it: it belongs inside a `torch.autograd.Function`. `fake`: the results by shape and dtype.
    """

    def register(function: Function) -> Function:
        schema = torch.library.infer_schema(function, mutates_args=())
        _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"otface::{name}", fake, lib=_library)
        return function

    return register

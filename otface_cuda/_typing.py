"""For type checkers alone: what the call of a module takes and returns, which for `nn.Module` is anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def called_as(forward: Callable[P, R]) -> Callable[[Callable[..., Any]], Callable[P, R]]:
    """Decorates ``__call__``. Plain ``__call__ = forward`` would not do: pyright then takes the type of the base."""
    return lambda _: forward

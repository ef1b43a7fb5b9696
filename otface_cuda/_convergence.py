"""What is said of problems that were not solved as well as was asked for: once for each line that calls."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _checks
from ._warnings import users_frame


class ConvergenceWarning(RuntimeWarning):
    """Some problems did not reach the `tol` that was given, or the system of their implicit gradient was not solved.

    It comes once for each line that calls, unless the filters of `warnings` say otherwise. This turns it off:

    >>> import warnings
    >>> warnings.simplefilter("ignore", ConvergenceWarning)
    """


def warn_of_tol(where: str, tol: float | Tensor, max_iter: int, error: Tensor, converged: Tensor) -> None:
    """Of the problems that have a `tol` above 0, and an error above that."""
    if not (isinstance(tol, Tensor) or tol > 0) or not _checks.checks_data(converged):
        return
    if isinstance(converged, FakeTensor):  # where shapes alone are traced
        return
    if converged.item() if converged.numel() == 1 else converged.all():  # for one, `all` would take ten times as long
        return
    # A problem without a solution has NaN everywhere, and says so by that.
    missed = ~(converged | error.isnan()) & torch.as_tensor(tol > 0, device=error.device)
    count = int(missed.sum())
    if count > 0:
        worst = torch.where(missed, error, 0.0).max().item()
        remedies = "a larger eps" + ("" if error.dtype == torch.float64 else " or costs in float64")
        warn(
            f"{where}: `tol` was not reached by {count} of {missed.numel()} problems within `max_iter` ({max_iter}) "
            f"iterations, their largest error is {worst:.3g}; more iterations or {remedies} may help",
            kind=f"{where}: tol",
        )


def warn_of_adjoint(where: str, solved: Tensor) -> None:
    """Of the problems whose implicit gradient was not found."""
    # Nobody can tell under vmap, which gives many gradients at once: the NaN has to do.
    is_batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
    if not _checks.checks_data(solved) or any(test(solved) for test in is_batched) or solved.all():
        return
    warn(
        f"{where}: the adjoint system of the implicit gradient was not solved for {int((~solved).sum())} of "
        f"{solved.numel()} problems, whose gradients are NaN; more iterations, a larger eps or grad='unrolled' "
        "may help",
        kind=f"{where}: adjoint",
    )


_shown: dict[tuple[str, int, str], dict[Any, Any]] = {}  # for each line and kind, what `warnings` keeps for a module


def warn(text: str, kind: str) -> None:
    """A :class:`ConvergenceWarning` of the user's line, where one of another kind may have been shown."""
    frame = users_frame()
    path, line = frame.f_code.co_filename, frame.f_lineno
    registry = _shown.setdefault((path, line, kind), {})
    # `warnings` knows what it has shown by the text, but another number is the same warning.
    for key in [key for key in registry if key != "version"]:
        registry[text, ConvergenceWarning, line] = registry.pop(key)
    warnings.warn_explicit(text, ConvergenceWarning, path, line, frame.f_globals.get("__name__"), registry)

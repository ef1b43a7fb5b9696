"""`nn.Module` twins of the functions: the settings once, the data at each call. They hold no parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import _checks
from .costs import METRICS
from .functional import SinkhornOutput, sinkhorn, sinkhorn_points
from .pairs import sinkhorn_pairs

if TYPE_CHECKING:
    from ._typing import called_as


def _check_chunk_bytes(where: str, name: str, x: Any) -> None:
    if x is not None:
        _checks.check_int(where, name, x, 1)


_CHECKS: dict[str, Callable[[str, str, Any], object]] = {
    "eps": partial(_checks.check_setting_per_problem, positive=True),
    "metric": partial(_checks.check_choice, choices=METRICS),
    "max_iter": partial(_checks.check_int, least=1),
    "tol": partial(_checks.check_setting_per_problem, positive=False),
    "check_every": partial(_checks.check_int, least=1),
    "grad": partial(_checks.check_choice, choices=_checks.GRADIENT_MODES),
    "return_plan": _checks.check_bool,
    "chunk_bytes": _check_chunk_bytes,
}


class _Solver(nn.Module):
    """Settings are attributes, checked as they are assigned and read in each call.

    An eps or a tol that is a tensor is a buffer: it moves with the module and is part of its state dict. It keeps its
    dtype in ``.half()`` and ``.to(dtype)``, which are meant for the data; a rounded eps would be another problem.
    """

    _version = 2  # of the state dict; the first had no buffers

    eps: float | Tensor
    max_iter: int
    tol: float | Tensor
    check_every: int
    grad: str

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._names = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, value)

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _CHECKS:
            super().__setattr__(name, value)
            return
        _CHECKS[name](type(self).__name__, name, value)
        self._buffers.pop(name, None)
        self.__dict__.pop(name, None)
        if isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: x for name, x in self._buffers.items() if name in _CHECKS and x is not None}
        super()._apply(fn, recurse)
        for name, x in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != x.dtype:
                self._buffers[name] = x.to(moved.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if local_metadata.get("version", 1) < 2:  # from before there were buffers
            for name, x in self._buffers.items():
                state_dict.setdefault(prefix + name, x)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Sinkhorn(_Solver):
    """:func:`otface_cuda.sinkhorn` with fixed settings, which have the same meaning and the same defaults.

    >>> import torch
    >>> solver = Sinkhorn(eps=0.1, max_iter=50)
    >>> solver
    Sinkhorn(eps=0.1, max_iter=50, tol=0.0, check_every=10, grad='envelope', return_plan=False)
    >>> solver(torch.rand(3, 4, 5)).f.shape
    torch.Size([3, 4])

    Settings may be changed, as attributes; one that is a tensor, with a number for each problem say, moves with ``.to``
    and is in the state dict, in the dtype that it was given in:

    >>> solver.max_iter = 20
    >>> solver.eps = torch.tensor([0.1, 0.2, 0.3])
    >>> solver(torch.rand(3, 4, 5)).n_iter, list(solver.half().state_dict().items())
    (tensor([20, 20, 20]), [('eps', tensor([0.1000, 0.2000, 0.3000]))])
    """

    return_plan: bool

    def __init__(
        self,
        eps: float | Tensor,
        *,
        max_iter: int = 100,
        tol: float | Tensor = 0.0,
        check_every: int = 10,
        grad: str = "envelope",
        return_plan: bool = False,
    ) -> None:
        super().__init__(
            eps=eps, max_iter=max_iter, tol=tol, check_every=check_every, grad=grad, return_plan=return_plan
        )

    def forward(
        self,
        cost: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        *,
        row_lengths: Tensor | None = None,
        col_lengths: Tensor | None = None,
        init: SinkhornOutput | tuple[Tensor | None, Tensor] | None = None,
    ) -> SinkhornOutput:
        return sinkhorn(cost, a=a, b=b, row_lengths=row_lengths, col_lengths=col_lengths, init=init, **self._settings())

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class SinkhornPoints(_Solver):
    """:func:`otface_cuda.sinkhorn_points` with fixed settings, which have the same meaning and the same defaults.

    >>> import torch
    >>> SinkhornPoints(eps=0.1, metric="euclidean")(torch.rand(3, 4, 2), torch.rand(3, 5, 2)).g.shape
    torch.Size([3, 5])
    """

    metric: str
    return_plan: bool

    def __init__(
        self,
        eps: float | Tensor,
        *,
        metric: str = "cosine",
        max_iter: int = 100,
        tol: float | Tensor = 0.0,
        check_every: int = 10,
        grad: str = "envelope",
        return_plan: bool = False,
    ) -> None:
        super().__init__(
            eps=eps,
            metric=metric,
            max_iter=max_iter,
            tol=tol,
            check_every=check_every,
            grad=grad,
            return_plan=return_plan,
        )

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        *,
        row_lengths: Tensor | None = None,
        col_lengths: Tensor | None = None,
        init: SinkhornOutput | tuple[Tensor | None, Tensor] | None = None,
    ) -> SinkhornOutput:
        return sinkhorn_points(
            x, y, a=a, b=b, row_lengths=row_lengths, col_lengths=col_lengths, init=init, **self._settings()
        )

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class SinkhornPairs(_Solver):
    """:func:`otface_cuda.sinkhorn_pairs` with fixed settings, which have the same meaning and the same defaults.

    >>> import torch
    >>> SinkhornPairs(eps=0.1)(torch.rand(3, 4, 8), torch.tensor([[0, 1], [1, 2]])).value.shape
    torch.Size([2])
    """

    metric: str
    chunk_bytes: int | None

    def __init__(
        self,
        eps: float | Tensor,
        *,
        metric: str = "cosine",
        max_iter: int = 100,
        tol: float | Tensor = 0.0,
        check_every: int = 10,
        grad: str = "envelope",
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__(
            eps=eps,
            metric=metric,
            max_iter=max_iter,
            tol=tol,
            check_every=check_every,
            grad=grad,
            chunk_bytes=chunk_bytes,
        )

    def forward(
        self, features: Tensor, pairs: Tensor, a: Tensor | None = None, b: Tensor | None = None
    ) -> SinkhornOutput:
        return sinkhorn_pairs(features, pairs, a=a, b=b, **self._settings())

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

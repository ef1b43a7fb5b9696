"""`nn.Module` twins of the functions: the settings once, the data at each call. They hold no parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .functional import SinkhornOutput, sinkhorn, sinkhorn_points
from .pairs import sinkhorn_pairs


class _Solver(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class Sinkhorn(_Solver):
    """:func:`otface_cuda.sinkhorn` with fixed settings, which have the same meaning and the same defaults.

    >>> import torch
    >>> solver = Sinkhorn(eps=0.1, max_iter=50)
    >>> solver
    Sinkhorn(eps=0.1, max_iter=50, tol=0.0, check_every=10, grad='envelope', return_plan=False)
    >>> solver(torch.rand(3, 4, 5)).f.shape
    torch.Size([3, 4])
    """

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
        return sinkhorn(cost, a=a, b=b, row_lengths=row_lengths, col_lengths=col_lengths, init=init, **self.settings)


class SinkhornPoints(_Solver):
    """:func:`otface_cuda.sinkhorn_points` with fixed settings, which have the same meaning and the same defaults.

    >>> import torch
    >>> SinkhornPoints(eps=0.1, metric="euclidean")(torch.rand(3, 4, 2), torch.rand(3, 5, 2)).g.shape
    torch.Size([3, 5])
    """

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
            x, y, a=a, b=b, row_lengths=row_lengths, col_lengths=col_lengths, init=init, **self.settings
        )


class SinkhornPairs(_Solver):
    """:func:`otface_cuda.sinkhorn_pairs` with fixed settings, which have the same meaning and the same defaults.

    >>> import torch
    >>> SinkhornPairs(eps=0.1)(torch.rand(3, 4, 8), torch.tensor([[0, 1], [1, 2]])).value.shape
    torch.Size([2])
    """

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
        return sinkhorn_pairs(features, pairs, a=a, b=b, **self.settings)

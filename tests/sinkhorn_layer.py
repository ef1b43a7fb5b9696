"""`SinkhornDistance` as copied through many repositories, written from its formulas, in the dtype of its input."""

from __future__ import annotations

import torch
from torch import Tensor


class SinkhornDistance:
    """Of points, or by `of_cost` of a cost matrix (N, n, m); `iterations` is how many the last call did."""

    iterations = 0

    def __init__(self, eps: float, max_iter: int, reduction: str = "none", thresh: float = 0.1):
        self.eps, self.max_iter, self.reduction, self.thresh = eps, max_iter, reduction, thresh

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cost = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
        return self.of_cost(cost)

    def of_cost(self, cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, m = cost.shape[-2:]
        # 1e-8 as there, which makes the plan larger by the factor 1 + 1e-8 m
        log_mu, log_nu = (torch.tensor(1 / size + 1e-8, dtype=cost.dtype).log() for size in (n, m))
        u, v = cost.new_zeros(cost.shape[:-1]), cost.new_zeros(*cost.shape[:-2], m)
        for count in range(1, self.max_iter + 1):
            self.iterations, before = count, u
            u = self.eps * (log_mu - ((v[..., None, :] - cost) / self.eps).logsumexp(-1))
            v = self.eps * (log_nu - ((u[..., :, None] - cost) / self.eps).logsumexp(-2))
            if (u - before).abs().sum(-1).mean() < self.thresh:
                break
        plan = ((u[..., :, None] + v[..., None, :] - cost) / self.eps).exp()
        total = (plan * cost).sum((-2, -1))
        return {"none": total, "mean": total.mean(), "sum": total.sum()}[self.reduction], plan, cost

"""Batches with hard triplets, and the OTFace head in float64 as its authors' code computes it, one triplet at a time.

Qian, Zhu, Zhao, Yang, Wong 2022, arXiv 2203.14461, with two slips of that code put right: the second half-step of
Sinkhorn multiplies by the transposed kernel, and only triplets count, also for alpha > 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from otface_cuda.margins import ArcFace, CosFace, Margin

from .problems import output_dtype


class Batch(NamedTuple):
    embeddings: Tensor  # (N, d)
    maps: Tensor  # (N, C, H, W)
    labels: Tensor  # (N,)
    weight: Tensor  # (classes, d)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Batch:
        return Batch(*(x.to(device, dtype if x.is_floating_point() else None) for x in self))


def random_batch(
    labels: list[int], *, size: int = 7, channels: int = 16, side: int = 3, classes: int = 5, seed: int = 0
) -> Batch:
    """Normal numbers; costs of 16 channels are about 1 and far from 0 and 2, so that at eps 1 Sinkhorn is soon done."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count = len(labels)
    return Batch(
        normal(count, size), normal(count, channels, side, side), torch.tensor(labels).long(), normal(classes, size)
    )


def hard_triplets(embeddings: Tensor, labels: Tensor, alpha: float = 0.0) -> list[tuple[int, int, int]]:
    """In ascending order."""
    x = embeddings.double()
    unit = [row / row.norm() if row.norm() > 0 else row for row in x]
    name = labels.tolist()

    def cos(i: int, j: int) -> float:
        return float(unit[i] @ unit[j])

    every = range(len(name))
    return [
        (a, p, n)
        for a in every
        for p in every
        for n in every
        if a != p and name[a] == name[p] and name[n] != name[a] and cos(a, n) - cos(a, p) > -alpha
    ]


def distance(x: Tensor, y: Tensor, eps: float = 1.0, n_iter: int = 10) -> Tensor:
    """<P, C> between the columns of two maps, from b = 1, by multiplication."""
    x, y = (m.flatten(1).T for m in (x, y))
    cost = 1 - (x / x.norm(dim=1, keepdim=True)) @ (y / y.norm(dim=1, keepdim=True)).T
    kernel = torch.exp(-cost / eps)
    b = cost.new_ones(len(y))
    for _ in range(n_iter):
        a = 1 / len(x) / (kernel @ b)
        b = 1 / len(y) / (kernel.T @ a)
    return (a[:, None] * kernel * b * cost).sum()


class Official(NamedTuple):
    loss: Tensor
    margin_loss: Tensor
    ot_loss: Tensor
    n_hard: int
    n_active: int


def transport_term(
    maps: Tensor, triplets: list[tuple[int, int, int]], beta: float = 0.0, eps: float = 1.0, n_iter: int = 10
) -> tuple[Tensor, int]:
    """The mean over the triplets where it is positive, and how many these are."""
    total, active = maps.sum() * 0, 0
    for a, p, n in triplets:
        hinge = distance(maps[a], maps[p], eps, n_iter) - distance(maps[a], maps[n], eps, n_iter) + beta
        if hinge > 0:
            total, active = total + hinge, active + 1
    return total / max(1, active), active


def official_logits(
    embeddings: Tensor, labels: Tensor, weight: Tensor, margin: Margin, scale: float
) -> tuple[Tensor, Tensor]:
    """With the margin and without it. ArcFace's is by the sum formula, with the fallback of that code."""
    x, w = (v / v.norm(dim=1, keepdim=True) for v in (embeddings, weight))
    cos = x @ w.T
    rows = torch.arange(len(x))
    target = cos[rows, labels]
    if isinstance(margin, ArcFace):
        m = margin.m
        with_margin = target * math.cos(m) - (1 - target**2).sqrt() * math.sin(m)
        begins = 0.0 if margin.easy_margin else math.cos(math.pi - m)
        fallback = target if margin.easy_margin else target - m * math.sin(math.pi - m)
        with_margin = torch.where(target > begins, with_margin, fallback)
    else:
        assert isinstance(margin, CosFace)
        with_margin = target - margin.m
    return scale * cos.index_put((rows, labels), with_margin), scale * cos


def official_head(
    batch: Batch, *, margin: Margin, scale: float = 64.0, alpha: float = 0.0, beta: float = 0.0, ot_weight: float = 10.0
) -> Official:
    logits, _ = official_logits(batch.embeddings, batch.labels, batch.weight, margin, scale)
    rows = torch.arange(len(logits))
    margin_loss = (logits.logsumexp(1) - logits[rows, batch.labels]).mean()
    triplets = hard_triplets(batch.embeddings.detach(), batch.labels, alpha)
    ot_loss, active = transport_term(batch.maps, triplets, beta)
    return Official(margin_loss + ot_weight * ot_loss, margin_loss, ot_loss, len(triplets), active)


def distance_error(dtype: torch.dtype, points: int, channels: int, eps: float, n_iter: int) -> float:
    """What rounding may change in a transport distance of maps whose costs are up to 2.

    With u the unit roundoff (and that of the reference): the cost, a product of `channels` terms and two norms, is off
    by 2 (sqrt(channels) + 4) u, which enters the plan divided by eps; each of 2 n_iter half-steps rounds exponents of
    size 2 / eps and adds up `points` terms; errors add up like roots. <P, C> has the relative error of the plan, times
    a cost of 2, and that of the cost itself. As `tolerance` in problems.py and `cost_error` in test_points_pairs.py.
    """
    u = (torch.finfo(output_dtype(dtype)).eps + torch.finfo(torch.float64).eps) / 2
    cost = 2 * (math.sqrt(channels) + 4) * u
    potential = (2 + math.sqrt(2 * n_iter)) * u * (2 + (math.sqrt(points) + 8) * eps)
    return cost + 2 * 3 * (potential + cost) / eps

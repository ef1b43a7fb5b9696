"""Local descriptors of a face, where there is no trained network: what the surroundings of each cell look like."""

from __future__ import annotations

import torch
from torch import Tensor

GRID, SIDE = 7, 112
PART = SIDE // GRID // 2  # half a cell
WINDOW = 4  # parts: a window is twice as wide as its cell, so that it sees an eye, not a piece of an edge
DIRECTIONS = 8


def descriptors(pictures: Tensor) -> Tensor:
    """uint8 (N, 3, 112, 112) -> (N, 49, 128), cells row by row: square roots of histograms, less the mean of all cells.

    The square root makes the inner product one of distributions (Arandjelovic, Zisserman 2012); what all cells have in
    common tells none apart.
    """
    found = histograms(pictures).sqrt()
    return found - found.mean((0, 1))


def histograms(pictures: Tensor) -> Tensor:
    """Of the directions of gradients, in 4 x 4 parts of each cell's window, as in SIFT (Lowe 2004); those of a cell sum
    to 1. A pixel is shared between the two nearest directions, weighted by the length of its gradient.
    """
    grey = pictures.float().mean(1)
    dx, dy = torch.zeros_like(grey), torch.zeros_like(grey)
    dx[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    dy[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    length = torch.hypot(dx, dy)
    direction = torch.atan2(dy, dx) * (DIRECTIONS / (2 * torch.pi))
    apart = (direction[:, None] - torch.arange(DIRECTIONS)[:, None, None]) % DIRECTIONS  # (N, 8, 112, 112)
    maps = length[:, None] * (1 - torch.minimum(apart, DIRECTIONS - apart)).clamp(min=0)
    padded = torch.nn.functional.pad(maps, (PART,) * 4, mode="replicate")
    parts = torch.nn.functional.avg_pool2d(padded, PART)  # (N, 8, 16, 16)
    windows = parts.unfold(2, WINDOW, 2).unfold(3, WINDOW, 2)  # (N, 8, 7, 7, 4, 4)
    found = windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return found / found.sum(2, keepdim=True).clamp(min=1e-6)

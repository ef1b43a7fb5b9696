"""The specification of the margins, the logits and the loss, in plain torch and float64. Nothing here is fast.

For embeddings x_b, class weights w_j, labels y_b and a scale s, with cos_bj = <x_b, w_j> / (|x_b| |w_j|), which is 0
where x_b or w_j is zero, and then has the gradient 0:

    logit_bj = s cos_bj, but logit_{b, y_b} = s margin(cos_{b, y_b})                                                (1)
    loss_b = -sum_j q_bj log softmax(logit_b)_j,   q_bj = (1 - e) u_y [j = y_b] + (e / C) u_j                       (2)

with the label smoothing e and the class weights u, which are 1 if not given. "mean" is sum_b loss_b / sum_b u_{y_b}.
A row whose label is `ignore_index` has plain logits, takes no part in either sum and has the gradient 0. A row whose
label is none of the classes is NaN.

A margin turns theta = arccos(cos) into phi = m1 theta + m2 and has

    margin(cos) = cos(phi) - m3,   d margin / d cos = m1 sin(phi) / sin(theta)                                      (3)

except, where phi > pi: cos(theta) - m2 sin(m2) - m3 with the slope 1 (ArcFace's fallback), or
(-1)^k cos(phi) - 2 k - m3 with k = floor(phi / pi) and (-1)^k times the slope (SphereFace). With `easy_margin` it is
cos(theta) where that is not positive. At theta = 0 and theta = pi the slope is infinite while d cos(theta) / dx is
zero, and what their product tends to depends on the direction. There sin(theta) counts as `LEAST_SINE`, so that the
gradient is finite, and zero up to rounding.

>>> import torch
>>> from otface_cuda import margins
>>> round(margin_reference(torch.tensor(0.5), margins.ArcFace(0.5)).item(), 4)
0.0236
>>> x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
>>> cosine_margin_logits_reference(x, weight, torch.tensor([0]), margin=margins.CosFace(0.1), scale=10.0)
tensor([[5., 8.]], dtype=torch.float64)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .margins import KernelMargin, Margin

__all__ = ["cosine_margin_logits_reference", "margin_reference", "margin_softmax_loss_reference"]

LEAST_SINE = math.sqrt(torch.finfo(torch.float64).eps)


def margin_reference(cos: Tensor, margin: Margin) -> Tensor:
    """What the margin makes of each cosine; of one beyond [-1, 1], what it makes of the nearer end."""
    value: Tensor = _Margin.apply(cos.double(), margin.kernel_form())
    return value


def cosine_margin_logits_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: Margin,
    scale: float,
    ignore_index: int = -100,
) -> Tensor:
    """Equation (1): (B, C), for x (B, d), weight (C, d) and labels (B,)."""
    cos = _unit(x.double()) @ _unit(weight.double()).mT
    labels = labels.long()
    num_classes = weight.shape[0]
    is_ignored = labels == ignore_index
    is_class = (labels >= 0) & (labels < num_classes)
    target = labels.clamp(0, num_classes - 1)[:, None]
    margined = margin_reference(cos.gather(1, target), margin)
    with_margin = (torch.arange(num_classes, device=x.device) == target) & (is_class & ~is_ignored)[:, None]
    logits = scale * torch.where(with_margin, margined, cos)
    return logits.masked_fill(~(is_class | is_ignored)[:, None], math.nan)


def margin_softmax_loss_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: Margin,
    scale: float,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Equation (2): a scalar, or (B,) for ``reduction="none"``."""
    num_classes = weight.shape[0]
    u = torch.ones(num_classes, dtype=torch.float64, device=x.device) if class_weight is None else class_weight.double()
    kept = labels != ignore_index  # an ignored row is not even looked at: it may hold anything
    logits = cosine_margin_logits_reference(
        x[kept], weight, labels[kept], margin=margin, scale=scale, ignore_index=ignore_index
    )
    target = labels[kept].long().clamp(0, num_classes - 1)
    share = label_smoothing / num_classes
    surprise = -logits.log_softmax(1)
    # The target by itself: what is not smoothed counts its class only, also where another logit is infinite.
    loss = (1 - label_smoothing) * u[target] * surprise.gather(1, target[:, None])[:, 0]
    if label_smoothing > 0:
        loss = loss + share * (surprise * u).sum(1)
    if reduction == "none":
        return torch.zeros(len(labels), dtype=torch.float64, device=x.device).masked_scatter(kept, loss)
    total = loss.sum()
    return total / u[target].sum() if reduction == "mean" else total


class _Margin(torch.autograd.Function):
    """Equation (3), with a slope that is finite everywhere."""

    @staticmethod
    def forward(ctx: Any, cos: Tensor, margin: KernelMargin) -> Tensor:
        m1, m2, m3, beyond_pi, easy, straight_through = margin
        c = cos.clamp(-1, 1)
        phi = m1 * c.acos() + m2
        value = phi.cos() - m3
        slope = m1 * phi.sin() / ((1 - c) * (1 + c)).sqrt().clamp(min=LEAST_SINE)
        if m1 == 1 and m2 == 0:  # also at the ends
            value, slope = c - m3, torch.ones_like(c)
        elif beyond_pi == 1:
            value = torch.where(phi > math.pi, c - m2 * math.sin(m2) - m3, value)
            slope = torch.where(phi > math.pi, 1.0, slope)
        elif beyond_pi == 2:
            k = (phi / math.pi).floor()
            sign = 1 - 2 * k.remainder(2)
            value = sign * phi.cos() - 2 * k - m3
            slope = sign * slope
        if easy:
            value = torch.where(c <= 0, c, value)
            slope = torch.where(c <= 0, 1.0, slope)
        ctx.save_for_backward(torch.ones_like(slope) if straight_through else slope)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None


def _unit(x: Tensor) -> Tensor:
    """x / |x| for each row, and 0 with the gradient 0 for a zero row. First by the largest entry: squares overflow."""
    largest = x.detach().abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)
    is_zero = largest == 0
    ratio = x / torch.where(is_zero, 1.0, largest)
    square = ratio.square().sum(1, keepdim=True)
    return torch.where(is_zero, 0.0, ratio / torch.where(is_zero, 1.0, square).sqrt())

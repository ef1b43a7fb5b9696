"""A user's file, for a type checker: every line is right, or is wrong in the way that its comment says.

`tools/wheel_check.sh` has mypy read it with --strict, which also complains of a comment that is not needed.
"""

from __future__ import annotations

import torch

import otface_cuda
from otface_cuda.compat.layers import SinkhornDistance
from otface_cuda.compat.otface import OTFace_Arcface


def right() -> None:
    out: otface_cuda.SinkhornOutput = otface_cuda.sinkhorn(torch.rand(3, 4, 5), eps=0.1, max_iter=20)
    value: torch.Tensor = out.value
    plan: torch.Tensor | None = out.plan
    margin: otface_cuda.Margin = otface_cuda.ArcFace(0.5, easy_margin=True)
    x, labels = torch.randn(6, 8), torch.tensor([0, 0, 1, 1, 2, 2])
    loss: torch.Tensor = otface_cuda.margin_softmax_loss(x, torch.randn(3, 8), labels, margin=margin, scale=64.0)
    head = otface_cuda.OTFaceLoss(3, 8, margin=margin)
    losses: otface_cuda.OTFaceOutput = head(x, torch.randn(6, 4, 2, 2), labels)
    solver = otface_cuda.Sinkhorn(eps=torch.full((3,), 0.1), max_iter=20)
    solver.eps, solver.max_iter = 0.2, 30
    cost: torch.Tensor = solver(torch.rand(3, 4, 5), row_lengths=labels[:3]).transport_cost
    logits: torch.Tensor = otface_cuda.CosineMarginLogits(3, 8)(x, labels)
    cosines: torch.Tensor = OTFace_Arcface(8, 3)(x, torch.randn(6, 4, 2, 2), labels, 0)[2]
    layer = SinkhornDistance(eps=0.1, max_iter=100, reduction="mean")
    both: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = layer(torch.rand(2, 4, 3), torch.rand(2, 5, 3))
    kernel: torch.nn.Parameter = OTFace_Arcface(8, 3, alpha=0.1).kernel
    cuda: str | None = otface_cuda.info().cuda
    print(value, plan, loss, losses, cost, logits, cosines, both, kernel, cuda)


def wrong() -> None:
    plan: torch.Tensor = otface_cuda.sinkhorn(torch.rand(3, 4, 5), eps=0.1).plan  # type: ignore[assignment]
    otface_cuda.sinkhorn([[0.0, 1.0]], eps=0.1)  # type: ignore[arg-type]
    otface_cuda.sinkhorn(torch.rand(3, 4), eps=0.1, iterations=3)  # type: ignore[call-arg]
    otface_cuda.CosineMarginLogits(3, 8, margin=0.5)  # type: ignore[arg-type]
    SinkhornDistance(0.1)  # type: ignore[call-arg]
    SinkhornDistance(0.1, 100)(torch.rand(2, 4, 3))  # type: ignore[call-arg]
    otface_cuda.Sinkhorn(0.1)(torch.rand(3, 4), max_iter=3)  # type: ignore[call-arg]
    value: float = otface_cuda.Sinkhorn(0.1)(torch.rand(3, 4)).value  # type: ignore[assignment]
    otface_cuda.MarginSoftmaxLoss(3, 8)(torch.rand(3, 8))  # type: ignore[call-arg]
    cuda_version: int = otface_cuda.info().cuda  # type: ignore[assignment]
    print(plan, value, cuda_version)

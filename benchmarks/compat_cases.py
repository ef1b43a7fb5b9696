"""The cases of the benchmark of drop-in replacements: an original and what replaces it, called alike on one input.

To add one, write a subclass of ``Case`` and add it to ``CASES``. An original that cannot be installed by pip is written
here from its formulas, in plain torch, or in the tests, which hold the replacement against it.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Library
from otface_problems import distances_by_scaling, unit_cells
from torch import Tensor
from torch.nn import functional

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # last: it hides no module of this folder

import sinkhorn_layer

Call = Callable[[], tuple[Tensor, ...]]
MARGIN, SCALE = 0.5, 64.0


class Case(Library, ABC):
    agrees = 1e-3  # the largest difference of an entry, relative to the largest entry of its result

    @abstractmethod
    def prepare(self, quick: bool, generator: torch.Generator) -> tuple[Call, Call]:
        """What is timed: the original and the replacement, with their results."""


def differentiated(call: Callable[..., Tensor], *inputs: Tensor, parameters: tuple[Tensor, ...] = ()) -> Call:
    """The sum of a result, and its gradients in the inputs and in parameters."""

    def run() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        total = call(*leaves).sum()
        return total.detach(), *torch.autograd.grad(total, [*leaves, *parameters])

    return run


# ---- POT ----


class Pot(Case):
    module = "ot"
    package = "pot"
    devices = ("cpu",)


class SolveBatch(Pot):
    def __init__(self, grad: str) -> None:
        self.grad = grad
        self.name = f"solve_batch-{grad}"
        what = "forward" if grad == "detach" else "forward + backward"
        self.label = f'solve_batch(grad="{grad}"), 256 of 49 x 49, reg 0.05, 100 iterations, {what}'

    def prepare(self, quick: bool, generator: torch.Generator) -> tuple[Call, Call]:
        import ot.batch

        from otface_cuda.compat import pot

        M = torch.rand(4 if quick else 256, 49, 49, generator=generator)

        def call(solve: Callable[..., Any]) -> Call:
            def value(M: Tensor) -> Tensor:
                result: Tensor = solve(M, 0.05, max_iter=100, tol=0, grad=self.grad).value
                return result

            return differentiated(value, M) if self.grad != "detach" else lambda: (value(M),)

        return call(ot.batch.solve_batch), call(pot.solve_batch)


class PotSinkhorn(Pot):
    def __init__(self, function: str, size: int, sides: int) -> None:
        self.function, self.size, self.sides = function, size, sides
        self.name = f"{function}-{sides}" if sides else function
        many = f", {sides} right-hand sides" if sides else ""
        self.label = f"{function}, {size} x {size}{many}, reg 0.05, 100 iterations, forward"

    def prepare(self, quick: bool, generator: torch.Generator) -> tuple[Call, Call]:
        import ot

        from otface_cuda.compat import pot

        n = 20 if quick else self.size
        M = torch.rand(n, n, generator=generator)
        a, b = (functional.softmax(torch.rand(n, k or 1, generator=generator), 0) for k in (0, self.sides))
        weights = a[:, 0], b if self.sides else b[:, 0]

        def call(library: Any) -> Call:
            solve = getattr(library, self.function)
            return lambda: (solve(*weights, M, 0.05, numItermax=100, stopThr=0, warn=False),)

        return call(ot), call(pot)


# ---- the copied layer ----


class Layer(Case):
    name = "SinkhornDistance"
    label = "SinkhornDistance(0.1, 100), 64 of 49 points each, forward + backward"
    note = "the original is written from its formulas"

    def prepare(self, quick: bool, generator: torch.Generator) -> tuple[Call, Call]:
        from otface_cuda.compat import layers

        x, y = (torch.rand(4 if quick else 64, 49, 3, generator=generator) for _ in range(2))
        original, replacement = (module.SinkhornDistance(eps=0.1, max_iter=100) for module in (sinkhorn_layer, layers))
        return (
            differentiated(lambda x, y: original(x, y)[0], x, y),
            differentiated(lambda x, y: replacement(x, y)[0], x, y),
        )


# ---- the OTFace authors' head ----


class OTFaceHead(Case):
    name = "OTFace_Arcface"
    label = "OTFace_Arcface, 32 maps of 512 x 7 x 7, 5,000 classes, loss + backward"
    note = "the original is written from its formulas, with the transposed kernel, and solves triplet by triplet"

    def prepare(self, quick: bool, generator: torch.Generator) -> tuple[Call, Call]:
        from otface_cuda.compat.otface import OTFace_Arcface

        batch, channels, classes = (8, 16, 50) if quick else (32, 512, 5000)
        labels = torch.arange(batch) // 4
        x = torch.randn(batch, 128, generator=generator)
        maps = torch.randn(batch, channels, 7, 7, generator=generator).relu()
        kernel = 0.01 * torch.randn(128, classes, generator=generator)
        head = OTFace_Arcface(128, classes)
        head.load_state_dict({"kernel": kernel})

        def original(x: Tensor, maps: Tensor) -> Tensor:
            cos = functional.normalize(x) @ functional.normalize(kernel, dim=0)
            own = cos.gather(1, labels[:, None])
            with_margin = (own.arccos() + head.m).cos()
            loss = functional.cross_entropy(head.s * cos.scatter(1, labels[:, None], with_margin), labels)
            between = functional.normalize(x.detach())
            similarity = between @ between.T
            same = labels[:, None] == labels
            hard = (similarity[:, None, :] > similarity[:, :, None]) & same[:, :, None] & ~same[:, None, :]
            hard &= ~torch.eye(batch, dtype=torch.bool)[:, :, None]
            hinges = []
            for a, p, n in hard.nonzero().tolist():
                cells = unit_cells(maps[[a, p, n]])
                near, far = (distances_by_scaling(cells[:1], cells[k : k + 1]) for k in (1, 2))
                hinges.append((near - far).relu())
            hinge = torch.cat(hinges)
            return loss + 10 * hinge.sum() / (hinge > 0).sum().clamp(min=1)

        def replacement(x: Tensor, maps: Tensor) -> Tensor:
            logits, ot_loss, *_ = head(x, maps, labels, epoch=0)
            return functional.cross_entropy(logits, labels) + 10 * ot_loss

        return differentiated(original, x, maps), differentiated(replacement, x, maps)


# ---- insightface ----


class PartialFC(Case):
    name = "PartialFC_V2"
    label = "PartialFC_V2 with ArcFace, 256 x 100,000 classes, d = 512, loss + backward"
    note = "the original is written from its formulas, for one process, with the margin on the own class alone"

    def prepare(self, quick: bool, generator: torch.Generator) -> tuple[Call, Call]:
        from otface_cuda.compat.insightface import CombinedMarginLoss, PartialFC_V2

        batch, classes, d = (8, 100, 16) if quick else (256, 100_000, 512)
        x = torch.randn(batch, d, generator=generator)
        labels = torch.randint(classes, (batch,), generator=generator)
        replacement = PartialFC_V2(CombinedMarginLoss(SCALE, 1.0, MARGIN, 0.0), d, classes)
        weight = replacement.weight
        rows = torch.arange(batch)

        def original(x: Tensor) -> Tensor:
            cos = functional.linear(functional.normalize(x), functional.normalize(weight)).clamp(-1, 1)
            with torch.no_grad():  # its slope counts as 1
                cos[rows, labels] = (cos[rows, labels].arccos() + MARGIN).cos()
            return functional.cross_entropy(cos * SCALE, labels)

        def with_weight(loss: Callable[[Tensor], Tensor]) -> Call:
            def run() -> tuple[Tensor, ...]:
                leaf = x.detach().requires_grad_()
                value = loss(leaf)
                return value.detach(), *torch.autograd.grad(value, (leaf, weight))

            return run

        return with_weight(original), with_weight(lambda x: replacement(x, labels))


# ---- pytorch-metric-learning ----


class MetricLearning(Case):
    module = "pytorch_metric_learning"
    package = "pytorch-metric-learning"

    def __init__(self, name: str) -> None:
        self.name = name
        self.label = f"{name}, 256 x 10,000 classes, d = 512, loss + backward"

    def prepare(self, quick: bool, generator: torch.Generator) -> tuple[Call, Call]:
        from pytorch_metric_learning import losses

        from otface_cuda.compat import metric_learning

        batch, classes, d = (8, 100, 16) if quick else (256, 10_000, 512)
        x = torch.randn(batch, d, generator=generator)
        labels = torch.randint(classes, (batch,), generator=generator)
        original, replacement = (
            getattr(module, self.name)(num_classes=classes, embedding_size=d) for module in (losses, metric_learning)
        )
        replacement.load_state_dict(original.state_dict())

        def call(loss: Any) -> Call:
            def run() -> tuple[Tensor, ...]:
                leaf = x.detach().requires_grad_()
                value = loss(leaf, labels)
                return value.detach(), *torch.autograd.grad(value, (leaf, loss.W))

            return run

        return call(original), call(replacement)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        SolveBatch("detach"),
        SolveBatch("envelope"),
        SolveBatch("autodiff"),
        PotSinkhorn("sinkhorn", 500, 0),
        PotSinkhorn("sinkhorn2", 500, 64),
        Layer(),
        OTFaceHead(),
        PartialFC(),
        MetricLearning("ArcFaceLoss"),
        MetricLearning("CosFaceLoss"),
        MetricLearning("SphereFaceLoss"),
        MetricLearning("SubCenterArcFaceLoss"),
    )
}

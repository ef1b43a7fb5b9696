"""Small calls of the drop-in replacements, where Python and torch's operators take the time: original and replacement.

To add one, add it to ``SMALL``. Originals that cannot be installed by pip are written here from their formulas.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Library
from torch import Tensor, nn
from torch.nn import functional

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # last: it hides no module of this folder

import sinkhorn_layer

from_formulas = "the original is written from its formulas"


class Side(NamedTuple):
    call: Callable[..., Tensor]
    parameters: tuple[Tensor, ...] = ()  # those of a module: they get gradients, too


class Pair(NamedTuple):
    original: Side
    replacement: Side
    inputs: tuple[Tensor, ...]


class Small(Library):
    devices = ("cpu",)
    agrees = 1e-3  # the largest difference of an entry, relative to the largest entry of its result

    def __init__(
        self,
        name: str,
        label: str,
        prepare: Callable[[torch.Generator], Pair],
        *,
        module: str = "torch",
        package: str = "torch",
        note: str = "",
        has_gradient: bool = True,
    ) -> None:
        self.name, self.label, self.prepare = name, label, prepare
        self.module, self.package, self.note, self.has_gradient = module, package, note, has_gradient


# ---- POT ----


def weights(*shape: int, generator: torch.Generator) -> Tensor:
    return functional.softmax(torch.rand(*shape, generator=generator, dtype=torch.float64), -1)


def of_batch(function: str, take: Callable[[Any], Tensor], *sizes: tuple[int, ...], **options: Any) -> Any:
    """A function of `ot.batch`."""

    def prepare(generator: torch.Generator) -> Pair:
        import ot.batch

        from otface_cuda.compat import pot

        def side(library: Any) -> Side:
            return Side(lambda *inputs: take(getattr(library, function)(*inputs, **options)))

        return Pair(side(ot.batch), side(pot), tuple(torch.rand(*size, generator=generator) for size in sizes))

    return prepare


def solve(reg: float, weighted: bool, grad: str) -> Any:
    def prepare(generator: torch.Generator) -> Pair:
        import ot.batch

        from otface_cuda.compat import pot

        a, b = (weights(4, 10, generator=generator) if weighted else None for _ in "ab")

        def side(library: Any) -> Side:
            return Side(lambda M: library.solve_batch(M, reg, a, b, grad=grad).value)

        M = torch.rand(4, 10, 10, generator=generator, dtype=torch.float64)
        return Pair(side(ot.batch), side(pot), (M,))

    return prepare


def sinkhorn(function: str, method: str, reg: float, sides: int) -> Any:
    def prepare(generator: torch.Generator) -> Pair:
        import ot

        from otface_cuda.compat import pot

        def side(library: Any) -> Side:
            # Squares, because the sum of a plan is constant.
            return Side(lambda a, b, M: getattr(library, function)(a, b, M, reg, method).square())

        b = weights(max(1, sides), 10, generator=generator).T.contiguous()
        M = torch.rand(10, 10, generator=generator, dtype=torch.float64)
        return Pair(side(ot), side(pot), (weights(10, generator=generator), b if sides else b[:, 0], M))

    return prepare


def pot_case(name: str, label: str, prepare: Any, **more: Any) -> Small:
    return Small(name, label, prepare, module="ot", package="pot", **more)


POINTS = (4, 10, 3), (4, 10, 3)


def value(result: Any) -> Tensor:
    found: Tensor = result.value
    return found


def itself(result: Any) -> Tensor:
    found: Tensor = result
    return found


# ---- the copied layer ----


def layer(generator: torch.Generator) -> Pair:
    from otface_cuda.compat import layers

    original, replacement = (module.SinkhornDistance(eps=0.1, max_iter=100) for module in (sinkhorn_layer, layers))
    points = tuple(torch.rand(1, 10, 2, generator=generator) for _ in range(2))
    return Pair(Side(lambda x, y: original(x, y)[0]), Side(lambda x, y: replacement(x, y)[0]), points)


# ---- insightface ----


class InsightfaceLoss(nn.Module):
    """`CombinedMarginLoss`; `ArcFace` and `CosFace` are the same with fewer settings. It works on its input."""

    def __init__(self, s: float, m1: float, m2: float, m3: float, threshold: float = 0.0) -> None:
        super().__init__()
        self.s, self.m1, self.m2, self.m3, self.threshold = s, m1, m2, m3, threshold

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        rows = torch.where(labels != -1)[0]
        if self.threshold > 0:
            with torch.no_grad():
                is_dirty = (logits > self.threshold).float()
                others = torch.ones(len(rows), logits.shape[1]).scatter_(1, labels[rows], 0)
                is_dirty[rows] *= others
                kept = 1 - is_dirty
            logits = kept * logits
        own = logits[rows, labels[rows].view(-1)]
        if self.m1 == 1 and self.m3 == 0:
            with torch.no_grad():
                own.arccos_()
                logits.arccos_()
                logits[rows, labels[rows].view(-1)] = own + self.m2
                logits.cos_()
        else:
            logits[rows, labels[rows].view(-1)] = own - self.m3
        return logits * self.s


def margin_loss(*settings: float) -> Any:
    def prepare(generator: torch.Generator) -> Pair:
        from otface_cuda.compat.insightface import CombinedMarginLoss

        cosines = 1.8 * torch.rand(8, 10, generator=generator) - 0.9
        labels = torch.randint(10, (8, 1), generator=generator)

        def side(loss: Any) -> Side:
            return Side(lambda cosines: loss(cosines.clone(), labels))

        return Pair(side(InsightfaceLoss(*settings)), side(CombinedMarginLoss(*settings)), (cosines,))

    return prepare


def partial_fc(generator: torch.Generator) -> Pair:
    from otface_cuda.compat.insightface import CombinedMarginLoss, PartialFC_V2

    settings = 64.0, 1.0, 0.5, 0.0
    head = PartialFC_V2(CombinedMarginLoss(*settings), 16, 10)
    weight, margin = head.weight, InsightfaceLoss(*settings)
    labels = torch.randint(10, (8,), generator=generator)

    def original(x: Tensor) -> Tensor:
        cosines = functional.linear(functional.normalize(x), functional.normalize(weight)).clamp(-1, 1)
        return functional.cross_entropy(margin(cosines, labels[:, None]), labels)

    x = torch.randn(8, 16, generator=generator)
    return Pair(Side(original, (weight,)), Side(lambda x: head(x, labels), (weight,)), (x,))


# ---- the OTFace authors' head ----


def official_head(generator: torch.Generator) -> Pair:
    from otface_cuda.compat.otface import ArcFace

    head = ArcFace(16, 10)
    kernel, s, m = head.kernel, head.s, head.m
    labels = torch.randint(10, (8,), generator=generator)

    def original(x: Tensor) -> Tensor:
        cosines = torch.mm(x / x.norm(2, 1, True), kernel / kernel.norm(2, 0, True)).clamp(-1, 1)
        with torch.no_grad():
            plain = cosines.clone()
        own = cosines[torch.arange(len(x)), labels].view(-1, 1)
        with_margin = own * math.cos(m) - torch.sqrt(1 - torch.pow(own, 2)) * math.sin(m)
        with_margin = torch.where(own > math.cos(math.pi - m), with_margin, own - m * math.sin(math.pi - m))
        cosines.scatter_(1, labels.view(-1, 1), with_margin)
        logits, _ = cosines * s, plain * s
        return logits

    x = torch.randn(8, 16, generator=generator)
    return Pair(Side(original, (kernel,)), Side(lambda x: head(x, labels)[0], (kernel,)), (x,))


# ---- pytorch-metric-learning ----


def metric_loss(name: str, of_logits: bool = False) -> Any:
    def prepare(generator: torch.Generator) -> Pair:
        from pytorch_metric_learning import losses

        from otface_cuda.compat import metric_learning

        original, replacement = (
            getattr(module, name)(num_classes=10, embedding_size=16) for module in (losses, metric_learning)
        )
        replacement.load_state_dict(original.state_dict())
        labels = torch.randint(10, (8,), generator=generator)

        def side(loss: Any) -> Side:
            return Side(loss.get_logits if of_logits else lambda x: loss(x, labels), (loss.W,))

        return Pair(side(original), side(replacement), (torch.randn(8, 16, generator=generator),))

    return prepare


def metric_case(name: str, label: str, prepare: Any) -> Small:
    return Small(name, label, prepare, module="pytorch_metric_learning", package="pytorch-metric-learning")


METRIC_LOSSES = ("ArcFaceLoss", "CosFaceLoss", "SphereFaceLoss", "SubCenterArcFaceLoss")

SMALL: dict[str, Small] = {
    case.name: case
    for case in (
        *(
            pot_case(
                f"small-solve_batch-{grad}{'-weights' * weighted}",
                f'solve_batch(grad="{grad}"), 4 of 10 x 10, reg 1, float64' + ", with weights" * weighted,
                solve(1.0, weighted, grad),
                has_gradient=grad != "detach",
            )
            for grad in ("detach", "envelope", "autodiff")
            for weighted in (False, True)
        ),
        *(
            pot_case(
                f"small-dist_batch-{metric}",
                f'dist_batch(metric="{metric}"), 4 of 10 points each, d = 3',
                of_batch("dist_batch", itself, *POINTS, metric=metric),
            )
            for metric in ("sqeuclidean", "euclidean", "minkowski", "kl")
        ),
        pot_case(
            "small-dist_batch-minkowski-3",
            'dist_batch(metric="minkowski", p=3), 4 of 10 points each, d = 3',
            of_batch("dist_batch", itself, *POINTS, metric="minkowski", p=3),
        ),
        pot_case(
            "small-loss_linear_batch",
            "loss_linear_batch, 4 of 10 x 10",
            of_batch("loss_linear_batch", itself, (4, 10, 10), (4, 10, 10)),
        ),
        pot_case(
            "small-loss_linear_samples_batch",
            "loss_linear_samples_batch, 4 of 10 points each, d = 3",
            of_batch("loss_linear_samples_batch", itself, *POINTS, (4, 10, 10)),
        ),
        pot_case(
            "small-solve_sample_batch",
            "solve_sample_batch, 4 of 10 points each, d = 3, reg 1",
            of_batch("solve_sample_batch", value, *POINTS, reg=1.0),
        ),
        *(
            pot_case(
                f"small-{function}-{method}{f'-{sides}' * (sides > 0)}",
                f'{function}(method="{method}"), 10 x 10, reg 1, float64' + f", {sides} right-hand sides" * (sides > 0),
                sinkhorn(function, method, 1.0, sides),
            )
            for function, sides in (("sinkhorn", 0), ("sinkhorn2", 3))
            for method in ("sinkhorn", "sinkhorn_log")
        ),
        Small("small-SinkhornDistance", "SinkhornDistance(0.1, 100), 10 points each", layer, note=from_formulas),
        *(
            Small(
                f"small-CombinedMarginLoss-{name}",
                f"CombinedMarginLoss{settings}, 8 x 10",
                margin_loss(*settings),
                note=from_formulas,
            )
            for name, settings in (
                ("arc", (64.0, 1.0, 0.5, 0.0)),
                ("cos", (64.0, 1.0, 0.0, 0.4)),
                ("filtered", (64.0, 1.0, 0.5, 0.0, 0.4)),
            )
        ),
        Small("small-PartialFC_V2", "PartialFC_V2 with ArcFace, 8 x 10, d = 16", partial_fc, note=from_formulas),
        Small("small-ArcFace", "the official ArcFace head, 8 x 10, d = 16", official_head, note=from_formulas),
        *(metric_case(f"small-{name}", f"{name}, 8 x 10, d = 16", metric_loss(name)) for name in METRIC_LOSSES),
        metric_case("small-get_logits", "ArcFaceLoss.get_logits, 8 x 10, d = 16", metric_loss("ArcFaceLoss", True)),
    )
}

"""Who takes part in the margin benchmark: this package, as it chooses to work and the other way, and its peers.

To add one, write a subclass of ``Peer`` and add an instance to ``PEERS``. ``prepare`` does what a user does once and
returns a call that computes the mean loss and its gradients in x and weight, as an ``Answer``. Rules: the same formula
(ArcFace, exact gradient), float32 or autocast as the row says, the fastest setting that its documentation gives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from harness import Library
from margin_problems import MARGIN, SCALE, Answer, Problem, Row, arcface_logits
from torch import Tensor
from torch.nn import functional


class Peer(Library, ABC):
    def products(self, row: Row) -> int:
        """Of x, weight and logits, that it needs: x W^T, G W, G^T x."""
        return 3

    @abstractmethod
    def needs(self, row: Row) -> int:
        """Bytes beyond weight and x, about: what is prepared and the peak of a call."""

    @abstractmethod
    def prepare(self, problem: Problem) -> Callable[[], Answer]:
        """What is timed."""


def with_gradients(loss: Callable[[Tensor, Tensor], Tensor], problem: Problem) -> Callable[[], Answer]:
    """The loss of x and weight, and torch's autograd for the gradients; under autocast if the row says so."""
    autocast = problem.row.dtype != "float32"
    dtype = getattr(torch, problem.row.dtype)

    def call() -> Answer:
        x, weight = (t.detach().requires_grad_() for t in (problem.x, problem.weight))
        with torch.autocast(problem.x.device.type, dtype, enabled=autocast):
            value = loss(x, weight)
        return Answer(value.detach(), *torch.autograd.grad(value, (x, weight)))

    return call


class Ours(Peer):
    name = "otface_cuda"
    label = "otface_cuda"
    module = "otface_cuda"
    package = "otface_cuda"

    def stores(self, row: Row) -> bool:
        """By default, small logits."""
        from otface_cuda.margin_softmax import STORED_BYTES

        return row.logits_bytes <= STORED_BYTES

    def products(self, row: Row) -> int:
        return 3 if self.stores(row) else 4  # the logits once more in the backward pass

    def needs(self, row: Row) -> int:
        return row.weight_bytes + 2**28 + self.stores(row) * row.logits_bytes

    def prepare(self, problem: Problem) -> Callable[[], Answer]:
        import otface_cuda

        margin, stores = otface_cuda.ArcFace(MARGIN), self.stores(problem.row)

        def loss(x: Tensor, weight: Tensor) -> Tensor:
            return otface_cuda.margin_softmax_loss(
                x, weight, problem.labels, margin=margin, scale=SCALE, store_logits=stores
            )

        return with_gradients(loss, problem)


class OursOther(Ours):
    name = "otface_cuda-other"
    label = "otface_cuda, the other way"
    note = (
        "otface_cuda chooses store_logits=True, for one product less, where the logits occupy at most 48 MiB; here the "
        "opposite"
    )

    def stores(self, row: Row) -> bool:
        return not super().stores(row)


def naive_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    cos = functional.linear(functional.normalize(x), functional.normalize(weight)).float()
    return functional.cross_entropy(
        arcface_logits(cos, torch.arange(len(labels), device=labels.device), labels), labels
    )


class Naive(Peer):
    name = "naive"
    label = "naive torch"
    note = "as insightface: both normalised, F.linear, the margin on the target by arccos, F.cross_entropy"

    def needs(self, row: Row) -> int:
        return 4 * row.weight_bytes + 4 * row.logits_bytes

    def prepare(self, problem: Problem) -> Callable[[], Answer]:
        return with_gradients(lambda x, weight: naive_loss(x, weight, problem.labels), problem)


class Compiled(Naive):
    name = "compiled"
    label = "torch.compile of it"
    note = "torch.compile(dynamic=False) of naive torch"

    def prepare(self, problem: Problem) -> Callable[[], Answer]:
        torch.compiler.reset()  # each row is compiled for its sizes
        loss = torch.compile(naive_loss, dynamic=False)
        return with_gradients(lambda x, weight: loss(x, weight, problem.labels), problem)


class MetricLearning(Peer):
    name = "pytorch-metric-learning"
    label = "pytorch-metric-learning"
    module = "pytorch_metric_learning"
    package = "pytorch-metric-learning"
    note = "losses.ArcFaceLoss; its weight is (d, C)"

    def needs(self, row: Row) -> int:
        return 5 * row.weight_bytes + 8 * row.logits_bytes

    def prepare(self, problem: Problem) -> Callable[[], Answer]:
        from pytorch_metric_learning import losses

        row = problem.row
        head = losses.ArcFaceLoss(row.classes, row.dimension, margin=math.degrees(MARGIN), scale=SCALE)
        head.W = torch.nn.Parameter(problem.weight.T.contiguous())

        def call() -> Answer:
            x = problem.x.detach().requires_grad_()
            with torch.autocast(x.device.type, getattr(torch, row.dtype), enabled=row.dtype != "float32"):
                value = head(x, problem.labels)
            grad_x, grad_weight = torch.autograd.grad(value, (x, head.W))
            return Answer(value.detach(), grad_x, grad_weight.T)

        return call


OURS = Ours()
OTHER = OursOther()
PEERS: dict[str, Peer] = {peer.name: peer for peer in (Naive(), Compiled(), MetricLearning())}
EVERYONE: dict[str, Peer] = {peer.name: peer for peer in (OURS, OTHER, *PEERS.values())}

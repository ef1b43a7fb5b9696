"""A nested tensor, strided or jagged, is refused by name wherever a tensor is taken; the message says what to pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import otface_cuda
from otface_cuda.compat import insightface, layers, metric_learning, otface, pot

B, N, M, D, C = 3, 4, 5, 2, 6


class Target(NamedTuple):
    call: Callable[..., Any]
    where: str  # what the message calls it
    arguments: dict[str, Tensor]
    settings: dict[str, Any]
    # What may be padded, with lengths that say how far.
    takes_lengths: tuple[str, ...] = ()
    # Of what another function looks at: its name and that of its argument.
    passed_on: Mapping[str, tuple[str, str]] = MappingProxyType({})


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def uniform(size: int) -> Tensor:
    return torch.full((B, size), 1 / size)


LABELS = torch.tensor([0, 1, 2])
SOLVER = {"eps": torch.ones(B), "tol": torch.zeros(B)}
LENGTHS = {"row_lengths": torch.tensor([1, 2, 3]), "col_lengths": torch.tensor([1, 2, 3])}
HEAD = {"margin": otface_cuda.ArcFace(0.3), "scale": 8.0}
OF_SINKHORN = {"cost": rand(B, N, M), "a": uniform(N), "b": uniform(M), **LENGTHS}
OF_POINTS = {"x": rand(B, N, D), "y": rand(B, M, D), "a": uniform(N), "b": uniform(M), **LENGTHS}
OF_PAIRS = {
    "features": rand(B, N, D),
    "pairs": torch.tensor([[0, 1], [1, 2], [2, 0]]),
    "a": uniform(N),
    "b": uniform(N),
}
OF_HEAD = {"x": rand(B, D), "labels": LABELS}
OF_OTFACE = {"embeddings": rand(B, D), "feature_map": rand(B, N, D), "labels": LABELS}
OF_BATCH = {"M": rand(B, N, M), "a": uniform(N), "b": uniform(M), "reg": torch.ones(B), **LENGTHS}
OF_SAMPLES = {"X_a": rand(B, N, D), "X_b": rand(B, M, D), "a": uniform(N), "b": uniform(M), **LENGTHS}
OF_POT = {"a": uniform(N)[0], "b": uniform(M)[0], "M": rand(N, M)}
OF_OFFICIAL = {"embeddings": rand(B, D), "conv_features": rand(B, D, 2, 2), "label": LABELS}
AS_BATCH = {name: ("solve_batch", name) for name in ("a", "b", *LENGTHS)}
AS_LOSS = {"labels": ("margin_softmax_loss", "labels")}

TARGETS = [
    Target(otface_cuda.sinkhorn, "sinkhorn", OF_SINKHORN | SOLVER, {}, ("cost", "a", "b")),
    Target(otface_cuda.sinkhorn_points, "sinkhorn_points", OF_POINTS | SOLVER, {}, ("x", "y", "a", "b")),
    Target(otface_cuda.sinkhorn_pairs, "sinkhorn_pairs", OF_PAIRS | SOLVER, {}),
    Target(otface_cuda.Sinkhorn(1.0), "sinkhorn", OF_SINKHORN, {}, ("cost", "a", "b")),
    Target(otface_cuda.Sinkhorn, "Sinkhorn", SOLVER, {}),
    Target(otface_cuda.SinkhornPoints, "SinkhornPoints", SOLVER, {}),
    Target(otface_cuda.SinkhornPairs, "SinkhornPairs", SOLVER, {}),
    Target(otface_cuda.cosine_margin_logits, "cosine_margin_logits", OF_HEAD | {"weight": rand(C, D)}, HEAD),
    Target(
        otface_cuda.margin_softmax_loss,
        "margin_softmax_loss",
        OF_HEAD | {"weight": rand(C, D), "class_weight": rand(C)},
        HEAD,
    ),
    Target(otface_cuda.mine_hard_triplets, "mine_hard_triplets", {"embeddings": rand(B, D), "labels": LABELS}, {}),
    Target(
        otface_cuda.ot_triplet_loss,
        "ot_triplet_loss",
        {"feature_map": rand(B, N, D), "triplets": torch.tensor([[0, 1, 2]])},
        {},
    ),
    Target(otface_cuda.CosineMarginLogits(C, D), "cosine_margin_logits", OF_HEAD, {}),
    Target(otface_cuda.MarginSoftmaxLoss(C, D), "margin_softmax_loss", OF_HEAD, {}),
    Target(
        otface_cuda.OTFaceLoss(C, D), "OTFaceLoss", OF_OTFACE, {}, (), {"labels": ("margin_softmax_loss", "labels")}
    ),
    Target(pot.solve_batch, "solve_batch", OF_BATCH, {}, ("M", "a", "b")),
    Target(
        pot.solve_sample_batch,
        "solve_sample_batch",
        OF_SAMPLES,
        {"reg": 1.0},
        ("X_a", "X_b", "a", "b"),
    ),
    Target(pot.dist_batch, "dist_batch", {"X1": rand(B, N, D), "X2": rand(B, M, D)}, {}),
    Target(pot.loss_linear_batch, "loss_linear_batch", {"M": rand(B, N, M), "T": rand(B, N, M)}, {}),
    Target(pot.sinkhorn, "sinkhorn", OF_POT, {"reg": 1.0}),
    Target(pot.sinkhorn2, "sinkhorn2", OF_POT, {"reg": 1.0}),
    Target(layers.SinkhornDistance(1.0, 5), "SinkhornDistance", {"x": rand(B, N, D), "y": rand(B, M, D)}, {}),
    Target(layers.SinkhornDistanceCost(1.0, 5), "SinkhornDistanceCost", {"C": rand(B, N, M)}, {}),
    Target(otface.ArcFace(D, C), "ArcFace", {"embeddings": rand(B, D), "label": LABELS}, {}),
    Target(otface.OTFace_Arcface(D, C), "OTFace_Arcface", OF_OFFICIAL, {"epoch": 0}),
    Target(insightface.ArcFace(), "ArcFace", {"logits": rand(B, C), "labels": LABELS}, {}),
    Target(
        insightface.PartialFC_V2(insightface.ArcFace(), D, C),
        "PartialFC_V2",
        {"local_embeddings": rand(B, D), "local_labels": LABELS},
        {},
    ),
    Target(metric_learning.ArcFaceLoss(C, D), "ArcFaceLoss", {"embeddings": rand(B, D), "labels": LABELS}, {}),
]


def nested(x: Tensor, layout: torch.layout) -> Tensor:
    """Of the dtype of x and with a row less in one of its parts, where it has one."""
    parts = [part.clone() for part in (x if x.dim() > 1 else x[:, None])]
    if len(parts) > 1 and parts[0].shape[0] > 1:
        parts[0] = parts[0][:-1]
    return torch.nested.nested_tensor(parts, layout=layout)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize(
    ("target", "name"),
    [pytest.param(t, name, id=f"{t.call.__module__}.{t.where}-{name}") for t in TARGETS for name in t.arguments],
)
def test_message(target: Target, name: str, layout: torch.layout) -> None:
    arguments = target.arguments | {name: nested(target.arguments[name], layout)}
    with pytest.raises(TypeError) as caught:
        target.call(**arguments, **target.settings)
    where, called = target.passed_on.get(name, (target.where, name))
    expected = f"{where}: `{called}` must be a dense tensor, got a nested one"
    if target.arguments[name].dim() > 1 and target.arguments[name].is_floating_point():
        expected += f"; pass a padded one, as `torch.nested.to_padded_tensor({called}, 0.0)` makes it"
    if name in target.takes_lengths:
        expected += ", with its sizes as `row_lengths` and `col_lengths`"
    assert str(caught.value) == expected

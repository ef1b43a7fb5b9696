"""The margin functions and the OTFace loss on CUDA tensors without data: results lie where they should, and nothing
asks for data, which on a GPU would wait for it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import otface_cuda
from otface_cuda import margin_softmax, mining, ot_triplet

from .fake_cuda import WaitError, fake_tensors, ones, rand  # noqa: F401
from .problems import DTYPES, output_dtype

pytestmark = pytest.mark.either_torch

B, C, D, T = 8, 30, 6, 12
SETTINGS: dict[str, Any] = {"margin": otface_cuda.ArcFace(0.5), "scale": 64.0}


def check(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert (out.shape, out.dtype, out.device) == (shape, dtype, torch.device("cuda:0"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_margin_functions(requires_grad: bool, dtype: torch.dtype) -> None:
    x, weight = (rand(n, D, dtype=dtype).requires_grad_(requires_grad) for n in (B, C))
    logits = otface_cuda.cosine_margin_logits(x, weight, ones(B), **SETTINGS)
    check(logits, (B, C), output_dtype(dtype))
    options: dict[str, Any]
    for options in (
        {},
        {"reduction": "sum", "store_logits": False},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "class_weight": rand(C)},
    ):
        loss = otface_cuda.margin_softmax_loss(x, weight, ones(B), **SETTINGS, **options)
        check(loss, (), output_dtype(dtype))
        assert loss.requires_grad == requires_grad
    rows = otface_cuda.margin_softmax_loss(x, weight, ones(B).int(), **SETTINGS, reduction="none")
    check(rows, (B,), output_dtype(dtype))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(half: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products read the half type; parameters stay float32. Without a GPU, torch does not enable autocast."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: half)
    x, weight = rand(B, D, dtype=half), rand(C, D)
    arguments = margin_softmax._check_inputs("loss", x, weight, ones(B))
    assert margin_softmax._product_dtype(arguments[0]) == half
    check(otface_cuda.margin_softmax_loss(x, weight, ones(B), **SETTINGS), (), torch.float32)


def test_otface_loss() -> None:
    loss = otface_cuda.OTFaceLoss(C, D, max_triplets=T, device="cuda")
    x, maps = rand(B, D).requires_grad_(), rand(B, 5, 3, 3).requires_grad_()
    out = loss(x, maps, ones(B))
    for name in ("loss", "margin_loss", "ot_loss"):
        check(getattr(out, name), (), torch.float32)
    for name in ("n_hard", "n_active"):
        check(getattr(out, name), (), torch.int64)


def test_bodies_of_the_operators() -> None:
    """What the operators do that are opaque to tracing: without `max_triplets` mining has to ask how many there are."""
    x, labels, points = rand(B, D), ones(B), rand(B, 9, 5)
    alpha, numbers = (torch.tensor(x, dtype=torch.float64) for x in ([0.0], [1.0, 0.0]))
    triplets = mining._hardest(x, labels, alpha, T, -1)
    check(triplets, (T, 3), torch.int64)
    with pytest.raises(Exception, match=r"nonzero|mask|data"):
        mining._all_hard(x, labels, 0.0, -1)
    for keep in (False, True):
        loss, n_hard, n_active, hinge, kept = ot_triplet._forward(
            points, triplets, numbers, 10, "cosine", 1 << 20, keep
        )
        check(loss, (), torch.float32)
        check(n_hard, (), torch.int64)
        check(n_active, (), torch.int64)
        check(hinge, (T,), torch.float32)
        grad = ot_triplet._backward(points, triplets, hinge, kept, loss, numbers, 10, "cosine", 1 << 20)
        check(grad, tuple(points.shape), torch.float32)


def test_these_tests_notice_what_waits() -> None:
    with pytest.raises(WaitError):
        rand(3)[rand(3) > 0]

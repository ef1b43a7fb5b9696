"""Logits with a margin on the target's cosine, and their softmax loss without ever holding large logits."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import _checks, margin_autograd
from ._numbers import number_tensor
from .autograd import needs_graph, real_dtype
from .margins import Margin

REDUCTIONS = ("none", "mean", "sum")

# What a chunk of classes occupies by default: on the CPU it stays in the cache, on a GPU it keeps the device busy.
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
# Cosines that occupy no more than this are stored by default, for the product that it saves.
STORED_BYTES = 48 << 20


def cosine_margin_logits(
    x: Tensor, weight: Tensor, labels: Tensor, *, margin: Margin, scale: float, ignore_index: int = -100
) -> Tensor:
    r"""Logits of a classifier by angles: scale cos(theta), but scale margin(cos(theta)) for each row's own class.

    With cos(theta_bj) = <x_b, w_j> / (\|x_b\| \|w_j\|), where a zero row of either has cosine 0 with everything. The
    result is for ``F.cross_entropy``; :func:`margin_softmax_loss` is both in one, in far less memory.

    Args:
        x: embeddings (B, d), of any length; float64, float32, bfloat16 or float16.
        weight: one row per class (C, d), of any length, in the dtype of x; as of ``nn.Linear(d, C, bias=False)``. No
            normalised copy of it is made.
        labels: classes (B,), an integer dtype, from 0 to C - 1 or ``ignore_index``.
        margin: :class:`ArcFace`, :class:`CosFace`, :class:`SphereFace` or :class:`CombinedMargin`.
        scale: positive; the s of the papers, often 64 or 30.
        ignore_index: rows with this label get plain logits, without a margin.

    Returns:
        (B, C), float64 for float64 inputs, else float32. Gradients in x and weight: the exact derivative, also
        at \|cos\| = 1, or as ``margin.grad`` says. For half types and under autocast on CUDA, the products are done in
        the half type and added up in float32, and everything else is float32; on the CPU all is float32.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came. Labels on a CUDA device
            are looked at only if the environment has ``OTFACE_CHECK=1``; without it one that is out of range makes its
            own row NaN.

    >>> from otface_cuda import CosFace
    >>> x, weight = torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, 2.0], [-3.0, 0.0]])
    >>> cosine_margin_logits(x, weight, torch.tensor([0, 1]), margin=CosFace(0.5), scale=10.0)
    tensor([[  2.0711,   0.0000, -10.0000],
            [  7.0711,   5.0000,   0.0000]])
    """
    where = "cosine_margin_logits"
    x, weight, labels = _check_inputs(where, x, weight, labels)
    m1, m2, m3, *form = check_margin(where, margin).kernel_form()
    numbers = number_tensor(m1, m2, m3, check_scale(where, scale))
    settings = margin_autograd.LogitsSettings(
        where, tuple(form), check_index(where, ignore_index), _product_dtype(x), CHUNK_BYTES[x.device.type]
    )
    _checks.check_classes(where, labels, weight.shape[0], settings.ignore_index)
    if needs_graph(x, weight):
        out: Tensor = margin_autograd.CosineMarginLogits.apply(x, weight, labels, numbers, settings)
        return out
    return margin_autograd.logits(x, weight, labels, numbers, settings)[0]


def margin_softmax_loss(
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
    store_logits: bool | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    r"""The cross entropy of :func:`cosine_margin_logits`, without the (B, C) logits where these are large.

    loss_b = log sum_j exp(logit_bj) - logit_{b, label_b}; the classes are taken in chunks, and once more for the
    gradient. The arguments beyond those of :func:`cosine_margin_logits` mean what they mean in ``F.cross_entropy``,
    whose results these are to rounding; small losses, which float32 rounds to zero there, keep their digits.

    Args:
        x, weight, labels, margin, scale: as in :func:`cosine_margin_logits`.
        reduction: ``"mean"``: over the rows that are not ignored, weighted by the class weights of their labels (NaN
            where there is none); ``"sum"``; or ``"none"``: the loss of each row (B,).
        ignore_index: rows with this label have loss 0 and gradient 0, whatever is in them.
        label_smoothing: from 0 to 1; the share of the target that is spread over all classes.
        class_weight: (C,) weights of the classes in the loss, not negative, without gradient; ``weight`` in
            ``F.cross_entropy``.
        store_logits: keep (B, C) numbers for the gradient, rather than compute them again: three matrix products
            instead of four. By default, where they occupy at most 48 MiB.
        chunk_bytes: what a chunk of classes may occupy, with its products, its weights and their gradients; at least
            64 classes are taken at a time. By default 4 MiB on the CPU and 64 MiB on CUDA. Changes rounding only.

    Returns:
        A scalar, or (B,); float64 for float64 inputs, else float32. Gradients in x and weight, as in
        :func:`cosine_margin_logits`. Beside these, and C numbers, the memory is that of a chunk
        and of what is stored.

    Raises:
        TypeError, ValueError: as in :func:`cosine_margin_logits`.

    >>> from otface_cuda import ArcFace
    >>> x, weight = torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, 2.0], [-3.0, 0.0]])
    >>> margin_softmax_loss(x, weight, torch.tensor([0, 1]), margin=ArcFace(0.5), scale=10.0)
    tensor(0.1127)
    """
    where = "margin_softmax_loss"
    x, weight, labels = _check_inputs(where, x, weight, labels)
    check_reduction(where, reduction)
    m1, m2, m3, *form = check_margin(where, margin).kernel_form()
    smoothing = check_smoothing(where, label_smoothing)
    numbers = number_tensor(m1, m2, m3, check_scale(where, scale), smoothing)
    chunk_bytes = check_chunk_bytes(where, chunk_bytes)
    store_logits = check_store(where, store_logits)
    with_graph = needs_graph(x, weight)
    settings = margin_autograd.LossSettings(
        where,
        tuple(form),
        check_index(where, ignore_index),
        _product_dtype(x),
        CHUNK_BYTES[x.device.type] if chunk_bytes is None else chunk_bytes,
        with_graph and _stores(store_logits, x, weight),
    )
    u = None if class_weight is None else _operator_class_weight(where, class_weight, x, weight)
    kept = _checks.count_labels(where, labels, weight.shape[0], settings.ignore_index)
    inputs = margin_autograd.LossInputs(labels, numbers, u, _weight_sum(u, x, weight) if smoothing > 0 else None)
    if with_graph:
        losses: Tensor = margin_autograd.MarginSoftmaxLoss.apply(x, weight, *inputs, settings)
    else:
        losses = margin_autograd.losses(x, weight, inputs, settings)[0]
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if u is not None:
        counted = labels != settings.ignore_index
        return losses.sum() / (u[labels.clamp(0, weight.shape[0] - 1)] * counted).sum()
    return losses.sum() / ((labels != settings.ignore_index).sum() if kept is None else kept)


def _check_inputs(where: str, x: Any, weight: Any, labels: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The three as the operators take them."""
    _checks.check_floating(where, "x", x, "(B, d)", (2,))
    _checks.check_floating(where, "weight", weight, "(C, d)", (2,))
    _checks.check_has_kernels(where, "x", x)
    _checks.check_device(where, "weight", weight, "x", x)
    if x.shape[1] == 0:
        raise _checks.wrong_value(where, "x", "of shape (B, d) with d >= 1", x)
    if weight.shape[1] != x.shape[1] or weight.shape[0] == 0:
        raise _checks.wrong_value(where, "weight", f"of shape (C, {x.shape[1]}) with C >= 1 to go with `x`", weight)
    if x.dtype != weight.dtype:
        autocast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
        if not autocast:
            raise _checks.wrong_type(where, "weight", f"of the dtype of `x` ({x.dtype})", weight)
    labels = _checks.class_labels(where, labels, "x", x)
    return _adjacent_columns(x), _adjacent_columns(weight), labels


def _adjacent_columns(x: Tensor) -> Tensor:
    """Itself, or a copy where its rows are not contiguous or overlap."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the matrix products read."""
    if x.device.type == "cpu" or x.dtype == torch.float64:
        return real_dtype(x)
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def _stores(store_logits: bool | None, x: Tensor, weight: Tensor) -> bool:
    if store_logits is not None:
        return store_logits
    return x.shape[0] * weight.shape[0] * real_dtype(x).itemsize <= STORED_BYTES


def _weight_sum(u: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    if u is None:
        return torch.full((1,), float(weight.shape[0]), dtype=torch.float64, device=x.device)
    return u.double().sum().reshape(1)


# The settings: of the functions in each call, of the modules as soon as they are given.


def check_margin(where: str, margin: Any) -> Margin:
    if not isinstance(margin, Margin):
        raise _checks.wrong_type(where, "margin", "a margin such as otface_cuda.ArcFace(0.5)", margin)
    return margin


def check_scale(where: str, scale: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (Real, torch.SymFloat, torch.SymInt)):
        raise _checks.wrong_type(where, "scale", "a positive float", scale)
    if not 0 < float(scale) < math.inf:
        raise _checks.wrong_value(where, "scale", "positive and finite", scale)
    return float(scale)


def check_reduction(where: str, reduction: Any) -> str:
    _checks.check_choice(where, "reduction", reduction, REDUCTIONS)
    return str(reduction)


def check_index(where: str, ignore_index: Any) -> int:
    return _checks.check_int(where, "ignore_index", ignore_index, -(2**63))


def check_smoothing(where: str, label_smoothing: Any) -> float:
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (Real, torch.SymFloat, torch.SymInt)):
        raise _checks.wrong_type(where, "label_smoothing", "a float from 0 to 1", label_smoothing)
    if not 0 <= float(label_smoothing) <= 1:
        raise _checks.wrong_value(where, "label_smoothing", "from 0 to 1", label_smoothing)
    return float(label_smoothing)


def check_store(where: str, store_logits: Any) -> bool | None:
    if not (store_logits is None or isinstance(store_logits, bool)):
        raise _checks.wrong_type(where, "store_logits", "True, False or None", store_logits)
    return store_logits


def check_chunk_bytes(where: str, chunk_bytes: Any) -> int | None:
    return None if chunk_bytes is None else _checks.check_int(where, "chunk_bytes", chunk_bytes, 1)


def _operator_class_weight(where: str, class_weight: Any, x: Tensor, weight: Tensor) -> Tensor:
    """(C,) in the dtype of the arithmetic."""
    u = check_class_weight(where, class_weight, weight.shape[0])
    _checks.check_device(where, "class_weight", u, "x", x)
    return u.to(real_dtype(x)).contiguous()


def check_class_weight(where: str, class_weight: Any, classes: int) -> Tensor:
    _checks.check_floating(where, "class_weight", class_weight, "(C,)", (1,))
    if class_weight.shape != (classes,):
        raise _checks.wrong_value(where, "class_weight", f"of shape ({classes},)", class_weight)
    if class_weight.requires_grad:
        raise ValueError(
            f"{where}: `class_weight` must not require grad, its gradient is not computed; pass `class_weight.detach()`"
        )
    if _checks.checks_data(class_weight):
        wrong = ~((class_weight >= 0) & class_weight.isfinite())
        if wrong.any():
            j = int(wrong.nonzero()[0])
            raise ValueError(
                f"{where}: `class_weight` must be finite and not negative, got {class_weight[j].item()} for class {j}"
            )
    u: Tensor = class_weight
    return u

"""The operators `torch.ops.otface.margin_*` under torch's autograd, and what tracing needs to know of them.

Everything here is checked: see `margin_softmax.py` for the arguments that users give.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import once_differentiable, real_dtype

_ops = torch.ops.otface


class LogitsSettings(NamedTuple):
    """What a compiled graph may take for constants; what may change from step to step is in ``numbers``."""

    where: str  # the user's function, for messages
    form: tuple[int, ...]  # of the margin: beyond_pi, easy, straight_through
    ignore_index: int
    product_dtype: torch.dtype
    chunk_bytes: int


class LossSettings(NamedTuple):
    where: str
    form: tuple[int, ...]
    ignore_index: int
    product_dtype: torch.dtype
    chunk_bytes: int
    store_logits: bool


class LossInputs(NamedTuple):
    """What has no gradient."""

    labels: Tensor
    numbers: Tensor  # (5,) float64, on the CPU: m1, m2, m3, scale, label_smoothing
    class_weight: Tensor | None
    weight_sum: Tensor | None  # (1,) float64: of the class weights, where labels are smoothed


def logits(x: Tensor, weight: Tensor, labels: Tensor, numbers: Tensor, s: LogitsSettings) -> tuple[Tensor, ...]:
    """logits, and what the gradient needs. `numbers` are those of the loss without the last."""
    out: tuple[Tensor, ...] = _ops.margin_logits_forward.default(
        x, weight, labels, numbers, *s.form, s.ignore_index, s.product_dtype, s.chunk_bytes
    )
    return out


def losses(x: Tensor, weight: Tensor, inputs: LossInputs, s: LossSettings) -> tuple[Tensor, ...]:
    """The loss of each row, and what the gradient needs."""
    labels, numbers, class_weight, weight_sum = inputs
    out: tuple[Tensor, ...] = _ops.margin_softmax_forward.default(
        x, weight, labels, class_weight, weight_sum, numbers, *s.form, s.ignore_index, s.product_dtype, s.chunk_bytes,
        s.store_logits,
    )  # fmt: skip
    return out


class CosineMarginLogits(torch.autograd.Function):
    """x and weight to logits."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, weight: Tensor, labels: Tensor, numbers: Tensor, settings: LogitsSettings
    ) -> Tensor:
        result, *kept = logits(x, weight, labels, numbers, settings)
        ctx.settings = settings
        ctx.save_for_backward(x, weight, numbers, *kept)
        return result

    @staticmethod
    def backward(ctx, grad_logits: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        s, wanted = ctx.settings, ctx.needs_input_grad[:2]
        x, weight, numbers, scaled_x, rows, inverse_norms, exponents = ctx.saved_tensors
        with torch.no_grad():
            grads = _ops.margin_logits_backward.default(
                scaled_x, weight, rows, inverse_norms, exponents, grad_logits, numbers, s.chunk_bytes, *wanted
            )
        return *_finish(s.where, grads, wanted, (x, weight, grad_logits)), None, None, None


class MarginSoftmaxLoss(torch.autograd.Function):
    """x and weight to the loss of each row."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        numbers: Tensor,
        class_weight: Tensor | None,
        weight_sum: Tensor | None,
        settings: LossSettings,
    ) -> Tensor:
        result, *kept = losses(x, weight, LossInputs(labels, numbers, class_weight, weight_sum), settings)
        ctx.settings = settings
        ctx.save_for_backward(x, weight, numbers, class_weight, weight_sum, *kept)
        return result

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        s, wanted = ctx.settings, ctx.needs_input_grad[:2]
        x, weight, numbers, class_weight, weight_sum, scaled_x, rows, inverse_norms, exponents, cosines = (
            ctx.saved_tensors
        )
        with torch.no_grad():
            grads = _ops.margin_softmax_backward.default(
                scaled_x, weight, rows, inverse_norms, exponents, cosines, class_weight, weight_sum,
                grad_loss.contiguous(), numbers, s.chunk_bytes, *wanted,
            )  # fmt: skip
        return *_finish(s.where, grads, wanted, (x, weight, grad_loss)), None, None, None, None, None


def _finish(
    where: str, grads: tuple[Tensor, Tensor], wanted: tuple[bool, bool], inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    grad_x = None if grad_x is None else grad_x.to(inputs[0].dtype)
    return once_differentiable(where, (grad_x, grad_weight), inputs)


def _fake_saved(x: Tensor, weight: Tensor, product_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, d = x.shape
    return (
        x.new_empty((B, d), dtype=product_dtype),
        x.new_empty((B, 9), dtype=torch.float64),
        x.new_empty((weight.shape[0],), dtype=real_dtype(x)),
        x.new_empty((weight.shape[0] + 1,), dtype=torch.int32),
    )


@torch.library.register_fake("otface::margin_softmax_forward")
def _(x, weight, *args):  # type: ignore[no-untyped-def]
    product_dtype, _, store_logits = args[-3:]
    real, B = real_dtype(x), x.shape[0]
    cosines = x.new_empty((B * weight.shape[0] if store_logits else 0,), dtype=real)
    return x.new_empty((B,), dtype=real), *_fake_saved(x, weight, product_dtype), cosines


@torch.library.register_fake("otface::margin_logits_forward")
def _(x, weight, *args):  # type: ignore[no-untyped-def]
    logits = x.new_empty((x.shape[0], weight.shape[0]), dtype=real_dtype(x))
    return logits, *_fake_saved(x, weight, args[-2])


def _fake_gradients(scaled_x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    want_x, want_weight = args[-2:]
    return (
        scaled_x.new_empty(scaled_x.shape if want_x else (0,), dtype=real_dtype(scaled_x)),
        weight.new_empty(weight.shape if want_weight else (0,)),
    )


torch.library.register_fake("otface::margin_softmax_backward")(_fake_gradients)
torch.library.register_fake("otface::margin_logits_backward")(_fake_gradients)

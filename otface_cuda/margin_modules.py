"""`nn.Module` twins of the margin functions: they hold the class weights, and the settings as attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import _checks, margin_softmax
from .margin_softmax import cosine_margin_logits, margin_softmax_loss
from .margins import ArcFace, Margin

if TYPE_CHECKING:
    from ._typing import called_as

_ARCFACE = ArcFace(0.5)

Checks = Mapping[str, Callable[[str, Any], Any]]

LOGITS_CHECKS: Checks = {
    "margin": margin_softmax.check_margin,
    "scale": margin_softmax.check_scale,
    "ignore_index": margin_softmax.check_index,
}
LOSS_CHECKS: Checks = {
    "margin": margin_softmax.check_margin,
    "scale": margin_softmax.check_scale,
    "reduction": margin_softmax.check_reduction,
    "ignore_index": margin_softmax.check_index,
    "label_smoothing": margin_softmax.check_smoothing,
    "store_logits": margin_softmax.check_store,
    "chunk_bytes": margin_softmax.check_chunk_bytes,
}


class MarginHead(nn.Module):
    """What all heads have: class weights (C, d), and settings, which are attributes that ``forward`` reads.

    A setting is checked when it is given and whenever it is assigned; a wrong one is refused by the name of the class.
    """

    checks: ClassVar[Checks] = {}  # by the name of the setting, in the order in which they are shown
    weight: nn.Parameter

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **settings: Any,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        self.num_classes = _checks.check_int(where, "num_classes", num_classes, 1)
        self.embedding_size = _checks.check_int(where, "embedding_size", embedding_size, 1)
        if "class_weight" in settings:
            self.register_buffer("class_weight", None, persistent=False)
        for name, value in settings.items():
            setattr(self, name, value)
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size, device=device, dtype=dtype))
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        where = type(self).__name__
        if name in self.checks:
            value = self.checks[name](where, value)
        elif name == "class_weight" and value is not None:
            value = margin_softmax.check_class_weight(where, value, self.num_classes)
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Draw the class weights anew, normal with standard deviation 0.01; only their directions matter."""
        nn.init.normal_(self.weight, std=0.01)

    def extra_repr(self) -> str:
        settings = "".join(f", {name}={getattr(self, name)!r}" for name in self.checks)
        return f"num_classes={self.num_classes}, embedding_size={self.embedding_size}{settings}"


class CosineMarginLogits(MarginHead):
    """:func:`otface_cuda.cosine_margin_logits` with class weights (C, d), compatible with those of
    ``nn.Linear(embedding_size, num_classes, bias=False)``.

    ``forward(x, labels)`` -> logits (B, C). Arguments as of the function, with ``margin=ArcFace(0.5)`` and
    ``scale=64.0``. They are attributes, and may be assigned at any time, as for :class:`MarginSoftmaxLoss`.

    >>> head = CosineMarginLogits(num_classes=10, embedding_size=4)
    >>> head
    CosineMarginLogits(num_classes=10, embedding_size=4, margin=ArcFace(m=0.5, beyond_pi='monotone', \
easy_margin=False, grad='exact'), scale=64.0, ignore_index=-100)
    >>> head(torch.randn(3, 4), torch.tensor([0, 7, 2])).shape
    torch.Size([3, 10])
    """

    checks = LOGITS_CHECKS
    margin: Margin
    scale: float
    ignore_index: int

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        margin: Margin = _ARCFACE,
        scale: float = 64.0,
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_classes, embedding_size, device, dtype, margin=margin, scale=scale, ignore_index=ignore_index
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return cosine_margin_logits(
            x, self.weight, labels, margin=self.margin, scale=self.scale, ignore_index=self.ignore_index
        )

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class MarginSoftmaxLoss(MarginHead):
    """:func:`otface_cuda.margin_softmax_loss` with class weights (C, d), compatible with those of
    ``nn.Linear(embedding_size, num_classes, bias=False)``.

    ``forward(x, labels)`` -> loss. Arguments as of the function, with ``margin=ArcFace(0.5)`` and ``scale=64.0``;
    ``class_weight`` becomes a buffer that the state dict leaves out. All are attributes that ``forward`` reads: a
    margin that grows is an assignment before each epoch or step. Under ``torch.compile``, numbers that change are
    compiled once more, the first time, and then never again.

    Raises:
        TypeError, ValueError: for a wrong setting, when it is given or assigned; the message names the class.

    >>> from otface_cuda import CosFace
    >>> loss = MarginSoftmaxLoss(num_classes=10, embedding_size=4, margin=CosFace(0.0), scale=30.0)
    >>> for step in range(3):
    ...     loss.margin = CosFace(0.35 * step / 2)
    ...     loss(torch.randn(3, 4), torch.tensor([0, 7, 2])).backward()
    >>> loss.margin, loss.weight.grad.shape
    (CosFace(m=0.35), torch.Size([10, 4]))
    """

    checks = LOSS_CHECKS
    margin: Margin
    scale: float
    reduction: str
    ignore_index: int
    label_smoothing: float
    class_weight: Tensor | None
    store_logits: bool | None
    chunk_bytes: int | None

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        margin: Margin = _ARCFACE,
        scale: float = 64.0,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        store_logits: bool | None = None,
        chunk_bytes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            embedding_size,
            device,
            dtype,
            margin=margin,
            scale=scale,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            store_logits=store_logits,
            chunk_bytes=chunk_bytes,
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return margin_softmax_loss(
            x,
            self.weight,
            labels,
            margin=self.margin,
            scale=self.scale,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            store_logits=self.store_logits,
            chunk_bytes=self.chunk_bytes,
        )

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

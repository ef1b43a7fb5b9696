"""`nn.Module` twins of the margin functions: they hold the class weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _checks
from .margin_softmax import cosine_margin_logits, margin_softmax_loss
from .margins import ArcFace, Margin

if TYPE_CHECKING:
    from ._typing import called_as

_ARCFACE = ArcFace(0.5)


class MarginHead(nn.Module):
    """What all heads have: class weights (C, d), and settings that are shown."""

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
        self.settings = settings
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class weights anew, normal with standard deviation 0.01; only their directions matter."""
        nn.init.normal_(self.weight, std=0.01)

    def extra_repr(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        return f"num_classes={self.num_classes}, embedding_size={self.embedding_size}{settings}"


class CosineMarginLogits(MarginHead):
    """:func:`otface_cuda.cosine_margin_logits` with class weights (C, d), compatible with those of
    ``nn.Linear(embedding_size, num_classes, bias=False)``.

    ``forward(x, labels)`` -> logits (B, C). Arguments as of the function, with ``margin=ArcFace(0.5)`` and
    ``scale=64.0``.

    >>> head = CosineMarginLogits(num_classes=10, embedding_size=4)
    >>> head
    CosineMarginLogits(num_classes=10, embedding_size=4, margin=ArcFace(m=0.5, beyond_pi='monotone', \
easy_margin=False, grad='exact'), scale=64.0, ignore_index=-100)
    >>> head(torch.randn(3, 4), torch.tensor([0, 7, 2])).shape
    torch.Size([3, 10])
    """

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
        return cosine_margin_logits(x, self.weight, labels, **self.settings)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class MarginSoftmaxLoss(MarginHead):
    """:func:`otface_cuda.margin_softmax_loss` with class weights (C, d), compatible with those of
    ``nn.Linear(embedding_size, num_classes, bias=False)``.

    ``forward(x, labels)`` -> loss. Arguments as of the function, with ``margin=ArcFace(0.5)`` and ``scale=64.0``;
    ``class_weight`` becomes a buffer that the state dict leaves out.

    >>> from otface_cuda import CosFace
    >>> loss = MarginSoftmaxLoss(num_classes=10, embedding_size=4, margin=CosFace(0.35), scale=30.0)
    >>> loss(torch.randn(3, 4), torch.tensor([0, 7, 2])).backward()
    >>> loss.weight.grad.shape
    torch.Size([10, 4])
    """

    class_weight: Tensor | None

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
            store_logits=store_logits,
            chunk_bytes=chunk_bytes,
        )
        self.register_buffer("class_weight", class_weight, persistent=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return margin_softmax_loss(x, self.weight, labels, class_weight=self.class_weight, **self.settings)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

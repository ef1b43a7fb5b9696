"""The four heads of the OTFace authors' code, by their names: change the import, and their checkpoints load.

Qian, Zhu, Zhao, Yang, Wong 2022, arXiv 2203.14461. Class weights are the parameter ``kernel`` (in_features,
out_features), normal with standard deviation 0.01; margins are in radians; logits are for ``F.cross_entropy``. The
heads with transport return it beside the logits, and the training loop adds ten times of it. New code is better off
with :class:`otface_cuda.OTFaceLoss`, which never holds large logits and adds up the loss itself.

What is put right: only triplets are mined, for any ``alpha``; the second half-step of Sinkhorn has the transposed
kernel; ``OTFace_AMsoftmax`` has an ``alpha``, without which it fails there; and everything stays on the device of the
input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _checks, margins
from ..margin_softmax import cosine_margin_logits
from ..mining import mine_hard_triplets
from ..ot_triplet import ot_triplet_loss
from ._inputs import angle_margin, check_embeddings, check_goes_with, check_scale, cosine_margin

IGNORED = -100  # as of `F.cross_entropy`, which the logits are for

if TYPE_CHECKING:
    from .._typing import called_as


class _Head(nn.Module, ABC):
    kernel: nn.Parameter

    def __init__(self, in_features: int, out_features: int, s: float, m: float, easy_margin: bool) -> None:
        super().__init__()
        where = type(self).__name__
        self.in_features = _checks.check_int(where, "in_features", in_features, 1)
        self.out_features = _checks.check_int(where, "out_features", out_features, 1)
        self.s = check_scale(where, s)
        self.m, self.easy_margin = _checks.check_finite(where, "m", m), easy_margin
        _checks.check_bool(where, "easy_margin", easy_margin)
        self._margin()
        self.kernel = nn.Parameter(torch.empty(in_features, out_features))
        nn.init.normal_(self.kernel, std=0.01)

    @abstractmethod
    def _margin(self) -> margins.Margin:
        """Of the attributes as they are now."""

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, s={self.s}, m={self.m}, easy_margin={self.easy_margin}"

    def _logits(self, embeddings: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """With the margin, and cos * s without it and without gradient: they differ in each row's own class only."""
        where = type(self).__name__
        check_embeddings(where, "embeddings", embeddings, self.in_features)
        check_goes_with(where, "embeddings", embeddings, "kernel", self.kernel)
        label = _checks.class_labels(where, label, "embeddings", embeddings, "label")
        all_here = _checks.check_classes(where, label, self.out_features, IGNORED, "label")
        weight = self.kernel.t()
        logits = cosine_margin_logits(
            embeddings, weight, label, margin=self._margin(), scale=check_scale(where, self.s)
        )
        own = label if all_here else label.clamp(0, self.out_features - 1)
        cosine = _cosines(embeddings.detach(), weight.detach().index_select(0, own))
        plain = logits.detach().clamp(-self.s, self.s)
        plain.scatter_(1, own.unsqueeze(1), cosine.mul_(self.s).to(plain.dtype).unsqueeze(1))
        return logits, plain

    def _transport(
        self, embeddings: Tensor, conv_features: Tensor, label: Tensor, epoch: int, alpha: float
    ) -> tuple[Tensor, int, int]:
        """The loss (1,), and how many triplets are hard and active."""
        if isinstance(conv_features, Tensor):
            _checks.check_dense(type(self).__name__, "conv_features", conv_features, pad=True)
        if not isinstance(conv_features, Tensor) or conv_features.shape[:1] != embeddings.shape[:1]:
            wrong = _checks.wrong_value if isinstance(conv_features, Tensor) else _checks.wrong_type
            expected = f"a tensor of shape ({embeddings.shape[0]}, C, H, W) to go with `embeddings`"
            raise wrong(type(self).__name__, "conv_features", expected, conv_features)
        triplets = mine_hard_triplets(embeddings, label, alpha, ignore_index=IGNORED)
        loss, _, n_active = ot_triplet_loss(conv_features, triplets if epoch >= 0 else triplets[:0])
        return loss[None], len(triplets), int(n_active)


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """(B,) of the rows, in float64, where no product of float32 is out of range; 0 for a zero row."""
    x, y = x.double(), y.double()
    lengths = torch.linalg.vector_norm(x, dim=1).mul_(torch.linalg.vector_norm(y, dim=1))
    cosines: Tensor = torch.linalg.vecdot(x, y).div_(lengths.clamp_(min=torch.finfo(torch.float64).tiny))
    return cosines.clamp_(-1, 1)


class ArcFace(_Head):
    """Logits with an additive angular margin: ``forward(embeddings, label)`` -> (logits, cos * s).

    Both are (N, out_features), the second without margin and gradient. Beyond theta = pi - m the margin falls back to
    cos(theta) - m sin(pi - m), and with ``easy_margin`` there is none where cos(theta) <= 0. The gradient is exact also
    at theta = 0, where that of the original is NaN; a zero embedding has cosine 0 rather than NaN.

    Args:
        in_features: d, the length of the embeddings (N, d), which need not be normalised.
        out_features: the number of classes; ``label`` (N,) holds integers below it.
        s, m, easy_margin: scale, margin in radians, and see above.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came.

    >>> head = ArcFace(in_features=4, out_features=10)
    >>> logits, cosines = head(torch.randn(3, 4), torch.tensor([0, 7, 2]))
    >>> logits.shape, bool((logits <= cosines).all())
    (torch.Size([3, 10]), True)
    """

    def __init__(
        self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.45, easy_margin: bool = False
    ) -> None:
        super().__init__(in_features, out_features, s, m, easy_margin)

    def forward(self, embeddings: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        return self._logits(embeddings, label)

    def _margin(self) -> margins.Margin:
        return angle_margin(type(self).__name__, "m", self.m, easy_margin=self.easy_margin)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class AMsoftmax(_Head):
    """Logits with an additive cosine margin, cos(theta) - m: ``forward(embeddings, label)`` -> (logits, cos * s).

    As :class:`ArcFace`, but ``easy_margin`` changes nothing.

    >>> logits, cosines = AMsoftmax(4, 10)(torch.randn(3, 4), torch.tensor([0, 7, 2]))
    >>> round((cosines - logits)[1, 7].item(), 4)
    10.5
    """

    def __init__(
        self, in_features: int, out_features: int, s: float = 30, m: float = 0.35, easy_margin: bool = False
    ) -> None:
        super().__init__(in_features, out_features, s, m, easy_margin)

    def forward(self, embeddings: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        return self._logits(embeddings, label)

    def _margin(self) -> margins.Margin:
        return cosine_margin(type(self).__name__, "m", self.m)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class OTFace_Arcface(ArcFace):  # noqa: N801
    """:class:`ArcFace` and the transport between the feature maps of hard triplets.

    ``forward(embeddings, conv_features, label, epoch)`` -> (logits, transport loss, cos * s, number of hard triplets,
    number of active ones). The loss has shape (1,) and is 0, with gradient 0, where no triplet is active; the numbers
    are ints. ``conv_features`` is (N, C, H, W); a negative ``epoch`` leaves the transport out, and otherwise it changes
    nothing. The definitions are those of :func:`otface_cuda.mine_hard_triplets` and :func:`otface_cuda.ot_triplet_loss`
    at their defaults.

    Args:
        in_features, out_features, s, m, easy_margin: as in :class:`ArcFace`.
        alpha: above 0, triplets that are almost hard count too.
        beta: at least 0; changes nothing, because only positive differences of distances count. Below 0 it would be
            their least value, so that every hard triplet were active: refused.

    >>> head = OTFace_Arcface(in_features=4, out_features=10)
    >>> maps, label = torch.randn(6, 8, 7, 7, requires_grad=True), torch.tensor([0, 0, 1, 1, 2, 2])
    >>> logits, ot_loss, cosines, hard, active = head(torch.randn(6, 4), maps, label, epoch=0)
    >>> loss = torch.nn.functional.cross_entropy(logits, label) + 10 * ot_loss
    >>> loss.backward()
    >>> ot_loss.shape, 0 <= active <= hard
    (torch.Size([1]), True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        m: float = 0.45,
        easy_margin: bool = False,
        alpha: float = 0,
        beta: float = 0,
    ) -> None:
        super().__init__(in_features, out_features, s, m, easy_margin)
        self.alpha, self.beta = _checks.check_finite("OTFace_Arcface", "alpha", alpha), beta
        self._check_beta()

    def _check_beta(self) -> None:
        if _checks.check_finite(type(self).__name__, "beta", self.beta) < 0:
            raise _checks.wrong_value(type(self).__name__, "beta", "at least 0", self.beta)

    def forward(  # type: ignore[override]
        self, embeddings: Tensor, conv_features: Tensor, label: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor, Tensor, int, int]:
        self._check_beta()
        logits, plain = super().forward(embeddings, label)
        loss, n_hard, n_active = self._transport(embeddings, conv_features, label, epoch, self.alpha)
        return logits, loss, plain, n_hard, n_active

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...  # type: ignore[override]


class OTFace_AMsoftmax(AMsoftmax):  # noqa: N801
    """:class:`AMsoftmax` and the transport between the feature maps of hard triplets.

    ``forward(embeddings, conv_features, label, epoch)`` -> (logits, transport loss, cos * s), without the numbers that
    :class:`OTFace_Arcface` returns. The buffer ``t`` (1,) is there for checkpoints and nothing reads it. The original
    reads an ``alpha`` that it never sets; here it is a keyword.

    >>> head = OTFace_AMsoftmax(in_features=4, out_features=10)
    >>> list(head.state_dict())
    ['kernel', 't']
    """

    t: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 30,
        m: float = 0.35,
        easy_margin: bool = False,
        *,
        alpha: float = 0,
    ) -> None:
        super().__init__(in_features, out_features, s, m, easy_margin)
        self.alpha = _checks.check_finite("OTFace_AMsoftmax", "alpha", alpha)
        self.register_buffer("t", torch.zeros(1))

    def forward(  # type: ignore[override]
        self, embeddings: Tensor, conv_features: Tensor, label: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, plain = super().forward(embeddings, label)
        return logits, self._transport(embeddings, conv_features, label, epoch, self.alpha)[0], plain

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...  # type: ignore[override]

"""Fast batched optimal transport and margin losses for torch."""

from ._build import load as _load

__version__ = "0.1.0"
_load()

from ._convergence import ConvergenceWarning  # noqa: E402
from .functional import SinkhornOutput, sinkhorn, sinkhorn_points  # noqa: E402
from .info import info  # noqa: E402
from .kernels import kernel_for  # noqa: E402
from .margin_modules import CosineMarginLogits, MarginSoftmaxLoss  # noqa: E402
from .margin_softmax import cosine_margin_logits, margin_softmax_loss  # noqa: E402
from .margins import ArcFace, CombinedMargin, CosFace, Margin, SphereFace  # noqa: E402
from .mining import mine_hard_triplets  # noqa: E402
from .modules import Sinkhorn, SinkhornPairs, SinkhornPoints  # noqa: E402
from .ot_triplet import OTTripletLossOutput, ot_triplet_loss  # noqa: E402
from .otface_loss import OTFaceLoss, OTFaceOutput  # noqa: E402
from .pairs import sinkhorn_pairs  # noqa: E402

__all__ = [
    "ArcFace",
    "CombinedMargin",
    "ConvergenceWarning",
    "CosFace",
    "CosineMarginLogits",
    "Margin",
    "MarginSoftmaxLoss",
    "OTFaceLoss",
    "OTFaceOutput",
    "OTTripletLossOutput",
    "Sinkhorn",
    "SinkhornOutput",
    "SinkhornPairs",
    "SinkhornPoints",
    "SphereFace",
    "cosine_margin_logits",
    "info",
    "kernel_for",
    "margin_softmax_loss",
    "mine_hard_triplets",
    "ot_triplet_loss",
    "sinkhorn",
    "sinkhorn_pairs",
    "sinkhorn_points",
]

"""Fast batched optimal transport and margin losses for torch."""

from importlib.metadata import version as _version

from ._build import load as _load

_load()

from .functional import SinkhornOutput, sinkhorn, sinkhorn_points  # noqa: E402
from .info import info  # noqa: E402
from .kernels import kernel_for  # noqa: E402
from .modules import Sinkhorn, SinkhornPairs, SinkhornPoints  # noqa: E402
from .pairs import sinkhorn_pairs  # noqa: E402

__version__ = _version("otface_cuda")
__all__ = [
    "Sinkhorn",
    "SinkhornOutput",
    "SinkhornPairs",
    "SinkhornPoints",
    "info",
    "kernel_for",
    "sinkhorn",
    "sinkhorn_pairs",
    "sinkhorn_points",
]

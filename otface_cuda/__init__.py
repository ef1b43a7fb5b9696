"""Fast batched optimal transport and margin losses for torch."""

from importlib.metadata import version as _version

from ._build import load as _load
from .info import info

_load()

__version__ = _version("otface_cuda")
__all__ = ["info"]

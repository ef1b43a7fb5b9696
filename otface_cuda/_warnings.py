"""Warnings that point at the user's line, however many of our frames, and of torch's, lie between."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


def warn_users_line(text: str, category: type[Warning]) -> None:
    """By the standard filters: shown once for each line that calls, unless they say otherwise."""
    frame = users_frame()
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    name = frame.f_globals.get("__name__")
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno, name, registry)


def users_frame() -> FrameType:
    """The innermost one outside of this package and of torch, whose modules call ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _package(frame) in ("otface_cuda", "torch"):
        frame = frame.f_back
    return frame


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]

"""Checks that the heads share, in the words of the original's arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks, margins


def check_embeddings(where: str, name: str, x: Any, size: int) -> None:
    """(B, size), on a device that has kernels."""
    _checks.check_floating(where, name, x, f"(B, {size})", (2,))
    if x.shape[1] != size:
        raise _checks.wrong_value(where, name, f"of shape (B, {size})", x)
    _checks.check_has_kernels(where, name, x)


def check_goes_with(where: str, name: str, x: Tensor, parameter_name: str, parameter: Tensor) -> None:
    """On the device of the parameter, and of its dtype unless autocast converts both."""
    _checks.check_device(where, name, x, parameter_name, parameter)
    if x.dtype == parameter.dtype:
        return
    if torch.float64 in (x.dtype, parameter.dtype) or not torch.is_autocast_enabled(x.device.type):
        raise _checks.wrong_type(where, name, f"of the dtype of `{parameter_name}` ({parameter.dtype})", x)


def check_scale(where: str, s: Any) -> float:
    number = _checks.check_finite(where, "s", s)
    if number <= 0:
        raise _checks.wrong_value(where, "s", "positive", s)
    return number


def angle_margin(where: str, name: str, m: Any, **options: Any) -> margins.ArcFace:
    """On the angle, with the options of :class:`otface_cuda.ArcFace`."""
    number = _checks.check_finite(where, name, m)
    if not 0 <= number <= math.pi:
        raise _checks.wrong_value(where, name, margins.AN_ANGLE, m)
    return margins.ArcFace(number, **options)


def cosine_margin(where: str, name: str, m: Any) -> margins.CosFace:
    """On the cosine."""
    number = _checks.check_finite(where, name, m)
    if number < 0:
        raise _checks.wrong_value(where, name, "a finite number of at least 0", m)
    return margins.CosFace(number)

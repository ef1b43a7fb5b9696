"""The margins: what the loss does to the cosine of a row's own class. Angles are in radians.

With theta the angle between an embedding and the weight of its class, in [0, pi], a margin replaces cos(theta) by
something smaller, so that the class has to win by more than it would otherwise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import NamedTuple

import torch

from ._checks import check_choice, wrong_type, wrong_value

GRADIENTS = ("exact", "straight_through")
BEYOND_PI = ("monotone", "none")
AN_ANGLE = "an angle from 0 to pi, in radians"

# enum BeyondPi of csrc/margin/params.h
_NONE, _FALLBACK, _PERIODIC = 0, 1, 2


class KernelMargin(NamedTuple):
    """A margin as the operators take it: cos(m1 theta + m2) - m3."""

    m1: float
    m2: float
    m3: float
    beyond_pi: int  # where m1 theta + m2 > pi; 0: nothing, 1: cos(theta) - m2 sin(m2) - m3, 2: as in SphereFace
    easy: bool  # no margin where cos(theta) <= 0
    straight_through: bool  # d margin / d cos(theta) counts as 1


@dataclass(frozen=True)
class Margin(ABC):
    """What ``margin=`` takes: one of :class:`ArcFace`, :class:`CosFace`, :class:`SphereFace`, :class:`CombinedMargin`.

    They are values: frozen, hashable, equal where their numbers are, and can be pickled.

    >>> ArcFace(0.5) == ArcFace(m=0.5)
    True
    >>> isinstance(ArcFace(0.5), Margin)
    True
    """

    @abstractmethod
    def kernel_form(self) -> KernelMargin:
        """The numbers that the operators take."""


@dataclass(frozen=True)
class ArcFace(Margin):
    """An angle on top: cos(theta + m).

    Deng, Guo, Xue, Zafeiriou: ArcFace, 2019, arXiv 1801.07698, equation (3).

    Args:
        m: the angle in radians, from 0 to pi.
        beyond_pi: where theta + m > pi, and cos(theta + m) would rise again: ``"monotone"`` takes cos(theta) - m sin(m)
            there, which always falls; ``"none"`` keeps the formula.
        easy_margin: no margin, plain cos(theta), where cos(theta) <= 0.
        grad: ``"exact"``, or ``"straight_through"``: the slope d margin / d cos(theta) counts as 1.

    >>> ArcFace(0.5)
    ArcFace(m=0.5, beyond_pi='monotone', easy_margin=False, grad='exact')
    """

    m: float = 0.5
    _: KW_ONLY
    beyond_pi: str = "monotone"
    easy_margin: bool = False
    grad: str = "exact"

    def __post_init__(self) -> None:
        _keep_number(self, "m", AN_ANGLE, _is_angle)
        check_choice("ArcFace", "beyond_pi", self.beyond_pi, BEYOND_PI)
        if not isinstance(self.easy_margin, bool):
            raise wrong_type("ArcFace", "easy_margin", "True or False", self.easy_margin)
        check_choice("ArcFace", "grad", self.grad, GRADIENTS)

    def kernel_form(self) -> KernelMargin:
        beyond_pi = _FALLBACK if self.beyond_pi == "monotone" else _NONE
        return KernelMargin(1.0, self.m, 0.0, beyond_pi, self.easy_margin, self.grad == "straight_through")


@dataclass(frozen=True)
class CosFace(Margin):
    """A cosine less: cos(theta) - m. Also known as AM-Softmax. Its slope is 1.

    Wang, Wang, Zhou, Ji, Gong, Zhou, Li, Liu: CosFace, 2018, arXiv 1801.09414, equation (4); Wang, Cheng, Liu, Liu:
    Additive margin softmax, 2018, arXiv 1801.05599, equation (6).

    Args:
        m: what is taken from the cosine, at least 0.

    >>> CosFace(0.35)
    CosFace(m=0.35)
    """

    m: float = 0.35

    def __post_init__(self) -> None:
        _keep_number(self, "m", "a finite number of at least 0", lambda m: m >= 0)

    def kernel_form(self) -> KernelMargin:
        return KernelMargin(1.0, 0.0, self.m, _NONE, False, False)


@dataclass(frozen=True)
class SphereFace(Margin):
    """A multiple of the angle: (-1)^k cos(m theta) - 2 k, with k = floor(m theta / pi), which falls everywhere.

    Liu, Wen, Yu, Li, Raj, Song: SphereFace, 2017, arXiv 1704.08063, equation (7).

    Args:
        m: the factor, at least 1; it need not be whole.
        grad: ``"exact"``, or ``"straight_through"``: the slope d margin / d cos(theta) counts as 1.

    >>> SphereFace(4)
    SphereFace(m=4.0, grad='exact')
    """

    m: float = 4.0
    _: KW_ONLY
    grad: str = "exact"

    def __post_init__(self) -> None:
        _keep_number(self, "m", "a finite number of at least 1", lambda m: m >= 1)
        check_choice("SphereFace", "grad", self.grad, GRADIENTS)

    def kernel_form(self) -> KernelMargin:
        return KernelMargin(self.m, 0.0, 0.0, _PERIODIC, False, self.grad == "straight_through")


@dataclass(frozen=True)
class CombinedMargin(Margin):
    """All three: cos(m1 theta + m2) - m3, also beyond m1 theta + m2 = pi, where the cosine rises again.

    Deng, Guo, Xue, Zafeiriou: ArcFace, 2019, arXiv 1801.07698, equation (4). Of insightface's class of this name, which
    ignores m1 and m2 where m3 is not 0, this is what the paper says.

    Args:
        m1: the factor of the angle, positive.
        m2: the angle on top in radians, from 0 to pi.
        m3: what is taken from the cosine, at least 0.
        grad: ``"exact"``, or ``"straight_through"``: the slope d margin / d cos(theta) counts as 1.

    >>> CombinedMargin(1.0, 0.3, 0.2)
    CombinedMargin(m1=1.0, m2=0.3, m3=0.2, grad='exact')
    """

    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0
    _: KW_ONLY
    grad: str = "exact"

    def __post_init__(self) -> None:
        _keep_number(self, "m1", "a finite number above 0", lambda m1: m1 > 0)
        _keep_number(self, "m2", AN_ANGLE, _is_angle)
        _keep_number(self, "m3", "a finite number of at least 0", lambda m3: m3 >= 0)
        check_choice("CombinedMargin", "grad", self.grad, GRADIENTS)

    def kernel_form(self) -> KernelMargin:
        return KernelMargin(self.m1, self.m2, self.m3, _NONE, False, self.grad == "straight_through")


def _keep_number(margin: Margin, name: str, expected: str, is_right: Callable[[float], bool]) -> None:
    """Leave the field as a float, in whatever type of number it came."""
    where, x = type(margin).__name__, getattr(margin, name)
    if isinstance(x, bool) or not isinstance(x, (Real, torch.SymFloat, torch.SymInt)):
        raise wrong_type(where, name, expected, x)
    number = float(x)
    if not (-math.inf < number < math.inf and is_right(number)):  # as torch.compile can trace it, as in check_finite
        raise wrong_value(where, name, expected, x)
    object.__setattr__(margin, name, number)


def _is_angle(x: float) -> bool:
    return 0 <= x <= math.pi

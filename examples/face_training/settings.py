"""The settings of a run, what each of them can be, and the message where one is something else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

import otface_cuda

from .data import FacesError
from .model import STRIDES

LOSSES = {
    "arcface": (otface_cuda.ArcFace, 0.45, False),
    "cosface": (otface_cuda.CosFace, 0.35, False),
    "otface-arcface": (otface_cuda.ArcFace, 0.45, True),
    "otface-cosface": (otface_cuda.CosFace, 0.35, True),
}
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run; kept in its checkpoint."""

    loss: str = "otface-arcface"
    size: int = 112
    stride: int = 16
    width: float = 1.0
    embedding_size: int = 256
    margin: float | None = None  # None: that of LOSSES
    scale: float = 32.0
    ot_weight: float = 10.0
    eps: float = 1.0
    n_iter: int = 10
    alpha: float = 0.0
    beta: float = 0.0
    epochs: float = 40.0
    people: int = 32  # in a batch of one process
    images: int = 2  # of each of them
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05  # part of the run in which the learning rate rises
    margin_warmup: float = 0.4  # part of the run in which the margin comes in
    amp: str = "off"
    seed: int = 0


def setting_types() -> dict[str, Callable[[str], Any]]:
    """What makes a setting of the text that a user gives."""
    return {f.name: float if f.default is None else type(f.default) for f in fields(Settings)}


@dataclass(frozen=True)
class Range:
    """The finite numbers from ``low`` to ``high``; with ``above``, without ``low`` itself."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        inside = self.low < value <= self.high or (value == self.low and not self.above)
        return inside and abs(value) < math.inf

    def __str__(self) -> str:
        low, high = (f"{end:,.7g}" for end in (self.low, self.high))
        if self.high == math.inf:
            return f"{low} at least"
        return f"above {low} and at most {high}" if self.above else f"from {low} to {high}"


def check_number(name: str, value: float, allowed: Range) -> None:
    if value not in allowed:
        raise FacesError(f"{name} must be {allowed}, got {value}")


CHOICES: dict[str, tuple[Any, ...]] = {"loss": tuple(LOSSES), "stride": STRIDES, "amp": tuple(AMP)}
MOST = 1e6  # of real numbers: with what float32 cannot hold the loss would be infinite, and say nothing of why
EPS = Range(1 / MOST, MOST)
RANGES = {
    "size": Range(8, 1024),
    "width": Range(0, 16, above=True),
    "embedding_size": Range(1, 65536),
    "scale": Range(0, MOST, above=True),
    "ot_weight": Range(0, MOST),
    "eps": EPS,
    "n_iter": Range(1, MOST),
    "alpha": Range(-MOST, MOST),
    "beta": Range(-MOST, MOST),
    "epochs": Range(0, MOST, above=True),
    "people": Range(2),  # with fewer there are no triplets
    "images": Range(2, 1024),
    "lr": Range(0, MOST),
    "weight_decay": Range(0, MOST),
    "warmup": Range(0, 1),
    "margin_warmup": Range(0, 1),
    "seed": Range(-9_000_000, 9_000_000),  # data.seeded makes a number of 64 bits of it
}


def flag(setting: str) -> str:
    """The option of a setting."""
    return "--" + setting.replace("_", "-")


def check_settings(settings: Settings, called: Callable[[str], str] = flag) -> None:
    """``called``: what a message calls a setting."""
    for name, choices in CHOICES.items():
        if getattr(settings, name) not in choices:
            expected = ", ".join(map(str, choices))
            raise FacesError(f"{called(name)} must be one of {expected}, got {getattr(settings, name)}")
    for name, allowed in RANGES.items():
        check_number(called(name), getattr(settings, name), allowed)
    if settings.size % settings.stride:
        raise FacesError(f"{called('size')} must be a multiple of the stride {settings.stride}, got {settings.size}")
    margin, default, _ = LOSSES[settings.loss]
    try:
        margin(default if settings.margin is None else settings.margin)
    except ValueError as error:
        raise FacesError(f"{called('margin')} does not fit {settings.loss}: {error}") from error

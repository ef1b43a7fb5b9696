"""Numbers that may change from step to step, as operators take them: a schedule must not compile a graph anew."""

from __future__ import annotations

import torch
from torch import Tensor


def number_tensor(*numbers: float) -> Tensor:
    """(n,) float64, on the CPU: operators read them there, and nothing waits for a device."""
    if not torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")
    # By arithmetic: a number that torch.compile has seen change is then an input of its graph. To torch.tensor, and as
    # an argument of an operator, it would be a constant, and each value a graph of its own.
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * x for x in numbers])

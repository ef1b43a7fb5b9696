"""The kernels for near entries of cost matrices for numpy, on the host executor: cases for kernels.run.

A case is a dictionary of arrays that near_case.cpp reads: the step, the metric by its number, and the fields of its
struct in csrc/pairs/near.h by their names.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .kernels import Arrays

STEPS = ("near_costs", "far_weights", "near_gradient")


def make(step: str, metric: int, arrays: Mapping[str, np.ndarray | None], seed: int = 0) -> Arrays:
    """A case; None is left out, and so a null pointer."""
    case = {"near_step": np.frombuffer(step.encode(), np.uint8), "metric": np.asarray(metric, np.int64)}
    case["seed"] = np.asarray(seed, np.int64)
    return case | {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}

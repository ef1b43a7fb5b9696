"""The kernels of the margin operators for numpy, on the host executor: cases for kernels.run and kernels.run_driver.

A case is a dictionary of arrays that margin_case.cpp reads: the step, the fields of its struct in csrc/margin/params.h
by their names, and how matrices lie in memory. Half types are arrays of their bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from .kernels import Arrays

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
ROW = ("power", "inverse_norm", "logit", "slope", "most", "sum", "weighted", "target", "aligned")


class Margin(NamedTuple):
    """struct Margin of params.h."""

    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0
    beyond_pi: int = 0
    easy: bool = False
    straight_through: bool = False


def bits(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """X rounded to a type, as it lies in memory."""
    rounded = torch.from_numpy(np.array(x, np.float64)).to(dtype)
    return (rounded.view(torch.uint16) if dtype.itemsize == 2 else rounded).numpy()


def values(stored: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What such an array means, in float64."""
    x = torch.from_numpy(np.array(stored))
    return (x.view(dtype) if dtype.itemsize == 2 else x).double().numpy()


def round_to(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """X rounded to a type, in float64."""
    return values(bits(x, dtype), dtype)


def real_of(dtype: torch.dtype) -> Any:
    """Numpy's type of the arithmetic."""
    return np.float64 if dtype == torch.float64 else np.float32


def make(step: str, dtype: torch.dtype, **fields: Any) -> Arrays:
    """A case; None is left out, and so a null pointer."""
    case: Arrays = {"margin_step": np.frombuffer(step.encode(), np.uint8)}
    fields["is_double"] = dtype == torch.float64
    for name, value in fields.items():
        if isinstance(value, torch.dtype):
            value = DTYPES[value]
        if isinstance(value, (bool, int)):
            value = np.asarray(value, np.int64)
        if value is not None:
            array = np.asarray(value)
            case[name] = np.ascontiguousarray(array).reshape(array.shape)
    return case


def matrix(name: str, x: np.ndarray, dtype: torch.dtype, gap: int = 0, offset: int = 0) -> Arrays:
    """A matrix whose rows have a gap between them, with `offset` elements before the first; both are NaN."""
    rows, columns = x.shape
    wide = np.full((rows, columns + gap), np.nan)
    wide[:, :columns] = x
    flat = np.concatenate([np.full(offset, np.nan), wide.ravel()])
    layout = np.array([DTYPES[dtype], rows, columns, columns + gap, offset], np.int64)
    return {name: bits(flat, dtype), f"{name}_layout": layout}


def shifted(name: str, x: np.ndarray, real: Any, offset: int = 0) -> Arrays:
    """An array with `offset` elements before the first."""
    flat = np.concatenate([np.full(offset, np.nan), np.ravel(x)]).astype(real)
    return {name: flat, f"{name}_offset": np.asarray(offset, np.int64)}


def strided(name: str, x: np.ndarray, real: Any, gap: int = 0, offset: int = 0) -> Arrays:
    """Rows with a gap between them."""
    wide = np.full((x.shape[0], x.shape[1] + gap), np.nan)
    wide[:, : x.shape[1]] = x
    return shifted(name, wide, real, offset) | {"row_stride": np.asarray(wide.shape[1], np.int64)}


def from_strided(results: Arrays, case: Arrays, name: str, shape: tuple[int, int]) -> np.ndarray:
    """The matrix that `strided` laid out, from the results; what lies between the rows must still be NaN."""
    offset, stride = int(case[f"{name}_offset"]), int(case["row_stride"])
    flat = results[name]
    assert np.isnan(flat[:offset]).all()
    wide = flat[offset:].reshape(shape[0], stride)
    assert np.isnan(wide[:, shape[1] :]).all()
    return wide[:, : shape[1]]


def rows(batch: int, **fields: Any) -> np.ndarray:
    """The rows (B, 9): each field a number or (B,); at first as for unit vectors without other classes."""
    named = dict(zip(ROW, (1, 1, 0, 1, -np.inf, 0, 0, 0, 0), strict=True)) | fields
    return np.stack([np.broadcast_to(np.asarray(named[name], np.float64), (batch,)) for name in ROW], axis=1)


def field(of: np.ndarray, name: str) -> np.ndarray:
    """A field of all rows."""
    return of[:, ROW.index(name)]

"""Argument checks: each failure is one sentence that names the argument, what was expected and what came."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ._build import build_info, how_to_get_cuda_kernels

HAS_CUDA_KERNELS = "cuda" in build_info()  # asked once: torch.compile could not trace the question
HOW_TO_GET_CUDA_KERNELS = f"{how_to_get_cuda_kernels()} (`python -m otface_cuda` shows why it has none)"
COST_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GRADIENT_MODES = ("envelope", "unrolled", "implicit")
FLOAT32_EPS = torch.finfo(torch.float32).eps
SMALLEST, LARGEST = math.ulp(0.0), torch.finfo(torch.float64).max  # of the positive finite float64
WRONG_ENTRY, NO_MASS, UNEQUAL_MASSES = 1, 2, 3  # what csrc/torch/value_checks.cpp finds

_ops = torch.ops.otface


def describe(x: Any) -> str:
    """How a wrong argument is named in a message."""
    if isinstance(x, Tensor) and x.is_nested:
        return "a nested tensor"  # one that is not jagged has no shape
    if isinstance(x, Tensor):
        return f"a {str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)}"
    if isinstance(x, type):
        return f"the class {x.__name__}"
    return f"{x!r}" if isinstance(x, (int, float, str, bool, type(None))) else f"a {type(x).__name__}"


def wrong_value(where: str, name: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{where}: `{name}` must be {expected}, got {describe(got)}")


def wrong_type(where: str, name: str, expected: str, got: Any) -> TypeError:
    return TypeError(f"{where}: `{name}` must be {expected}, got {describe(got)}")


def check_floating(
    where: str, name: str, x: Any, shape: str, ranks: Sequence[int], *, takes_lengths: bool = False
) -> None:
    """A float tensor of one of the ranks; `shape` says it in words. `takes_lengths`: whether it may be padded."""
    if not isinstance(x, Tensor):
        raise wrong_type(where, name, f"a tensor of shape {shape}", x)
    if x.dtype not in COST_DTYPES:
        raise wrong_type(where, name, "float64, float32, bfloat16 or float16", x)
    check_dense(where, name, x, pad=ranks != (1,), takes_lengths=takes_lengths)
    if x.dim() not in ranks:
        raise wrong_value(where, name, f"of shape {shape}", x)
    if x.is_cuda and torch.version.cuda is None:
        # Only a tensor without data can be there, and torch would end the process where one needs a gradient.
        raise ValueError(
            f"{where}: `{name}` must be on the CPU, because this torch ({torch.__version__}) has no CUDA, got one on "
            f"{x.device}; {HOW_TO_GET_CUDA_KERNELS}"
        )


def check_has_kernels(where: str, name: str, x: Tensor) -> None:
    if x.device.type == "cpu" or (x.device.type == "cuda" and HAS_CUDA_KERNELS):
        return
    if x.device.type == "cuda":
        raise ValueError(
            f"{where}: `{name}` must be on the CPU, because otface_cuda was built without CUDA kernels, got one on "
            f"{x.device}; {HOW_TO_GET_CUDA_KERNELS}"
        )
    raise ValueError(f"{where}: `{name}` must be on the CPU or on a CUDA device, got one on {x.device}")


def check_dense(where: str, name: str, x: Tensor, *, pad: bool = False, takes_lengths: bool = False) -> None:
    """To be called before the shape is asked for, which a nested tensor may not have. `pad`: what to do with that."""
    if x.is_nested:
        instead = f"; pass a padded one, as `torch.nested.to_padded_tensor({name}, 0.0)` makes it" if pad else ""
        lengths = ", with its sizes as `row_lengths` and `col_lengths`" if takes_lengths else ""
        raise TypeError(f"{where}: `{name}` must be a dense tensor, got a nested one{instead}{lengths}")
    if x.layout != torch.strided:
        raise TypeError(f"{where}: `{name}` must be a dense tensor, got a sparse one; pass `{name}.to_dense()`")


def check_device(where: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(
            f"{where}: `{name}` must be on the device of `{like_name}` ({like.device}), got one on {x.device}"
        )


def check_int(where: str, name: str, x: Any, least: int) -> int:
    if isinstance(x, bool) or not isinstance(x, (Integral, torch.SymInt)):
        raise wrong_type(where, name, "an int", x)
    if x < least:
        raise wrong_value(where, name, f"at least {least}", x)
    whole: int = x if isinstance(x, torch.SymInt) else int(x)  # type: ignore[assignment]
    return whole


def check_finite(where: str, name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, (Real, torch.SymFloat, torch.SymInt)):
        raise wrong_type(where, name, "a float", x)
    number = float(x)
    if not -math.inf < number < math.inf:  # as torch.compile can trace it, also where a number is a symbol to it
        raise wrong_value(where, name, "finite", x)
    return number


def check_bool(where: str, name: str, x: Any) -> None:
    if not isinstance(x, bool):
        raise wrong_type(where, name, "True or False", x)


def check_choice(where: str, name: str, x: Any, choices: Sequence[str]) -> None:
    if x not in choices:
        raise wrong_value(where, name, " or ".join([", ".join(map(repr, choices[:-1])), repr(choices[-1])]), x)


def per_problem(where: str, name: str, x: Any, batch: int, like_name: str, like: Tensor, *, positive: bool) -> Tensor:
    """A float, or a tensor with one number per problem, as (batch,) float64. Gradients do not pass through it."""
    return numbers(where, name, x, batch, like_name, like, positive=positive).expand(batch)


def numbers(where: str, name: str, x: Any, batch: int, like_name: str, like: Tensor, *, positive: bool) -> Tensor:
    """As :func:`per_problem`, but (), as the operators take it, where all problems have the same."""
    expected = "a positive float" if positive else "a float of at least 0"
    if isinstance(x, Tensor):
        if x.is_complex() or x.dtype == torch.bool:
            raise wrong_type(where, name, f"{expected} or a tensor of shape ({batch},)", x)
        check_dense(where, name, x)
        if x.requires_grad:
            raise ValueError(
                f"{where}: `{name}` must not require grad, its gradient is not computed; pass `{name}.detach()`"
            )
        if x.shape not in ((), (batch,)):
            raise wrong_value(where, name, f"{expected} or a tensor of shape ({batch},)", x)
        if x.dim() > 0 or x.device.type != "cpu":  # one number may come from the CPU
            check_device(where, name, x, like_name, like)
        values = x.to(torch.float64)
        if checks_data(values):
            k = _ops.first_outside(on_cpu(values.expand(batch)), SMALLEST if positive else 0.0, LARGEST)
            if k >= 0:
                raise ValueError(
                    f"{where}: `{name}` must be {'positive' if positive else 'at least 0'} and finite, "
                    f"got {values.expand(batch)[k].item()} for problem {k}"
                )
        if values.device == like.device:
            return values
        # By arithmetic, which hands the number to the GPU with the launch: a copy from the CPU would wait for it.
        return torch.zeros((), dtype=torch.float64, device=like.device) + x
    if isinstance(x, bool) or not isinstance(x, (Real, torch.SymFloat, torch.SymInt)):
        raise wrong_type(where, name, f"{expected} or a tensor of shape ({batch},)", x)
    number = float(x)
    if not ((number > 0 if positive else number >= 0) and number < math.inf):
        raise wrong_value(where, name, "positive and finite" if positive else "at least 0 and finite", x)
    if torch.compiler.is_compiling():  # an input of the graph, not a constant: see _numbers.py
        return torch.ones((), dtype=torch.float64, device=like.device) * number
    return torch.full((), number, dtype=torch.float64, device=like.device)


def check_setting_per_problem(where: str, name: str, x: Any, *, positive: bool) -> None:
    """What `per_problem` takes, as far as it can be told before there are problems."""
    if isinstance(x, Tensor):
        batch = x.shape[0] if not x.is_nested and x.dim() > 0 else 1
        per_problem(where, name, x, batch, name, x, positive=positive)
    elif isinstance(x, Real) and not isinstance(x, bool):
        per_problem(where, name, x, 1, name, torch.empty(0), positive=positive)
    else:
        raise wrong_type(where, name, "a float, or a tensor with one for each problem", x)


def checks_data(x: Tensor) -> bool:
    """Whether values may be looked at: on the CPU, and with OTFACE_CHECK=1 (it waits for the device) everywhere.

    Never while torch.compile traces. Where nobody looks, a wrong value gives NaN in its own problem.
    """
    if torch.compiler.is_compiling():
        return False
    return x.is_cpu or (os.environ.get("OTFACE_CHECK") == "1" and not x.is_meta)


def on_cpu(x: Any) -> Any:
    """The tensor, or nothing, where the host can look at it."""
    return x.cpu() if isinstance(x, Tensor) and x.device.type != "cpu" else x


def class_labels(where: str, x: Any, like_name: str, like: Tensor, name: str = "labels") -> Tensor:
    """(B,) int64, one for each row of `like`."""
    fits = isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    if fits:
        check_dense(where, name, x)
    if not fits or x.shape != like.shape[:1]:
        wrong = wrong_value if fits else wrong_type
        raise wrong(where, name, f"an integer tensor of shape ({like.shape[0]},)", x)  # else B would be fixed
    check_device(where, name, x, like_name, like)
    labels: Tensor = x if x.dtype == torch.int64 else x.to(torch.int64)
    return labels.contiguous()


def check_classes(
    where: str, labels: Tensor, classes: int, ignore_index: int | None = None, name: str = "labels"
) -> bool:
    """Whether every label was seen to be a class that is not ignored; False also where nobody looks."""
    return count_labels(where, labels, classes, ignore_index, name) == len(labels)


def count_labels(
    where: str, labels: Tensor, classes: int, ignore_index: int | None = None, name: str = "labels"
) -> int | None:
    """How many are not ignored, and those are classes; None where values are not looked at."""
    if not checks_data(labels):
        return None
    if not labels.is_cpu:
        labels = labels.cpu()
    wrong, kept = torch.ops.otface.look_at_labels.default(labels.contiguous(), classes, ignore_index)
    if wrong >= 0:
        ignored = "" if ignore_index is None else f", or {ignore_index} for a row to be ignored"
        raise ValueError(
            f"{where}: `{name}` must be from 0 to {classes - 1}{ignored}, got {int(labels[wrong])} for row {wrong}"
        )
    return int(kept)


def lengths(
    where: str, name: str, x: Tensor | None, batch: int, size: int, like_name: str, like: Tensor
) -> Tensor | None:
    """(batch,) int64, with values in 1..size."""
    if x is None:
        return None
    expected = f"an integer tensor of shape ({batch},)"
    if not isinstance(x, Tensor):
        raise wrong_type(where, name, expected, x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise wrong_type(where, name, expected, x)
    check_dense(where, name, x)
    if x.shape != (batch,):
        raise wrong_value(where, name, expected, x)
    check_device(where, name, x, like_name, like)
    x = x.to(torch.int64)
    if checks_data(x):
        k = _ops.first_outside(on_cpu(x), 1.0, float(size))
        if k >= 0:
            raise ValueError(f"{where}: `{name}` must be between 1 and {size}, got {int(x[k])} for problem {k}")
    return x.contiguous()


def weights(
    where: str,
    name: str,
    x: Any,
    batch: int,
    size: int,
    batched: bool,
    like_name: str,
    like: Tensor,
    *,
    takes_lengths: bool = True,
) -> Tensor:
    """(batch, size), or (size,) for all; a float tensor on the device of the cost."""
    expected = f"of shape ({batch}, {size}) or ({size},)" if batched else f"of shape ({size},)"
    if not isinstance(x, Tensor):
        raise wrong_type(where, name, f"a tensor {expected}", x)
    if x.dtype not in COST_DTYPES:
        raise wrong_type(where, name, "float64, float32, bfloat16 or float16", x)
    check_dense(where, name, x, pad=True, takes_lengths=takes_lengths)
    if x.shape not in ((size,), (batch, size)) or (x.dim() == 2 and not batched):
        raise wrong_value(where, name, expected, x)
    check_device(where, name, x, like_name, like)
    return x.expand(batch, size) if batched and x.dim() == 1 else x


def mass_tolerance(*given: Tensor) -> float:
    """How far the masses of weights may be apart, relative to the larger: what rounding can do in the coarsest of their
    dtypes, where float64 counts as float32, since such weights may have been computed in that.

    Each side: 1/2 eps by rounding of its entries, another by rounding of the sum they were divided by, and what adding
    up in float32 may lose: half of its digits for both sides, more than sums of 10^7 entries do.
    """
    coarsest = max(FLOAT32_EPS, *(torch.finfo(x.dtype).eps for x in given))
    return 2 * coarsest + math.sqrt(FLOAT32_EPS)


def check_weights_data(where: str, given: dict[str, tuple[Tensor, Tensor | None]], tolerance: float) -> None:
    """`given`: the weights by name, with their lengths. Not negative, finite, of positive and equal mass."""
    if not given or not all(checks_data(x) for x, _ in given.values()):
        return
    names = list(given)
    sides = [on_cpu(x) for side in given.values() for x in side]
    fault, side, problem, entry, x, y = _ops.weights_fault(*sides, *[None] * (4 - len(sides)), tolerance)
    if fault == WRONG_ENTRY:
        raise ValueError(
            f"{where}: `{names[side]}` must be finite and not negative, got {x} at entry {entry} of problem {problem}"
        )
    if fault == NO_MASS:
        raise ValueError(f"{where}: `{names[side]}` must have a positive sum, got 0 for problem {problem}")
    if fault == UNEQUAL_MASSES:
        raise ValueError(
            f"{where}: `{names[0]}` and `{names[1]}` must have equal sums, "
            f"got {x:.9g} and {y:.9g} for problem {problem}"
        )


@torch.library.register_fake("otface::first_outside")
def _(x, least, most):  # type: ignore[no-untyped-def]
    return -1


@torch.library.register_fake("otface::weights_fault")
def _(a, a_lengths, b, b_lengths, tolerance):  # type: ignore[no-untyped-def]
    return 0, 0, 0, 0, 0.0, 0.0

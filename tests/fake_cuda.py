"""CUDA tensors that have a shape but no data, and a mode that raises where a GPU's data would be asked for.

A test file that imports the fixture `fake_tensors` runs in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from otface_cuda import _checks


class WaitError(Exception):
    """The host would wait for the GPU here, and a CUDA graph could not be captured."""


class NoWaiting(TorchDispatchMode):
    """Raises for what FakeTensorMode lets pass: copies between host and device, and masks, which are counted first."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise WaitError(f"{op} with a mask")
        out = op(*args, **kwargs)
        if op.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            if len(devices) > 1:
                raise WaitError(f"{op} between {devices}")
        return out


@pytest.fixture(autouse=True)
def fake_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels need not be there: only their shapes are asked for."""
    if torch.version.cuda is None:
        pytest.skip("needs a torch with CUDA, which takes CUDA tensors without data for real ones")
    monkeypatch.setattr(_checks, "HAS_CUDA_KERNELS", True)
    monkeypatch.delenv("OTFACE_CHECK", raising=False)
    with FakeTensorMode(), NoWaiting():
        yield


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, dtype=dtype, device="cuda")


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64, device="cuda")

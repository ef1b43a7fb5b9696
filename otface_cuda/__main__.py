"""`python -m otface_cuda`: `otface_cuda.info()`, and how to get CUDA kernels where torch has CUDA and it has none."""

import torch

from . import info
from ._build import how_to_get_cuda_kernels

print(info())
if torch.version.cuda and not info().cuda:
    print(f"For the CUDA kernels, {how_to_get_cuda_kernels()}.")

"""`python -m otface_cuda` prints `otface_cuda.info()`."""

from . import info

print(info())

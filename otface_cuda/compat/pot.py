"""Drop-in replacements for parts of POT (Python Optimal Transport), for torch tensors.

``ot.batch``: :func:`solve_batch`, :func:`solve_sample_batch`, :func:`dist_batch`, :func:`loss_linear_batch`,
:func:`loss_linear_samples_batch`. ``ot``: :func:`sinkhorn`, :func:`sinkhorn2`. Compared with POT 0.9.7 by the tests.
"""

from ._pot_batch import OTResult, solve_batch, solve_sample_batch
from ._pot_costs import dist_batch, loss_linear_batch, loss_linear_samples_batch
from ._pot_sinkhorn import sinkhorn, sinkhorn2

__all__ = [
    "OTResult",
    "dist_batch",
    "loss_linear_batch",
    "loss_linear_samples_batch",
    "sinkhorn",
    "sinkhorn2",
    "solve_batch",
    "solve_sample_batch",
]

"""Small problems that lead every kernel through all of its paths, for the sanitizers and for leaving out barriers.

Each case runs the forward and, where nothing else is said, the plan and all three gradients with every cotangent.
"""

from __future__ import annotations

import numpy as np

from .kernels import Arrays, make_case

EVERY_STEP = ("forward", "envelope", "unrolled", "implicit")
TIERS = ("registers", "shared", "stream")

# Costs are in [0, 1]. At the first eps no sum ever leaves the band, at the second the first iterations all start anew
# with rows and columns, at the third now and then one does: so teams that share a warp start anew at different times.
EPS = {np.float32: (0.5, 1e-4, 0.01), np.float64: (0.5, 1e-5, 1e-3)}

# Of the executor: how many blocks the device holds at once. More than the stream tier has problems: gangs of several.
ONE_BLOCK = {"multiprocessors": 1, "blocks_per_multiprocessor": 1}
FOUR_BLOCKS = {"multiprocessors": 2, "blocks_per_multiprocessor": 2}


def random_case(
    tier: str,
    batch: int,
    n: int,
    m: int,
    real: type = np.float32,
    *,
    seed: int = 0,
    steps: tuple[str, ...] = EVERY_STEP,
    special: bool = False,
    first_eps: int = 0,
    **options: float,
) -> Arrays:
    """Random costs and weights. `special`: ragged, zero weights, forbidden pairs, a warm start, tolerances, a
    transposed cost; and the last problem is spoilt by a NaN.
    """
    random = np.random.default_rng((n, m, batch))
    cost = random.random((batch, n, m)).astype(real)
    a, b = (0.1 + random.random((batch, size)) for size in (n, m))
    lengths: dict[str, np.ndarray] = {}
    if special:
        lengths = {
            "row_lengths": random.integers((n + 1) // 2, n + 1, batch),
            "col_lengths": random.integers((m + 1) // 2, m + 1, batch),
            "init_g": 0.1 * random.random((batch, m)),
            "tol": np.array([0.0, 1e-2, 1e-3] * batch)[:batch],
        }
        a[random.random(a.shape) < 0.2] = 0
        b[random.random(b.shape) < 0.2] = 0
        a[:, 0] = b[:, 0] = 0.3
        cost[:, 1:, 1:][random.random((batch, n - 1, m - 1)) < 0.1] = np.inf
        cost[-1, n // 2, m // 3] = np.nan
        cost = np.ascontiguousarray(cost.transpose(0, 2, 1)).transpose(0, 2, 1)
        a *= np.arange(n) < lengths["row_lengths"][:, None]
        b *= np.arange(m) < lengths["col_lengths"][:, None]
    grads = {name: random.standard_normal(batch) for name in ("value", "transport_cost")}
    grads |= {name: random.standard_normal((batch, size)) for name, size in (("f", n), ("g", m))}
    grads["plan"] = random.standard_normal((batch, n, m))
    settings = {"max_iter": 6, "check_every": 2, "want_plan": 1, "want_history": 1, "seed": seed} | options
    return make_case(
        cost,
        np.array(EPS[real] * batch)[first_eps : first_eps + batch],
        a / a.sum(1, keepdims=True),
        b / b.sum(1, keepdims=True),
        steps=steps,
        tier=tier,
        grads=grads,
        implicit_tol=1e-9,
        **lengths,
        **settings,
    )


def cases(tier: str, seed: int = 0) -> dict[str, Arrays]:
    """The cases of a tier, by name."""
    if tier == "registers":
        forward = ("forward", "unrolled")  # the implicit gradient has no register tier
        return {
            "16 x 16, two per warp": random_case(tier, 3, 16, 13, seed=seed, steps=forward),
            "special": random_case(tier, 3, 21, 30, seed=seed, steps=forward, special=True),
            "52 x 52": random_case(tier, 3, 49, 52, seed=seed, steps=forward),
            "64 x 64, one per warp": random_case(tier, 2, 64, 59, seed=seed, steps=("forward",)),
            "double 16 x 16": random_case(tier, 3, 11, 16, np.float64, seed=seed, steps=forward, special=True),
            "double 32 x 32": random_case(tier, 2, 32, 25, np.float64, seed=seed, steps=forward),
            "double 48 x 48": random_case(tier, 2, 47, 48, np.float64, seed=seed, steps=("forward",)),
        }
    if tier == "shared":
        return {
            "small": random_case(tier, 3, 5, 7, seed=seed),
            "special": random_case(tier, 3, 37, 20, seed=seed, special=True),
            "several panels": random_case(tier, 2, 17, 261, seed=seed, max_iter=3),
            "products are multiplied out in between": random_case(tier, 1, 9, 12, seed=seed, max_iter=12),
            "double": random_case(tier, 2, 41, 33, np.float64, seed=seed),
            "double, several panels": random_case(tier, 1, 6, 300, np.float64, seed=seed, special=True, max_iter=3),
        }
    return {
        "one block after another problem": random_case(tier, 3, 20, 9, seed=seed, **ONE_BLOCK),
        "several blocks": random_case(tier, 1, 70, 40, seed=seed, **FOUR_BLOCKS),
        "special": random_case(tier, 2, 37, 300, seed=seed, special=True, **FOUR_BLOCKS),
        "products are multiplied out in between": random_case(
            tier, 1, 20, 5, seed=seed, steps=("forward", "unrolled"), max_iter=36, **FOUR_BLOCKS
        ),
        "double": random_case(tier, 1, 35, 12, np.float64, seed=seed, **FOUR_BLOCKS),
        "512 threads": random_case(tier, 1, 18, 2049, seed=seed, max_iter=2, implicit_max_iter=3, **FOUR_BLOCKS),
        "several panels": random_case(tier, 1, 19, 4101, seed=seed, max_iter=2, implicit_max_iter=2, **FOUR_BLOCKS),
    }

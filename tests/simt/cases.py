"""Small problems that lead every kernel through all of its paths, for the sanitizers and for leaving out barriers.

Each case runs the forward and, where nothing else is said, the plan and all three gradients with every cotangent.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .kernels import Arrays, make_case

STEPS = ("forward", "envelope", "unrolled", "implicit")

# How many blocks the device holds. With more of them than problems, the stream tier makes gangs of several.
ONE_BLOCK = {"multiprocessors": 1, "blocks_per_multiprocessor": 1}
FOUR_BLOCKS = {"multiprocessors": 2, "blocks_per_multiprocessor": 2}
TWELVE_BLOCKS = {"multiprocessors": 3, "blocks_per_multiprocessor": 4}

# The ways through the tiers, by what they set in a case.
WAYS: dict[str, dict[str, Any]] = {
    "registers": {"tier": "registers"},
    "shared": {"tier": "shared"},
    "one block": {"tier": "stream", **ONE_BLOCK},
    "gang": {"tier": "stream", **TWELVE_BLOCKS},
}

# Around the tiles of the forward (16, 32, 52 and 64 in float; 16, 32 and 48 in double) and of the unrolled gradient
# (16, 32 and 52 x 56; 16 and 32). What is larger than the last tile takes the shared tier.
TILE_EDGES = [(1, 1), (1, 16), (16, 1), (15, 17), (16, 16), (17, 16), (32, 31), (32, 33), (48, 48), (49, 47), (52, 56)]
TILE_EDGES += [(53, 51), (64, 64)]
# Around the packs of 4 or 2 columns, the 4 rows at a time, the 8 warps with at least 4 rows each, and the panels of 256
# columns.
SHARED_EDGES = [(1, 1), (1, 5), (3, 1), (4, 4), (5, 3), (31, 8), (33, 7), (65, 66), (5, 256), (4, 257), (9, 515)]
# Around the stripes of 16 rows, the 32 columns that a block settles at a time, and the 256 threads.
STREAM_EDGES = [(1, 1), (1, 33), (15, 32), (16, 31), (17, 2), (33, 260), (100, 3)]
EDGES = {"registers": TILE_EDGES, "shared": SHARED_EDGES, "one block": STREAM_EDGES, "gang": STREAM_EDGES}
# 512 threads from 2049 columns on, panels from 4097 on.
LARGE = {
    "shared": [(110, 120), (10, 600), (600, 9)],
    "one block": [(20, 2048), (5, 2049)],
    "gang": [(20, 2049), (18, 4096), (19, 4097), (3, 8200), (300, 310)],
}

# Costs are in [0, 1]. At the first eps the sums always stay in the band; at the others they leave it now and then, so
# that teams which share a warp start anew at different times.
EPS = {np.float32: (0.5, 1e-3, 0.01), np.float64: (0.5, 1e-4, 1e-3)}
STEEPNESS = {np.float32: 12, np.float64: 120}


def random_case(
    tier: str,
    batch: int,
    n: int,
    m: int,
    real: type = np.float32,
    *,
    steps: tuple[str, ...] = STEPS,
    grads: tuple[str, ...] = ("value", "transport_cost", "f", "g", "plan"),
    special: bool = False,
    steep: bool = False,
    tol: float = 1e-9,
    **options: float,
) -> Arrays:
    """Random costs and weights. `special`: ragged, zero weights, forbidden pairs, a warm start, other tolerances, a
    transposed cost; and the last problem is spoilt by a NaN. `steep`: the weights of the second problem differ by many
    orders of magnitude, so that iterations one after another start anew with rows and columns, and later with rows.
    The error is looked at often, but seldom as small as `tol`.
    """
    random = np.random.default_rng((n, m, batch, steep))
    cost = random.random((batch, n, m)).astype(real)
    a, b = (0.1 + random.random((batch, size)) for size in (n, m))
    if steep:
        a[1], b[1] = (10 ** (STEEPNESS[real] * random.random(size)) for size in (n, m))
    others: dict[str, Any] = {"tol": tol}
    if special:
        others = {
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
        a *= np.arange(n) < others["row_lengths"][:, None]
        b *= np.arange(m) < others["col_lengths"][:, None]
    shapes = {"value": (), "transport_cost": (), "f": (n,), "g": (m,), "plan": (n, m)}
    settings = {"max_iter": 6, "check_every": 2, "want_plan": 1, "want_history": 1} | options
    return make_case(
        cost,
        np.array(EPS[real] * batch)[:batch],
        a / a.sum(1, keepdims=True),
        b / b.sum(1, keepdims=True),
        steps=steps,
        tier=tier,
        grads={name: random.standard_normal((batch, *shapes[name])) for name in grads},
        implicit_tol=1e-9,
        **others,
        **settings,
    )


def cases(tier: str, seed: int = 0) -> dict[str, Arrays]:
    """Those that reach every barrier of a tier, by name; the quick ones first."""
    make = functools.partial(random_case, tier)
    unrolled = ("forward", "unrolled")
    forward_only = {"steps": ("forward",), "want_history": 0, "want_plan": 0}
    steep = {"steep": True, "max_iter": 8}
    if tier == "registers":  # which the implicit gradient does not have
        made = {
            "16 x 16, two per warp": make(3, 13, 10, steps=unrolled, **steep),
            "16 x 16, without history": make(2, 13, 10, **steep, **forward_only),
            "32 x 32": make(3, 21, 30, steps=unrolled, special=True),
            "52 x 52": make(3, 49, 52, steps=unrolled),
            "52 x 52, of f and g alone": make(2, 33, 14, steps=unrolled, grads=("f", "g"), **steep),
            "64 x 64, one per warp": make(2, 64, 59, **forward_only),
            "double 16 x 16": make(3, 13, 10, np.float64, steps=unrolled, **steep),
            "double 32 x 32": make(2, 32, 25, np.float64, steps=unrolled, special=True),
            "double 48 x 48": make(2, 47, 48, np.float64, **forward_only),
        }
    elif tier == "shared":
        made = {
            "small": make(1, 5, 7, want_grad_cost=0, grads=("value", "f")),
            "steep": make(2, 13, 10, **steep),
            "without history": make(2, 13, 10, **steep, **forward_only),
            "special": make(3, 37, 20, special=True),
            "several panels": make(2, 17, 261, max_iter=3),
            "products multiplied out in between": make(1, 9, 12, max_iter=12),
            "double": make(2, 41, 33, np.float64),
            "double, several panels": make(2, 6, 300, np.float64, special=True, max_iter=3),
        }
    else:
        make = functools.partial(make, **FOUR_BLOCKS)
        made = {
            "one block": make(2, 13, 10, **steep, **ONE_BLOCK),
            "a gang": make(1, 35, 100, max_iter=4),
            "double": make(1, 35, 12, np.float64, max_iter=4),
            "without history": make(1, 35, 14, **forward_only),
            "of f and g alone": make(1, 35, 14, steps=unrolled, grads=("f", "g"), want_grad_cost=0),
            "products multiplied out in between": make(1, 20, 5, steps=unrolled, max_iter=20, tol=0.0),
            "an error that seems small enough": make(1, 20, 5, **forward_only, max_iter=20),
            "special": make(2, 37, 300, special=True, max_iter=4),
            "a gang for two problems": make(2, 33, 14, steep=True, max_iter=4, workspace_bytes=1),
            "gangs of two blocks": make(2, 33, 14, steep=True, max_iter=4),
            "512 threads": make(1, 18, 2049, max_iter=2, implicit_max_iter=2),
            "several panels": make(1, 19, 4101, max_iter=2, implicit_max_iter=1),
        }
    return {name: case | {"seed": np.asarray(seed)} for name, case in made.items()}


def spread(way: str, seed: int) -> list[Arrays]:
    """A case for each size at and around the edges of a tier, in float and in double."""
    settings = WAYS[way] | (FOUR_BLOCKS if way == "gang" else {})
    batch = 2 if way == "gang" else 3
    steps = STEPS[:3] if way == "registers" else STEPS
    return [
        random_case(
            batch=batch, n=n, m=m, real=real, steps=steps, seed=seed, max_iter=3, special=min(n, m) > 8, **settings
        )
        for n, m in EDGES[way]
        for real in (np.float32, np.float64)
    ]

"""`otface_cuda.compat.layers` against the layer as it is copied, written from its formulas."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import otface_cuda
from otface_cuda.compat import layers
from otface_cuda.compat.layers import SinkhornDistance, SinkhornDistanceCost

from . import sinkhorn_layer
from .problems import DTYPES, gradient_rtol, output_dtype, tolerance
from .test_bad_input import refused

SIZES = [(5, 7), (1, 3), (3, 1), (1, 1), (16, 16), (33, 20)]


def clouds(n: int, m: int, *, batch: int | None = 3, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Any:
    """Points in the unit square, so that costs are at most 2."""
    generator = torch.Generator().manual_seed(n + m)
    lead = () if batch is None else (batch,)
    return [torch.rand(*lead, size, 2, generator=generator, dtype=torch.float64).to(device, dtype) for size in (n, m)]


def run(layer: Any, points: list[Tensor], seed: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Cost, plan and cost matrix, and the gradients of a random combination of all three."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in points]
    out = layer(*leaves)
    generator = torch.Generator().manual_seed(seed)
    total = sum((torch.rand(x.shape, generator=generator).to(x) * x).sum() for x in out)
    return [x.detach().cpu().double() for x in out], [x.cpu().double() for x in torch.autograd.grad(total, leaves)]


def check(points: list[Tensor], eps: float, max_iter: int, **options: Any) -> int:
    """Ours against the float64 transcription on the same points; how many iterations that took."""
    theirs = sinkhorn_layer.SinkhornDistance(eps, max_iter, **options)
    (cost, plan, C), wanted = run(theirs, [x.cpu().double() for x in points])
    out, grads = run(SinkhornDistance(eps, max_iter, **options), points)
    n, m = C.shape[-2:]
    dtype = output_dtype(points[0].dtype)
    u = (torch.finfo(dtype).eps + torch.finfo(torch.float64).eps) / 2
    # |x|^2 + |y|^2 - 2 <x, y>, each at most about the largest cost, in two dimensions; it enters the plan divided by
    # eps, and once with each potential.
    span = max(1.0, C.max().item())
    of_C = 10 * u * span
    relative = tolerance(dtype, eps, n, m, theirs.iterations, span, points[0].device).plan + 3 * of_C / eps
    larger = 1 + 1e-8 * m  # of the transcription's plan, exactly
    torch.testing.assert_close(out[2], C, rtol=0, atol=of_C)
    torch.testing.assert_close(out[1], plan / larger, rtol=relative, atol=1e-20)
    count = 1 if options.get("reduction", "none") != "sum" else len(C)
    torch.testing.assert_close(out[0], cost / larger, rtol=0, atol=count * (span * relative + of_C))
    # 1e-8 changes the gradient by as much as the plan.
    rtol = gradient_rtol(points[0].dtype, eps / span, n, m, theirs.iterations) + 3 * of_C / eps + 1e-8 * m
    for x, y in zip(grads, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=rtol * y.abs().max().item() + of_C)
    return theirs.iterations


def iterations_until(C: Tensor, eps: float, max_iter: int, thresh: float) -> int:
    return layers.iterations_until(layers.uniform_solver_of("test", C, eps), eps, max_iter, thresh)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("eps", [1.0, 0.1, 0.02])
def test_values_and_gradients(size: tuple[int, int], eps: float, device: str) -> None:
    check(clouds(*size, device=device), eps, 50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_dtypes(dtype: torch.dtype, batch: int | None, device: str) -> None:
    points = clouds(9, 6, batch=batch, dtype=dtype, device=device)
    assert check(points, 0.1, 30) < 30
    cost, pi, C = SinkhornDistance(0.1, 30)(*points)
    assert cost.dtype == pi.dtype == C.dtype == output_dtype(dtype)
    lead = () if batch is None else (batch,)
    assert (cost.shape, pi.shape, C.shape) == (lead, (*lead, 9, 6), (*lead, 9, 6))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_reductions(reduction: str, device: str) -> None:
    check(clouds(9, 6, device=device), 0.1, 30, reduction=reduction)


def test_what_copies_of_the_layer_take(device: str) -> None:
    """`reduction=None` is "none"; a `device` is taken, and is that of the input whatever it says."""
    points = clouds(9, 6, device=device)
    layer = SinkhornDistance(eps=0.1, max_iter=30, reduction=None, device=torch.device("cuda:0"))
    assert layer.reduction == "none"
    for x, y in zip(layer(*points), SinkhornDistance(0.1, 30)(*points), strict=True):
        assert torch.equal(x, y)
        assert x.device == points[0].device
    assert torch.equal(SinkhornDistance(0.1, 30, None, device="cpu")(*points)[0], layer(*points)[0])
    with pytest.raises(RuntimeError, match="nowhere"):
        SinkhornDistance(0.1, 30, device="nowhere")


def test_attributes_may_be_changed(device: str) -> None:
    points = clouds(9, 6, device=device)
    layer = SinkhornDistance(0.5, 3)
    layer.eps, layer.max_iter, layer.thresh, layer.reduction = 0.1, 30, 0.0, "sum"
    assert torch.equal(layer(*points)[0], SinkhornDistance(0.1, 30, "sum", thresh=0)(*points)[0])
    layer.eps = -1.0
    with refused(ValueError, "SinkhornDistance", "eps", "got -1.0"):
        layer(*points)


def test_layouts(device: str) -> None:
    x, y = clouds(9, 6, device=device)
    check([x.mT.contiguous().mT, y.repeat_interleave(2, 1)[:, ::2]], 0.1, 30)


@pytest.mark.parametrize("eps", [1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_stops_where_the_original_does(eps: float, scale: float, dtype: torch.dtype, device: str) -> None:
    """At a large scale rows underflow, so that only potentials tell. No change is within 1e-3 of the threshold."""
    counts = []
    for n, m in [*SIZES, (40, 40)]:
        C = torch.cdist(*clouds(n, m)).square() * scale
        for thresh in (0.1, 1e-3, 10.0):
            theirs = sinkhorn_layer.SinkhornDistance(eps, 60, thresh=thresh)
            theirs.of_cost(C)
            below, above = (sinkhorn_layer.SinkhornDistance(eps, 60, thresh=thresh * (1 + x)) for x in (-0.01, 0.01))
            below.of_cost(C)
            above.of_cost(C)
            if below.iterations == above.iterations:  # no matter of rounding
                assert iterations_until(C.to(device, dtype), eps, 60, thresh) == theirs.iterations
                counts.append(theirs.iterations)
    assert len(counts) > 10
    assert len(set(counts)) > 2


def test_all_stop_together_and_thresh_is_a_keyword(device: str) -> None:
    x, y = clouds(16, 16, device=device)
    x[0] *= 5  # takes longer
    alone = [iterations_until(torch.cdist(x[k : k + 1], y[k : k + 1]).square(), 0.1, 500, 0.1) for k in range(3)]
    together = check([x, y], 0.1, 500)
    assert min(alone) < together < max(alone)
    assert check([x, y], 0.1, 20, thresh=0.0) == 20


def test_one_problem_of_nan_stops_none(device: str) -> None:
    """As there, the mean is NaN, so that all do every iteration; but the others' results are numbers."""
    x, y = clouds(5, 7, device=device)
    x[1, 2] = math.nan
    cost, _, C = SinkhornDistance(0.1, 12)(x, y)
    assert iterations_until(C, 0.1, 12, 0.1) == 12
    assert cost.isnan().tolist() == [False, True, False]


def test_empty_batch(device: str) -> None:
    x, y = (z[:0] for z in clouds(5, 7, device=device))
    assert [z.shape for z in SinkhornDistance(0.1, 10)(x, y)] == [(0,), (0, 5, 7), (0, 5, 7)]


def test_marginals_are_uniform(device: str) -> None:
    """The columns sum to 1 / m, and not to 1 / m + 1e-8."""
    _, pi, _ = SinkhornDistance(0.1, 100)(*clouds(5, 7, device=device))
    torch.testing.assert_close(pi.sum(1), torch.full_like(pi.sum(1), 1 / 7), rtol=1e-13, atol=0)


@pytest.mark.parametrize("batch", [None, 3])
def test_of_a_cost_matrix(batch: int | None, device: str) -> None:
    """Any costs, also negative and forbidden ones; the cost comes back as it is."""
    lead = () if batch is None else (batch,)
    C = torch.randn(*lead, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    leaves = [C.clone().requires_grad_(), C.cpu().clone().requires_grad_()]
    cost, pi, same = SinkhornDistanceCost(0.2, 40)(leaves[0])
    assert same is leaves[0]
    wanted = sinkhorn_layer.SinkhornDistance(0.2, 40).of_cost(leaves[1])
    # float64 rounding in 40 iterations of exponents of up to 3 / 0.2; 1e-8 m taken out exactly
    for x, y in zip((cost, pi), wanted[:2], strict=True):
        torch.testing.assert_close(x.cpu(), y / (1 + 8e-8), rtol=1e-11, atol=1e-20)
    grads = [torch.autograd.grad(x.square().sum(), y)[0].cpu() for x, y in ((cost, leaves[0]), (wanted[0], leaves[1]))]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-6)
    forbidden = C.clone()
    forbidden[..., 0, 0] = math.inf
    assert (SinkhornDistanceCost(0.2, 40)(forbidden)[1][..., 0, 0] == 0).all()


def test_the_two_others_of_that_name() -> None:
    """What docs/migrating.md says of the layers with forward(mu, nu, C) and with forward(c), from their formulas."""
    generator = torch.Generator().manual_seed(0)
    C, mu = (torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((6, 4), (6,)))
    nu = torch.full((4,), mu.sum().item() / 4, dtype=torch.float64)
    eps, max_iter = 0.2, 5
    u, v = torch.ones(6, 1).double(), torch.ones(1, 4).double()
    for _ in range(max_iter):
        v = eps * (nu.log() - ((u - C) / eps).logsumexp(0))[None]
        u = eps * (mu.log() - ((v - C) / eps).logsumexp(1))[:, None]
    init = (None, -eps * mu.log())
    out = otface_cuda.sinkhorn(C.mT, eps, nu, mu, max_iter=max_iter, return_plan=True, init=init)
    torch.testing.assert_close(out.plan.mT, ((u + v - C) / eps).exp(), rtol=1e-12, atol=0)

    c = -C
    u, v = torch.zeros(6, 1).double(), torch.zeros(1, 4).double()
    for half_step in range(2 * max_iter):
        if half_step % 2 == 0:
            u = eps * (math.log(1 / 6) - ((v + c) / eps).logsumexp(1, keepdim=True))
        else:
            v = eps * (math.log(1 / 4) - ((u + c) / eps).logsumexp(0, keepdim=True))
    out = otface_cuda.sinkhorn(-c, eps, max_iter=2 * max_iter // 2, return_plan=True)
    torch.testing.assert_close(out.plan, ((u + v + c) / eps).exp(), rtol=1e-12, atol=0)


def test_signature() -> None:
    """(eps, max_iter, reduction='none'), and thresh by keyword only; no state."""
    for layer in (SinkhornDistance, SinkhornDistanceCost):
        eps, max_iter, reduction, thresh, device = inspect.signature(layer).parameters.values()
        assert (device.name, device.kind, device.default) == ("device", inspect.Parameter.KEYWORD_ONLY, None)
        assert [p.name for p in (eps, max_iter, reduction)] == ["eps", "max_iter", "reduction"]
        assert (eps.default, max_iter.default, reduction.default) == (inspect.Parameter.empty,) * 2 + ("none",)
        assert (thresh.name, thresh.kind, thresh.default) == ("thresh", inspect.Parameter.KEYWORD_ONLY, 0.1)
    layer = SinkhornDistance(0.1, 100)
    assert isinstance(layer, torch.nn.Module)
    assert len(layer.state_dict()) == 0
    assert repr(layer) == "SinkhornDistance(eps=0.1, max_iter=100, reduction='none', thresh=0.1)"
    assert list(inspect.signature(layer.forward).parameters) == ["x", "y"]
    assert list(inspect.signature(SinkhornDistanceCost(0.1, 1).forward).parameters) == ["C"]


@pytest.mark.parametrize(
    ("name", "value", "error", "came"),
    [
        ("eps", 0.0, ValueError, "got 0.0"),
        ("eps", math.nan, ValueError, "got nan"),
        ("eps", "1", TypeError, "got '1'"),
        ("max_iter", 0, ValueError, "got 0"),
        ("max_iter", 1.5, TypeError, "got 1.5"),
        ("reduction", "max", ValueError, "got 'max'"),
        ("thresh", -1.0, ValueError, "got -1.0"),
    ],
)
def test_refused_settings(name: str, value: Any, error: type[Exception], came: str) -> None:
    with refused(error, "SinkhornDistance", name, came):
        SinkhornDistance(**{"eps": 0.1, "max_iter": 10, name: value})


def test_refused_data(device: str) -> None:
    layer, (x, y) = SinkhornDistance(0.1, 10), clouds(5, 7, device=device)
    with refused(TypeError, "SinkhornDistance", "x", "got None"):
        layer(None, y)
    with refused(ValueError, "SinkhornDistance", "y", "(2, 7, 2)"):
        layer(x, y[:2])
    with refused(TypeError, "SinkhornDistance", "y", "float32"):
        layer(x, y.float())
    with refused(ValueError, "SinkhornDistance", "x", "(3, 0, 2)"):
        layer(x[:, :0], y)
    with refused(ValueError, "SinkhornDistanceCost", "C", "(5,)"):
        SinkhornDistanceCost(0.1, 10)(torch.ones(5, device=device))
    with refused(ValueError, "SinkhornDistanceCost", "C", "(2, 0, 5)"):
        SinkhornDistanceCost(0.1, 10)(torch.ones(2, 0, 5, device=device))


def test_reduction_that_is_taken_away() -> None:
    layer = SinkhornDistanceCost(0.1, 5, "mean")
    layer.reduction = None
    assert layer(torch.rand(2, 3, 4))[0].shape == (2,)


def test_schedule_of_eps_under_compile(fresh_compiler: None) -> None:
    layer = SinkhornDistanceCost(0.1, 5, thresh=0)
    compiled, cost = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.rand(2, 3, 4)
    for step in range(12):
        layer.eps = 0.1 + 0.05 * step
        assert torch.equal(compiled(cost)[0], layer(cost)[0])

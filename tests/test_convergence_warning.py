"""A `tol` that was given and not reached: what is said of it, where, and how often."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import otface_cuda
from otface_cuda import ConvergenceWarning, SinkhornOutput
from otface_cuda.compat import layers, pot

from .problems import random_problem

TOL = 1e-6
TOO_FEW = {"tol": TOL, "max_iter": 2}
EPS = 0.05


@pytest.fixture(autouse=True)
def check_values_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTFACE_CHECK", "1")


def points(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(4, 6, 2, generator=generator).to(device) for _ in range(2))  # type: ignore[return-value]


PAIRS = [[0, 1], [2, 3], [3, 0], [0, 1]]
Call = Callable[..., SinkhornOutput]
CALLS: dict[str, Callable[[str], Call]] = {
    "sinkhorn": lambda device: lambda **o: otface_cuda.sinkhorn(random_problem(4, 6, 6, device=device).cost, EPS, **o),
    "sinkhorn_points": lambda device: lambda **o: otface_cuda.sinkhorn_points(*points(device), EPS, **o),
    "sinkhorn_pairs": lambda device: (
        lambda **o: otface_cuda.sinkhorn_pairs(
            points(device)[0], torch.tensor(PAIRS, device=device), EPS, metric="euclidean", **o
        )
    ),
}
every_call = pytest.mark.parametrize("function", CALLS)


def expected_of(function: str, out: SinkhornOutput) -> str:
    missed = out.error > TOL
    return (
        f"{function}: `tol` was not reached by {int(missed.sum())} of {missed.numel()} problems within `max_iter` (2) "
        f"iterations, their largest error is {out.error[missed].max().item():.3g}; "
    )


@every_call
def test_message(function: str, device: str) -> None:
    solve = CALLS[function](device)
    with pytest.warns(ConvergenceWarning) as caught:
        out = solve(**TOO_FEW)
    assert len(caught) == 1
    assert str(caught[0].message).startswith(expected_of(function, out))
    assert not out.converged.any()


@every_call
def test_silent(function: str, device: str) -> None:
    """Without a tol, and with one that is reached."""
    solve = CALLS[function](device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(max_iter=2)
        solve(max_iter=2, tol=torch.zeros(4, dtype=torch.float64, device=device))
        assert solve(tol=0.05, max_iter=500).converged.all()


def test_counts_only_those_that_missed_their_own_tol(device: str) -> None:
    """One has no tol, one reaches its own, one has no solution."""
    cost = random_problem(5, 6, 6, device=device).cost
    cost[4, 0, 0] = math.nan
    tol = torch.tensor([0.0, 2.0, 1e-6, 1e-9, 1e-9], dtype=torch.float64, device=device)
    with pytest.warns(ConvergenceWarning, match=r"2 of 5 problems") as caught:
        out = otface_cuda.sinkhorn(cost, EPS, max_iter=2, tol=tol)
    assert f"largest error is {out.error[2:4].max().item():.3g};" in str(caught[0].message)


def test_no_solution_is_no_lack_of_iterations(device: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not otface_cuda.sinkhorn(torch.full((2, 3, 3), math.nan, device=device), EPS, tol=TOL).converged.any()
        assert otface_cuda.sinkhorn(torch.ones(0, 3, 3, device=device), EPS, tol=TOL).converged.all()


def test_unbatched(device: str) -> None:
    cost = random_problem(1, 6, 6, device=device).cost[0]
    for tol in (TOL, torch.tensor(TOL), torch.tensor([TOL], device=device)):
        with pytest.warns(ConvergenceWarning, match="1 of 1 problems"):
            otface_cuda.sinkhorn(cost, EPS, tol=tol, max_iter=2)


class TestPlace:
    """The line of the user's file, whatever is in between."""

    @pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential, lambda m: nn.Sequential(nn.Sequential(m))])
    def test_through_modules(self, wrap: Callable[[nn.Module], nn.Module], device: str) -> None:
        module = wrap(otface_cuda.Sinkhorn(EPS, **TOO_FEW))
        cost = random_problem(2, 6, 6, device=device).cost
        with pytest.warns(ConvergenceWarning, match=r"^sinkhorn: ") as caught:
            module(cost)  # this line
        assert caught[0].filename == __file__
        assert "# this line" in line_of(caught[0])

    def test_in_a_function_that_torch_calls(self, device: str) -> None:
        class Network(nn.Module):
            def forward(self, cost: Tensor) -> SinkhornOutput:
                return otface_cuda.sinkhorn(cost, EPS, **TOO_FEW)  # the inner line

        with pytest.warns(ConvergenceWarning) as caught:
            Network()(random_problem(2, 6, 6, device=device).cost)
        assert "# the inner line" in line_of(caught[0])

    def test_of_the_implicit_gradient(self, device: str) -> None:
        """The line that calls backward; on a GPU that is done on another thread, which has no such line."""
        if device != "cpu":
            pytest.skip("another thread")
        cost = torch.rand(300, 4, 4, dtype=torch.float64)
        cost[:, :2, 2:] = cost[:, 2:, :2] = math.inf  # singular: see test_gradients.py
        out = otface_cuda.sinkhorn(cost.requires_grad_(), 0.5, grad="implicit")
        with pytest.warns(ConvergenceWarning, match=r"^sinkhorn: the adjoint system") as caught:
            out.f[:, 0].sum().backward()  # this line
        assert "# this line" in line_of(caught[0])


def line_of(caught: Any) -> str:
    with open(caught.filename) as file:
        return file.readlines()[caught.lineno - 1]


class TestFilters:
    """Those of `warnings` decide."""

    def shown(self, action: str, device: str, change_in_between: bool = False) -> list[str]:
        """What one line says in three calls, with another number each, and what another one says."""
        costs = [random_problem(count, 6, 6, device=device).cost for count in (1, 2, 3)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter(action)
            for cost in costs:
                otface_cuda.sinkhorn(cost, EPS, **TOO_FEW)
                if change_in_between:
                    warnings.simplefilter(action)
            otface_cuda.sinkhorn(costs[0], EPS, **TOO_FEW)
        return [re.search(r"by (\d+ of \d+)", str(w.message)).group(1) for w in caught]

    @pytest.mark.parametrize("action", ["default", "module", "once"])
    def test_once_for_each_line(self, action: str, device: str) -> None:
        assert self.shown(action, device) == ["1 of 1", "1 of 1"]

    def test_always(self, device: str) -> None:
        assert self.shown("always", device) == ["1 of 1", "2 of 2", "3 of 3", "1 of 1"]

    def test_ignore(self, device: str) -> None:
        assert self.shown("ignore", device) == []

    def test_error(self, device: str) -> None:
        cost = random_problem(2, 6, 6, device=device).cost
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            for _ in range(2):
                with pytest.raises(ConvergenceWarning, match="2 of 2"):
                    otface_cuda.sinkhorn(cost, EPS, **TOO_FEW)

    def test_by_category(self, device: str) -> None:
        cost = random_problem(2, 6, 6, device=device).cost
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", ConvergenceWarning)
            otface_cuda.sinkhorn(cost, EPS, **TOO_FEW)
        assert issubclass(ConvergenceWarning, RuntimeWarning)

    def test_nothing_is_kept_of_the_texts(self, device: str) -> None:
        """Another text in each call of one line leaves one entry."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for seed in range(20):
                otface_cuda.sinkhorn(random_problem(2, 6, 6, seed=seed, device=device).cost, EPS, **TOO_FEW)
        place = caught[0].filename, caught[0].lineno, "sinkhorn: tol"
        assert len(otface_cuda._convergence._shown[place]) == 2  # the text, and the version of the filters


@pytest.mark.usefixtures("fresh_compiler")
def test_not_in_a_compiled_graph(device: str) -> None:
    cost = random_problem(2, 6, 6, device=device).cost
    compiled = torch.compile(otface_cuda.sinkhorn, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        assert not compiled(cost, EPS, **TOO_FEW).converged.any()


@pytest.mark.parametrize("function", ["sinkhorn", "sinkhorn_points"])
def test_not_of_fake_tensors(function: str) -> None:
    """Where shapes alone are traced, nobody can tell; the indices of pairs are looked at in any case."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CALLS[function]("cpu")(**TOO_FEW).error.shape == (4,)


class TestReplacements:
    """They warn of what their originals warn of, in their words."""

    def test_that_do_not_warn(self, device: str) -> None:
        cost = random_problem(2, 6, 6, device=device).cost
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pot.solve_batch(cost, EPS, max_iter=2, tol=1e-9)
            pot.solve_batch(cost, EPS, max_iter=200, tol=1e-9)
            pot.solve_sample_batch(*points(device), EPS, max_iter=2, tol=1e-9)
            layers.SinkhornDistance(EPS, 2, thresh=1e-9)(*points(device))
            pot.sinkhorn2([], [], cost[0], EPS, numItermax=2)

    def test_pot(self, device: str) -> None:
        cost = random_problem(1, 6, 6, device=device).cost[0]
        with pytest.warns(UserWarning, match="Sinkhorn did not converge") as caught:
            pot.sinkhorn([], [], cost, EPS, numItermax=2)
        assert [w.category for w in caught] == [UserWarning]
        assert caught[0].filename == __file__


def test_both_kinds_on_one_line() -> None:
    """That the tol was missed does not hide that the gradients are NaN."""
    cost = torch.rand(1, 30, 30, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(2):
            otface_cuda.sinkhorn(cost, 1e-4, max_iter=3, tol=1e-9, grad="implicit").value.sum().backward()
    assert ["`tol`" in str(w.message) for w in shown] == [True, False]

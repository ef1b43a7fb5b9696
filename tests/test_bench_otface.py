"""The OTFace benchmark: that everyone is given the same problem, what it prints, and what it leaves out."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_otface as bench
import measure
import otface_peers as peers
import otface_problems as problems
import otface_products as products
import plot
import readme_table
from otface_problems import Row

from .otface_problems import transport_term

SMALL = Row(12, 16, 3, target=1.5)


@pytest.fixture(scope="module")
def problem() -> problems.Problem:
    return problems.make_problem(SMALL, "cpu")


@pytest.fixture(scope="module")
def exact(problem) -> problems.Exact:
    return problems.solve_float64(problem)


def test_float64_answer_is_one_triplet_at_a_time(problem, monkeypatch):
    monkeypatch.setattr(problems, "CHUNK", 7)  # pairs, the last chunk smaller
    exact = problems.solve_float64(problem)
    maps = problem.maps.double().requires_grad_()
    triplets = [tuple(row) for row in problem.triplets.tolist()]
    loss, active = transport_term(maps, triplets)
    assert 0 < active < len(triplets)
    assert exact.n_active == active
    torch.testing.assert_close(exact.loss, loss.detach())
    torch.testing.assert_close(exact.grad, torch.autograd.grad(loss, maps)[0])
    pairs = {tuple(sorted((a, other))) for a, *others in triplets for other in others}
    assert [tuple(pair) for pair in exact.pairs.tolist()] == sorted(pairs)
    assert {tuple(pair) for pair in exact.active.tolist()} < pairs


@pytest.mark.parametrize("peer", peers.EVERYONE.values(), ids=lambda peer: peer.name)
def test_everyone_computes_the_same(peer, problem, exact):
    difference = problems.largest_difference(peer.prepare(problem)(), exact)
    assert max(difference.values()) < 1e-5


def test_sample(problem):
    sample = problem.sample(5)
    assert len(sample.triplets) == 5
    assert torch.equal(sample.triplets[[0, -1]], problem.triplets[[0, -1]])
    assert len(problem.sample(10**6).triplets) == len(problem.triplets)


def test_rows():
    rows = problems.rows_for("cpu")
    assert [row.batch for row in rows] == [64, 128, 256, 512]
    assert [row for row in rows if row.target] == [Row(64, target=1.5)]
    assert not any(row.target for row in problems.rows_for("cuda"))
    assert SMALL.flops(10, 3) == 2 * 9 * 9 * 16 * (10 + 2 * 3)


def test_batch_of_64_has_about_two_thousand_hard_triplets():
    problem = problems.make_problem(Row(64, 8, 2), "cpu")
    assert 1500 < len(problem.triplets) < 2500


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """The multiplications and additions of the matrix products."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            a, b = args[:2]
            self.flops += 2 * a.numel() * b.shape[-1]
        return op(*args, **(kwargs or {}))


def test_products_are_those_of_the_term(problem, exact, monkeypatch):
    monkeypatch.setattr(products, "BATCH", 7)
    expected = SMALL.flops(len(exact.pairs), len(exact.active))
    calls = products.own_products(problem, exact)
    for name, call in calls.items():
        with Counter() as counter:
            call()
        assert counter.flops == expected or (name == "mm of blocks" and counter.flops > expected)


@pytest.fixture(scope="module")
def result() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "rows_for", lambda device: [SMALL, Row(8, 8, 2)])
        patch.setattr(bench, "ROW_SECONDS", 0.0)
        patch.setattr(bench, "peak_memory", lambda name, row, device: 1e6)
        return bench.run(bench.parse([]))


def test_json_is_complete_and_holds_no_path(result):
    assert json.loads(json.dumps(result)) == result
    assert result["benchmark"] == "otface"
    row = result["rows"][0]
    assert row["flops"] == SMALL.flops(row["pairs"], row["active_pairs"])
    fastest = min(seconds["median"] for seconds in row["products"].values())
    median = row["ours"]["seconds"]["median"]
    assert row["ours"]["own_products"]["times"] == pytest.approx(median / fastest)
    assert row["ours"]["limit"]["percent"] == pytest.approx(100 * row["flops"] / median / row["square_flops_per_s"])
    for entry in row["peers"]:
        assert entry["ratio"] == entry["seconds"]["median"] / median
    loop = next(entry for entry in row["peers"] if entry["name"] == "triplet-loop")
    assert loop["sampled"] == min(peers.SAMPLE, row["triplets"])
    assert str(Path.cwd()) not in json.dumps(result)


def test_table_names_the_target_and_the_extrapolation(result):
    text = bench.table(result)
    assert text.count("x (target 1.5x)") == 1
    assert "timed on 24 triplets and extrapolated to all" in text
    assert "12 maps" not in text
    assert "batch 12, maps 16 x 3 x 3: " in text


def test_the_picture_and_the_readme_table_are_made_from_the_json(result, tmp_path):
    text = readme_table.render(result)
    assert "| 12 maps of 16 x 3 x 3 |" in text
    assert "torch, one triplet at a time, extrapolated |" in text
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    plot.draw(result, tmp_path / "chart.png")
    with image.open(io.BytesIO((tmp_path / "chart.png").read_bytes())) as picture:
        assert picture.width == 1600


def test_who_has_no_room_fails_or_differs_is_not_timed(problem, exact, monkeypatch):
    def failing(problem):
        raise RuntimeError("out of luck at /usr/bin/none\nand more")

    batched = peers.PEERS["batched"]
    monkeypatch.setattr(batched, "prepare", failing)
    call, entry = bench.prepare(batched, problem, exact)
    assert call is None
    assert entry["cannot"] == "fails: RuntimeError: out of luck at"
    monkeypatch.setattr(batched, "needs", lambda problem: 10**15)
    assert bench.prepare(batched, problem, exact)[1]["cannot"].startswith("needs about 1000000.0 GB")
    wrong = replace(exact, loss=exact.loss + 1)
    call, entry = bench.prepare(peers.OURS, problem, wrong)
    assert call is None
    assert entry["cannot"].startswith("differs from float64: ")


def test_memory_of_a_call():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    row = Row(24, 64, 4)
    pairs = len(problems.pairs_of(problems.make_problem(row, "cpu").triplets)[0])
    costs = 4 * pairs * row.cells**2
    assert bench.peak_memory("batched", row, "cpu") > 20 * costs - measure.MEMORY_RESOLUTION


@pytest.mark.parametrize("name", ["nobody", "otface_cuda"])
def test_bad_arguments_give_one_sentence(name, capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--peers", name])
    said = capsys.readouterr().err
    assert said.startswith("bench_otface: --peers: no peer is called")
    assert said.count("\n") == 1

"""The margin benchmark: that everyone is given the same problem, what it prints, and what it leaves out."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_margin as bench
import margin_peers as peers
import margin_problems as problems
import measure
import plot
import readme_table
from margin_problems import Row

SMALL = Row(6, 50, 16, target=85)


@pytest.fixture
def problem() -> problems.Problem:
    return problems.make_problem(SMALL, "cpu")


def test_float64_answer_is_the_naive_head(problem, monkeypatch):
    monkeypatch.setattr(problems, "CHUNK_BYTES", 8 * 6 * 7)  # seven classes a chunk, the last one smaller
    exact = problems.solve_float64(problem)
    double = problems.Problem(SMALL, problem.x.double(), problem.weight.double(), problem.labels)
    x, weight = (t.requires_grad_() for t in (double.x, double.weight))
    cos = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(weight).T
    target = torch.nn.functional.one_hot(problem.labels, 50).bool()
    logits = problems.SCALE * torch.where(target, (cos.arccos() + problems.MARGIN).cos(), cos)
    loss = torch.nn.functional.cross_entropy(logits, problem.labels)
    grad_x, grad_weight = torch.autograd.grad(loss, (x, weight))
    torch.testing.assert_close(exact.loss, loss.detach())
    torch.testing.assert_close(exact.grad_x, grad_x)
    torch.testing.assert_close(exact.grad_weight.double(), grad_weight, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("peer", peers.EVERYONE.values(), ids=lambda peer: peer.name)
def test_everyone_computes_the_same(peer, problem):
    if not peer.installed:
        pytest.skip(f"{peer.name} is not installed")
    if peer.name == "compiled":
        pytest.skip("compiles for half a minute the naive head, which is tested")
    difference = problems.largest_difference(peer.prepare(problem)(), problems.solve_float64(problem))
    assert max(difference.values()) < 1e-4


def test_targets_have_the_cosines_they_should(problem):
    normalize = torch.nn.functional.normalize
    cosines = (normalize(problem.x) * normalize(problem.weight[problem.labels])).sum(1)
    low, high = problems.TARGET_COSINES
    assert cosines.min() > low - 1e-3
    assert cosines.max() < high + 1e-3


def test_rows():
    rows = problems.rows_for("cpu")
    assert len(rows) == 24
    assert [row for row in rows if row.target] == [Row(256, 100_000, 512, target=85)]
    on_gpu = set(problems.rows_for("cuda"))
    assert {Row(4096, c, 512, t) for c in (10**6, 10**7) for t in ("float32", "bfloat16")} < on_gpu
    assert not any(row.target for row in on_gpu)
    assert SMALL.flops(4) == 8 * 6 * 50 * 16
    assert [peers.OURS.products(row) for row in rows[:2] + rows[-2:]] == [3, 3, 4, 4]


@pytest.fixture(scope="module")
def result() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "rows_for", lambda device: [SMALL, Row(4, 20, 8), Row(64, 10**9, 512)])
        patch.setattr(bench, "ROW_SECONDS", 0.0)
        patch.setattr(bench.roofline, "MATRIX", 64)
        patch.setattr(bench, "peak_memory", lambda name, row, device: 1e6)
        return bench.run(bench.parse(["--peers", "naive"]))


def test_json_is_complete_and_holds_no_path(result):
    assert json.loads(json.dumps(result)) == result
    assert result["benchmark"] == "margin"
    assert [row["title"] for row in result["left_out"]] == ["B=64 C=1,000,000,000 d=512"]
    row = result["rows"][0]
    assert (row["other"]["products"], row["other"]["flops"]) == (4, SMALL.flops(4))
    for entry in (row["ours"], *row["peers"]):
        assert (entry["products"], entry["flops"]) == (3, SMALL.flops(3))
    best = max(limit["flops_per_s"] for limit in row["limits"].values())
    percent = 100 * SMALL.flops(3) / row["ours"]["seconds"]["median"] / best
    assert row["ours"]["limit"]["percent"] == pytest.approx(percent)
    naive = row["peers"][0]["seconds"]["median"]
    assert row["peers"][0]["ratio"] == naive / row["ours"]["seconds"]["median"]
    assert row["peers"][0]["ratio_other"] == naive / row["other"]["seconds"]["median"]
    assert str(Path.cwd()) not in json.dumps(result)


def test_table_names_targets_and_what_is_left_out(result):
    text = bench.table(result)
    assert text.count("% (target 85 %)") == 2
    assert text.count("1.0 (target 64.0)") == 2
    assert "Left out: B=64 C=1,000,000,000 d=512: needs about" in text


def test_the_picture_and_the_readme_table_are_made_from_the_json(result, tmp_path):
    text = readme_table.render(result)
    assert "| 6 x 50 classes, d = 16 |" in text
    assert "4 x 20" not in text  # of embeddings that are not the largest
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    plot.draw(result, tmp_path / "chart.png")
    with image.open(io.BytesIO((tmp_path / "chart.png").read_bytes())) as picture:
        assert picture.width == 1600


def test_who_fails_or_differs_is_not_timed(problem, monkeypatch):
    exact = problems.solve_float64(problem)

    def failing(problem):
        raise RuntimeError("no compiler at /usr/bin/none\nand more")

    monkeypatch.setattr(peers.PEERS["naive"], "prepare", failing)
    call, entry = bench.prepare(peers.PEERS["naive"], problem, exact)
    assert call is None
    assert entry["cannot"] == "fails: RuntimeError: no compiler at"
    wrong = replace(exact, loss=exact.loss + 1)
    call, entry = bench.prepare(peers.OURS, problem, wrong)
    assert call is None
    assert entry["cannot"].startswith("differs from float64: ")


def test_memory_beyond_the_gradient_of_the_weight():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    row = Row(64, 20_000, 64)
    assert bench.peak_memory("naive", row, "cpu") > 2 * row.logits_bytes - measure.MEMORY_RESOLUTION


@pytest.mark.parametrize("name", ["nobody", "otface_cuda"])
def test_bad_arguments_give_one_sentence(name, capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--peers", name])
    said = capsys.readouterr().err
    assert said.startswith("bench_margin: --peers: no peer is called")
    assert said.count("\n") == 1

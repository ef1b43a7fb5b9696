"""The benchmark of the drop-in replacements: that both sides compute the same, and what it prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_compat as bench
import compat_cases as cases
import compat_small
import readme_table


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pytorch-metric-learning, with numpy 2
@pytest.mark.parametrize("case", cases.CASES.values(), ids=lambda case: case.name)
def test_both_sides_compute_the_same(case):
    if not case.installed:
        pytest.skip(f"{case.package} is not installed")
    original, replacement = case.prepare(True, torch.Generator().manual_seed(1))
    assert bench.largest_difference(replacement(), original()) < 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pytorch-metric-learning, with numpy 2
@pytest.mark.parametrize("case", compat_small.SMALL.values(), ids=lambda case: case.name)
def test_both_sides_of_a_small_call_compute_the_same(case):
    if not case.installed:
        pytest.skip(f"{case.package} is not installed")
    pair = case.prepare(torch.Generator().manual_seed(1))
    for way in ["forward", "forward + backward"][: 1 + case.has_gradient]:
        found, expected = (bench.way_of(way, side, pair.inputs)() for side in (pair.replacement, pair.original))
        assert bench.largest_difference(found, expected) < 1e-4
        assert len(found) == (1 if way == "forward" else 1 + len(pair.inputs) + len(pair.original.parameters))


class Wrong(cases.Case):
    name, label = "wrong", "two things"

    def prepare(self, quick, generator):
        return lambda: (torch.ones(2),), lambda: (torch.zeros(2),)


class Failing(cases.Case):
    name, label = "failing", "nothing"

    def prepare(self, quick, generator):
        raise AttributeError("no solve_batch in /usr/lib/ot here")


@pytest.fixture(scope="module")
def result() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        known = {case.name: case for case in (cases.Layer(), Wrong(), Failing())}
        patch.setattr(bench, "CASES", known)
        names = ("small-loss_linear_batch", "small-CombinedMarginLoss-cos", "small-solve_batch-detach")
        small = {name: compat_small.SMALL[name] for name in names if compat_small.SMALL[name].installed}
        wrong = compat_small.Pair(
            compat_small.Side(lambda x: x), compat_small.Side(lambda x: x.new_zeros(2) * x), (torch.ones(2),)
        )
        small["small-wrong"] = compat_small.Small("small-wrong", "two small things", lambda generator: wrong)
        patch.setattr(bench, "SMALL", small)
        return bench.run(bench.parse(["--quick"]))


def test_json_is_complete_and_holds_no_path(result):
    assert json.loads(json.dumps(result)) == result
    assert result["benchmark"] == "compat"
    layer, wrong, failing = result["rows"]
    assert layer["ratio"] == layer["original"]["median"] / layer["replacement"]["median"]
    assert layer["difference"] < 1e-4
    assert (wrong["cannot"], "ratio" in wrong) == ("the two differ by 1e+00", False)
    assert failing["cannot"] == "fails: AttributeError: no solve_batch in here"


def test_small_calls(result):
    *rows, wrong = result["small"]
    assert (wrong["cannot"], "ways" in wrong) == ("the two differ by 1e+00", False)
    assert "small-CombinedMarginLoss-cos" in [row["name"] for row in rows]
    for row in rows:
        assert list(row["ways"]) == ["forward", "forward + backward"][: 1 + (row["name"] != "small-solve_batch-detach")]
        for times in row["ways"].values():
            assert times["ratio"] == times["original"]["median"] / times["replacement"]["median"]
            assert 1e-7 < times["replacement"]["median"] < 1  # of one call
    text = bench.table(result)
    assert "CombinedMarginLoss(64.0, 1.0, 0.0, 0.4), 8 x 10" in text
    assert "two small things: the two differ by 1e+00" in text
    table = readme_table.render(result)
    assert "| CombinedMarginLoss(64.0, 1.0, 0.0, 0.4), 8 x 10 |" in table
    assert "two small things" not in table
    without = readme_table.render({name: x for name, x in result.items() if name != "small"})
    assert "small calls" in table
    assert "small calls" not in without


def test_tables(result):
    text = bench.table(result)
    assert "the two differ by 1e+00" in text
    assert "SinkhornDistance(0.1, 100)" in text
    table = readme_table.render(result)
    assert "| SinkhornDistance(0.1, 100), 64 of 49 points each, forward + backward; the original is" in table
    assert "two things" not in table


@pytest.mark.parametrize("words", [["--device", "cuda"], ["--plot", "chart.png"], ["--peers", "nobody"]])
def test_bad_arguments_give_one_sentence(words, capsys):
    with pytest.raises(SystemExit):
        bench.parse(words)
    assert capsys.readouterr().err.count("\n") == 1

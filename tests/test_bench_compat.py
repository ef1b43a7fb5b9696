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
import readme_table


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pytorch-metric-learning, with numpy 2
@pytest.mark.parametrize("case", cases.CASES.values(), ids=lambda case: case.name)
def test_both_sides_compute_the_same(case):
    if not case.installed:
        pytest.skip(f"{case.package} is not installed")
    original, replacement = case.prepare(True, torch.Generator().manual_seed(1))
    assert bench.largest_difference(replacement(), original()) < 1e-4


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
        return bench.run(bench.parse(["--quick"]))


def test_json_is_complete_and_holds_no_path(result):
    assert json.loads(json.dumps(result)) == result
    assert result["benchmark"] == "compat"
    layer, wrong, failing = result["rows"]
    assert layer["ratio"] == layer["original"]["median"] / layer["replacement"]["median"]
    assert layer["difference"] < 1e-4
    assert (wrong["cannot"], "ratio" in wrong) == ("the two differ by 1e+00", False)
    assert failing["cannot"] == "fails: AttributeError: no solve_batch in here"


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

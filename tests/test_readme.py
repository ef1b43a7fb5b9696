"""The documents: their Python runs, their links lead somewhere, and their tables are those of the committed results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from . import sinkhorn_layer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import accuracy
import readme_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CHART, CHART_DATA = ROOT / "docs/images/bench_sinkhorn.png", ROOT / "benchmarks/results/sinkhorn_cpu.json"


def blocks(language: str) -> list[pytest.param]:
    """The code blocks of a language in all documents."""
    return [
        pytest.param(code, id=f"{document.name}-{number}")
        for document in DOCUMENTS
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL))
    ]


def needed(code: str) -> set[str]:
    """What a block imports that is not there with torch."""
    imported = {name.split(".")[0] for name in re.findall(r"^(?:import|from) ([\w.]+)", code, re.MULTILINE)}
    return imported - sys.stdlib_module_names - {"torch", "otface_cuda"}


@pytest.mark.parametrize("code", blocks("python"))
def test_python_says_what_it_needs(code):
    """tools/readme_check.sh runs the blocks that do not say it in an environment with torch alone."""
    assert bool(needed(code)) == ("# pip install " in code)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs_by_itself(code):
    for package in needed(code):
        pytest.importorskip(package)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("code", [code for code in blocks("diff") if code.id.startswith("README")])
def test_both_sides_of_a_diff_are_the_same(code, monkeypatch):
    monkeypatch.setitem(sys.modules, "layers", sinkhorn_layer)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, size, 2, generator=generator).requires_grad_() for size in (5, 7))
    results = []
    for sign in "-+":
        names = {"x": x, "y": y}
        exec("\n".join(line[1:] for line in code.splitlines() if line[0] in (sign, " ")), names)
        results.append((names["cost"], names["plan"], *torch.autograd.grad(names["cost"].sum(), (x, y))))
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


def test_accuracy_measures_what_its_table_says():
    cost = next(accuracy.costs())[:2]
    f_g, plan, transport_cost, rebuilds, loop_f_g, loop_plan = accuracy.measure(cost, 0.01, 5).tolist()
    assert max(f_g, plan, transport_cost) < 1e-5
    assert max(loop_f_g, loop_plan) < 1e-4
    assert rebuilds == 0
    assert accuracy.measure(cost, 1e-4, 50)[3] > 0


def links() -> list[pytest.param]:
    found = [
        (document, target)
        for document in DOCUMENTS
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
        if not re.match(r"\w+:", target)
    ]
    return [pytest.param(document.parent / target, id=f"{document.name}-{target}") for document, target in found]


@pytest.mark.parametrize("path", links())
def test_links_lead_to_files(path):
    if path == CHART and not CHART_DATA.exists():
        pytest.skip("the benchmark's result is not committed yet, so there is no chart of it")
    assert path.exists()


TABLES = {
    match["result"]: match[0]
    for name in readme_table.DOCUMENTS
    for match in readme_table.MARKED.finditer((ROOT / name).read_text())
}


@pytest.mark.parametrize("result", list(TABLES))
def test_tables_are_those_of_the_results(result):
    assert readme_table.fill(TABLES[result]) == TABLES[result], "run: python benchmarks/readme_table.py"


def test_documents_have_all_tables():
    names = ("sinkhorn_cpu", "sinkhorn_cpu_faces", "margin_cpu", "otface_cpu", "compat_cpu")
    assert list(TABLES) == [f"benchmarks/results/{name}.json" for name in names]
    assert all((ROOT / result).exists() for result in TABLES)


def row(title: str, **changes) -> dict:
    """A row as bench_sinkhorn.py writes it, as far as a table reads it."""
    seconds = {"median": 0.002, "quartiles": [0.001, 0.003]}
    pot = {"name": "pot-batch", "label": "POT batch", "version": "0.9.7", "ratio": 57.1, "seconds": seconds}
    ours = {"seconds": seconds, "difference": {"plan": 1e-7, "transport_cost": 2e-8}, "peak_bytes": 1.25e6}
    size = {"batch": 4, "n": 7, "m": 9, "eps": 0.1, "iterations": 12, "backward": False}
    others = {"input": "random points", "other_programs_cpus": 0.0, "limit": {"percent": 51.2, "of": "matmul"}}
    return {"title": title, **size, **others, "ours": ours, "peers": [pot], **changes}


def test_fill_makes_a_table_of_a_result(tmp_path):
    without = {"name": "pot-batch", "label": "POT batch", "version": "0.9.7", "cannot": "too large"}
    rows = [row("one"), row("two", backward=True, peers=[without], limit=None, other_programs_cpus=0.7)]
    result = {
        "benchmark": "sinkhorn",
        "info": {"cpu_isa": "avx2"},
        "device_name": "CPU X",
        "threads": 2,
        "torch": "2.13.0",
        "commit": "0123456789abcdef",
        "dirty": False,
        "date": "2026-01-02 03:04 UTC",
        "faces": None,
        "rows": rows,
    }
    (tmp_path / "r.json").write_text(json.dumps(result))
    text = "before\n<!-- table of r.json -->\nold\n<!-- end of table -->\nafter\n"
    filled = readme_table.fill(text, tmp_path)
    assert filled.splitlines() == [
        "before",
        "<!-- table of r.json -->",
        "",
        "| problems | otface_cuda | of the limit | from float64 | peak memory | POT batch |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| 4 of 7x9, eps 0.1, 12 iterations, forward | 2.00 ms | 51 % matmul | 1e-07 | 1.2 MB | 57x |",
        "| 4 of 7x9, eps 0.1, 12 iterations, forward + backward | 2.00 ms | - | 1e-07 | 1.2 MB | - |",
        "",
        "CPU X, 2 threads, avx2, commit 0123456789, 2026-01-02. Versions: torch 2.13.0, pot 0.9.7. "
        "Other programs used up to 0.7 CPUs during these timings.",
        "",
        "<!-- end of table -->",
        "after",
    ]
    assert readme_table.fill(filled, tmp_path) == filled
    assert readme_table.fill(text.replace("r.json", "none.json"), tmp_path) == text.replace("r.json", "none.json")


def test_a_table_of_faces_leaves_out_other_rows(tmp_path):
    rows = [row("one", input="faces"), row("two", batch=99)]
    result = {
        "info": {"cpu_isa": "avx2"},
        "device_name": "X",
        "threads": 1,
        "torch": "2",
        "commit": None,
        "dirty": True,
    }
    table = readme_table.render({**result, "date": "2026-01-02", "faces": {"pairs": 4}, "rows": rows})
    assert "| 4 of 7x9" in table
    assert "99 of" not in table
    assert "commit unknown with changes" in table

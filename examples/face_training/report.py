"""The report of a comparison: a table in Markdown, and two pictures, all from the results that the runs left."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def write_report(result: dict[str, Any], folder: Path) -> None:
    """``result``: what results.json of the comparison holds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(report(result))
    draw_roc(result, folder / "roc.png")
    draw_triplets(result, folder / "triplets.png")


def spread(values: list[float]) -> str:
    """Percent: the mean, and the standard deviation where there are several."""
    text = f"{100 * statistics.mean(values):.2f}"
    return f"{text} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else text


def report(result: dict[str, Any]) -> str:
    variants = result["variants"]
    one = next(iter(variants.values()))["runs"][0]
    fars = list(one["roc"]["tar"])
    weights = list(one["rerank"]["weights"])
    seeds = [run["seed"] for run in next(iter(variants.values()))["runs"]]
    rows = [["loss", "accuracy", *(f"TAR at FAR {far}" for far in fars), "training"]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for name, variant in variants.items():
        runs = variant["runs"]
        cells = [spread([run["verification"]["mean"] for run in runs])]
        cells += [spread([run["roc"]["tar"][far] for run in runs]) for far in fars]
        rows.append([name, *cells, f"{statistics.mean(run['seconds'] for run in runs):.0f} s"])
    text = [
        "# Losses compared on faces",
        "",
        f"Made by `{result['command']}`.",
        "",
        f"Trained on {result['images']:,} images of {result['people']} people, tested on {one['test_pairs']:,} pairs "
        f"of folds {', '.join(one['verification']['folds'])}, whose people are none of these. Size {result['size']}x"
        f"{result['size']}, {result['epochs']:g} epochs, seeds {', '.join(map(str, seeds))}. Percent, mean ± standard "
        "deviation over the seeds. Accuracy: mean of the folds, each at the threshold that is best on the others. TAR "
        f"at FAR: over all pairs of the {one['test_images']:,} images of the test people, "
        f"{one['roc']['impostors']:,} of two people and {one['roc']['genuine']:,} of one, where people with "
        "many images weigh most.",
        "",
        *table(rows),
    ]
    if weights:
        text += [
            "",
            "Accuracy with the distance (1 - w) * (1 - cosine) + w * OT between the feature maps, "
            f"eps {one['rerank']['eps']:g}, {one['rerank']['iterations']} iterations:",
            "",
            *rerank_table(variants, weights),
        ]
    if len(variants) > 1 and len(seeds) > 1:
        text += ["", *differences(variants)]
    return "\n".join(
        [
            *text,
            "",
            "![ROC](roc.png)",
            "",
            "![Hard and active triplets in a batch](triplets.png)",
            "",
            f"{result['machine']}, torch {result['torch']}, commit {result['commit']}, {result['date']}; "
            f"{result['minutes']:.0f} minutes of training in all.",
            "",
        ]
    )


def table(rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in rows]


def rerank_table(variants: dict[str, Any], weights: list[str]) -> list[str]:
    rows = [["loss", "w = 0", *(f"w = {w}" for w in weights)], ["---", *["---:"] * (len(weights) + 1)]]
    for name, variant in variants.items():
        runs = variant["runs"]
        plain = spread([run["verification"]["mean"] for run in runs])
        rows.append([name, plain, *(spread([r["rerank"]["weights"][w]["mean"] for r in runs]) for w in weights)])
    return table(rows)


def differences(variants: dict[str, Any]) -> list[str]:
    """Seed by seed, since runs of a seed begin with the same network and see the same images."""
    (first, base), *others = variants.items()
    accuracy = {run["seed"]: run["verification"]["mean"] for run in base["runs"]}
    lines = [f"Points of accuracy above {first}, seed by seed:", ""]
    for name, variant in others:
        found = [
            100 * (run["verification"]["mean"] - accuracy[run["seed"]])
            for run in variant["runs"]
            if run["seed"] in accuracy
        ]
        lines.append(f"- {name}: {', '.join(f'{value:+.2f}' for value in found)}")
    return lines


def draw_roc(result: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, variant), colour in zip(result["variants"].items(), COLOURS, strict=False):
        curves = [run["roc"]["curve"] for run in variant["runs"]]
        fars = [far for far, _ in curves[0]]
        tars = list(zip(*([tar for _, tar in curve] for curve in curves), strict=True))
        axes.plot(fars, [statistics.mean(t) for t in tars], color=colour, label=name)
        axes.fill_between(fars, [min(t) for t in tars], [max(t) for t in tars], color=colour, alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set(xlabel="false accept rate", ylabel="true accept rate", ylim=(0, 1))
    axes.grid(color="0.9")
    axes.legend(frameon=False, title="mean and range of the seeds", loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_triplets(result: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.5), sharex=True, sharey=True, layout="constrained")
    for (name, variant), colour in zip(result["variants"].items(), COLOURS, strict=False):
        for axes, column in ((left, "hard"), (right, "active")):
            logs = [run["log"] for run in variant["runs"]]
            epochs = [float(epoch) for epoch in logs[0]["epoch"]]
            counts = list(zip(*(log[column] for log in logs), strict=False))
            means = [max(1.0, statistics.mean(c)) for c in counts]  # 0 has no place on a logarithmic axis
            axes.plot(epochs[: len(means)], means, color=colour, label=name)
    left.set_yscale("log")
    left.set(title="hard: cosines in the wrong order", xlabel="epoch", ylabel="triplets in a batch (at least 1)")
    right.set(title="active: transport distances too", xlabel="epoch")
    for axes in (left, right):
        axes.grid(color="0.9")
    left.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def read_log(path: Path) -> dict[str, list[float]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in ("epoch", "hard", "active")}


def training_seconds(path: Path) -> float:
    with path.open(newline="") as file:
        return float(list(csv.DictReader(file))[-1]["seconds"])


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return plt

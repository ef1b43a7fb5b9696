"""Draw the chart of a benchmark from its JSON, so that a picture never drifts from its data.

python benchmarks/plot.py results/sinkhorn_cpu.json sinkhorn_cpu.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind readers can tell apart; with each a marker of its own.
STYLES = {
    "pot-batch": ("#0072B2", "o"),
    "torch-loop": ("#E69F00", "s"),
    "torch-scaling": ("#009E73", "D"),
    "ott-jax": ("#CC79A7", "^"),
    "geomloss": ("#56B4E9", "v"),
    "pot-loop": ("#000000", "P"),
    "flash-sinkhorn": ("#D55E00", "X"),
    "flash-sinkhorn-fp32": ("#999999", "*"),
    "naive": ("#0072B2", "o"),
    "compiled": ("#E69F00", "s"),
    "pytorch-metric-learning": ("#009E73", "D"),
    "triplet-loop": ("#0072B2", "o"),
    "batched": ("#E69F00", "s"),
}
OURS_COLOUR = "#D55E00"
OTHER_COLOUR = "#999999"  # the margin loss with the opposite choice of store_logits


def draw(result: dict[str, Any], path: Path) -> None:
    """Left, per row, how many times faster than each peer (log scale); right, the percentage of the machine's limit."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = shown(result)
    places = range(len(rows) - 1, -1, -1)
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(8, 1.6 + 0.55 * len(rows)), width_ratios=[3, 1], sharey=True, layout="constrained"
        )
        present = {entry["name"] for row in rows for entry in row["peers"]}
        styles = {name: style for name, style in STYLES.items() if name in present}
        for i, (name, (colour, marker)) in enumerate(styles.items()):
            shift = 0.08 * ((len(styles) - 1) / 2 - i)  # so that equal ratios do not hide each other
            found = [
                (entry, y)
                for row, y in zip(rows, places, strict=True)
                for entry in row["peers"]
                if entry["name"] == name and "ratio" in entry
            ]
            if found:
                ratios = [entry["ratio"] for entry, _ in found]
                heights = [y + shift for _, y in found]
                legend = found[0][0]["label"] + (", at its error" if "ours_seconds" in found[0][0] else "")
                legend += " (extrapolated)" if "sampled" in found[0][0] else ""
                left.scatter(ratios, heights, s=55, color=colour, marker=marker, label=legend, zorder=3)
        left.set_xscale("log")
        left.axvline(1, color="0.4", linewidth=1)
        left.set_yticks(list(places), [label(row) for row in rows])
        left.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        low, high = left.get_xlim()
        if high < 10 * low:  # too few powers of ten to read it by
            left.xaxis.set_minor_formatter(lambda value, _: f"{value:g}x")
        left.set_xlabel("times faster than the peer")
        left.grid(axis="x", color="0.9", zorder=0)
        left.grid(axis="y", color="0.95", zorder=0)

        limits = [limit["percent"] if (limit := row.get("limit", row["ours"].get("limit"))) else 0 for row in rows]
        right.barh(list(places), limits, height=0.5, color=OURS_COLOUR, zorder=3)
        for row, y, percent in zip(rows, places, limits, strict=True):
            if percent:
                of = f" {row['limit']['of']}" if "limit" in row else ""
                white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                right.text(percent + 4, y, f"{percent:.0f} %{of}", va="center", fontsize=9, bbox=white)
        other = [
            (row["other"]["limit"]["percent"], y - 0.33)
            for row, y in zip(rows, places, strict=True)
            if "limit" in row.get("other", {})
        ]
        if other:
            right.barh(
                [y for _, y in other],
                [percent for percent, _ in other],
                height=0.16,
                color=OTHER_COLOUR,
                zorder=3,
                label="ours the other way",
            )
            limits += [percent for percent, _ in other]
        right.set_xlim(0, max(100, *limits) * 1.45)
        right.set_xticks([0, 50, 100])
        right.axvline(100, color="0.4", linewidth=1)
        right.set_xlabel("% of the limit")
        right.tick_params(axis="y", length=0)
        (handles, labels), (more_handles, more_labels) = (side.get_legend_handles_labels() for side in (left, right))
        figure.legend(handles + more_handles, labels + more_labels, loc="outside upper center", ncols=4, frameon=False)
        figure.supxlabel(f"{machine(result)}, torch {result['torch']}", fontsize=8, color="0.4")
        figure.savefig(path, dpi=200)
        plt.close(figure)


def shown(result: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows; of the margin loss, for which they are many, those with the largest embeddings."""
    rows = result["rows"]
    if result.get("benchmark") == "margin" and rows:
        largest = max(row["dimension"] for row in rows)
        return [row for row in rows if row["dimension"] == largest]
    return rows


def machine(result: dict[str, Any]) -> str:
    """What it was measured on, in words."""
    if "gpu" in result:
        return f"{result['device_name']}, {result['gpu']['multiprocessors']} multiprocessors"
    return f"{result['device_name']}, {result['threads']} threads"


def label(row: dict[str, Any]) -> str:
    if "triplets" in row:
        return f"batch {row['batch']}\n{row['triplets']:,} triplets"
    if "classes" in row:
        autocast = "" if row["dtype"] == "float32" else f"\n{row['dtype']}"
        return f"B={row['batch']}, C={row['classes']:,}, d={row['dimension']}{autocast}"
    kind = "forward + backward" if row["backward"] else "forward"
    return f"{row['batch']} of {row['n']}x{row['m']}, eps {row['eps']:g}\n{row['iterations']} iterations, {kind}"


def main(argv: list[str]) -> int:
    if len(argv) != 2 or not argv[1].endswith(".png"):
        print("usage: python benchmarks/plot.py RESULT.json PICTURE.png", file=sys.stderr)
        return 2
    draw(json.loads(Path(argv[0]).read_text()), Path(argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

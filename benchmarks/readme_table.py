"""Put the tables of the documents in, each from the committed result that the comment above it names.

python benchmarks/readme_table.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from harness import DISTURBED, megabytes, milliseconds, processor, significant
from margin_peers import PEERS as MARGIN_PEERS
from otface_peers import PEERS as OTFACE_PEERS
from peers import PEERS
from plot import shown

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/migrating.md")
MARKED = re.compile(r"(<!-- table of (?P<result>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def fill(text: str, root: Path = ROOT) -> str:
    """The text with every marked table made anew. One whose result does not exist yet is left as it is."""

    def table_of(match: re.Match[str]) -> str:
        path = root / match["result"]
        return match[1] + render(json.loads(path.read_text())) + match[3] if path.exists() else match[0]

    return MARKED.sub(table_of, text)


def render(result: dict[str, Any]) -> str:
    """A Markdown table, one line per row of the benchmark, and a line that says where and how it was measured."""
    renderers = {
        "sinkhorn": render_sinkhorn,
        "margin": render_margin,
        "otface": render_otface,
        "compat": render_compat,
    }
    return renderers[result.get("benchmark", "sinkhorn")](result)


def render_sinkhorn(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["input"] == "faces" or not result["faces"]]
    timed = {entry["name"]: entry for row in rows for entry in row["peers"] if "ratio" in entry}
    peers = [name for name in PEERS if name in timed]
    head = [
        "problems",
        "otface_cuda",
        "of the limit",
        "from float64",
        "peak memory",
        *(timed[p]["label"] for p in peers),
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *(line(row, peers) for row in rows)]
    packages = [f"{PEERS[name].package} {timed[name]['version']}" for name in peers]
    return markdown(lines, made(result, rows, packages))


def markdown(lines: list[list[str]], made: str) -> str:
    return "\n".join(["", *("| " + " | ".join(cells) + " |" for cells in lines), "", made, "", ""])


def made(result: dict[str, Any], rows: list[dict[str, Any]], packages: list[str]) -> str:
    """Where and how it was measured."""
    torch_version = f"torch {result['torch']}"  # more exact than that of torch's package
    others = dict.fromkeys(package for package in packages if not package.startswith("torch "))
    versions = ", ".join([torch_version, *others])
    text = (
        f"{processor(result)}, commit {(result['commit'] or 'unknown')[:10]}"
        f"{' with changes' if result['dirty'] else ''}, {result['date'][:10]}. Versions: {versions}."
    )
    disturbance = max(row["other_programs_cpus"] or 0 for row in rows)
    if disturbance > DISTURBED:
        text += f" Other programs used up to {disturbance:.1f} CPUs during these timings."
    return text


def render_margin(result: dict[str, Any]) -> str:
    rows = shown(result)
    timed = {entry["name"]: entry for row in rows for entry in row["peers"] if "ratio" in entry}
    peers = [name for name in MARGIN_PEERS if name in timed]
    head = [
        "forward + backward",
        "otface_cuda",
        "of the limit",
        "its logits",
        "the other way",
        "of the limit",
        "from float64",
        "peak memory",
        *(timed[p]["label"] for p in peers),
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *(margin_line(row, peers) for row in rows)]
    packages = [f"{MARGIN_PEERS[name].package} {timed[name]['version']}" for name in peers]
    return markdown(lines, made(result, rows, packages))


def margin_line(row: dict[str, Any], peers: list[str]) -> list[str]:
    ours, entries = row["ours"], {entry["name"]: entry for entry in row["peers"]}
    autocast = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    cells = []
    for entry in (ours, row["other"]):
        timed = "seconds" in entry
        cells += [f"{milliseconds(entry['seconds']['median'])} ms" if timed else "-"]
        cells += [f"{entry['limit']['percent']:.0f} %" if timed else "-"]
    cells.insert(2, "stored" if ours["products"] == 3 else "computed twice")
    return [
        f"{row['batch']} x {row['classes']:,} classes, d = {row['dimension']}{autocast}",
        *cells,
        f"{max(ours['difference'].values()):.0e}",
        f"{megabytes(ours['peak_bytes'])} MB" if ours.get("peak_bytes") is not None else "-",
        *(f"{significant(entries[p]['ratio'])}x" if "ratio" in entries.get(p, {}) else "-" for p in peers),
    ]


def render_otface(result: dict[str, Any]) -> str:
    rows = result["rows"]
    timed = {entry["name"]: entry for row in rows for entry in row["peers"] if "ratio" in entry}
    peers = [name for name in OTFACE_PEERS if name in timed]
    head = [
        "batch",
        "hard triplets",
        "otface_cuda",
        "its products",
        "times its products",
        "of the limit",
        "from float64",
        "peak memory",
        *(timed[p]["label"] + (", extrapolated" if "sampled" in timed[p] else "") for p in peers),
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *(otface_line(row, peers) for row in rows)]
    return markdown(lines, made(result, rows, []))


def otface_line(row: dict[str, Any], peers: list[str]) -> list[str]:
    ours, entries = row["ours"], {entry["name"]: entry for entry in row["peers"]}
    return [
        f"{row['batch']} maps of {row['channels']} x {row['side']} x {row['side']}",
        f"{row['triplets']:,}",
        f"{milliseconds(ours['seconds']['median'])} ms",
        f"{milliseconds(row['products'][ours['own_products']['by']]['median'])} ms",
        f"{ours['own_products']['times']:.2f}x",
        f"{ours['limit']['percent']:.0f} %",
        f"{max(ours['difference'].values()):.0e}",
        f"{megabytes(ours['peak_bytes'])} MB" if ours.get("peak_bytes") is not None else "-",
        *(f"{significant(entries[p]['ratio'])}x" if "ratio" in entries.get(p, {}) else "-" for p in peers),
    ]


def render_compat(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if "ratio" in row]
    lines = [["", "original", "replacement", "ratio", "largest difference"], ["---", *["---:"] * 4]]
    for row in rows:
        times = (f"{milliseconds(row[side]['median'])} ms" for side in ("original", "replacement"))
        title = row["title"] + (f"; {row['note']}" if row["note"] else "")
        lines.append([title, *times, f"{significant(row['ratio'])}x", f"{row['difference']:.0e}"])
    small = [row for row in result.get("small", []) if "ways" in row]
    packages = {f"{row['package']} {row['version']}" for row in rows + small if row["package"] != "torch"}
    made_how = made(result, rows + small, sorted(packages))
    if not small:
        return markdown(lines, made_how)
    return markdown(lines, "") + markdown(small_lines(small), made_how)


def small_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Forward, and forward + backward: original, replacement, ratio."""
    head = [
        "small calls, one thread",
        "original",
        "replacement",
        "ratio",
        "with backward: original",
        "replacement",
        "ratio",
    ]
    lines = [head, ["---", *["---:"] * 6]]
    for row in rows:
        cells = []
        for way in ("forward", "forward + backward"):
            times = row["ways"].get(way)
            if times is None:
                cells += ["-"] * 3
                continue
            cells += [f"{significant(1e6 * times[side]['median'], 3)} us" for side in ("original", "replacement")]
            cells.append(f"{significant(times['ratio'])}x")
        lines.append([row["title"], *cells])
    return lines


def line(row: dict[str, Any], peers: list[str]) -> list[str]:
    ours, entries = row["ours"], {entry["name"]: entry for entry in row["peers"]}
    kind = "forward + backward" if row["backward"] else "forward"
    ratios = [f"{significant(entries[name]['ratio'])}x" if "ratio" in entries.get(name, {}) else "-" for name in peers]
    return [
        f"{row['batch']} of {row['n']}x{row['m']}, eps {row['eps']:g}, {row['iterations']} iterations, {kind}",
        f"{milliseconds(ours['seconds']['median'])} ms",
        f"{row['limit']['percent']:.0f} % {row['limit']['of']}" if row["limit"] else "-",
        f"{max(ours['difference'].values()):.0e}" if "difference" in ours else "-",
        f"{megabytes(ours['peak_bytes'])} MB" if ours.get("peak_bytes") is not None else "-",
        *ratios,
    ]


def main() -> int:
    missing = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        missing += [m["result"] for m in MARKED.finditer(text) if not (ROOT / m["result"]).exists()]
        (ROOT / name).write_text(fill(text))
    for result in missing:
        print(f"readme_table: {result} does not exist, its table is left as it is", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

"""Train with several losses and seeds, test, and write a report: a table, the ROC, the curve of hard triplets.

python examples/compare_losses.py --faces lfw112.tar --pairs lfw_pairs.txt --out docs/faces
python examples/compare_losses.py --faces lfw112.tar --pairs lfw_pairs.txt --out sweep --seeds 0 \\
    --variants arcface otface-arcface otface-arcface,ot_weight=1 otface-arcface,eps=0.1 otface-arcface,alpha=0.1

The first trains ArcFace and OTFace on top of ArcFace with three seeds each on the people whom no pair of folds 7 and 8
names, that is of folds 1 to 6 and of none, and tests on those of 7 and 8, on a CPU in less than 40 minutes. A variant
is a loss of examples/train_faces.py and settings that differ. RUNS keeps a folder for each run: after a kill the same
command goes on, and finished runs are not repeated. Needs pillow, tqdm and matplotlib.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from face_training.data import FacesError
from face_training.evaluate import evaluate
from face_training.report import read_log, training_seconds, write_report
from face_training.run_folder import make_folder, write_text
from face_training.settings import LOSSES, RANGES, Range, Settings, check_number, check_settings, setting_types
from face_training.training import Process, train
from train_faces import Faces, load_faces, summary

# What suits 64x64 pixels and about 500 people on two cores.
QUICK = Settings(size=64, stride=8, epochs=35.0)
RERANK = (0.2, 0.4, 0.6, 0.8, 1.0)
SHARED = ("loss", "size", "epochs", "seed")  # settings that a variant does not name: those of the whole comparison


def variant(text: str, base: Settings) -> Settings:
    """``otface-arcface,ot_weight=1`` -> settings."""
    loss, *changes = text.split(",")
    if loss not in LOSSES:
        raise FacesError(f"--variants: {loss!r} is no loss; there are {', '.join(LOSSES)}")
    kinds = {name: kind for name, kind in setting_types().items() if name not in SHARED}
    found: dict[str, Any] = {}
    for change in changes:
        name, _, value = change.partition("=")
        try:
            found[name] = kinds[name](value)
        except (KeyError, ValueError) as error:
            raise FacesError(
                f"--variants: {change!r} is not name=value of a setting that variants can differ in: {', '.join(kinds)}"
            ) from error
    settings = replace(base, loss=loss, **found)
    check_settings(settings, lambda name: f"--variants {text}: {name}")
    return settings


def check(args: argparse.Namespace) -> dict[str, Settings]:
    """The variants; everything that is wrong with an option is said before anything runs."""
    base = replace(QUICK, epochs=args.epochs)
    check_settings(base)
    check_number("--min-images", args.min_images, Range(1))
    for option, values in (("--seeds", args.seeds), ("--variants", args.variants)):
        if len(set(values)) < len(values):
            raise FacesError(f"{option} must differ from each other, got {' '.join(map(str, values))}")
    for seed in args.seeds:
        check_number("--seeds", seed, RANGES["seed"])
    return {name: variant(name, base) for name in args.variants}


def run_one(name: str, settings: Settings, faces: Faces, runs: Path, process: Process) -> dict[str, Any]:
    """Train, or take what is there, and evaluate."""
    # A changed setting, also one that all variants share, is another run, and so is one on other images or pairs.
    what = [asdict(settings), faces.training.digest(), [asdict(pair) for pair in faces.pairs]]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]
    folder = runs / f"{name.replace(',', '_')}-{settings.seed}-{digest}"
    results = folder / "results.json"
    if not results.exists():
        folder.mkdir(parents=True, exist_ok=True)
        model = train(settings, faces.training, folder, process)
        assert faces.test is not None  # there are --pairs
        found = evaluate(model, faces.test, faces.pairs, process.device, RERANK)
        write_text(results, json.dumps(found) + "\n")
    try:
        found = json.loads(results.read_text())
        text = summary(found)
    except (ValueError, KeyError, TypeError) as error:
        raise FacesError(f"{results} holds no results of a run; without that file it is tested again") from error
    print(f"{name}, seed {settings.seed}\n{text}", flush=True)
    seconds = training_seconds(folder / "log.csv")
    return {"seed": settings.seed, "seconds": seconds, "log": read_log(folder / "log.csv"), **found}


def commit() -> str:
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        return (git("rev-parse", "HEAD")[:10] or "unknown") + (
            " with changes" if git("status", "--porcelain", "-uno") else ""
        )
    except OSError:
        return "unknown"


def machine(process: Process) -> str:
    if process.device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} threads"


def parser() -> argparse.ArgumentParser:
    summary_line, _, rest = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        description=summary_line, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--faces", type=Path, required=True, help="folder of one folder per person, or a tar of one")
    p.add_argument("--pairs", type=Path, required=True, help="pairs for verification, in the format of LFW")
    p.add_argument("--out", type=Path, required=True, help="folder of the report")
    p.add_argument("--runs", type=Path, default=Path("runs/compare"), help="folder of the runs (default: %(default)s)")
    p.add_argument("--test-folds", type=int, nargs="+", default=[7, 8], help="of the pairs (default: 7 8)")
    p.add_argument("--min-images", type=int, default=3, help="people with fewer are left out (default: %(default)s)")
    p.add_argument("--variants", nargs="+", default=["arcface", "otface-arcface"], metavar="LOSS[,NAME=VALUE...]",
                   help="what is compared (default: arcface otface-arcface)")  # fmt: skip
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run for each (default: 0 1 2)")
    p.add_argument("--epochs", type=float, default=QUICK.epochs, help="of each run (default: %(default)g)")
    return p


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    try:
        variants = check(args)
        make_folder("--out", args.out)
        make_folder("--runs", args.runs)
        process = Process.start()
        faces = load_faces(args.faces, args.pairs, args.test_folds, QUICK.size, min_images=args.min_images)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        for seed in args.seeds:  # seed by seed, so that what disturbs the machine falls on all variants
            for name, settings in variants.items():
                runs[name].append(run_one(name, replace(settings, seed=seed), faces, args.runs, process))
    except (FacesError, OSError) as error:
        print(f"compare_losses: {error}", file=sys.stderr)
        return 2
    # The names of the files say enough: the folders are those of one machine.
    command = " ".join(
        shlex.quote(Path(word).name if word in (str(args.faces), str(args.pairs), str(args.runs)) else word)
        for word in argv
    )
    result = {
        "command": f"python examples/compare_losses.py {command}",
        "images": len(faces.training.images.names),
        "people": len(faces.training.people),
        "size": QUICK.size,
        "epochs": args.epochs,
        "minutes": sum(run["seconds"] for found in runs.values() for run in found) / 60,
        "machine": machine(process),
        "torch": torch.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "variants": {name: {"settings": asdict(variants[name]), "runs": found} for name, found in runs.items()},
    }
    write_report(result, args.out)
    write_text(args.out / "results.json", json.dumps(result, indent=1) + "\n")
    print(f"report: {args.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train a face recognition network with ArcFace, CosFace or the OTFace loss on top of either, and evaluate it.

python examples/train_faces.py --faces lfw112.tar --pairs lfw_pairs.txt --test-folds 7 8 --out runs/otface
torchrun --nproc-per-node 8 examples/train_faces.py --faces casia --amp bf16 --out runs/casia \\
    --test-faces lfw112.tar --pairs lfw_pairs.txt

FACES is a folder of one folder per person with aligned faces, or an uncompressed tar of one. PAIRS lists pairs of
images by folds, in the format of LFW. Nobody whom a pair of the test folds names is trained on.

The run's folder gets log.csv, checkpoint.pt and results.json. The same command goes on after a kill, with the batches
that would have come; of a finished run it repeats the evaluation alone. Needs pillow and tqdm.

With more --epochs a run goes on too, finished or not. The learning rate rises over --warmup of the run, then falls to 0
as a cosine; from there on it is that of a run of the new length, so that it rises again where a finished run gets more.
The margin follows in the same way. A run that diverged goes on with a lower --lr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from face_training.data import (
    FacesError,
    Images,
    Pair,
    TrainingSet,
    Tree,
    list_pairs,
    open_tree,
    people_of,
    read_pairs,
    some_of,
    training_set,
)
from face_training.evaluate import evaluate
from face_training.run_folder import load, make_folder, write_text
from face_training.settings import (
    CHOICES,
    EPS,
    MOST,
    Range,
    Settings,
    check_number,
    check_settings,
    flag,
    setting_types,
)
from face_training.training import Process, train

MIN_IMAGES = 2
RANGES = {
    "min_images": Range(1),
    "log_every": Range(1),
    "checkpoint_every": Range(1),
    "rerank_eps": EPS,
    "rerank_iterations": Range(1, MOST),
}


@dataclass
class Faces:
    """What a run trains on, and what it is tested on, if there are pairs."""

    training: TrainingSet
    test: Images | None
    pairs: list[Pair]


def load_faces(
    faces: Path,
    pairs_file: Path | None,
    test_folds: list[int],
    size: int,
    *,
    test_faces: Path | None = None,
    min_images: int = MIN_IMAGES,
    in_memory: bool | None = None,
    quiet: bool = False,
) -> Faces:
    tree = test_tree = open_tree(faces)
    named: list[Pair] = []
    pairs: list[Pair] = []
    test = None
    if pairs_file is not None:
        test_tree = open_tree(test_faces, "--test-faces") if test_faces else tree
        named, pairs = pairs_to_test(pairs_file, test_folds, test_tree)
        if len(pairs) < len(named) and not quiet:
            missing = len(named) - len(pairs)
            print(f"{pairs_file}: {missing} pairs are left out, their images are not in {test_tree.path}")
    # Also of a pair that cannot be tested: nobody whom the test names is known to the network.
    training = training_set(tree, people_of(named), min_images, size, in_memory)
    if pairs:
        names = [name for person in sorted(people_of(pairs)) for name in test_tree.people[person]]
        test = Images(test_tree, names, size, in_memory)
    faces_found = Faces(training, test, pairs)
    if not quiet:
        print(described(faces_found))
    return faces_found


def described(faces: Faces) -> str:
    training, test = faces.training, faces.test
    lines = [f"training: {len(training.images.names)} images of {len(training.people)} people"]
    skipped = ", ".join(f"{count} {what}" for what, count in training.skipped.items() if count)
    if skipped:
        lines.append(f"left out: {skipped}" + in_brackets(training.images.bad))
    if test is not None:
        unreadable = f", {len(test.bad)} unreadable{in_brackets(test.bad)}" if test.bad else ""
        people = len(people_of(faces.pairs))
        lines.append(f"test: {len(test.names)} images of {people} people{unreadable}, {len(faces.pairs)} pairs")
    return "\n".join(lines)


def in_brackets(names: Collection[str]) -> str:
    return f" ({some_of(names)})" if names else ""


def pairs_to_test(path: Path, test_folds: list[int], tree: Tree) -> tuple[list[Pair], list[Pair]]:
    """All pairs that the test folds name, and those of them that the tree has images of."""
    found, _ = read_pairs(path, tree)
    listed = list_pairs(path, tree)
    folds = {pair.fold for pair in listed}
    wanted = set(test_folds) or folds
    if not folds.issuperset(wanted):
        raise FacesError(f"--test-folds: {path} has the folds {sorted(folds)}, not all of {test_folds}")
    pairs = [pair for pair in found if pair.fold in wanted]
    empty = wanted - {pair.fold for pair in pairs}
    if test_folds and empty:
        raise FacesError(f"--test-folds: no pair of {sorted(empty)} has both of its images in {tree.path}")
    if len(wanted - empty) < 2:
        raise FacesError("--test-folds must be two folds at least: the threshold of one comes from the others")
    return [pair for pair in listed if pair.fold in wanted], pairs


def parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--faces", type=Path, required=True, help="folder or tar to train on")
    p.add_argument("--pairs", type=Path, help="pairs for verification; without them there is no evaluation")
    p.add_argument("--test-folds", type=int, nargs="+", default=[], help="folds of the pairs to test on (default: all)")
    p.add_argument("--test-faces", type=Path, help="folder or tar with the images of the pairs (default: --faces)")
    p.add_argument("--out", type=Path, required=True, help="folder for log, checkpoint and results")
    p.add_argument("--min-images", type=int, default=MIN_IMAGES, help="people with fewer are left out (default: 2)")
    p.add_argument(
        "--in-memory",
        choices=("auto", "yes", "no"),
        default="auto",
        help="decode all images once and keep them (default: auto, if they fit in half of the free memory)",
    )
    p.add_argument("--log-every", type=int, default=10, help="steps from a line of log.csv to the next (default: 10)")
    p.add_argument("--checkpoint-every", type=int, default=200, help="steps likewise (default: 200)")
    p.add_argument("--ot-rerank", type=float, nargs="+", default=[], metavar="W",
                   help="also verify by (1 - W) * distance + W * OT between the feature maps")  # fmt: skip
    p.add_argument("--rerank-eps", type=float, default=0.05, help="entropy of that transport (default: %(default)s)")
    p.add_argument("--rerank-iterations", type=int, default=20, help="of that transport (default: %(default)s)")
    helps = {
        "loss": "margin softmax alone, or the OTFace loss on top of it",
        "size": "pixels to which images are scaled, a multiple of the stride",
        "stride": "pixels to a cell of the feature map",
        "width": "of the network: its channels are multiplied by this",
        "embedding_size": "numbers that describe a face",
        "margin": "0.45 for ArcFace, 0.35 for CosFace",
        "scale": "of the logits",
        "ot_weight": "of the transport in the loss",
        "eps": "entropy of the transport in the loss",
        "n_iter": "iterations of the transport in the loss",
        "alpha": "how near a triplet's cosines may be, to be hard",
        "beta": "how near its transport distances may be, to count",
        "epochs": "a run can go on with more",
        "people": "people in a batch of a process",
        "images": "images of each person in it",
        "lr": "highest learning rate; a run that diverged can go on with a lower one",
        "weight_decay": "of AdamW",
        "warmup": "part of the run in which the learning rate rises",
        "margin_warmup": "part of the run in which the margin comes in",
        "amp": "dtype of the network; the loss is always float32",
        "seed": "of network, batches and augmentation",
    }
    group = p.add_argument_group("settings of the run")
    kinds = setting_types()
    for field in fields(Settings):
        name = field.name
        text = f"{helps.get(name, '')} (default: {'by loss' if field.default is None else field.default})".strip()
        group.add_argument(flag(name), type=kinds[name], default=field.default, choices=CHOICES.get(name), help=text)
    return p


def check(args: argparse.Namespace) -> Settings:
    """The settings of the run; everything that is wrong with an option is said before anything runs."""
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    check_settings(settings)
    for name, allowed in RANGES.items():
        check_number(flag(name), getattr(args, name), allowed)
    for weight in args.ot_rerank:
        check_number("--ot-rerank", weight, Range(0, 1))
    if args.pairs is None:
        for name in ("test_faces", "test_folds", "ot_rerank"):
            if getattr(args, name):
                raise FacesError(f"{flag(name)} needs --pairs, without which nothing is tested")
    return settings


def summary(results: dict[str, Any]) -> str:
    def line(name: str, found: dict[str, Any]) -> str:
        folds = ", ".join(f"fold {fold}: {accuracy:.2%}" for fold, accuracy in found["folds"].items())
        return f"{name}: {found['mean']:.2%} ({folds})"

    roc = results["roc"]
    lines = [line("verification", results["verification"])]
    if results["unreadable_images"]:
        lines.append(f"  without {results['unreadable_images']} test images that could not be read")
    lines += [line(f"  with {w} of OT", found) for w, found in results["rerank"]["weights"].items()]
    lines += [f"TAR at FAR {far}: {tar:.2%}" for far, tar in roc["tar"].items()]
    return "\n".join([*lines, f"  over {roc['impostors']:,} impostor and {roc['genuine']:,} genuine pairs of images"])


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        settings = check(args)
        make_folder("--out", args.out)
        load(args.out / "checkpoint.pt", settings)  # not to find out when all images have been decoded
        process = Process.start()
        in_memory = {"auto": None, "yes": True, "no": False}[args.in_memory]
        faces = load_faces(
            args.faces,
            args.pairs,
            args.test_folds,
            settings.size,
            test_faces=args.test_faces,
            min_images=args.min_images,
            in_memory=in_memory,
            quiet=process.rank != 0,
        )
        model = train(
            settings,
            faces.training,
            args.out,
            process,
            log_every=args.log_every,
            checkpoint_every=args.checkpoint_every,
        )
        if faces.test is not None and process.rank == 0:
            results = evaluate(
                model,
                faces.test,
                faces.pairs,
                process.device,
                args.ot_rerank,
                args.rerank_eps,
                args.rerank_iterations,
            )
            write_text(args.out / "results.json", json.dumps(results, indent=1) + "\n")
            print(summary(results))
    except (FacesError, OSError) as error:
        print(f"train_faces: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

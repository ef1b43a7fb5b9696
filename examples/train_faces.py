"""Train a face recognition network with ArcFace, CosFace or the OTFace loss on top of either, and evaluate it.

python examples/train_faces.py --faces lfw112.tar --pairs lfw_pairs.txt --test-folds 7 8 --out runs/otface
torchrun --nproc-per-node 8 examples/train_faces.py --faces casia --amp bf16 --out runs/casia \
    --test-faces lfw112.tar --pairs lfw_pairs.txt

FACES is a folder of one folder per person with aligned faces, or an uncompressed tar of one. PAIRS lists pairs of
images by folds, in the format of LFW. Nobody whom a pair of the test folds names is trained on.

The run's folder gets log.csv, checkpoint.pt and results.json. The same command goes on after a kill, with the batches
that would have come; of a finished run it repeats the evaluation alone. Needs pillow and tqdm.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from face_training.data import FacesError, Images, Pair, TrainingSet, open_tree, people_of, read_pairs, training_set
from face_training.evaluate import evaluate
from face_training.model import STRIDES
from face_training.training import AMP, LOSSES, Process, Settings, setting_types, train

MIN_IMAGES = 2


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
    tree = open_tree(faces)
    pairs: list[Pair] = []
    test = None
    if pairs_file is not None:
        test_tree = open_tree(test_faces) if test_faces else tree
        every, missing = read_pairs(pairs_file, test_tree)
        folds = {pair.fold for pair in every}
        test_folds = test_folds or sorted(folds)
        if not folds.issuperset(test_folds):
            raise FacesError(f"{pairs_file} has the folds {sorted(folds)}, not all of {test_folds}")
        if len(set(test_folds)) < 2:
            raise FacesError("--test-folds must be two folds at least: the threshold of one comes from the others")
        pairs = [pair for pair in every if pair.fold in test_folds]
        if missing and not quiet:
            print(f"{pairs_file}: {missing} pairs are left out, their images are not in {test_tree.path}")
    training = training_set(tree, people_of(pairs), min_images, size, in_memory)
    if pairs:
        names = [name for person in sorted(people_of(pairs)) for name in test_tree.people[person]]
        test = Images(test_tree, names, size, in_memory)
    if not quiet:
        skipped = ", ".join(f"{count} {what}" for what, count in training.skipped.items() if count)
        print(f"training: {len(training.images.names)} images of {len(training.people)} people")
        if skipped:
            print(f"left out: {skipped}")
        if test is not None:
            bad = f", {len(test.bad)} unreadable" if test.bad else ""
            print(f"test: {len(test.names)} images of {len(people_of(pairs))} people{bad}, {len(pairs)} pairs")
    return Faces(training, test, pairs)


def parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--faces", type=Path, required=True, help="folder or tar to train on")
    p.add_argument("--pairs", type=Path, help="pairs for verification; without them there is no evaluation")
    p.add_argument("--test-folds", type=int, nargs="+", default=[], help="folds of the pairs to test on (default: all)")
    p.add_argument("--test-faces", type=Path, help="folder or tar with the images of the pairs (default: --faces)")
    p.add_argument("--out", type=Path, required=True, help="folder for log, checkpoint and results")
    p.add_argument("--min-images", type=int, default=MIN_IMAGES, help="people with fewer are left out")
    p.add_argument("--in-memory", choices=("auto", "yes", "no"), default="auto", help="keep all images, decoded")
    p.add_argument("--log-every", type=int, default=10, help="steps")
    p.add_argument("--checkpoint-every", type=int, default=200, help="steps")
    p.add_argument("--ot-rerank", type=float, nargs="+", default=[], metavar="W",
                   help="also verify by (1 - W) * distance + W * OT between the feature maps")  # fmt: skip
    p.add_argument("--rerank-eps", type=float, default=0.05)
    p.add_argument("--rerank-iterations", type=int, default=20)
    choices = {"loss": tuple(LOSSES), "stride": STRIDES, "amp": tuple(AMP)}
    helps = {
        "margin": "0.45 for ArcFace, 0.35 for CosFace",
        "people": "people in a batch of a process",
        "images": "images of each person in it",
        "warmup": "part of the run in which the learning rate rises",
        "margin_warmup": "part of the run in which the margin comes in",
        "eps": "entropy of the transport in the loss",
        "n_iter": "iterations of the transport in the loss",
    }
    group = p.add_argument_group("settings of the run")
    kinds = setting_types()
    for field in fields(Settings):
        name = field.name
        text = f"{helps.get(name, '')} (default: {'by loss' if field.default is None else field.default})".strip()
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kinds[name], default=field.default, choices=choices.get(name), help=text)
    return p


def check(settings: Settings) -> None:
    if settings.size < settings.stride or settings.size % settings.stride:
        raise FacesError(f"--size must be a multiple of the stride {settings.stride}, got {settings.size}")
    for name in ("people", "images"):
        if getattr(settings, name) < 2:
            raise FacesError(f"--{name} must be 2 at least, or there are no triplets, got {getattr(settings, name)}")


def summary(results: dict[str, Any]) -> str:
    def line(name: str, found: dict[str, Any]) -> str:
        folds = ", ".join(f"fold {fold}: {accuracy:.2%}" for fold, accuracy in found["folds"].items())
        return f"{name}: {found['mean']:.2%} ({folds})"

    roc = results["roc"]
    lines = [line("verification", results["verification"])]
    lines += [line(f"  with {w} of OT", found) for w, found in results["rerank"]["weights"].items()]
    lines += [f"TAR at FAR {far}: {tar:.2%}" for far, tar in roc["tar"].items()]
    return "\n".join([*lines, f"  over {roc['impostors']:,} impostor and {roc['genuine']:,} genuine pairs of images"])


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    process = Process.start()
    quiet = process.rank != 0
    try:
        check(settings)
        in_memory = {"auto": None, "yes": True, "no": False}[args.in_memory]
        faces = load_faces(
            args.faces,
            args.pairs,
            args.test_folds,
            settings.size,
            test_faces=args.test_faces,
            min_images=args.min_images,
            in_memory=in_memory,
            quiet=quiet,
        )
        args.out.mkdir(parents=True, exist_ok=True)
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
            (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            print(summary(results))
    except FacesError as error:
        print(f"train_faces: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

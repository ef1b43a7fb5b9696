"""The training run on faces: data and its faults, batches, evaluation, going on after a kill, the report."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
Image = pytest.importorskip("PIL.Image")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import compare_losses  # noqa: E402
import train_faces  # noqa: E402
from face_training import data, evaluate, training  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "examples"
PEOPLE, IMAGES = 12, 5
SMALL = ["--size", "16", "--stride", "8", "--width", "0.25", "--embedding-size", "16", "--people", "3", "--images", "2"]


def picture(person: int, number: int) -> bytes:
    """A face that a small network can learn: each person has colours of their own, each image some noise."""
    base = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(person))
    noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1000 + 100 * person + number))
    pixels = (0.8 * base.repeat_interleave(4, 1).repeat_interleave(4, 2) + 0.2 * noise).mul(255).byte()
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with a broken image and a person with one image, a tar of it, pairs of folds 1 to 3."""
    root = tmp_path_factory.mktemp("faces")
    for person in range(PEOPLE):
        (root / f"faces/p{person:02d}").mkdir(parents=True)
        for number in range(1, IMAGES + 1):
            (root / f"faces/p{person:02d}/p{person:02d}_{number:04d}.png").write_bytes(picture(person, number))
    (root / "faces/p00/p00_0001.png").write_bytes(b"no image")
    (root / "faces/single").mkdir()
    (root / "faces/single/single_0001.png").write_bytes(picture(99, 1))
    with tarfile.open(root / "faces.tar", "w") as tar:
        tar.add(root / "faces", "faces")
    lines = []
    for fold, people in ((1, (6, 7)), (2, (8, 9)), (3, (10, 11))):
        a, b = (f"p{person:02d}/p{person:02d}_000" for person in people)
        lines += [f"{fold}\t{p}{i}.png\t{p}{i + 1}.png\t1" for p in (a, b) for i in (1, 3)]
        lines += [f"{fold}\t{a}{i}.png\t{b}{i + 1}.png\t0" for i in (1, 2, 3, 4)]
    (root / "pairs.txt").write_text("\n".join(lines) + "\n")
    return root


def arguments(made: Path, run: Path, *more: str, faces: str = "faces") -> list[str]:
    pairs = ["--pairs", str(made / "pairs.txt"), "--test-folds", "2", "3"]
    return ["--faces", str(made / faces), *pairs, "--out", str(run), *SMALL, *more]


# ---- data ----


@pytest.mark.parametrize("name", ["faces", "faces.tar", "."])
def test_a_folder_a_tar_and_a_folder_around_it_are_the_same(made, name):
    tree = data.open_tree(made / name)
    assert len(tree.people) == PEOPLE + 1
    assert tree.people["p03"] == [f"p03/p03_{i:04d}.png" for i in range(1, IMAGES + 1)]
    assert tree.read("p03/p03_0002.png") == picture(3, 2)


def test_images_are_read_in_memory_and_from_the_disk_alike(made):
    tree = data.open_tree(made / "faces.tar")
    kept, streamed = (data.Images(tree, tree.people["p00"], 16, in_memory=yes) for yes in (True, False))
    assert kept.bad == {"p00/p00_0001.png"}
    assert not streamed.bad
    pixels, good = streamed.batch(torch.arange(IMAGES))
    assert streamed.bad == kept.bad
    assert good.tolist() == [1, 2, 3, 4]
    assert torch.equal(pixels, kept.batch(torch.arange(IMAGES - 1))[0])
    assert pixels.shape == (4, 3, 16, 16)


def test_nobody_of_a_test_fold_is_trained_on(made):
    faces = train_faces.load_faces(made / "faces", made / "pairs.txt", [2, 3], 16)
    assert faces.training.people == [f"p{i:02d}" for i in range(8)]
    assert faces.training.skipped == {"people with fewer than 2 images": 1, "unreadable images": 1}
    for name, label in zip(faces.training.images.names, faces.training.labels, strict=True):
        assert faces.training.people[label] == name.split("/")[0]
    assert {pair.fold for pair in faces.pairs} == {2, 3}
    assert faces.test is not None
    assert {name.split("/")[0] for name in faces.test.names} == {f"p{i:02d}" for i in range(8, 12)}


def test_pairs_in_the_format_of_lfw(made, tmp_path):
    tree = data.open_tree(made / "faces")
    path = tmp_path / "pairs.txt"
    path.write_text("2\t1\np01\t1\t2\np01\t1\tp02\t3\np03\t2\t4\np03\t1\tnobody\t1\n")
    found, missing = data.read_pairs(path, tree)
    assert missing == 1
    assert found == [
        data.Pair(1, "p01/p01_0001.png", "p01/p01_0002.png", True),
        data.Pair(1, "p01/p01_0001.png", "p02/p02_0003.png", False),
        data.Pair(2, "p03/p03_0002.png", "p03/p03_0004.png", True),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--faces", "nowhere"], "there is no nowhere"),
        (["--faces", "{made}/pairs.txt"], "no folder and no uncompressed tar"),
        (["--faces", "{made}/faces/p01"], "holds no image of the form person/image.jpg"),
        (["--pairs", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--pairs", "{made}/faces/p01/p01_0001.png"], "cannot be read"),
        (["--pairs", "{made}/wrong.txt"], "is no pairs file in the format of LFW"),
        (["--pairs", "{made}/others.txt"], "none of the 1 pairs"),
        (["--test-folds", "2", "9"], "has the folds [1, 2, 3], not all of [2, 9]"),
        (["--test-folds", "2"], "two folds at least"),
        (["--min-images", "9"], "0 people to train on with 9 or more readable images"),
        (["--size", "20"], "must be a multiple of the stride 8"),
        (["--people", "1"], "--people must be 2 at least"),
    ],
)
def test_what_is_wrong_is_said(made, tmp_path, capsys, change, message):
    (made / "wrong.txt").write_text("this\tis\tno\tlist of pairs\n")
    (made / "others.txt").write_text("1\ta/a_0001.png\tb/b_0001.png\t0\n")
    words = [word.format(made=made) for word in change]
    assert train_faces.main(arguments(made, tmp_path / "run", *words)) == 2
    assert message in capsys.readouterr().err


# ---- batches and augmentation ----


def test_batches_have_the_people_and_images_asked_for():
    labels = torch.repeat_interleave(torch.arange(7), torch.tensor([1, 2, 3, 4, 9, 30, 5]))
    batches = data.Batches(labels, people=3, images=4, seed=1)
    assert batches.steps_per_round == 2
    for step in range(6):
        indices = batches.indices(step)
        of = labels[indices].view(3, 4)
        assert (of == of[:, :1]).all()
        assert len(of[:, 0].unique()) == 3
        for row, person in zip(indices.view(3, 4), of[:, 0], strict=True):
            assert len(row.unique()) == min(4, int((labels == person).sum()))
    # A step's batch depends on nothing that came before.
    assert torch.equal(data.Batches(labels, 3, 4, seed=1).indices(5), indices)
    assert not torch.equal(data.Batches(labels, 3, 4, seed=2).indices(5), indices)


def test_processes_share_the_people_of_a_round():
    labels = torch.arange(8).repeat_interleave(3)
    parts = [data.Batches(labels, people=2, images=2, seed=0, rank=rank, world=2) for rank in (0, 1)]
    for step in (0, 2):  # rounds of two steps
        seen = [labels[part.indices(s)].unique() for part in parts for s in (step, step + 1)]
        assert torch.cat(seen).sort().values.tolist() == list(range(8))


def test_augmentation_is_bounded_and_repeatable():
    images = data.to_float(torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8))
    one, again, other = (data.augment(images, data.seeded(0, step, 1)) for step in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.abs().max() <= 1
    assert one.shape == images.shape


# ---- evaluation ----


def test_threshold_comes_from_the_other_folds():
    distance = torch.tensor([0.1, 0.2, 0.6, 0.7, 0.1, 0.65, 0.9, 0.8])
    same = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0]).bool()
    folds = torch.tensor([1, 1, 1, 1, 2, 2, 2, 2])
    # Fold 1 at 0.725, fold 2 at 0.4.
    assert evaluate.best_threshold(distance[4:], same[4:]) == pytest.approx(0.725)
    assert evaluate.best_threshold(distance[:4], same[:4]) == pytest.approx(0.4)
    found = evaluate.verify(distance, same, folds)
    assert found.folds == {1: 0.5, 2: 0.75}
    assert found.mean == 0.625


def test_threshold_is_not_put_between_equal_distances():
    same = torch.tensor([1, 1, 0, 0]).bool()
    assert evaluate.best_threshold(torch.tensor([0.1, 0.5, 0.5, 0.9]), same) == pytest.approx(0.3)


def test_roc_counts_every_pair_once():
    generator = torch.Generator().manual_seed(0)
    people = [f"p{i // 4}" for i in range(40)]
    embeddings = torch.nn.functional.normalize(torch.randn(40, 5, generator=generator))
    embedded = evaluate.Embedded([f"{p}/{i}" for i, p in enumerate(people)], embeddings, torch.empty(0), {})
    found = evaluate.roc(embedded)
    scores: dict[bool, list[float]] = {True: [], False: []}
    cosine = embeddings @ embeddings.T
    for i in range(40):
        for j in range(i):
            scores[people[i] == people[j]].append(cosine[i, j].item())
    impostors, genuine = torch.tensor(sorted(scores[False])), torch.tensor(scores[True])
    assert (found.impostors, found.genuine) == (len(impostors), len(genuine))
    assert list(found.tar) == ["0.01"]  # 720 impostor pairs cannot measure 1e-3
    expected = (genuine > impostors[-1 - int(0.01 * len(impostors))]).double().mean().item()
    assert found.tar["0.01"] == pytest.approx(expected)
    assert found.curve[-1] == pytest.approx([1, 1])


# ---- runs ----


def log_of(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("images_per_s", "seconds")} for row in csv.DictReader(file)]


@pytest.mark.parametrize("loss", training.LOSSES)
def test_every_loss_trains_and_is_evaluated(made, tmp_path, capsys, loss):
    more = ["--loss", loss, "--epochs", "2", "--log-every", "2", "--ot-rerank", "0.5"]
    assert train_faces.main(arguments(made, tmp_path, *more, faces="faces.tar")) == 0
    printed = capsys.readouterr().out
    assert "left out: 1 people with fewer than 2 images, 1 unreadable images" in printed
    assert "with 0.5 of OT" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["verification"]["folds"]) == {"2", "3"}
    assert results["test_pairs"] == 16
    assert results["roc"]["genuine"] == 4 * IMAGES * (IMAGES - 1) // 2
    last = log_of(tmp_path)[-1]
    assert float(last["loss"]) > 0
    assert int(float(last["hard"])) >= int(float(last["active"])) >= 0
    assert (float(last["ot_loss"]) > 0) == (loss.startswith("otface") and float(last["active"]) > 0)


def test_a_killed_run_goes_on_as_if_nothing_had_been(made, tmp_path):
    more = ["--epochs", "4", "--checkpoint-every", "4", "--log-every", "3"]
    assert train_faces.main(arguments(made, tmp_path / "whole", *more)) == 0

    command = [sys.executable, str(EXAMPLES / "train_faces.py"), *arguments(made, tmp_path / "killed", *more)]
    program = "; ".join(
        [
            "import os, signal, sys",
            f"sys.path.insert(0, {str(EXAMPLES)!r})",
            "import train_faces",
            "inner = train_faces.train",
            "die = lambda step: step == 7 and os.kill(os.getpid(), signal.SIGKILL)",
            "train_faces.train = lambda *a, **k: inner(*a, **k, on_step=die)",
            f"train_faces.main({command[2:]!r})",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "killed/checkpoint.pt")["step"] == 4
    assert len(log_of(tmp_path / "killed")) == 2
    assert train_faces.main(arguments(made, tmp_path / "killed", *more)) == 0

    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    one, other = (torch.load(tmp_path / run / "checkpoint.pt") for run in ("whole", "killed"))
    assert one["step"] == other["step"]
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name


def test_a_run_with_other_settings_is_not_gone_on_with(made, tmp_path, capsys):
    assert train_faces.main(arguments(made, tmp_path, "--epochs", "0.1")) == 0
    assert train_faces.main(arguments(made, tmp_path, "--epochs", "0.1", "--lr", "0.2")) == 2
    assert "other settings (lr 0.002, now 0.2)" in capsys.readouterr().err


def test_a_checkpoint_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "checkpoint.pt"
    training.save(path, {"step": 1})
    with pytest.raises(AttributeError):
        training.save(path, {"step": lambda: 2})  # cannot be written
    assert torch.load(path) == {"step": 1}


def test_two_processes_and_half_precision(made, tmp_path):
    """Through torchrun: gradients are averaged, so that both hold the same weights, and one of them writes."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    words = arguments(made, tmp_path, "--epochs", "1", "--amp", "bf16", "--log-every", "1", "--people", "2")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLES / "train_faces.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verification:") == 1
    assert torch.load(tmp_path / "checkpoint.pt")["world"] == 2
    assert all(float(row["loss"]) > 0 for row in log_of(tmp_path))


# ---- the comparison ----


def test_comparison_writes_a_report_and_keeps_finished_runs(made, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    small = compare_losses.replace(compare_losses.QUICK, size=16, width=0.25, embedding_size=16, people=3, images=2)
    monkeypatch.setattr(compare_losses, "QUICK", small)
    words = ["--faces", str(made / "faces.tar"), "--pairs", str(made / "pairs.txt"), "--test-folds", "2", "3"]
    words += ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--epochs", "1", "--seeds", "0", "1"]
    words += ["--variants", "arcface", "otface-cosface,eps=0.1,n_iter=5"]
    assert compare_losses.main(words) == 0
    report = (tmp_path / "out/report.md").read_text()
    assert "| arcface |" in report
    assert "| otface-cosface,eps=0.1,n_iter=5 |" in report
    assert "w = 0.4" in report
    assert str(made) not in report
    for name in ("roc.png", "triplets.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.pt")}
    assert len(before) == 4
    time.sleep(0.01)
    assert compare_losses.main(words) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.pt")}


@pytest.mark.parametrize("text", ["softmax", "arcface,colour=1", "arcface,eps=x"])
def test_wrong_variants_are_named(made, tmp_path, capsys, text):
    words = ["--faces", str(made / "faces"), "--pairs", str(made / "pairs.txt"), "--out", str(tmp_path)]
    assert compare_losses.main([*words, "--variants", text]) == 2
    assert "--variants" in capsys.readouterr().err

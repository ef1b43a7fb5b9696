"""The training run on faces: data and its faults, batches, evaluation, going on after a kill, the report."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
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
from face_training import data, evaluate, run_folder, training  # noqa: E402

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


def test_nobody_whom_a_test_pair_names_is_trained_on_though_the_pair_has_no_images(made, tmp_path):
    pairs = tmp_path / "pairs.txt"
    extra = "2\tp00/p00_0002.png\tp00/p00_0099.png\t1\n3\tp01/p01_0001.png\tnobody/nobody_0001.png\t0\n"
    other_fold = "1\tp02/p02_0001.png\tp02/p02_0099.png\t1\n"
    pairs.write_text((made / "pairs.txt").read_text() + extra + other_fold)
    faces = train_faces.load_faces(made / "faces", pairs, [2, 3], 16)
    assert faces.training.people == [f"p{i:02d}" for i in range(2, 8)]
    assert faces.test is not None
    assert {name.split("/")[0] for name in faces.test.names} == {f"p{i:02d}" for i in range(8, 12)}


def test_a_fold_without_any_image_is_no_test_fold(made, tmp_path):
    pairs = tmp_path / "pairs.txt"
    pairs.write_text((made / "pairs.txt").read_text() + "4\tp00/p00_0002.png\tp00/p00_0099.png\t1\n")
    faces = train_faces.load_faces(made / "faces", pairs, [], 16)
    assert {pair.fold for pair in faces.pairs} == {1, 2, 3}
    assert "p00" not in faces.training.people
    with pytest.raises(data.FacesError, match=r"no pair of \[4\] has both of its images"):
        train_faces.load_faces(made / "faces", pairs, [3, 4], 16)


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
        (["--test-faces", "nowhere"], "--test-faces: there is no nowhere"),
        (["--log-every", "0"], "--log-every must be 1 at least, got 0"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be 1 at least, got 0"),
        (["--min-images", "0"], "--min-images must be 1 at least, got 0"),
        (["--epochs", "-1"], "--epochs must be above 0 and at most 1,000,000, got -1.0"),
        (["--lr", "nan"], "--lr must be from 0 to 1,000,000, got nan"),
        (["--margin", "30"], "--margin does not fit otface-arcface: ArcFace: `m` must be an angle from 0 to pi"),
        (["--loss", "cosface", "--margin", "-1"], "--margin does not fit cosface: CosFace: `m` must be"),
        (["--out", "{made}/pairs.txt"], "--out must be a folder"),
        (["--out", "{made}/pairs.txt/run"], "--out must be a folder"),
        (["--ot-rerank", "0.5", "1.5"], "--ot-rerank must be from 0 to 1, got 1.5"),
        (["--rerank-eps", "0"], "--rerank-eps must be from 1e-06 to 1,000,000, got 0.0"),
        (["--rerank-iterations", "0"], "--rerank-iterations must be from 1 to 1,000,000, got 0"),
        (["--seed", "123456789012345678901234567890"], "--seed must be from -9,000,000 to 9,000,000"),
    ],
)
def test_what_is_wrong_is_said(made, tmp_path, capsys, change, message):
    (made / "wrong.txt").write_text("this\tis\tno\tlist of pairs\n")
    (made / "others.txt").write_text("1\ta/a_0001.png\tb/b_0001.png\t0\n")
    words = [word.format(made=made) for word in change]
    assert train_faces.main(arguments(made, tmp_path / "run", *words)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("run/*"))  # nothing has run


def numbers() -> list[pytest.param]:
    """Every option that takes a number, with numbers that none of them takes."""
    words = {float: ("nan", "inf", "-inf", "-1e300", "1e300"), int: ("-" + 30 * "9",)}
    options = [option for option in train_faces.parser()._actions if option.type in words and not option.choices]
    return [pytest.param(o.option_strings[0], word, id=f"{o.dest}={word}") for o in options for word in words[o.type]]


@pytest.mark.parametrize(("option", "word"), numbers())
def test_every_number_is_checked(made, tmp_path, capsys, option, word):
    assert train_faces.main([*arguments(made, tmp_path / "run"), f"{option}={word}"]) == 2
    assert capsys.readouterr().err.startswith(f"train_faces: {option}")
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("words", [["--test-faces", "nowhere"], ["--test-folds", "2", "3"], ["--ot-rerank", "0.5"]])
def test_what_only_a_test_needs_is_refused_without_pairs(made, tmp_path, capsys, words):
    assert train_faces.main(["--faces", str(made / "faces"), "--out", str(tmp_path / "run"), *SMALL, *words]) == 2
    assert f"{words[0]} needs --pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "none of the 0 pairs"),
        ("10\t0\np01\t1\t2\n", "its first line says that a fold has 0 pairs of a kind"),
        ("2\t1\np01\t1\n", "line 2 has 2 columns"),
        ("1\tp01/p01_0001.png\tp01/p01_0002.png\n", "line 1 has 3 columns"),
        ("1\tp01/p01_0001.png\tp01/p01_0002.png\t2\n", "line 1 ends in '2', not in 1 or 0"),
    ],
)
def test_wrong_pairs_are_named(made, tmp_path, text, message):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(data.FacesError, match=message):
        data.read_pairs(tmp_path / "pairs.txt", data.open_tree(made / "faces"))


# ---- images that cannot be read ----


def only_readable(made: Path, folder: Path, names: set[str]) -> Path:
    """The tree, but of those who are trained on, nothing can be read but these images."""
    shutil.copytree(made / "faces", folder)
    for person in range(8):
        for path in (folder / f"p{person:02d}").iterdir():
            if path.name not in names:
                path.write_bytes(b"no image")
    return folder


def test_a_batch_with_one_readable_image_or_none_takes_others_too(made, tmp_path, capsys):
    names = {"p00_0002.png", "p01_0003.png", "p02_0004.png"}
    faces = only_readable(made, tmp_path / "faces", names)
    tree = data.open_tree(faces)
    found = data.training_set(tree, {f"p{i:02d}" for i in range(8, 12)}, 2, 16, in_memory=False)
    batches = data.Batches(found.labels, 2, 2, seed=0)
    alone = [len(found.images.batch(batches.indices(step))[1]) for step in range(20)]
    assert {0, 1} <= set(alone)
    for step in range(20):
        pixels, indices = data.training_batch(found.images, batches, step)
        assert len(pixels) == len(indices) >= 2
        if alone[step] >= 2:
            assert torch.equal(indices, found.images.batch(batches.indices(step))[1])
        assert {found.images.names[i].split("/")[1] for i in indices.tolist()} <= names

    words = ["--faces", str(faces), "--in-memory", "no", "--epochs", "2", "--people", "2"]
    assert train_faces.main([*arguments(made, tmp_path / "run"), *words]) == 0
    assert len(log_of(tmp_path / "run")) >= 1
    captured = capsys.readouterr()
    counts = [int(count) for count in re.findall(r"left out: (\d+) unreadable images so far \(p00/p00", captured.err)]
    assert len(counts) == 2
    assert 20 < counts[0] < counts[1] <= 37  # when the first line of the log is written, and at the end
    assert "\r" not in captured.err + captured.out


def test_unreadable_images_are_reported_when_they_turn_up(made, tmp_path, capsys):
    words = ["--in-memory", "no", "--epochs", "3", "--log-every", "1"]
    assert train_faces.main(arguments(made, tmp_path, *words)) == 0
    assert capsys.readouterr().err == "left out: 1 unreadable images so far (p00/p00_0001.png)\n"


def test_unreadable_test_images_are_reported(made, tmp_path, capsys):
    shutil.copytree(made / "faces", tmp_path / "faces")
    (tmp_path / "faces/p08/p08_0001.png").write_bytes(b"")
    for keep in ("yes", "no"):
        words = ["--faces", str(tmp_path / "faces"), "--in-memory", keep, "--epochs", "0.1"]
        assert train_faces.main([*arguments(made, tmp_path / keep), *words]) == 0
        printed = capsys.readouterr().out
        assert "without 1 test images that could not be read" in printed
        assert ("1 unreadable (p08/p08_0001.png)" in printed) == (keep == "yes")
        assert json.loads((tmp_path / keep / "results.json").read_text())["test_pairs"] == 14


@pytest.mark.parametrize(("keep", "message"), [("yes", "0 people to train on"), ("no", "hardly any can be decoded")])
def test_nothing_readable_is_said(made, tmp_path, capsys, keep, message):
    faces = only_readable(made, tmp_path / "faces", set())
    assert train_faces.main([*arguments(made, tmp_path / "run"), "--faces", str(faces), "--in-memory", keep]) == 2
    assert message in capsys.readouterr().err


def test_evaluation_passes_over_a_batch_without_any_readable_image(made, tmp_path):
    tree = data.open_tree(only_readable(made, tmp_path / "faces", set()))
    names = [*tree.people["p00"], *tree.people["p09"]]
    model = training.backbone_of(training.Settings(size=16, stride=8, width=0.25, embedding_size=16))
    found = evaluate.embed(model, data.Images(tree, names, 16, False), set(names), torch.device("cpu"), batch=IMAGES)
    assert found.names == tree.people["p09"]
    with pytest.raises(data.FacesError, match="none of the test images"):
        evaluate.embed(model, data.Images(tree, names[:IMAGES], 16, False), set(), torch.device("cpu"))


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


def test_every_process_needs_two_people():
    labels = torch.arange(3).repeat_interleave(2)
    assert data.Batches(labels, people=8, images=2, seed=0).people == 3
    with pytest.raises(data.FacesError, match="3 people are too few for 2 processes, each of which needs two"):
        data.Batches(labels, people=8, images=2, seed=0, rank=0, world=2)


def test_images_that_no_memory_holds_are_named(made):
    tree = data.open_tree(made / "faces.tar")
    with pytest.raises(data.FacesError, match=r"no memory for 1,500,000\.0 GB of images; give --in-memory no"):
        data.Images(tree, tree.people["p00"], 10**7, in_memory=True)


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


def test_everyone_is_rejected_where_that_is_best():
    distance, same = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([False, False, True])
    assert evaluate.best_threshold(distance, same) == -math.inf
    assert evaluate.best_threshold(distance, torch.tensor([False, True, True])) == pytest.approx(0.3)
    # With as many right as anywhere else, not.
    assert evaluate.best_threshold(distance, torch.tensor([False, True, False])) == pytest.approx(0.25)
    folds = torch.tensor([1, 1, 1, 2, 2, 2])
    found = evaluate.verify(distance.repeat(2), torch.tensor([0, 0, 1, 0, 0, 0]).bool(), folds)
    assert found.folds == {1: 2 / 3, 2: 1.0}


def test_threshold_lies_between_neighbouring_floats():
    one = torch.tensor(1.0)
    low = torch.nextafter(torch.tensor(0.5), one)  # whose last bit is 1: as a float, what lies between is `high`
    high = torch.nextafter(low, one)
    distance = torch.stack([low, high, low, high])
    found = evaluate.verify(distance, torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([1, 1, 2, 2]))
    assert found.mean == 1


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
    captured = capsys.readouterr()
    printed = captured.out
    assert captured.err == ""  # a bar is for a terminal
    assert "left out: 1 people with fewer than 2 images, 1 unreadable images (p00/p00_0001.png)" in printed
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
    assert train_faces.main(arguments(made, tmp_path, "--epochs", "0.05", "--scale", "9")) == 2
    assert "other settings (scale 32.0, now 9.0; epochs 0.1, now 0.05)" in capsys.readouterr().err
    # A lower rate is for a run that has something to do.
    assert train_faces.main(arguments(made, tmp_path, "--epochs", "0.1", "--lr", "0.001")) == 2
    assert "a finished run with other settings (lr 0.002, now 0.001)" in capsys.readouterr().err


def test_a_run_on_other_images_is_not_gone_on_with(made, tmp_path, capsys):
    shutil.copytree(made / "faces", tmp_path / "faces")
    words = [*arguments(made, tmp_path / "run", "--epochs", "0.1"), "--faces", str(tmp_path / "faces")]
    assert train_faces.main(words) == 0
    (tmp_path / "faces/p01/p01_0001.png").unlink()
    assert train_faces.main(words) == 2
    assert "holds a run on other images of the same people" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "faces/p01")
    assert train_faces.main(words) == 2
    assert "holds a run on other people" in capsys.readouterr().err


class KilledError(Exception):
    """In the place of a kill."""


def killed_after(step: int, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    def die(done: int) -> None:
        if done == step:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(train_faces, "train", lambda *a, **k: training.train(*a, **k, on_step=die))
        with pytest.raises(KilledError):
            train_faces.main(words)


def same_weights(one: Path, other: Path) -> bool:
    states = [torch.load(run / "checkpoint.pt")["model"] for run in (one, other)]
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_finished_run_is_given_more_epochs(made, tmp_path, monkeypatch, capsys):
    def words(run: str, epochs: int) -> list[str]:
        return arguments(made, tmp_path / run, "--log-every", "1", "--checkpoint-every", "2", "--epochs", str(epochs))

    assert train_faces.main(words("run", 1)) == 0
    steps = len(log_of(tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    capsys.readouterr()
    assert train_faces.main(words("run", 3)) == 0
    assert "goes on with --epochs 3.0, so far it was 1.0" in capsys.readouterr().out
    log = log_of(tmp_path / "run")
    assert [int(row["step"]) for row in log] == list(range(1, len(log) + 1))
    assert len(log) >= 3 * steps - 1
    # From there on the rate is that of a run of three epochs.
    for row in log[steps:]:
        rate, _ = training.progress(int(row["step"]) - 1, len(log), training.Settings(epochs=3))
        assert float(row["lr"]) == pytest.approx(2e-3 * rate, rel=1e-5)
    assert float(log[steps]["lr"]) > float(log[steps - 1]["lr"])

    killed_after(steps + 4, monkeypatch, words("killed", 3))
    assert steps < torch.load(tmp_path / "killed/checkpoint.pt")["step"] < len(log)
    assert train_faces.main(words("killed", 3)) == 0
    assert same_weights(tmp_path / "run", tmp_path / "killed")
    assert log_of(tmp_path / "killed") == log


def test_an_unfinished_run_is_given_more_epochs(made, tmp_path, monkeypatch, capsys):
    def words(run: str, epochs: int) -> list[str]:
        return arguments(made, tmp_path / run, "--checkpoint-every", "2", "--epochs", str(epochs))

    killed_after(3, monkeypatch, words("run", 2))
    assert train_faces.main([*words("run", 3), "--lr", "0.01"]) == 2
    assert "other settings (lr 0.002, now 0.01)" in capsys.readouterr().err
    assert train_faces.main(words("run", 3)) == 0
    assert train_faces.main(words("whole", 3)) == 0
    assert torch.load(tmp_path / "run/checkpoint.pt")["step"] == torch.load(tmp_path / "whole/checkpoint.pt")["step"]


def test_a_run_that_diverged_leaves_its_last_good_checkpoint_and_goes_on(made, tmp_path, monkeypatch, capsys):
    words = arguments(made, tmp_path, "--epochs", "2", "--checkpoint-every", "2", "--log-every", "1000")
    calls = []

    def nan_from_the_third_step(images, generator):
        calls.append(0)
        return data.augment(images, generator) * (math.nan if len(calls) > 2 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(training, "augment", nan_from_the_third_step)
        assert train_faces.main(words) == 2
    assert "the loss is nan at step 4: a lower --lr may help" in capsys.readouterr().err
    state = torch.load(tmp_path / "checkpoint.pt")
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())
    assert train_faces.main([*words, "--lr", "0.001"]) == 0
    assert "goes on with --lr 0.001, so far it was 0.002" in capsys.readouterr().out
    assert torch.load(tmp_path / "checkpoint.pt")["step"] > 4


def test_weights_that_are_not_finite_are_not_saved(made, tmp_path, monkeypatch, capsys):
    inner = training.Trainer.step

    def step(trainer, *arguments):
        found = inner(trainer, *arguments)
        trainer.model.head.weight.data[0, 0] = math.inf  # after the loss, as an update does it
        return found

    monkeypatch.setattr(training.Trainer, "step", step)
    assert train_faces.main(arguments(made, tmp_path, "--epochs", "0.1")) == 2
    assert "the weights are not finite at step 1" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists()


def other_checkpoints() -> dict[str, bytes]:
    def saved(state: object) -> bytes:
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    whole = saved({"settings": {}, "model": {}})
    return {
        "empty": b"",
        "text": b"hello",
        "cut off": whole[: len(whole) // 2],
        "a pickle": b"\x80\x02.",
        "a tensor": saved(torch.zeros(3)),
        "of another program": saved({"state_dict": {}}),
        "of another model": whole,
    }


@pytest.mark.parametrize("kind", other_checkpoints())
def test_other_checkpoints_are_named_and_left_alone(made, tmp_path, capsys, kind):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(other_checkpoints()[kind])
    assert train_faces.main(arguments(made, tmp_path)) == 2
    error = capsys.readouterr().err
    assert f"--out: {path} is no checkpoint of examples/train_faces.py: " in error
    assert ("it is empty" in error) == (kind == "empty")
    assert path.read_bytes() == other_checkpoints()[kind]
    with pytest.raises(data.FacesError, match="is no checkpoint of"):
        training.load_backbone(path)


@pytest.mark.parametrize("part", ["model", "optimizer", "sums", "step", "logged"])
def test_a_checkpoint_with_a_wrong_part_is_named(made, tmp_path, capsys, part):
    assert train_faces.main(arguments(made, tmp_path, "--epochs", "0.1")) == 0
    run_folder.save(tmp_path / "checkpoint.pt", {**torch.load(tmp_path / "checkpoint.pt"), part: {"a": 1}})
    assert train_faces.main(arguments(made, tmp_path, "--epochs", "0.1")) == 2
    assert "its parts are not those of this run" in capsys.readouterr().err


def test_another_log_is_named(made, tmp_path, capsys):
    assert train_faces.main(arguments(made, tmp_path, "--epochs", "0.1")) == 0
    (tmp_path / "log.csv").write_text("step,time\n1,2\n")
    assert train_faces.main(arguments(made, tmp_path, "--epochs", "0.1")) == 2
    assert "log.csv is no log of examples/train_faces.py" in capsys.readouterr().err


def test_the_log_outlives_a_kill_when_a_run_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    log = run_folder.Log(path, 0)
    for step in (1, 2, 3):
        log.write(dict.fromkeys(run_folder.COLUMNS, step))
    before = path.read_bytes()

    def die(file: int) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)
        with pytest.raises(KilledError):
            run_folder.Log(path, 2)
    assert path.read_bytes() == before
    assert run_folder.Log(path, 2).seconds == 2.0
    assert len(path.read_text().splitlines()) == 3


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


def test_comparison_writes_a_report_and_keeps_finished_runs(made, tmp_path, monkeypatch, capsys):
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
    # A run that was tested on other pairs is another one.
    assert compare_losses.main([*words, "--test-folds", "1", "3", "--seeds", "0", "--variants", "arcface"]) == 0
    run = json.loads((tmp_path / "out/results.json").read_text())["variants"]["arcface"]["runs"][0]
    assert set(run["verification"]["folds"]) == {"1", "3"}
    for results in (tmp_path / "runs").rglob("results.json"):
        results.write_text("")
    assert compare_losses.main(words) == 2
    assert "results.json holds no results of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "softmax",
        "arcface,colour=1",
        "arcface,eps=x",
        "arcface,lr=nan",
        "arcface,margin=30",
        "arcface,stride=7",
        "arcface,amp=fp8",
        "arcface,loss=cosface",
        "arcface,size=32",
        "arcface,seed=1",
        "arcface arcface",
    ],
)
def test_wrong_variants_are_named(made, tmp_path, capsys, text):
    words = ["--faces", str(made / "faces"), "--pairs", str(made / "pairs.txt"), "--out", str(tmp_path / "out")]
    assert compare_losses.main([*words, "--variants", *text.split()]) == 2
    assert "--variants" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "nan"], "--epochs must be above 0"),
        (["--epochs", "-1"], "--epochs must be above 0"),
        (["--seeds", "0", "0"], "--seeds must differ from each other, got 0 0"),
        (["--seeds", "9999999999"], "--seeds must be from"),
        (["--min-images", "0"], "--min-images must be 1 at least"),
        (["--out", "{made}/pairs.txt"], "--out must be a folder"),
        (["--runs", "{made}/pairs.txt"], "--runs must be a folder"),
        (["--test-folds", "2", "9"], "--test-folds: "),
    ],
)
def test_wrong_options_of_a_comparison_are_named(made, tmp_path, capsys, words, message):
    base = ["--faces", str(made / "faces"), "--pairs", str(made / "pairs.txt"), "--out", str(tmp_path / "out")]
    base += ["--runs", str(tmp_path / "runs")]
    assert compare_losses.main([*base, *(word.format(made=made) for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt"))

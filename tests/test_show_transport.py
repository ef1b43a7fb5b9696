"""The picture of a transport plan: which images, which cells, which flows."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import show_transport  # noqa: E402
from face_training import descriptors  # noqa: E402
from face_training.data import FacesError  # noqa: E402
from face_training.training import Model, Settings, save  # noqa: E402


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for person, count in (("a", 2), ("b", 1)):
        (tmp_path / "faces" / person).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(file, "PNG")
            (tmp_path / "faces" / person / f"{number}.png").write_bytes(file.getvalue())
    return tmp_path / "faces"


def test_largest_flows_carry_the_part_asked_for():
    plan = torch.tensor([[0.4, 0.1], [0.05, 0.45]])
    assert [(row, column) for row, column, _ in show_transport.largest_flows(plan, 0.6)] == [(0, 0), (1, 1)]
    assert len(show_transport.largest_flows(plan, 0.4)) == 1


def test_picture_of_local_descriptors(tree, tmp_path, capsys):
    assert show_transport.main(["--faces", str(tree), str(tmp_path / "out.png")]) == 0
    assert "a/0.png" in capsys.readouterr().out
    assert Image.open(tmp_path / "out.png").size[0] > 1000


def blurred(seed: int, height: int, width: int) -> torch.Tensor:
    """A picture whose parts can be told apart, but whose pixels are like their neighbours, as in a photograph."""
    noise = torch.rand(1, 3, height // 6, width // 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    return smooth[0].mul(255).byte()


def test_transport_finds_what_has_moved():
    """What moves by a cell is matched a cell further, by descriptors that know nothing of where they are."""
    grid, cell = descriptors.GRID, descriptors.SIDE // descriptors.GRID
    wide = blurred(0, descriptors.SIDE, descriptors.SIDE + cell)
    pictures = torch.stack([wide[:, :, cell:], wide[:, :, :-cell]])
    found = show_transport.solve(["a", "b"], pictures, descriptors.descriptors(pictures), [("a", "b")], 0.05)
    plan = found.plan.view(grid, grid, grid, grid) * grid**2
    # Windows at the rim see what is beyond the other picture's.
    moved = [plan[row, column, row, column + 1].item() for row in range(1, grid - 1) for column in range(1, grid - 2)]
    assert min(moved) > 0.9


def test_descriptors_are_histograms_of_directions():
    """Of a slope to the right, then downwards: all in one direction."""
    slope = torch.arange(descriptors.SIDE, dtype=torch.uint8).expand(3, descriptors.SIDE, descriptors.SIDE)
    found = descriptors.histograms(torch.stack([slope, slope.mT]))
    directions = found.view(2, descriptors.GRID**2, descriptors.DIRECTIONS, descriptors.WINDOW**2).sum(3)
    expected = torch.zeros(2, descriptors.GRID**2, descriptors.DIRECTIONS)
    expected[0, :, 0] = expected[1, :, 2] = 1
    # Sums of 128 float32 numbers, and an angle of atan2.
    torch.testing.assert_close(directions, expected, rtol=1e-5, atol=1e-5)


def test_features_of_a_network_are_compared_as_the_loss_compares_them(tree, tmp_path, capsys):
    settings = Settings(size=16, stride=8, width=0.25, embedding_size=8)
    model = Model(settings, 3)
    save(tmp_path / "checkpoint.pt", {"settings": vars(settings), "model": model.state_dict()})
    names = ["a/0.png", "a/1.png"]
    words = ["--faces", str(tree), "--checkpoint", str(tmp_path / "checkpoint.pt"), "--images", *names]
    assert show_transport.main([*words, str(tmp_path / "out.png")]) == 0
    printed = float(capsys.readouterr().out.split()[-1])
    pixels = show_transport.Images(show_transport.open_tree(tree), names, 16, True).batch(torch.arange(2))[0]
    with torch.no_grad():
        maps = model.backbone.eval()(show_transport.to_float(pixels))[1].flatten(2).mT
    expected = show_transport.otface_cuda.sinkhorn_points(maps[:1], maps[1:], 0.05, max_iter=10_000, tol=1e-4)
    assert printed == pytest.approx(expected.transport_cost.item(), abs=1e-4)  # four digits are printed


def test_a_pair_that_is_alike_is_shown_but_not_the_same_photograph_twice():
    pictures = torch.stack([blurred(seed, 112, 112) for seed in range(3)])
    faces = torch.stack([pictures[0], pictures[0], *(mixed(pictures, part) for part in (0.1, 0.2, 0.4, 0.8))])
    names = [f"p/{i}" for i in range(6)]
    pairs = [("p/0", name) for name in names[1:]]
    found = show_transport.solve(names, faces, descriptors.descriptors(faces), pairs, 0.05)
    assert found.names == ("p/0", "p/2")
    assert torch.equal(found.pictures, faces[[0, 2]])
    assert show_transport.solve(names, faces, descriptors.descriptors(faces), pairs[:1], 0.05).names == ("p/0", "p/1")


def mixed(pictures: torch.Tensor, part: float) -> torch.Tensor:
    return ((1 - part) * pictures[0].float() + part * pictures[1].float()).byte()


def test_pairs_are_of_one_person_and_those_that_cannot_be_read_are_passed_over(tree):
    (tree / "a/2.png").write_bytes((tree / "a/0.png").read_bytes())
    (tree / "a/1.png").write_bytes(b"no image")
    opened = show_transport.open_tree(tree)
    pairs = show_transport.choose(opened, None, 0)
    assert {name.split("/")[0] for pair in pairs for name in pair} == {"a"}
    assert len(set(pairs)) == len(pairs) > 1
    found = show_transport.solve(*show_transport.cells_of(opened, pairs, None), pairs, 0.05)
    assert set(found.names) == {"a/0.png", "a/2.png"}


def test_the_picture_names_nobody(tree, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(show_transport, "draw", lambda transport, title, path: titles.append(title))
    assert show_transport.main(["--faces", str(tree), str(tmp_path / "out.png")]) == 0
    assert titles == ["local descriptors, eps 0.05: the largest 60% of the mass"]


def test_picture_of_a_trained_network(tree, tmp_path):
    settings = Settings(size=16, stride=8, width=0.25, embedding_size=8)
    checkpoint = tmp_path / "checkpoint.pt"
    save(checkpoint, {"settings": vars(settings), "model": Model(settings, 3).state_dict()})
    words = ["--faces", str(tree), "--checkpoint", str(checkpoint), "--images", "a/0.png", "b/0.png"]
    assert show_transport.main([*words, str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--faces", "nowhere"], "there is no nowhere"),
        (["--images", "a/0.png", "a/7.png"], "has no image a/7.png"),
        (["--images", "a/0.png", "b/bad.png"], "b/bad.png is not an image"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt is no checkpoint"),
        (["--checkpoint", "{tree}/b/bad.png"], "bad.png is no checkpoint"),
        (["--checkpoint", "{tree}/empty.pt"], "empty.pt is no checkpoint of examples/train_faces.py: it is empty"),
        (["--checkpoint", "{tree}"], "is no checkpoint"),
        *((["--eps", word], "--eps must be from 1e-06 to 1,000,000") for word in ("nan", "inf", "0", "-1", "1e-300")),
    ],
)
def test_what_is_wrong_is_said(tree, tmp_path, capsys, change, message):
    (tree / "b/bad.png").write_bytes(b"no image")
    (tree / "empty.pt").write_bytes(b"")
    words = [word.format(tree=tree) for word in change]
    assert show_transport.main(["--faces", str(tree), *words, str(tmp_path / "out.png")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out", "out.xyz", "nowhere/out.png", "faces"])
def test_the_picture_is_a_file_that_can_be_written(tree, tmp_path, capsys, name):
    assert show_transport.main(["--faces", str(tree), str(tmp_path / name)]) == 2
    assert "the picture must " in capsys.readouterr().err


def test_a_network_that_is_not_finite_is_named(tree, tmp_path, capsys):
    settings = Settings(size=16, stride=8, width=0.25, embedding_size=8)
    model = Model(settings, 3)
    model.backbone.features[0][0].weight.data.fill_(float("nan"))
    save(tmp_path / "checkpoint.pt", {"settings": vars(settings), "model": model.state_dict()})
    words = ["--faces", str(tree), "--checkpoint", str(tmp_path / "checkpoint.pt"), str(tmp_path / "out.png")]
    assert show_transport.main(words) == 2
    assert "makes features that are not finite" in capsys.readouterr().err


def test_two_images_of_someone_are_needed(tree):
    opened = show_transport.open_tree(tree)
    opened.people.pop("a")
    with pytest.raises(FacesError, match="two images"):
        show_transport.choose(opened, None, 0)

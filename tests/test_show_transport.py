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
    ],
)
def test_what_is_wrong_is_said(tree, tmp_path, capsys, change, message):
    (tree / "b/bad.png").write_bytes(b"no image")
    assert show_transport.main(["--faces", str(tree), *change, str(tmp_path / "out.png")]) == 2
    assert message in capsys.readouterr().err


def test_two_images_of_someone_are_needed(tree):
    opened = show_transport.open_tree(tree)
    opened.people.pop("a")
    with pytest.raises(FacesError, match="two images"):
        show_transport.choose(opened, None, 0)

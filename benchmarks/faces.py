"""Optimal-transport problems from real faces: the cosine cost between 7x7 grids of local descriptors of two images.

A face recognition network ends in a 7x7 map of feature vectors; OTFace compares two of them by optimal transport. Here
a fixed descriptor stands in for the network, so that the costs are those of real faces and everyone gets the same ones:

1. the image, scaled to 112x112, falls into 7x7 cells of 16x16 pixels;
2. shape, 32 numbers a cell: a histogram of gradient orientations (8 directions over the full circle, each pixel shared
   between the two nearest, weighted by the gradient's length) in each quarter of the cell; divided by its sum, square
   root taken, which has length 1 (a "RootSIFT" of the cell);
3. colour, 3 numbers a cell: the cell's mean red, green and blue less those of the image;
4. from every descriptor the mean of that cell over all images of the run is taken off (what all faces share says
   nothing about whose they are), and it is scaled to length 1.

Images are read from an identity-folder tree, ROOT/person/image, or from a tar of one.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy
import torch
from torch import Tensor

GRID, SIDE = 7, 112
CELL = SIDE // GRID
DIRECTIONS = 8
SUFFIXES = {".jpg", ".jpeg", ".png", ".pgm", ".ppm", ".bmp"}


class FacesError(ValueError):
    """A tree of faces that cannot be used; the message is for the user."""


def face_points(path: Path, pairs: int, seed: int = 0) -> tuple[tuple[Tensor, Tensor], dict[str, int]]:
    """Unit descriptors x, y (pairs, 49, 35) of the two images of each pair, and what they were made of.

    The first half of the pairs shows one person twice, the second half two people.
    """
    people, read = _open_tree(path)
    chosen = choose_pairs(people, pairs, seed)
    names = sorted({name for pair in chosen for name in pair})
    images = torch.stack([_decode(read(name), name) for name in names])
    found = descriptors(images)
    place = {name: i for i, name in enumerate(names)}
    x, y = (found[[place[pair[side]] for pair in chosen]] for side in (0, 1))
    return (x, y), {"images": len(names), "people_in_tree": len(people), "pairs": pairs}


def choose_pairs(people: dict[str, list[str]], pairs: int, seed: int = 0) -> list[tuple[str, str]]:
    """``pairs`` pairs of image names, the first half of them of one person; a person is drawn before an image is."""
    several = sorted(person for person, images in people.items() if len(images) > 1)
    if not several or len(people) < 2:
        raise FacesError("--faces needs at least two people, and two images of one of them")
    draw = random.Random(seed)
    same = [tuple(draw.sample(people[draw.choice(several)], 2)) for _ in range(pairs // 2)]
    everyone = sorted(people)
    different = [
        tuple(draw.choice(people[person]) for person in draw.sample(everyone, 2)) for _ in range(pairs - pairs // 2)
    ]
    return same + different


def descriptors(images: Tensor) -> Tensor:
    """Images (N, 3, 112, 112) with values in [0, 1] -> unit descriptors (N, 49, 35), cells row by row."""
    count = images.shape[0]
    grey = images.mean(1)
    dy, dx = torch.zeros_like(grey), torch.zeros_like(grey)
    dy[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    dx[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    length = torch.hypot(dx, dy)
    direction = torch.atan2(dy, dx) * (DIRECTIONS / (2 * torch.pi)) % DIRECTIONS
    lower = direction.floor()
    share = direction - lower
    # One map per direction: each pixel gives its gradient's length to the two directions it lies between.
    maps = torch.zeros(count, DIRECTIONS, SIDE, SIDE)
    maps.scatter_add_(1, (lower.long() % DIRECTIONS)[:, None], (length * (1 - share))[:, None])
    maps.scatter_add_(1, ((lower.long() + 1) % DIRECTIONS)[:, None], (length * share)[:, None])

    quarters = torch.nn.functional.avg_pool2d(maps, CELL // 2)  # (N, 8, 14, 14)
    shape = quarters.view(count, DIRECTIONS, GRID, 2, GRID, 2).permute(0, 2, 4, 1, 3, 5).reshape(count, GRID**2, -1)
    shape = (shape / shape.sum(2, keepdim=True).clamp(min=1e-6)).sqrt()
    colour = torch.nn.functional.avg_pool2d(images, CELL) - images.mean((2, 3), keepdim=True)
    colour = colour.flatten(2).mT  # (N, 49, 3)
    both = torch.cat([shape, colour], 2)
    return torch.nn.functional.normalize(both - both.mean(0), dim=2)


def _open_tree(path: Path) -> tuple[dict[str, list[str]], Callable[[str], bytes]]:
    """The image names of each person, and a function that reads one image by name."""
    if path.is_dir():
        names = [p.relative_to(path).as_posix() for p in path.glob("*/*")]
        read: Callable[[str], bytes] = lambda name: (path / name).read_bytes()  # noqa: E731
    elif path.is_file() and tarfile.is_tarfile(path):
        tar = tarfile.open(path)  # noqa: SIM115, stays open for `read`
        members = {m.name: m for m in tar.getmembers() if m.isfile()}
        names = list(members)
        read = lambda name: tar.extractfile(members[name]).read()  # noqa: E731
    else:
        raise FacesError("--faces must be a folder of one folder per person, or a tar of one")
    people = defaultdict(list)
    for name in sorted(names):
        if PurePosixPath(name).suffix.lower() in SUFFIXES:
            people[PurePosixPath(name).parent.name].append(name)
    if not people:
        raise FacesError("--faces holds no image of the form person/image.jpg")
    return dict(people), read


def _decode(data: bytes, name: str) -> Tensor:
    """One image as a tensor (3, 112, 112) with values in [0, 1]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise FacesError("--faces needs pillow to decode images: pip install pillow") from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = numpy.array(image.convert("RGB").resize((SIDE, SIDE)), dtype=numpy.float32)
    except OSError as error:
        raise FacesError(f"--faces: {PurePosixPath(name).name} is not an image that pillow can read") from error
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255

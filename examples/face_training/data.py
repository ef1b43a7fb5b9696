"""Faces: the tree of images, the pairs file, the split, decoding, identity-balanced batches, augmentation.

Everything random is a function of the seed and the number of the step, so that a run that was killed goes on with
exactly the batches that it would have had.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

TRIED_ROUNDS = 10  # of batches, before a set of images counts as one that cannot be decoded
SUFFIXES = {".jpg", ".jpeg", ".png", ".pgm", ".ppm", ".bmp", ".webp"}


class FacesError(ValueError):
    """Data or options that cannot be used; the message is for the user."""


# ---- the tree ----


@dataclass(frozen=True)
class Tree:
    """Images by the name person/file, whatever stands above the person."""

    path: Path
    people: dict[str, list[str]]
    read: Callable[[str], bytes]

    @property
    def names(self) -> list[str]:
        return [name for names in self.people.values() for name in names]


def open_tree(path: Path, option: str = "--faces") -> Tree:
    """An identity-folder tree (PATH/person/image, or one folder deeper) or an uncompressed tar of one."""
    if not path.exists():
        raise FacesError(f"{option}: there is no {path}; expected a folder of one folder per person, or a tar of one")
    places: dict[str, Callable[[], bytes]] = {}
    if path.is_dir():
        for folder in (path, *(p for p in sorted(path.iterdir()) if p.is_dir())):
            found = {f"{p.parent.name}/{p.name}": p for p in _images_below(folder)}
            if found:
                places = {name: p.read_bytes for name, p in found.items()}
                break
    else:
        places = _places_in_tar(path, option)
    people = defaultdict(list)
    for name in sorted(places):
        people[name.split("/")[0]].append(name)
    if not people:
        raise FacesError(f"{option}: {path} holds no image of the form person/image.jpg")
    return Tree(path, dict(people), lambda name: places[name]())


def _images_below(folder: Path) -> Iterator[Path]:
    for person in os.scandir(folder):
        if person.is_dir():
            for entry in os.scandir(person.path):
                if PurePosixPath(entry.name).suffix.lower() in SUFFIXES:
                    yield Path(entry.path)


def _places_in_tar(path: Path, option: str) -> dict[str, Callable[[], bytes]]:
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile()]
    except (tarfile.TarError, OSError) as error:
        raise FacesError(
            f"{option}: {path} is no folder and no uncompressed tar; expected a folder of one folder per person, or a "
            "tar of one"
        ) from error
    file = os.open(path, os.O_RDONLY)  # stays open: images are read by several threads, each at its own place
    places: dict[str, Callable[[], bytes]] = {}
    for member in members:
        name = PurePosixPath(member.name)
        if name.suffix.lower() in SUFFIXES and name.parent.name:
            size, offset = member.size, member.offset_data
            places[f"{name.parent.name}/{name.name}"] = lambda size=size, offset=offset: os.pread(file, size, offset)  # type: ignore[misc]
    return places


# ---- the pairs ----


@dataclass(frozen=True)
class Pair:
    """Two image names, whether they show one person, and the fold they stand in."""

    fold: int
    first: str
    second: str
    same: bool


def read_pairs(path: Path, tree: Tree) -> tuple[list[Pair], int]:
    """The pairs whose images the tree has, and how many others the file lists."""
    pairs, known = list_pairs(path, tree), set(tree.names)
    found = [pair for pair in pairs if pair.first in known and pair.second in known]
    if not found:
        raise FacesError(f"none of the {len(pairs)} pairs of {path} has both of its images in {tree.path}")
    return found, len(pairs) - len(found)


def list_pairs(path: Path, tree: Tree) -> list[Pair]:
    """All pairs of a file, whether the tree has their images or not.

    Two formats: LFW's own pairs.txt (a line with the number of folds and of pairs of a kind; then ``name n n`` or
    ``name n name n``), and lines of ``fold, image, image, 1 or 0`` with tabs between.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FacesError(f"the pairs file {path} cannot be read: {error}") from error
    lines = [[word.strip() for word in line.split("\t")] for line in text.splitlines() if line.strip()]
    try:
        return _numbered_pairs(lines, tree) if lines and len(lines[0]) <= 2 else _listed_pairs(lines)
    except ValueError as error:
        raise FacesError(f"{path} is no pairs file in the format of LFW: {error}") from error


def _listed_pairs(lines: list[list[str]]) -> list[Pair]:
    same_or_not = {"0": False, "1": True}
    pairs = []
    for i, line in enumerate(lines):
        if len(line) != 4:
            raise ValueError(f"line {i + 1} has {len(line)} columns")
        fold, first, second, same = line
        if same not in same_or_not:
            raise ValueError(f"line {i + 1} ends in {same!r}, not in 1 or 0")
        pairs.append(Pair(int(fold), first, second, same_or_not[same]))
    return pairs


def _numbered_pairs(lines: list[list[str]], tree: Tree) -> list[Pair]:
    # The number of folds can be left out (pairsDevTrain.txt): then all pairs stand in one.
    per_kind = int(lines[0][-1])
    if per_kind < 1:
        raise ValueError(f"its first line says that a fold has {per_kind} pairs of a kind")
    by_stem = {name.rsplit(".", 1)[0]: name for name in tree.names}

    def image(person: str, number: str) -> str:
        stem = f"{person}/{person}_{int(number):04d}"
        return by_stem.get(stem, stem)

    pairs = []
    for i, line in enumerate(lines[1:]):
        if len(line) not in (3, 4):
            raise ValueError(f"line {i + 2} has {len(line)} columns")
        other = (line[0], line[2]) if len(line) == 3 else (line[2], line[3])
        pairs.append(Pair(i // (2 * per_kind) + 1, image(line[0], line[1]), image(*other), len(line) == 3))
    return pairs


def people_of(pairs: Sequence[Pair]) -> set[str]:
    return {name.split("/")[0] for pair in pairs for name in (pair.first, pair.second)}


# ---- the images ----


def decode(data: bytes, size: int) -> Tensor:
    """One image as uint8 (3, size, size): the largest square in its middle, scaled."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = numpy.array(ImageOps.fit(image.convert("RGB"), (size, size)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


class Images:
    """The images of ``names``, by index into it; those that fit are decoded once and kept as one uint8 tensor.

    ``bad`` are the names that could not be decoded. Images in memory have been decoded already when this is made, and
    bad ones have left ``names``; otherwise a bad image turns up when its batch does, and is left out of it.
    """

    def __init__(self, tree: Tree, names: Sequence[str], size: int, in_memory: bool | None = None) -> None:
        self.tree, self.size, self.names = tree, size, list(names)
        self.bad: set[str] = set()
        self.pool = ThreadPoolExecutor(max_workers=os.cpu_count())
        needed = 3 * size**2 * len(names)
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.memory: Tensor | None = None
        if in_memory or (in_memory is None and needed < free // 2):
            try:
                memory = torch.empty(len(names), 3, size, size, dtype=torch.uint8)
            except RuntimeError as error:
                raise FacesError(
                    f"there is no memory for {needed / 1e9:,.1f} GB of images; give --in-memory no"
                ) from error
            good: list[str] = []
            decoded = self.pool.map(self._try, self.names)
            pairs = zip(self.names, decoded, strict=True)
            for name, image in tqdm(pairs, "decoding", len(names), leave=False, disable=None):
                if image is not None:
                    memory[len(good)] = image
                    good.append(name)
            self.names, self.memory = good, memory[: len(good)]

    def _try(self, name: str) -> Tensor | None:
        try:
            return decode(self.tree.read(name), self.size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what pillow raises on broken files
            self.bad.add(name)
            return None

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images (B, 3, size, size), and their indices: the ones asked for but for those of bad images."""
        if self.memory is not None:
            return self.memory[indices], indices
        images = list(self.pool.map(self._try, [self.names[i] for i in indices.tolist()]))
        good = [image for image in images if image is not None]
        none = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return torch.stack(good) if good else none, indices[[image is not None for image in images]]


def some_of(names: Collection[str], count: int = 3) -> str:
    """The first of them, for a message."""
    return ", ".join([*sorted(names)[:count], *([".."] if len(names) > count else [])])


@dataclass
class TrainingSet:
    """The images to train on, and for each the number of its person."""

    images: Images
    labels: Tensor
    people: list[str]
    skipped: dict[str, int]  # people with too few images, and bad images

    def digest(self) -> str:
        """Equal for the same images alone."""
        return hashlib.sha256("\n".join(self.images.names).encode()).hexdigest()


def training_set(tree: Tree, leave_out: set[str], min_images: int, size: int, in_memory: bool | None) -> TrainingSet:
    """Everyone in the tree with enough images that can be read, but for the people to leave out."""
    candidates = {person: names for person, names in tree.people.items() if person not in leave_out}
    enough = {person: names for person, names in candidates.items() if len(names) >= min_images}
    images = Images(tree, [name for names in enough.values() for name in names], size, in_memory)
    good = defaultdict(list)
    for i, name in enumerate(images.names):
        good[name.split("/")[0]].append(i)
    people = [person for person, indices in good.items() if len(indices) >= min_images]
    if len(people) < 2:
        raise FacesError(
            f"{tree.path} has {len(people)} people to train on with {min_images} or more readable images each, of "
            f"{len(candidates)} that no test fold names; at least two are needed"
        )
    keep = torch.tensor([i for person in people for i in good[person]])
    labels = torch.repeat_interleave(torch.arange(len(people)), torch.tensor([len(good[person]) for person in people]))
    images.names = [images.names[i] for i in keep.tolist()]
    if images.memory is not None and len(keep) < len(images.memory):
        images.memory = images.memory[keep]
    skipped = {f"people with fewer than {min_images} images": len(candidates) - len(people)}
    return TrainingSet(images, labels, people, {**skipped, "unreadable images": len(images.bad)})


# ---- batches ----


class Batches:
    """``people`` different people with ``images`` images each, for every step and every process of the run.

    In a round everyone comes once, in an order drawn for the round, except that those who do not fill a batch are left
    out. Of a person, different images are taken as far as there are so many, else some come again.
    """

    def __init__(self, labels: Tensor, people: int, images: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.counts = torch.bincount(labels)
        self.people = min(people, len(self.counts) // world)
        if self.people < 2:
            raise FacesError(f"{len(self.counts)} people are too few for {world} processes, each of which needs two")
        self.labels, self.images, self.seed, self.rank, self.world = labels, images, seed, rank, world
        self.steps_per_round = len(self.counts) // (self.people * world)
        self.steps_per_epoch = max(1, round(len(labels) / (self.people * images * world)))
        self._round: tuple[int, Tensor] = (-1, torch.empty(0))

    def indices(self, step: int) -> Tensor:
        number, place = divmod(step, self.steps_per_round)
        if self._round[0] != number:
            self._round = (number, self._draw(number))
        start = (place * self.world + self.rank) * self.people
        return self._round[1][start : start + self.people].flatten()

    def _draw(self, number: int) -> Tensor:
        generator = seeded(self.seed, number, 0)
        shuffled = torch.randperm(len(self.labels), generator=generator)
        by_person = shuffled[self.labels[shuffled].argsort(stable=True)]
        starts = self.counts.cumsum(0) - self.counts
        chosen = by_person[starts[:, None] + torch.arange(self.images) % self.counts[:, None]]  # (people, images)
        return chosen[torch.randperm(len(chosen), generator=generator)]


def training_batch(images: Images, batches: Batches, step: int) -> tuple[Tensor, Tensor]:
    """The images of a step and their indices. Where fewer than two can be decoded, those of the next steps come in.

    A batch normalisation needs two, and every process has to take part in every step.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for later in range(TRIED_ROUNDS * batches.steps_per_round):
        found.append(images.batch(batches.indices(step + later)))
        if sum(len(indices) for _, indices in found) >= 2:
            pixels, indices = zip(*found, strict=True)
            return torch.cat(pixels), torch.cat(indices)
    raise FacesError(
        f"of the images of {images.tree.path} hardly any can be decoded: among those that could not be are "
        f"{some_of(images.bad)}"
    )


def seeded(seed: int, step: int, rank: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 10**9 + step) * 1024 + rank)


# ---- augmentation ----


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1], the channels of a pixel side by side, which convolutions are fastest with."""
    return images.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Floats in [-1, 1] (B, 3, S, S): mirrored, moved, turned, scaled, brightness, contrast and colour changed."""
    count, device = len(images), images.device

    def draw(low: float, high: float) -> Tensor:  # on the CPU, so that every device sees the same numbers
        return torch.empty(count).uniform_(low, high, generator=generator).to(device)

    mirror = draw(-1, 1).sign()
    angle, zoom = draw(-0.1, 0.1), draw(0.92, 1.06)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = [
        torch.stack([cos * mirror, -sin, draw(-0.06, 0.06)], 1),
        torch.stack([sin * mirror, cos, draw(-0.06, 0.06)], 1),
    ]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    images = torch.nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    def each(values: Tensor) -> Tensor:
        return values[:, None, None, None]

    grey = images.mean(1, keepdim=True)
    images = grey + each(draw(0.5, 1.5).where(draw(0, 1) > 0.05, 0)) * (images - grey)
    middle = images.mean((1, 2, 3), keepdim=True)
    return (middle + each(draw(0.75, 1.25)) * (images - middle) + each(draw(-0.2, 0.2))).clamp(-1, 1)

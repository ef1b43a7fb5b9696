"""Verification as the field does it: accuracy per fold, ROC, TAR at FAR, and accuracy with the OT distance mixed in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import otface_cuda

from .data import FacesError, Images, Pair, to_float

FARS = (1e-2, 1e-3, 1e-4)
BINS = 200_000  # of the cosines from -1 to 1, for which pairs are counted: a step is 1e-5
ROWS = 1024  # embeddings compared with all others at a time
ROC_POINTS = 200


@dataclass
class Embedded:
    """Unit embeddings (N, d) of the images in ``names``, and the feature maps (N, C, H, W) of some of them."""

    names: list[str]
    embeddings: Tensor
    maps: Tensor
    maps_of: dict[str, int]


@torch.inference_mode()
def embed(model: nn.Module, images: Images, with_maps: set[str], device: torch.device, batch: int = 256) -> Embedded:
    """The sum of the embeddings of an image and of its mirror image, scaled to length 1. Maps are of the image."""
    model.eval()
    names: list[str] = []
    maps_of: dict[str, int] = {}
    found, maps = [], []
    for some in tqdm(torch.arange(len(images.names)).split(batch), "embedding", leave=False, disable=None):
        pixels, good = images.batch(some)
        if not len(good):
            continue
        floats = to_float(pixels.to(device))
        embeddings, feature_map = model(floats)
        found.append(embeddings.float() + model(floats.flip(3))[0].float())
        of = [images.names[i] for i in good.tolist()]
        wanted = [i for i, name in enumerate(of) if name in with_maps]
        maps.append(feature_map[wanted].float())
        maps_of.update({of[i]: len(maps_of) + k for k, i in enumerate(wanted)})
        names += of
    if not found:
        raise FacesError(f"none of the test images of {images.tree.path} can be decoded")
    return Embedded(names, nn.functional.normalize(torch.cat(found)), torch.cat(maps), maps_of)


# ---- pairs ----


@dataclass
class Verification:
    """Accuracy of each fold, each at the threshold that is best on the others."""

    folds: dict[int, float]
    mean: float

    def __str__(self) -> str:
        each = ", ".join(f"fold {fold}: {accuracy:.2%}" for fold, accuracy in self.folds.items())
        return f"{self.mean:.2%} ({each})"


def verify(distance: Tensor, same: Tensor, folds: Tensor) -> Verification:
    distance = distance.double()  # a threshold may lie between two neighbouring floats
    accuracy = {}
    for fold in sorted(set(folds.tolist())):
        here = folds == fold
        if here.all():
            raise FacesError("verification needs two test folds at least: the threshold of one comes from the others")
        threshold = best_threshold(distance[~here], same[~here])
        accuracy[fold] = ((distance[here] <= threshold) == same[here]).double().mean().item()
    return Verification(accuracy, sum(accuracy.values()) / len(accuracy))


def best_threshold(distance: Tensor, same: Tensor) -> float:
    """Where most pairs are right; "one person" is a distance not above it. Half-way to the next distance.

    -inf where most are right if everyone is rejected.
    """
    ordered, order = distance.double().sort()
    others = (~same).sum()
    right = same[order].long().cumsum(0) + others - (~same[order]).long().cumsum(0)
    right[:-1][ordered[:-1] == ordered[1:]] = -1  # no threshold lies between equal distances
    best = int(right.argmax())
    if others > right[best]:
        return -math.inf
    return (ordered[best] + ordered[min(best + 1, len(ordered) - 1)]).item() / 2


@torch.inference_mode()
def pair_distances(embedded: Embedded, pairs: Sequence[Pair], eps: float, n_iter: int) -> tuple[Tensor, Tensor]:
    """1 - cosine of the embeddings, and OT between the feature maps, of each pair; all pairs in batches."""
    place = {name: i for i, name in enumerate(embedded.names)}
    first, second = (torch.tensor([place[getattr(pair, side)] for pair in pairs]) for side in ("first", "second"))
    distance = 1 - (embedded.embeddings[first] * embedded.embeddings[second]).sum(1)
    rows = [[embedded.maps_of[pair.first], embedded.maps_of[pair.second]] for pair in pairs]
    cells = embedded.maps.flatten(2).mT
    listed = torch.tensor(rows, device=cells.device)
    ot = otface_cuda.sinkhorn_pairs(cells, listed, eps, max_iter=n_iter).transport_cost
    return distance.cpu(), ot.cpu()


# ---- all pairs of images ----


@dataclass
class Roc:
    """Over all pairs of images: of two people (impostors) and of one (genuine)."""

    impostors: int
    genuine: int
    tar: dict[str, float]  # at each of FARS that so many impostors can measure
    curve: list[list[float]] = field(default_factory=list)  # [FAR, TAR], FAR evenly spaced on a logarithmic axis


@torch.inference_mode()
def roc(embedded: Embedded) -> Roc:
    """Pairs are counted by cosine, rounded to 1e-5, so that memory does not grow with their number."""
    people = [name.split("/")[0] for name in embedded.names]
    number = {person: i for i, person in enumerate(sorted(set(people)))}
    device = embedded.embeddings.device
    labels = torch.tensor([number[person] for person in people], device=device)
    counts = torch.zeros(2, BINS, dtype=torch.int64, device=device)
    place = torch.arange(len(labels), device=device)
    for rows in place.split(ROWS):
        cosine = embedded.embeddings[rows] @ embedded.embeddings.T
        bins = ((cosine + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
        later = place[None] > rows[:, None]  # a pair once
        same = labels[rows][:, None] == labels[None]
        for kind, which in enumerate((~same & later, same & later)):
            counts[kind] += torch.bincount(bins[which], minlength=BINS)
    return roc_of_counts(counts.cpu())


def roc_of_counts(counts: Tensor) -> Roc:
    """From the numbers of impostor and of genuine pairs (2, bins), bins by rising similarity."""
    accepted = counts.flip(1).cumsum(1).double()  # from the most similar on
    impostors, genuine = (int(n) for n in counts.sum(1))

    def tar_at(far: float) -> float:
        # The last threshold that lets no more impostors through than allowed.
        bins = int((accepted[0] <= far * impostors).sum())
        return accepted[1, bins - 1].item() / genuine if bins and genuine else 0.0

    lowest = 1 / max(impostors, 1)
    curve = [
        [far, tar_at(far)]
        for far in torch.logspace(max(-5, torch.tensor(lowest).log10().item()), 0, ROC_POINTS).tolist()
    ]
    return Roc(impostors, genuine, {f"{far:g}": tar_at(far) for far in FARS if far >= lowest}, curve)


# ---- together ----


def evaluate(
    model: nn.Module,
    images: Images,
    pairs: Sequence[Pair],
    device: torch.device,
    rerank: Sequence[float] = (),
    eps: float = 0.05,
    n_iter: int = 20,
) -> dict[str, Any]:
    """What results.json holds: accuracy by distance and, for each weight of ``rerank``, with OT mixed in; ROC."""
    embedded = embed(model, images, {name for pair in pairs for name in (pair.first, pair.second)}, device)
    pairs = [pair for pair in pairs if pair.first in embedded.maps_of and pair.second in embedded.maps_of]
    if not pairs:
        raise FacesError("no pair of the test folds has two readable images")
    distance, ot = pair_distances(embedded, pairs, eps, n_iter)
    same, folds = torch.tensor([pair.same for pair in pairs]), torch.tensor([pair.fold for pair in pairs])
    return {
        "test_images": len(embedded.names),
        "test_pairs": len(pairs),
        "unreadable_images": len(images.bad),
        "verification": asdict(verify(distance, same, folds)),
        "rerank": {
            "eps": eps,
            "iterations": n_iter,
            "weights": {str(w): asdict(verify((1 - w) * distance + w * ot, same, folds)) for w in rerank},
        },
        "roc": asdict(roc(embedded)),
    }

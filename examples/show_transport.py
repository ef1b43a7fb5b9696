"""What optimal transport compares: two faces, the cells that it matches, and its plan, in one picture.

python examples/show_transport.py --faces lfw112.tar transport.png
python examples/show_transport.py --faces lfw112.tar --checkpoint runs/otface/checkpoint.pt \\
    --images PERSON/PERSON_0001.jpg PERSON/PERSON_0002.jpg transport.png

With a checkpoint of examples/train_faces.py the cells are those of the network's feature map; without one they are
local descriptors: histograms of gradients around each cell. The plan is drawn at a small eps: at the loss's eps of 1 it
is nearly uniform, every cell goes everywhere. Needs pillow, tqdm and matplotlib.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import otface_cuda

sys.path.insert(0, str(Path(__file__).parent))

from face_training.data import FacesError, Images, Tree, open_tree, to_float
from face_training.descriptors import SIDE, descriptors
from face_training.report import pyplot
from face_training.settings import EPS, check_number
from face_training.training import load_backbone

TRIED = 32  # pairs of images, of which one is shown
SHOWN = 0.6  # of the mass, by its largest flows
DROP = 0.35  # of its height, by which the right face lies lower: else the flows of a row would lie on each other


def choose(tree: Tree, names: list[str] | None, seed: int) -> list[tuple[str, str]]:
    """The pair of images that is named, or pairs of one person each."""
    if names:
        missing = [name for name in names if name not in tree.people.get(name.split("/")[0], [])]
        if missing:
            raise FacesError(f"{tree.path} has no image {missing[0]}; expected person/file, as in {tree.names[0]}")
        return [(names[0], names[1])]
    several = [person for person, of in tree.people.items() if len(of) > 1]
    if not several:
        raise FacesError(f"nobody in {tree.path} has two images; name two with --images")
    draw = random.Random(seed)
    pairs = [draw.sample(tree.people[draw.choice(several)], 2) for _ in range(TRIED)]
    return list(dict.fromkeys((first, second) for first, second in pairs))


@torch.inference_mode()
def cells_of(tree: Tree, pairs: list[tuple[str, str]], checkpoint: Path | None) -> tuple[list[str], Tensor, Tensor]:
    """Of every image that can be decoded: its name, the picture (3, S, S) as uint8, the points (cells, d)."""
    model, size = None, SIDE
    if checkpoint is not None:
        model, settings = load_backbone(checkpoint)
        size = settings.size
    images = Images(tree, list(dict.fromkeys(name for pair in pairs for name in pair)), size, in_memory=True)
    if not images.names or (len(pairs) == 1 and images.bad):
        raise FacesError(f"{sorted(images.bad)[0]} is not an image that pillow can read")
    pictures = images.batch(torch.arange(len(images.names)))[0]
    points = descriptors(pictures) if model is None else model(to_float(pictures))[1].flatten(2).mT
    if not points.isfinite().all():
        raise FacesError(f"the network of {checkpoint} makes features that are not finite")
    return images.names, pictures, points.float()


@dataclass
class Transport:
    """Between the cells of two pictures (2, 3, S, S)."""

    names: tuple[str, str]
    pictures: Tensor
    plan: Tensor
    cost: float


def solve(names: list[str], pictures: Tensor, points: Tensor, pairs: list[tuple[str, str]], eps: float) -> Transport:
    """Of the pairs, one at the lower quartile of the costs: alike, but not two prints of one photograph."""
    pairs = [pair for pair in pairs if pair[0] in names and pair[1] in names]
    if not pairs:
        raise FacesError("no pair of images can be read; name two with --images")
    index = torch.tensor([[names.index(name) for name in pair] for pair in pairs])
    x, y = points[index].unbind(1)  # (pairs, cells, d)
    out = otface_cuda.sinkhorn_points(x, y, eps=eps, max_iter=10_000, tol=1e-4, return_plan=True)
    assert out.plan is not None
    shown = int(out.transport_cost.argsort()[len(pairs) // 4])
    return Transport(pairs[shown], pictures[index[shown]], out.plan[shown], out.transport_cost[shown].item())


def largest_flows(plan: Tensor, part: float) -> list[tuple[int, int, float]]:
    """(row, column, mass) of the fewest entries that carry this part of the mass, the smallest first."""
    mass, place = plan.flatten().sort(descending=True)
    count = int((mass.cumsum(0) < part * mass.sum()).sum()) + 1
    rows, columns = place[:count] // plan.shape[1], place[:count] % plan.shape[1]
    return list(zip(rows.tolist(), columns.tolist(), mass[:count].tolist(), strict=True))[::-1]


def draw(transport: Transport, title: str, path: Path) -> None:
    """Left both faces with their grids and the flows between, right the plan."""
    plt = pyplot()
    pictures, plan = transport.pictures, transport.plan
    cells, size = plan.shape[0], pictures.shape[2]
    grid = round(cells**0.5)
    cell = size / grid
    corners = ((0.0, 0.0), (1.5 * size, DROP * size))  # of the faces: left, top
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=[2.2, 1], layout="constrained")
    colours = plt.get_cmap("turbo")

    def centre(index: int, corner: tuple[float, float]) -> tuple[float, float]:
        return corner[0] + (index % grid + 0.5) * cell, corner[1] + (index // grid + 0.5) * cell

    for picture, (x, y) in zip(pictures, corners, strict=True):
        extent = (x, x + size, y + size, y)
        left.imshow(picture.permute(1, 2, 0).numpy(), extent=extent, interpolation="bilinear")
        for line in range(grid + 1):
            left.plot([x, x + size], [y + line * cell] * 2, color="white", linewidth=0.5, alpha=0.5)
            left.plot([x + line * cell] * 2, [y, y + size], color="white", linewidth=0.5, alpha=0.5)
    # The colour of a flow is that of the column it leaves; a flow as thick as can be carries all the mass of a cell.
    for row, column, mass in largest_flows(plan, SHOWN):
        whole = mass * cells
        ends = list(zip(centre(row, corners[0]), centre(column, corners[1]), strict=True))
        colour = colours((row % grid + 0.5) / grid)
        left.plot(*ends, color=colour, linewidth=0.2 + 1.2 * whole, alpha=min(1.0, 0.2 + 0.6 * whole))
        left.plot(*ends, "o", color=colour, markersize=5, markerfacecolor="none", markeredgewidth=0.2 + 1.2 * whole)
    left.set(xlim=(-1, corners[1][0] + size + 1), ylim=((1 + DROP) * size + 1, -1), aspect="equal", title=title)
    left.axis("off")

    shown = right.imshow(plan.numpy() * cells, cmap="magma", vmin=0)
    right.set(title=f"plan; transport cost {transport.cost:.3f}", xlabel="cell of the right face, row by row")
    right.set_ylabel("cell of the left face")
    right.set_xticks(range(0, plan.shape[1], grid))
    right.set_yticks(range(0, cells, grid))
    figure.colorbar(shown, ax=right, label="part of the cell's mass", shrink=0.85)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def check_picture(path: Path) -> None:
    """Before anything runs."""
    known = sorted(pyplot().FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise FacesError(f"the picture must end in one of .{', .'.join(known)}, got {path}")
    if not path.parent.is_dir() or path.is_dir():
        raise FacesError(f"the picture must be a file in a folder that is there, got {path}")


def main(argv: list[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("picture", type=Path, help="the PNG to write")
    p.add_argument("--faces", type=Path, required=True, help="folder of one folder per person, or a tar of one")
    p.add_argument("--images", nargs=2, metavar=("A", "B"),
                   help=f"person/file twice (default: of {TRIED} pairs of one person, one that is alike)")  # fmt: skip
    p.add_argument("--checkpoint", type=Path, help="of examples/train_faces.py (default: none, local descriptors)")
    p.add_argument("--eps", type=float, default=0.05, help="entropy of the transport (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the choice of images (default: %(default)s)")
    args = p.parse_args(argv)
    try:
        check_number("--eps", args.eps, EPS)
        check_picture(args.picture)
        tree = open_tree(args.faces)
        pairs = choose(tree, args.images, args.seed)
        transport = solve(*cells_of(tree, pairs, args.checkpoint), pairs, args.eps)
        source = "feature map" if args.checkpoint else "local descriptors"
        # No name: a picture goes where nobody has asked the person.
        draw(transport, f"{source}, eps {args.eps:g}: the largest {SHOWN:.0%} of the mass", args.picture)
    except (FacesError, OSError) as error:
        print(f"show_transport: {error}", file=sys.stderr)
        return 2
    print(f"{args.picture}: {' and '.join(transport.names)}, transport cost {transport.cost:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

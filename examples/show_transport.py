"""What optimal transport compares: two faces, the cells that it matches, and its plan, in one picture.

python examples/show_transport.py --faces lfw112.tar transport.png
python examples/show_transport.py --faces lfw112.tar --checkpoint runs/otface/checkpoint.pt \
    --images Tony_Blair/Tony_Blair_0001.jpg Tony_Blair/Tony_Blair_0002.jpg transport.png

With a checkpoint of examples/train_faces.py the cells are those of the network's feature map; without one they are the
local descriptors of benchmarks/faces.py. The plan is drawn at a small eps: at the loss's eps of 1 it is nearly uniform,
every cell goes everywhere. Needs pillow, tqdm and matplotlib.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from torch import Tensor

import otface_cuda

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import faces as descriptors
from face_training.data import FacesError, Images, Tree, open_tree, to_float
from face_training.report import pyplot
from face_training.training import load_backbone

OTHERS = 200  # images whose mean descriptor is taken off: what all faces share says nothing about whose they are
SHOWN = 0.6  # of the mass, by its largest flows


def choose(tree: Tree, names: list[str] | None, seed: int) -> list[str]:
    """Two images: those named, or two of one person."""
    if names:
        missing = [name for name in names if name not in tree.people.get(name.split("/")[0], [])]
        if missing:
            raise FacesError(f"{tree.path} has no image {missing[0]}; expected person/file, as in {tree.names[0]}")
        return names
    several = [person for person, of in tree.people.items() if len(of) > 1]
    if not several:
        raise FacesError(f"nobody in {tree.path} has two images; name two with --images")
    draw = random.Random(seed)
    return draw.sample(tree.people[draw.choice(several)], 2)


@torch.inference_mode()
def cells_of(tree: Tree, names: list[str], checkpoint: Path | None, seed: int) -> tuple[Tensor, Tensor]:
    """The pictures (2, 3, S, S) as uint8, and the points (2, cells, d) that are compared."""
    if checkpoint is not None:
        model, settings = load_backbone(checkpoint)
        pictures = pictures_of(tree, names, settings.size)
        return pictures, model(to_float(pictures))[1].flatten(2).mT
    others = random.Random(seed).sample(tree.names, min(OTHERS, len(tree.names)))
    pictures = pictures_of(tree, [*names, *(name for name in others if name not in names)], descriptors.SIDE)
    return pictures[:2], descriptors.descriptors(pictures.float() / 255)[:2]


def pictures_of(tree: Tree, names: list[str], size: int) -> Tensor:
    images = Images(tree, names, size, in_memory=True)
    unreadable = [name for name in names[:2] if name in images.bad]
    if unreadable:
        raise FacesError(f"{unreadable[0]} is not an image that pillow can read")
    return images.batch(torch.arange(len(images.names)))[0]


def largest_flows(plan: Tensor, part: float) -> list[tuple[int, int, float]]:
    """(row, column, mass) of the fewest entries that carry this part of the mass, the smallest first."""
    mass, place = plan.flatten().sort(descending=True)
    count = int((mass.cumsum(0) < part * mass.sum()).sum()) + 1
    rows, columns = place[:count] // plan.shape[1], place[:count] % plan.shape[1]
    return list(zip(rows.tolist(), columns.tolist(), mass[:count].tolist(), strict=True))[::-1]


def draw(pictures: Tensor, plan: Tensor, cost: Tensor, title: str, path: Path) -> None:
    """Left both faces with their grids and the flows between, right the plan."""
    plt = pyplot()
    grid = round(plan.shape[0] ** 0.5)
    size = pictures.shape[2]
    cell, gap = size / grid, 0.5 * size
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[2.3, 1], layout="constrained")
    colours = plt.get_cmap("hsv")

    def centre(index: int, shift: float) -> tuple[float, float]:
        return shift + (index % grid + 0.5) * cell, (index // grid + 0.5) * cell

    for picture, shift in zip(pictures, (0.0, size + gap), strict=True):
        left.imshow(picture.permute(1, 2, 0).numpy(), extent=(shift, shift + size, size, 0))
        for line in range(grid + 1):
            left.plot([shift, shift + size], [line * cell] * 2, color="white", linewidth=0.5, alpha=0.6)
            left.plot([shift + line * cell] * 2, [0, size], color="white", linewidth=0.5, alpha=0.6)
    # The colour of a flow is that of the cell it leaves; a flow as thick as can be carries all the mass of a cell.
    for row, column, mass in largest_flows(plan, SHOWN):
        whole = mass * plan.shape[0]
        (x0, y0), (x1, y1) = centre(row, 0), centre(column, size + gap)
        colour = colours(row / plan.shape[0])
        left.plot([x0, x1], [y0, y1], color=colour, linewidth=0.3 + 2.5 * whole, alpha=min(1.0, 0.25 + whole))
        left.plot([x0, x1], [y0, y1], ".", color=colour, markersize=3)
    left.set(xlim=(-1, 2 * size + gap + 1), ylim=(size + 1, -1), aspect="equal", title=title)
    left.axis("off")

    shown = right.imshow(plan.numpy() * plan.shape[0], cmap="magma", vmin=0)
    right.set(title=f"plan; transport cost {(plan * cost).sum():.3f}", xlabel="cell of the right face, row by row")
    right.set_ylabel("cell of the left face")
    right.set_xticks(range(0, plan.shape[1], grid))
    right.set_yticks(range(0, plan.shape[0], grid))
    figure.colorbar(shown, ax=right, label="part of the cell's mass", shrink=0.85)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("picture", type=Path, help="the PNG to write")
    p.add_argument("--faces", type=Path, required=True, help="folder of one folder per person, or a tar of one")
    p.add_argument("--images", nargs=2, metavar=("A", "B"), help="person/file twice (default: two of one person)")
    p.add_argument("--checkpoint", type=Path, help="of examples/train_faces.py")
    p.add_argument("--eps", type=float, default=0.05)
    p.add_argument("--seed", type=int, default=0, help="of the choice of images")
    args = p.parse_args(argv)
    try:
        tree = open_tree(args.faces)
        names = choose(tree, args.images, args.seed)
        pictures, points = cells_of(tree, names, args.checkpoint, args.seed)
    except FacesError as error:
        print(f"show_transport: {error}", file=sys.stderr)
        return 2
    x, y = points[:1].float(), points[1:].float()
    out = otface_cuda.sinkhorn_points(x, y, eps=args.eps, max_iter=1000, tol=1e-4, return_plan=True)
    assert out.plan is not None
    unit_x, unit_y = (torch.nn.functional.normalize(side[0], dim=1) for side in (x, y))
    source = "feature map" if args.checkpoint else "local descriptors"
    people = " and ".join(dict.fromkeys(name.split("/")[0].replace("_", " ") for name in names))
    title = f"{people}: {source}, eps {args.eps:g}, the largest {SHOWN:.0%} of the mass"
    draw(pictures, out.plan[0], 1 - unit_x @ unit_y.T, title, args.picture)
    print(f"{args.picture}: {names[0]} and {names[1]}, transport cost {out.transport_cost.item():.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train a small classifier with a margin, and with plain softmax, on data made on the spot.

    python examples/train_classifier.py                        # ArcFace, seconds on 2 cores
    python examples/train_classifier.py --margin cosface --classes 1000

The data are noisy clusters behind a random nonlinear map. A margin asks of every sample to be nearer to its own class
by some angle than softmax would be content with. Two accuracies are printed on new samples: of the classifier, and of
naming classes that were never trained, each sample by the nearest embedding of another one, which is what face
recognition does and what margins are for. It needs torch and otface_cuda, nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import otface_cuda

MARGINS = {
    "arcface": otface_cuda.ArcFace(0.3),
    "cosface": otface_cuda.CosFace(0.2),
    "sphereface": otface_cuda.SphereFace(1.2),
}
INPUTS, EMBEDDING, SCALE, BATCH = 128, 32, 16.0, 256
NOISE = 0.6  # of a sample, where the centres of two classes differ by about sqrt(2) in each coordinate


class Data:
    """Clusters around random points, seen through a fixed random network."""

    def __init__(self, classes: int, generator: torch.Generator):
        self.generator = generator
        self.centers = torch.randn(classes, 24, generator=generator)
        self.first = torch.randn(24, INPUTS, generator=generator) / 24**0.5
        self.second = torch.randn(INPUTS, INPUTS, generator=generator) / INPUTS**0.5

    def samples(self, labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), 24, generator=self.generator)
        return ((self.centers[labels] + NOISE * noise) @ self.first).sin() @ self.second


class PlainSoftmax(nn.Linear):
    """The usual head: logits are inner products, and no margin."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(super().forward(x), labels)


def train(name: str, head: nn.Module, data: Data, classes: int, steps: int) -> nn.Module:
    """The network that makes embeddings, trained together with its head."""
    network = nn.Sequential(nn.Linear(INPUTS, 256), nn.ReLU(), nn.Linear(256, EMBEDDING))
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # One line that changes, or, into a file or a pipe, a line now and then.
    terminal = sys.stderr.isatty()
    every, before, after = (20, "\r", " ") if terminal else (200, "", "\n")
    for step in range(1, steps + 1):
        labels = torch.randint(classes, (BATCH,), generator=data.generator)
        loss = head(network(data.samples(labels)), labels)  # all there is to it
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            text = f"{name}: step {step}/{steps}, loss {loss.item():.3f}"
            print(before + text, end=after, file=sys.stderr, flush=True)
    if terminal:
        print(file=sys.stderr)
    return network


@torch.no_grad()
def accuracies(network: nn.Module, weight: Tensor, data: Data, trained: int) -> tuple[float, float]:
    """Of the trained classes by the class weights, and of the others by the nearest neighbour; both by angle."""

    def embeddings(labels: Tensor) -> Tensor:
        return nn.functional.normalize(network(data.samples(labels)))

    labels = torch.arange(trained).repeat(5)
    classified = (embeddings(labels) @ nn.functional.normalize(weight).T).argmax(1) == labels
    new = torch.arange(trained, len(data.centers))
    recognised = (embeddings(new.repeat(5)) @ embeddings(new).T).argmax(1) == torch.arange(len(new)).repeat(5)
    return float(classified.float().mean()), float(recognised.float().mean())


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """What makes a number of an option's text."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low:,} to {high:,}, got {text}")
        return value

    return number


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--margin", choices=MARGINS, default="arcface", help="default: arcface")
    parser.add_argument("--classes", type=whole_number(2, 10**7), default=500, help="that are trained; default: 500")
    parser.add_argument(
        "--steps", type=whole_number(1, 10**9), default=1000, help="of training, each of 256 samples; default: 1000"
    )
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0, help="of data and networks; default: 0")
    options = parser.parse_args(argv)
    heads = {
        "plain softmax": PlainSoftmax(EMBEDDING, options.classes, bias=False),
        options.margin: otface_cuda.MarginSoftmaxLoss(
            options.classes, EMBEDDING, margin=MARGINS[options.margin], scale=SCALE
        ),
    }
    for name, head in heads.items():
        torch.manual_seed(options.seed)
        # The same data for both; as many classes again are kept for the end.
        data = Data(2 * options.classes, torch.Generator().manual_seed(options.seed))
        network = train(name, head, data, options.classes, options.steps)
        classified, recognised = accuracies(network, head.weight, data, options.classes)
        print(f"{name:13}  accuracy {classified:.1%}, of classes never trained {recognised:.1%}")


if __name__ == "__main__":
    main()

"""The training loop: one process or several, log, checkpoints, and going on after a kill."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import otface_cuda

from .data import Batches, FacesError, TrainingSet, augment, seeded, to_float
from .model import Mobile

LOSSES = {
    "arcface": (otface_cuda.ArcFace, 0.45, False),
    "cosface": (otface_cuda.CosFace, 0.35, False),
    "otface-arcface": (otface_cuda.ArcFace, 0.45, True),
    "otface-cosface": (otface_cuda.CosFace, 0.35, True),
}
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = ("step", "epoch", "lr", "loss", "margin_loss", "ot_loss", "hard", "active", "images_per_s", "seconds")
COUNTS = COLUMNS[3:8]


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run; kept in its checkpoint, and the same for a run that goes on."""

    loss: str = "otface-arcface"
    size: int = 112
    stride: int = 16
    width: float = 1.0
    embedding_size: int = 256
    margin: float | None = None  # None: that of LOSSES
    scale: float = 32.0
    ot_weight: float = 10.0
    eps: float = 1.0
    n_iter: int = 10
    alpha: float = 0.0
    beta: float = 0.0
    epochs: float = 40.0
    people: int = 32  # in a batch of one process
    images: int = 2  # of each of them
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05  # part of the run in which the learning rate rises
    margin_warmup: float = 0.4  # part of the run in which the margin comes in
    amp: str = "off"
    seed: int = 0


def setting_types() -> dict[str, Callable[[str], Any]]:
    """What makes a setting of the text that a user gives."""
    return {f.name: float if f.default is None else type(f.default) for f in fields(Settings)}


class Model(nn.Module):
    """Network and loss in one module, as DistributedDataParallel needs it."""

    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__()
        margin, default, with_ot = LOSSES[settings.loss]
        self.make_margin: Callable[[float], otface_cuda.Margin] = margin
        self.full_margin = default if settings.margin is None else settings.margin
        self.with_ot, self.settings = with_ot, settings
        self.backbone = backbone_of(settings)
        self.head = otface_cuda.OTFaceLoss(
            classes,
            settings.embedding_size,
            margin=margin(self.full_margin),
            scale=settings.scale,
            ot_weight=settings.ot_weight if with_ot else 0.0,
            eps=settings.eps,
            n_iter=settings.n_iter,
            alpha=settings.alpha,
            beta=settings.beta,
        )

    def forward(self, images: Tensor, labels: Tensor, count: bool) -> otface_cuda.OTFaceOutput:
        embeddings, feature_map = self.backbone(images)
        out: otface_cuda.OTFaceOutput = self.head(embeddings, feature_map, labels)
        if count and not self.with_ot:  # how many there would be, for the log
            s = self.settings
            with torch.no_grad():
                triplets = otface_cuda.mine_hard_triplets(embeddings, labels, s.alpha)
                would = otface_cuda.ot_triplet_loss(feature_map, triplets, eps=s.eps, n_iter=s.n_iter, beta=s.beta)
            out = out._replace(n_hard=would.n_hard, n_active=would.n_active)
        return out

    def scale_margin(self, part: float) -> None:
        self.head.settings["margin"] = self.make_margin(self.full_margin * part)


def backbone_of(settings: Settings) -> Mobile:
    model = Mobile(settings.size, settings.stride, settings.embedding_size, settings.width)
    return model.to(memory_format=torch.channels_last)


def progress(step: int, steps: int, settings: Settings) -> tuple[float, float]:
    """The parts of learning rate and margin at a step: both rise linearly, then the rate falls as a cosine."""
    rising = max(1.0, settings.warmup * steps)
    falling = max(0.0, (step - rising) / max(1.0, steps - rising))
    rate = min(1.0, (step + 1) / rising) * 0.5 * (1 + math.cos(math.pi * falling))
    return rate, min(1.0, (step + 1) / max(1.0, settings.margin_warmup * steps))


# ---- the run's folder ----


def save(path: Path, state: dict[str, Any]) -> None:
    """Either the old file or the whole new one is there, whenever the run is killed."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def load(path: Path, settings: Settings, people: list[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    now = json.loads(json.dumps(asdict(settings)))
    other = [
        f"{name} {old!r}, now {now.get(name)!r}" for name, old in state["settings"].items() if now.get(name) != old
    ]
    if other:
        raise FacesError(
            f"{path.parent} holds a run with other settings ({'; '.join(other)}); give --out another folder"
        )
    if state["people"] != people:
        raise FacesError(f"{path.parent} holds a run on other people; give --out another folder")
    return state


class Log:
    """A CSV file; rows later than the checkpoint that a run goes on from are taken off, they will come again."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if step and path.exists():
            with path.open(newline="") as file:
                # The last line may have been cut off.
                kept = [row for row in csv.DictReader(file) if None not in row.values() and int(row["step"]) <= step]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
        path.write_text(text.getvalue())
        self.seconds = float(kept[-1]["seconds"]) if kept else 0.0
        self.file = path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS)

    def write(self, row: dict[str, Any]) -> None:
        self.writer.writerow(row)
        self.file.flush()


# ---- the loop ----


@dataclass
class Process:
    """One of the processes that torchrun has started, or the only one."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @classmethod
    def start(cls) -> Process:
        cuda = torch.cuda.is_available()
        if "RANK" not in os.environ:
            return cls(torch.device("cuda" if cuda else "cpu"))
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")
        return cls(device, dist.get_rank(), dist.get_world_size())


def train(
    settings: Settings,
    data: TrainingSet,
    run: Path,
    process: Process,
    *,
    log_every: int = 10,
    checkpoint_every: int = 200,
    on_step: Callable[[int], None] = lambda step: None,
) -> Mobile:
    """Train, or go on with what ``run`` holds: the same arguments give the same weights, killed in between or not."""
    torch.manual_seed(settings.seed)
    device = process.device
    model = Model(settings, len(data.people)).to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others}]
    # Not SGD, which is usual on large sets: on 524 people, without margin and with batches of 16 x 4, the loss after
    # three epochs was 6.1 with SGD at a rate of 0.1, hardly below guessing (6.3), and 4.8 with this.
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.0)
    amp = AMP[settings.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    batches = Batches(data.labels, settings.people, settings.images, settings.seed, process.rank, process.world)
    steps = max(1, round(settings.epochs * batches.steps_per_epoch))

    path = run / "checkpoint.pt"
    state = load(path, settings, data.people)
    first = logged = 0
    sums = torch.zeros(len(COUNTS), device=device, dtype=torch.float64)  # since the last line of the log
    if state is not None:
        if state["world"] != process.world:
            raise FacesError(f"{run} holds a run of {state['world']} processes, now {process.world}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        first, logged, sums = state["step"], state["logged"], state["sums"].to(device)
    stepped: nn.Module = model
    if process.world > 1:
        stepped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    main = process.rank == 0
    log = Log(run / "log.csv", first) if main else None
    before = log.seconds if log else 0.0
    model.train()
    started = since = time.perf_counter()
    seen = 0
    bar = tqdm(total=steps, initial=first, desc=settings.loss, unit="step", disable=not main)
    for step in range(first, steps):
        rate, part = progress(step, steps, settings)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate
        model.scale_margin(part)
        logs = (step + 1) % log_every == 0 or step + 1 == steps

        pixels, indices = data.images.batch(batches.indices(step))
        labels = data.labels[indices].to(device, non_blocking=True)
        images = augment(to_float(pixels.to(device)), seeded(settings.seed, step, 1 + process.rank))
        with torch.autocast(device.type, amp) if amp else nullcontext():
            out = stepped(images, labels, logs)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(out.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        sums += torch.stack([value.detach().double() for value in out])
        seen += len(images)

        if main and logs and log is not None:
            now = time.perf_counter()
            mean = dict(zip(COUNTS, (sums / (step + 1 - logged)).tolist(), strict=True))
            if not model.with_ot:
                mean |= {"hard": out.n_hard.item(), "active": out.n_active.item()}
            if not math.isfinite(mean["loss"]):
                raise FacesError(f"the loss is {mean['loss']} at step {step + 1}: a lower --lr may help")
            speed = process.world * seen / (now - since)
            row = {name: f"{value:.6g}" for name, value in mean.items()}
            row |= {"lr": f"{settings.lr * rate:.6g}", "images_per_s": f"{speed:.0f}"}
            row["seconds"] = f"{before + now - started:.1f}"
            log.write({"step": step + 1, "epoch": f"{(step + 1) / batches.steps_per_epoch:.2f}", **row})
            shown = {name: f"{mean[name]:.3g}" for name in ("loss", "hard", "active")}
            bar.set_postfix({**shown, "images/s": f"{speed:.0f}"}, refresh=False)
            sums.zero_()
            since, seen, logged = now, 0, step + 1
        bar.update()
        if main and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
            save(
                path,
                {
                    "settings": asdict(settings),
                    "people": data.people,
                    "world": process.world,
                    "step": step + 1,
                    "logged": logged,
                    "sums": sums,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                },
            )
        on_step(step + 1)
    bar.close()
    return model.backbone


def load_backbone(path: Path) -> tuple[Mobile, Settings]:
    """The network of a checkpoint, ready to embed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        settings = Settings(**state["settings"])
        model = backbone_of(settings)
        model.load_state_dict(
            {name[9:]: value for name, value in state["model"].items() if name.startswith("backbone.")}
        )
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise FacesError(f"{path} is no checkpoint of examples/train_faces.py: {error}") from error
    return model.eval(), settings

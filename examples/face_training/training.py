"""The training loop: one process or several, and going on after a kill."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import otface_cuda

from .data import Batches, FacesError, Images, TrainingSet, augment, seeded, some_of, to_float, training_batch
from .model import Mobile
from .run_folder import COLUMNS, Log, changed, load, no_checkpoint, read_checkpoint, save
from .settings import AMP, LOSSES, Settings, flag

COUNTS = COLUMNS[3:8]


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
        self.head.margin = self.make_margin(self.full_margin * part)


def backbone_of(settings: Settings) -> Mobile:
    model = Mobile(settings.size, settings.stride, settings.embedding_size, settings.width)
    return model.to(memory_format=torch.channels_last)


def progress(step: int, steps: int, settings: Settings) -> tuple[float, float]:
    """The parts of learning rate and margin at a step: both rise linearly, then the rate falls as a cosine."""
    rising = max(1.0, settings.warmup * steps)
    falling = max(0.0, (step - rising) / max(1.0, steps - rising))
    rate = min(1.0, (step + 1) / rising) * 0.5 * (1 + math.cos(math.pi * falling))
    return rate, min(1.0, (step + 1) / max(1.0, settings.margin_warmup * steps))


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


class Trainer:
    """Everything that changes in a run, and one step of it."""

    def __init__(self, settings: Settings, data: TrainingSet, process: Process) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.data, self.process = settings, data, process
        self.device = process.device
        self.model = Model(settings, len(data.people)).to(self.device)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others}]
        # Not SGD, which is usual on large sets: on 524 people, without margin and with batches of 16 x 4, the loss
        # after three epochs was 6.1 with SGD at a rate of 0.1, hardly below guessing (6.3), and 4.8 with this.
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.0)
        self.amp = AMP[settings.amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        self.batches = Batches(
            data.labels, settings.people, settings.images, settings.seed, process.rank, process.world
        )
        self.images = data.digest()
        self.steps = max(1, round(settings.epochs * self.batches.steps_per_epoch))
        self.logged = 0  # the step of the last line of the log
        self.sums = torch.zeros(len(COUNTS), device=self.device, dtype=torch.float64)  # since that line
        self.stepped: nn.Module = self.model

    def restore(self, path: Path) -> int:
        """The step to go on from: that of the checkpoint, or 0 where there is none."""
        state, step = load(path, self.settings), 0
        if state is not None:
            self._check_same(path.parent, state)
            try:
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.scaler.load_state_dict(state["scaler"])
                self.sums.copy_(state["sums"])
                self.logged, step = int(state["logged"]), int(state["step"])
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise no_checkpoint("--out", path, "its parts are not those of this run") from error
            self._check_changes(path.parent, changed(state["settings"], self.settings), step)
        if self.process.world > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.stepped = DistributedDataParallel(self.model, device_ids=ids)
        return step

    def _check_same(self, run: Path, state: dict[str, Any]) -> None:
        if state["people"] != self.data.people:
            raise FacesError(f"{run} holds a run on other people; give --out another folder")
        if state["images"] != self.images:
            raise FacesError(
                f"{run} holds a run on other images of the same people; give --out another folder, or, where some "
                "cannot be read, --in-memory as it was"
            )
        if state["world"] != self.process.world:
            raise FacesError(f"{run} holds a run of {state['world']} processes, now {self.process.world}")

    def _check_changes(self, run: Path, changes: list[tuple[str, Any, Any]], step: int) -> None:
        for name, old, new in changes:
            if step >= self.steps and name != "epochs":
                raise FacesError(
                    f"{run} holds a finished run with other settings ({name} {old}, now {new}); give --out another "
                    f"folder, or more {flag('epochs')}"
                )
            if self.process.rank == 0:
                print(f"{run}: goes on with {flag(name)} {new}, so far it was {old}")

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "settings": asdict(self.settings),
            "people": self.data.people,
            "images": self.images,
            "world": self.process.world,
            "step": step,
            "logged": self.logged,
            "sums": self.sums,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def step(self, step: int, count: bool) -> tuple[otface_cuda.OTFaceOutput, float, int]:
        """What the loss was, the learning rate, and how many images there were."""
        rate, part = progress(step, self.steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * rate
        self.model.scale_margin(part)
        pixels, indices = training_batch(self.data.images, self.batches, step)
        labels = self.data.labels[indices].to(self.device, non_blocking=True)
        random = seeded(self.settings.seed, step, 1 + self.process.rank)
        images = augment(to_float(pixels.to(self.device)), random)
        with torch.autocast(self.device.type, self.amp) if self.amp else nullcontext():
            out: otface_cuda.OTFaceOutput = self.stepped(images, labels, count)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(out.loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.sums += torch.stack([value.detach().double() for value in out])
        return out, self.settings.lr * rate, len(images)

    def means(self, step: int, out: otface_cuda.OTFaceOutput) -> dict[str, float]:
        """Over the steps since the last line of the log, which begins anew."""
        mean = dict(zip(COUNTS, (self.sums / (step - self.logged)).tolist(), strict=True))
        if not self.model.with_ot:
            mean |= {"hard": out.n_hard.item(), "active": out.n_active.item()}
        self.sums.zero_()
        self.logged = step
        return mean

    def check_finite(self, step: int, weights: bool) -> None:
        """A run that has gone out of bounds ends here, and never in a checkpoint."""
        loss = self.sums[0].item()
        values = self.model.state_dict().values() if weights else []
        if not math.isfinite(loss) or not all(bool(value.isfinite().all()) for value in values):
            what = "the weights are not finite" if math.isfinite(loss) else f"the loss is {loss}"
            raise FacesError(
                f"{what} at step {step}: a lower {flag('lr')} may help, with which the run goes on from its last "
                "checkpoint, or begins again where there is none"
            )


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
    """Train, or go on with what ``run`` holds: the same arguments give the same weights, killed in between or not.

    With more epochs than the checkpoint was made with, learning rate and margin are from there on those of a run of
    that length; of a finished run, the rate rises again.
    """
    trainer = Trainer(settings, data, process)
    path, steps = run / "checkpoint.pt", trainer.steps
    first = trainer.restore(path)
    main = process.rank == 0
    log = Log(run / "log.csv", first) if main else None
    if main and first < steps:
        print(f"steps {first + 1} to {steps}, log in {run / 'log.csv'}", flush=True)
    before = log.seconds if log else 0.0
    reported = len(data.images.bad)
    trainer.model.train()
    started = since = time.perf_counter()
    seen = 0
    bar = tqdm(total=steps, initial=first, desc=settings.loss, unit="step", disable=None if main else True)
    for step in range(first + 1, steps + 1):
        logs = step % log_every == 0 or step == steps
        saves = main and (step % checkpoint_every == 0 or step == steps)
        out, rate, count = trainer.step(step - 1, logs)
        seen += count
        if main and (logs or saves):
            trainer.check_finite(step, saves)
        if log is not None and logs:
            now = time.perf_counter()
            mean = trainer.means(step, out)
            speed = process.world * seen / (now - since)
            row = {name: f"{value:.6g}" for name, value in mean.items()}
            row |= {"lr": f"{rate:.6g}", "images_per_s": f"{speed:.0f}"}
            row["seconds"] = f"{before + now - started:.1f}"
            log.write({"step": step, "epoch": f"{step / trainer.batches.steps_per_epoch:.2f}", **row})
            shown = {name: f"{mean[name]:.3g}" for name in ("loss", "hard", "active")}
            bar.set_postfix({**shown, "images/s": f"{speed:.0f}"}, refresh=False)
            since, seen = now, 0
        if logs and not reported:
            reported = report_bad(data.images, reported)
        bar.update()
        if saves:
            save(path, trainer.state(step))
        on_step(step)
    bar.close()
    report_bad(data.images, reported)
    return trainer.model.backbone


def report_bad(images: Images, reported: int) -> int:
    """Say how many images could not be decoded so far, unless so many have been reported; their number."""
    bad = images.bad
    if len(bad) > reported:
        tqdm.write(f"left out: {len(bad)} unreadable images so far ({some_of(bad)})", file=sys.stderr)
    return len(bad)


def load_backbone(path: Path) -> tuple[Mobile, Settings]:
    """The network of a checkpoint, ready to embed."""
    state = read_checkpoint("--checkpoint", path)
    try:
        settings = Settings(**state["settings"])
        model = backbone_of(settings)
        model.load_state_dict(
            {name[9:]: value for name, value in state["model"].items() if name.startswith("backbone.")}
        )
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise no_checkpoint("--checkpoint", path, "its network is of another kind") from error
    return model.eval(), settings

"""The folder of a run: its checkpoint and its log, whole whenever the run is killed."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .data import FacesError
from .settings import Settings, flag

COLUMNS = ("step", "epoch", "lr", "loss", "margin_loss", "ot_loss", "hard", "active", "images_per_s", "seconds")
STATE = {"settings", "people", "images", "world", "step", "logged", "sums", "model", "optimizer", "scaler"}


def make_folder(option: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        usable = os.access(path, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if not usable:
        raise FacesError(f"{option} must be a folder, or the place for one, that can be written to, got {path}")


# ---- files ----


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Either the old file or the whole new one is there, whenever the run is killed."""
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def write_text(path: Path, text: str) -> None:
    write(path, lambda file: file.write(text.encode()))


def save(path: Path, state: dict[str, Any]) -> None:
    write(path, lambda file: torch.save(state, file))


# ---- the checkpoint ----


def no_checkpoint(option: str, path: Path, why: str) -> FacesError:
    return FacesError(f"{option}: {path} is no checkpoint of examples/train_faces.py: {why}")


def read_checkpoint(option: str, path: Path) -> dict[str, Any]:
    """Whatever a file holds that is not one, the error says so."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise no_checkpoint(option, path, error.strerror or "it cannot be read") from error
    except Exception as error:  # on a file that it has not written, torch.load raises errors of every kind
        why = "it holds something else" if path.stat().st_size else "it is empty"
        raise no_checkpoint(option, path, why) from error
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict) or "model" not in state:
        raise no_checkpoint(option, path, "it holds something else")
    return state


def load(path: Path, settings: Settings) -> dict[str, Any] | None:
    """The checkpoint of a run with these settings, or with such as it may go on from; None where there is none."""
    if not path.exists():
        return None
    state = read_checkpoint("--out", path)
    if missing := STATE - state.keys():
        raise no_checkpoint("--out", path, f"it has no {', '.join(sorted(missing))}")
    other = [
        f"{name} {old!r}, now {new!r}"
        for name, old, new in changed(state["settings"], settings)
        if not may_change(name, old, new)
    ]
    if other:
        raise FacesError(
            f"{path.parent} holds a run with other settings ({'; '.join(other)}), and a run goes on with more "
            f"{flag('epochs')} or a lower {flag('lr')} only; give --out another folder"
        )
    return state


def changed(before: dict[str, Any], settings: Settings) -> list[tuple[str, Any, Any]]:
    """Name, old and new value of the settings that differ."""
    now = json.loads(json.dumps(asdict(settings)))
    return [(name, before.get(name), now.get(name)) for name in {**now, **before} if before.get(name) != now.get(name)]


def may_change(name: str, old: Any, new: Any) -> bool:
    """More epochs, where there have been too few; a lower learning rate, where the loss went out of bounds."""
    numbers = all(isinstance(value, (int, float)) for value in (old, new))
    return numbers and ((name == "epochs" and new > old) or (name == "lr" and new < old))


# ---- the log ----


class Log:
    """A CSV file; rows later than the checkpoint that a run goes on from are taken off, they will come again."""

    def __init__(self, path: Path, step: int) -> None:
        kept, self.seconds = _rows_until(path, step) if step and path.exists() else ([], 0.0)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
        write_text(path, text.getvalue())
        self.file = path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS)

    def write(self, row: dict[str, Any]) -> None:
        self.writer.writerow(row)
        self.file.flush()


def _rows_until(path: Path, step: int) -> tuple[list[dict[str, str]], float]:
    """The rows up to a step, and the seconds of the last of them."""
    try:
        with path.open(newline="") as file:
            # The last line may have been cut off.
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
        kept = [row for row in rows if int(row["step"]) <= step]
        if any(set(row) != set(COLUMNS) for row in kept):
            raise ValueError
        return kept, float(kept[-1]["seconds"]) if kept else 0.0
    except (ValueError, KeyError, csv.Error) as error:
        raise FacesError(f"{path} is no log of examples/train_faces.py; give --out another folder") from error

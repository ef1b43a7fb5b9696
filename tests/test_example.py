"""The example runs, prints one line for each head, and its progress suits a terminal and a file."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_classifier

EXAMPLE = Path(train_classifier.__file__)


@pytest.mark.parametrize("margin", ["arcface", "cosface", "sphereface"])
def test_a_few_steps(margin):
    arguments = ["--margin", margin, "--steps", "40", "--classes", "8"]
    done = subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, check=True)
    line = r"{} +accuracy ([\d.]+)%, of classes never trained ([\d.]+)%\n"
    found = re.fullmatch(line.format("plain softmax") + line.format(margin), done.stdout)
    assert found, done.stdout
    assert float(found[3]) > 50  # of 8 classes; chance is 12.5 %
    assert "step 40/40" in done.stderr
    assert "\r" not in done.stderr


def test_progress_on_a_terminal_is_one_line():
    ours, theirs = pty.openpty()
    arguments = ["--steps", "40", "--classes", "8"]
    subprocess.run([sys.executable, EXAMPLE, *arguments], stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    first = shown.split("\n")[0]
    assert "\rplain softmax: step 20/40" in first
    assert "\rplain softmax: step 40/40" in first
    assert shown.count("\n") == 2  # one for each head


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ("--classes", "1"),
        ("--classes", "2.5"),
        ("--steps", "0"),
        ("--steps", "-1"),
        ("--seed", "-1"),
        ("--seed", 30 * "9"),
    ],
)
def test_wrong_options_are_named(capsys, option, word):
    with pytest.raises(SystemExit, match="2"):
        train_classifier.main([f"{option}={word}"])
    error = capsys.readouterr().err
    assert f"argument {option}: must be a whole number from " in error
    assert f", got {word}" in error

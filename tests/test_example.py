"""The example runs, and prints one line for each head."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_classifier.py"


@pytest.mark.parametrize("margin", ["arcface", "cosface", "sphereface"])
def test_a_few_steps(margin):
    arguments = ["--margin", margin, "--steps", "40", "--classes", "8"]
    done = subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, check=True)
    line = r"{} +accuracy ([\d.]+)%, of classes never trained ([\d.]+)%\n"
    found = re.fullmatch(line.format("plain softmax") + line.format(margin), done.stdout)
    assert found, done.stdout
    assert float(found[3]) > 50  # of 8 classes; chance is 12.5 %
    assert "step 40/40" in done.stderr

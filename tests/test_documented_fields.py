"""`help` on a field of what the functions return shows the text that stands below it in the source."""

from __future__ import annotations

import ast
import importlib
import inspect
import pydoc
from typing import NamedTuple

import pytest

import otface_cuda
from otface_cuda import _documented
from otface_cuda.compat import pot
from otface_cuda.reference import ReferenceOutput

OUTPUTS = [
    otface_cuda.SinkhornOutput,
    otface_cuda.OTTripletLossOutput,
    otface_cuda.OTFaceOutput,
    pot.OTResult,
    ReferenceOutput,
]


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda x: x.__name__)
def test_every_field_has_its_text(output: type) -> None:
    source = inspect.getsource(importlib.import_module(output.__module__))
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    for field in output._fields:
        text = getattr(output, field).__doc__
        assert "Alias" not in text
        assert text in texts
        assert pydoc.render_doc(getattr(output, field), renderer=pydoc.plaintext).count(text.splitlines()[0]) == 1
    assert len({getattr(output, field).__doc__ for field in output._fields}) == len(output._fields)


def test_every_public_output_is_among_these() -> None:
    public = [getattr(otface_cuda, name) for name in otface_cuda.__all__]
    assert {x for x in public if isinstance(x, type) and issubclass(x, tuple)} <= set(OUTPUTS)


def test_without_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_source(module: object) -> str:
        raise OSError("could not get source code")

    class Output(NamedTuple):
        x: int
        """Not to be found."""

    monkeypatch.setattr(_documented.inspect, "getsource", no_source)
    assert _documented.documented_fields(Output) is Output
    assert Output(1).x == 1

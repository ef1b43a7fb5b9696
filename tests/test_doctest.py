"""The examples in the docstrings of the package are true, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import otface_cuda

# __main__ prints when it is imported; _C is compiled and has no Python in it.
MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(otface_cuda.__path__, "otface_cuda.")
    if info.name.rpartition(".")[2] not in ("__main__", "_C")
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples(module: object) -> None:
    """`torch` is known to an example, as it is to its reader; what it calls, it finds in its module."""
    random_state = torch.get_rng_state()
    results = doctest.testmod(module, extraglobs={"torch": torch}, verbose=False)
    torch.set_rng_state(random_state)
    assert results.failed == 0
    assert results.attempted == sum(len(test.examples) for test in doctest.DocTestFinder().find(module))


def test_all_modules_are_found() -> None:
    names = {module.__name__ for module in MODULES}
    assert {"otface_cuda.functional", "otface_cuda.pairs", "otface_cuda.modules", "otface_cuda.reference"} <= names


@pytest.mark.parametrize("name", [name for name in otface_cuda.__all__ if not name.endswith("Output")])
def test_every_public_name_has_an_example(name: str) -> None:
    assert ">>> " in inspect.getdoc(getattr(otface_cuda, name))


def test_a_wrong_example_is_noticed() -> None:
    class Module:
        __doc__ = ">>> 1 + 1\n3\n"

    (test,) = doctest.DocTestFinder().find(Module, "Module")
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None).failed == 1

"""The `nn.Module` twins are the functions with fixed settings, and nothing else."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import otface_cuda
from otface_cuda import Sinkhorn, SinkhornOutput, SinkhornPairs, SinkhornPoints, modules


class Twin(NamedTuple):
    module: type[nn.Module]
    function: Callable[..., SinkhornOutput]
    settings: dict[str, Any]  # each other than its default
    data: Callable[[str], dict[str, Any]]


def rand(*shape: int, device: str) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))).to(device)


def uneven(*shape: int, device: str) -> Tensor:
    return (1 + rand(*shape, device=device)).softmax(-1)


def data_of_single(device: str, **data: Any) -> dict[str, Any]:
    return data | {
        "a": uneven(3, 4, device=device),
        "b": uneven(3, 5, device=device),
        "init": (None, rand(3, 5, device=device)),
    }


SETTINGS = {"eps": 0.7, "max_iter": 40, "tol": 1e-4, "check_every": 4, "grad": "unrolled"}
TWINS = [
    Twin(
        Sinkhorn,
        otface_cuda.sinkhorn,
        SETTINGS | {"return_plan": True},
        lambda device: data_of_single(device, cost=rand(3, 4, 5, device=device)),
    ),
    Twin(
        SinkhornPoints,
        otface_cuda.sinkhorn_points,
        SETTINGS | {"return_plan": True, "metric": "sqeuclidean"},
        lambda device: data_of_single(device, x=rand(3, 4, 2, device=device), y=1 - rand(3, 5, 2, device=device)),
    ),
    Twin(
        SinkhornPairs,
        otface_cuda.sinkhorn_pairs,
        SETTINGS | {"metric": "euclidean", "chunk_bytes": 4096},
        lambda device: {
            "features": rand(6, 4, 3, device=device),
            "pairs": torch.tensor([[0, 1], [4, 2], [0, 1], [5, 3]], device=device),
            "a": uneven(4, 4, device=device),
            "b": uneven(4, device=device),
        },
    ),
]
SETTING_NAMES = ["eps", "max_iter", "tol", "check_every", "grad", "metric", "return_plan", "chunk_bytes"]
every_twin = pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.module.__name__)


def assert_equal_outputs(out: SinkhornOutput, expected: SinkhornOutput) -> None:
    assert isinstance(out, SinkhornOutput)
    for x, y in zip(out, expected, strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}


@every_twin
def test_signatures(twin: Twin) -> None:
    """The function's arguments are those of the constructor and of `forward`, with the same defaults and kinds."""
    function = parameters(twin.function)
    of_settings, of_data = parameters(twin.module.__init__), parameters(twin.module.forward)
    assert not of_settings.keys() & of_data.keys()
    assert of_settings.keys() | of_data.keys() == function.keys()
    for name, parameter in (of_settings | of_data).items():
        assert parameter.default == function[name].default, name
        assert parameter.kind == function[name].kind, name
        assert parameter.annotation == function[name].annotation, name
    assert of_settings.keys() == twin.settings.keys()


@every_twin
def test_settings_of_these_tests_are_not_the_defaults(twin: Twin) -> None:
    """So that a setting which a module forgets to pass on changes a result below."""
    of_settings = parameters(twin.module.__init__)
    assert all(value != of_settings[name].default for name, value in twin.settings.items())


@every_twin
@pytest.mark.parametrize("defaults", [False, True])
def test_same_results(twin: Twin, defaults: bool, device: str) -> None:
    data = twin.data(device)
    settings = {"eps": 0.7} if defaults else twin.settings
    module = twin.module(**settings)
    assert_equal_outputs(module(**data), twin.function(**data, **settings))
    # Nothing is kept from one call to the next.
    assert_equal_outputs(module(**data), twin.function(**data, **settings))


@every_twin
@pytest.mark.parametrize("name", SETTING_NAMES)
def test_every_setting_is_passed_on(twin: Twin, name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given to the constructor, and what is assigned later."""
    if name not in twin.settings:
        pytest.skip(f"{twin.module.__name__} has no {name}")
    passed_on: dict[str, Any] = {}
    monkeypatch.setattr(modules, twin.function.__name__, lambda *args, **given: passed_on.update(given))
    value = twin.settings[name]
    twin.module(**{"eps": 0.1, name: value})(**twin.data(device))
    assert passed_on[name] == value
    module = twin.module(0.1)
    module(**twin.data(device))
    assert passed_on[name] != value
    setattr(module, name, value)
    assert getattr(module, name) == value
    module(**twin.data(device))
    assert passed_on[name] == value
    assert f"{name}={value!r}" in repr(module)


WRONG = [
    ("eps", -1, ValueError, "must be positive and finite, got -1"),
    ("eps", "0.1", TypeError, "must be a float, or a tensor with one for each problem, got '0.1'"),
    ("eps", torch.tensor([0.1, 0.0]), ValueError, "must be positive and finite, got 0.0 for problem 1"),
    ("eps", torch.ones(2, 1), ValueError, "a tensor of shape (2,), got a float32 tensor of shape (2, 1)"),
    ("eps", torch.ones(2, requires_grad=True), ValueError, "must not require grad"),
    ("eps", nn.Parameter(torch.ones(2)), ValueError, "must not require grad"),
    ("tol", -1, ValueError, "must be at least 0 and finite, got -1"),
    ("tol", torch.tensor(-0.5), ValueError, "must be at least 0 and finite, got -0.5 for problem 0"),
    ("tol", torch.tensor([True]), TypeError, "a tensor of shape (1,), got a bool tensor of shape (1,)"),
    ("max_iter", 0, ValueError, "must be at least 1, got 0"),
    ("max_iter", 10.0, TypeError, "must be an int, got 10.0"),
    ("check_every", 0, ValueError, "must be at least 1, got 0"),
    ("grad", "foo", ValueError, "must be 'envelope', 'unrolled' or 'implicit', got 'foo'"),
    ("metric", "manhattan", ValueError, "must be 'cosine', 'sqeuclidean' or 'euclidean', got 'manhattan'"),
    ("return_plan", 1, TypeError, "must be True or False, got 1"),
    ("chunk_bytes", 0, ValueError, "must be at least 1, got 0"),
]


@every_twin
@pytest.mark.parametrize(
    ("name", "value", "error", "message"), WRONG, ids=[f"{name}-{type(value).__name__}" for name, value, _, _ in WRONG]
)
def test_wrong_settings(twin: Twin, name: str, value: Any, error: type[Exception], message: str) -> None:
    """Refused where they are set, in the name of the module; an assignment that is refused changes nothing."""
    if name not in twin.settings:
        pytest.skip(f"{twin.module.__name__} has no {name}")
    message = "^" + re.escape(f"{twin.module.__name__}: `{name}` ") + ".*" + re.escape(message)
    with pytest.raises(error, match=message):
        twin.module(**{"eps": 0.1, name: value})
    module = twin.module(**twin.settings)
    with pytest.raises(error, match=message):
        setattr(module, name, value)
    assert repr(module) == repr(twin.module(**twin.settings))


@every_twin
def test_no_setting_without_a_wrong_value(twin: Twin) -> None:
    assert twin.settings.keys() <= {name for name, _, _, _ in WRONG}


@pytest.mark.parametrize("twin", TWINS[:2], ids=lambda twin: twin.module.__name__)
def test_lengths_are_passed_on(twin: Twin, device: str) -> None:
    data = {name: x for name, x in twin.data(device).items() if name not in "ab"}
    lengths = {
        "row_lengths": torch.tensor([4, 2, 1], device=device),
        "col_lengths": torch.tensor([3, 5, 4], device=device),
    }
    out = twin.module(**twin.settings)(**data, **lengths)
    assert_equal_outputs(out, twin.function(**data, **lengths, **twin.settings))
    assert (out.f[1, 2:] == 0).all()
    assert (out.g[0, 3:] == 0).all()


@every_twin
def test_gradients(twin: Twin, device: str) -> None:
    def gradients(solve: Callable[..., SinkhornOutput]) -> list[Tensor]:
        data = twin.data(device)
        leaves = [x.requires_grad_() for x in data.values() if isinstance(x, Tensor) and x.is_floating_point()]
        return list(torch.autograd.grad(solve(**data).f.square().sum(), leaves))

    module = twin.module(**twin.settings)
    expected = gradients(lambda **data: twin.function(**data, **twin.settings))
    for x, y in zip(gradients(module), expected, strict=True):
        assert torch.equal(x, y)
        assert (x != 0).any()


@every_twin
def test_settings_per_problem(twin: Twin, device: str) -> None:
    data = twin.data(device)
    count = 4 if twin.module is SinkhornPairs else 3
    eps, tol = torch.linspace(0.2, 0.9, count, device=device), torch.linspace(0, 1e-2, count, device=device)
    module = twin.module(eps, tol=tol, max_iter=60)
    assert_equal_outputs(module(**data), twin.function(**data, eps=eps, tol=tol, max_iter=60))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (
            Sinkhorn(0.1),
            "Sinkhorn(eps=0.1, max_iter=100, tol=0.0, check_every=10, grad='envelope', return_plan=False)",
        ),
        (
            SinkhornPoints(0.5, metric="euclidean", return_plan=True),
            "SinkhornPoints(eps=0.5, metric='euclidean', max_iter=100, tol=0.0, check_every=10, grad='envelope', "
            "return_plan=True)",
        ),
        (
            SinkhornPairs(1.0, grad="implicit", chunk_bytes=1000),
            "SinkhornPairs(eps=1.0, metric='cosine', max_iter=100, tol=0.0, check_every=10, grad='implicit', "
            "chunk_bytes=1000)",
        ),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_repr(module: nn.Module, expected: str) -> None:
    assert repr(module) == expected
    # It is also the call that makes such a module.
    assert repr(eval(expected, vars(otface_cuda))) == expected


@every_twin
def test_no_state(twin: Twin) -> None:
    module = twin.module(**twin.settings)
    assert module.state_dict() == {}
    assert module.load_state_dict({}, strict=True).missing_keys == []
    assert list(module.parameters()) == []
    assert list(module.buffers()) == []
    # Inside a network it leaves the keys of the checkpoints alone, unless a setting is a tensor.
    network = nn.Sequential(nn.Linear(2, 2), module)
    assert list(network.state_dict()) == ["0.weight", "0.bias"]


@every_twin
@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.half(),
        lambda module: module.double(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu"),
        lambda module: module.to("meta"),
        lambda module: module.eval(),
        lambda module: module.train(),
        lambda module: module.requires_grad_(False),
        lambda module: copy.copy(module),
        lambda module: copy.deepcopy(module),
        lambda module: pickle.loads(pickle.dumps(module)),
    ],
    ids=["half", "double", "bfloat16", "cpu", "meta", "eval", "train", "requires_grad", "copy", "deepcopy", "pickle"],
)
def test_harmless(twin: Twin, change: Callable[[nn.Module], nn.Module], device: str) -> None:
    data = twin.data(device)
    module = twin.module(**twin.settings)
    changed = change(module)
    assert type(changed) is twin.module
    assert repr(changed) == repr(module)
    assert_equal_outputs(changed(**data), twin.function(**data, **twin.settings))


@every_twin
def test_copies_are_independent(twin: Twin, device: str) -> None:
    module = twin.module(torch.tensor(0.7), tol=torch.tensor(0.0))
    duplicate = copy.deepcopy(module)
    module.eps.fill_(0.1)
    module.max_iter = 1
    data = twin.data(device)
    assert_equal_outputs(duplicate(**data), twin.function(**data, eps=torch.tensor(0.7)))


EPS_AND_TOL = {"eps": torch.linspace(0.2, 0.9, 4), "tol": torch.linspace(0.0, 1e-2, 4, dtype=torch.float64)}


def of_four_problems(twin: Twin, device: str) -> dict[str, Any]:
    data = twin.data(device)
    if twin.module is SinkhornPairs:
        return data
    return {name: torch.cat([x, x[:1]]) for name, x in data.items() if name != "init"}


def with_tensors(twin: Twin) -> nn.Module:
    return twin.module(**{name: x.clone() for name, x in EPS_AND_TOL.items()}, max_iter=60)


@every_twin
class TestTensorSettings:
    """They are buffers."""

    def test_state_dict(self, twin: Twin, device: str) -> None:
        network = nn.Sequential(nn.Linear(2, 2), with_tensors(twin)).to(device)
        state = network.state_dict()
        assert list(state) == ["0.weight", "0.bias", "1.eps", "1.tol"]
        other = nn.Sequential(nn.Linear(2, 2), twin.module(torch.ones(4), tol=torch.ones(4, dtype=torch.float64)))
        other.to(device).load_state_dict(state)
        for name, x in EPS_AND_TOL.items():
            assert torch.equal(getattr(other[1], name).cpu(), x)
        assert list(network[1].parameters()) == []

    @pytest.mark.parametrize("assign", [False, True])
    def test_older_state_dict(self, twin: Twin, assign: bool) -> None:
        """From before settings were buffers, or of plain tensors: the settings stay as they are."""
        before = nn.Sequential(nn.Linear(2, 2), nn.Identity()).state_dict()
        before._metadata["1"] = {"version": 1}
        for state in (before, dict(before)):
            network = nn.Sequential(nn.Linear(2, 2), with_tensors(twin))
            network.load_state_dict(state, assign=assign)
            assert torch.equal(network[1].eps, EPS_AND_TOL["eps"])

    def test_state_dict_of_another_kind_of_setting(self, twin: Twin) -> None:
        """A float is not loaded into a tensor, nor a tensor into a float: torch says which key it is."""
        with pytest.raises(RuntimeError, match=r'Missing key.*"eps"'):
            with_tensors(twin).load_state_dict(twin.module(0.1).state_dict())
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"eps"'):
            twin.module(0.1).load_state_dict(with_tensors(twin).state_dict())

    @pytest.mark.parametrize(
        "change",
        [
            lambda module: module.half(),
            lambda module: module.double(),
            lambda module: module.to("cpu", torch.bfloat16),
            lambda module: copy.copy(module),
            lambda module: copy.deepcopy(module),
            lambda module: pickle.loads(pickle.dumps(module)),
            lambda module: nn.Sequential(module).half()[0],
        ],
        ids=["half", "double", "to", "copy", "deepcopy", "pickle", "half of a network"],
    )
    def test_value_and_dtype_stay(self, twin: Twin, change: Callable[[nn.Module], nn.Module], device: str) -> None:
        changed = change(with_tensors(twin)).to(device)
        data = of_four_problems(twin, device)
        on_device = {name: x.to(device) for name, x in EPS_AND_TOL.items()}
        for name, x in on_device.items():
            assert getattr(changed, name).dtype == x.dtype
            assert torch.equal(getattr(changed, name), x)
        assert_equal_outputs(changed(**data), twin.function(**data, **on_device, max_iter=60))

    def test_moves(self, twin: Twin) -> None:
        moved = with_tensors(twin).to("meta", torch.float16)
        assert moved.eps.is_meta
        assert moved.eps.dtype == torch.float32
        assert moved.to_empty(device="cpu").eps.device.type == "cpu"

    def test_from_number_to_tensor_and_back(self, twin: Twin, device: str) -> None:
        data = of_four_problems(twin, device)
        module, eps = twin.module(0.7), EPS_AND_TOL["eps"].to(device)
        module.eps = eps
        assert list(module.state_dict()) == ["eps"]
        assert_equal_outputs(module(**data), twin.function(**data, eps=eps))
        module.eps.fill_(0.25)
        assert_equal_outputs(module(**data), twin.function(**data, eps=0.25))
        module.eps = 0.5
        assert module.state_dict() == {}
        assert_equal_outputs(module(**data), twin.function(**data, eps=0.5))

    def test_functional_call(self, twin: Twin, device: str) -> None:
        data = of_four_problems(twin, device)
        module, eps = with_tensors(twin).to(device), torch.full((4,), 0.4, device=device)
        out = torch.func.functional_call(module, {"eps": eps}, kwargs=data)
        assert_equal_outputs(out, twin.function(**data, eps=eps, tol=EPS_AND_TOL["tol"].to(device), max_iter=60))


@every_twin
def test_hooks_run(twin: Twin, device: str) -> None:
    """`forward` is reached through nn.Module's call, as for any module."""
    seen: list[Any] = []
    module = twin.module(0.7)
    module.register_forward_hook(lambda module, args, out: seen.append(out))
    out = module(*(x for name, x in twin.data(device).items() if name not in ("a", "b", "init")))
    assert seen == [out]


@every_twin
def test_compiles(twin: Twin, device: str) -> None:
    torch._dynamo.reset()
    module = twin.module(**twin.settings)
    data = twin.data(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_equal_outputs(compiled(**data), module(**data))
    changed = {"eps": 0.2, "max_iter": 3, "tol": 0.0}
    for name, value in changed.items():
        setattr(module, name, value)
    assert_equal_outputs(compiled(**data), twin.function(**data, **(twin.settings | changed)))

"""`otface_cuda.compat.metric_learning` beside pytorch-metric-learning itself: values, gradients, protocol, errors."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from otface_cuda.compat import metric_learning as ours

from .margin_problems import gradient_rtol, logit_error, random_margin_problem

# The package and its submodules are of the type Any here.
pml: Any = pytest.importorskip("pytorch_metric_learning")
losses: Any = pytest.importorskip("pytorch_metric_learning.losses")
miners: Any = pytest.importorskip("pytorch_metric_learning.miners")
reducers: Any = pytest.importorskip("pytorch_metric_learning.reducers")
regularizers: Any = pytest.importorskip("pytorch_metric_learning.regularizers")
distances: Any = pytest.importorskip("pytorch_metric_learning.distances")

B, C, D = 40, 7, 3
# The logits' scale by name: that of SphereFace comes on top of the length of x, which is about 2 here.
SCALES = {"ArcFaceLoss": 64, "CosFaceLoss": 64, "SphereFaceLoss": 8, "SubCenterArcFaceLoss": 64}
every_loss = pytest.mark.parametrize("name", list(SCALES))


def pair(name: str, classes: int = C, size: int = D, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Ours, and the original in float64, with the same class weights."""
    options = {"scale": SCALES[name]} | options
    mine = getattr(ours, name)(num_classes=classes, embedding_size=size, **options).to(dtype)
    mine.W.data.copy_(random_margin_problem(B, mine.W.shape[1], size).weight.t())  # does not depend on other tests
    theirs = getattr(losses, name)(num_classes=classes, embedding_size=size, **options).double()
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def batch(dtype: torch.dtype = torch.float64, size: tuple[int, int, int] = (B, C, D)) -> tuple[Tensor, Tensor]:
    x, _, labels = random_margin_problem(*size, dtype=dtype)
    return x, labels


def differentiated(loss: Any, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    out = loss(x, *args)
    return out.detach(), *torch.autograd.grad(out, (x, loss.W))


def assert_same(mine: Any, theirs: Any, x: Tensor, *args: Any) -> None:
    """Up to the rounding of the dtype of ours: that of the logits for the loss, and of a gradient's largest entry."""
    actual, expected = differentiated(mine, x, *args), differentiated(theirs, x.double(), *args)
    size = (len(x), mine.W.shape[1], x.shape[1])
    problem = random_margin_problem(*size)
    # Lengths of x are below 5 in SphereFace's logits; the margin's slope, which multiplies the rounding of a cosine, is
    # at most 4 for it, and 1 / sin(theta) for ArcFace: below 10 where |cos| < 0.995, as it is in these problems.
    scale = 10 * mine.scale * (5 if isinstance(mine, ours.SphereFaceLoss) else 1)
    # How much the gradient varies with the logit of one row is the same for the two, and so is the largest entry.
    rtol = gradient_rtol(mine.W.dtype, problem, scale)
    torch.testing.assert_close(
        actual[0].double(), expected[0], rtol=1e-6 if x.dtype == torch.float32 else 1e-12,
        atol=logit_error(mine.W.dtype, x.shape[1], scale),
    )  # fmt: skip
    for name, a, e in zip(("x", "W"), actual[1:], expected[1:], strict=True):
        assert a.shape == e.shape
        # torch's softmax rounds what a probability lacks of 1 to eps, in float64.
        atol = rtol * e.abs().max().item() + 4 * scale * torch.finfo(e.dtype).eps
        torch.testing.assert_close(a.double(), e, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(B, C, D), (1, 2, 2), (5, 1, 4), (33, 130, 17)], ids=str)
def test_same_loss_and_gradients(name: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    mine, theirs = pair(name, size[1], size[2], dtype)
    x, labels = batch(dtype, size)
    assert_same(mine, theirs, x, labels)
    actual, expected = mine.get_logits(x), theirs.get_logits(x.double())
    assert actual.dtype == dtype
    assert actual.shape == (size[0], size[1])
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=logit_error(dtype, size[2], 8 * mine.scale)
    )  # 8: the length of x


@every_loss
def test_margins_beyond_pi_are_among_these(name: str) -> None:
    """So that the fallback of ArcFace, and several k of SphereFace, are compared above."""
    mine, _ = pair(name)
    x, labels = batch()
    logits = mine.get_logits(x) / mine.scale
    if name == "SphereFaceLoss":
        logits = logits / x.norm(dim=1, keepdim=True)
    angles = logits.gather(1, labels[:, None]).clamp(-1, 1).acos()
    if "Arc" in name and "Sub" not in name:
        assert (angles + mine.margin > math.pi).any()
    if name == "SphereFaceLoss":
        assert len((4 * angles / math.pi).floor().unique()) >= 3


@every_loss
@pytest.mark.parametrize("options", [{"margin": 1, "scale": 1}, {"margin": 3, "scale": 30}], ids=str)
def test_other_margins_and_scales(name: str, options: dict[str, Any]) -> None:
    if name == "SubCenterArcFaceLoss":
        options = {**options, "sub_centers": 2}
    assert_same(*pair(name, **options), *batch())


@every_loss
def test_margin_and_scale_may_be_changed(name: str) -> None:
    mine, theirs = pair(name)
    for loss in (mine, theirs):
        loss.margin, loss.scale = 1, 5
    if name == "SphereFaceLoss":
        theirs.init_margin()
    assert_same(mine, theirs, *batch())


def test_a_fraction_of_a_factor_is_cut_off() -> None:
    assert_same(*pair("SphereFaceLoss", margin=3.7), *batch())


@every_loss
def test_layouts(name: str) -> None:
    mine, theirs = pair(name)
    x, labels = batch(size=(B, C, 2 * D))
    assert_same(mine, theirs, x[:, ::2], labels)
    assert_same(mine, theirs, x[:, :D].t().contiguous().t(), labels.repeat_interleave(2)[::2])
    mine.W.data = mine.W.data.contiguous()  # as load_state_dict(assign=True) leaves it
    assert_same(mine, theirs, x[:, D:], labels.int().long())


@every_loss
def test_signatures_and_defaults(name: str) -> None:
    """Every argument of the original that has a name is here, at the same place and with the same default."""
    mine, theirs = (inspect.signature(getattr(module, name)).parameters for module in (ours, losses))
    for parameter in theirs.values():
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            assert mine[parameter.name].default == parameter.default
    assert list(mine)[:4] == ["num_classes", "embedding_size", "margin", "scale"]
    mine, theirs = (inspect.signature(getattr(module, name).forward).parameters for module in (ours, losses))
    assert [(p.name, p.default, p.kind) for p in mine.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]
    made = [getattr(module, name)(num_classes=C, embedding_size=D) for module in (ours, losses)]
    for attribute in ("num_classes", "margin", "scale", "weight_reg_weight", "embedding_reg_weight", "collect_stats"):
        assert getattr(made[0], attribute) == getattr(made[1], attribute)


@every_loss
def test_positional_arguments(name: str) -> None:
    loss = getattr(ours, name)(C, D, 2, 5)
    assert (loss.num_classes, loss.scale) == (C, 5)


@every_loss
@pytest.mark.parametrize("init", [None, "uniform"])
def test_same_weights_from_the_same_seed(name: str, init: str | None) -> None:
    weights = []
    for module in (ours, losses):
        torch.manual_seed(3)
        options = {} if init is None else {"weight_init_func": torch.nn.init.uniform_}
        weights.append(getattr(module, name)(num_classes=C, embedding_size=D, **options).W)
    assert torch.equal(*weights)
    assert isinstance(weights[0], torch.nn.Parameter)


@every_loss
@pytest.mark.parametrize("regularized", [False, True])
def test_state_dicts(name: str, regularized: bool) -> None:
    """Strictly, in both directions."""
    options: dict[str, Any] = {"num_classes": C, "embedding_size": D}
    if regularized:
        options |= {"weight_regularizer": regularizers.LpRegularizer(), "reducer": reducers.MeanReducer()}
    mine, theirs = getattr(ours, name)(**options), getattr(losses, name)(**options)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    mine.load_state_dict(theirs.state_dict())
    assert torch.equal(mine.W, theirs.W)
    torch.nn.init.zeros_(mine.W)
    theirs.load_state_dict(mine.state_dict())
    assert not theirs.W.any()


@every_loss
def test_a_row_per_class_in_memory(name: str) -> None:
    """Also after what is done with modules, so that the kernels need no copy; and the gradient has these strides."""
    mine, theirs = pair(name, dtype=torch.float32)
    changed = copy.deepcopy(mine).double()
    changed.load_state_dict(theirs.state_dict())
    x, labels = batch()
    changed(x, labels).backward()
    torch.optim.SGD(changed.parameters(), lr=1.0).step()
    for loss in (mine, changed):
        assert loss.W.t().is_contiguous()
        assert not loss.W.is_contiguous()
    assert changed.W.grad.t().is_contiguous()


@every_loss
@pytest.mark.parametrize("miner", ["MultiSimilarityMiner", "TripletMarginMiner"])
def test_weights_of_a_miner(name: str, miner: str) -> None:
    x, labels = batch()
    indices = getattr(miners, miner)()(x, labels)
    assert len(indices) == (4 if miner == "MultiSimilarityMiner" else 3)
    assert len({len(i) for i in indices}) >= 1
    assert all(len(i) > 0 for i in indices)
    mine, theirs = pair(name)
    assert_same(mine, theirs, x, labels, indices)
    assert not torch.isclose(mine(x, labels, indices), mine(x, labels))


@every_loss
def test_a_miner_that_finds_nothing(name: str) -> None:
    x, labels = batch()
    mine, theirs = pair(name)
    none = (torch.empty(0, dtype=torch.int64),) * 3
    assert_same(mine, theirs, x, labels, none)
    assert torch.equal(mine(x, labels, none), mine(x, labels))


REDUCERS: dict[str, Any] = {
    "mean": lambda: reducers.MeanReducer(),
    "sum": lambda: reducers.SumReducer(),
    "threshold": lambda: reducers.ThresholdReducer(low=5, high=40),
    "non-zero": lambda: reducers.AvgNonZeroReducer(),
    "class weights": lambda: reducers.ClassWeightedReducer(torch.linspace(0.5, 2, C, dtype=torch.float64)),
    "per anchor": lambda: reducers.PerAnchorReducer(reducers.SumReducer()),
    "multiple": lambda: reducers.MultipleReducers({"loss": reducers.SumReducer()}),
}


@every_loss
@pytest.mark.parametrize("reducer", [None, *REDUCERS])
@pytest.mark.parametrize("regularized", [False, True])
def test_reducers_and_regularizers(name: str, reducer: str | None, regularized: bool) -> None:
    options = {"reducer": None if reducer is None else REDUCERS[reducer]()}
    if regularized:
        options |= {
            "weight_regularizer": regularizers.RegularFaceRegularizer(),
            "weight_reg_weight": 0.3,
            "embedding_regularizer": regularizers.LpRegularizer(),
            "embedding_reg_weight": 2,
        }
    mine, theirs = pair(name, **options)
    x, labels = batch()
    assert_same(mine, theirs, x, labels)
    if regularized:
        assert mine(x, labels) != pair(name)[0](x, labels)


@every_loss
def test_a_reducer_that_does_nothing(name: str) -> None:
    options = {"reducer": reducers.DoNothingReducer(), "embedding_regularizer": regularizers.LpRegularizer()}
    mine, theirs = pair(name, **options)
    x, labels = batch()
    actual, expected = mine(x, labels), theirs(x, labels)
    assert actual.keys() == expected.keys()
    for key in expected:
        assert actual[key].keys() == expected[key].keys()
        assert actual[key]["reduction_type"] == expected[key]["reduction_type"]
        torch.testing.assert_close(actual[key]["losses"], expected[key]["losses"])
    assert torch.equal(actual["loss"]["indices"], expected["loss"]["indices"])


@every_loss
def test_a_reducer_is_not_shared(name: str) -> None:
    reducer = reducers.MeanReducer()
    assert pair(name, reducer=reducer)[0].reducer is not reducer


@every_loss
def test_training(name: str) -> None:
    """Ten steps with momentum, in which a small difference would grow."""
    mine, theirs = pair(name, scale=10)
    x, labels = batch()
    for loss in (mine, theirs):
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        for _ in range(10):
            optimizer.zero_grad()
            loss(x, labels).backward()
            optimizer.step()
    torch.testing.assert_close(mine.W, theirs.W, rtol=1e-7, atol=1e-9)


def test_among_its_losses() -> None:
    x, labels = batch()
    pairs = [pair("ArcFaceLoss"), pair("CosFaceLoss")]
    mine, theirs = (losses.MultipleLosses([p[i] for p in pairs], weights=[0.5, 2]) for i in (0, 1))
    torch.testing.assert_close(mine(x, labels), theirs(x, labels))


@every_loss
def test_statistics(name: str) -> None:
    mine, theirs = pair(name, collect_stats=True)
    x, labels = batch()
    mine(x, labels)
    theirs(x, labels)
    assert mine.avg_angle == pytest.approx(theirs.avg_angle, rel=1e-9)
    assert (mine._record_these, mine._record_these_stats) == (theirs._record_these, theirs._record_these_stats)
    assert pair(name)[0]._record_these_stats == []


@every_loss
def test_references(name: str) -> None:
    x, labels = batch()
    for loss in pair(name):
        for references in [(x.clone(), labels), (x, labels.clone()), (x, None)]:
            with pytest.raises(ValueError, match="ref_emb"):
                loss(x, labels, None, *references)
        assert torch.equal(loss(x, labels, None, x, labels), loss(x, labels))
        assert torch.equal(loss(x, labels, None, None, labels.clone()), loss(x, labels))


@every_loss
def test_distances(name: str) -> None:
    options = {"num_classes": C, "embedding_size": D}
    for module in (ours, losses):
        with pytest.raises(AssertionError, match="CosineSimilarity"):
            getattr(module, name)(**options, distance=distances.LpDistance())
    x, labels = batch()
    assert_same(*pair(name, distance=distances.CosineSimilarity()), x, labels)
    with pytest.raises(AssertionError, match=r"`distance` must be None or CosineSimilarity\(\)"):
        getattr(ours, name)(**options, distance=distances.CosineSimilarity(power=2))


X, LABELS = torch.zeros(B, D), torch.zeros(B, dtype=torch.int64)


@every_loss
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X,), ValueError, "`labels` must be given"),
        ((X, LABELS[1:]), ValueError, r"`labels` must be an integer tensor of shape \(40,\)"),
        ((X, LABELS[:, None]), ValueError, r"got a int64 tensor of shape \(40, 1\)"),
        ((X[0], LABELS), ValueError, r"`embeddings` must be of shape \(B, 3\), got a float32 tensor of shape \(3,\)"),
        ((X[:, 1:], LABELS), ValueError, r"`embeddings` must be of shape \(B, 3\)"),
        ((X, LABELS + C), ValueError, "`labels` must be from 0 to 6.*got 7 for row 0"),
        ((X, LABELS - 1), ValueError, "got -1 for row 0"),
        ((X, LABELS.float()), TypeError, "`labels` must be an integer tensor"),
        ((X.long(), LABELS), TypeError, "`embeddings` must be float64, float32"),
    ],
)
def test_wrong_calls(name: str, args: Any, error: type[Exception], message: str) -> None:
    mine, theirs = pair(name)
    with pytest.raises(error, match=f"{name}: .*{message}"):
        mine(*args)
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
        theirs(*args)


@every_loss
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "`num_classes` must be at least 1, got 0"),
        ({"embedding_size": 2.5}, TypeError, "`embedding_size` must be an int"),
        ({"margin": -1}, ValueError, "must be"),
        ({"scale": 0}, ValueError, "`scale` must be positive, got 0"),
        ({"scale": "1"}, TypeError, "`scale` must be a float"),
        ({"alpha": 1}, TypeError, "alpha"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(ours, name)(**{"num_classes": C, "embedding_size": D} | options)


@pytest.mark.parametrize("name", ["ArcFaceLoss", "SubCenterArcFaceLoss"])
def test_a_margin_is_in_degrees(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: `margin` must be an angle from 0 to 180, in degrees, got 200"):
        getattr(ours, name)(C, D, margin=200)


def test_sub_centers_are_counted() -> None:
    with pytest.raises(ValueError, match="`sub_centers` must be at least 1, got 0"):
        ours.SubCenterArcFaceLoss(C, D, sub_centers=0)


def at_the_end(theirs: Any, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The original's loss and gradients where |cos| = 1 for each row's own class: the angle is then at an end, so that
    its cosine has gradient 0, and so has the logit, though the slope of an angle's cosine is infinite there.
    """

    def constant(cos: Tensor) -> Tensor:
        with torch.no_grad():
            return type(theirs).modify_cosine_of_target_classes(theirs, cos)

    theirs = copy.deepcopy(theirs)
    theirs.modify_cosine_of_target_classes = constant
    return differentiated(theirs, x, labels)


@every_loss
@pytest.mark.parametrize("cos", [1, -1])
def test_embeddings_that_are_their_class(name: str, cos: int) -> None:
    """Where |cos| = 1, the gradient is finite, and the original's where that is: with some torch it is NaN."""
    mine, theirs = pair(name, classes=3, scale=2)
    mine.W.data = torch.eye(3).double()
    if name == "SubCenterArcFaceLoss":
        mine.W.data = torch.eye(3).double().repeat_interleave(3, dim=1) * torch.tensor([1, 0.5, 0.2]).repeat(3)
    theirs.load_state_dict(mine.state_dict())
    x, labels = cos * torch.eye(3).double(), torch.tensor([0, 1, 2])
    actual, original = (differentiated(loss, x, labels) for loss in (mine, theirs))
    right = at_the_end(theirs, x, labels)
    count = 3
    if name == "SubCenterArcFaceLoss":  # there the nearest is one of three with the same cosine
        assert actual[2].isfinite().all()
        count = 2
    for a, e, r in zip(actual[:count], original[:count], right[:count], strict=True):
        torch.testing.assert_close(a, r, rtol=1e-9, atol=1e-9)
        if e.isfinite().all():
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(name: str, dtype: torch.dtype) -> None:
    """Computed in float32 with W as it is: the numbers are those of the same embeddings in float32."""
    mine, theirs = pair(name, dtype=torch.float32)
    x, labels = batch(dtype)
    loss, grad_x, grad_w = differentiated(mine, x, labels)
    expected = differentiated(mine, x.float(), labels)
    assert (loss.dtype, grad_x.dtype, grad_w.dtype) == (torch.float32, dtype, torch.float32)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad_x, expected[1].to(dtype))
    assert mine.W.dtype == torch.float32
    theirs(x, labels)
    assert theirs.W.dtype == dtype  # which rounds it for good


@every_loss
def test_wider_embeddings(name: str) -> None:
    mine, theirs = pair(name, dtype=torch.float32)
    x, labels = batch(torch.float64)
    actual, expected = differentiated(mine, x, labels), differentiated(theirs, x, labels)
    assert actual[0].dtype == torch.float64
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[2], expected[2].float())


@every_loss
def test_ignored_rows(name: str) -> None:
    mine, _ = pair(name)
    x, labels = batch()
    labels[:2] = -100
    ignored, kept = mine(x, labels) * B, mine(x[2:], labels[2:]) * (B - 2)
    torch.testing.assert_close(ignored, kept)
    assert not differentiated(mine, x, labels)[1][:2].any()


@every_loss
def test_no_rows(name: str) -> None:
    """The mean of nothing is NaN, as in the original."""
    x, labels = torch.empty(0, D).double(), torch.empty(0, dtype=torch.int64)
    mine, theirs = pair(name)
    assert mine(x, labels).isnan()
    assert theirs(x, labels).isnan()
    assert mine.get_logits(x).shape == (0, C)


@pytest.mark.parametrize("threshold", [75, 90])
@pytest.mark.parametrize("sub_centers", [1, 3])
def test_outliers(threshold: float, sub_centers: int) -> None:
    mine, theirs = pair("SubCenterArcFaceLoss", sub_centers=sub_centers)
    x, labels = batch()
    labels[labels == 4] = 5  # a class without rows
    outliers, centers = mine.get_outliers(x, labels, threshold)
    expected_outliers, expected_centers = theirs.get_outliers(x, labels, threshold)
    assert 0 < len(outliers) < B
    assert torch.equal(outliers, expected_outliers)
    present = labels.unique()
    assert len(present) == C - 1
    torch.testing.assert_close(centers[:, present], expected_centers[:, present], rtol=0, atol=0)
    assert not centers[:, 4].any()
    assert not outliers.requires_grad
    assert not centers.requires_grad


def test_outliers_without_centers() -> None:
    """What the argument says: the original returns both all the same, and float32 if there are none."""
    mine, theirs = pair("SubCenterArcFaceLoss")
    x, labels = batch()
    outliers = mine.get_outliers(x, labels, 75, return_dominant_centers=False)
    assert torch.equal(outliers, mine.get_outliers(x, labels)[0])
    assert isinstance(theirs.get_outliers(x, labels, 75, return_dominant_centers=False), tuple)
    none, expected = mine.get_outliers(x, labels, 180)[0], theirs.get_outliers(x, labels, 180)[0]
    assert (len(none), none.dtype) == (0, torch.int64)
    assert (len(expected), expected.dtype) == (0, torch.float32)
    labels[:] = -100
    assert len(mine.get_outliers(x, labels, 0)[0]) == 0


def test_outliers_are_checked() -> None:
    mine, theirs = pair("SubCenterArcFaceLoss")
    x, labels = batch()
    for loss in (mine, theirs):
        with pytest.raises(ValueError, match="labels"):
            loss.get_outliers(x, labels[1:])

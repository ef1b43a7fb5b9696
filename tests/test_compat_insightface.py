"""`otface_cuda.compat.insightface` beside a float64 transcription of what recognition/arcface_torch computes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from otface_cuda.compat import insightface
from otface_cuda.compat.insightface import ArcFace, CombinedMarginLoss, CosFace, PartialFC_V2

from .margin_problems import gradient_rtol, logit_error, random_margin_problem

B, C, D = 40, 7, 3
DTYPES = [torch.float64, torch.float32]

# Ours, and (s, m1, m2, m3, threshold) of the same loss.
LOSSES: dict[str, tuple[Any, tuple[float, ...]]] = {
    "arcface": (lambda: CombinedMarginLoss(64, 1.0, 0.5, 0.0), (64, 1.0, 0.5, 0.0, 0)),
    "cosface": (lambda: CombinedMarginLoss(64, 1.0, 0.0, 0.4), (64, 1.0, 0.0, 0.4, 0)),
    "m1 and m2 are ignored": (lambda: CombinedMarginLoss(30, 1.3, 0.5, 0.2), (30, 1.3, 0.5, 0.2, 0)),
    "no margin": (lambda: CombinedMarginLoss(64, 1.0, 0.0, 0.0), (64, 1.0, 0.0, 0.0, 0)),
    "arcface, filtered": (lambda: CombinedMarginLoss(64, 1.0, 0.5, 0.0, 0.4), (64, 1.0, 0.5, 0.0, 0.4)),
    "cosface, filtered": (lambda: CombinedMarginLoss(64, 1.0, 0.0, 0.4, 0.4), (64, 1.0, 0.0, 0.4, 0.4)),
    "ArcFace": (ArcFace, (64, 1.0, 0.5, 0.0, 0)),
    "CosFace": (CosFace, (64, 1.0, 0.0, 0.4, 0)),
}
every_loss = pytest.mark.parametrize("name", list(LOSSES))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class StraightThrough(torch.autograd.Function):
    """cos(arccos(c) + m), computed without gradient: the slope stays 1."""

    @staticmethod
    def forward(ctx: Any, cos: Tensor, m: float) -> Tensor:
        return (cos.acos() + m).cos()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def transcription(cos: Tensor, labels: Tensor, s: float, m1: float, m2: float, m3: float, threshold: float) -> Tensor:
    """Row by row, in float64."""
    rows = []
    for row, label in zip(cos.double(), labels.tolist(), strict=True):
        own = torch.arange(len(row)) == label
        if threshold > 0:
            row = row * (own | (row <= threshold))
        target = StraightThrough.apply(row, m2) if m1 == 1 and m3 == 0 else row - m3
        rows.append(s * torch.where(own, target, row))
    return torch.stack(rows)


def cosines(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(B, C), some of them 1 or -1 at the target, and labels with a -1 among them."""
    x, weight, labels = random_margin_problem(B, C, D, dtype=dtype)
    cos = F.cosine_similarity(x[:, None], weight[None], dim=2).clamp(-1, 1)
    cos[0, labels[0]], cos[1, labels[1]] = 1, -1
    labels[3] = -1
    return cos, labels


@every_loss
@every_dtype
@pytest.mark.parametrize("column", [False, True])
def test_logits(name: str, dtype: torch.dtype, column: bool) -> None:
    make, settings = LOSSES[name]
    cos, labels = cosines(dtype)
    before = cos.clone()
    cos.requires_grad_()
    logits = make()(cos, labels[:, None] if column else labels)
    # One rounding of the margin, one of the sum and one of the product; arccos and cos in the transcription turn a
    # rounding of float64 near 1 into its root times the sine of the margin.
    atol = 3 * settings[0] * torch.finfo(dtype).eps + 1e-13
    expected_cos = before.double().requires_grad_()
    expected = transcription(expected_cos, labels, *settings)
    assert (logits.dtype, logits.shape) == (dtype, (B, C))
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=atol)
    cotangent = torch.rand(B, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (grad,) = torch.autograd.grad(logits, cos, cotangent.to(dtype))
    (expected_grad,) = torch.autograd.grad(expected, expected_cos, cotangent)
    torch.testing.assert_close(grad, expected_grad.to(dtype))
    assert torch.equal(cos, before)  # the original works in place
    if settings[4] > 0:
        assert (expected_grad == 0).any()


def test_other_layouts_and_types() -> None:
    cos, labels = cosines()
    expected = ArcFace()(cos, labels)
    assert torch.equal(ArcFace()(cos.t().contiguous().t(), labels), expected)
    assert torch.equal(ArcFace()(cos, labels.int()), expected)
    assert torch.equal(ArcFace()(cos, labels.repeat_interleave(2)[::2]), expected)
    assert torch.equal(ArcFace()(cos[:1], labels[:1]), expected[:1])
    assert ArcFace()(cos[:0], labels[:0]).shape == (0, C)
    half = ArcFace()(cos.bfloat16(), labels)
    assert half.dtype == torch.bfloat16
    # A rounding of the cosine, two of the result.
    torch.testing.assert_close(half.double(), expected, rtol=0.02, atol=64 * 0.02)


def test_a_cosine_above_one_counts_as_one() -> None:
    """Of a caller that does not clamp; the original's arccos makes it NaN."""
    above = torch.tensor([[1 + 1e-6, 0.0]])
    label = torch.tensor([0])
    torch.testing.assert_close(ArcFace()(above, label), ArcFace()(above.clamp(-1, 1), label))


def test_margins_may_be_changed() -> None:
    cos, labels = cosines()
    loss = CombinedMarginLoss(64, 1.0, 0.5, 0.0)
    loss.m2, loss.s = 0.2, 10
    assert torch.equal(loss(cos, labels), ArcFace(10, 0.2)(cos, labels))


def test_signatures() -> None:
    """As in the original, whose ``logits`` are cosines."""
    of = {name: str(inspect.signature(getattr(insightface, name))).split(" -> ")[0] for name in insightface.__all__}
    assert of == {
        "ArcFace": "(s: 'float' = 64.0, margin: 'float' = 0.5)",
        "CosFace": "(s: 'float' = 64.0, m: 'float' = 0.4)",
        "CombinedMarginLoss": "(s: 'float', m1: 'float', m2: 'float', m3: 'float', "
        "interclass_filtering_threshold: 'float' = 0)",
        "PartialFC_V2": "(margin_loss: 'Callable[[Tensor, Tensor], Tensor]', embedding_size: 'int', "
        "num_classes: 'int', sample_rate: 'float' = 1.0, fp16: 'bool' = False)",
    }
    assert list(inspect.signature(ArcFace().forward).parameters) == ["logits", "labels"]
    forward = inspect.signature(PartialFC_V2.forward).parameters
    assert list(forward) == ["self", "local_embeddings", "local_labels"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CombinedMarginLoss(64, 0.9, 0.5, 0.0), ValueError, "`m1` and `m3` must be .* got m1=0.9 and m3=0.0"),
        (lambda: CombinedMarginLoss(64, 1.0, 0.5, -0.1), ValueError, "got m1=1.0 and m3=-0.1"),
        (lambda: CombinedMarginLoss(0, 1.0, 0.5, 0.0), ValueError, "CombinedMarginLoss: `s` must be positive, got 0"),
        (lambda: ArcFace("64"), TypeError, "ArcFace: `s` must be a float, got '64'"),
        (lambda: ArcFace(64, 28.6), ValueError, "must be an angle from 0 to pi, in radians, got 28.6"),
        (lambda: CosFace(64, -0.1), ValueError, "must be a finite number of at least 0, got -0.1"),
    ],
)
def test_wrong_margins(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


COSINES, LABELS = torch.zeros(B, C), torch.zeros(B, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((COSINES[0], LABELS), ValueError, r"`logits` must be of shape \(B, C\)"),
        ((COSINES.long(), LABELS), TypeError, "`logits` must be float64"),
        ((COSINES, LABELS[1:]), ValueError, r"`labels` must be an integer tensor of shape \(40,\)"),
        ((COSINES, LABELS.float()), TypeError, "`labels` must be an integer tensor"),
        ((COSINES, LABELS + C), ValueError, "`labels` must be from 0 to 6, or -1 .*, got 7 for row 0"),
        ((COSINES, LABELS - 2), ValueError, "got -2 for row 0"),
    ],
)
def test_wrong_cosines(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"ArcFace: .*{message}"):
        ArcFace()(*args)


def classifier(margin_loss: Any, dtype: torch.dtype = torch.float64, size: int = D, **options: Any) -> PartialFC_V2:
    classes = options.pop("num_classes", C)
    head = PartialFC_V2(margin_loss, size, classes, **options).to(dtype)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    return head


def expected_loss(x: Tensor, weight: Tensor, labels: Tensor, settings: tuple[float, ...]) -> Tensor:
    cos = (F.normalize(x) @ F.normalize(weight).mT).clamp(-1, 1)
    return F.cross_entropy(transcription(cos, labels, *settings), labels)


def differentiated(loss: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


def assert_same(head: PartialFC_V2, x: Tensor, labels: Tensor, settings: tuple[float, ...], seed: int = 0) -> None:
    """Up to rounding, of the logits for the loss, and of its largest entry for a gradient."""
    x = x.detach().clone().requires_grad_()
    double_x, weight = (v.detach().double().requires_grad_() for v in (x, head.weight))
    torch.manual_seed(seed)
    actual = differentiated(head(x, labels), x, head.weight)
    kept = head.weight_index if head.sample_rate < 1 else torch.arange(len(weight))
    places = torch.tensor([kept.tolist().index(label) for label in labels.flatten().tolist()])
    expected = differentiated(expected_loss(double_x, weight[kept], places, settings), double_x, weight)
    dtype = x.dtype
    # The slopes of the margin are at most 1 / sin(theta), below 10 in these problems; float64 has arccos as well.
    scale = 10 * settings[0]
    problem = random_margin_problem(len(x), len(kept), x.shape[1])
    torch.testing.assert_close(
        actual[0].double(), expected[0], rtol=1e-6 if dtype == torch.float32 else 1e-12,
        atol=logit_error(dtype, x.shape[1], scale),
    )  # fmt: skip
    for name, a, e in zip(("x", "weight"), actual[1:], expected[1:], strict=True):
        # torch's softmax rounds what a probability lacks of 1 to eps, in float64.
        atol = gradient_rtol(dtype, problem, scale) * e.abs().max().item() + 4 * scale * torch.finfo(e.dtype).eps
        torch.testing.assert_close(a.double(), e, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@every_loss
@every_dtype
@pytest.mark.parametrize("size", [(B, C, D), (1, 2, 2), (5, 1, 4), (33, 130, 17)], ids=str)
def test_all_classes(name: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    make, settings = LOSSES[name]
    x, _, labels = random_margin_problem(*size, dtype=dtype)
    head = classifier(make(), dtype, size[2], num_classes=size[1])
    assert_same(head, x, labels, settings)
    assert torch.equal(head(x, labels[:, None]), head(x, labels))
    assert torch.equal(head(x, labels.int()), head(x, labels))
    wide = x.repeat_interleave(2, dim=1)[:, ::2]
    torch.testing.assert_close(head(wide, labels), head(x, labels))


@every_loss
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_sampled_classes(name: str, rate: float) -> None:
    """Of 50 classes 9 occur: more than 10 %, less than 50 %."""
    make, settings = LOSSES[name]
    x, _, labels = random_margin_problem(B, 9, D)
    labels = 5 * labels + 3
    head = classifier(make(), num_classes=50, sample_rate=rate)
    assert_same(head, x, labels, settings, seed=5)
    assert len(head.weight_index) == max(9, int(rate * 50))
    gradient = torch.autograd.grad(head(x, labels), head.weight)[0].any(1).nonzero()[:, 0]
    assert set(gradient.tolist()) <= set(head.weight_index.tolist())


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("rows", [3, B])
def test_which_classes_are_sampled(rate: float, rows: int) -> None:
    """Those of the batch, and the others with the largest of C random numbers: on the CPU the original's."""
    classes = 50
    _, _, labels = random_margin_problem(rows, 9, D)
    labels = 5 * labels + 3
    head = classifier(ArcFace(), num_classes=classes, sample_rate=rate)
    torch.manual_seed(11)
    places = head.sample(labels)
    torch.manual_seed(11)
    order = torch.rand(classes).tolist()
    positive = set(labels.tolist())
    others = sorted(set(range(classes)) - positive, key=lambda j: -order[j])
    expected = sorted(positive | set(others[: max(0, int(rate * classes) - len(positive))]))
    assert head.weight_index.tolist() == expected
    assert torch.equal(head.weight_index[places], labels)


def test_another_sample_in_each_step() -> None:
    x, _, labels = random_margin_problem(4, C, D)
    head = classifier(ArcFace(), num_classes=1000, sample_rate=0.1)
    head(x, labels)
    before = head.weight_index
    head(x, labels)
    assert not torch.equal(head.weight_index, before)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_function_of_the_user(rate: float) -> None:
    """It gets what it gets from the original: clamped cosines that it may overwrite, and labels (B, 1)."""
    seen = []

    def margin_loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append((logits.shape, labels.shape, labels.dtype, bool((logits.abs() <= 1).all())))
        rows = torch.arange(len(logits))
        with torch.no_grad():
            logits.acos_()
            logits[rows, labels[:, 0]] += 0.5
            logits.cos_()
        return logits * 64

    x, _, labels = random_margin_problem(B, C, D)
    x[0] = 3 * classifier(ArcFace()).weight[labels[0]].detach()
    results = []
    for loss in (margin_loss, CombinedMarginLoss(64, 1.0, 0.5, 0.0)):
        head = classifier(loss, sample_rate=rate)
        torch.manual_seed(0)
        v = x.clone().requires_grad_()
        results.append(differentiated(head(v, labels), v, head.weight))
    assert seen == [((B, C), (B, 1), torch.int64, True)]
    # arccos and cos of every cosine, where the fused loss has none: a rounding of a cosine near 1 becomes its root, but
    # then half its square on the way back.
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_a_forward_of_the_user_is_called() -> None:
    class Plain(ArcFace):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return logits * 2

    x, _, labels = random_margin_problem(B, C, D)
    head = classifier(Plain())
    cos = F.normalize(x) @ F.normalize(head.weight).mT
    torch.testing.assert_close(head(x, labels), F.cross_entropy(2 * cos, labels))


@pytest.mark.parametrize(("name", "fused"), [(n, "filtered" not in n) for n in LOSSES])
def test_large_logits_are_never_held(name: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("cosines")

    monkeypatch.setattr(insightface, "cosine_margin_logits", stop)
    monkeypatch.setattr(torch, "scatter_add", stop)
    x, _, labels = random_margin_problem(B, C, D)
    head = classifier(LOSSES[name][0]())
    if fused:
        head(x, labels)
    else:
        with pytest.raises(RuntimeError, match="cosines"):
            head(x, labels)


def test_batches_may_differ_in_size() -> None:
    x, _, labels = random_margin_problem(B, C, D)
    head = classifier(ArcFace())
    one = torch.stack([head(x[b : b + 1], labels[b : b + 1]) for b in range(B)])
    torch.testing.assert_close(one.mean(), head(x, labels))
    before = labels.clone()[:, None]
    head(x, before)
    assert before.shape == (B, 1)  # the original squeezes it in place


def test_a_large_loss_is_not_cut_off() -> None:
    """The original's is at most -log(1e-30) = 69.1 for a row, with the gradient of the right one."""
    head = PartialFC_V2(CosFace(64, 0.4), 2, 2)
    head.weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = head(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    torch.testing.assert_close(loss, torch.tensor(64 * 2.4))


def test_half_products_are_for_cuda() -> None:
    x, _, labels = random_margin_problem(B, C, D, dtype=torch.float32)
    for loss in (ArcFace(), lambda logits, labels: logits):
        head, same = (classifier(loss, torch.float32, fp16=fp16) for fp16 in (True, False))
        assert torch.equal(head(x, labels), same(x, labels))


def test_parameters() -> None:
    """The same weights from the same seed, and the same state dict."""
    torch.manual_seed(4)
    head = PartialFC_V2(ArcFace(), D, C)
    torch.manual_seed(4)
    assert torch.equal(head.weight, torch.normal(0, 0.01, (C, D)))
    assert list(head.state_dict()) == ["weight"]
    assert (head.embedding_size, head.sample_rate, head.fp16) == (D, 1.0, False)
    assert isinstance(head.margin_softmax, ArcFace)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((None, D, C), TypeError, "`margin_loss` must be a function of cosines and labels, got None"),
        ((ArcFace, D, C), TypeError, "got the class ArcFace"),
        ((ArcFace(), 0, C), ValueError, "`embedding_size` must be at least 1"),
        ((ArcFace(), D, 2.0), TypeError, "`num_classes` must be an int"),
        ((ArcFace(), D, C, 1.5), ValueError, "`sample_rate` must be from 0 to 1, got 1.5"),
    ],
)
def test_wrong_classifiers(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"PartialFC_V2: .*{message}"):
        PartialFC_V2(*args)


def test_one_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    PartialFC_V2(ArcFace(), D, C)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="PartialFC_V2: holds all classes in one process, got a process group of 2"):
        PartialFC_V2(ArcFace(), D, C)


X = torch.zeros(B, D)


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X[0], LABELS), ValueError, r"`local_embeddings` must be of shape \(B, 3\)"),
        ((X[:, 1:], LABELS), ValueError, r"`local_embeddings` must be of shape \(B, 3\), got a .* of shape \(40, 2\)"),
        ((X.double(), LABELS), TypeError, r"`local_embeddings` must be of the dtype of `weight` \(torch.float32\)"),
        ((X, None), TypeError, "`local_labels` must be an integer tensor"),
        ((X, LABELS[1:]), ValueError, r"`local_labels` must be an integer tensor of shape \(40,\)"),
        ((X, LABELS + C), ValueError, "`local_labels` must be from 0 to 6, got 7 for row 0"),
        ((X, LABELS - 1), ValueError, "`local_labels` must be from 0 to 6, got -1 for row 0"),
        ((X, LABELS - 100), ValueError, "got -100 for row 0"),
    ],
)
def test_wrong_batches(args: Any, error: type[Exception], message: str, rate: float) -> None:
    with pytest.raises(error, match=f"PartialFC_V2: .*{message}"):
        PartialFC_V2(ArcFace(), D, C, rate)(*args)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: CombinedMarginLoss(64.0, "a", 0.5, 0.0), "m1"),
        (lambda: CombinedMarginLoss(64.0, 1.0, -1, 0.0), "m2"),
        (lambda: CombinedMarginLoss(64.0, 1.0, 0.5, "x"), "m3"),
        (lambda: CombinedMarginLoss(64.0, 1.0, 0.5, 0.0, "a"), "interclass_filtering_threshold"),
        (lambda: ArcFace(64.0, 4.0), "margin"),
        (lambda: CosFace(64.0, -0.1), "m"),
        (lambda: PartialFC_V2(CosFace(), 4, 5, fp16="a"), "fp16"),
    ],
)
def test_wrong_settings_have_the_names_of_the_original(make: Any, name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f": `{name}` must be"):
        make()


def test_a_wrong_scale_that_is_assigned() -> None:
    loss = CombinedMarginLoss(64.0, 1.0, 0.5, 0.0)
    loss.s = -1.0
    with pytest.raises(ValueError, match=r"^CombinedMarginLoss: `s` must be positive"):
        loss(torch.rand(2, 3), torch.tensor([0, 1]))

"""`otface_cuda.compat.otface` against a float64 transcription of the authors' heads, one triplet at a time."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from otface_cuda import margins
from otface_cuda.compat import otface
from otface_cuda.compat.otface import AMsoftmax, ArcFace, OTFace_AMsoftmax, OTFace_Arcface

from .margin_problems import logit_error
from .otface_problems import Batch, distance_error, hard_triplets, official_logits, random_batch, transport_term
from .problems import output_dtype
from .test_bad_input import refused

PEOPLE = [0, 0, 1, 1, 1, 2, 2, 3, 4]
EMPTY = inspect.Parameter.empty
# What the originals are declared with, in order.
SIGNATURES: dict[type[Any], dict[str, Any]] = {
    ArcFace: {"in_features": EMPTY, "out_features": EMPTY, "s": 64.0, "m": 0.45, "easy_margin": False},
    AMsoftmax: {"in_features": EMPTY, "out_features": EMPTY, "s": 30, "m": 0.35, "easy_margin": False},
}
SIGNATURES[OTFace_Arcface] = {**SIGNATURES[ArcFace], "alpha": 0, "beta": 0}
SIGNATURES[OTFace_AMsoftmax] = SIGNATURES[AMsoftmax]
HEADS = list(SIGNATURES)


def head_for(kind: type[Any], batch: Batch, **settings: Any) -> Any:
    """With the class weights of the batch."""
    head = kind(batch.weight.shape[1], batch.weight.shape[0], **settings).to(batch.weight)
    with torch.no_grad():
        head.kernel.copy_(batch.weight.T)
    return head


def call(head: Any, batch: Batch, epoch: int = 0) -> tuple[Any, ...]:
    rest = (
        (batch.maps, batch.labels, epoch) if isinstance(head, (OTFace_Arcface, OTFace_AMsoftmax)) else (batch.labels,)
    )
    out: tuple[Any, ...] = head(batch.embeddings, *rest)
    return out


def check(kind: type[Any], batch: Batch, **settings: Any) -> tuple[Any, ...]:
    """Values and gradients of everything that the head returns, in whatever dtype the batch has."""
    leaf = batch._replace(**{x: getattr(batch, x).detach().clone().requires_grad_() for x in ("embeddings", "maps")})
    head = head_for(kind, batch, **settings)
    out = call(head, leaf)
    arc = issubclass(kind, ArcFace)
    m, s = head.m, head.s
    margin = margins.ArcFace(m, easy_margin=head.easy_margin) if arc else margins.CosFace(m)
    x, maps, weight = (v.detach().cpu().double().requires_grad_() for v in (batch.embeddings, batch.maps, batch.weight))
    labels = batch.labels.cpu()
    logits, plain = official_logits(x, labels, weight, margin, s)
    of_logits = logit_error(batch.maps.dtype, x.shape[1], s)
    dtype = output_dtype(batch.maps.dtype)
    for given, wanted in ((out[0], logits), (out[2] if len(out) > 2 else out[1], plain)):
        assert given.dtype == dtype
        torch.testing.assert_close(given.detach().cpu().double(), wanted.detach(), rtol=0, atol=of_logits)
    assert not (out[2] if len(out) > 2 else out[1]).requires_grad

    # A random combination, so that the gradient sees every logit, and the transport with its weight in training.
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    total, wanted_total = (factors.to(out[0]) * out[0]).sum(), (factors * logits).sum()
    of_transport = 0.0
    if len(out) > 2:
        triplets = hard_triplets(x.detach(), labels, head.alpha)
        loss, active = transport_term(maps, triplets)
        of_transport = 2 * distance_error(batch.maps.dtype, maps[0, 0].numel(), maps.shape[1], 1.0, 10)
        assert out[1].shape == (1,)
        torch.testing.assert_close(out[1].detach().cpu().double(), loss.detach()[None], rtol=0, atol=of_transport)
        if len(out) == 5:
            assert [type(number) for number in out[3:]] == [int, int]
            assert out[3:] == (len(triplets), active)
        total, wanted_total = total + 10 * out[1].sum(), wanted_total + 10 * loss
    grads = torch.autograd.grad(total, [leaf.embeddings, head.kernel, leaf.maps], allow_unused=True)
    wanted = torch.autograd.grad(wanted_total, [x, weight, maps], allow_unused=True)
    # As in test_otface_loss.py: relative to the largest entry; each logit counts with its error over its scale.
    for given, expected, error in zip(grads, wanted, (of_logits, of_logits, of_transport), strict=True):
        if expected is None:
            assert given is None
            continue
        expected = expected if expected.shape == given.shape else expected.T
        atol = (10 * error + torch.finfo(batch.maps.dtype).eps) * max(expected.abs().max().item(), 1e-300)
        torch.testing.assert_close(given.cpu().double(), expected, rtol=0, atol=atol)
    return out


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_defaults(kind: type[Any], dtype: torch.dtype, seed: int, device: str) -> None:
    out = check(kind, random_batch(PEOPLE, seed=seed).to(dtype, device))
    if kind is OTFace_Arcface:
        assert 0 < out[4] < out[3]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("easy_margin", [False, True])
def test_other_settings(kind: type[Any], easy_margin: bool, device: str) -> None:
    """A margin of 1.5 takes many angles beyond pi; AMsoftmax accepts easy_margin and ignores it."""
    check(kind, random_batch(PEOPLE, seed=1).to(torch.float64, device), s=8.0, m=1.5, easy_margin=easy_margin)


@pytest.mark.parametrize("kind", [OTFace_Arcface, OTFace_AMsoftmax])
@pytest.mark.parametrize("alpha", [0.3, -0.2])
def test_alpha(kind: type[Any], alpha: float, device: str) -> None:
    """The mask of the original lets every entry through for alpha > 0; here, as in the transcription, triplets only."""
    batch = random_batch(PEOPLE).to(torch.float64, device)
    out = check(kind, batch, alpha=alpha)
    if len(out) == 5:
        assert (out[3] > check(kind, batch)[3]) == (alpha > 0)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("labels", [[2], [0, 1, 2], [1, 1], []], ids=str)
def test_batches_without_triplets(kind: type[Any], labels: list[int], device: str) -> None:
    """One person, all different, no image: the transport is exactly 0, of shape (1,), with gradient 0."""
    batch = random_batch(labels).to(torch.float64, device)
    if labels:
        check(kind, batch)
    head = head_for(kind, batch)
    maps = batch.maps.clone().requires_grad_()
    out = call(head, batch._replace(maps=maps))
    assert out[0].shape == (len(labels), 5)
    if len(out) > 2:
        assert out[1].tolist() == [0.0]
        assert out[1].device == maps.device
        assert (torch.autograd.grad(out[1].sum(), maps)[0] == 0).all()
        assert out[3:] in ((), (0, 0))


def test_epoch_and_beta(device: str) -> None:
    """A negative epoch leaves the transport out, but counts the hard triplets; beta >= 0 changes nothing."""
    batch = random_batch(PEOPLE).to(torch.float64, device)
    head = head_for(OTFace_Arcface, batch, beta=0.5)
    first, later, before = (call(head, batch, epoch) for epoch in (0, 20, -1))
    assert torch.equal(first[1], later[1])
    assert first[3:] == later[3:] == call(head_for(OTFace_Arcface, batch), batch)[3:]
    assert (before[1].tolist(), before[3:]) == ([0.0], (first[3], 0))
    assert torch.equal(before[0], first[0])
    with refused(ValueError, "OTFace_Arcface", "beta", "got -0.1"):
        OTFace_Arcface(4, 5, beta=-0.1)


def test_one_vector_of_its_class(device: str) -> None:
    """theta = 0 and pi: the gradient of the original is NaN there, by the root of 1 - cos^2."""
    head = ArcFace(3, 2).double().to(device)
    with torch.no_grad():
        head.kernel.copy_(torch.tensor([[1.0, -1.0], [2.0, -2.0], [2.0, -2.0]]))
    x = torch.tensor([[1.0, 2.0, 2.0]] * 2, device=device, dtype=torch.float64, requires_grad=True)
    logits, cosines = head(x, torch.tensor([0, 1], device=device))
    torch.testing.assert_close(cosines.cpu(), torch.tensor([[64.0, -64.0]] * 2).double())
    (grad,) = torch.autograd.grad(logits.square().sum(), x)
    assert grad.isfinite().all()
    zero = head(torch.zeros(1, 3, device=device, dtype=torch.float64), torch.tensor([0], device=device))
    assert (zero[1] == 0).all()


@pytest.mark.parametrize("kind", HEADS)
def test_checkpoints_load(kind: type[Any]) -> None:
    """Those of the original: `kernel` (d, C), and `t` (1,) in OTFace_AMsoftmax alone."""
    state = {"kernel": torch.randn(7, 5)} | ({"t": torch.zeros(1)} if kind is OTFace_AMsoftmax else {})
    head = kind(7, 5)
    assert {name: x.shape for name, x in head.state_dict().items()} == {name: x.shape for name, x in state.items()}
    assert [name for name, _ in head.named_parameters()] == ["kernel"]
    head.load_state_dict(state, strict=True)
    assert torch.equal(head.kernel, state["kernel"])


@pytest.mark.parametrize("kind", HEADS)
def test_signatures(kind: type[Any]) -> None:
    given = {name: p.default for name, p in inspect.signature(kind).parameters.items() if p.kind != p.KEYWORD_ONLY}
    assert given == SIGNATURES[kind]
    assert list(given) == list(SIGNATURES[kind])
    transport = ["conv_features"] * (kind in (OTFace_Arcface, OTFace_AMsoftmax))
    names = ["embeddings", *transport, "label", *(["epoch"] if transport else [])]
    assert list(inspect.signature(kind.forward).parameters)[1:] == names
    torch.manual_seed(0)
    head = kind(300, 200)
    assert head.kernel.std().item() == pytest.approx(0.01, rel=0.02)  # 60,000 numbers: 0.3 % is one sigma
    assert (head.in_features, head.out_features, head.s, head.m) == (300, 200, given["s"], given["m"])
    assert kind.__module__ == otface.__name__


def test_training_as_the_authors_do(device: str) -> None:
    """Cross entropy and ten times the transport, with SGD: it falls."""
    batch = random_batch(PEOPLE).to(torch.float32, device)
    head = head_for(OTFace_Arcface, batch, s=8.0)
    embeddings, maps = (x.clone().requires_grad_() for x in batch[:2])
    optimizer = torch.optim.SGD([*head.parameters(), embeddings, maps], lr=0.05)
    losses = []
    for epoch in range(10):
        logits, ot_loss, *_ = head(embeddings, maps, batch.labels, epoch)
        loss: Tensor = F.cross_entropy(logits, batch.labels) + 10 * ot_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_refused_data(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTFACE_CHECK", "1")  # on a GPU, labels are looked at only then
    batch = random_batch(PEOPLE).to(torch.float32, device)
    head = head_for(OTFace_Arcface, batch)
    with refused(TypeError, "OTFace_Arcface", "conv_features", "got None"):
        head(batch.embeddings, None, batch.labels, 0)
    with refused(ValueError, "OTFace_Arcface", "conv_features", "(8, 16, 3, 3)"):
        head(batch.embeddings, batch.maps[:-1], batch.labels, 0)
    with refused(ValueError, "OTFace_Arcface", "label", "got 5 for row 8"):
        head(batch.embeddings, batch.maps, torch.tensor([*PEOPLE[:-1], 5], device=device), 0)
    with refused(TypeError, "OTFace_Arcface", "label", "got None"):
        head(batch.embeddings, batch.maps, None, 0)
    with refused(ValueError, "OTFace_Arcface", "embeddings", "(9, 6)"):
        head(batch.embeddings[:, 1:], batch.maps, batch.labels, 0)
    with refused(TypeError, "OTFace_Arcface", "embeddings", "float64"):
        head(batch.embeddings.double(), batch.maps, batch.labels, 0)
    with refused(ValueError, "ArcFace", "in_features", "got 0"):
        ArcFace(0, 5)
    for alpha in (math.nan, "1"):
        with pytest.raises((ValueError, TypeError), match="`alpha`"):
            head_for(OTFace_Arcface, batch, alpha=alpha)(*batch[:3], 0)


@pytest.mark.parametrize("head", [OTFace_Arcface, OTFace_AMsoftmax])
def test_ignored_rows_are_in_no_triplet(head: Any) -> None:
    """Two rows of label -100 are not two images of a person."""
    batch = random_batch([-100, -100, 0, 1])
    made = head(batch.embeddings.shape[1], 5).double()
    out = made(batch.embeddings, batch.maps, batch.labels, 0)
    assert out[1].item() == 0
    assert tuple(out[3:]) in ((), (0, 0))


@pytest.mark.parametrize("head", [ArcFace, AMsoftmax, OTFace_Arcface, OTFace_AMsoftmax])
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"s": -1}, "s"), ({"s": 0}, "s"), ({"s": math.nan}, "s"), ({"m": -1}, "m"), ({"m": "a"}, "m"),
        ({"easy_margin": "x"}, "easy_margin"), ({"alpha": "a"}, "alpha"), ({"alpha": math.inf}, "alpha"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_settings_are_refused_at_once(head: Any, settings: dict[str, Any], name: str) -> None:
    if name == "alpha" and not head.__name__.startswith("OTFace"):
        pytest.skip("has no alpha")
    with pytest.raises((TypeError, ValueError), match=f"^{head.__name__}: `{name}` must be"):
        head(4, 5, **settings)


def test_a_wrong_setting_that_is_assigned() -> None:
    head = OTFace_Arcface(4, 5)
    maps, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 0, 1, 1])
    for name, value in (("s", -1.0), ("m", 4.0), ("beta", -1.0)):
        before = getattr(head, name)
        setattr(head, name, value)
        with pytest.raises(ValueError, match=f"^OTFace_Arcface: `{name}` must be"):
            head(torch.randn(4, 4), maps, labels, 0)
        setattr(head, name, before)

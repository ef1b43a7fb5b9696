"""`OTFaceLoss` against the convention of its authors' head, in float64 and one triplet at a time."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import otface_cuda
from otface_cuda import ArcFace, CosFace, OTFaceLoss, OTFaceOutput

from .margin_problems import logit_error
from .otface_problems import Batch, Official, distance_error, official_head, random_batch
from .problems import DTYPES, has_cuda_kernels, output_dtype
from .test_bad_input import Case, meta, refused, to

LABELS = {
    "people": [0, 0, 1, 1, 1, 2, 2, 3, 4],
    "one person": [2] * 4,
    "all different": [0, 1, 2, 3],
    "none": [],
    "one": [1],
    "two of one": [1, 1],
    "two": [1, 2],
}
SCALE = 16.0


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """The operations here are small."""
    threads(1)


def head(batch: Batch, **settings: Any) -> OTFaceLoss:
    weight = batch.weight
    loss = OTFaceLoss(*weight.shape, device=weight.device, dtype=weight.dtype, **{"scale": SCALE, **settings})
    with torch.no_grad():
        loss.weight.copy_(weight)
    return loss


def run(batch: Batch, **settings: Any) -> tuple[OTFaceOutput, list[Tensor]]:
    """The output, and the gradients in the embeddings, the feature map and the weight."""
    loss = head(batch, **settings)
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in batch[:2]]
    out = loss(*leaves, batch.labels)
    assert isinstance(out, OTFaceOutput)
    return out, list(torch.autograd.grad(out.loss, [*leaves, loss.weight]))


def run_official(batch: Batch, **settings: Any) -> tuple[Official, list[Tensor]]:
    leaves = [x.detach().cpu().double().requires_grad_() for x in (batch.embeddings, batch.maps, batch.weight)]
    out = official_head(Batch(leaves[0], leaves[1], batch.labels.cpu(), leaves[2]), **settings)
    return out, list(torch.autograd.grad(out.loss, leaves))


def check(batch: Batch, **settings: Any) -> OTFaceOutput:
    """Ours against the transcription, in whatever dtype the batch has."""
    settings = {"margin": ArcFace(0.45), "scale": SCALE, **settings}
    out, grads = run(batch, **settings)
    settings.pop("max_triplets", None)
    ref, expected = run_official(batch, **settings)
    dtype = batch.maps.dtype
    assert out.n_hard == ref.n_hard
    assert out.n_active == ref.n_active
    assert out.loss.dtype == output_dtype(dtype)
    # A mean of log-sum-exps has the error of a logit; the hinge has two distances.
    of_margin = 2 * logit_error(dtype, batch.embeddings.shape[1], SCALE)
    channels, cells = batch.maps.shape[1], batch.maps[0, 0].numel()
    of_transport = 2 * distance_error(dtype, cells, channels, 1.0, 10)
    for name, error in (("margin_loss", of_margin), ("ot_loss", of_transport), ("loss", of_margin + 10 * of_transport)):
        actual, wanted = getattr(out, name).detach().double().cpu(), getattr(ref, name).detach()
        torch.testing.assert_close(actual, wanted, rtol=0, atol=error, msg=lambda m, name=name: f"{name}: {m}")
    # Gradients: the relative error of the probabilities and of the plans; sums of both signs; rounded to their dtype.
    for x, y, error in zip(grads, expected, (of_margin, of_transport, of_margin), strict=True):
        assert x.dtype == dtype
        size = max(y.abs().max().item(), 1e-300)
        atol = (10 * error + torch.finfo(dtype).eps) * size
        torch.testing.assert_close(x.double().cpu(), y, rtol=0, atol=atol)
    return out


MARGINS = [ArcFace(0.45), CosFace(0.35), ArcFace(1.5)]


@pytest.mark.parametrize("margin", MARGINS, ids=str)
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.05), (0.3, -0.01), (-0.2, 0.02)])
@pytest.mark.parametrize("seed", range(3))
def test_random_batches(seed: int, alpha: float, beta: float, margin: Any, device: str) -> None:
    batch = random_batch(LABELS["people"], seed=seed).to(torch.float64, device)
    out = check(batch, margin=margin, alpha=alpha, beta=beta)
    assert out.n_active > 0
    assert out.n_active <= out.n_hard


def test_hard_triplets_are_not_all_active(device: str) -> None:
    out = check(random_batch(LABELS["people"]).to(torch.float64, device))
    assert 0 < out.n_active < out.n_hard


@pytest.mark.filterwarnings("ignore:OTFaceLoss")
@pytest.mark.parametrize("labels", [name for name in LABELS if name != "people"])
@pytest.mark.parametrize("max_triplets", [None, 3])
def test_batches_without_triplets(labels: str, max_triplets: int | None, device: str) -> None:
    """One person only, all different, no image: the transport term is exactly 0, with gradient 0."""
    batch = random_batch(LABELS[labels]).to(torch.float64, device)
    if not LABELS[labels]:  # the mean over nothing, as torch has it
        out, grads = run(batch, max_triplets=max_triplets)
        assert out.margin_loss.isnan()
        assert all((x == 0).all() or x.isnan().all() for x in grads)
    else:
        out = check(batch, max_triplets=max_triplets)
    assert (out.ot_loss, out.n_hard, out.n_active) == (0, 0, 0)
    assert (run(batch, max_triplets=max_triplets)[1][1] == 0).all()


# Rows that are ignored, and what the margin loss has besides


@pytest.mark.parametrize("ignore_index", [-100, 1])
@pytest.mark.parametrize("max_triplets", [None, 50])
def test_ignored_rows_are_no_person(max_triplets: int | None, ignore_index: int, device: str) -> None:
    """Loss, numbers and gradients are those of the batch without them, whose own gradients are zero."""
    batch = random_batch([0, ignore_index, 0, 2, ignore_index, 2, 3, ignore_index, 4]).to(torch.float64, device)
    settings = {"ignore_index": ignore_index, "max_triplets": max_triplets, "margin": ArcFace(0.45), "scale": SCALE}
    kept = batch.labels != ignore_index
    out, grads = run(batch, **settings)
    without = Batch(batch.embeddings[kept], batch.maps[kept], batch.labels[kept], batch.weight)
    expected, of_kept = run(without, **settings)
    assert out.n_hard > 0
    assert (out.n_hard, out.n_active) == (expected.n_hard, expected.n_active)
    # Of the hinge's terms, only the order may differ.
    for x, y in zip(out[:3], expected[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=0)
    for x, y in zip(grads[:2], of_kept[:2], strict=True):
        torch.testing.assert_close(x[kept], y, rtol=1e-12, atol=1e-14)
        assert (x[~kept] == 0).all()
    torch.testing.assert_close(grads[2], of_kept[2], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("max_triplets", [None, 3])
def test_two_ignored_rows_are_no_pair(max_triplets: int | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTFACE_CHECK", "1")  # on a GPU, labels are looked at only then
    batch = random_batch([-100, -100, 0]).to(torch.float32, device)
    with pytest.warns(UserWarning, match="here each has one of its own"):
        out, grads = run(batch, max_triplets=max_triplets)
    assert (out.n_hard, out.n_active, out.ot_loss) == (0, 0, 0)
    assert (grads[1] == 0).all()


def test_settings_of_the_margin_loss(device: str) -> None:
    batch = random_batch([0, 0, 1, -7, 2]).to(torch.float64, device)
    u = torch.linspace(0.5, 2, len(batch.weight), dtype=torch.float64, device=device)
    settings = {"ignore_index": -7, "label_smoothing": 0.2, "class_weight": u}
    loss = OTFaceLoss(*batch.weight.shape, scale=8.0, dtype=torch.float64, device=device, **settings)
    expected = otface_cuda.margin_softmax_loss(
        batch.embeddings, loss.weight, batch.labels, margin=ArcFace(0.45), scale=8.0, **settings
    )
    assert torch.equal(loss(*batch[:3]).margin_loss, expected)
    assert list(loss.state_dict()) == ["weight"]
    assert [name for name, _ in loss.named_buffers()] == ["class_weight"]


# Batches in which no triplet is possible


@pytest.mark.parametrize("max_triplets", [None, 3])
@pytest.mark.parametrize(
    ("labels", "what"),
    [([0, 1, 2, -100], "here each has one of its own"), ([1, 1, -100, 1], "here all are of one")],
)
def test_a_note_that_there_is_no_triplet(
    labels: list[int], what: str, max_triplets: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the line that calls, which it points at; by the standard filters."""
    monkeypatch.setenv("OTFACE_CHECK", "1")
    batch = random_batch(labels).to(torch.float32, device)
    loss = OTFaceLoss(5, 7, max_triplets=max_triplets, device=device)
    net = nn.ModuleList([loss])  # any module between
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            net[0](*batch[:3])
        net[0](*batch[:3])
    assert [str(w.message).endswith(what) for w in caught] == [True, True]
    assert [w.filename for w in caught] == [__file__] * 2
    assert caught[1].lineno == caught[0].lineno + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.ot_weight = 0.0
        loss(*batch[:3])
        if has_cuda_kernels(device):  # there it would wait
            loss.ot_weight = 1.0
            monkeypatch.delenv("OTFACE_CHECK")
            loss(*batch[:3])


def test_no_note_where_triplets_are_possible(device: str) -> None:
    """None of them is hard here."""
    batch = random_batch([0, 0, 1]).to(torch.float32, device)
    batch.embeddings[1] = batch.embeddings[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(batch)[0].n_hard == 0


@pytest.mark.parametrize("alpha", [0.0, 1e-6])
def test_ties(alpha: float, device: str) -> None:
    """Embeddings of +-1 whose cosines are exact: equal ones are hard for any alpha > 0 only."""
    batch = random_batch([0, 0, 1, 2, 3])
    exact = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, 1], [-1, -1, -1, -1], [1, 1, 1, 1]])
    batch = batch._replace(embeddings=exact.double(), weight=batch.weight[:, :4])
    out = check(batch.to(torch.float64, device), alpha=alpha)
    assert out.n_hard == (3 if alpha else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, device: str) -> None:
    check(random_batch(LABELS["people"], seed=1).to(dtype, device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_layouts(dtype: torch.dtype, device: str) -> None:
    batch = random_batch(LABELS["people"], seed=1).to(dtype, device)
    check(batch._replace(maps=batch.maps.contiguous(memory_format=torch.channels_last)))
    check(batch._replace(maps=batch.maps.repeat_interleave(2, 2)[:, :, ::2]))
    check(batch._replace(embeddings=batch.embeddings.T.contiguous().T))


def test_max_triplets(device: str) -> None:
    """Room for exactly as many or for more changes nothing; room for fewer takes the hardest."""
    batch = random_batch(LABELS["people"], seed=2).to(torch.float64, device)
    everyone = int(check(batch).n_hard)
    for count in (everyone, everyone + 1, 4 * everyone):
        assert check(batch, max_triplets=count).n_hard == everyone
    out, grads = run(batch, max_triplets=5)
    triplets = otface_cuda.mine_hard_triplets(batch.embeddings, batch.labels, max_triplets=5)
    leaf = batch.maps.clone().requires_grad_()
    expected = otface_cuda.ot_triplet_loss(leaf, triplets)
    assert (out.n_hard, out.n_active) == (5, expected.n_active)
    assert torch.equal(out.ot_loss, expected.loss)
    torch.testing.assert_close(grads[1], torch.autograd.grad(10 * expected.loss, leaf)[0], rtol=1e-14, atol=0)


def test_is_the_functions(device: str) -> None:
    """Every setting reaches the function that it belongs to."""
    batch = random_batch(LABELS["people"], seed=3).to(torch.float32, device)
    settings: dict[str, Any] = {"eps": 0.3, "n_iter": 4, "beta": 0.03, "metric": "sqeuclidean"}
    loss = head(batch, margin=CosFace(0.2), scale=7.0, ot_weight=2.5, alpha=0.1, max_triplets=20, **settings)
    out = loss(batch.embeddings, batch.maps, batch.labels)
    margin_loss = otface_cuda.margin_softmax_loss(
        batch.embeddings, loss.weight, batch.labels, margin=CosFace(0.2), scale=7.0
    )
    triplets = otface_cuda.mine_hard_triplets(batch.embeddings, batch.labels, 0.1, 20)
    transport = otface_cuda.ot_triplet_loss(batch.maps, triplets, **settings)
    assert torch.equal(out.margin_loss, margin_loss)
    assert out[2:] == transport
    assert torch.equal(out.loss, margin_loss + 2.5 * transport.loss)


def test_weight_of_zero_leaves_the_transport_out(device: str) -> None:
    batch = random_batch(LABELS["people"]).to(torch.float64, device)
    batch.maps[0] = math.nan
    loss = head(batch, ot_weight=0.0)
    out = loss(batch.embeddings, batch.maps, batch.labels)
    assert torch.equal(out.loss, out.margin_loss)
    assert (out.ot_loss, out.n_hard, out.n_active) == (0, 0, 0)
    out.loss.backward()
    assert loss.weight.grad.isfinite().all()


def test_parts_can_be_logged_and_differentiated(device: str) -> None:
    batch = random_batch(LABELS["people"]).to(torch.float64, device)
    loss, maps = head(batch), batch.maps.requires_grad_()
    out = loss(batch.embeddings, maps, batch.labels)
    assert isinstance(out.n_hard.item(), int)
    out.ot_loss.backward(retain_graph=True)
    assert loss.weight.grad is None
    assert maps.grad.abs().max() > 0
    out.margin_loss.backward()
    assert loss.weight.grad is not None


def test_poisoned_input_is_loud(device: str) -> None:
    """NaN in an embedding, in a map that a triplet names, in a class."""
    batch = random_batch(LABELS["people"]).to(torch.float64, device)
    hard = otface_cuda.mine_hard_triplets(batch.embeddings, batch.labels)
    for name, row in (("embeddings", 0), ("maps", int(hard[0, 1])), ("weight", 1)):
        bad = batch._replace(**{name: getattr(batch, name).clone()})
        getattr(bad, name)[row].view(-1)[2] = math.nan
        assert run(bad)[0].loss.isnan()


def test_nothing_is_modified(device: str) -> None:
    batch = random_batch(LABELS["people"]).to(torch.float64, device)
    before = [x.clone() for x in batch]
    run(batch)
    for x, y in zip(batch, before, strict=True):
        assert torch.equal(x, y)


def test_gradcheck(device: str) -> None:
    """Of the whole loss in float64: no hinge and no comparison of cosines is within a difference quotient of a tie."""
    batch = random_batch([0, 0, 1, 2], size=4, channels=5, side=2, classes=3, seed=1).to(torch.float64, device)
    loss = head(batch, scale=4.0)
    leaves = [x.clone().requires_grad_() for x in (*batch[:2], batch.weight)]

    def total(embeddings: Tensor, maps: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(loss, {"weight": weight}, (embeddings, maps, batch.labels)).loss

    assert run(batch)[0].n_active > 0
    # A difference of forward values has 1e-15 / 1e-6 of noise, the step an error of 1e-12.
    assert torch.autograd.gradcheck(total, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("max_triplets", [None, 30])
def test_compiled(max_triplets: int | None, device: str) -> None:
    """As one graph with `max_triplets`; without it the graph breaks, and the result is the same."""
    batch = random_batch(LABELS["people"], seed=1).to(torch.float32, device)
    loss = head(batch, max_triplets=max_triplets)
    compiled = torch.compile(loss, fullgraph=max_triplets is not None, backend="aot_eager")
    results = []
    for module in (loss, compiled):
        leaves = [x.clone().requires_grad_() for x in batch[:2]]
        out = module(*leaves, batch.labels)
        results.append((*(x.detach() for x in out), *torch.autograd.grad(out.loss, [*leaves, loss.weight])))
    assert results[0][4] > 0
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_for_any_batch(device: str) -> None:
    batch = random_batch(LABELS["people"], seed=1).to(torch.float32, device)
    loss = head(batch, max_triplets=30)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (9, 7, 5):
        part = [x[:count] for x in batch[:3]]
        assert all(torch.equal(x, y) for x, y in zip(compiled(*part), loss(*part), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype: torch.dtype, device: str) -> None:
    """As in training: the network's outputs come in a half type, the class weights are float32; so is the loss."""
    batch = random_batch(LABELS["people"], seed=1).to(dtype, device)
    loss = head(batch.to(torch.float32, device))
    leaves = [x.clone().requires_grad_() for x in batch[:2]]
    with torch.autocast(device, dtype=dtype):
        out = loss(*leaves, batch.labels)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert [x.grad.dtype for x in (*leaves, loss.weight)] == [dtype, dtype, torch.float32]
    ref, expected = run_official(batch._replace(weight=loss.weight.detach()), margin=ArcFace(0.45), scale=SCALE)
    assert (out.n_hard, out.n_active) == (ref.n_hard, ref.n_active)
    # The logits are products in the half type of unit vectors; twice their size, for the two signs of a difference.
    error = 2 * SCALE * torch.finfo(dtype).eps
    torch.testing.assert_close(out.loss.double().cpu(), ref.loss.detach(), rtol=0, atol=error)
    for x, y in zip((*leaves, loss.weight), expected, strict=True):
        torch.testing.assert_close(x.grad.double().cpu(), y, rtol=0, atol=2 * error * y.abs().max().item())


class Net(nn.Module):
    """A network with both outputs, and the loss at its end, as DistributedDataParallel needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.embed = nn.Conv2d(3, 8, 3), nn.Linear(8 * 9, 6)
        self.loss = OTFaceLoss(4, 6, scale=SCALE)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        maps = self.features(images)
        return self.loss(self.embed(maps.flatten(1)), maps, labels).loss


IMAGES = torch.rand(12, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OF_IMAGES = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 1, 1, 2, 2])


def train_on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)  # DistributedDataParallel hands out the parameters of rank 0
    net = nn.parallel.DistributedDataParallel(Net().double())
    net(IMAGES[6 * rank : 6 * rank + 6], OF_IMAGES[6 * rank : 6 * rank + 6]).backward()
    torch.save({name: p.grad for name, p in net.module.named_parameters()}, f"{folder}/{rank}.pt")
    del net  # it holds threads of the group, and no process may leave while another is at work: one was seen to abort
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_distributed_training(tmp_path: Path) -> None:
    """Two processes, each with half of the batch: both get the mean of the gradients of the halves."""
    torch.multiprocessing.spawn(train_on_a_rank, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    net = Net().double()
    for part in (slice(0, 6), slice(6, 12)):
        (net(IMAGES[part], OF_IMAGES[part]) / 2).backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f"{rank}.pt")
        for name, p in net.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-12, atol=1e-14)


# The module


def test_defaults_are_those_of_the_functions() -> None:
    of_module = inspect.signature(OTFaceLoss).parameters
    for function in (otface_cuda.ot_triplet_loss, otface_cuda.mine_hard_triplets):
        for name, parameter in inspect.signature(function).parameters.items():
            if name in of_module and name != "ignore_index":  # mining may have none
                assert of_module[name].default == parameter.default
                assert of_module[name].annotation == parameter.annotation
    of_margin = inspect.signature(otface_cuda.MarginSoftmaxLoss).parameters
    for name in ("ignore_index", "label_smoothing", "class_weight"):
        assert of_module[name] == of_margin[name]
    defaults = {name: p.default for name, p in of_module.items()}
    assert (defaults["margin"], defaults["scale"], defaults["ot_weight"]) == (ArcFace(0.45), 64.0, 10.0)


def test_state_copies_and_representation() -> None:
    loss = OTFaceLoss(5, 7, margin=CosFace(0.35), max_triplets=8, alpha=0.1)
    assert list(loss.state_dict()) == ["weight"]
    text = "OTFaceLoss(num_classes=5, embedding_size=7, margin=CosFace(m=0.35), scale=64.0, ot_weight=10.0, "
    assert repr(loss).startswith(text)
    batch = random_batch(LABELS["people"]).to(torch.float32)
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(copied) == repr(loss)
        assert torch.equal(copied(*batch[:3]).loss, loss(*batch[:3]).loss)
    assert OTFaceLoss(5, 7, device="meta").weight.device.type == "meta"
    assert loss.double().weight.dtype == torch.float64


N = 9
NUMBER = {
    "nan": Case(math.nan, ValueError, "got nan"),
    "inf": Case(math.inf, ValueError, "got inf"),
    "bool": Case(True, TypeError, "got True"),
    "string": Case("1", TypeError, "got '1'"),
    "tensor": Case(torch.tensor(1.0), TypeError, "float32 tensor"),
    "none": Case(None, TypeError, "got None"),
}
POSITIVE = NUMBER | {"zero": Case(0.0, ValueError, "got 0.0"), "negative": Case(-1.0, ValueError, "got -1.0")}
SETTINGS: dict[str, dict[str, Case]] = {
    "num_classes": {"zero": Case(0, ValueError, "got 0"), "float": Case(5.0, TypeError, "got 5.0")},
    "embedding_size": {"zero": Case(0, ValueError, "got 0"), "none": Case(None, TypeError, "got None")},
    "margin": {"float": Case(0.5, TypeError, "got 0.5")},
    "scale": POSITIVE,
    "ot_weight": NUMBER | {"negative": Case(-1.0, ValueError, "got -1.0")},
    "eps": POSITIVE,
    "n_iter": {"zero": Case(0, ValueError, "got 0"), "float": Case(1.0, TypeError, "got 1.0")},
    "alpha": NUMBER,
    "beta": NUMBER,
    "max_triplets": {"zero": Case(0, ValueError, "got 0"), "float": Case(1.0, TypeError, "got 1.0")},
    "metric": {"unknown": Case("l1", ValueError, "got 'l1'")},
    "ignore_index": {"float": Case(-1.0, TypeError, "got -1.0")},
    "label_smoothing": {"more than 1": Case(1.5, ValueError, "got 1.5")},
    "class_weight": {
        "too few": Case(torch.ones(4), ValueError, "(4,)"),
        "negative": Case(-torch.ones(5), ValueError, "got -1.0 for class 0"),
    },
}
DATA: dict[str, tuple[str, dict[str, Case]]] = {
    "embeddings": (
        "OTFaceLoss",
        {"list": Case([[1.0]], TypeError, "list"), "none": Case(None, TypeError, "got None")},
    ),
    "x": (  # the embeddings, as margin_softmax_loss calls them
        "margin_softmax_loss",
        {
            "vector": Case(torch.rand(N), ValueError, "(9,)"),
            "int": Case(torch.ones(N, 7, dtype=torch.int64), TypeError, "int64"),
        },
    ),
    "feature_map": (
        "OTFaceLoss",
        {
            "too few": Case(torch.rand(N - 1, 4, 2, 2), ValueError, "(8, 4, 2, 2)"),
            "no dimension": Case(torch.tensor(1.0), ValueError, "()"),
            "array": Case(np.ones((N, 4, 4)), TypeError, "ndarray"),
            "none": Case(None, TypeError, "got None"),
        },
    ),
    "labels": (
        "margin_softmax_loss",
        {
            "too large": Case(torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 5]), ValueError, "got 5 for row 8"),
            "float": Case(torch.zeros(N), TypeError, "float32"),
            "none": Case(None, TypeError, "got None"),
            "other device": Case(meta(N, dtype=torch.int64), ValueError, "meta"),
        },
    ),
}


def cases_of(table: dict[str, tuple[str, dict[str, Case]]]) -> list[Any]:
    return [
        pytest.param(where, name, case, id=f"{name}-{kind}")
        for name, (where, some) in table.items()
        for kind, case in some.items()
    ]


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}-{kind}") for name, some in SETTINGS.items() for kind, case in some.items()],
)
def test_refused_settings(name: str, case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the constructor, and when they are assigned, which leaves the setting as it was."""
    monkeypatch.setenv("OTFACE_CHECK", "1")
    arguments = {"num_classes": 5, "embedding_size": 7, name: to(case.value, device)}
    with refused(case.error, "OTFaceLoss", name, case.came):
        OTFaceLoss(device=device, **arguments)
    if name not in ("num_classes", "embedding_size"):
        loss = OTFaceLoss(5, 7, device=device)
        before = getattr(loss, name)
        with refused(case.error, "OTFaceLoss", name, case.came):
            setattr(loss, name, to(case.value, device))
        assert getattr(loss, name) is before


@pytest.mark.parametrize(("where", "name", "case"), cases_of(DATA))
def test_refused_data(where: str, name: str, case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTFACE_CHECK", "1")
    batch = random_batch(LABELS["people"]).to(torch.float32, device)
    arguments = {"embeddings": batch.embeddings, "feature_map": batch.maps, "labels": batch.labels}
    arguments["embeddings" if name == "x" else name] = to(case.value, device)
    with refused(case.error, where, name, case.came):
        OTFaceLoss(5, 7, device=device)(**arguments)


def test_every_argument_has_its_cases() -> None:
    settings = inspect.signature(OTFaceLoss).parameters.keys() - {"device", "dtype"}
    assert SETTINGS.keys() == settings
    assert DATA.keys() - {"x"} == inspect.signature(OTFaceLoss.forward).parameters.keys() - {"self"}


def test_the_note_comes_once_whatever_the_size() -> None:
    loss = OTFaceLoss(9, 4)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for size in (2, 3, 4):
            loss(torch.randn(size, 4), torch.randn(size, 3, 2, 2), torch.arange(size))
    assert len(shown) == 1

"""The logic of the benchmark: what it computes, how it prints it, and that every peer is given the same problem."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

import otface_cuda
from otface_cuda.kernels import Kernel
from otface_cuda.reference import sinkhorn_reference

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_sinkhorn as bench
import faces
import harness
import measure
import peers
import plot
import problems
import readme_table
import roofline
from problems import Row

SMALL = Row(3, 7, 9, 0.1, 12)


@pytest.fixture(params=[False, True], ids=["forward", "backward"])
def problem(request: pytest.FixtureRequest) -> problems.Problem:
    return problems.make_problem(Row(3, 9, 9, 0.1, 12, backward=request.param), "cpu")


# ---- answers ----


def test_float64_answer_is_the_reference(problem):
    answer = problems.solve_float64(problem)
    cost = problem.cost.double().requires_grad_()
    expected = sinkhorn_reference(cost, problem.row.eps, max_iter=problem.row.iterations, return_plan=True)
    torch.testing.assert_close(answer.plan, expected.plan.detach())
    torch.testing.assert_close(answer.transport_cost, expected.transport_cost.detach())
    if problem.row.backward:
        (gradient,) = torch.autograd.grad(expected.transport_cost.sum(), cost)
        torch.testing.assert_close(answer.gradient, gradient)


@pytest.mark.parametrize("peer", [peers.OURS, *peers.PEERS.values()], ids=lambda peer: peer.name)
def test_every_peer_solves_the_same_problem(peer, problem):
    if not peer.installed or "cpu" not in peer.devices:
        pytest.skip(f"{peer.name} does not run here")
    if peer.cannot(problem.row, "cpu"):
        pytest.skip(peer.cannot(problem.row, "cpu"))
    result = peer.prepare(problem)()
    if peer.own_schedule:
        f, g = peer.read(problem, result)
        assert problems.potentials_error(problem, f, g) < 0.3
    else:
        difference = problems.largest_difference(peer.read(problem, result), problems.solve_float64(problem))
        assert max(difference.values()) < 1e-4


def test_iterations_to_reach_is_the_fewest():
    problem = problems.make_problem(SMALL, "cpu")

    def error(iterations: int) -> float:
        out = peers.OURS.prepare_points(problem, iterations)()
        return problems.potentials_error(problem, out.f, out.g)

    found = bench.iterations_to_reach(problem, error(6))
    assert error(found) <= error(6)
    assert found == 1 or error(found - 1) > error(6)


def test_an_error_that_is_not_reached():
    problem = problems.make_problem(Row(1, 4, 5, 0.1, 1), "cpu")
    assert bench.iterations_to_reach(problem, -1.0, most=4) is None


def test_error_of_plan_and_of_potentials_agree():
    problem = problems.make_problem(SMALL, "cpu")
    out = sinkhorn_reference(problem.cost, 0.1, max_iter=3, return_plan=True)
    error = problems.plan_error(out.plan)
    assert error == pytest.approx(float(out.error.mean()), rel=1e-6)
    assert problems.potentials_error(problem, out.f, out.g) == pytest.approx(error, rel=1e-4)


def test_largest_difference_is_relative_to_the_largest_entry():
    exact = problems.Answer(torch.tensor([2.0]), torch.tensor([[[4.0, 0.0]]]))
    answer = problems.Answer(torch.tensor([2.2]), torch.tensor([[[4.0, 1.0]]]))
    difference = problems.largest_difference(answer, exact)
    assert difference["transport_cost"] == pytest.approx(0.1)
    assert difference["plan"] == pytest.approx(0.25)


# ---- time, memory, limits ----


def test_quartiles():
    assert measure.quartiles([3.0]) == (3, 3, 3)
    assert measure.quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert measure.quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (2, 3, 4)


def test_interleaving_gives_everyone_the_least_and_ours_more():
    order = []
    ours, peer = (measure.Contender(lambda name=name: order.append(name)) for name in ("ours", "peer"))
    measure.interleave(ours, [peer], measure.Clock("cpu"), budget=0.0, least=5)
    assert len(peer.samples) >= 5
    assert len(ours.samples) >= len(peer.samples)
    assert "peer" in order[: len(order) // 2]  # and not one after the other


def test_peak_memory_sees_an_allocation():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    peak = measure.peak_memory_cpu(allocating_work, 2**25)
    assert abs(peak - 2**25) < 2 * measure.MEMORY_RESOLUTION


def allocating_work(size: int):
    return (lambda: torch.ones(8)), (lambda: lambda: torch.ones(size, dtype=torch.uint8))


def test_peak_memory_of_a_child_that_dies_is_unknown():
    assert measure.peak_memory_cpu(dying_work) is None


def dying_work():
    raise SystemExit(0)


def test_other_programs_are_told_from_ourselves():
    if not Path("/proc/stat").exists():
        pytest.skip("needs Linux's /proc")
    with measure.OtherPrograms() as idle:
        time.sleep(0.3)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with measure.OtherPrograms() as disturbed:
            time.sleep(1.0)
    finally:
        busy.kill()
        busy.wait()
    assert idle.cpus >= 0
    assert disturbed.cpus > 0.3


def test_work_counts_multiply_adds():
    assert roofline.work(SMALL) == {"flops": 3 * 12 * 4 * 7 * 9, "bytes": 3 * 12 * 4 * 7 * 9}
    backward = Row(3, 7, 9, 0.1, 12, backward=True)
    assert roofline.work(backward)["flops"] == 3 * roofline.work(SMALL)["flops"]


def test_the_limit_follows_from_the_size_of_one_problem():
    large = Row(1, 2048, 2048, 0.05, 100)
    bytes_of_k = 4 * 2048 * 2048
    limits = {"matmul_flops": 1e9, "read_bytes_per_s": {str(bytes_of_k): 1e9}}
    on_chip = 100 * 3 * 12 * 4 * 7 * 9 / 1e9
    assert roofline.percentage(SMALL, 1.0, limits, "cpu") == {"percent": pytest.approx(on_chip), "of": "matmul"}
    streamed = bytes_of_k / 1e7
    assert roofline.percentage(large, 100.0, limits, "cpu") == {"percent": pytest.approx(streamed), "of": "read"}


def test_the_best_limits_count():
    assert roofline.best({"a": 1, "b": {"x": 4}}, {"a": 2, "b": {"x": 3}}) == {"a": 2, "b": {"x": 4}}


# ---- on a GPU, as far as that can be seen without one ----


class Cuda(TorchFunctionMode):
    """Puts what is meant for a GPU on the CPU, and stands in for the parts of torch.cuda that the benchmark uses."""

    def __init__(self):
        super().__init__()
        self.happened: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == "zero_":
            self.happened.append(f"overwrite {args[0].numel()}")
        args = tuple("cpu" if isinstance(a, str) and a == "cuda" else a for a in args)
        kwargs = {
            key: "cpu" if isinstance(value, str) and value == "cuda" else value for key, value in (kwargs or {}).items()
        }
        return function(*args, **kwargs)

    def event(self, enable_timing: bool):
        assert enable_timing
        event = SimpleNamespace(synchronize=lambda: self.happened.append("wait"))

        def record():
            self.happened.append("event")
            event.at = time.perf_counter()

        event.record = record
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


@pytest.fixture
def cuda(monkeypatch):
    mode = Cuda()
    properties = SimpleNamespace(
        L2_cache_size=2**14, multi_processor_count=132, total_memory=2**37, shared_memory_per_block_optin=3000
    )
    stand_ins = {
        "is_available": lambda: True,
        "Event": mode.event,
        "synchronize": lambda: mode.happened.append("synchronize"),
        "get_device_properties": lambda _: properties,
        "get_device_name": lambda _: "NVIDIA H200",
        "get_device_capability": lambda _: (9, 0),
        "mem_get_info": lambda: (2**20, 2**37),
        "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 1512,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def kernel_for(n: int, m: int, *, batch: int, device: str, grad: str | None = None) -> Kernel:
        assert device == "cuda"
        return Kernel(grad or "solve", "NVIDIA H200", "shared" if n * m < 1000 else "stream", "", 512)

    monkeypatch.setattr(otface_cuda, "kernel_for", kernel_for)
    monkeypatch.setattr(roofline, "MATRIX", 16)
    with mode:
        yield mode


def test_device_events_with_a_cold_cache_and_the_host_ahead(cuda):
    clock = measure.Clock("cuda")
    cuda.happened.clear()
    seconds = clock.time(lambda: (cuda.happened.append("call"), time.sleep(0.01)))
    assert 0.01 <= seconds < 0.1
    first = cuda.happened.index("event")
    assert set(cuda.happened[:first]) == {"overwrite 32768"}  # twice the cache, and nothing that the host waits for
    assert cuda.happened[first:] == ["event", "call", "event", "wait"]


def test_wall_time_on_a_gpu_is_that_of_a_call_alone(cuda):
    clock = measure.Clock("cuda")
    cuda.happened.clear()
    assert clock.time(lambda: cuda.happened.append("call"), wall=True) < 0.1
    first = cuda.happened.index("synchronize")
    assert set(cuda.happened[:first]) == {"overwrite 32768"}
    assert cuda.happened[first:] == ["synchronize", "call", "synchronize"]


def test_the_gpu_is_busy_for_a_while_before_a_call(cuda):
    clock = measure.Clock("cuda")
    begin = time.perf_counter()
    clock._overwrite()
    assert time.perf_counter() - begin > measure.HEAD_START_SECONDS / 4


def test_limits_on_a_gpu(cuda):
    on_chip, in_l2, in_memory = Row(50, 20, 30, 0.1, 5), Row(1, 40, 60, 0.1, 5), Row(2, 40, 60, 0.1, 5)
    torch.set_float32_matmul_precision("high")
    limits = roofline.measure([on_chip, in_l2, in_memory], "cuda")
    assert torch.get_float32_matmul_precision() == "highest"  # the matrix product uses no TensorFloat-32
    assert limits["matmul_flops"] > 0
    assert limits["copy_bytes_per_s"] > 0
    assert limits["on_chip_bytes"] == 3000
    assert roofline.percentage(on_chip, 1.0, limits, "cuda")["of"] == "matmul"
    assert roofline.percentage(in_l2, 1.0, limits, "cuda") is None
    percent = 100 * 5 * 2 * 4 * 40 * 60 / limits["copy_bytes_per_s"]
    assert roofline.percentage(in_memory, 1.0, limits, "cuda") == {"percent": pytest.approx(percent), "of": "copy"}
    points = Row(1, 100, 100, 0.1, 5, from_points=True)
    assert roofline.percentage(points, 1.0, limits, "cuda")["of"] == "copy"


def test_rows_for_a_gpu():
    rows = problems.ROWS["cuda"]
    assert {(row.batch, row.n, row.iterations, row.backward) for row in rows} >= {
        (4096, 49, 100, False),
        (4096, 49, 10, False),
        (4096, 49, 100, True),
        (4096, 49, 10, True),
        (8, 2048, 100, False),
        (1, 10_000, 100, False),
        (1, 50_000, 100, False),
    }
    assert all(row.from_points == (row.n >= 10_000) for row in rows)


@pytest.fixture
def cuda_result(cuda, monkeypatch) -> dict:
    rows = [Row(3, 9, 9, 0.1, 5), Row(3, 9, 9, 0.1, 5, backward=True), Row(2, 40, 60, 0.1, 5, from_points=True)]
    monkeypatch.setattr(problems, "ROWS", {"cuda": rows})
    monkeypatch.setattr(bench, "ROWS", {"cuda": rows})
    monkeypatch.setattr(bench, "ROW_SECONDS", 0.0)
    broken = peers.TorchScaling()
    monkeypatch.setattr(broken, "prepare", lambda problem: torch.empty(0).view(3))
    monkeypatch.setitem(peers.PEERS, "torch-scaling", broken)
    return bench.run(bench.parse(["--device", "cuda", "--peers", "torch-loop,torch-scaling"]))


def test_the_whole_run_for_a_gpu(cuda_result, tmp_path):
    again = json.loads(json.dumps(cuda_result))
    assert again == cuda_result
    assert cuda_result["device_name"] == "NVIDIA H200"
    assert cuda_result["gpu"]["multiprocessors"] == 132
    assert [row["limit"]["of"] for row in cuda_result["rows"]] == ["matmul", "matmul", "copy"]
    for row in cuda_result["rows"]:
        assert row["ours"]["peak_bytes"] == 512
        assert row["ours"]["wall_seconds"]["median"] > 0
        assert [k["task"] for k in row["kernels"]] == (["solve", "unrolled"] if row["backward"] else ["solve"])
        loop, scaling = row["peers"]
        assert ("seconds" in loop) != row["from_points"]
        assert "seconds" not in scaling
    assert cuda_result["rows"][0]["peers"][1]["cannot"] == "fails in this row: RuntimeError"
    text = bench.table(cuda_result)
    assert text.startswith("NVIDIA H200, 132 multiprocessors, torch ")
    assert "device events, cold L2" in text
    assert text.count("made and waited for alone") == 3
    assert text.count(", shared kernel, shared kernel; ours") == text.count(", stream kernel; ours") == 1
    assert "NVIDIA H200, 132 multiprocessors, commit" in readme_table.render(cuda_result)


# ---- faces ----


def test_descriptors_are_unit_vectors_of_the_cells():
    images = torch.rand(4, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    found = faces.descriptors(images)
    assert found.shape == (4, 49, 35)
    torch.testing.assert_close(found.norm(dim=2), torch.ones(4, 49))
    changed = images.clone()
    changed[:, :, 48:64, 48:64] = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    difference = (faces.descriptors(changed) - found).abs().amax((0, 2)).view(7, 7)
    assert difference[3, 3] == difference.max()  # the cell in the middle
    assert difference[0, 0] < 0.05 * difference[3, 3]  # a far one sees no more than the mean colour


def test_descriptors_know_direction():
    ramp = torch.linspace(0, 1, 112).expand(112, 112)
    images = torch.stack([ramp, ramp.T, ramp.flip(1)])[:, None].expand(3, 3, 112, 112)
    across, down, back = faces.descriptors(images)[:, 24]
    assert across @ down < 0.5
    assert across @ back < 0.5


def test_descriptors_of_flat_images_are_finite():
    assert faces.descriptors(torch.full((2, 3, 112, 112), 0.5)).isfinite().all()


def test_pairs_are_half_of_one_person():
    people = {"a": ["a/1", "a/2", "a/3"], "b": ["b/1"], "c": ["c/1", "c/2"]}
    pairs = faces.choose_pairs(people, 20)
    same = [first[0] == second[0] for first, second in pairs]
    assert same == [True] * 10 + [False] * 10
    assert all(first != second for first, second in pairs)
    assert pairs == faces.choose_pairs(people, 20)
    assert pairs != faces.choose_pairs(people, 20, seed=1)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    draw = numpy.random.default_rng(0)
    for person in "abc":
        (tmp_path / "tree" / person).mkdir(parents=True)
        for number in range(2):
            pixels = draw.integers(0, 256, (90, 80, 3), dtype=numpy.uint8)
            image.fromarray(pixels).save(tmp_path / "tree" / person / f"{number}.png")
    return tmp_path / "tree"


def test_a_folder_and_a_tar_of_it_give_the_same_points(tree):
    with tarfile.open(tree.parent / "tree.tar", "w") as tar:
        tar.add(tree, "tree")
    (x, y), facts = faces.face_points(tree, 6)
    (tar_x, tar_y), tar_facts = faces.face_points(tree.parent / "tree.tar", 6)
    assert x.shape == y.shape == (6, 49, 35)
    assert torch.equal(x, tar_x)
    assert torch.equal(y, tar_y)
    assert facts == tar_facts


def test_unusable_faces_are_one_sentence(tree):
    (tree / "text").write_text("no image")
    with pytest.raises(faces.FacesError, match="must be a folder of one folder per person"):
        faces.face_points(tree / "text", 2)
    (tree / "empty").mkdir()
    with pytest.raises(faces.FacesError, match="holds no image of the form"):
        faces.face_points(tree / "empty", 2)
    with pytest.raises(faces.FacesError, match="at least two people"):
        faces.choose_pairs({"a": ["a/1", "a/2"]}, 2)
    for broken in tree.glob("*/*.png"):
        broken.write_bytes(b"no image")
    with pytest.raises(faces.FacesError, match=r"\d.png is not an image that pillow can read"):
        faces.face_points(tree, 2)


# ---- what is printed and written ----


@pytest.mark.parametrize(
    ("value", "text"), [(0.0571, "0.057"), (0.57, "0.57"), (5.71, "5.7"), (57.1, "57"), (5712.0, "5712"), (0, "0")]
)
def test_significant(value, text):
    assert harness.significant(value) == text


def test_cells():
    assert harness.time_cell({"median": 0.0123456, "quartiles": [0.0121, 0.0201]}) == "12.3 (12.1-20.1)"
    assert harness.megabytes(None) == "-"
    assert harness.megabytes(1.26e6) == "1.3"
    assert harness.megabytes(268.4e6) == "268"


@pytest.fixture(scope="module")
def result() -> dict:
    options = bench.parse(["--quick", "--peers", "torch-loop"])
    rows = {"cpu": [SMALL, Row(2, 8, 8, 0.1, 5, backward=True)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "quick_rows", rows.get)
        return bench.run(options)


def test_json_says_what_is_needed_and_no_path(result):
    again = json.loads(json.dumps(result))
    assert again == result
    assert {"commit", "dirty", "torch", "device_name", "cpu", "threads", "info", "limits", "rows"} <= set(result)
    assert result["info"]["cpu_isa"] in ("baseline", "avx2", "avx512")
    row = result["rows"][0]
    assert (row["batch"], row["n"], row["m"], row["iterations"]) == (3, 7, 9, 12)
    assert row["work"] == roofline.work(SMALL)
    for entry in (row["ours"], *row["peers"]):
        low, high = entry["seconds"]["quartiles"]
        assert low <= entry["seconds"]["median"] <= high
        assert entry["seconds"]["repetitions"] >= 3
    text = json.dumps(result)
    assert str(Path.cwd()) not in text
    assert str(Path.home()) not in text


def test_table_is_aligned_and_complete(result):
    lines = bench.table(result).splitlines()
    header = next(line for line in lines if "ratio" in line)
    ours = [line for line in lines if line.startswith("  otface_cuda")]
    assert len(ours) == 2
    assert all(line.startswith("  torch log-sum-exp loop [") for line in lines if "torch log-sum" in line)
    end = header.index("error") + len("error")
    assert all(re.search(r"\s\d\.\de-\d\d$", line[:end]) for line in ours)
    assert all(len(line) <= 120 for line in lines)


def test_a_path_in_the_build_information_is_left_out():
    assert harness.holds_path("toolkit in /usr/local/cuda")
    assert harness.holds_path(["/opt/x"])
    assert not harness.holds_path("avx512")


def test_the_picture_is_drawn_from_the_json(result, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert plot.main([str(tmp_path / "result.json"), str(tmp_path / "chart.png")]) == 0
    with image.open(io.BytesIO((tmp_path / "chart.png").read_bytes())) as picture:
        assert picture.width == 1600


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--peers", "nobody"], "no peer is called 'nobody'"),
        (["--peers", "flash-sinkhorn"], "flash-sinkhorn"),
        (["--threads", "0"], "--threads must be from 1 to"),
        (["--json", "no-such-folder/x.json"], "its folder does not exist"),
        (["--plot", "chart.pdf"], "--plot must end in .png"),
        (["--faces", "no-such-tree"], "does not exist"),
        (["--device", "tpu"], "invalid choice"),
        (["--speed"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_give_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.parse(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("bench_sinkhorn: ")
    assert said.count("\n") == 1


def test_cuda_without_a_device_is_one_sentence(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit):
        bench.parse(["--device", "cuda"])
    assert "finds no CUDA device" in capsys.readouterr().err

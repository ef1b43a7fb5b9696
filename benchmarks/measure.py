"""How time and memory are measured."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TURN_SECONDS = 0.05  # a fast call is timed several times in a turn, for about this long
PAUSE_SECONDS = 0.005  # after each turn, so that the spinning threads of one library do not disturb the next
HEAD_START_SECONDS = 0.002  # for which a GPU is kept busy before a call, so that the host is ahead of it


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile; values between two samples are interpolated."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


class Clock:
    """Seconds of one call.

    On the CPU: wall time. On CUDA: the time between two device events. Before the first of them the GPU overwrites
    twice as many bytes as its L2 cache holds, again and again for ``HEAD_START_SECONDS``. So the inputs come from
    memory (cold L2), the clocks are up, and the host's time to enqueue a call counts only as far as the GPU has to wait
    for it, as in a training step. ``wall=True`` is the time of a call that is made and waited for alone, with cold L2
    too: for libraries with streams of their own, and to see the host's part.
    """

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            l2 = torch.cuda.get_device_properties(0).L2_cache_size
            self._buffer = torch.empty(2 * l2, dtype=torch.uint8, device=device)
            self._rounds = 100
            self._overwrite()  # until the clocks are up
            self._rounds = math.ceil(HEAD_START_SECONDS / (self._between_events(self._overwrite) / self._rounds))

    def time(self, call: Callable[[], Any], wall: bool = False) -> float:
        if self.device != "cuda":
            return self._by_wall(call)
        self._overwrite()
        if not wall:
            return self._between_events(call)
        torch.cuda.synchronize()
        return self._by_wall(lambda: (call(), torch.cuda.synchronize()))

    def _overwrite(self) -> None:
        for _ in range(self._rounds):
            self._buffer.zero_()

    @staticmethod
    def _between_events(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    @staticmethod
    def _by_wall(call: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin


class Contender:
    """A prepared call and its samples."""

    def __init__(self, call: Callable[[], Any], wall: bool = False):
        self.call, self.wall = call, wall
        self.samples: list[float] = []
        self.spent = 0.0

    def take_turn(self, clock: Clock) -> None:
        """One call, or, when calls are short, an untimed one to wake the threads and then several timed ones."""
        begin = time.perf_counter()
        if self.samples and statistics.median(self.samples) < TURN_SECONDS:
            self.call()
            for _ in range(5):
                self.samples.append(clock.time(self.call, self.wall))
                if time.perf_counter() - begin > TURN_SECONDS:
                    break
        else:
            self.samples.append(clock.time(self.call, self.wall))
        self.spent += time.perf_counter() - begin
        time.sleep(PAUSE_SECONDS)


def interleave(
    ours: Contender,
    others: list[Contender],
    clock: Clock,
    budget: float,
    least: int,
    ours_each_time: bool = True,
) -> None:
    """Time everyone in turn, ours before each peer, so that a disturbance of the machine hits both sides of a ratio.

    Everyone gets ``least`` samples; after that a contender takes part until its share of ``budget`` seconds is used.
    ``ours_each_time=False``: ours once a round, like everyone, for calls that take seconds.
    All have been called once before (compiled, warm), which is not counted.
    """
    everyone = [ours, *others]
    share = budget / len(everyone)
    while True:
        active = [c for c in everyone if len(c.samples) < least or c.spent < share]
        if not active:
            return
        for contender in active:
            if contender is not ours and ours_each_time:
                ours.take_turn(clock)
            contender.take_turn(clock)


class OtherPrograms:
    """How many CPUs other programs kept busy inside a ``with`` block; None where the system does not say."""

    cpus: float | None = None

    def __enter__(self) -> OtherPrograms:
        self._begin = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        if self._begin and (end := self._now()):
            everyone, us, wall = (after - before for after, before in zip(end, self._begin, strict=True))
            self.cpus = max(0.0, (everyone - us) / wall)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """CPU seconds of the whole machine, CPU seconds of this process with its threads, wall seconds."""
        try:
            user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
        except OSError:
            return None
        ticks = user + nice + system + irq + softirq
        return ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), time.perf_counter()


# Peak memory on the CPU. Each measurement has a process of its own, forked from a server that has imported the
# libraries but run nothing, so that nothing freed by one contender can be used again, unseen, by another. The process
# solves a tiny problem (loads code, starts threads), prepares the real inputs (compiles, where a library compiles),
# gives freed memory back to the system, resets the kernel's high-water mark of its resident memory, and makes one
# call. What the call added at its peak is its outputs and its workspace. Resolution: about 0.3 MB (pages of code seen
# for the first time count too).

MEMORY_RESOLUTION = 0.3e6


PRELOAD = [
    "torch",
    "numpy",
    "ot.batch",
    "geomloss",
    "ott.solvers.linear.sinkhorn",
    "pytorch_metric_learning.losses",
]  # what is absent is left out


def peak_memory_cpu(work: Callable[..., tuple[Callable, Callable]], *args: Any) -> float | None:
    """Bytes that a call adds at its peak. ``work(*args)``, run in the child, returns (tiny call, maker of the call)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_peak_memory_child, args=(sender, work, args), daemon=True)
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # the child died, for want of memory for instance
        return None
    finally:
        child.join()


def _peak_memory_child(sender: Any, work: Callable[..., tuple[Callable, Callable]], args: tuple) -> None:
    tiny, make = work(*args)
    tiny()
    call = make()
    gc.collect()
    before = _reset_peak()
    result = call()
    sender.send(float(max(0, _peak() - before)))
    del result


def _reset_peak() -> int:
    """Start a new high-water mark; returns the resident bytes now."""
    status = Path("/proc/self/status")
    if not status.exists():
        return _peak()
    ctypes.CDLL(None).malloc_trim(0) if hasattr(ctypes.CDLL(None), "malloc_trim") else None
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak() -> int:
    if Path("/proc/self/status").exists():
        return _status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_memory_cuda(call: Callable[[], Any]) -> float:
    """Bytes of torch's allocator that a call adds at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return float(peak)

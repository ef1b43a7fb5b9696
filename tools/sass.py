"""Machine code of an NVIDIA GPU as cuobjdump prints it: its instructions, the way around a loop, what that asks of the
parts of a multiprocessor, and how long it takes by the schedule that the compiler wrote into the code.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

# An instruction and its encoding, whose second half, on the next line, holds the schedule.
INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+)?\s*(?P<opcode>[A-Z][A-Z0-9_.]*)\s*(?P<operands>[^;]*?)\s*;"
    r"\s*/\* 0x[0-9a-f]{16} \*/\s*/\* (?P<schedule>0x[0-9a-f]{16}) \*/"
)


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str
    stall: int  # clocks until the warp may issue its next instruction
    sets: int  # the scoreboard, of six, that is open until the result is there; 7: none
    reads: int  # likewise, until the operands have been read
    waits: tuple[int, ...]  # scoreboards that must be closed before

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def width(self) -> int:
        """How many numbers of 32 bits each lane loads or stores."""
        bits = re.search(r"\.(64|128)\b", self.opcode) if self.name in ("LDS", "STS") else None
        return int(bits[1]) // 32 if bits else 1

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"\b0x[0-9a-f]+$", self.operands) if self.name == "BRA" else None
        return int(found[0], 16) if found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        if self.predicate or self.name not in ("BRA", "EXIT", "RET"):
            return True
        return self.name == "BRA" and not self.operands.startswith("0x")  # BRA P1, .. is a condition too


def parse(text: str, function: str = "") -> list[Instruction]:
    """The instructions of the first function whose name contains `function`."""
    for part in text.split("Function : ")[1:]:
        if function in part.partition("\n")[0]:
            return [_instruction(match) for match in INSTRUCTION.finditer(part)]
    raise ValueError(f"the machine code holds no function {function!r}")


def _instruction(match: re.Match[str]) -> Instruction:
    bits = int(match["schedule"], 16)
    return Instruction(
        int(match["address"], 16),
        match["predicate"] or "",
        match["opcode"],
        match["operands"],
        stall=bits >> 41 & 15,
        sets=bits >> 46 & 7,
        reads=bits >> 49 & 7,
        waits=tuple(k for k in range(6) if bits >> 52 + k & 1),
    )


# What keeps which part of a multiprocessor busy. All else takes no more than the slot in which it is issued.
PARTS = {
    "multiply-add": ("FFMA", "FADD", "FMUL", "HFMA2", "IMAD"),
    "double": ("DFMA", "DADD", "DMUL", "DSETP"),
    "compare and integer": (
        *("FSETP", "FMNMX", "FSEL", "ISETP", "IADD3", "IMNMX", "LOP3", "SHF", "LEA", "SEL", "MOV", "PRMT", "PLOP3"),
        *("P2R", "R2P", "IABS", "VIADD", "VIMNMX"),
    ),
    "shuffle and shared": ("SHFL", "LDS", "STS"),
    "special": ("MUFU", "F2F", "F2I", "I2F", "I2FP", "F2FP"),
    "global": ("LDG", "STG", "LDL", "STL", "ATOMG"),
}
PART_OF = {name: part for part, names in PARTS.items() for name in names}
QUEUED = ("shuffle and shared", "global")  # are issued also while the part is busy
PRODUCTS = ("FFMA", "FMUL", "DFMA", "DMUL")
FAR = 2000  # no loop that is looked for is longer


def count(code: Iterable[Instruction]) -> Counter[str]:
    """How many there are of each instruction, of the products of any type, and of the steps of a counter."""
    code = list(code)
    names = Counter(x.name for x in code)
    names["products"] = sum(names[name] for name in PRODUCTS)
    names["steps"] = sum(
        x.name in ("IADD3", "VIADD") and bool(re.fullmatch(r"(R\d+), \1, -?0x1(, RZ)?", x.operands)) for x in code
    )
    return names


def by_part(code: Iterable[Instruction]) -> Counter[str]:
    return Counter(PART_OF.get(x.name, "other") for x in code)


class Flow:
    """The stretches between branches, named by the place at which they begin, and which may follow which."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        places = {x.address: k for k, x in enumerate(code)}
        starts = {0}
        for k, x in enumerate(code):
            if x.target is not None:
                starts.add(places[x.target])
            if x.target is not None or not x.goes_on:
                starts.add(k + 1)
        order = sorted(starts - {len(code)})
        ends = dict(zip(order, [*order[1:], len(code)], strict=True))
        self.blocks = {start: list(code[start : ends[start]]) for start in order}
        self.names = {start: count(block) for start, block in self.blocks.items()}
        self._known: dict[int, tuple[dict[int, int], dict[int, int]]] = {}
        self.next = {}
        for start, block in self.blocks.items():
            target = block[-1].target
            follow = [ends[start]] if block[-1].goes_on and ends[start] in self.blocks else []
            self.next[start] = follow if target is None else [*follow, places[target]]

    def loop_with(self, needs: Mapping[str, int]) -> list[Instruction]:
        """The shortest way around a loop that has so many of each of these, as `count` calls them.

        The shortest of all ways is not always the one that is usually taken, where a branch can jump over something:
        `needs` says what must not be left out. And the way counts its rounds where that takes few instructions more.
        """
        best: list[int] = []
        limit = 8 * needs["products"] + 400
        for start in sorted(self.blocks, key=lambda k: -self.names[k]["products"]):
            if self.names[start]["products"] < needs["products"] / 8:
                break
            way = self._complete(start, needs, limit)
            if way:
                best, limit = way, self._length(way) - 1
        if not best:
            raise ValueError(f"no loop has {', '.join(f'{number} {name}' for name, number in needs.items())}")
        best = self._detour(best, {**needs, "steps": 1}, "steps", self._length(best) + 16) or best
        return [x for block in best for x in self.blocks[block]]

    def _complete(self, start: int, needs: Mapping[str, int], limit: int) -> list[int] | None:
        """A way around through this block, led through others until it has all that is needed."""
        way = self._passed(start, start) if self._distances(start).get(start, limit + 1) <= limit else None
        while way:
            has = self._count(way)
            missing = next((name for name in needs if has[name] < needs[name]), None)
            if missing is None:
                return way
            way = self._detour(way, needs, missing, limit)
        return None

    def _detour(self, way: list[int], needs: Mapping[str, int], missing: str, limit: int) -> list[int] | None:
        """The shortest way that leaves another for a block with what is missing, comes back, and has more of it."""
        done = list(itertools.accumulate((len(self.blocks[block]) for block in way), initial=0))
        found = []
        for k, leaves in enumerate(way):
            for block, there in self._distances(leaves).items():
                if block in way or not self.names[block][missing] or there > limit:
                    continue
                back = self._distances(block)
                for j in range(k + 1, len(way) + 1):
                    length = done[k] + there + back.get(way[j % len(way)], limit) + done[-1] - done[j]
                    if length <= limit:
                        found.append((length, k, block, j))
        has = self._count(way)
        for _, k, block, j in sorted(found):
            detour = [*way[:k], *self._passed(way[k], block), *self._passed(block, way[j % len(way)]), *way[j:]]
            new = self._count(detour)
            if new[missing] > has[missing] and all(new[name] >= min(has[name], needs[name]) for name in needs):
                return detour
        return None

    def _distances(self, start: int) -> dict[int, int]:
        """The fewest instructions from the begin of a block to that of each other, and around to its own."""
        if start not in self._known:
            heap = [(len(self.blocks[start]), after, start) for after in self.next[start]]
            distances: dict[int, int] = {}
            before: dict[int, int] = {}
            while heap:
                length, block, last = heapq.heappop(heap)
                if block in before or length > FAR:
                    continue
                distances[block], before[block] = length, last
                for after in self.next[block] if block != start else ():
                    heapq.heappush(heap, (length + len(self.blocks[block]), after, block))
            self._known[start] = distances, before
        return self._known[start][0]

    def _passed(self, start: int, goal: int) -> list[int]:
        """The blocks on that way, without the goal."""
        before = self._known[start][1]
        way = [before[goal]]
        while way[-1] != start:
            way.append(before[way[-1]])
        return way[::-1]

    def _length(self, way: Sequence[int]) -> int:
        return sum(len(self.blocks[block]) for block in way)

    def _count(self, way: Sequence[int]) -> Counter[str]:
        names: Counter[str] = Counter()
        for block in way:
            names.update(self.names[block])
        return names


@dataclass(frozen=True)
class Machine:
    """A quarter of a multiprocessor, which issues an instruction of one warp per clock. All numbers are assumptions."""

    busy: Mapping[str, int]  # clocks between two instructions for the same part, seen from a quarter
    latency: Mapping[str, int]  # clocks to a result that the schedule awaits by a scoreboard
    other_latency: int
    until_read: int  # clocks until the operands of such an instruction have been read

    def slower(self, factor: float) -> Machine:
        """The same with other latencies."""
        latency = {name: round(clocks * factor) for name, clocks in self.latency.items()}
        return replace(self, latency=latency, other_latency=round(self.other_latency * factor))


def clocks_per_round(loop: Sequence[Instruction], warps: int, machine: Machine, rounds: int = 24) -> float:
    """Clocks in which each of so many warps of a quarter goes around the loop once, in the long run.

    A warp issues in order; its next instruction waits for the stall that the compiler wrote and for the scoreboards
    that it names. Of the warps that can issue, the one that has waited longest does. Not in it: branches beyond their
    stall, the fetch of instructions, conflicts of register and memory banks, barriers between warps.
    """
    steps = [(x, PART_OF.get(x.name, "other")) for x in loop]
    free: Counter[str] = Counter()  # when a part takes its next instruction
    ready = [37 * warp for warp in range(warps)]  # not in step
    scoreboards = [[0] * 8 for _ in range(warps)]
    issued = [0] * warps
    clock, half, issued_at_half = -1, 0, 0

    def earliest(warp: int) -> int:
        x, part = steps[issued[warp] % len(steps)]
        start = max(ready[warp], clock + 1, *(scoreboards[warp][k] for k in x.waits))
        return start if part in QUEUED else max(start, free[part])

    while min(issued) < rounds * len(loop):
        clock, _, warp = min((earliest(k), ready[k], k) for k in range(warps))
        x, part = steps[issued[warp] % len(steps)]
        begin = max(clock, free[part])
        free[part] = begin + machine.busy.get(part, 1) * x.width
        ready[warp] = clock + max(1, x.stall)
        result = begin + machine.latency.get(x.name, machine.other_latency)
        scoreboards[warp][x.sets] = max(scoreboards[warp][x.sets], result)
        scoreboards[warp][x.reads] = max(scoreboards[warp][x.reads], begin + machine.until_read)
        issued[warp] += 1
        if not half and min(issued) >= rounds * len(loop) // 2:
            half, issued_at_half = clock, sum(issued)
    return (clock - half) * warps * len(loop) / (sum(issued) - issued_at_half)

"""What tools/estimate.py reads in machine code, asked about code made up for it; and that it finds its kernels."""

from __future__ import annotations

import re
from pathlib import Path

import estimate
import pytest
import sass

QUARTER = sass.Machine({"multiply-add": 1, "shuffle and shared": 4}, {"SHFL": 24}, other_latency=30, until_read=10)


def code(*lines: str) -> list[sass.Instruction]:
    """Instructions as cuobjdump prints them; before each, after a colon, the clocks it stalls, what it sets and awaits.

    "4 w0: SHFL.." sets scoreboard 0, "1 m0: FADD .." awaits it.
    """
    text = "Function : made_up\n"
    for k, line in enumerate(lines):
        schedule, _, instruction = line.rpartition(": ")
        numbers = {key: int(value) for key, value in re.findall(r"([wm])(\d)", schedule)}
        stall = int((re.match(r"\d+", schedule) or ["1"])[0])
        bits = stall << 41 | numbers.get("w", 7) << 46 | 7 << 49 | (1 << numbers["m"] if "m" in numbers else 0) << 52
        text += f"        /*{16 * k:04x}*/   {instruction} ;   /* 0x{0:016x} */\n     /* 0x{bits:016x} */\n"
    return sass.parse(text, "made_up")


def test_parse():
    shuffle, load, branch = code("4 w0: SHFL.BFLY PT, R8, R2, 0x4, 0x1f", "m0: @P0 LDS.128 R4, [R8]", "@!P1 BRA 0x10")
    assert (shuffle.name, shuffle.stall, shuffle.sets, shuffle.waits, shuffle.width) == ("SHFL", 4, 0, (), 1)
    assert (load.predicate, load.address, load.sets, load.waits, load.width) == ("@P0", 16, 7, (0,), 4)
    assert (branch.target, branch.goes_on) == (16, True)
    assert sass.by_part([shuffle, load, branch]) == {"shuffle and shared": 2, "other": 1}
    with pytest.raises(ValueError, match="no function 'other'"):
        sass.parse("Function : made_up\n", "other")


def test_where_the_code_goes_on():
    always, also, sometimes, end = code("BRA 0x20", "BRA P1, 0x20", "@P0 EXIT", "EXIT")
    assert [x.goes_on for x in (always, also, sometimes, end)] == [False, True, True, False]


LOOP = [
    *["FFMA R9, R9, R9, R9"] * 4,  # another loop, with fewer products
    "@P0 BRA 0x0",
    "FADD R1, R2, R3",  # 0x50: the loop
    *["FFMA R1, R2, R3, R4"] * 8,
    "@P1 BRA 0x130",
    "MUFU.RCP R5, R1",  # which the shortest way leaves out
    "FMUL R5, R5, R4",
    *["NOP"] * 2,
    "@P3 BRA 0x150",  # 0x130
    "IADD3 R7, R7, 0x1, RZ",  # and so it does with the count of the rounds
    "@P2 BRA 0x50",  # 0x150
    "EXIT",
]


def test_the_way_around_a_loop():
    flow = sass.Flow(code(*LOOP))
    shortest = flow.loop_with({"products": 8})
    assert [x.name for x in shortest] == ["FADD", *["FFMA"] * 8, "BRA", "BRA", "IADD3", "BRA"]
    whole = flow.loop_with({"products": 8, "MUFU": 1})
    assert {x.address for x in whole} == set(range(0x50, 0x160, 16))
    assert flow.loop_with({"products": 4})[0].address == 0
    with pytest.raises(ValueError, match="no loop has 8 products, 2 MUFU"):
        flow.loop_with({"products": 8, "MUFU": 2})


def test_clocks():
    full = code(*["FFMA R1, R2, R3, R4"] * 10)
    assert sass.clocks_per_round(full, 1, QUARTER) == pytest.approx(10, abs=0.5)
    assert sass.clocks_per_round(full, 3, QUARTER) == pytest.approx(30, abs=0.5)
    stalled = code(*["5: FFMA R1, R2, R3, R4"] * 10)
    assert sass.clocks_per_round(stalled, 1, QUARTER) == pytest.approx(50, abs=1)
    assert sass.clocks_per_round(stalled, 4, QUARTER) == pytest.approx(50, abs=5)  # hidden by the others
    waiting = code("w0: SHFL.BFLY PT, R8, R2, 0x4, 0x1f", "m0: FADD R1, R2, R8")
    assert sass.clocks_per_round(waiting, 1, QUARTER) == pytest.approx(25, abs=1)
    assert sass.clocks_per_round(waiting, 1, QUARTER.slower(2)) == pytest.approx(49, abs=1)
    assert sass.clocks_per_round(waiting, 10, QUARTER) == pytest.approx(40, abs=3)  # the shuffles alone


def test_warps_that_fit():
    compiled = estimate.Compiled([], registers=255, spilled=0, shared=25 * 1024)
    assert estimate.warps_per_multiprocessor(compiled) == 8
    assert estimate.warps_per_multiprocessor(estimate.Compiled([], 255, 0, 60 * 1024)) == 3
    assert estimate.warps_per_multiprocessor(estimate.Compiled([], 32, 0, 0)) == 32  # blocks
    assert estimate.warps_per_multiprocessor(estimate.Compiled([], 128, 0, 512), 2) == 16


def test_stripes_are_those_of_the_kernels():
    text = (estimate.ROOT / "csrc" / "sinkhorn" / "memory_matrix.cuh").read_text()
    for rule in (
        "return gang ? 16 : kRowsAtATime",
        "return gang ? 512 : kMostWarps",
        "kMostWarps = 16;",
        "kRowsAtATime = 4;",
        "kColumnsPerThread = 8;",
    ):
        assert rule in text
    assert [estimate.rows_per_stripe(True, n) for n in (5, 2048, 10000)] == [16, 16, 20]
    assert [estimate.rows_per_stripe(False, n) for n in (5, 100, 220)] == [4, 8, 16]


def test_tiles_are_found():
    assert ["float", "4", "4", "13", "13"] in estimate.tiles("ForwardTiles<float>")
    assert len(estimate.tiles("UnrolledTiles<double>")) > 0


def test_the_page_has_a_place_for_each_table():
    text = estimate.PAGE.read_text()
    assert re.findall(r"<!-- ([^>]*) -->\n\n\|.*?\n\n<!-- end -->", text, re.DOTALL) == list(estimate.TABLES)


def test_smallest_kernel(tmp_path: Path):
    """Compiled, disassembled and counted: 16 x 16 in tiles of 4 x 4 takes 32 multiplications of each lane."""
    try:
        compiler = estimate.Compiler(tmp_path)
    except SystemExit as reason:
        pytest.skip(str(reason))
    tile = estimate.tiles("ForwardTiles<float>")[0]
    compiled = compiler.compile(estimate.register_kernel("Forward", tile, 16))
    assert 32 <= sass.count(compiled.loop)["products"] <= 40
    assert compiled.spilled == 0
    assert compiled.shared > 2 * 4 * 16 * 17

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from emufuzz.case.model import Case, Memory, Segment, System
from emufuzz.oracle.unicorn import UnicornOracle

DATA = bytes(range(256)) * 16


def _segments(mode: str, cpl: int) -> tuple[Segment, ...]:
    wide = mode in {"prot32", "compat32", "prot64"}
    limit = 0xFFFF if mode in {"real", "vm86"} else 0xFFFFFFFF
    rpl = 0 if mode in {"real", "vm86"} else cpl
    common = {"limit": limit, "s": 1, "dpl": cpl, "p": 1, "g": int(limit > 0xFFFF)}
    code_type = 3 if mode in {"real", "vm86"} else 11
    long = int(mode == "prot64")
    code = Segment(
        sel=8 * (limit > 0xFFFF) | rpl, type=code_type, l=long, db=int(wide and not long), **common
    )
    data = Segment(sel=16 * (limit > 0xFFFF) | rpl, type=3, db=int(wide), **common)
    return (data, code, data, data, data, data, Segment(), Segment())


def make_system(mode: str, cpl: int = 0, **changes: object) -> System:
    efer = 0x500 if mode in {"prot64", "compat16", "compat32"} else 0
    cr0 = 0x10 if mode == "real" else 0x80000011
    fields: dict[str, object] = {
        "seg": _segments(mode, 3 if mode == "vm86" else cpl),
        "cr0": cr0,
        "cr4": 0x6A0 if efer else 0x600,
        "efer": efer,
        "dr": (0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400),
        **changes,
    }
    return System(**fields)  # type: ignore[arg-type]  # fields of several types


def make_case(
    mode: str,
    code: str,
    gpr: dict[int, int] | None = None,
    cpl: int = 0,
    rflags: int = 2,
    rip: int = 0x6000,
    mem: tuple[tuple[int, bytes], ...] = ((0x8000, DATA), (0xC000, DATA)),
    **changes: object,
) -> Case:
    registers = [0] * 16
    registers[4] = 0xC800
    for number, value in (gpr or {}).items():
        registers[number] = value
    flags = rflags | (0x20000 if mode == "vm86" else 0)
    system = make_system(mode, cpl, **changes)
    return Case("t", mode, bytes.fromhex(code), tuple(registers), rip, flags, system, Memory(mem))


@pytest.fixture(scope="session")
def oracle() -> Iterator[UnicornOracle]:
    opened = UnicornOracle()
    yield opened
    opened.close()


@pytest.fixture
def case() -> Callable[..., Case]:
    return make_case

"""What a hostile case does to Bochs stays in that case, and costs no other case its outcome."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from emufuzz.case.build import DATA_BASE, build_case, build_system
from emufuzz.case.model import Case, Memory, Outcome

ALL_ONES = (1 << 64) - 1
MODES = ("prot64", "compat32", "prot16", "real")
#: Where the frames behind hidden page tables lie, and a frame of tables among them.
WINDOW = (0xE0000000, 0xE0000100, 0xE0001000, 0xE0010000, 0xE1FFF000)
LOCAL_APIC = 0xFEE00300
UNPAGED = msgspec.structs.replace(build_system("prot32", 0), cr0=0x11)
SMSW = "0f0127"  # [EDI]; runs without hidden page tables if CR0.PG is 0
VMXE = msgspec.structs.replace(build_system("prot64", 0), cr4=build_system("prot64", 0).cr4 | 1 << 13)


@dataclasses.dataclass(frozen=True)
class Hostile:
    """Code that would reach beyond its case, and what becomes of it in 64-bit mode at CPL 3."""

    name: str
    code: str
    fault: tuple[int, int | None, int | None] | None
    gpr: dict[str, int] = dataclasses.field(default_factory=dict)


# fmt: off
HOSTILE = (
    Hostile("syscall",        "0f05",       None),
    Hostile("sysenter",       "0f34",       (13, 0, None)),
    Hostile("int 80h",        "cd80",       (13, 0x80 * 8 + 2, None)),
    Hostile("hlt",            "f4",         (13, 0, None)),
    Hostile("rdtsc",          "0f31",       None),
    Hostile("ud2",            "0f0b",       (6, None, None)),
    Hostile("ud0",            "0fff00",     (6, None, None)),
    Hostile("vmcall",         "0f01c1",     (6, None, None)),
    Hostile("endless loop",   "ebfe",       None),
    Hostile("endless stos",   "f3aa",       (14, 6, DATA_BASE + 0x3000),
            {"rcx": ALL_ONES, "rdi": DATA_BASE + 0x2F00}),
    Hostile("endless scas",   "f2ae",       None, {"rcx": ALL_ONES, "rdi": DATA_BASE}),
    Hostile("over the code",  "f3aa",       (13, 3 * 8 + 2, None),
            {"rcx": 0x700, "rdi": 0x6000, "rax": 0xCC}),
    Hostile("no stack",       "50",         (12, 0, None), {"rsp": 1 << 63}),
    Hostile("hidden frames",  "488907",     (14, 6, WINDOW[0]), {"rdi": WINDOW[0]}),
    Hostile("hidden stack",   "50",         (14, 6, WINDOW[2]), {"rsp": WINDOW[2] + 8}),
    Hostile("the local apic", "8907",       (14, 6, LOCAL_APIC), {"rdi": LOCAL_APIC}),
)
# fmt: on


def neighbours() -> list[Case]:
    return [build_case(mode, b"\xff\xc0\xf4", cpl=0, rax=5, flags=0x200) for mode in MODES]


def among_others(bochs: Any, case: Case) -> Outcome:
    """The outcome of a case in the middle of harmless ones, all of which must come out right."""
    others = neighbours()
    outcomes = bochs.run([*others, case, *others])
    result = outcomes.pop(len(others))
    assert [(o.gpr[0] & 0xFFFF, o.rip, o.exception, o.pages) for o in outcomes] == [(6, 0x6002, None, {})] * 8
    assert {(o.crash, o.hang, o.unchecked) for o in outcomes} == {("", False, ())}
    return result


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
@pytest.mark.parametrize("cpl", [3, 0])
def test_hostile_cases_end_with_themselves(bochs, hostile, cpl):
    starts = bochs.starts
    case = build_case("prot64", bytes.fromhex(hostile.code) + b"\xf4", cpl=cpl, flags=0x202, **hostile.gpr)
    outcome = among_others(bochs, case)
    assert (outcome.crash, outcome.hang, bochs.starts) == ("", False, starts)
    if cpl == 3:
        assert outcome.exception == hostile.fault


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
@pytest.mark.parametrize("mode", ["real", "vm86", "prot16", "prot32", "compat16"])
def test_hostile_cases_of_other_modes_end_with_themselves(bochs, hostile, mode):
    starts = bochs.starts
    gpr = {name: value & 0xFFFFFFFF for name, value in hostile.gpr.items()}
    outcome = among_others(bochs, build_case(mode, bytes.fromhex(hostile.code) + b"\xf4", flags=0x202, **gpr))
    assert (outcome.crash, outcome.hang, bochs.starts) == ("", False, starts)


@pytest.mark.parametrize("address", [*WINDOW, LOCAL_APIC])
def test_physical_addresses_of_the_oracle_are_not_memory_of_a_case(bochs, address):
    case = build_case("prot32", bytes.fromhex(SMSW) + b"\xf4", system=UNPAGED, rdi=address)
    outcome = among_others(bochs, case)
    assert outcome.pages == {}
    assert outcome.unchecked == (("all", "bochs-no-memory"),)


@pytest.mark.parametrize("address", [*WINDOW, LOCAL_APIC])
def test_a_case_may_have_memory_of_its_own_there(bochs, address):
    page = address & -0x1000
    case = build_case("prot32", bytes.fromhex(SMSW) + b"\xf4", system=UNPAGED, rdi=address,
                      mem=Memory(((page, b"\x55" * 0x1000),)))  # fmt: skip
    outcome = among_others(bochs, case)
    place = address - page
    assert outcome.unchecked == ()
    assert outcome.pages == {page >> 12: b"\x55" * place + b"\x11\0" + b"\x55" * (0x1000 - place - 2)}


def test_code_may_lie_there(bochs):
    case = build_case("prot32", b"\x0f\x22\xd0\xf4", system=UNPAGED, rip=WINDOW[1], rax=7)
    outcome = among_others(bochs, case)
    assert (outcome.rip, outcome.system.cr2, outcome.unchecked) == (WINDOW[1] + 3, 7, ())


@pytest.mark.parametrize(("mode", "place", "size"), [("prot32", 0x101020, 4), ("prot64", 0x103040, 8)])
@pytest.mark.parametrize("address", [WINDOW[0], WINDOW[2], LOCAL_APIC & -0x1000])
def test_page_tables_of_a_case_do_not_lead_there(bochs, mode, place, size, address):
    case = build_case(mode, b"\x89\x07\xf4", cpl=0, physical=True, rdi=DATA_BASE, rax=0x55555555)
    entry = {"addr": hex(place), "data": (address | 0x63).to_bytes(size, "little").hex()}
    case = msgspec.structs.replace(case, extra={"phys": [*case.extra["phys"], entry]})
    outcome = among_others(bochs, case)
    assert outcome.unchecked == (("all", "bochs-no-memory"),)


def test_what_ends_the_process_costs_one_case(bochs):
    """VMXON calls for a machine around the CPU; Bochs aborts."""
    starts = bochs.starts
    enable = build_case("prot64", b"\x0f\x30\xf4", system=VMXE, rcx=0x3A, rax=5)
    region = {0x8100: (0x8000).to_bytes(8, "little"), 0x8000: b"\x2b\0\0\0"}
    vmxon = build_case("prot64", b"\xf3\x0f\xc7\x37\xf4", system=VMXE, rdi=0x8100, data=region)
    others = neighbours()
    outcomes = bochs.run([*others, enable, vmxon, *others])
    assert outcomes[5].crash == "bochs: killed by signal 6"
    rest = outcomes[:4] + outcomes[6:]
    assert [(o.gpr[0] & 0xFFFF, o.crash, o.hang) for o in rest] == [(6, "", False)] * 8
    assert bochs.starts == starts + 1


def test_the_child_has_nothing_but_its_pipes(bochs):
    bochs.run(neighbours())
    links = [str(link.readlink()) for link in Path(f"/proc/{bochs._child.pid}/fd").iterdir()]
    inherited = {str(Path(f"/proc/self/fd/{number}").readlink()) for number in (0, 1, 2)}
    assert {link for link in links if not link.startswith(("pipe:", "/dev/null"))} <= inherited
    assert os.getpgid(bochs._child.pid) != os.getpgid(0)

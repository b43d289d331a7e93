"""Bochs runs cases of every mode and level, in memory and with devices as the case has them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from emufuzz.arch.fpu import MXCSR_MASK
from emufuzz.arch.modes import MODES
from emufuzz.case.build import build_case, build_system, cpls_of
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Fpu, Memory, Segment, System
from emufuzz.oracle.base import Capabilities
from emufuzz.oracle.bochs.abi import CpuState
from emufuzz.oracle.bochs.state import state_size, without_padding

PLACES = [(mode, cpl) for mode in MODES for cpl in cpls_of(mode)]
SHORT = {"real", "vm86", "prot16", "compat16"}
DATA = bytes(range(256)) * 16
ABSENT = 0xE123
MOV_SS, STI = 1, 2
IOPL = 3 << 12
DE, UD, SS, GP = (0, None, None), (6, None, None), (12, 0, None), (13, 0, None)


def make(mode: str, code: str, cpl: int | None = None, **options: Any) -> Case:
    """A case; with 32-bit addresses, where the code's own are of 16 bits."""
    return build_case(mode, bytes.fromhex(code) + b"\xf4", cpl=cpl, data={0x8000: DATA}, **options)


def wide(mode: str, code: str) -> str:
    return "67" + code if mode in SHORT else code


def with_segment(mode: str, name: str, cpl: int = 0, **changes: Any) -> System:
    system = build_system(mode, cpl)
    number = ("es", "cs", "ss", "ds", "fs", "gs").index(name)
    seg = list(system.seg)
    seg[number] = msgspec.structs.replace(seg[number], **changes)
    return msgspec.structs.replace(system, seg=tuple(seg))


@pytest.mark.parametrize(("mode", "cpl"), PLACES)
def test_registers_and_flags_go_in_and_come_out(bochs, mode, cpl):
    (outcome,) = bochs.run([make(mode, "01d8", cpl, rax=2, rbx=3, flags=0x8D5)])
    assert (outcome.gpr[0], outcome.rip, outcome.exception) == (5, 0x6002, None)
    assert outcome.rflags & ~0x20000 == 0x2 | 0x4
    assert outcome.pages == {}


@pytest.mark.parametrize(("mode", "cpl"), PLACES)
def test_memory_is_written_and_put_back(bochs, mode, cpl):
    store = make(mode, wide(mode, "8807"), cpl, rdi=0x8123, rax=0x77)
    load = make(mode, wide(mode, "8a07"), cpl, rdi=0x8123)
    stored, loaded = bochs.run([store, load])
    page = stored.pages[8]
    assert (page[0x123], page[:0x123], page[0x124:]) == (0x77, DATA[:0x123], DATA[0x124:])
    assert (loaded.gpr[0] & 0xFF, loaded.pages) == (0x23, {})


@pytest.mark.parametrize(("mode", "cpl"), PLACES)
def test_absent_pages_fault_in_every_mode(bochs, mode, cpl):
    (outcome,) = bochs.run([make(mode, wide(mode, "8a07"), cpl, rdi=ABSENT)])
    user = 4 if cpl == 3 else 0
    assert outcome.exception == (14, user, ABSENT)
    assert (outcome.rc, outcome.rip, outcome.system.cr2) == ("propagate_fault", 0x6000, 0)


@pytest.mark.parametrize(("mode", "cpl"), PLACES)
def test_what_nothing_has_changed_is_the_system_of_the_case(bochs, mode, cpl):
    cases = [make(mode, code, cpl, rax=1, rbx=2) for code in ("01d8", "90", "39d8", "f8") * 8]
    assert all(outcome.system is case.system for case, outcome in zip(cases, bochs.run(cases), strict=True))


def test_what_lies_between_the_fields_of_a_state_does_not_count():
    full = b"\xff" * state_size()
    state = CpuState.from_buffer_copy(without_padding(full))
    assert (state.cs.sel, state.cs.attr, state.tsc_aux) == (0xFFFF, 0xFFFF, (1 << 64) - 1)
    assert (bytes(state.cs)[4:8], bytes(state.cs)[22:], bytes(state.gdtr)[10:]) == (
        bytes(4),
        bytes(2),
        bytes(6),
    )
    assert without_padding(bytes(state)) == bytes(state)


def test_hidden_parts_of_a_segment_that_is_not_there_are_kept(bochs):
    """Bochs forgets them; only a register that it has loaded is carried over."""
    system = with_segment("prot32", "fs", p=0, base=0x1234000, limit=0x5678, type=5)
    cases = [make("prot32", "8ed8", system=system, rax=0x30 if n % 2 else 0) for n in range(32)]
    assert {outcome.system.seg[4] for outcome in bochs.run(cases)} == {system.seg[4]}


# fmt: off
FAULTS = (
    # mode      code        registers                        system                                 exception
    ("prot64", "0f0b",      {},                               {},                                     UD),
    ("prot64", "f7f1",      {},                               {},                                     DE),
    ("prot64", "8b07",      {"rdi": 1 << 63},                 {},                                     GP),
    ("prot64", "50",        {"rsp": 1 << 63},                 {},                                     SS),
    ("prot64", "ffe0",      {"rax": 1 << 63},                 {},                                     GP),
    ("prot64", "0f2807",    {"rdi": 0x8001},                  {},                                     GP),
    ("prot64", "f08907",    {"rdi": 0x8000},                  {},                                     UD),
    ("prot64", "0f30",      {"rcx": 0xC0000080, "rax": 2},    {},                                     GP),
    ("prot64", "0f22c0",    {"rax": 1},                       {},                                     GP),
    ("prot32", "8b07",      {"rdi": 0x8FFE},                  {"name": "ds", "limit": 0x9000, "g": 0}, GP),
    ("prot32", "8907",      {"rdi": 0x8000},                  {"name": "ds", "type": 1},              GP),
    ("prot32", "58",        {"rsp": 0x8001},                  {"name": "ss", "limit": 0x8003, "g": 0}, SS),
    ("prot32", "8b07",      {"rdi": 0x8000},                  {"name": "ds", "p": 0},                 GP),
    ("real",   "8b07",      {"rbx": 0xFFFF},                  {},                                     GP),
)
# fmt: on


@pytest.mark.parametrize(("mode", "code", "gpr", "segment", "exception"), FAULTS)
def test_what_the_manual_forbids_faults(bochs, mode, code, gpr, segment, exception):
    changes = dict(segment)
    if changes.get("name") == "ds" and "limit" in changes:
        gpr = {**gpr, "rdi": changes["limit"] - 2}
    system = with_segment(mode, changes.pop("name"), **changes) if changes else None
    (outcome,) = bochs.run([make(mode, code, 0 if mode != "real" else None, system=system, **gpr)])
    assert outcome.exception == exception
    assert outcome.system.seg == (system or build_system(mode, 0)).seg


@pytest.mark.parametrize(
    ("code", "flags"), [("fa", 0), ("ec", 0), ("0f06", IOPL), ("f4", IOPL), ("0f20c0", IOPL), ("0f01c1", 0)]
)
def test_privilege_is_checked(bochs, code, flags):
    (outcome,) = bochs.run([make("prot64", code, 3, flags=flags, rdx=0x500)])
    assert outcome.exception in {GP, UD}
    assert outcome.rip == 0x6000


def test_an_exception_does_not_stick(bochs):
    faulting, fine = make("prot64", "f7f1", 0), make("prot64", "90", 0)
    outcomes = bochs.run([faulting, faulting, make("prot64", "8b07", 0, rdi=ABSENT), faulting, fine])
    vectors = [o.exception and o.exception[0] for o in outcomes]
    assert vectors == [0, 0, 14, 0, None]


@pytest.mark.parametrize(
    ("code", "shadow"), [("8ed0", MOV_SS), ("fb", STI), ("90", 0), ("8ed8", 0), ("17", MOV_SS)]
)
def test_the_interrupt_shadow_belongs_to_one_case(bochs, code, shadow):
    cases = [make("real", code, rax=0x10), make("real", "90"), make("real", code, rax=0x10)]
    assert [o.interruptibility for o in bochs.run(cases)] == [shadow, 0, shadow]


def test_hlt_does_not_stop_later_cases(bochs):
    halted, fine = bochs.run([make("prot64", "f4", 0), make("prot64", "ffc0", 0)])
    assert (halted.rip, halted.exception, fine.gpr[0]) == (0x6001, None, 1)


@pytest.mark.parametrize(("count", "left", "rip"), [(5, 0, 0x6000), (1500, 1024, 0x6000), (0, 0, 0x6002)])
def test_rep_stops_where_kvm_stops(bochs, count, left, rip):
    (outcome,) = bochs.run([make("prot64", "f3aa", 0, rcx=count, rdi=0x8000)])
    assert (outcome.gpr[1], outcome.rip) == (left, rip)
    assert outcome.gpr[7] == 0x8000 + count - left


@pytest.mark.parametrize("before", ["8ed0", "fb", "0f30", "9d", "f4", "f7f1"])
def test_rep_is_not_cut_short_by_what_ran_before(bochs, before):
    """Bochs leaves REP between iterations when an event may be waiting."""
    repeated = make("prot64", "f3aa", 0, rcx=0x30, rdi=0xAFF0, flags=0x200)
    _, outcome = bochs.run([make("prot64", before, 0, flags=0x200), repeated])
    assert (outcome.exception, outcome.gpr[1]) == ((14, 2, 0xB000), 0x20)


def test_rep_keeps_what_was_done_before_a_fault(bochs):
    (outcome,) = bochs.run([make("prot64", "f3aa", 0, rcx=100, rdi=0x8FF0 + 0x2000, flags=0x40)])
    assert outcome.exception == (14, 2, 0xB000)
    assert (outcome.gpr[1], outcome.gpr[7], outcome.rip, outcome.rflags) == (84, 0xB000, 0x6000, 0x42)


def test_ports_are_those_of_the_case(bochs):
    devices = [{"kind": "pio", "port": 0x60, "size": 1, "behaviour": "ram", "reads": "5a"}]
    case = msgspec.structs.replace(
        make("prot64", "e460", 0), extra={"devices": devices}, port_in=b"\x11\x22\x33\x44"
    )
    other = msgspec.structs.replace(case, code=b"\xe5\x80\xf4")
    written = msgspec.structs.replace(case, code=b"\xe7\x84\xf4", gpr=(0x1234, *case.gpr[1:]))
    first, second, third = bochs.run([case, other, written])
    assert first.gpr[0] == 0x5A
    assert second.gpr[0] == 0x44332211
    assert third.extra["device_trace"] == [
        {"kind": "pio", "port": 0x84, "size": 4, "direction": "write", "data": "34120000"}
    ]


def test_string_input_goes_to_memory(bochs):
    case = msgspec.structs.replace(
        make("prot64", "f36c", 0, rcx=3, rdi=0x8000, rdx=0x70), port_in=b"\x91\x92\x93"
    )
    (outcome,) = bochs.run([case])
    assert outcome.pages[8][:4] == b"\x91\x92\x93\x03"
    assert [access["size"] for access in outcome.extra["device_trace"]] == [1, 1, 1]


@pytest.mark.parametrize("mode", ["prot32", "prot64", "compat32"])
def test_page_tables_of_the_case_are_walked(bochs, mode):
    case = make(mode, "8a07", 3, rdi=0x8042, physical=True)
    absent = make(mode, "8807", 3, rdi=ABSENT, physical=True)
    loaded, faulted = bochs.run([case, absent])
    assert loaded.gpr[0] == 0x42
    assert faulted.exception == (14, 6, ABSENT)
    assert faulted.system.cr2 == ABSENT


@pytest.mark.parametrize(("mode", "code"), [("real", "0f20c0"), ("prot32", "0f20c0"), ("prot64", "0f20c0")])
def test_control_registers_show_their_own_values(bochs, mode, code):
    case = make(mode, code)
    (outcome,) = bochs.run([case])
    assert outcome.gpr[0] == case.system.cr0
    assert outcome.system == case.system


def test_cr3_shows_its_own_value(bochs):
    case = make("prot64", "0f20d8", 0)
    (outcome,) = bochs.run([case])
    assert outcome.gpr[0] == case.system.cr3
    assert outcome.system is case.system


def test_the_fpu_goes_in_and_comes_out(bochs):
    xmm = tuple(range(1 << 64, (1 << 64) + 16))
    fpu = Fpu(mxcsr=0x1F80, xmm=xmm, mm=(7, 8, 9, 10, 11, 12, 13, 14), ftw=0xFF)
    system = msgspec.structs.replace(build_system("prot64", 0), fpu=fpu)
    added, same = bochs.run(
        [make("prot64", "0ffec1", 0, system=system), make("prot64", "90", 0, system=system)]
    )
    assert added.system.fpu == msgspec.structs.replace(fpu, mm=(15, *fpu.mm[1:]))
    assert same.system is system


IMAGE = msgspec.structs.replace(
    make("prot64", "0fae0f", 0, rdi=0x8000), mem=Memory(((0x8000, b"\x55" * 0x18 + b"\0" * 0x200),))
)


@pytest.mark.parametrize(
    "before",
    [make("prot64", "d907", 0, rdi=0x8000), make("real", "67d907", 0, rdi=0x8000), IMAGE],
    ids=["fld", "fld-in-real-mode", "fxrstor"],
)
def test_the_pointers_of_the_x87_unit_belong_to_one_case(bochs, before):
    store = make("prot64", "0fae07", 0, rdi=0x8000)
    _, outcome = bochs.run([before, store])
    image = outcome.pages[8][:32]
    assert image[6:24] == bytes(18), image.hex()
    assert image[28:32] == MXCSR_MASK.to_bytes(4, "little")


@pytest.mark.parametrize(
    ("code", "top", "status"), [("d9f7", 3, 4), ("d9f6", 3, 2), ("90", 5, 5), ("dde0", 2, 2)]
)
def test_the_top_of_the_x87_stack_is_loaded_and_saved(bochs, code, top, status):
    fpu = Fpu(fsw=top << 11, ftw=0xFF)
    system = msgspec.structs.replace(build_system("prot64", 0), fpu=fpu)
    (outcome,) = bochs.run([make("prot64", code, 0, system=system)])
    assert outcome.system.fpu.fsw >> 11 & 7 == status


def test_msrs_that_a_case_does_not_name_are_zero(bochs):
    system = msgspec.structs.replace(build_system("prot64", 0), efer=0x501)
    (outcome,) = bochs.run([make("prot64", "0f05", 0, system=system, flags=0x3202)])
    assert (outcome.exception, outcome.rflags) == (None, 0x3202)  # SFMASK would clear IF


def test_msrs_that_a_case_names_are_loaded(bochs):
    system = msgspec.structs.replace(build_system("prot64", 0), efer=0x501, msr=((0xC0000084, 0x200),))
    (outcome,) = bochs.run([make("prot64", "0f05", 0, system=system, flags=0x3202)])
    assert (outcome.exception, outcome.rflags) == (None, 0x3002)


def test_cr2_is_loaded_and_written(bochs):
    system = msgspec.structs.replace(build_system("prot64", 0), cr2=0x1234)
    read, written = bochs.run(
        [make("prot64", "0f20d0", 0, system=system), make("prot64", "0f22d0", 0, system=system, rax=0x99)]
    )
    assert (read.gpr[0], written.system.cr2) == (0x1234, 0x99)


def test_segment_loads_read_the_descriptor(bochs):
    case = make("prot32", "8ed8", 0, rax=0)
    wrong = make("prot32", "8ed8", 0, rax=0xFFF8)
    null, fault = bochs.run([case, wrong])
    assert null.system.seg[3] == Segment()
    assert fault.exception == (13, 0xFFF8, None)


def test_interrupts_are_delivered_in_real_mode(bochs):
    case = make("real", "cd21", system=msgspec.structs.replace(build_system("real"), idtr=_table(0x8000)))
    (outcome,) = bochs.run([case])
    assert (outcome.rip, outcome.system.seg[1].sel) == (0x8584, 0x8786)
    assert outcome.gpr[4] == case.gpr[4] - 6


def _table(base: int) -> Any:
    return type(build_system("real").idtr)(base, 0x3FF)


# fmt: off
REFUSED = (
    ("count",   {"count": 2}),
    ("emul",    {"emul_type": 1}),
    ("path",    {"path": "apic-access"}),
    ("devices", {"extra": {"devices": [{"kind": "mmio", "addr": 0x9000, "size": 8}]}}),
    ("rflags",  {"path": "ud", "rflags": 0x102}),
    ("phys",    {"extra": {"phys": [{"addr": hex(1 << 41)}]}}),
    ("mem",     {"mem": Memory(tuple((n << 12, b"") for n in range(3000)))}),
    ("code",    {"rip": (1 << 64) - 1}),
)
# fmt: on


@pytest.mark.parametrize(("field", "changes"), REFUSED)
def test_what_it_cannot_take_is_refused_with_a_reason(bochs, field, changes):
    case = msgspec.structs.replace(make("prot64", "90", 0), **changes)
    with pytest.raises(UnsupportedCaseError, match=field):
        bochs.check(case)


def test_paths_are_judged_as_hardware_executes_them(bochs):
    case = msgspec.structs.replace(
        make("prot64", "0f0b6b766d01d8", 0, rax=1, rbx=2),
        path="fep",
        extra={"kvm": {"knobs": {"force_emulation_prefix": 1}}},
    )
    bochs.check(case)
    (outcome,) = bochs.run([case])
    assert (outcome.gpr[0], outcome.rip) == (3, 0x6007)


def test_it_says_what_it_is(bochs):
    assert bochs.capabilities == Capabilities(physical=True, paths=True, cost="dear")
    assert bochs.fingerprint()["bochscpu-python"] == "0.3.1"
    assert all(gap.id.startswith("bochs-") for gap in bochs.ledger)

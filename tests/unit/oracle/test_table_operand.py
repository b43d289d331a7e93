"""Operands that KVM looks for in the page table whose walk exited: only what is done there is excused."""

from __future__ import annotations

import msgspec
import pytest
from support.machine_cases import PS, RW, STREAM, SYSTEMS, A, P, entry_places, physical

from emufuzz.arch.cr import X86_CR4_PAE, X86_CR4_PSE
from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RBX, VCPU_REGS_RSI
from emufuzz.case.devices import trace_to_obj
from emufuzz.case.model import case_pages, code_address
from emufuzz.oracle.compare import AGREE, FINDING, SKIPPED, judge
from emufuzz.oracle.device_trace import trace_of
from emufuzz.oracle.table_operand import table_operands
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.kvm import KvmSubject

QUIRK = "kvm-quirk-55-table-operand"
KINDS = ("2-level", "pae", "4-level")


@pytest.fixture(scope="module")
def oracle():
    oracle = UnicornOracle()
    yield oracle
    oracle.close()


#: Behind a table of its own, which maps it to 9000H.
LINEAR = 0x4C09000
TABLE = 0x180000


def mapped(kind, code, **options):
    """A case with LINEAR, and the physical address of its page's entry."""
    case = physical(kind, code, **options)
    places, size = entry_places(case, 0)
    directory = places[-2] + (LINEAR >> (21 if size == 8 else 22)) * size
    entry = TABLE + (LINEAR >> 12 & 4096 // size - 1) * size
    added = ((directory, TABLE | P | RW | A), (entry, 0x9000 | P | RW), (TABLE + 4096 - size, 0))
    phys = [{"addr": hex(at), "data": value.to_bytes(size, "little").hex()} for at, value in added]
    return msgspec.structs.replace(case, extra={**case.extra, "phys": [*case.extra["phys"], *phys]}), entry


def read_only(case, table):
    """The case on the path of EPT violations; one page table is in a read-only slot."""
    slots = [
        {"base": 0, "size": table, "flags": 0},
        {"base": table, "size": 0x1000, "flags": 2},
        {"base": table + 0x1000, "size": 0x100000, "flags": 0},
    ]
    extra = {**case.extra, "kvm": {"memslots": slots}, "devices": [STREAM]}
    return msgspec.structs.replace(case, path="ept-violation", extra=extra)


def at_entry(kind, code, offset=None, **options):
    """RSI is in LINEAR, at the offset that its entry has in its table; the operand's entry."""
    case, place = mapped(kind, code)
    rsi = LINEAR | (place & 0xFFF if offset is None else offset)
    case, _ = mapped(kind, code, rsi=rsi, **options)
    return read_only(case, TABLE), entry_of(case, place)


def under_root(kind, code, rsi):
    """The first entry of the root, which translates everything and the code first, is read-only."""
    case = physical(kind, code, rsi=rsi)
    place = entry_places(case, 0x9000)[0][-2]  # PDPTEs are loaded with CR3
    return read_only(case, place & ~0xFFF), entry_of(case, place)


def entry_of(case, place):
    size = 8 if case.system.cr4 & X86_CR4_PAE else 4
    return int.from_bytes(case_pages(case)[place >> 12][place & 0xFFF : (place & 0xFFF) + size], "little")


def both(oracle, case):
    (ours,), (theirs,) = KvmSubject().run([case]), oracle.run([case])
    return ours, theirs


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_gets_the_entry(oracle, kind):
    case, entry = at_entry(kind, "8b06")
    ours, theirs = both(oracle, case)
    assert ours.gpr[VCPU_REGS_RAX] == entry & 0xFFFFFFFF != theirs.gpr[VCPU_REGS_RAX]
    assert judge(case, ours, theirs, oracle)[:2] == (SKIPPED, QUIRK)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", ["8906", "0106", "0fb006", "0f9206"])
def test_a_write_goes_to_userspace(oracle, kind, code):
    """The slot is read-only, so that the write is one to a device in its place."""
    case, _ = at_entry(kind, code, rax=0x12345678)
    ours, theirs = both(oracle, case)
    assert [access.addr for access in trace_of(ours)] == [TABLE | case.gpr[VCPU_REGS_RSI] & 0xFFF]
    assert judge(case, ours, theirs, oracle)[:2] == (SKIPPED, QUIRK)


@pytest.mark.parametrize("kind", KINDS)
def test_an_operand_with_another_offset_is_where_it_should_be(oracle, kind):
    case, _ = at_entry(kind, "8b06", offset=0x804)
    assert judge(case, *both(oracle, case), oracle).kind == AGREE


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_page_of_an_operand_begins_at_offset_0(oracle, kind):
    case, entry = under_root(kind, "8b06", rsi=0x8FFE)
    ours, theirs = both(oracle, case)
    assert ours.gpr[VCPU_REGS_RAX] >> 16 == entry & 0xFFFF
    assert judge(case, ours, theirs, oracle).reason == QUIRK


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("linear", [0x4C00000, 0xBFC00000])
def test_an_operand_that_nothing_maps_is_found_in_the_table(oracle, kind, linear):
    """Its own tables would make it #PF."""
    case, entry = under_root(kind, "8b06", rsi=linear)
    ours, theirs = both(oracle, case)
    assert theirs.exception == (14, 0, linear)
    assert (ours.exception, ours.gpr[VCPU_REGS_RAX]) == (None, entry & 0xFFFFFFFF)
    assert judge(case, ours, theirs, oracle).reason == QUIRK


def flipped(outcome):
    gpr = list(outcome.gpr)
    gpr[VCPU_REGS_RBX] ^= 0x1000
    return msgspec.structs.replace(outcome, gpr=tuple(gpr))


def wrong_value(outcome):
    return msgspec.structs.replace(outcome, gpr=(outcome.gpr[VCPU_REGS_RAX] ^ 1, *outcome.gpr[1:]))


def moved_on(outcome):
    return msgspec.structs.replace(outcome, rip=outcome.rip + 1)


def wrong_flag(outcome):
    return msgspec.structs.replace(outcome, rflags=outcome.rflags ^ 0x80)


def stored(outcome):
    return msgspec.structs.replace(outcome, pages={0x9: b"\x55" * 4096})


def faulted(outcome):
    return msgspec.structs.replace(outcome, rc="propagate_fault", exception=(0, None, None))


def asked(outcome):
    trace = [access._replace(addr=access.addr ^ 8) for access in trace_of(outcome)]
    return msgspec.structs.replace(outcome, extra={**outcome.extra, "device_trace": trace_to_obj(trace)})


@pytest.mark.parametrize("damage", [flipped, wrong_value, moved_on, wrong_flag, stored, faulted, asked])
def test_nothing_else_is_excused(oracle, damage):
    case, _ = at_entry("4-level", "0fc106", rax=0x77)  # XADD: reads, writes, flags and a register
    ours, theirs = both(oracle, case)
    assert judge(case, ours, theirs, oracle).reason == QUIRK
    assert judge(case, damage(ours), theirs, oracle).kind == FINDING


def test_only_where_the_exit_is_that_of_a_walk():
    case, _ = at_entry("4-level", "8b06")
    (ours,) = KvmSubject().run([case])
    assert len(list(table_operands(case, ours))) == 1
    writable = [{**slot, "flags": 0} for slot in case.extra["kvm"]["memslots"]]
    others = (
        msgspec.structs.replace(case, path="shadow-pf"),
        msgspec.structs.replace(case, extra={**case.extra, "kvm": {"memslots": writable}}),
        at_entry("4-level", "8b06", offset=0x804)[0],
    )
    for other in others:
        assert not list(table_operands(other, ours))


def test_a_large_page_becomes_small_ones(oracle):
    """The code's table is read-only; the operand is in a page of 4 MiB."""
    system = msgspec.structs.replace(SYSTEMS["2-level"], cr4=SYSTEMS["2-level"].cr4 | X86_CR4_PSE)
    case = physical("2-level", "8b06", system=system)
    (directory, table), _ = entry_places(case, code_address(case))
    case = physical("2-level", "8b06", system=system, rsi=0x800000 | table & 0xFFF)
    large = {"addr": hex(directory + 8), "data": (P | RW | PS).to_bytes(4, "little").hex()}
    case = msgspec.structs.replace(case, extra={**case.extra, "phys": [*case.extra["phys"], large]})
    case = read_only(case, table & ~0xFFF)
    ours, theirs = both(oracle, case)
    assert ours.gpr[VCPU_REGS_RAX] == entry_of(case, table)
    assert judge(case, ours, theirs, oracle).reason == QUIRK


def test_a_large_page_that_also_has_the_code_is_split(oracle):
    """The root is read-only, and one page of 2 MiB maps everything: the code must stay where it is."""
    case = physical("4-level", "f616", rsi=0x8000)
    places, _ = entry_places(case, 0x8000)
    large = {"addr": hex(places[2]), "data": (P | RW | A | PS).to_bytes(8, "little").hex()}
    case = msgspec.structs.replace(case, extra={**case.extra, "phys": [*case.extra["phys"], large]})
    case = read_only(case, places[0] & ~0xFFF)
    ours, theirs = both(oracle, case)
    assert [access.addr for access in trace_of(ours)] == [places[0]]
    assert judge(case, ours, theirs, oracle).reason == QUIRK
    assert judge(case, flipped(ours), theirs, oracle).kind == FINDING

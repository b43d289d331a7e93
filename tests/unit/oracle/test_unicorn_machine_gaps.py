"""Proof tests of the ledger of devices, ports and physical memory: each gap exists and is recognised."""

from __future__ import annotations

import msgspec
import pytest
from support.machine_cases import PORT, RW, STREAM, SYSTEMS, US, A, D, P, case_of, entry, physical, run, trace

from emufuzz.arch.cr import X86_CR4_PAE, X86_CR4_SMAP
from emufuzz.case.build import build_system
from emufuzz.case.model import Memory, TableRegister
from emufuzz.oracle.unicorn.gaps_machine import MACHINE_GAPS
from emufuzz.oracle.unicorn.ledger import REASONS

APIC = {"kind": "mmio", "addr": "0xfee00000", "size": 4096}
DEVICE = {"devices": [{"kind": "mmio", "addr": "0xfeb00000", "size": 4096}]}

ZEROS = {**STREAM, "reads": "", "behaviour": "ram"}


TABLE_IN_DEVICE = build_system("prot32", 0, gdtr=TableRegister(0xB000, 0x7F))


def reads_before_the_fault(outcome, _case):
    return outcome.exception is not None and trace(outcome) == [("r", "0xb000", "00010203")]


def reads_destination_first(outcome, _case):
    return trace(outcome) == [("r", "0xb000", "04050607"), ("r", "0xb010", "00010203")]


def pushes_upwards(outcome, _case):
    addresses = [int(address, 16) for _, address, _ in trace(outcome)]
    return addresses == sorted(addresses) and len(addresses) == 8


def in_two_pieces(outcome, _case):
    return [(address, len(data)) for _, address, data in trace(outcome)][:2] == [("0xb028", 8), ("0xb02c", 8)]


def reads_all(outcome, _case):
    return trace(outcome) == [("r", "0xb000", "00000000")] and outcome.exception is None


def stays(outcome, case):
    return outcome.rip == case.rip and outcome.system.seg[1].sel == 0x302


def floats(outcome, _case):
    return outcome.gpr[0] == 0xFFFFFFFF


def reserved(outcome, _case):
    return outcome.exception is not None and outcome.exception[:2] == (14, 9)


def completes(outcome, case):
    return outcome.exception is None and outcome.rip == case.rip + 2


GUARDED = build_system("prot64", 3, cr4=0x600 | X86_CR4_PAE | X86_CR4_SMAP)


def refuses_stack(outcome, _case):
    return outcome.exception == (14, 1, 0x9000)


def takes_all_pdptes(outcome, _case):
    """The directory of 32-bit paging has entries that are no PDPTEs: the next fetch may find it out."""
    return outcome.exception in {None, (14, 0, 0x6000)}


def accessed(outcome, case):
    return entry(outcome, case) & A == A and outcome.rip >> 12 == 9


# fmt: off
PROOFS = {
    "device-fault-order":   (case_of("prot64", "a5", STREAM, rsi=0xB000, rdi=0xD000),
                             reads_before_the_fault),
    "device-operand-order": (case_of("prot64", "a7", STREAM, rsi=0xB000, rdi=0xB010),
                             reads_destination_first),
    "device-operand-order, pusha": (case_of("prot32", "60", STREAM, rsp=0xB800), pushes_upwards),
    "implicit-access":      (case_of("prot32", "8ed8", {**STREAM, "reads": "ffff0000009fcf00" * 4}, rax=0x28,
                                     system=TABLE_IN_DEVICE,
                                     mem=Memory()), in_two_pieces),
    "pop-segment-width":    (case_of("prot32", "07", ZEROS, rsp=0xB000),
                             reads_all),
    "hooked-far-return":    (case_of("real", "cb", STREAM, rsp=0xB004), stays),
    "local-apic":           (case_of("prot64", "8b06", APIC, rsi=0xFEE00020), floats),
    "physical-width":       (physical("4-level", "8b06", [(0, 1 << 40 | P | RW)], rsi=0x9000), reserved),
    "guest-width":          (physical("4-level", "8b06", [(0, 1 << 38 | P | RW)], rsi=0x9000,
                                      extra={"kvm": {"cpuid": {"maxphyaddr": 36}}}), completes),
    "pdpte-load":           (physical("pae", "8b06", [(2, 0x101000 | 1 << 63 | P)], rsi=0x9000), reserved),
    "pdpte-load, ignored":  (physical("pae", "8b06", [(2, 0x101000 | 1 << 5 | P)], rsi=0x9000), completes),
    "pdpte-load, hole":     (physical("pae", "0f22d8", rax=0x700000), takes_all_pdptes),
    "pdpte-load, CR4":      (physical("2-level", "0f22e0", [(1, 1 << 5 | P)], rax=0x620), takes_all_pdptes),
    "far-stack-smap":       (physical("4-level", "cb", [(0, 0x9000 | P | RW | US)], user=True, rsp=0x9000,
                                      system=GUARDED), refuses_stack),
    "next-fetch-accessed":  (physical("4-level", "fb", [(0, 0x9000 | P | RW)], rip=0x8FFF), accessed),
}
# fmt: on


def test_every_gap_has_a_proof():
    assert {f"unicorn-{name.partition(',')[0]}" for name in PROOFS} == {gap.id for gap in MACHINE_GAPS}
    assert {gap.id for gap in MACHINE_GAPS} <= set(REASONS)


@pytest.mark.parametrize("name", PROOFS)
def test_the_gap_exists_and_is_recognised(oracle, name):
    case, behaves = PROOFS[name]
    outcome = run(oracle, case)
    assert behaves(outcome, case)
    assert f"unicorn-{name.partition(',')[0]}" in {gap for _, gap in oracle.unchecked(case, outcome)}


# fmt: off
PLAIN = {
    "load":       case_of("prot64", "8b06", STREAM, rsi=0xB000),
    "movs":       case_of("prot64", "a5", STREAM, rsi=0xB000, rdi=0x8000),
    "one cmps":   case_of("prot64", "a7", STREAM, rsi=0xB000, rdi=0x8000),
    "pop":        case_of("prot32", "58", STREAM, rsp=0xB000),
    "pop es, 16": case_of("prot16", "07", {**STREAM, "reads": ""}, rsp=0xB000),
    "sti":        physical("4-level", "fb"),
    "branch":     physical("4-level", "e9fb2f0000", [(0, 0x9000 | P | RW)]),
    "page fault": physical("4-level", "8b06", [(0, 0)], rsi=0x9000),
    "in":         case_of("prot64", "e460", PORT),
    "movbe":      case_of("prot64", "0f38f106", STREAM, rsi=0xB000),
}
# fmt: on


@pytest.mark.parametrize("name", PLAIN)
def test_neighbours_fall_into_no_gap(oracle, name):
    outcome = run(oracle, PLAIN[name])
    assert oracle.unchecked(PLAIN[name], outcome) == ()


def test_movbe_stores_are_seen_as_they_are_stored(oracle):
    """Unicorn shows the value before it swaps it; the bus undoes that."""
    outcome = run(oracle, case_of("prot64", "0f38f106", STREAM, rsi=0xBFFE, rax=0x11223344))
    assert trace(outcome) == [("w", "0xbffe", "1122")]
    assert outcome.pages[12][:2] == bytes.fromhex("3344")


@pytest.mark.parametrize(
    ("mode", "code", "field"),
    [
        ("prot32", "06", "device_trace"),  # push es
        ("prot32", "f0f61e", "device_trace"),  # lock neg
        ("prot32", "660fa41e1f", "device_trace"),  # shld by more than 16
        ("prot32", "ff3e", "device_trace"),  # ff /7
    ],
)
def test_older_gaps_cover_the_trace_too(oracle, mode, code, field):
    case = case_of(mode, code, STREAM, rsi=0xB000, rsp=0xB800)
    outcome = run(oracle, case)
    assert trace(outcome)
    assert field in {name for name, _ in oracle.unchecked(case, outcome)}


def test_a_page_above_40_bits_without_a_fault_is_no_gap(oracle):
    case = physical("4-level", "8b06", [(0, 0x9000 | P | RW | A | D)], rsi=0x9000)
    assert oracle.unchecked(case, run(oracle, case)) == ()
    nx = msgspec.structs.replace(SYSTEMS["4-level"], efer=0x500)
    case = physical("4-level", "8b06", [(0, 0x9000 | P | RW | 1 << 63)], system=nx, rsi=0x9000)
    assert oracle.unchecked(case, run(oracle, case)) == ()

"""KVM left before the instruction: only then, and with nothing changed, is there nothing to compare."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.arch.cr import X86_CR4_UMIP
from emufuzz.arch.regs import VCPU_SREG_FS, VCPU_SREG_SS
from emufuzz.case.build import PAGE_TABLES, build_case
from emufuzz.oracle.departures import departure
from emufuzz.subject.kvm import KvmSubject

SHUTDOWN = "an event that cannot be delivered in real mode ends in a shutdown"


def with_nmi(mode="real", code=b"\x0a\x00", nmi=1, **state):
    """An NMI is pending, the vectors of real mode are where no memory is; FS keeps hardware from entering."""
    case = build_case(mode, code, **state)
    seg = list(case.system.seg)
    seg[VCPU_SREG_FS] = msgspec.structs.replace(seg[VCPU_SREG_FS], g=1)
    idtr = msgspec.structs.replace(case.system.idtr, base=0x50000)
    system = msgspec.structs.replace(case.system, idtr=idtr, seg=tuple(seg))
    extra = {"kvm": {"nmi": nmi}} if nmi else None
    return msgspec.structs.replace(case, path="invalid-guest-state", system=system, extra=extra)


@pytest.fixture(scope="module")
def subject():
    return KvmSubject()


def run(subject, case):
    (outcome,) = subject.run([case])
    return outcome


def test_an_event_that_cannot_be_delivered_leaves_nothing_to_compare(subject):
    case = with_nmi()
    outcome = run(subject, case)
    assert outcome.extra["exits"][-1]["reason"] == "SHUTDOWN"
    assert outcome.pages  # FLAGS, CS and IP were pushed before the vector could not be read
    assert departure(case, outcome) == SHUTDOWN


def test_a_large_stack_has_a_pointer_of_32_bits(subject):
    case = with_nmi(rsp=0xFFFFC901)
    seg = list(case.system.seg)
    seg[VCPU_SREG_SS] = msgspec.structs.replace(seg[VCPU_SREG_SS], db=1, g=1, limit=0xFFFFFFFF, base=0xC000)
    case = msgspec.structs.replace(case, system=msgspec.structs.replace(case.system, seg=tuple(seg)))
    outcome = run(subject, case)
    assert set(outcome.pages) == {0x8}  # C000H + FFFFC8FBH, modulo 4 GiB
    assert departure(case, outcome) == SHUTDOWN


def test_without_an_event_the_instruction_runs(subject):
    case = with_nmi(nmi=0)
    assert departure(case, run(subject, case)) == ""


def other_page(outcome):
    page = bytearray(4096)
    page[0] = 1
    return {"pages": {**outcome.pages, 0x9: bytes(page)}}


@pytest.mark.parametrize("change", [
    other_page,
    lambda outcome: {"gpr": (1, *outcome.gpr[1:])},
    lambda outcome: {"rip": outcome.rip + 2},
    lambda outcome: {"leaf": "0a"},
    lambda outcome: {"rflags": outcome.rflags ^ 1},
    lambda outcome: {"exception": (6, None, None)},
], ids=["other memory", "a register", "rip", "an instruction", "flags", "an exception"])  # fmt: skip
def test_a_shutdown_with_anything_else_changed_is_compared(subject, change):
    case = with_nmi()
    outcome = run(subject, case)
    assert departure(case, msgspec.structs.replace(outcome, **change(outcome))) == ""


def test_a_shutdown_in_another_mode_is_compared(subject):
    case = with_nmi()
    outcome = run(subject, case)
    protected = msgspec.structs.replace(case, mode="prot16")
    assert departure(protected, outcome) == ""


# --- breakpoints of userspace ---------------------------------------------------------------------

#: KVM_GUESTDBG_ENABLE and KVM_GUESTDBG_USE_HW_BP, a breakpoint in DR0 on the code.
DEBUGGED = {"guest_debug": {"control": 0x20001, "dr": [0x6000, 0, 0, 0, 0, 0, 0, 1]}}


def never_walked(entry):
    """A page table without accessed bits; other memory as it is."""
    if int(entry["addr"], 16) < PAGE_TABLES:
        return entry
    data = bytes.fromhex(entry["data"])
    return {**entry, "data": bytes(b if i % 8 else b & ~0x20 for i, b in enumerate(data)).hex()}


def with_breakpoint():
    """SGDT exits to KVM, which leaves to userspace for its breakpoint; the exit has walked page tables."""
    case = build_case("prot64", bytes.fromhex("0f0103"), rbx=0x8000, physical=True)
    extra = {"phys": [never_walked(entry) for entry in case.extra["phys"]], "kvm": DEBUGGED}
    system = msgspec.structs.replace(case.system, cr4=case.system.cr4 | X86_CR4_UMIP)
    return msgspec.structs.replace(case, path="desc", system=system, extra=extra)


def test_the_fetch_of_an_instruction_that_does_not_run_may_set_accessed_bits(subject):
    case = with_breakpoint()
    outcome = run(subject, case)
    assert outcome.pages
    assert departure(case, outcome) == "userspace has a breakpoint there"


@pytest.mark.parametrize("change", [
    lambda page: {**page, 0: page[0] ^ 0x40},      # dirty
    lambda page: {**page, 1: page[1] ^ 0x20},      # no first byte of an entry
    lambda page: {**page, 0xFF8: page[0xFF8] | 0x20},  # an entry that is not present
], ids=["dirty", "an address", "not present"])  # fmt: skip
def test_anything_else_in_memory_is_compared(subject, change):
    case = with_breakpoint()
    outcome = run(subject, case)
    number, page = max(outcome.pages.items())
    damaged = bytes(change(dict(enumerate(page))).values())
    assert damaged != page
    other = msgspec.structs.replace(outcome, pages={**outcome.pages, number: damaged})
    assert departure(case, other) == ""


# --- exceptions of userspace, and payloads ---------------------------------------------------------


def with_page_fault(pending):
    case = with_nmi(nmi=0)
    return msgspec.structs.replace(case, path="rmode-inject", extra={"kvm": {"pending": pending}})


PAGE_FAULT = {"vector": 14, "error_code": 2, "payload": 0x4000}


def test_a_page_fault_that_cannot_be_delivered_has_loaded_cr2(subject):
    case = with_page_fault(PAGE_FAULT)
    outcome = run(subject, case)
    assert outcome.system.cr2 == 0x4000
    assert departure(case, outcome) == SHUTDOWN
    elsewhere = msgspec.structs.replace(outcome.system, cr2=0x5000)
    assert departure(case, msgspec.structs.replace(outcome, system=elsewhere)) == ""
    for pending in ({**PAGE_FAULT, "vector": 13}, {**PAGE_FAULT, "injected": True}):
        assert departure(with_page_fault(pending), outcome) == ""


def injecting(flags=1 << 19):
    """OUTSB of L2, which hardware cannot enter, with KVM_GUESTDBG_INJECT_BP; L1 hears of the shutdown."""
    case = with_nmi(code=b"\x6e", nmi=0)
    return msgspec.structs.replace(case, extra={"kvm": {"guest_debug": 1 | flags, "guest_mode": NESTED}})


NESTED = {"exception_bitmap": 0, "page_fault_error_code_mask": 0, "page_fault_error_code_match": 0}


@pytest.mark.parametrize(("flags", "vector"), [(1 << 19, 3), (1 << 18, 1)])
def test_an_exception_that_userspace_injects_comes_first(subject, flags, vector):
    case = injecting(flags)
    outcome = run(subject, case)
    assert outcome.exception == (vector, None, None)
    assert departure(case, outcome) == "an exception that userspace injects comes first"
    for change in ({"rip": outcome.rip + 1}, {"gpr": (1, *outcome.gpr[1:])}, {"exception": (4, None, None)}):
        assert departure(case, msgspec.structs.replace(outcome, **change)) == ""
    assert departure(injecting(0), outcome) == ""


def test_a_debug_exception_that_cannot_be_delivered_has_set_dr6(subject):
    """As KVM_CAP_EXCEPTION_PAYLOAD has it: bits that are 0 for what they say are inverted."""
    case = with_page_fault({"vector": 1, "payload": 0x5001})
    outcome = run(subject, case)
    assert outcome.system.dr[6] == case.system.dr[6] | 0x4001  # bit 12 is none of DR6
    assert departure(case, outcome) == SHUTDOWN
    for number, bit in ((6, 0x8000), (7, 1), (0, 1)):
        dr = list(outcome.system.dr)
        dr[number] ^= bit
        other = msgspec.structs.replace(outcome.system, dr=tuple(dr))
        assert departure(case, msgspec.structs.replace(outcome, system=other)) == ""

"""A read that userspace completes: the run that goes on gives what an undisturbed one gives."""

from __future__ import annotations

import pytest
from support.machine import Machine
from support.random_cases import RandomCases

from emufuzz.case.model import Case
from emufuzz.emulator.x86emul import EMULATION_OK, EMULATION_RESTART, X86EMUL_IO_NEEDED

#: Instructions whose handlers read the stack: RSP moves again (quirk 54), so they are left out.
POPS = (
    "07", "17", "1f", "0fa1", "0fa9", "58", "59", "5a", "5b", "5c", "5d", "5e", "5f", "61", "8f/0", "9d",
    "c2", "c3", "c9", "ca", "cb", "cf",
)  # fmt: skip


def finish(m: Machine, result: int) -> tuple:
    """Run the iterations that are left; what the machine has come to."""
    while result == EMULATION_RESTART:
        result = m.emulate()
    ctxt = m.ctxt
    fault = m.fault if ctxt.have_exception else None
    eip, flags = (None, None) if ctxt.have_exception else (ctxt.eip, ctxt.eflags)
    pages = dict(m.ops.written)
    return result, ctxt.rc, fault, eip, flags, m.ops.gpr, m.system, pages


def undisturbed(case: Case) -> tuple[int, tuple] | None:
    """The reads that an instruction makes at once, and its end; None if it makes none or pops."""
    m = Machine(case)
    if m.decode() != EMULATION_OK or m.ctxt.opcode.leaf in POPS:
        return None
    result = m.emulate()
    reads = sum(event[0] == "read" and len(event) == 3 for event in m.events)
    return (reads, finish(m, result)) if reads else None


def replayed(case: Case, nth: int) -> tuple:
    """The end of a run whose `nth` read has to wait for userspace."""
    m = Machine(case, {"op": "read_emulated", "nth": nth, "result": "io_needed"})
    assert m.step() == EMULATION_OK
    assert m.ctxt.rc == X86EMUL_IO_NEEDED
    assert m.ops.gpr == list(case.gpr)
    return finish(m, m.emulate())


def run(seed: int, count: int) -> list[str]:
    cases = RandomCases(seed)
    wrong = []
    tried = 0
    while tried < count:
        case = cases.case()
        plain = undisturbed(case)
        if plain is None:
            continue
        for nth in range(1, plain[0] + 1):
            tried += 1
            if replayed(case, nth) != plain[1]:
                wrong.append(f"{case.mode} {case.code.hex()} read {nth}")
    return wrong


def test_completed_reads():
    assert run(seed=1, count=1_500) == []


@pytest.mark.slow
def test_many_completed_reads():
    assert run(seed=2, count=100_000) == []

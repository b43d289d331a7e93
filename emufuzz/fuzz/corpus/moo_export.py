"""Cases as tests of a MOO file, with what the emulator makes of them (docs/moo.md, Export).

A MOO file holds real mode with 64 KiB segments, and no more of the machine than registers and memory; each
test ends with a HLT, that of the handler if there was an exception. So a case is first made into the one
that such a file can hold, with a HLT where it ends; a test is exported only if reading it back gives that
case, and what the emulator makes of it, again.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from emufuzz.arch import cr
from emufuzz.arch.exceptions import PF_VECTOR
from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES
from emufuzz.arch.rflags import X86_EFLAGS_AC, X86_EFLAGS_IF, X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.case.delta import expect_to_outcome
from emufuzz.case.model import PAGE_SHIFT, Case, Outcome, Segment, code_address, memory_changes
from emufuzz.case.moo import REGISTERS_32, MooState, MooTest
from emufuzz.case.moo_limits import HLT, KVM
from emufuzz.case.moo_vectors import SkippedError, vector_of_test
from emufuzz.case.recorded import recorded_differences
from emufuzz.case.segments import segment_paragraph
from emufuzz.fuzz.shrink.memory import trim
from emufuzz.oracle.compare import undefined_now
from emufuzz.subject.flat import FlatSubject

#: Fields that a MOO file does not record; all others have to come back.
_UNRECORDED: Final = frozenset(("length", "restarts", "events"))
_SEGMENTS: Final = SREG_NAMES[:6]
_MASK16: Final = 0xFFFF
_MASK32: Final = 0xFFFFFFFF
_FRAME: Final = 6  # bytes of IP, CS and FLAGS on the stack
_HANDLER: Final = 0x500  # segment of the handler of exceptions, with its HLT at offset 0
_NAME: Final = 200
#: Runs until a case with its HLT is one that no HLT has to be added to.
_ATTEMPTS: Final = 4


class UnfitError(Exception):
    """A MOO file cannot hold this case; the message is the reason, as a phrase to count."""


class Exported(NamedTuple):
    """One test.

    Attributes:
        case: What reading the file gives.
        outcome: What the emulator makes of it.
        test: The test.
        mask: Register -> bits that are defined, where some are not.
    """

    case: Case
    outcome: Outcome
    test: MooTest
    mask: dict[str, int]


class MooExporter:
    """Makes tests of cases."""

    def __init__(self) -> None:
        self._subject = FlatSubject(events=True)

    def export(self, case: Case, number: int) -> Exported:
        """The test of a case.

        Raises:
            UnfitError: A MOO file cannot hold the case.
        """
        _check(case)
        # what the case does without that which a file leaves out decides what it touches
        held = _held(self._draft(case, number))
        test = self._draft(held, number)
        for _ in range(_ATTEMPTS):
            held = _held(test)
            outcome = self._run(held)
            more = _missing_halts(held, outcome, test.initial.ram)
            if not more:
                test = test._replace(final=_final(held, outcome), exception=_pushed(held, outcome))
                more = _missing_pages(test)
            if not more:
                return self._checked(held, outcome, test)
            ram = dict(sorted((test.initial.ram | more).items()))
            test = test._replace(initial=test.initial._replace(ram=ram), exception=None)
        raise UnfitError("where it ends depends on the HLT there")

    def _draft(self, case: Case, number: int) -> MooTest:
        """The test of a case without its final state."""
        (outcome,) = self._subject.run((case,))
        code = case.code[: outcome.length or len(case.code)]
        return _draft(msgspec.structs.replace(trim(case, self._subject), code=code), number)

    def _run(self, case: Case) -> Outcome:
        (outcome,) = self._subject.run((case,))
        if outcome.crash or outcome.hang:
            raise UnfitError("the emulator fails")
        if outcome.rc not in ("continue", "propagate_fault"):
            raise UnfitError(f"the emulator returns {outcome.rc}")
        if outcome.exception is not None and outcome.exception[0] == PF_VECTOR:
            raise UnfitError("a page is absent, as none is without paging")
        return outcome

    def _checked(self, case: Case, outcome: Outcome, test: MooTest) -> Exported:
        """The whole test, read back."""
        try:
            again, expect = vector_of_test(test, KVM, "")
        except SkippedError as error:
            raise UnfitError(str(error)) from None
        different = set(recorded_differences(case, outcome, expect_to_outcome(again, expect))) - _UNRECORDED
        if again != case or different:
            raise UnfitError(f"{min(different, default='the state')} is not recorded")
        undefined = undefined_now(case, outcome) if outcome.exception is None else 0
        return Exported(case, outcome, test, {"rflags": undefined ^ _MASK32} if undefined else {})


def _draft(case: Case, number: int) -> MooTest:
    code, start = case.code, code_address(case)
    halt = b"" if code == bytes((HLT,)) else bytes((HLT,))
    ram: dict[int, int] = {}
    for pfn in sorted(case.mem.pages):
        ram[pfn << PAGE_SHIFT] = case.mem.pages[pfn][0]
    for at, data in case.mem.entries:
        ram |= {at + i: case.mem.pages[at + i >> PAGE_SHIFT][at + i & 0xFFF] for i in range(len(data))}
    ram |= dict(enumerate(code + halt, start))
    initial = MooState(True, _registers(case), dict(sorted(ram.items())), None, ())
    final = MooState(True, {}, {}, None, ())
    return MooTest(number, _name(case), code + halt, initial, final, None, frozenset(), "")


def _check(case: Case) -> None:
    """Refuse what a file has no place for and what cannot be left out."""
    if case.mode != "real":
        raise UnfitError("not in real mode")
    if case.path is not None or case.extra:
        raise UnfitError("needs a machine around the emulator")
    if case.count != 1 or case.single or case.emul_type or case.vendor != "intel":
        raise UnfitError("runs in a special way")
    if case.port_in:
        raise UnfitError("reads ports")
    for name, segment in zip(_SEGMENTS, case.system.seg, strict=False):
        if segment.p and not _is_real(segment, code=name == "cs"):
            raise UnfitError("a segment is not one of real mode")
    if case.rip > _MASK16 or code_address(case) + len(case.code) > 0x10FFEF:
        raise UnfitError("the code is beyond the reach of real mode")


def _is_real(segment: Segment, *, code: bool) -> bool:
    real = segment_paragraph(segment.sel, code=code)
    return (segment.base, segment.limit, segment.db) == (real.base, real.limit, 0)


def _name(case: Case) -> str:
    return case.id.encode("ascii", "replace").decode()[:_NAME]


def _registers(case: Case) -> dict[str, int]:
    """The registers of RG32; upper halves and CR0's paging bits are left out."""
    system = case.system
    values = {name: value & _MASK32 for name, value in zip(GPR_NAMES, case.gpr, strict=True)}
    values |= {name: seg.sel for name, seg in zip(_SEGMENTS, system.seg, strict=False)}
    values |= {"rip": case.rip, "rflags": case.rflags & _MASK32, "cr3": system.cr3 & _MASK32}
    values |= {"cr0": system.cr0 & _MASK32 & ~cr.X86_CR0_PG, "dr6": system.dr[6] & _MASK32}
    values["dr7"] = system.dr[7] & _MASK32 & ~0xFF
    return {name: values[name] for name in REGISTERS_32}


def _held(test: MooTest) -> Case:
    """The case that reading the test gives."""
    try:
        return vector_of_test(test, KVM, "")[0]
    except SkippedError as error:
        raise UnfitError(str(error)) from None


def _missing_halts(case: Case, outcome: Outcome, ram: dict[int, int]) -> dict[int, int]:
    """Bytes that the memory lacks: the HLT where the case ends, and the vector of an exception."""
    if outcome.exception is not None:
        vector = outcome.exception[0] << 2
        entry = dict(enumerate(b"\0\0" + _HANDLER.to_bytes(2, "little"), vector))
        wanted = entry | {_HANDLER << 4: HLT}
    elif case.code == bytes((HLT,)) or _repeats(case, outcome):
        return {}
    else:
        cs = outcome.system.seg[1]
        place = cs.base + outcome.rip & _MASK32
        if outcome.rip > _MASK16 or place >= 0x10FFEF:
            raise UnfitError("ends beyond the reach of real mode")
        changed = outcome.pages.get(place >> PAGE_SHIFT)
        if changed is not None and place in ram and changed[place & 0xFFF] != ram[place]:
            raise UnfitError("writes where it ends")
        wanted = {place: HLT}
    return {at: byte for at, byte in wanted.items() if ram.get(at) != byte}


def _missing_pages(test: MooTest) -> dict[int, int]:
    """A byte of each page that is written, but not there: all memory exists in such a test."""
    there = {at >> PAGE_SHIFT for at in test.initial.ram}
    return {at >> PAGE_SHIFT << PAGE_SHIFT: 0 for at in test.final.ram if at >> PAGE_SHIFT not in there}


def _repeats(case: Case, outcome: Outcome) -> bool:
    """KVM has done the last iteration, and the instruction has yet to notice."""
    return outcome.rip == case.rip and bool(outcome.rflags & X86_EFLAGS_RF)


def _final(case: Case, outcome: Outcome) -> MooState:
    """The state after the last HLT."""
    after = _registers(case) | {
        name: value & _MASK32 for name, value in zip(GPR_NAMES, outcome.gpr, strict=True)
    }
    after |= {name: seg.sel for name, seg in zip(_SEGMENTS, outcome.system.seg, strict=False)}
    after |= {"rip": outcome.rip + 1, "rflags": outcome.rflags & _MASK32}
    system = outcome.system
    after |= {"cr0": system.cr0, "cr3": system.cr3, "dr6": system.dr[6], "dr7": system.dr[7]}
    ram = {at + i: byte for at, data in memory_changes(case, outcome) for i, byte in enumerate(data)}
    if outcome.exception is not None:
        ram |= _deliver(case, after)
    elif case.code == bytes((HLT,)):
        after["rip"] = outcome.rip
    elif _repeats(case, outcome):
        after["rip"] = outcome.rip + len(case.code) + 1
        after["rflags"] &= ~X86_EFLAGS_RF
    before = _registers(case)
    changed = {name: after[name] for name in REGISTERS_32 if after[name] != before[name]}
    return MooState(True, changed, dict(sorted(ram.items())), None, ())


def _deliver(case: Case, after: dict[str, int]) -> dict[int, int]:
    """Deliver an exception to the handler: the registers afterwards, and the frame (SDM Vol. 3B 21.1.4)."""
    frame = _frame(case)
    words = (case.rip & _MASK16, case.system.seg[1].sel, case.rflags & _MASK16)
    data = b"".join(word.to_bytes(2, "little") for word in words)
    after["rsp"] = after["rsp"] & ~_MASK16 | after["rsp"] - _FRAME & _MASK16
    after["cs"], after["rip"] = _HANDLER, 1
    after["rflags"] &= ~(X86_EFLAGS_IF | X86_EFLAGS_TF | X86_EFLAGS_AC | X86_EFLAGS_RF)
    return dict(zip(frame, data, strict=True))


def _frame(case: Case) -> list[int]:
    """The addresses of IP, CS and FLAGS."""
    stack, pointer = case.system.seg[2].base, case.gpr[4] - _FRAME
    return [stack + (pointer + at & _MASK16) for at in range(_FRAME)]


def _pushed(case: Case, outcome: Outcome) -> tuple[int, int] | None:
    """The number of an exception or interrupt that was delivered, and where its flags are."""
    if outcome.exception is not None:
        return outcome.exception[0], _frame(case)[4]
    numbers = {0xCC: 3, 0xCE: 4, 0xCD: case.code[1] if len(case.code) > 1 else 0}
    number = numbers.get(case.code[0])
    if number is None or outcome.gpr[4] & _MASK16 != case.gpr[4] - _FRAME & _MASK16:
        return None
    return number, _frame(case)[4]

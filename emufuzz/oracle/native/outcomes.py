"""From a record that the child has filled to the outcome of its case."""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec

from emufuzz.arch.exceptions import BP_VECTOR, DB_VECTOR, PF_VECTOR
from emufuzz.arch.regs import (
    VCPU_REGS_RCX,
    VCPU_REGS_RSP,
    VCPU_SREG_CS,
    VCPU_SREG_DS,
    VCPU_SREG_ES,
    VCPU_SREG_FS,
    VCPU_SREG_GS,
    VCPU_SREG_SS,
)
from emufuzz.arch.rflags import (
    EFLAGS_MASK,
    X86_EFLAGS_AC,
    X86_EFLAGS_DF,
    X86_EFLAGS_ID,
    X86_EFLAGS_IF,
    X86_EFLAGS_NT,
    X86_EFLAGS_RF,
    X86_EFLAGS_TF,
    X86_EFLAGS_ZF,
)
from emufuzz.case.model import (
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    ZERO_PAGE,
    Case,
    Fault,
    Outcome,
    Segment,
    case_pages,
)
from emufuzz.oracle.native.child import Child
from emufuzz.oracle.native.layout import (
    FPU_SIZE,
    OUT_CODE,
    OUT_FPU,
    OUT_SELECTORS,
    OUT_SIZE,
    OUT_WORDS,
    SELECTORS_SIZE,
)
from emufuzz.oracle.native.run import Run
from emufuzz.oracle.native.space import Pages, Setup, read_fpu
from emufuzz.oracle.unicorn.prefixes import RepString

#: The case touches a page that no process may have.
GAP_KERNEL_PAGE: Final = "native-kernel-page"

#: RFLAGS bits that user code sets as it likes; TF is up to the way a case is run.
OWN_FLAGS: Final = EFLAGS_MASK | X86_EFLAGS_DF | X86_EFLAGS_NT | X86_EFLAGS_AC | X86_EFLAGS_ID
#: RFLAGS bits that user code cannot change.
_KEPT_FLAGS: Final = ~(OWN_FLAGS | X86_EFLAGS_TF | X86_EFLAGS_RF)
#: What the flags in a signal frame show instead of the case's: the host's IF.
HOST_FLAGS: Final = X86_EFLAGS_IF | 2

_HAS_ERROR_CODE: Final = frozenset((8, 10, 11, 12, 13, 14, 17))
_SELECTORS: Final = struct.Struct("<6H")
_ORDER: Final = (VCPU_SREG_CS, VCPU_SREG_SS, VCPU_SREG_DS, VCPU_SREG_ES, VCPU_SREG_FS, VCPU_SREG_GS)


class Reader:
    """Reads the records of one wake-up, in order."""

    def __init__(self, child: Child, setup: Setup, pages: Pages) -> None:
        self._memory = child.memory
        self._arena = child.arena
        self._pages_of_child = child.layout.pages
        self._setup = setup
        self._pages = pages
        self._pool = child.arena.pool

    def outcome(self, number: int, run: Run) -> Outcome | None:
        """What became of the case in record `number`; None if it wrote to a page that it does not have."""
        memory, setup, case, plan = self._memory, self._setup, run.case, run.plan
        place = self._arena.records_out + number * OUT_SIZE
        words = OUT_WORDS.unpack_from(memory, place)
        gpr, rip, flags, trap = words[:16], words[16], words[17], words[19]
        stepped = trap == DB_VECTOR and run.flags & X86_EFLAGS_TF
        if trap == plan.trap or (not stepped and rip == case.rip):
            outcome = self._fault(case, words)
        else:
            if trap == BP_VECTOR:
                rip -= 1  # the case has an INT3 behind its instruction
            flags = flags & OWN_FLAGS | case.rflags & _KEPT_FLAGS
            if plan.loads_flags:
                flags |= words[17] & X86_EFLAGS_TF
            else:
                flags |= case.rflags & (X86_EFLAGS_TF | setup.hidden_flags)
            outcome = Outcome(case.id, gpr, rip, flags, case.system)
        if plan.rep is not None:
            _stop_between(outcome, run, plan.rep)
        if setup.narrow_stack:
            outcome.gpr = _without_espfix(outcome.gpr)
        self._system(outcome, place, words[23:25], case)
        after = memory[place + OUT_CODE : place + OUT_CODE + len(run.laid)]
        if words[21] or after != run.laid:
            copies = self._copies(words[21])
            if not copies.keys() <= self._pages.mapped.union(run.code_pages):
                return None
            if after != run.laid or not copies.keys().isdisjoint(run.code_pages):
                copies = self._with_code(run, copies, after)
            outcome.pages = copies
        return outcome

    def _fault(self, case: Case, words: tuple[int, ...]) -> Outcome:
        trap, error = words[19], words[18]
        fault: Fault = (trap, error if trap in _HAS_ERROR_CODE else None, None)
        unchecked: tuple[tuple[str, str], ...] = ()
        if trap == PF_VECTOR:
            fault = (trap, error & self._setup.fault_mask, words[20])
            if words[20] >> PAGE_SHIFT in self._pages.missing:
                unchecked = (("all", GAP_KERNEL_PAGE),)
        outcome = Outcome(case.id, words[:16], case.rip, case.rflags, case.system, "propagate_fault")
        outcome.exception, outcome.unchecked = fault, unchecked
        return outcome

    def _system(self, outcome: Outcome, place: int, bases: tuple[int, ...], case: Case) -> None:
        """Note what changed of the FPU and of the segment registers."""
        memory, setup = self._memory, self._setup
        changes: dict[str, Any] = {}
        fpu = memory[place + OUT_FPU : place + OUT_FPU + FPU_SIZE]
        if fpu[:28] != setup.fpu[:28] or fpu[32:] != setup.fpu[32:]:
            changes["fpu"] = read_fpu(fpu)
        selectors = memory[place + OUT_SELECTORS : place + OUT_SELECTORS + SELECTORS_SIZE]
        if selectors != setup.selectors or (bases != setup.bases and not setup.ldt):
            changes["seg"] = _segments_after(setup, selectors, bases)
        if changes:
            after = msgspec.structs.replace(case.system, **changes)
            outcome.system = case.system if after == case.system else after

    def _copies(self, mask: int) -> dict[int, bytes]:
        """The pages that changed. The child puts its copies into POOL in order."""
        copies: dict[int, bytes] = {}
        while mask:
            low = mask & -mask
            copies[self._pages_of_child[low.bit_length() - 1]] = self._memory[
                self._pool : self._pool + PAGE_SIZE
            ]
            self._pool += PAGE_SIZE
            mask ^= low
        return copies

    def _with_code(self, run: Run, copies: dict[int, bytes], after: bytes) -> dict[int, bytes]:
        """The pages that changed, with code in them as it has become."""
        before = case_pages(run.case)
        for number in run.code_pages:
            copies[number] = _code_page(run, number, copies.get(number), after)
        return {number: page for number, page in copies.items() if page != before.get(number)}


def _code_page(run: Run, number: int, copy: bytes | None, after: bytes) -> bytes:
    """A page of code: what the child had without the code, and the code as it has become."""
    page = bytearray(run.case.mem.pages.get(number, ZERO_PAGE) if copy is None else copy)
    for offset, byte in enumerate(after):
        address = run.address + offset
        if address >> PAGE_SHIFT != number:
            continue
        if byte != run.laid[offset]:
            page[address & PAGE_MASK] = byte
        elif offset < len(run.case.code):
            page[address & PAGE_MASK] = run.case.code[offset]
    return bytes(page)


def _without_espfix(gpr: tuple[int, ...]) -> tuple[int, ...]:
    """On the way to a 16-bit stack Linux leaves the upper half of one of its own addresses in RSP."""
    return (*gpr[:VCPU_REGS_RSP], gpr[VCPU_REGS_RSP] & 0xFFFFFFFF, *gpr[VCPU_REGS_RSP + 1 :])


def _stop_between(outcome: Outcome, run: Run, rep: RepString) -> None:
    """A REP string instruction, as KVM leaves it: with RCX at a multiple of 1024 it has yet to end.

    The iterations behind that point, which the child was not given, are added to RCX again.
    """
    gpr, before = outcome.gpr, run.case.gpr[VCPU_REGS_RCX]
    done = before & rep.count_mask and not gpr[VCPU_REGS_RCX] & rep.count_mask
    if run.left:
        outcome.gpr = (gpr[0], gpr[VCPU_REGS_RCX] + run.left, *gpr[2:])
    if outcome.exception is not None or not done:
        return
    ends_if_zero = run.plan.repeat_prefix == 0xF2
    if rep.comparing and bool(outcome.rflags & X86_EFLAGS_ZF) == ends_if_zero:
        return
    outcome.rip = run.case.rip
    outcome.rflags |= X86_EFLAGS_RF


def _segments_after(setup: Setup, selectors: bytes, bases: tuple[int, ...]) -> tuple[Segment, ...]:
    """Segment registers, where the instruction has loaded one or moved a base."""
    before = setup.system.seg
    seg = list(before)
    for number, old, new in zip(
        _ORDER, _SELECTORS.unpack(setup.selectors), _SELECTORS.unpack(selectors), strict=True
    ):
        if old != new:
            seg[number] = Segment(sel=new)
    if not setup.ldt:
        for number, old, new in zip((VCPU_SREG_FS, VCPU_SREG_GS), setup.bases, bases, strict=True):
            if old != new:
                seg[number] = msgspec.structs.replace(seg[number], base=new)
    return tuple(seg)

"""Cases of several instructions: one step after another, each a case of its own.

The machine runs each instruction with all precautions that a single one needs: what the step before
left in registers, memory and devices is where the next one starts. A REP string instruction up to
KVM's stopping point is one instruction. The run ends with the first fault.

What holds for one step of the way holds for all that follows: if a step before the last falls into
a gap, nothing of the end is vouched for. Flags that the SDM leaves undefined after a step are
followed until another one writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import msgspec
from iced_x86 import Mnemonic, RflagsBits

from emufuzz.arch.cr import EFER_NX, X86_CR4_SMEP
from emufuzz.arch.exceptions import PF_VECTOR, PFERR_FETCH, PFERR_USER
from emufuzz.arch.modes import mode_of
from emufuzz.arch.regs import VCPU_SREG_CS
from emufuzz.case.model import (
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    Case,
    Memory,
    Outcome,
    case_memory,
    case_pages,
    code_address,
    is_physical,
)
from emufuzz.case.translate import translate
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.unicorn.code import MAX_INSTRUCTION
from emufuzz.oracle.unicorn.image import cpl_of

#: Flags that an instruction before the last one left undefined, or the shape of its result.
GAP_UNDEFINED: Final = "unicorn-undefined-before"

_MASK32: Final = (1 << 32) - 1
_MASK64: Final = (1 << 64) - 1
#: Instructions that copy RFLAGS as a whole.
_COPIES_FLAGS: Final = frozenset(
    (Mnemonic.PUSHF, Mnemonic.PUSHFD, Mnemonic.PUSHFQ, Mnemonic.SYSCALL, Mnemonic.INT, Mnemonic.INTO)
)
_STATUS: Final = RflagsBits.OF | RflagsBits.SF | RflagsBits.ZF | RflagsBits.AF | RflagsBits.CF | RflagsBits.PF

#: Runs one step: (its case, the same with all of the memory in which its code lies) -> Outcome.
RunStep = Callable[[Case, Callable[[], Case]], Outcome]


class Walk:
    """The way of a case through its instructions.

    Attributes:
        pages: All pages as they are now, code included; physical ones with `phys`.
        step: The next instruction as a case, with its code and all of the memory but the page in which
            the code lies.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self._physical = is_physical(case)
        self._original = case_pages(case)
        self._data = case_memory(case).pages.keys()
        self.pages = dict(self._original)
        self._memories: dict[int, Memory] = {}
        self.step = msgspec.structs.replace(case, count=1)
        if not self._physical:
            self._enter(self.step)

    def advance(self, outcome: Outcome) -> None:
        """Go on from what a step ended in."""
        if outcome.pages:
            self.pages.update(outcome.pages)
            self._memories.clear()
        system = outcome.system
        cs = system.seg[VCPU_SREG_CS]
        mode = mode_of(system.cr0, system.efer, outcome.rflags, cs.l, cs.db)
        self._enter(
            msgspec.structs.replace(
                self._case,
                mode=mode,
                gpr=tuple(outcome.gpr),
                rip=outcome.rip,
                rflags=outcome.rflags,
                system=system,
                count=1,
            )
        )

    def _enter(self, state: Case) -> None:
        state = self._with_phys(state) if self._physical else state
        code = b"".join(self._fetch(state))
        if self._physical:
            self.step = msgspec.structs.replace(state, code=code)
        else:
            around = code_address(state) >> PAGE_SHIFT
            self.step = msgspec.structs.replace(state, code=code, mem=self._memory_but(around))

    def _with_phys(self, state: Case) -> Case:
        phys = [{"addr": hex(n << PAGE_SHIFT), "data": page.hex()} for n, page in self.pages.items()]
        return msgspec.structs.replace(state, extra={**(state.extra or {}), "phys": phys})

    def _memory_but(self, number: int) -> Memory:
        """All pages, but not the one of the running code unless it is one of the case's data."""
        if number in self._data:
            number = -1
        memory = self._memories.get(number)
        if memory is None:
            entries = ((n << PAGE_SHIFT, page) for n, page in self.pages.items() if n != number)
            memory = self._memories[number] = Memory(tuple(entries))
        return memory

    def _fetch(self, state: Case) -> Iterator[bytes]:
        """The bytes at RIP, of as many pages as there are, at most those of one instruction."""
        mask = _MASK64 if state.mode == "prot64" else _MASK32
        address, left = code_address(state), MAX_INSTRUCTION
        while left and address <= mask:
            page = self._page(state, address)
            if page is None:
                return
            start = address & PAGE_MASK
            here = min(left, PAGE_SIZE - start)
            yield page[start : start + here]
            address, left = address + here, left - here

    def _page(self, state: Case, linear: int) -> bytes | None:
        if not self._physical:
            return self.pages.get(linear >> PAGE_SHIFT)
        system = state.system
        at = translate(self.pages, system.cr0, system.cr3, system.cr4, system.efer, linear)
        return None if at is None else self.pages.get(at >> PAGE_SHIFT)

    def whole(self) -> Case:
        """The step with all of the memory."""
        return self.step if self._physical else msgspec.structs.replace(self.step, mem=self._memory_but(-1))

    def run(self, run: RunStep) -> Outcome:
        """Run the step; a fetch from an absent page of flat memory needs no engine."""
        if self.step.code or self._physical:
            return run(self.step, self.whole)
        return fetch_fault(self.step)

    def ended(self, outcome: Outcome) -> Outcome:
        """The outcome of the case, given that of its last step."""
        self.pages.update(outcome.pages)
        outcome.id = self._case.id
        outcome.pages = {n: page for n, page in self.pages.items() if page != self._original.get(n)}
        if outcome.system == self._case.system:
            outcome.system = self._case.system
        return outcome


def fetch_fault(case: Case) -> Outcome:
    """The #PF of a fetch from a page that does not exist (SDM Vol. 3A 4.7)."""
    outcome = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system, rc="propagate_fault")
    code = PFERR_USER if cpl_of(case.system, case.mode) == 3 else 0
    if case.system.efer & EFER_NX or case.system.cr4 & X86_CR4_SMEP:
        code |= PFERR_FETCH
    outcome.exception = PF_VECTOR, code, code_address(case)
    return outcome


def run_several(case: Case, run: RunStep) -> Outcome:
    """The outcome of a case of several instructions.

    If a step is not vouched for at all the way ends there.
    """
    walk = Walk(case)
    outcome = walk.run(run)
    for _ in range(case.count - 1):
        if outcome.exception is not None or outcome.unchecked:
            break
        walk.advance(outcome)
        outcome = walk.run(run)
    return walk.ended(outcome)


def unchecked_steps(
    case: Case, run: RunStep, gaps_of: Callable[[Case, Outcome], tuple[tuple[str, str], ...]]
) -> tuple[tuple[str, str], ...]:
    """The gaps of a case of several instructions; `gaps_of` tells those of one step."""
    walk, undefined = Walk(case), 0
    for left in range(case.count - 1, -1, -1):
        outcome = walk.run(run)
        found = outcome.unchecked + gaps_of(walk.whole(), outcome)
        instruction = CaseInstruction(walk.step)
        if undefined & _read(instruction):
            return (("all", GAP_UNDEFINED),)
        if outcome.exception is not None or not left:
            undefined = undefined if outcome.exception is not None else undefined & ~_written(instruction)
            return (*found, ("rflags", GAP_UNDEFINED)) if undefined else found
        if found:
            return tuple(("all", gap) for _, gap in found)
        undefined = undefined & ~_written(instruction) | instruction.strict.rflags_undefined
        walk.advance(outcome)
    return ()


def _read(instruction: CaseInstruction) -> int:
    """The status flags that an instruction depends on."""
    return _STATUS if instruction.mnemonic in _COPIES_FLAGS else int(instruction.strict.rflags_read)


def _written(instruction: CaseInstruction) -> int:
    """The status flags that are defined after an instruction; shifts may write none."""
    strict = instruction.strict
    if strict.rflags_undefined or instruction.string_opcode:
        return 0
    return int(strict.rflags_written | strict.rflags_cleared | strict.rflags_set)

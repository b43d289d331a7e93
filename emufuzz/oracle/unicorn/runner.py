"""How a case runs in Unicorn: what QEMU's translator makes of it.

One engine takes every mode. Per case: the state image of its System is copied into the saved
context, registers are packed over it, one restore, one start of one instruction, one save; then
registers, system state and memory are compared with what went in, and only differences are decoded.

A case normally runs in the fast mode: its code in a slot of a shared code page, the rest of that
page not as the case has it. If the instruction reads that page or writes to it, or if its fetch
reaches the page's end, the case runs again in the exact mode, with an address space of its own
that has exactly the case's pages, code pages read-only.
"""

from __future__ import annotations

import re
import struct
from typing import Final

from emufuzz.arch.cr import EFER_NX, X86_CR4_SMEP
from emufuzz.arch.exceptions import (
    AC_VECTOR,
    DB_VECTOR,
    DF_VECTOR,
    GP_VECTOR,
    NP_VECTOR,
    PF_VECTOR,
    PFERR_FETCH,
    PFERR_PRESENT,
    SS_VECTOR,
    TS_VECTOR,
    UD_VECTOR,
)
from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_SREG_CS
from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_TF, X86_EFLAGS_VM
from emufuzz.case.model import PAGE_SHIFT, Case, Fault, Outcome, case_pages, code_address
from emufuzz.oracle.unicorn.code import MAX_INSTRUCTION
from emufuzz.oracle.unicorn.engine import NO_UNTIL, NO_VECTOR, UC_ERR_INSN_INVALID
from emufuzz.oracle.unicorn.hidden import hidden_access, prepared, show
from emufuzz.oracle.unicorn.image import HF_INHIBIT_IRQ, Template, paging_differs, read_system
from emufuzz.oracle.unicorn.machine import GPRS, REGISTERS, RIP_OFFSET, RIP_RFLAGS, UnicornMachine
from emufuzz.oracle.unicorn.memory import EXECUTABLE_DATA_PAGE, AddressSpace, MemoryFullError
from emufuzz.oracle.unicorn.prefixes import RepString, makes_shadow, may_be_special, rep_string
from emufuzz.oracle.unicorn.refusals import GAP_DELIVERY, GAP_ENGINE_ERROR, GAP_WRAP, not_run, refused
from emufuzz.oracle.unicorn.selftest import GAP_CODE_PAGE_WRITE
from emufuzz.oracle.unicorn.short_movbe import as_move, is_short

_HAS_ERROR_CODE: Final = frozenset(
    (DF_VECTOR, TS_VECTOR, NP_VECTOR, SS_VECTOR, GP_VECTOR, PF_VECTOR, AC_VECTOR)
)
#: error_code and exception_is_int.
_PENDING: Final = struct.Struct("<2i")
_CR2: Final = struct.Struct("<Q")
#: What needs a closer look than an exception of the instruction itself.
_NOT_PLAIN: Final = frozenset((NO_VECTOR, DB_VECTOR))
#: An opcode byte without which the FPU and vector registers stay as they are.
_MAY_TOUCH_FPU: Final = re.compile(rb"[\x0f\x9b\xd8-\xdf]").search
#: A byte of any of what is looked for in code.
_MARKED: Final = re.compile(rb"[\x0f\x9b\xd8-\xdf\xf0\xf2\xf3]").search
_SHADOW_MOV_SS: Final = 1
_SHADOW_STI: Final = 2
_STI: Final = 0xFB


class UnicornRunner(UnicornMachine):
    """A machine that tells what came of a case."""

    def _run(self, case: Case) -> Outcome:
        """One case, in the fast mode if that can run it.

        The way of an instruction that completes and changes only GPRs and memory is written out
        here: one call of Unicorn takes hardly longer than all that Python does around it.
        """
        code = case.code
        bare = _MARKED(code) is None
        if not bare and may_be_special(code):
            special = self._run_special(case)
            if special is not None:
                return special
        template = self._prepare(case)
        if template is None:
            return self._run_exact(case, self._use_template(case.system, case.mode))
        rep, masked, count = None, template.masked_flags, 1
        if not bare and (b"\xf3" in code or b"\xf2" in code):
            rep = rep_string(code, case.mode, case.system.seg[VCPU_SREG_CS].db)
            if rep is not None:
                if rep.comparing:
                    outcome = self._finished(case, template, self._execute(case, template, rep), rep)
                    self._forget_signals()
                    return outcome
                masked |= X86_EFLAGS_TF
                count = rep.iterations(case.gpr[VCPU_REGS_RCX])
        engine = self._engine
        rip, state = case.rip, self._state
        state[:] = self._image
        REGISTERS.pack_into(state, 0, *case.gpr, rip, case.rflags & ~masked)
        handle, context = self._handle, self._context
        self._restore(handle, context)
        error = self._start(handle, rip, NO_UNTIL, 0, count)
        self._save(handle, context)
        if error or engine.vector != NO_VECTOR or self._read_code:
            outcome = self._plain_fault(case, error, rep) or self._finished(case, template, error, rep)
            self._forget_signals()
            return outcome
        if self._control.raw != self._control_before or (
            not bare and _MAY_TOUCH_FPU(code) and self._fpu_changed()
        ):
            return self._completed(case, template, rep)
        next_rip, flags = RIP_RFLAGS.unpack_from(state, RIP_OFFSET)
        flags = flags & ~masked | case.rflags & masked & ~X86_EFLAGS_RF
        if rep is not None and next_rip == rip:
            flags |= X86_EFLAGS_RF  # KVM's stopping point
        outcome = Outcome(case.id, GPRS.unpack_from(state), next_rip, flags, case.system)
        if not 0 <= next_rip - rip <= MAX_INSTRUCTION:
            self._branched_to(template, case.system, next_rip)
        space = self._space
        place, clean = space.watched
        if self._buffer[place] != clean or (space.more_watched and space.written()):
            outcome.pages = self._changed_pages()
        return outcome

    def _run_special(self, case: Case) -> Outcome | None:
        """A case that Unicorn must not see as it is, or whose access lies elsewhere; None if neither."""
        move = as_move(case) if is_short(case) else None
        if move is not None:
            return move.finished(case, self._run(move.case))
        return refused(case) or self._run_hidden(case)

    def _run_hidden(self, case: Case) -> Outcome | None:
        """A case that accesses what is behind the hidden page tables, or debug registers; None if not."""
        access = hidden_access(case)
        if access is None:
            return None
        actual = prepared(case, access)
        template = self._prepare(actual)
        if template is None:
            outcome = self._run_exact(actual, self._use_template(case.system, case.mode))
        else:
            outcome = self._finished(actual, template, self._execute(actual, template, None), None)
        self._forget_signals()
        return show(case, access, outcome, self._state, self._layout)

    def _plain_fault(self, case: Case, error: int, rep: RepString | None) -> Outcome | None:
        """The outcome of an instruction whose exception left the system state alone, as most do.

        None if it is anything else: a software interrupt, a trap, an access to the code page.
        """
        engine, layout = self._engine, self._layout
        state = engine.state
        vector = UD_VECTOR if error == UC_ERR_INSN_INVALID else engine.vector
        if self._read_code or rep is not None or vector in _NOT_PLAIN:
            return None
        code, is_int = _PENDING.unpack_from(state, layout.error_code)
        rip, _ = RIP_RFLAGS.unpack_from(state, RIP_OFFSET)
        if is_int or rip != case.rip:
            return None
        address = None
        if vector == PF_VECTOR:
            if code & PFERR_PRESENT:
                return None
            (address,) = _CR2.unpack_from(state, layout.cr + 16)
            _CR2.pack_into(state, layout.cr + 16, case.system.cr2)
            if not case.system.efer & EFER_NX and not case.system.cr4 & X86_CR4_SMEP:
                code &= ~PFERR_FETCH
        if self._control.raw != self._control_before or (_MAY_TOUCH_FPU(case.code) and self._fpu_changed()):
            if address is not None:
                _CR2.pack_into(state, layout.cr + 16, address)
            return None
        gprs = GPRS.unpack_from(state)
        outcome = Outcome(case.id, gprs, rip, case.rflags, case.system, "propagate_fault")
        outcome.exception = (vector, code if vector in _HAS_ERROR_CODE else None, address)
        if self._space.written():
            outcome.pages = self._changed_pages()
        return outcome

    def _finished(self, case: Case, template: Template, error: int, rep: RepString | None) -> Outcome:
        """The outcome of a run in the fast mode, or of another one in the exact mode."""
        if not (error or self._engine.vector != NO_VECTOR or self._read_code):
            return self._completed(case, template, rep)
        if self._needs_exact(case):
            self._restore_memory()
            return self._run_exact(case, template)
        return self._faulted(case, template, error, rep)

    def _completed(self, case: Case, template: Template, rep: RepString | None) -> Outcome:
        """The outcome of an instruction that raised nothing."""
        registers = REGISTERS.unpack_from(self._engine.state)
        rip, rflags = registers[16], registers[17]
        masked = template.masked_flags
        loaded_vm = rflags & X86_EFLAGS_VM  # by IRET: it is hidden from code of other modes
        rflags = rflags & ~masked | case.rflags & masked & ~X86_EFLAGS_RF | loaded_vm
        outcome = Outcome(case.id, registers[:16], rip, rflags, case.system)
        if self._control.raw != self._control_before or self._fpu_changed():
            self._read_system(case, template, outcome)
            if paging_differs(self._engine.state, self._layout, self._image):
                # The next restore puts that back, but not the TLB.
                self._engine.flush_tlb()
        if not 0 <= rip - case.rip <= MAX_INSTRUCTION:
            self._branched_to(template, outcome.system, rip)
        space = self._space
        if space.written():
            outcome.pages = self._changed_pages()
        if rep is not None:
            # TF was hidden from the iterations; RF is set at KVM's stopping point.
            outcome.rflags |= case.rflags & X86_EFLAGS_TF | (X86_EFLAGS_RF if rip == case.rip else 0)
        return outcome

    def _read_system(self, case: Case, template: Template, outcome: Outcome) -> None:
        state = self._engine.state
        outcome.system = read_system(state, self._layout, template)
        (hflags,) = struct.unpack_from("<I", state, self._layout.hflags)
        if hflags & HF_INHIBIT_IRQ:
            outcome.interruptibility = _SHADOW_STI if _STI in case.code[:MAX_INSTRUCTION] else _SHADOW_MOV_SS

    def _needs_exact(self, case: Case) -> bool:
        """Whether the run depended on what the fast mode does not have right: the code page."""
        if self._read_code:
            return True
        if self._engine.vector != PF_VECTOR or not self._at_start(case):
            return False
        return bool(self._error_code() & PFERR_PRESENT)

    def _error_code(self) -> int:
        return int(struct.unpack_from("<i", self._engine.state, self._layout.error_code)[0])

    def _faulted(self, case: Case, template: Template, error: int, rep: RepString | None) -> Outcome:
        """The outcome of a run that ended with an exception or an error of Unicorn."""
        engine = self._engine
        vector = UD_VECTOR if error == UC_ERR_INSN_INVALID else engine.vector
        state = engine.state
        fault = self._fault(case, vector)
        (is_int,) = struct.unpack_from("<i", state, self._layout.exception_is_int)
        self._hide_cr2(case)
        trapped = vector == DB_VECTOR and case.rflags & X86_EFLAGS_TF and not is_int
        if trapped or not (is_int or self._at_start(case)):
            # The instruction is done; the next one was not wanted, nor the single-step trap.
            return self._untrapped(case, template, rep)
        outcome = self._completed(case, template, rep)
        outcome.rip, outcome.rflags, outcome.interruptibility = case.rip, case.rflags, 0
        if vector == NO_VECTOR:
            outcome.unchecked = (("all", GAP_ENGINE_ERROR),)
            return outcome
        outcome.rc = "propagate_fault"
        outcome.exception = fault
        if is_int:
            outcome.unchecked = (("all", GAP_DELIVERY),)
        if vector == PF_VECTOR and self._is_code_page_write():
            outcome.unchecked = (("all", GAP_CODE_PAGE_WRITE),)
        return outcome

    def _hide_cr2(self, case: Case) -> None:
        """Give CR2 back its value: flat memory has no page faults as the case's own tables would raise."""
        struct.pack_into("<Q", self._engine.state, self._layout.cr + 16, case.system.cr2)

    def _is_code_page_write(self) -> bool:
        """Whether a #PF came from the hidden protection of a code page: all else that exists is writable."""
        return bool(self._error_code() & PFERR_PRESENT)

    def _untrapped(self, case: Case, template: Template, rep: RepString | None) -> Outcome:
        """The outcome without the single-step trap's mark in DR6."""
        state, place = self._engine.state, self._layout.dr + 6 * 8
        if self._engine.vector == DB_VECTOR:
            struct.pack_into("<Q", state, place, case.system.dr[6])
        return self._completed(case, template, rep)

    def _fault(self, case: Case, vector: int) -> Fault:
        if vector not in _HAS_ERROR_CODE:
            return vector, None, None
        code = self._error_code()
        if vector != PF_VECTOR:
            return vector, code, None
        if not case.system.efer & EFER_NX and not case.system.cr4 & X86_CR4_SMEP:
            code &= ~PFERR_FETCH
        (cr2,) = struct.unpack_from("<Q", self._engine.state, self._layout.cr + 16)
        return vector, code, cr2

    def _run_exact(self, case: Case, template: Template) -> Outcome:
        """Run a case with exactly its own pages, whatever it costs.

        Its frames hold no translated code: every run here ends with a flush, and the new page
        tables make Unicorn forget which code it found at an address.
        """
        self.exact_runs += 1
        if code_address(case) + MAX_INSTRUCTION > template.address_mask:
            return not_run(case, GAP_WRAP, None)
        pages = case_pages(case)
        mark = self._pool.next
        try:
            space = AddressSpace(self._pool, pages, EXECUTABLE_DATA_PAGE)
        except MemoryFullError:
            self._forget_code()
            mark = self._pool.next
            space = AddressSpace(self._pool, pages, EXECUTABLE_DATA_PAGE)
        address = code_address(case)
        space.protect(range(address >> PAGE_SHIFT, (address + max(len(case.code), 1) - 1 >> PAGE_SHIFT) + 1))
        shared, self._space = self._space, space
        self._cr3 = 0
        self._compose(template)
        try:
            rep = rep_string(case.code, case.mode, case.system.seg[VCPU_SREG_CS].db)
            if rep is None and not makes_shadow(case.code, case.mode):
                self._single_instruction_blocks()
            error = self._execute(case, template, rep)
            if error or self._engine.vector != NO_VECTOR:
                return self._faulted(case, template, error, rep)
            return self._completed(case, template, rep)
        finally:
            self._forget_signals()
            self._code.flush()
            self._pool.reset(mark)
            self._space = shared
            self._cr3 = 0
            self._compose(template)

    def _single_instruction_blocks(self) -> None:
        """Let the next translation end after one instruction.

        Otherwise it goes on, and an absent page behind the instruction would raise a #PF before
        the instruction ran. An interrupt shadow has this effect, and ends with the instruction.
        """
        place = self._layout.hflags
        (hflags,) = struct.unpack_from("<I", self._image, place)
        shadow = (hflags | HF_INHIBIT_IRQ).to_bytes(4, "little")
        self._image = self._image[:place] + shadow + self._image[place + 4 :]

"""Task switches (SDM Vol. 3A 7.3 "Task Switching"), from the exit on: the checks before it have passed.

SDM Vol. 3C 25.4.2: before the exit the processor has looked at the selector, type, presence and limit of
the new TSS, and at the privileges of a gate. Faults that come later are left open.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from emufuzz.arch.cr import X86_CR0_PG, X86_CR0_TS, X86_CR4_PAE
from emufuzz.arch.exceptions import DB_VECTOR
from emufuzz.arch.regs import SREG_NAMES, VCPU_REGS_RSP, VCPU_SREG_LDTR, VCPU_SREG_SS, VCPU_SREG_TR
from emufuzz.arch.rflags import X86_EFLAGS_NT, X86_EFLAGS_TF, X86_EFLAGS_VM
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Outcome, Segment
from emufuzz.oracle.exits.run import NoExitError, OpenError, Run
from emufuzz.oracle.exits.task_segments import RefusedError, TaskSegments, descriptor_of
from emufuzz.oracle.instruction import outside_limit
from emufuzz.oracle.native_view import is_stepped

CALL, IRET, JMP, GATE = range(4)

_BUSY: Final = 2
_WIDE: Final = 8  # of a TSS descriptor's type: 32 bits
_TSS_TYPES: Final = (1, 3, 9, 11)
_DR7_LOCAL: Final = 0x155  # L0 to L3, LE
_VALID: Final = 1 << 31
_SOFT: Final = (4, 5, 6)
_HARDWARE: Final = 3
_HAS_CODE: Final = 1 << 11
_MASK32: Final = 0xFFFFFFFF
_FLAGS: Final = 0x3F7FD7
_FIXED: Final = 2
_UPPER: Final = 0xFFFF0000


class Layout(NamedTuple):
    """Where a TSS has its fields (SDM Vol. 3A Figures 7-2, 7-10): `step` bytes from one to the next.

    Of selectors in a 32-bit TSS the upper halves are reserved, and set to 0.
    """

    size: int
    width: int
    step: int
    rip: int
    segments: int
    ldt: int
    selectors: int
    cr3: int


TSS32: Final = Layout(0x68, 4, 4, 0x20, 0x48, 0x60, 6, 0x1C)
TSS16: Final = Layout(0x2C, 2, 2, 0x0E, 0x22, 0x2A, 4, 0)
_TRAP: Final = 0x64


class Way(NamedTuple):
    """What of a task switch is done in another way than the SDM's; KVM has all of these ways.

    Attributes:
        new_format: The old task is saved in the format of the new one.
        saves_table: LDTR is saved in a 16-bit TSS.
        upper: What a 16-bit task has in the upper halves of its registers, which the SDM leaves undefined.
        stays_virtual: From virtual-8086 mode to a 16-bit task the segments remain those of that mode.
        traps: The T bit of the new TSS raises #DB.
        loses: An exception on the way to the new task is lost, and with it the rest of the switch.
    """

    new_format: bool = False
    saves_table: bool = False
    upper: int = _UPPER
    stays_virtual: bool = False
    traps: bool = True
    loses: bool = False


SDM: Final = Way()
KVM: Final = Way(new_format=True, saves_table=True, upper=0, stays_virtual=True, traps=False, loses=True)


def task_switch(run: Run, way: Way = SDM) -> Outcome:
    """The processor is in the new task.

    Raises:
        UnsupportedCaseError: Userspace single-steps a guest that does so, too.
        NoExitError: The processor faults before it exits.
        OpenError: Memory is missing on the way.
    """
    if run.kvm.get("pending"):
        run.open += ["exception", "exception.error_code", "exception.address"]
    if way.loses:
        lost = _Switch(Run(run.case), way).lost()
        if lost is not None:
            return lost
    return _Switch(run, way).done()


class _Switch:
    def __init__(self, run: Run, way: Way) -> None:
        self.run = run
        self.way = way
        qualification = run.kvm.get("exit_qualification")
        if qualification is None:
            raise UnsupportedCaseError("kvm.exit_qualification: it does not say which task")
        self.selector = qualification & 0xFFFF
        self.reason = qualification >> 30 & 3
        self.vectoring = run.kvm.get("vectoring_info", 0)
        self.old_selector = run.seg[VCPU_SREG_TR].sel
        self.new = self._target()
        self.layout = TSS32 if self.new.type & _WIDE else TSS16
        wide = run.seg[VCPU_SREG_TR].type & _WIDE
        self.old_layout = self.layout if way.new_format else TSS32 if wide else TSS16

    def _target(self) -> Segment:
        """The new TSS, if the processor would have come as far as the exit."""
        run, selector = self.run, self.selector
        table = run.case.system.gdtr
        if selector & 4 or not selector & 0xFFF8 or (selector & 0xFFF8) + 7 > table.limit:
            raise NoExitError("kvm.exit_qualification: the selector is refused before the exit")
        new = descriptor_of(selector, run.read(table.base + (selector & 0xFFF8), 8))
        busy = bool(new.type & _BUSY)
        limit = TSS32.size - 1 if new.type & _WIDE else TSS16.size - 1
        fits = new.p and not new.s and new.type in _TSS_TYPES and new.limit >= limit
        if not fits or busy != (self.reason == IRET):
            raise NoExitError("kvm.exit_qualification: the TSS is refused before the exit")
        if self.reason == GATE and not self.vectoring & _VALID:
            raise NoExitError("kvm.vectoring_info: no event goes through the gate")
        if self.reason == GATE and self.vectoring >> 8 & 7 in _SOFT:
            self._gate()
        return new

    def _gate(self) -> None:
        """A software interrupt needs the right to its gate (SDM Vol. 3A 6.12.1.1)."""
        table = self.run.case.system.idtr
        at = (self.vectoring & 0xFF) * 8
        if at + 7 > table.limit:
            raise NoExitError("kvm.vectoring_info: there is no gate")
        gate = descriptor_of(0, self.run.read(table.base + at, 8))
        case = self.run.case
        level = 3 if case.mode == "vm86" else case.system.seg[VCPU_SREG_SS].dpl
        if gate.dpl < level:
            raise NoExitError("kvm.vectoring_info: the gate is refused before the exit")

    def done(self) -> Outcome:
        """All steps, in the order of SDM Vol. 3A 7.3."""
        run = self.run
        self._leave_old()
        values = self._values()
        if self.reason in {CALL, GATE}:
            run.write(self.new.base, self.layout.width, self.old_selector)
        if self.reason != IRET:
            self._mark_busy(self.selector, busy=True)
        run.fields["cr0"] = run.case.system.cr0 | X86_CR0_TS
        run.put_segment(VCPU_SREG_TR, self._task_register())
        refused = self._load(values)
        dr = run.case.system.dr
        run.fields["dr"] = (*dr[:7], dr[7] & ~_DR7_LOCAL)
        if refused:
            return self._refused(refused)
        self._push_code()
        return self._outcome()

    def lost(self) -> Outcome | None:
        """A selector is refused, and KVM stops there: with old registers, but for RFLAGS and selectors."""
        run = self.run
        self._leave_old()
        values = self._values()
        if self.reason in {CALL, GATE}:
            run.write(self.new.base, self.layout.width, self.old_selector)
        if self.layout is TSS32:
            self._load_cr3()
        run.rip, run.rflags = self._return_address(), values[1] & _FLAGS | _FIXED
        return None if self._loader().load_until_refused() is None else run.delivered()

    def _refused(self, refused: list[RefusedError]) -> Outcome:
        """The exception occurs in the new task, which cannot rely on its segment registers.

        SDM Vol. 3A 6.15, #TS and #NP: which of them are loaded by then is not defined.
        """
        faults = {(each.vector, each.code) for each in refused}
        run = self.run
        if len(faults) != 1:  # in which order they are checked is not defined
            run.undefined += ["exception", "exception.error_code"]
        run.undefined += [f"seg.{name}" for name in (*SREG_NAMES[:6], "ldtr")]
        vector, code = min(faults)
        outcome = run.delivered()
        outcome.exception, outcome.rc = (vector, code, None), "propagate_fault"
        return outcome

    def _outcome(self) -> Outcome:
        outcome = self.run.delivered()
        if self.way.traps and self.layout is TSS32 and self.run.read(self.new.base + _TRAP, 2) & 1:
            outcome.exception = (DB_VECTOR, None, None)
        return outcome

    # The old task

    def _leave_old(self) -> None:
        run, layout = self.run, self.old_layout
        base = run.seg[VCPU_SREG_TR].base
        if run.seg[VCPU_SREG_TR].limit < layout.size - 1:
            raise OpenError("the old TSS is too short")
        if self.reason in {IRET, JMP}:
            self._mark_busy(self.old_selector, busy=False)
        if is_stepped(run.case) and run.rflags & X86_EFLAGS_TF:
            raise UnsupportedCaseError("kvm.guest_debug: userspace steps the guest, and RFLAGS.TF is its own")
        flags = run.rflags & ~X86_EFLAGS_NT if self.reason == IRET else run.rflags
        for i, value in enumerate((self._return_address(), flags, *run.gpr[:8])):
            run.write(base + layout.rip + i * layout.step, layout.width, value)
        for i in range(layout.selectors):
            run.write(base + layout.segments + i * layout.step, layout.width, run.seg[i].sel)
        if layout is TSS16 and self.way.saves_table:
            run.write(base + layout.ldt, layout.width, run.seg[VCPU_SREG_LDTR].sel)

    def _return_address(self) -> int:
        """Behind the instruction, unless an event of hardware's goes through the gate."""
        hardware = self.vectoring & _VALID and self.vectoring >> 8 & 7 not in _SOFT
        return self.run.rip if hardware else self.run.rip + self.run.length() & _MASK32

    def _mark_busy(self, selector: int, *, busy: bool) -> None:
        at = self.run.case.system.gdtr.base + (selector & 0xFFF8) + 5
        value = self.run.read(at, 1)
        self.run.write(at, 1, value | _BUSY if busy else value & ~_BUSY)

    # The new task

    def _values(self) -> list[int]:
        """RIP, RFLAGS and eight registers of the new task, as wide as its TSS."""
        layout = self.layout
        first = self.new.base + layout.rip
        return [self.run.read(first + i * layout.step, layout.width) for i in range(10)]

    def _task_register(self) -> Segment:
        return msgspec.structs.replace(self.new, type=self.new.type | _BUSY)

    def _load(self, values: list[int]) -> list[RefusedError]:
        """The new task's registers; what of its selectors is refused.

        Upper halves of registers are undefined after a switch to a 16-bit task; here they are ones. An EIP
        beyond the limit of CS is left to the fetch of the first instruction.
        """
        run, layout = self.run, self.layout
        if layout is TSS32:
            self._load_cr3()
        run.rip, flags = values[0], values[1]
        upper = self.way.upper if layout is TSS16 else 0
        run.gpr[:8] = [value | upper for value in values[2:]]
        run.rflags = flags & _FLAGS | _FIXED
        if layout is TSS16 and run.case.rflags >> 16:
            run.undefined.append("rflags")
        if self.reason in {CALL, GATE}:
            run.rflags |= X86_EFLAGS_NT
        return self._loader().load()

    def _loader(self) -> TaskSegments:
        """The loads of the new task, whose RFLAGS are there already."""
        run, layout, base = self.run, self.layout, self.new.base
        virtual = bool(run.rflags & X86_EFLAGS_VM) and layout is TSS32
        if layout is TSS16 and run.case.mode == "vm86":
            virtual = self.way.stays_virtual
        selectors = [run.read(base + layout.segments + i * layout.step, 2) for i in range(layout.selectors)]
        return TaskSegments(run, selectors, run.read(base + layout.ldt, 2), virtual=virtual)

    def _load_cr3(self) -> None:
        """Without paging nobody looks at it; of PAE paging the pointers behind it would be loaded, too."""
        system = self.run.case.system
        value = self.run.read(self.new.base + TSS32.cr3, 4)
        self.run.fields["cr3"] = value
        if not system.cr0 & X86_CR0_PG:
            self.run.undefined.append("cr3")
        elif system.cr4 & X86_CR4_PAE:
            raise OpenError("page-directory pointers are loaded")

    def _push_code(self) -> None:
        """The error code of an exception that came through a gate (SDM Vol. 3A 6.14)."""
        run = self.run
        hard = self.reason == GATE and self.vectoring >> 8 & 7 == _HARDWARE
        if not hard or not self.vectoring & _HAS_CODE:
            return
        stack, size = run.seg[VCPU_SREG_SS], self.layout.width
        mask = _MASK32 if stack.db else 0xFFFF
        offset = run.gpr[VCPU_REGS_RSP] - size & mask
        if outside_limit(stack, offset, size):
            raise OpenError("the new stack ends")
        run.write(stack.base + offset, size, run.kvm.get("vectoring_error_code", 0))
        run.gpr[VCPU_REGS_RSP] = run.gpr[VCPU_REGS_RSP] & ~mask | offset

"""How a case runs in Bochs, and what comes of it.

A case is run as hardware would execute it natively (emufuzz.oracle.native_view). REP string
instructions get as many iterations as KVM makes before it returns to the guest.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import EFER_NX, X86_CR0_PG, X86_CR4_SMEP
from emufuzz.arch.exceptions import (
    AC_VECTOR,
    DF_VECTOR,
    GP_VECTOR,
    NP_VECTOR,
    PF_VECTOR,
    PFERR_FETCH,
    PFERR_PRESENT,
    SS_VECTOR,
    TS_VECTOR,
)
from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_SREG_CS
from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_VM
from emufuzz.case.devices import devices_of, trace_to_obj
from emufuzz.case.model import (
    PAGE_SHIFT,
    ZERO_PAGE,
    Case,
    Fault,
    Memory,
    Outcome,
    System,
    case_pages,
    code_address,
    code_parts,
    is_physical,
)
from emufuzz.oracle.bochs.abi import CpuState
from emufuzz.oracle.bochs.engine import Engine
from emufuzz.oracle.bochs.space import Space, SpaceFullError
from emufuzz.oracle.bochs.state import REGISTERS, REGISTERS_AT, Template, cpl_of, hidden_kind, read_system
from emufuzz.oracle.native_view import judge_case
from emufuzz.oracle.unicorn.prefixes import RepString, rep_string, split_prefixes

#: The access of a physical case met an address without memory; Bochs has no bus that floats there.
GAP_NO_MEMORY: Final = "bochs-no-memory"
#: The hidden page tables raised a #PF that is not one of an absent page.
GAP_HIDDEN_RIGHTS: Final = "bochs-hidden-rights"

_HAS_ERROR_CODE: Final = frozenset(
    (DF_VECTOR, TS_VECTOR, NP_VECTOR, SS_VECTOR, GP_VECTOR, PF_VECTOR, AC_VECTOR)
)
_CACHED: Final = 512
_MOV_CR_TO, _MOV_CR_FROM = b"\x0f\x20", b"\x0f\x22"
_MSR_OR_CLTS: Final = frozenset((b"\x0f\x06", b"\x0f\x30", b"\x0f\x32"))
_ESCAPES: Final = frozenset(bytes((opcode,)) for opcode in range(0xD8, 0xE0))
_FXRSTOR: Final = b"\x0f\xae"
#: ModRM bytes of 0F AE /1 and /5, FXRSTOR and XRSTOR.
_LOADS_IMAGE: Final = frozenset(bytes((modrm,)) for modrm in range(0x100) if modrm >> 3 & 3 == 1)
_SMSW_LMSW: Final = frozenset((4, 6))
_MAX_INSTRUCTION: Final = 15
_INT1: Final = 0xF1


def shows_control(code: bytes, mode: str) -> bool:
    """Whether an instruction shows or changes CR0, CR3, CR4 or EFER as such."""
    if b"\x0f" not in code[:_MAX_INSTRUCTION]:
        return False
    _, rest = split_prefixes(code, mode)
    opcode = rest[:2]
    if opcode == b"\x0f\x01":
        return len(rest) > 2 and rest[2] >> 3 & 7 in _SMSW_LMSW
    return opcode in {_MOV_CR_TO, _MOV_CR_FROM} or opcode in _MSR_OR_CLTS


def leaves_pointers(code: bytes, mode: str) -> bool:
    """Whether an instruction may load the x87 FPU's pointers, which later ones store (SDM Vol. 1 8.1.8)."""
    _, rest = split_prefixes(code, mode)
    return rest[:1] in _ESCAPES or (rest[:2] == _FXRSTOR and rest[2:3] in _LOADS_IMAGE)


class Runner:
    """Runs cases on one engine, and keeps what it knows of Systems and Memories."""

    def __init__(self) -> None:
        """Load the engine.

        Raises:
            OracleUnavailableError: it cannot be loaded.
        """
        self._engine = Engine()
        self._templates: dict[tuple[int, str, bool, bool], tuple[System, Template]] = {}
        self._spaces: dict[tuple[int, range, str, bool], tuple[Memory, Space]] = {}

    def forget(self) -> None:
        """Drop what is known of the objects of an earlier batch."""
        self._templates.clear()
        self._forget_spaces()

    def run(self, case: Case) -> Outcome:
        """The outcome of a case, with the trace of its port accesses."""
        view = judge_case(case)
        control = shows_control(view.code, view.mode)
        unpaged = control and not view.system.cr0 & X86_CR0_PG
        run = self._run_physical if is_physical(view) or unpaged else self._run_hidden
        outcome = run(view, control=control)
        if leaves_pointers(view.code, view.mode):
            self._engine.forget_pointers()
        return outcome

    def _run_hidden(self, case: Case, *, control: bool) -> Outcome:
        """Flat memory behind hidden page tables."""
        address = code_address(case)
        last = address + max(len(case.code), 1) - 1
        numbers = range(address >> PAGE_SHIFT, (last >> PAGE_SHIFT) + 1)
        space = self._space(case, numbers, control=control)
        template = self._template(case, hidden=True, exact=control)
        self._engine.show_window()
        outcome = self._execute(case, template, space, [(address, case.code)])
        if control and outcome.exception is None:
            _show_own_cr3(case, outcome)
        fault = outcome.exception
        if fault is not None and fault[0] == PF_VECTOR and (fault[1] or 0) & PFERR_PRESENT:
            outcome.unchecked = (("all", GAP_HIDDEN_RIGHTS),)
        return outcome

    def _run_physical(self, case: Case, *, control: bool) -> Outcome:
        """Each page at its own physical address: those of `phys`, or flat memory without paging."""
        template = self._template(case, hidden=False, exact=control)
        pages, root = case_pages(case), (case.system.cr3 & 0xFFFFFFFF) >> PAGE_SHIFT
        rootless = template.pae and root not in pages
        if rootless:
            pages[root] = ZERO_PAGE
        space = self._physical_space(pages)
        self._engine.hide_window()
        for number, offset in space.numbers.items():
            self._engine.insert(number << PAGE_SHIFT, offset)
        try:
            outcome = self._execute(case, template, space, code_parts(case))
        finally:
            for number in space.numbers:
                self._engine.remove(number << PAGE_SHIFT)
            self._engine.frames.give_back(space.start)
        if rootless or (self._engine.missing and not _loads_cr3(case)):
            outcome.unchecked = (("all", GAP_NO_MEMORY),)
        return outcome

    def _physical_space(self, pages: dict[int, bytes]) -> Space:
        try:
            return Space(self._engine.frames, pages)
        except SpaceFullError:
            self._forget_spaces()
            return Space(self._engine.frames, pages)

    def _template(self, case: Case, *, hidden: bool, exact: bool) -> Template:
        key = (id(case.system), case.mode, hidden, exact)
        known = self._templates.get(key)
        if known is None:
            if len(self._templates) >= _CACHED:
                self._templates.clear()
            made = Template(self._engine.blank, case.system, case.mode, hidden=hidden, exact=exact)
            known = self._templates[key] = (case.system, made)
        return known[1]

    def _space(self, case: Case, numbers: range, *, control: bool) -> Space:
        """The pages of a Memory and those of code, behind tables of the case's kind."""
        kind, user = hidden_kind(case.system, exact=control), cpl_of(case.system, case.mode) == 3
        key = (id(case.mem), numbers, kind, user)
        known = self._spaces.get(key)
        if known is None:
            pages = {**dict.fromkeys(numbers, ZERO_PAGE), **case.mem.pages}
            try:
                space = Space(self._engine.frames, pages, kind=kind, user=user)
            except SpaceFullError:
                self._forget_spaces()
                space = Space(self._engine.frames, pages, kind=kind, user=user)
            known = self._spaces[key] = (case.mem, space)
        return known[1]

    def _forget_spaces(self) -> None:
        self._spaces.clear()
        self._engine.frames.reset()

    def _execute(
        self, case: Case, template: Template, space: Space, code: list[tuple[int, bytes]]
    ) -> Outcome:
        engine = self._engine
        frames = [frame for address, part in code for frame in space.lay(address, part)]
        before = space.contents()
        rep = rep_string(case.code, case.mode, case.system.seg[VCPU_SREG_CS].db)
        left = _left_over(case, rep)
        devices = engine.devices = devices_of(case)
        state, flags, shadow = self._run(case, template, space, frames, rep, left)
        if engine.fault is not None and _INT1 in case.code[:_MAX_INSTRUCTION]:
            engine.reset()  # an INT1 that could not be delivered leaves its mark on later error codes
        outcome = self._outcome(case, state, flags)
        after = space.contents()
        if after != before:
            outcome.pages = space.changed(before, after)
        space.restore()
        outcome.system = self._system(template, space, state)
        if outcome.exception is None:
            outcome.interruptibility = shadow
        if rep is not None:
            _stop_between(case, outcome, rep, left)
        if devices.trace or "devices" in (case.extra or {}):
            outcome.extra = {"device_trace": trace_to_obj(devices.trace)}
        return outcome

    def _run(
        self,
        case: Case,
        template: Template,
        space: Space,
        frames: list[int],
        rep: RepString | None,
        left: int,
    ) -> tuple[bytes, int, int]:
        """Run the instruction; Bochs may stop between the iterations of REP, and then goes on."""
        engine, gpr = self._engine, case.gpr
        if left:
            gpr = (gpr[0], gpr[VCPU_REGS_RCX] - left, *gpr[2:])
        kept = ~X86_EFLAGS_RF if case.mode == "vm86" else ~(X86_EFLAGS_RF | X86_EFLAGS_VM)
        engine.learn(template)
        physical = space.pages_of(frames)
        result = engine.run(template, space.root, (*gpr, case.rip, case.rflags & kept), physical)
        while rep is not None and engine.fault is None:
            registers = REGISTERS.unpack_from(result[0], REGISTERS_AT)
            rcx = registers[VCPU_REGS_RCX]
            if registers[16] != case.rip or not rcx & rep.count_mask or rcx == gpr[VCPU_REGS_RCX]:
                break
            gpr = registers[:16]
            result = engine.run(template, space.root, (*registers[:17], result[1] & kept), physical)
        return result

    def _system(self, template: Template, space: Space, state: bytes) -> System:
        """The System after the run; a #PF of hidden tables leaves CR2 alone."""
        if template.hidden and self._engine.fault is not None:
            at, size = CpuState.cr2.offset, CpuState.cr2.size
            state = state[:at] + template.loaded[at : at + size] + state[at + size :]
        return read_system(state, template.expected(space.root), template)

    def _outcome(self, case: Case, state: bytes, flags: int) -> Outcome:
        """GPRs, RIP, RFLAGS and exception."""
        registers = REGISTERS.unpack_from(state, REGISTERS_AT)
        fault = self._engine.fault
        if fault is None:
            stray = case.rflags & X86_EFLAGS_VM if case.mode != "vm86" else 0
            flags = flags & ~X86_EFLAGS_RF | stray
            return Outcome(case.id, registers[:16], registers[16], flags, case.system)
        outcome = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system, "propagate_fault")
        outcome.exception = _exception(case, fault, state)
        if rep_string(case.code, case.mode, case.system.seg[VCPU_SREG_CS].db) is not None:
            # Iterations that are done stay done; RFLAGS do not (SDM Vol. 2B REP).
            outcome.gpr = registers[:16]
        return outcome


def _exception(case: Case, fault: tuple[int, int], state: bytes) -> Fault:
    vector, code = fault
    if vector not in _HAS_ERROR_CODE:
        return vector, None, None
    if vector != PF_VECTOR:
        return vector, code, None
    at, size = CpuState.cr2.offset, CpuState.cr2.size
    address = int.from_bytes(state[at : at + size], "little")
    if not is_physical(case) and not case.system.efer & EFER_NX and not case.system.cr4 & X86_CR4_SMEP:
        code &= ~PFERR_FETCH
    return vector, code, address


def _show_own_cr3(case: Case, outcome: Outcome) -> None:
    """MOV from CR3 gives the case's own value instead of the root of the hidden tables."""
    prefixes, rest = split_prefixes(case.code, case.mode)
    if rest[:2] != _MOV_CR_TO or rest[2] >> 3 & 7 != 3:
        return
    extended = case.mode == "prot64" and prefixes[-1:] and prefixes[-1] & 0xF1 == 0x41
    gpr, number = list(outcome.gpr), rest[2] & 7 | (8 if extended else 0)
    gpr[number] = case.system.cr3 & ((1 << 64) - 1 if case.mode == "prot64" else 0xFFFFFFFF)
    outcome.gpr = tuple(gpr)


def _loads_cr3(case: Case) -> bool:
    """MOV to CR3 or CR0 may read page-directory pointers where there is no memory: all of them are 0."""
    return not is_physical(case) and split_prefixes(case.code, case.mode)[1][:2] == _MOV_CR_FROM


def _left_over(case: Case, rep: RepString | None) -> int:
    """Iterations that a REP string instruction is not given: KVM stops before them."""
    if rep is None:
        return 0
    rcx = case.gpr[VCPU_REGS_RCX]
    allowed = 1 if case.single else rep.iterations(rcx)
    return max(0, (rcx & rep.count_mask) - allowed)


def _stop_between(case: Case, outcome: Outcome, rep: RepString, left: int) -> None:
    """Give back the iterations that were taken away.

    With RCX at KVM's stopping point, even if that is 0, the instruction has yet to end.
    """
    gpr = list(outcome.gpr)
    ended = case.gpr[VCPU_REGS_RCX] & rep.count_mask and not gpr[VCPU_REGS_RCX] & rep.count_mask
    gpr[VCPU_REGS_RCX] += left
    outcome.gpr = tuple(gpr)
    if outcome.exception is None and ended and (not rep.comparing or _goes_on(case, outcome.rflags)):
        outcome.rip = case.rip
        outcome.rflags |= X86_EFLAGS_RF


def _goes_on(case: Case, flags: int) -> bool:
    """Whether ZF lets REPE (F3) or REPNE (F2), whichever prefix comes last, go on."""
    prefixes, _ = split_prefixes(case.code, case.mode)
    wanted = 1 if prefixes.rfind(b"\xf3") > prefixes.rfind(b"\xf2") else 0
    return flags >> 6 & 1 == wanted

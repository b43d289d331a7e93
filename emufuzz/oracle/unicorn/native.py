"""Cases with devices, ports or physical memory in Unicorn, on an engine of their own.

Every case runs with exactly its own pages (as in the exact mode of the oracle): what such cases
cost is spent on hooks, so nothing is kept from one to the next.

Unicorn looks up and translates the next instruction before it stops. That takes time where memory
has no HLT behind the code, and with physical memory, where paging is the case's own, it would set
accessed bits and CR2: the trap flag ends the run before that.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec
from iced_x86 import Mnemonic

from emufuzz.arch.cr import EFER_LMA, X86_CR4_PKE
from emufuzz.arch.exceptions import PF_VECTOR
from emufuzz.arch.regs import VCPU_SREG_CS
from emufuzz.arch.rflags import X86_EFLAGS_TF
from emufuzz.case.devices import Devices, devices_of, trace_to_obj
from emufuzz.case.model import (
    PAGE_SHIFT,
    Case,
    Fault,
    Outcome,
    System,
    case_memory,
    case_pages,
    code_address,
    code_parts,
    is_physical,
)
from emufuzz.case.translate import translate, walk
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.native_view import judge_case, kvm_of
from emufuzz.oracle.unicorn.bus import CaseBus
from emufuzz.oracle.unicorn.code import MAX_INSTRUCTION
from emufuzz.oracle.unicorn.engine import NO_VECTOR
from emufuzz.oracle.unicorn.gaps_machine import shows_flags, uses_port
from emufuzz.oracle.unicorn.hidden import hidden_access, show
from emufuzz.oracle.unicorn.image import Template
from emufuzz.oracle.unicorn.operand_order import COMPARES, by_source
from emufuzz.oracle.unicorn.prefixes import (
    RepString,
    makes_shadow,
    rep_string,
    split_prefixes,
)
from emufuzz.oracle.unicorn.refusals import GAP_WRAP, not_run, refused
from emufuzz.oracle.unicorn.runner import UnicornRunner
from emufuzz.oracle.unicorn.selftest import GAP_CODE_PAGE_WRITE
from emufuzz.oracle.unicorn.spaces import Annex, LinearSpace, PhysicalSpace, Slots

#: The code lies, or goes on, where there is no memory.
GAP_CODE_ABSENT: Final = "unicorn-code-in-device"

#: An access to a device goes on in another page, and no operand tells which.
GAP_PAGE_SPLIT: Final = "unicorn-device-page-split"
#: Protection keys are switched on, and PKRU is not 0.
GAP_PKRU: Final = "unicorn-pkru"

_KEY: Final = 59  # the lowest bit of the protection key in the last entry
_INS: Final = frozenset((b"\x6c", b"\x6d"))
#: POPF and IRET, whose TF is that of the image on the stack.
_LOADS_FLAGS: Final = frozenset((b"\x9d", b"\xcf"))
_CACHED_TEMPLATES: Final = 1024


def _keyed(view: Case, pkru: int) -> bool:
    """Whether PKRU restricts the key of a page that an operand lies in (SDM Vol. 3A 4.6.2)."""
    system = view.system
    if not pkru or not system.efer & EFER_LMA:
        return False
    pages, accesses = case_memory(view).pages, CaseInstruction(view).accesses
    for linear in (at for each in accesses for at in (each.linear, each.linear + max(each.size, 1) - 1)):
        entries, physical = walk(pages, system.cr0, system.cr3, system.cr4, system.efer, linear)
        if physical is not None and entries and pkru >> 2 * (entries[-1] >> _KEY & 0xF) & 3:
            return True
    return False


def uses_ports(case: Case) -> bool:
    """Whether the instruction is IN, OUT, INS or OUTS."""
    return uses_port(CaseInstruction(case))


class NativeRunner(UnicornRunner):
    """Runs the cases that the fast mode knows nothing of."""

    def __init__(self) -> None:
        """Open an engine.

        Raises:
            OracleUnavailableError: Unicorn is not the known version, or a probe does not match.
        """
        super().__init__()
        self._bus = CaseBus()
        self._engine.attach(self._bus)
        self._annex = Annex(self._engine)
        self._physical: dict[tuple[int, str], tuple[System, Template]] = {}

    def _answer_ports(self) -> None:
        """Ports are the devices'."""

    def run_case(self, case: Case, known: Devices | None = None) -> Outcome:
        """The outcome of a case, with the trace of its devices: its own, or `known` ones."""
        view = judge_case(case)
        refusal = refused(view)
        if refusal is not None:
            return refusal
        template = self._template_of(view)
        if code_address(view) + MAX_INSTRUCTION > template.address_mask:
            return not_run(view, GAP_WRAP, None)
        pages, devices = case_pages(view), known or devices_of(view)
        slots = Slots(case, pages)
        if not all(slots.readable(page) for page in _mapped_code_pages(view, pages, devices)):
            return not_run(view, GAP_CODE_ABSENT, None)
        outcome = self._run_in_space(view, template, pages, slots, devices)
        if is_physical(case) and view.system.cr4 & X86_CR4_PKE and _keyed(view, kvm_of(case).get("pkru", 0)):
            outcome.unchecked = (("all", GAP_PKRU),)
        if devices.trace or "devices" in (case.extra or {}):
            compares = len(devices.trace) > 1 and CaseInstruction(view).mnemonic in COMPARES
            trace = by_source(view, devices.trace) if compares else devices.trace
            outcome.extra = {"device_trace": trace_to_obj(trace)}
        return outcome

    def _template_of(self, case: Case) -> Template:
        self._cr3 = -1  # the TLB knows nothing of this case
        if not is_physical(case):
            return self._use_template(case.system, case.mode)
        key = (id(case.system), case.mode)
        known = self._physical.get(key)
        if known is None:
            if len(self._physical) >= _CACHED_TEMPLATES:
                self._physical.clear()
            template = Template(self._layout, self._pristine, case.system, case.mode, physical=True)
            known = self._physical[key] = (case.system, template)
        self._template = known[1]
        return known[1]

    def _run_in_space(
        self, case: Case, template: Template, pages: dict[int, bytes], slots: Slots, devices: Devices
    ) -> Outcome:
        """The outcome, in an address space that is there for this run only."""
        mark, shared = self._pool.next, self._space
        space: LinearSpace | PhysicalSpace
        if is_physical(case):
            space = PhysicalSpace(self._pool, self._annex, case, pages, slots)
            space.enter(address >> PAGE_SHIFT for address, _ in code_parts(case))
        else:
            bits = 64 if case.mode == "prot64" else 32
            space = LinearSpace(self._pool, pages, devices.page_numbers(), slots, bits)
            space.protect(_code_pages(case))
        self._space, self._cr3 = space, -1
        instruction = CaseInstruction(case)
        self._bus.begin(
            space,
            devices,
            probing=instruction.opcode[:1] in _INS,
            swapped=instruction.mnemonic == Mnemonic.MOVBE,
        )
        try:
            outcome = self._run_stepped(case, template)
        finally:
            self._forget_signals()
            self._code.flush()
            if isinstance(space, PhysicalSpace):
                space.leave()
            self._pool.buffer[mark : self._pool.next] = bytes(self._pool.next - mark)
            self._pool.reset(mark)
            self._space = shared
            self._bus.end()
        if space.code_written:
            outcome.unchecked = (("all", GAP_CODE_PAGE_WRITE),)
        elif space.lost:
            outcome.unchecked = (("all", GAP_PAGE_SPLIT),)
        return outcome

    def _run_stepped(self, case: Case, template: Template) -> Outcome:
        """Run with something that ends the run right behind the instruction, where that is possible."""
        self._compose(template)
        rep = rep_string(case.code, case.mode, case.system.seg[VCPU_SREG_CS].db)
        opcode = split_prefixes(case.code, case.mode)[1][:1]
        if rep is not None or makes_shadow(case.code, case.mode):
            return self._run_once(case, template, rep)
        access = hidden_access(case)
        if shows_flags(case) or (access and access.write and not access.stepping):
            self._single_instruction_blocks()
            return self._run_once(case, template, rep)
        if case.rflags & X86_EFLAGS_TF:
            return self._run_once(case, template, rep)
        stepped = msgspec.structs.replace(case, rflags=case.rflags | X86_EFLAGS_TF)
        outcome = self._run_once(stepped, template, rep)
        if outcome.exception is not None or opcode not in _LOADS_FLAGS:
            outcome.rflags &= ~X86_EFLAGS_TF
        return outcome

    def _run_once(self, case: Case, template: Template, rep: RepString | None) -> Outcome:
        error = self._execute(case, template, rep)
        if error or self._engine.vector != NO_VECTOR:
            outcome = self._faulted(case, template, error, rep)
        else:
            outcome = self._completed(case, template, rep)
        access = hidden_access(case)
        return outcome if access is None else show(case, access, outcome, self._state, self._layout)

    def _is_physical_run(self) -> bool:
        return self._template is not None and self._template.physical

    def _hide_cr2(self, case: Case) -> None:
        """With physical memory CR2 is the case's own, unless it is about the next instruction."""
        if not self._is_physical_run() or not self._at_start(case):
            super()._hide_cr2(case)

    def _is_code_page_write(self) -> bool:
        """With physical memory nothing is protected behind the case's back."""
        return not self._is_physical_run() and super()._is_code_page_write()

    def _fault(self, case: Case, vector: int) -> Fault:
        """With physical memory the error code is that of the case's own paging."""
        if not self._is_physical_run() or vector != PF_VECTOR:
            return super()._fault(case, vector)
        (cr2,) = struct.unpack_from("<Q", self._engine.state, self._layout.cr + 16)
        return vector, self._error_code(), cr2


def _code_pages(case: Case) -> range:
    """Linear page numbers of the code."""
    address = code_address(case)
    return range(address >> PAGE_SHIFT, (address + max(len(case.code), 1) - 1 >> PAGE_SHIFT) + 1)


def _mapped_code_pages(case: Case, pages: dict[int, bytes], devices: Devices) -> set[int]:
    """Guest-physical numbers of the pages from which the instruction would be fetched."""
    address = code_address(case)
    last = address + (CaseInstruction(case).decode(lax=True).len or 1) - 1
    numbers = {address >> PAGE_SHIFT, last >> PAGE_SHIFT}
    if not is_physical(case):
        return {n for n in numbers if n in pages or n in devices.page_numbers()}
    system = case.system
    physical = (
        translate(pages, system.cr0, system.cr3, system.cr4, system.efer, n << PAGE_SHIFT) for n in numbers
    )
    return {at >> PAGE_SHIFT for at in physical if at is not None}

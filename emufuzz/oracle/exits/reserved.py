"""Operands behind table entries with address bits that the guest's MAXPHYADDR reserves (SDM Vol. 3A 4.7).

The processor that runs an engine has more such bits, so that engines look no further (gap `guest-width`).
"""

from __future__ import annotations

from typing import Final

import msgspec

from emufuzz.arch.cr import EFER_LMA, X86_CR4_PAE, X86_CR4_PKE, X86_CR4_SMAP
from emufuzz.arch.exceptions import PF_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RCX
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, Case, Outcome, case_memory, case_pages, code_address
from emufuzz.case.translate import walk
from emufuzz.oracle.exits.run import Run
from emufuzz.oracle.guest_width import guest_width
from emufuzz.oracle.instruction import Access, CaseInstruction
from emufuzz.oracle.native_view import check_judged, judge_case
from emufuzz.oracle.page_tables import walked
from emufuzz.oracle.rules.review import faults_due
from emufuzz.oracle.rules.table import rules_for
from emufuzz.oracle.rules.view import View

_PRESENT: Final = 1
_WRITE: Final = 2
_USER: Final = 4
_RESERVED: Final = 8
_USER_LEVEL: Final = 3
_ADDRESS_END: Final = 52
#: P, RW, US and A.
_OPEN: Final = 0x27
#: INS and OUTS.
_PORTS: Final = frozenset(range(0x6C, 0x70))
#: Bits of RCX that count whatever the address size.
_SHORT: Final = 0xFFFF


def reserved_entry(run: Run) -> Outcome:
    """#PF with RSVD at the operand, and nothing else.

    Raises:
        UnsupportedCaseError: Other engines can tell: no such entry, or more than one of them or exception.
    """
    case = run.case
    check_judged(case)
    width = guest_width(case)
    view = judge_case(case)
    if width is None or case.count != 1:
        raise UnsupportedCaseError("path: the instruction at RIP tells how the case ends")
    reserved = (1 << _ADDRESS_END) - (1 << width)
    access = _operand(view, reserved)
    if _may_fault_before(view, reserved):
        raise UnsupportedCaseError("phys: no reserved bit is what the instruction meets first")
    code = _PRESENT | _RESERVED | (_WRITE if access.write else 0)
    code |= _USER if View(view).cpl == _USER_LEVEL else 0
    outcome = run.faulted((PF_VECTOR, code, access.linear))
    outcome.pages = _fetched(view)
    return outcome


def _fetched(view: Case) -> dict[int, bytes]:
    """The page tables as the fetch of the instruction leaves them."""
    start, before = code_address(view), case_pages(view)
    pages = {number: bytearray(page) for number, page in before.items()}
    for place, byte in walked(view, (start, start + len(view.code) - 1)):
        pages[place >> PAGE_SHIFT][place & PAGE_MASK : (place & PAGE_MASK) + 1] = byte
    return {number: bytes(page) for number, page in pages.items() if page != before[number]}


def _operand(view: Case, reserved: int) -> Access:
    """The one access that meets a reserved bit, of the first iteration.

    Raises:
        UnsupportedCaseError: There is none, or another one may have an effect before it.
    """
    instruction = CaseInstruction(view)
    count = view.gpr[VCPU_REGS_RCX]
    if instruction.string_opcode:
        if instruction.opcode[0] in _PORTS or not count & _SHORT:
            raise UnsupportedCaseError("code: it uses a port, or may do nothing")
        gpr = (*view.gpr[:VCPU_REGS_RCX], 1, *view.gpr[VCPU_REGS_RCX + 1 :])
        instruction = CaseInstruction(msgspec.structs.replace(view, gpr=gpr))
    accesses = [access for access in instruction.accesses if access.size]
    met = [access for access in accesses if _meets(view, access.linear, reserved)]
    if len(met) != 1 or not all(_passes(view, access) for access in accesses if access not in met):
        raise UnsupportedCaseError("phys: no reserved bit is what the instruction meets first")
    return met[0]


def _passes(view: Case, access: Access) -> bool:
    """An access to memory that nothing refuses, and nobody sees."""
    system = view.system
    if system.cr4 & (X86_CR4_SMAP | X86_CR4_PKE):
        return False
    pages = case_memory(view).pages
    for linear in (access.linear, access.linear + access.size - 1):
        walked_through, place = walk(pages, system.cr0, system.cr3, system.cr4, system.efer, linear)
        if system.cr4 & X86_CR4_PAE and not system.efer & EFER_LMA:
            walked_through = walked_through[1:]
        open_to_all = all(entry & _OPEN == _OPEN for entry in walked_through)
        if not open_to_all or place is None or place >> PAGE_SHIFT not in pages:
            return False
    return True


def _meets(view: Case, linear: int, reserved: int) -> bool:
    """A present entry on the way has a reserved bit; those of PAE's first level are checked elsewhere."""
    system = view.system
    entries = walk(case_memory(view).pages, system.cr0, system.cr3, system.cr4, system.efer, linear)[0]
    if system.cr4 & X86_CR4_PAE and not system.efer & EFER_LMA:
        entries = entries[1:]
    return any(entry & _PRESENT and entry & reserved for entry in entries)


def _may_fault_before(view: Case, reserved: int) -> bool:
    """Another exception is due, or the code is behind such an entry itself."""
    seen = View(view)
    if faults_due(seen, rules_for(seen.insn)):
        return True
    start = code_address(view)
    return any(_meets(view, at, reserved) for at in (start, start + len(view.code) - 1))

"""The ledger of Unicorn 2.1.4 for cases with devices, ports or physical memory.

Every entry has a proof test in tests/unit/oracle/test_unicorn_machine_gaps.py that fails once
Unicorn no longer behaves so.
"""

from __future__ import annotations

from typing import Final

from iced_x86 import Mnemonic, Register, RegisterExt

from emufuzz.arch.cr import EFER_LMA, X86_CR0_PG, X86_CR4_PAE, X86_CR4_SMAP
from emufuzz.arch.exceptions import PF_VECTOR, PFERR_PRESENT, PFERR_RSVD, PFERR_USER
from emufuzz.arch.regs import VCPU_SREG_CS
from emufuzz.arch.rflags import X86_EFLAGS_AC, X86_EFLAGS_IOPL
from emufuzz.case.devices import MMIO, DeviceAccess
from emufuzz.case.model import (
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    Case,
    Outcome,
    case_memory,
    case_pages,
    code_address,
    is_physical,
)
from emufuzz.case.translate import walk
from emufuzz.oracle.device_trace import DEVICE_TRACE, trace_of
from emufuzz.oracle.gaps import Condition, Gap
from emufuzz.oracle.guest_width import beyond_guest_width
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.rules.privilege import bitmap_denies
from emufuzz.oracle.rules.view import View
from emufuzz.oracle.unicorn.engine import UNICORN_VERSION
from emufuzz.oracle.unicorn.gaps_corner import far_stack_fault
from emufuzz.oracle.unicorn.hidden import hidden_access, modrm_registers
from emufuzz.oracle.unicorn.image import cpl_of
from emufuzz.oracle.unicorn.operand_order import COMPARES, shares_stream
from emufuzz.oracle.unicorn.prefixes import makes_shadow, rep_string

#: Unicorn's physical addresses have 40 bits; a processor may have up to 52.
_ABOVE_40_BITS: Final = 0xFFF << 40
#: Of a PDPTE in PAE paging: bits 8:5 and 2:1, and what is above 52 address bits (SDM Vol. 3A Table 4-8).
_USER: Final = 3
_MOV_TO_CONTROL: Final = b"\x0f\x22"
_LOAD_PDPTES: Final = frozenset((0, 3, 4))  # MOV to these control registers does
_PDPT_ADDRESS: Final = 0xFFFF_FFE0  # of CR3 with PAE paging (SDM Vol. 3A 4.4.1)
_PDPTE_RESERVED: Final = 0xFFF0_0000_0000_01E6
_APIC_BASE: Final = 0xFEE00
_PORT_OPCODES: Final = frozenset((*range(0x6C, 0x70), *range(0xE4, 0xE8), *range(0xEC, 0xF0)))
_PUSHES: Final = frozenset((Mnemonic.PUSHA, Mnemonic.PUSHAD))


_POP_SEGMENT: Final = frozenset((b"\x07", b"\x17", b"\x1f", b"\x0f\xa1", b"\x0f\xa9"))


def uses_port(instruction: CaseInstruction) -> bool:
    """IN, OUT, INS or OUTS."""
    return instruction.opcode[0] in _PORT_OPCODES


def ports_unchecked(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """A port access that IOPL forbids, and the I/O permission bitmap may forbid, too."""
    if not uses_port(instruction) or _ports_allowed(instruction.case):
        return False
    view = View(instruction.case)  # with page tables of its own the guest's TSS may be out of reach
    return view.paged or bitmap_denies(view) is not False


def _ports_allowed(case: Case) -> bool:
    """Whether the mode and IOPL allow every port (SDM Vol. 1 19.5)."""
    if case.mode in {"real", "vm86"}:
        return case.mode == "real"
    return cpl_of(case.system, case.mode) <= (case.rflags & X86_EFLAGS_IOPL) >> 12


def _accesses(outcome: Outcome) -> list[DeviceAccess]:
    return trace_of(outcome) or []


def _page_fault(outcome: Outcome) -> bool:
    return outcome.exception is not None and outcome.exception[0] == PF_VECTOR


def _fault_order(_instruction: CaseInstruction, outcome: Outcome) -> bool:
    return _page_fault(outcome) and bool(_accesses(outcome))


def _operand_order(instruction: CaseInstruction, outcome: Outcome) -> bool:
    accesses = _accesses(outcome)
    if instruction.mnemonic in COMPARES:
        return len(accesses) > 1 and shares_stream(instruction.case, accesses)
    return instruction.mnemonic in _PUSHES and len(accesses) > 1


def _descriptor_pieces(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """Something that is no operand was read from a device: a descriptor, or a part of the TSS."""
    operands = [
        (access.linear & PAGE_MASK, access.size) for access in instruction.accesses if access.size < PAGE_SIZE
    ]
    return any(
        a.kind == MMIO and not any((a.addr - at) & PAGE_MASK < size for at, size in operands)
        for a in _accesses(outcome)
    )


def _pop_segment(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    opcode = instruction.opcode
    wide = instruction.long or instruction.operand_bits == 32
    return wide and (opcode[:1] in _POP_SEGMENT or opcode[:2] in _POP_SEGMENT)


def _far_return(instruction: CaseInstruction, outcome: Outcome) -> bool:
    case = instruction.case
    near = case.mode in {"real", "vm86"} and instruction.mnemonic == Mnemonic.RETF
    return near and outcome.exception is None and outcome.rip == case.rip


def _local_apic(_instruction: CaseInstruction, outcome: Outcome) -> bool:
    return any(a.kind == MMIO and a.addr >> PAGE_SHIFT == _APIC_BASE for a in _accesses(outcome))


def _reserved_bits(instruction: CaseInstruction, outcome: Outcome) -> list[int]:
    """The table entries that led to a #PF because of a reserved bit, as the instruction has left them."""
    case = instruction.case
    if not is_physical(case) or not _page_fault(outcome):
        return []
    _, code, address = outcome.exception or (0, 0, 0)
    if not (code or 0) & PFERR_RSVD:
        return []
    system = case.system
    pages = {**case_memory(case).pages, **outcome.pages}
    return walk(pages, system.cr0, system.cr3, system.cr4, system.efer, address or 0)[0]


def _physical_width(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return any(entry & _ABOVE_40_BITS for entry in _reserved_bits(instruction, outcome))


def _pdpte(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """One of the four PDPTEs of PAE paging, be they loaded just now, is present and has a reserved bit.

    Or they are loaded from where no memory is.
    """
    case = instruction.case
    system, (cr0, cr3, cr4) = case.system, _controls(instruction)
    pae = cr0 & X86_CR0_PG and cr4 & X86_CR4_PAE and not system.efer & EFER_LMA
    if not pae:
        return False
    pages = case_memory(case).pages if is_physical(case) else case_pages(case)
    loads = instruction.opcode[:2] == _MOV_TO_CONTROL and modrm_registers(case)[0] in _LOAD_PDPTES
    if loads and is_physical(case) and (cr3 & _PDPT_ADDRESS) >> PAGE_SHIFT not in pages:
        return True
    quarters = (walk(pages, cr0, cr3, cr4, 0, n << 30)[0][0] for n in range(4))
    return any(entry & 1 and entry & _PDPTE_RESERVED for entry in quarters)


def _guarded_stack(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """CR4.SMAP keeps a supervisor from the stack that a far transfer of CPL 3 uses."""
    case = instruction.case
    guarded = case.system.cr4 & X86_CR4_SMAP and not case.rflags & X86_EFLAGS_AC
    if not guarded or cpl_of(case.system, case.mode) != _USER or not far_stack_fault(instruction, outcome):
        return False
    _, code, _ = outcome.exception or (0, 0, 0)
    return (code or 0) & (PFERR_PRESENT | PFERR_USER) == PFERR_PRESENT


def _controls(instruction: CaseInstruction) -> tuple[int, int, int]:
    """CR0, CR3 and CR4 as MOV to one of them loads it, or as they are."""
    system, decoded = instruction.case.system, instruction.decode(lax=True)
    known = {Register.CR0: system.cr0, Register.CR3: system.cr3, Register.CR4: system.cr4}
    if decoded.mnemonic == Mnemonic.MOV and decoded.op0_register in known:
        known[decoded.op0_register] = instruction.case.gpr[RegisterExt.number(decoded.op1_register)]
    return known[Register.CR0], known[Register.CR3], known[Register.CR4]


def _guest_width(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """An entry on the way to an operand or the code has an address beyond the guest's MAXPHYADDR."""
    return beyond_guest_width(instruction)


def _next_fetch(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """Paging is the case's own, and nothing ends the run before the next instruction on another page."""
    case = instruction.case
    if not is_physical(case) or not case.system.cr0 & X86_CR0_PG or outcome.exception is not None:
        return False
    base = 0 if case.mode == "prot64" else outcome.system.seg[VCPU_SREG_CS].base
    if base + outcome.rip >> PAGE_SHIFT == code_address(case) >> PAGE_SHIFT:
        return False
    repeats = rep_string(case.code, case.mode, case.system.seg[VCPU_SREG_CS].db) is not None
    access = hidden_access(case)
    unstepped = access is not None and access.write and not access.stepping
    return repeats or unstepped or makes_shadow(case.code, case.mode) or shows_flags(case)


def shows_flags(case: Case) -> bool:
    """Whether the guest may get to see TF in RFLAGS, or TF does more than to trap."""
    rest = case.code[len(CaseInstruction(case).prefixes) :]
    return rest[:1] in _SHOWS_FLAGS or rest[:2] == b"\x0f\x05"


#: PUSHF and software interrupts, which push RFLAGS. SYSCALL (0F 05) copies them.
_SHOWS_FLAGS: Final = frozenset((b"\x9c", b"\xcc", b"\xcd", b"\xce", b"\xf1"))


def _gap(
    name: str, applies: Condition, reason: str, reference: str, fields: tuple[str, ...] = ("all",)
) -> Gap:
    return Gap(f"unicorn-{name}", "unicorn", UNICORN_VERSION, fields, reason, reference, applies)


# fmt: off
MACHINE_GAPS: Final[tuple[Gap, ...]] = (
    _gap("device-fault-order", _fault_order,
         "an instruction that faults has accessed devices before all of its operands were checked",
         "SDM Vol. 3A 6.6", (DEVICE_TRACE,)),
    _gap("device-operand-order", _operand_order,
         "both operands of CMPS in one stream are read in another order; PUSHA writes upwards",
         "SDM Vol. 2A CMPS"),
    _gap("implicit-access", _descriptor_pieces,
         "descriptors are read in two pieces of 4 bytes; what else is accessed implicitly may be cut, too",
         "SDM Vol. 3A 8.1.1", (DEVICE_TRACE,)),
    _gap("pop-segment-width", _pop_segment,
         "POP Sreg reads as much as the operand size says; of a device processors read the selector",
         "SDM Vol. 2B POP", (DEVICE_TRACE,)),
    _gap("hooked-far-return", _far_return,
         "where accesses are watched, RETF in real and virtual-8086 mode loses its target",
         "SDM Vol. 2B RET", ("rip",)),
    _gap("local-apic", _local_apic,
         "there is no local APIC at FEE00000H",
         "SDM Vol. 3A 10.4.1"),
    _gap("physical-width", _physical_width,
         "physical addresses have 40 bits; those above are reserved",
         "SDM Vol. 3A 4.1.4"),
    _gap("guest-width", _guest_width,
         "MAXPHYADDR is not that of the guest's CPUID",
         "SDM Vol. 3A 4.1.4"),
    _gap("pdpte-load", _pdpte,
         "reserved bits of PDPTEs are found on use, or not at all; MOV to a control register would raise #GP",
         "SDM Vol. 3A 4.4.1"),
    _gap("far-stack-smap", _guarded_stack,
         "far calls and returns use a user's stack with the rights of the supervisor, which CR4.SMAP refuses",
         "SDM Vol. 3A 4.6.1"),
    _gap("next-fetch-accessed", _next_fetch,
         "the tables of the next instruction's page get their accessed bits before it runs",
         "SDM Vol. 3A 4.8", ("mem",)),
)
# fmt: on

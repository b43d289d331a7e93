"""Values that control, debug and model-specific registers refuse (SDM Vol. 3A 2.5; Vol. 3B 18.2)."""

from __future__ import annotations

from typing import Final

from iced_x86 import Mnemonic

from emufuzz.arch import cr
from emufuzz.arch.exceptions import DB_VECTOR, GP_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RCX, VCPU_REGS_RDX
from emufuzz.oracle.rules.decoded import Decoded
from emufuzz.oracle.rules.rule import FAULT, PRIVILEGE, VALUE, Due, Encoding, Rule
from emufuzz.oracle.rules.view import MASK32, View

_GP0: Final = (GP_VECTOR, 0, None)
_DB: Final = (DB_VECTOR, None, None)
_DR7_GD: Final = 1 << 13
MSR_EFER: Final = 0xC0000080
#: MSRs that hold linear addresses (SDM Vol. 2B WRMSR).
ADDRESS_MSRS: Final = frozenset((0x175, 0x176, 0xC0000082, 0xC0000083, 0xC0000100, 0xC0000101, 0xC0000102))
#: What neither vendor defines.
_EFER_RESERVED: Final = ~0x36FD01 & (1 << 64) - 1


def register_number(insn: Decoded) -> int:
    """Number of the control or debug register."""
    if insn.lock:  # AMD: LOCK MOV CR0 is MOV CR8
        return insn.reg | 8
    return insn.reg | (insn.rex & 4) << 1


def moved_value(view: View) -> int:
    """What MOV to a control or debug register moves: 32 or 64 bits."""
    value = view.case.gpr[view.insn.rm | (view.insn.rex & 1) << 3]
    return value if view.long else value & MASK32


def _moves(opcode: int, *numbers: int) -> Encoding:
    return lambda insn: (
        insn.opcode[0] == 0x0F
        and insn.opcode[1] == opcode
        and not insn.lock
        and register_number(insn) in numbers
    )


def _cr0_high(view: View) -> bool:
    return moved_value(view) >> 32 != 0


def _cr0_paging(view: View) -> bool:
    value = moved_value(view)
    return bool(value & cr.X86_CR0_PG) and not value & cr.X86_CR0_PE


def _cr0_cache(view: View) -> bool:
    value = moved_value(view)
    return bool(value & cr.X86_CR0_NW) and not value & cr.X86_CR0_CD


def _cr0_long(view: View) -> bool:
    """Entering IA-32e mode without PAE or with CS.L, leaving it from 64-bit mode or with PCIDs."""
    value, system = moved_value(view), view.system
    on, was_on = value & cr.X86_CR0_PG, system.cr0 & cr.X86_CR0_PG
    if on and not was_on and system.efer & cr.EFER_LME:
        return not system.cr4 & cr.X86_CR4_PAE or bool(view.cs.l)
    return bool(was_on and not on and (view.long or system.cr4 & cr.X86_CR4_PCIDE))


def _cr3_reserved(view: View) -> bool:
    """Bits 60:52 are beyond any MAXPHYADDR; 62:61 are LAM's, 63 is taken by PCIDs."""
    return view.ia32e and bool(moved_value(view) >> 52 & 0x1FF)


def _cr4_reserved(view: View) -> bool:
    value = moved_value(view)
    return value >> 32 != 0 or bool(value & 1 << 15)


def _cr4_long(view: View) -> bool:
    value, system = moved_value(view), view.system
    return view.ia32e and bool(not value & cr.X86_CR4_PAE or (value ^ system.cr4) & cr.X86_CR4_LA57)


def _cr4_pcid(view: View) -> bool:
    value, system = moved_value(view), view.system
    sets = value & ~system.cr4 & cr.X86_CR4_PCIDE
    return bool(sets) and (not view.ia32e or bool(system.cr3 & 0xFFF))


def _cr8(view: View) -> bool:
    return moved_value(view) > 15


def _dr_high(view: View) -> bool:
    return moved_value(view) >> 32 != 0


def _general_detect(view: View) -> bool:
    if view.insn.reg in {4, 5} and view.system.cr4 & cr.X86_CR4_DE:
        return False
    return bool(view.system.dr[7] & _DR7_GD)


def msr_index(view: View) -> int:
    """ECX."""
    return view.case.gpr[VCPU_REGS_RCX] & MASK32


def written(view: View) -> int:
    """EDX:EAX."""
    gpr = view.case.gpr
    return (gpr[VCPU_REGS_RDX] & MASK32) << 32 | gpr[VCPU_REGS_RAX] & MASK32


def _msr_canonical(view: View) -> bool:
    return msr_index(view) in ADDRESS_MSRS and not view.canonical(written(view))


def _efer_reserved(view: View) -> bool:
    return msr_index(view) == MSR_EFER and bool(written(view) & _EFER_RESERVED)


def _efer_lme(view: View) -> bool:
    changed = (written(view) ^ view.system.efer) & cr.EFER_LME
    return msr_index(view) == MSR_EFER and bool(changed and view.system.cr0 & cr.X86_CR0_PG)


def _xcr_index(view: View) -> bool:
    return msr_index(view) != 0


def _xcr_value(view: View) -> bool:
    """x87 cannot be left out, and AVX comes with SSE."""
    value = written(view)
    return msr_index(view) == 0 and (not value & 1 or value & 6 == 4)


def _table_base(view: View) -> bool:
    """LGDT and LIDT in 64-bit mode with a base that is not canonical."""
    access = view.explicit
    if access is None or not view.long or not view.segment_allows(access):
        return False
    image = view.read(access.linear, 10)
    return image is not None and not view.canonical(int.from_bytes(image[2:], "little"))


def _sysenter_cs(view: View) -> bool:
    """A null IA32_SYSENTER_CS; an MSR that the case does not have is left open."""
    value = dict(view.system.msr).get(0x174)
    return view.protected and value is not None and not value & 0xFFFC


def _gp(name: str, citation: str, demand: str, encoding: Encoding, due: Due) -> Rule:
    return Rule(name, FAULT, citation, demand, None, encoding, VALUE, _GP0, due)


def _mnemonic(*names: int) -> Encoding:
    wanted = frozenset(names)
    return lambda insn: insn.mnemonic in wanted


# fmt: off
RULES: Final = (
    _gp("gp-cr0-high", "SDM Vol. 2B MOV CRn", "bits 63:32 of CR0 are reserved", _moves(0x22, 0), _cr0_high),
    _gp("gp-cr0-pg-pe", "SDM Vol. 2B MOV CRn", "CR0.PG needs CR0.PE", _moves(0x22, 0), _cr0_paging),
    _gp("gp-cr0-nw-cd", "SDM Vol. 2B MOV CRn", "CR0.NW needs CR0.CD", _moves(0x22, 0), _cr0_cache),
    _gp("gp-cr0-long", "SDM Vol. 3A 9.8.5", "CR0.PG fits EFER.LME, CR4.PAE, CR4.PCIDE and CS.L",
        _moves(0x22, 0), _cr0_long),
    _gp("gp-cr3-reserved", "SDM Vol. 2B MOV CRn", "reserved bits of CR3 are 0", _moves(0x22, 3),
        _cr3_reserved),
    _gp("gp-cr4-reserved", "SDM Vol. 2B MOV CRn", "reserved bits of CR4 are 0", _moves(0x22, 4),
        _cr4_reserved),
    _gp("gp-cr4-long", "SDM Vol. 2B MOV CRn", "in IA-32e mode CR4.PAE stays set, CR4.LA57 as it is",
        _moves(0x22, 4), _cr4_long),
    _gp("gp-cr4-pcide", "SDM Vol. 2B MOV CRn", "CR4.PCIDE needs IA-32e mode and CR3[11:0] = 0",
        _moves(0x22, 4), _cr4_pcid),
    _gp("gp-cr8-reserved", "SDM Vol. 2B MOV CRn", "CR8 has 4 bits", _moves(0x22, 8), _cr8),
    _gp("gp-dr6-dr7-high", "SDM Vol. 2B MOV DRn", "bits 63:32 of DR6 and DR7 are reserved",
        _moves(0x23, 4, 5, 6, 7), _dr_high),
    Rule("db-general-detect", FAULT, "SDM Vol. 3B 18.2.4", "with DR7.GD an access to a debug register is #DB",
         None, lambda insn: _moves(0x21, *range(8))(insn) or _moves(0x23, *range(8))(insn), PRIVILEGE, _DB,
         lambda view: view.cpl == 0 and _general_detect(view)),
    _gp("gp-msr-canonical", "SDM Vol. 2B WRMSR", "an MSR with an address takes only a canonical one",
        _mnemonic(Mnemonic.WRMSR), _msr_canonical),
    _gp("gp-efer-reserved", "SDM Vol. 3A 2.2.1", "reserved bits of EFER are 0",
        _mnemonic(Mnemonic.WRMSR), _efer_reserved),
    _gp("gp-efer-lme", "SDM Vol. 3A 9.8.5", "EFER.LME does not change while paging is on",
        _mnemonic(Mnemonic.WRMSR), _efer_lme),
    _gp("gp-xcr-index", "SDM Vol. 2D XSETBV", "there is only XCR0", _mnemonic(Mnemonic.XSETBV), _xcr_index),
    _gp("gp-xcr0-value", "SDM Vol. 2D XSETBV", "XCR0 has x87, and SSE if it has AVX",
        _mnemonic(Mnemonic.XSETBV), _xcr_value),
    _gp("gp-table-canonical", "SDM Vol. 2A LGDT", "the base of a descriptor table is canonical",
        _mnemonic(Mnemonic.LGDT, Mnemonic.LIDT), _table_base),
    _gp("gp-sysenter-cs", "SDM Vol. 2B SYSENTER", "IA32_SYSENTER_CS is not null",
        _mnemonic(Mnemonic.SYSENTER, Mnemonic.SYSEXIT, Mnemonic.SYSEXITQ), _sysenter_cs),
)
# fmt: on

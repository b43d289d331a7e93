"""What completed system instructions must have done: registers loaded and stored, interrupt shadows."""

from __future__ import annotations

from typing import Final

from iced_x86 import Mnemonic, OpKind

from emufuzz.arch import cr
from emufuzz.arch.descriptors import DESC_ACCESSED, DescStruct
from emufuzz.arch.regs import (
    GPR_NAMES,
    SREG_NAMES,
    VCPU_REGS_RAX,
    VCPU_REGS_RDX,
    VCPU_SREG_LDTR,
    VCPU_SREG_SS,
    VCPU_SREG_TR,
)
from emufuzz.arch.rflags import X86_EFLAGS_IF, X86_EFLAGS_IOPL, X86_EFLAGS_VM
from emufuzz.case.model import Outcome
from emufuzz.oracle.operands import place_of
from emufuzz.oracle.rules.decoded import Decoded
from emufuzz.oracle.rules.rule import COMPLETED, Check, Encoding, Found, Rule
from emufuzz.oracle.rules.segments import loaded_segment, null, selector_of
from emufuzz.oracle.rules.system import MSR_EFER, moved_value, msr_index, register_number, written
from emufuzz.oracle.rules.view import MASK32, View

_SHADOW_MOV_SS: Final = 1
_SHADOW_STI: Final = 2
_MSR_FS_BASE: Final = 0xC0000100
_MSR_GS_BASE: Final = 0xC0000101
_SEGMENT_MSRS: Final = {_MSR_FS_BASE: 4, _MSR_GS_BASE: 5}
#: Bits of CR0 that LMSW loads; PE is set but never cleared.
_MSW: Final = 0xF
_POPF: Final = frozenset((Mnemonic.POPF, Mnemonic.POPFD, Mnemonic.POPFQ))


def _moves(opcode: int) -> Encoding:
    return lambda insn: insn.valid and insn.opcode[:2] == bytes((0x0F, opcode)) and not insn.lock


def _mnemonic(*names: int) -> Encoding:
    wanted = frozenset(names)
    return lambda insn: insn.mnemonic in wanted and insn.valid


def _is(field: str, found: int, wanted: int, mask: int = (1 << 64) - 1) -> Found | None:
    """A violation if two numbers differ in the bits of `mask`."""
    if not (found ^ wanted) & mask:
        return None
    return Found(field, hex(found), f"{field} becomes {wanted:#x}")


def _read_cr(view: View, outcome: Outcome) -> Found | None:
    number = register_number(view.insn)
    system = view.system
    value = {0: system.cr0, 2: system.cr2, 3: system.cr3, 4: system.cr4, 8: system.cr8}[number]
    name = GPR_NAMES[_general(view.insn)]
    mask = (1 << 64) - 1 if view.long else MASK32
    return _is(name, outcome.gpr[_general(view.insn)], value & mask, mask)


def _general(insn: Decoded) -> int:
    """The general-purpose register of MOV CR and MOV DR."""
    return insn.rm | (insn.rex & 1) << 3


def _write_cr(view: View, outcome: Outcome) -> Found | None:
    """CR0.ET stays 1; reserved bits that read as 0 are left to the processor."""
    number, value, after = register_number(view.insn), moved_value(view), outcome.system
    if number == 0:
        return _is("cr0", after.cr0, value | cr.X86_CR0_ET, 0xE005003F)
    if number == 3:
        return _is("cr3", after.cr3, value, (1 << 63) - 1)
    found = {2: after.cr2, 4: after.cr4, 8: after.cr8}[number]
    return _is(f"cr{number}", found, value)


def _read_dr(view: View, outcome: Outcome) -> Found | None:
    number = view.insn.reg + (2 if view.insn.reg in {4, 5} else 0)
    at, mask = _general(view.insn), (1 << 64) - 1 if view.long else MASK32
    return _is(GPR_NAMES[at], outcome.gpr[at], view.system.dr[number] & mask, mask)


def _write_dr(view: View, outcome: Outcome) -> Found | None:
    """An address register holds what was moved; of DR6 and DR7 the bits that are not fixed."""
    number = view.insn.reg + (2 if view.insn.reg in {4, 5} else 0)
    mask = {6: 0xE00F, 7: 0xFFFF23FF}.get(number, (1 << 64) - 1)
    return _is(f"dr{number}", outcome.system.dr[number], moved_value(view), mask)


def _clts(view: View, outcome: Outcome) -> Found | None:
    return _is("cr0", outcome.system.cr0, view.system.cr0 & ~cr.X86_CR0_TS)


def _lmsw(view: View, outcome: Outcome) -> Found | None:
    value = view.operand(0, 2)
    if value is None:
        return None
    wanted = view.system.cr0 & ~(_MSW & ~1) | value & _MSW
    return _is("cr0", outcome.system.cr0, wanted)


def _smsw(view: View, outcome: Outcome) -> Found | None:
    insn = view.insn
    if insn.mod == 3:
        at = _general(insn)
        return _is(GPR_NAMES[at], outcome.gpr[at], view.system.cr0, 0xFFFF)
    return _stored(view, outcome, (view.system.cr0 & 0xFFFF).to_bytes(2, "little"))


def _stored(view: View, outcome: Outcome, wanted: bytes) -> Found | None:
    """Memory at the operand holds `wanted`; nothing is said of devices, and of slots that are read-only."""
    access = view.explicit
    if access is None or view.read(access.linear, len(wanted)) is None:
        return None
    for place, byte in enumerate(wanted):
        at = place_of(view.case, access.linear + place & (MASK32 if not view.long else (1 << 64) - 1))
        if at is None or not view.keeps(at):
            return None
        page = outcome.pages.get(at >> 12) or view.pages[at >> 12]
        if page[at & 0xFFF] != byte:
            return Found("mem", f"{page[at & 0xFFF]:02x} at {at:#x}", f"{wanted.hex()} is stored")
    return None


def _store_selector(view: View, outcome: Outcome) -> Found | None:
    """SLDT, STR and MOV from a segment register."""
    insn = view.insn
    if insn.mnemonic == Mnemonic.SLDT:
        selector = view.system.seg[VCPU_SREG_LDTR].sel
    elif insn.mnemonic == Mnemonic.STR:
        selector = view.system.seg[VCPU_SREG_TR].sel
    else:
        selector = view.system.seg[insn.reg].sel
    if insn.mod == 3:
        at = _general(insn)
        return _is(GPR_NAMES[at], outcome.gpr[at], selector, 0xFFFF)
    return _stored(view, outcome, selector.to_bytes(2, "little"))


def _store_table(view: View, outcome: Outcome) -> Found | None:
    """The top byte of a 24-bit base is left open."""
    table = view.system.gdtr if view.insn.mnemonic == Mnemonic.SGDT else view.system.idtr
    size = 8 if view.long else 3 if view.insn.operand_bits == 16 else 4
    image = table.limit.to_bytes(2, "little") + table.base.to_bytes(8, "little")[:size]
    return _stored(view, outcome, image)


def _load_table(view: View, outcome: Outcome) -> Found | None:
    access = view.explicit
    size = 8 if view.long else 4
    image = None if access is None else view.read(access.linear, 2 + size)
    if image is None:
        return None
    name = "gdtr" if view.insn.mnemonic == Mnemonic.LGDT else "idtr"
    found = getattr(outcome.system, name)
    short = not view.long and view.insn.operand_bits == 16
    base = int.from_bytes(image[2:], "little") & (0xFFFFFF if short else (1 << 64) - 1)
    limit = int.from_bytes(image[:2], "little")
    if (found.base, found.limit) == (base, limit):
        return None
    return Found(name, f"{found.base:#x}, {found.limit:#x}", f"{name} becomes {base:#x}, {limit:#x}")


def _rdmsr(view: View, outcome: Outcome) -> Found | None:
    index, system = msr_index(view), view.system
    value = system.efer if index == MSR_EFER else dict(system.msr).get(index)
    if index in _SEGMENT_MSRS:
        value = system.seg[_SEGMENT_MSRS[index]].base
    if value is None:
        return None
    found = _is("rax", outcome.gpr[VCPU_REGS_RAX], value & MASK32)
    return found or _is("rdx", outcome.gpr[VCPU_REGS_RDX], value >> 32)


def _wrmsr(view: View, outcome: Outcome) -> Found | None:
    """The MSRs that hold addresses; others may have bits of their own kind."""
    index, value = msr_index(view), written(view)
    if index in _SEGMENT_MSRS:
        number = _SEGMENT_MSRS[index]
        return _is(f"seg.{SREG_NAMES[number]}", outcome.system.seg[number].base, value)
    found = dict(outcome.system.msr).get(index)
    if found is None or index not in {0x175, 0x176, 0xC0000082, 0xC0000083, 0xC0000102}:
        return None
    return _is("msr", found, value)


def _xsetbv(view: View, outcome: Outcome) -> Found | None:
    return _is("xcr0", outcome.system.xcr0, written(view))


def _interrupt_flag(view: View, outcome: Outcome) -> Found | None:
    if not view.real and view.cpl > view.iopl:
        return None  # the virtual interrupt flag
    wanted = X86_EFLAGS_IF if view.insn.mnemonic == Mnemonic.STI else 0
    if outcome.rflags & X86_EFLAGS_IF == wanted:
        return None
    return Found("rflags", f"IF = {1 if not wanted else 0}")


def _popf(view: View, outcome: Outcome) -> Found | None:
    """VM never changes, IOPL at CPL 0 only, IF up to IOPL only."""
    changed = view.case.rflags ^ outcome.rflags
    if changed & X86_EFLAGS_VM:
        return Found("rflags", "VM changed")
    if changed & X86_EFLAGS_IOPL and view.cpl > 0:
        return Found("rflags", "IOPL changed")
    if changed & X86_EFLAGS_IF and view.cpl > view.iopl:
        return Found("rflags", "IF changed")
    return None


# Segments


def _load_real(view: View, outcome: Outcome) -> Found | None:
    """Real and virtual-8086 mode: the base is the selector times 16."""
    number, selector = loaded_segment(view.insn), selector_of(view)
    if view.protected or number is None or selector is None:
        return None
    seg = outcome.system.seg[number]
    if (seg.sel, seg.base) == (selector, selector << 4):
        return None
    demand = f"selector {selector:#x}, base {selector << 4:#x}"
    return Found(f"seg.{SREG_NAMES[number]}", f"{seg.sel:#x}, {seg.base:#x}", demand)


def _load_null(view: View, outcome: Outcome) -> Found | None:
    number, selector = loaded_segment(view.insn), selector_of(view)
    if not view.protected or number is None or selector is None or not null(selector):
        return None
    seg = outcome.system.seg[number]
    unusable = not seg.p or number == VCPU_SREG_SS
    if seg.sel == selector and unusable:
        return None
    return Found(f"seg.{SREG_NAMES[number]}", repr(seg), "a null selector makes the segment unusable")


def _load_descriptor(view: View, outcome: Outcome) -> Found | None:
    """The hidden part is the descriptor, with its accessed bit set."""
    number, selector = loaded_segment(view.insn), selector_of(view)
    if not view.protected or number is None or selector is None or null(selector):
        return None
    data = view.descriptor(selector)
    if data is None:
        return None
    seg, wanted = outcome.system.seg[number], DescStruct.unpack(data)
    loaded = (seg.sel, seg.base, seg.limit, seg.type, seg.dpl, seg.db)
    demanded = (
        selector, wanted.base, wanted.limit_scaled, wanted.type | DESC_ACCESSED, wanted.dpl, wanted.d,
    )  # fmt: skip
    if loaded == demanded:
        return None
    return Found(f"seg.{SREG_NAMES[number]}", str(loaded), f"the hidden part is {demanded}")


def _loads(insn: Decoded) -> bool:
    return insn.valid and loaded_segment(insn) is not None


# Interrupt shadows


def _blocks(insn: Decoded) -> bool:
    """MOV SS or POP SS."""
    return insn.valid and insn.opcode[0] in {0x8E, 0x17} and loaded_segment(insn) == VCPU_SREG_SS


def _shadow_mov_ss(_view: View, outcome: Outcome) -> Found | None:
    return _is("interruptibility", outcome.interruptibility, _SHADOW_MOV_SS)


def _shadow_sti(view: View, outcome: Outcome) -> Found | None:
    """Interrupts stay blocked for one instruction if IF was clear; else they were not blocked at all."""
    if not view.real and view.cpl > view.iopl:
        return None
    wanted = 0 if view.case.rflags & X86_EFLAGS_IF else _SHADOW_STI
    return _is("interruptibility", outcome.interruptibility, wanted)


def _shadow_none(_view: View, outcome: Outcome) -> Found | None:
    return _is("interruptibility", outcome.interruptibility, 0)


def _done(name: str, citation: str, demand: str, encoding: Encoding, finds: Check) -> Rule:
    return Rule(name, COMPLETED, citation, demand, None, encoding, finds=finds)


def _store_form(insn: Decoded) -> bool:
    first = insn.opcode[0] == 0x8C and insn.reg < 6
    return insn.valid and (first or insn.mnemonic in {Mnemonic.SLDT, Mnemonic.STR})


def _quiet(insn: Decoded) -> bool:
    """Neither MOV SS, POP SS nor STI, nor anything that loads state from elsewhere."""
    return not _blocks(insn) and insn.mnemonic not in {Mnemonic.STI, Mnemonic.RSM} and insn.valid


# fmt: off
RULES: Final = (
    _done("mov-from-cr", "SDM Vol. 2B MOV CRn", "the control register is read", _moves(0x20), _read_cr),
    _done("mov-to-cr", "SDM Vol. 2B MOV CRn", "the control register is loaded", _moves(0x22), _write_cr),
    _done("mov-from-dr", "SDM Vol. 2B MOV DRn", "the debug register is read", _moves(0x21), _read_dr),
    _done("mov-to-dr", "SDM Vol. 2B MOV DRn", "the debug register is loaded", _moves(0x23), _write_dr),
    _done("clts", "SDM Vol. 2A CLTS", "CR0.TS is cleared, the rest stays", _mnemonic(Mnemonic.CLTS), _clts),
    _done("lmsw", "SDM Vol. 2A LMSW", "PE, MP, EM and TS are loaded; PE is not cleared",
          _mnemonic(Mnemonic.LMSW), _lmsw),
    _done("smsw", "SDM Vol. 2B SMSW", "CR0[15:0] is stored", _mnemonic(Mnemonic.SMSW), _smsw),
    _done("store-selector", "SDM Vol. 2B SLDT", "the selector is stored", _store_form, _store_selector),
    _done("store-table", "SDM Vol. 2B SGDT", "limit and base are stored",
          _mnemonic(Mnemonic.SGDT, Mnemonic.SIDT), _store_table),
    _done("load-table", "SDM Vol. 2A LGDT", "limit and base are loaded",
          _mnemonic(Mnemonic.LGDT, Mnemonic.LIDT), _load_table),
    _done("rdmsr", "SDM Vol. 2B RDMSR", "EDX:EAX is the MSR, zero-extended", _mnemonic(Mnemonic.RDMSR),
          _rdmsr),
    _done("wrmsr", "SDM Vol. 2B WRMSR", "the MSR is EDX:EAX", _mnemonic(Mnemonic.WRMSR), _wrmsr),
    _done("xsetbv", "SDM Vol. 2D XSETBV", "XCR0 is EDX:EAX", _mnemonic(Mnemonic.XSETBV), _xsetbv),
    _done("interrupt-flag", "SDM Vol. 2B STI", "CLI clears IF, STI sets it",
          _mnemonic(Mnemonic.CLI, Mnemonic.STI), _interrupt_flag),
    _done("popf-protected", "SDM Vol. 2B POPF", "VM stays, IOPL stays above CPL 0, IF above IOPL",
          _mnemonic(*_POPF), _popf),
    _done("load-segment-real", "SDM Vol. 3B 21.1.1", "the base is the selector times 16", _loads, _load_real),
    _done("load-segment-null", "SDM Vol. 3A 5.4.1", "a null selector makes the segment unusable", _loads,
          _load_null),
    _done("load-segment", "SDM Vol. 3A 3.4.3", "the hidden part comes from the descriptor", _loads,
          _load_descriptor),
    _done("shadow-mov-ss", "SDM Vol. 3A 6.8.3", "MOV SS and POP SS block interrupts for one instruction",
          _blocks, _shadow_mov_ss),
    _done("shadow-sti", "SDM Vol. 2B STI", "STI blocks interrupts for one instruction if IF was clear",
          _mnemonic(Mnemonic.STI), _shadow_sti),
    _done("shadow-none", "SDM Vol. 3A 6.8.3", "other instructions block no interrupts", _quiet, _shadow_none),
)
# fmt: on

__all__ = ["RULES", "OpKind"]

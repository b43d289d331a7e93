"""Which encodings and states are #UD, #NM, or too long (SDM Vol. 3A 6.15; Vol. 2D Appendix A)."""

from __future__ import annotations

from typing import Final

from iced_x86 import CpuidFeature, Mnemonic

from emufuzz.arch.cr import (
    EFER_SCE,
    X86_CR0_EM,
    X86_CR0_MP,
    X86_CR0_TS,
    X86_CR4_DE,
    X86_CR4_OSFXSR,
    X86_CR4_OSXSAVE,
)
from emufuzz.arch.exceptions import GP_VECTOR, NM_VECTOR, UD_VECTOR
from emufuzz.oracle.rules.decoded import Decoded, decoded
from emufuzz.oracle.rules.rule import DECODE, FAULT, Due, Encoding, Rule
from emufuzz.oracle.rules.view import View

UD: Final = (UD_VECTOR, None, None)
NM: Final = (NM_VECTOR, None, None)
GP0: Final = (GP_VECTOR, 0, None)

_X86_CR4_VMXE: Final = 1 << 13
_NO_64: Final = frozenset(
    (0x06, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F, 0x27, 0x2F, 0x37, 0x3F, 0x60, 0x61, 0x82, 0x9A, 0xCE,
     0xD4, 0xD5, 0xD6, 0xEA)
)  # fmt: skip
_SSE_FEATURES: Final = frozenset(
    (CpuidFeature.SSE, CpuidFeature.SSE2, CpuidFeature.SSE3, CpuidFeature.SSSE3, CpuidFeature.SSE4_1,
     CpuidFeature.SSE4_2)
)  # fmt: skip
#: Of those, what works without XMM registers and asks neither CR0.EM nor CR4.OSFXSR.
_PLAIN_SSE: Final = frozenset(
    (Mnemonic.MOVNTI, Mnemonic.PREFETCHNTA, Mnemonic.PREFETCHT0, Mnemonic.PREFETCHT1, Mnemonic.PREFETCHT2,
     Mnemonic.SFENCE, Mnemonic.LFENCE, Mnemonic.MFENCE, Mnemonic.PAUSE, Mnemonic.CLFLUSH, Mnemonic.CRC32,
     Mnemonic.POPCNT, Mnemonic.MONITOR, Mnemonic.MWAIT, Mnemonic.FISTTP)
)  # fmt: skip
_XMM: Final = range(161, 193)  # XMM0 .. XMM31 as iced numbers registers
_MMX: Final = range(225, 233)
_PROTECTED_ONLY: Final = frozenset(
    (Mnemonic.SLDT, Mnemonic.STR, Mnemonic.LLDT, Mnemonic.LTR, Mnemonic.VERR, Mnemonic.VERW, Mnemonic.LAR,
     Mnemonic.LSL, Mnemonic.ARPL)
)  # fmt: skip
_FXSAVE: Final = frozenset((Mnemonic.FXSAVE, Mnemonic.FXSAVE64, Mnemonic.FXRSTOR, Mnemonic.FXRSTOR64))
_VMX: Final = frozenset(
    (Mnemonic.VMXON, Mnemonic.VMXOFF, Mnemonic.VMCLEAR, Mnemonic.VMPTRLD, Mnemonic.VMPTRST, Mnemonic.VMREAD,
     Mnemonic.VMWRITE, Mnemonic.VMLAUNCH, Mnemonic.VMRESUME, Mnemonic.INVEPT, Mnemonic.INVVPID)
)  # fmt: skip
_NT_STORES: Final = {  # 0F xx whose register form does not exist
    0x2B: None, 0xC3: None, 0xE7: None,
}  # fmt: skip


def _registers(insn: Decoded, numbers: range) -> bool:
    lax = insn.lax
    return any(lax.op_register(place) in numbers for place in range(lax.op_count))


def is_sse(insn: Decoded) -> bool:
    """An instruction of the SSE sets that works on vectors."""
    features = set(insn.lax.cpuid_features())
    return insn.known and bool(features & _SSE_FEATURES) and insn.mnemonic not in _PLAIN_SSE


def uses_xmm(insn: Decoded) -> bool:
    """An SSE instruction that works on XMM registers."""
    return is_sse(insn) and not (_registers(insn, _MMX) and not _registers(insn, _XMM))


def uses_mmx(insn: Decoded) -> bool:
    """An instruction of the MMX set, or one of SSE on MMX registers alone."""
    return insn.known and (_registers(insn, _MMX) or insn.mnemonic == Mnemonic.EMMS)


def uses_x87(insn: Decoded) -> bool:
    """An escape opcode."""
    return insn.known and insn.opcode[0] & 0xF8 == 0xD8


def _lock(insn: Decoded) -> bool:
    """LOCK is what makes the encoding invalid: without it, it would be valid."""
    if not insn.lock or insn.valid or not insn.known:
        return False
    return decoded(insn.code.replace(b"\xf0", b"", 1), insn.bits).valid


def _two_byte(*opcodes: int, reg: tuple[int, ...] = (), mod: int | None = None) -> Encoding:
    """0F xx with one of the given ModRM.reg and, if asked for, with a register operand."""
    return lambda insn: (
        insn.opcode[0] == 0x0F
        and insn.opcode[1] in opcodes
        and (not reg or insn.reg in reg)
        and (mod is None or (insn.mod == 3) == (mod == 3))
    )


def _group(*groups: tuple[int, tuple[int, ...]]) -> Encoding:
    """A one-byte opcode with one of the ModRM.reg that its group leaves free."""
    table = dict(groups)
    return lambda insn: insn.reg in table.get(insn.opcode[0], ())


def _far_register(insn: Decoded) -> bool:
    """A far pointer, or BOUND's pair, in a register: C4, C5 and 62 are VEX and EVEX then."""
    far = insn.opcode[0] == 0xFF and insn.reg in {3, 5}
    table = insn.opcode[0] == 0x0F and insn.opcode[1] in {0xB2, 0xB4, 0xB5}
    return (far or table) and insn.mod == 3


def _extension(insn: Decoded) -> int:
    """ModRM.reg with REX.R, the number of a control or debug register."""
    return insn.reg | (insn.rex & 4) << 1


def _cr_number(insn: Decoded) -> bool:
    return _two_byte(0x20, 0x22)(insn) and _extension(insn) not in {0, 2, 3, 4, 8} and not insn.lock


def _dr_number(insn: Decoded) -> bool:
    return _two_byte(0x21, 0x23)(insn) and _extension(insn) > 7


def _segment_number(insn: Decoded) -> bool:
    return insn.opcode[0] in {0x8C, 0x8E} and insn.reg > 5


def _undefined(insn: Decoded) -> bool:
    return not insn.known and not insn.too_long and not insn.truncated


def _encoding(insn: Decoded) -> bool:
    return insn.known and not insn.valid


def _always(_view: View) -> bool:
    return True


def _lock_state(view: View) -> bool:
    """LOCK MOV CR0 is MOV CR8 on AMD processors."""
    opcode = view.insn.opcode
    return view.case.vendor != "amd" or opcode[0] != 0x0F or opcode[1] not in {0x20, 0x22}


def _real_or_vm86(view: View) -> bool:
    return not view.protected


def _cr0(bits: int) -> Due:
    return lambda view: bool(view.system.cr0 & bits)


def _without_cr4(bit: int) -> Due:
    return lambda view: not view.system.cr4 & bit


def _syscall(view: View) -> bool:
    """Intel: only in 64-bit mode and with EFER.SCE."""
    if view.case.vendor == "intel" and not view.long:
        return True
    return not view.system.efer & EFER_SCE


def _debug_extensions(view: View) -> bool:
    return bool(view.system.cr4 & X86_CR4_DE)


def _ud(name: str, citation: str, demand: str, encoding: Encoding | None, due: Due = _always,
        mnemonics: frozenset[int] | None = None) -> Rule:  # fmt: skip
    return Rule(name, FAULT, citation, demand, mnemonics, encoding, DECODE, UD, due)


def _nm(name: str, citation: str, demand: str, encoding: Encoding, due: Due) -> Rule:
    return Rule(name, FAULT, citation, demand, None, encoding, DECODE, NM, due)


# fmt: off
RULES: Final = (
    Rule("gp-too-long", FAULT, "SDM Vol. 3A 6.15, #GP", "an instruction has at most 15 bytes",
         None, lambda insn: insn.too_long, DECODE, GP0, _always),
    _ud("ud-lock", "SDM Vol. 2A LOCK", "LOCK is for read-modify-write of memory only",
        _lock, _lock_state),
    _ud("ud-not-in-64-bit", "SDM Vol. 2D Table A-2", "the opcode has no meaning in 64-bit mode",
        lambda insn: insn.long and insn.opcode[0] in _NO_64),
    _ud("ud-mov-to-cs", "SDM Vol. 2B MOV", "MOV cannot load CS",
        lambda insn: insn.opcode[0] == 0x8E and insn.reg == 1),
    _ud("ud-segment-number", "SDM Vol. 2B MOV", "there are six segment registers",
        _segment_number),
    _ud("ud-control-register", "SDM Vol. 2B MOV CRn", "CR0, CR2, CR3, CR4 and CR8 are all that there are",
        _cr_number),
    _ud("ud-debug-register", "SDM Vol. 2B MOV DRn", "with REX.R there is no debug register",
        _dr_number),
    _ud("ud-debug-extensions", "SDM Vol. 3B 18.2.2", "with CR4.DE set DR4 and DR5 do not exist",
        lambda insn: _two_byte(0x21, 0x23)(insn) and insn.reg in {4, 5}, _debug_extensions),
    _ud("ud-ud2", "SDM Vol. 2B UD", "UD0, UD1 and UD2 are undefined by definition",
        None, mnemonics=frozenset((Mnemonic.UD0, Mnemonic.UD1, Mnemonic.UD2))),
    _ud("ud-far-pointer-register", "SDM Vol. 2A LDS", "a far pointer is in memory",
        _far_register),
    _ud("ud-lea-register", "SDM Vol. 2A LEA", "LEA has a memory operand",
        lambda insn: insn.opcode[0] == 0x8D and insn.mod == 3),
    _ud("ud-group-pop", "SDM Vol. 2D Table A-6", "8F has only POP, /0",
        lambda insn: insn.opcode[0] == 0x8F and insn.reg != 0 and not insn.known),
    _ud("ud-group-inc-dec", "SDM Vol. 2D Table A-6", "FE has /0 and /1, FF has no /7",
        _group((0xFE, (2, 3, 4, 5, 6, 7)), (0xFF, (7,)))),
    _ud("ud-group-bits", "SDM Vol. 2D Table A-6", "0F BA has /4 to /7",
        _two_byte(0xBA, reg=(0, 1, 2, 3))),
    _ud("ud-group-tables", "SDM Vol. 2D Table A-6", "0F 00 has no /7, nor /6 on these processors",
        _two_byte(0x00, reg=(7,))),
    _ud("ud-cmpxchg8b-register", "SDM Vol. 2A CMPXCHG8B", "CMPXCHG8B works on memory",
        _two_byte(0xC7, reg=(1,), mod=3)),
    _ud("ud-non-temporal-register", "SDM Vol. 2B MOVNTI", "a non-temporal store goes to memory",
        lambda insn: insn.opcode[0] == 0x0F and insn.opcode[1] in _NT_STORES and insn.mod == 3),
    _ud("ud-real-vm86", "SDM Vol. 3B 21.2.1", "the instruction is for protected mode",
        None, _real_or_vm86, _PROTECTED_ONLY),
    _ud("ud-syscall", "SDM Vol. 2B SYSCALL",
        "SYSCALL and SYSRET need EFER.SCE, on Intel processors 64-bit mode",
        None, _syscall, frozenset((Mnemonic.SYSCALL, Mnemonic.SYSRET, Mnemonic.SYSRETQ))),
    _ud("ud-swapgs", "SDM Vol. 2B SWAPGS", "SWAPGS is for 64-bit mode",
        lambda insn: insn.opcode[:3] == b"\x0f\x01\xf8" and not insn.long),
    _ud("ud-rsm", "SDM Vol. 2B RSM", "RSM is for system-management mode",
        None, mnemonics=frozenset((Mnemonic.RSM,))),
    _ud("ud-vmx-disabled", "SDM Vol. 3C 23.7", "without CR4.VMXE there are no VMX instructions",
        None, _without_cr4(_X86_CR4_VMXE), _VMX),
    _ud("ud-monitor", "SDM Vol. 2B MONITOR", "MONITOR and MWAIT are for CPL 0",
        None, lambda view: view.cpl > 0, frozenset((Mnemonic.MONITOR, Mnemonic.MWAIT))),
    _ud("ud-xcr", "SDM Vol. 2D XSETBV", "XGETBV and XSETBV need CR4.OSXSAVE",
        None, _without_cr4(X86_CR4_OSXSAVE), frozenset((Mnemonic.XGETBV, Mnemonic.XSETBV))),
    _ud("ud-sse-em", "SDM Vol. 3A 13.1.2", "with CR0.EM there is no SSE",
        uses_xmm, _cr0(X86_CR0_EM)),
    _ud("ud-sse-osfxsr", "SDM Vol. 3A 13.1.2", "SSE needs CR4.OSFXSR",
        uses_xmm, _without_cr4(X86_CR4_OSFXSR)),
    _ud("ud-mmx-em", "SDM Vol. 3A 12.1", "with CR0.EM there is no MMX",
        uses_mmx, _cr0(X86_CR0_EM)),
    _nm("nm-sse", "SDM Vol. 3A 13.1.2", "with CR0.TS set SSE state belongs to another task",
        uses_xmm, lambda view: bool(view.system.cr0 & X86_CR0_TS and not view.system.cr0 & X86_CR0_EM)),
    _nm("nm-mmx", "SDM Vol. 3A 12.1", "with CR0.TS set MMX state belongs to another task",
        uses_mmx, lambda view: bool(view.system.cr0 & X86_CR0_TS and not view.system.cr0 & X86_CR0_EM)),
    _nm("nm-x87", "SDM Vol. 3A 2.5", "with CR0.EM or CR0.TS there is no x87",
        uses_x87, _cr0(X86_CR0_EM | X86_CR0_TS)),
    _nm("nm-fxsave", "SDM Vol. 2A FXSAVE", "with CR0.EM or CR0.TS the FPU's state cannot be saved or loaded",
        lambda insn: insn.mnemonic in _FXSAVE, _cr0(X86_CR0_EM | X86_CR0_TS)),
    _nm("nm-wait", "SDM Vol. 3A 2.5", "WAIT looks at CR0.MP and CR0.TS",
        lambda insn: insn.mnemonic == Mnemonic.WAIT,
        lambda view: view.system.cr0 & (X86_CR0_MP | X86_CR0_TS) == X86_CR0_MP | X86_CR0_TS),
    _ud("ud-encoding", "SDM Vol. 2A 2.1", "the operands or prefixes make the encoding invalid",
        lambda insn: _encoding(insn) and not _lock(insn)),
    _ud("ud-opcode", "SDM Vol. 2D A.3", "the opcode is undefined",
        _undefined),
)
# fmt: on

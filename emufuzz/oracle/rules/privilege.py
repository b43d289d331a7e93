"""Who may execute what: CPL, IOPL, the I/O permission bitmap (SDM Vol. 3A 5.9; Vol. 1 19.5)."""

from __future__ import annotations

from typing import Final

from iced_x86 import Mnemonic, OpKind

from emufuzz.arch.cr import X86_CR4_TSD, X86_CR4_UMIP, X86_CR4_VME
from emufuzz.arch.exceptions import GP_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RDX, VCPU_SREG_TR
from emufuzz.oracle.rules.decoded import Decoded
from emufuzz.oracle.rules.rule import FAULT, PRIVILEGE, Due, Encoding, Rule
from emufuzz.oracle.rules.view import MASK32, MASK64, View

GP0: Final = (GP_VECTOR, 0, None)
_X86_CR4_PVI: Final = 2
_X86_CR4_PCE: Final = 0x100
#: TYPE of a 32-bit TSS or a 64-bit one, without the busy bit.
_TSS32: Final = 9
_IO_MAP: Final = 102  # offset in a TSS of the field with the bitmap's offset
_FLAG_IMAGES: Final = frozenset((Mnemonic.PUSHF, Mnemonic.PUSHFD, Mnemonic.POPF, Mnemonic.POPFD))
_RETURNS: Final = frozenset((Mnemonic.IRET, Mnemonic.IRETD))
PORTS: Final = frozenset(
    (Mnemonic.IN, Mnemonic.OUT, Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD, Mnemonic.OUTSB, Mnemonic.OUTSW,
     Mnemonic.OUTSD)
)  # fmt: skip


def _not_kernel(view: View) -> bool:
    return view.cpl > 0


def _unprivileged_with(bit: int) -> Due:
    return lambda view: bool(view.cpl and view.system.cr4 & bit)


def _unprivileged_without(bit: int) -> Due:
    return lambda view: bool(view.cpl and not view.system.cr4 & bit)


def _interrupt_flag(view: View) -> bool:
    """CLI and STI without the right to change IF, and without a virtual IF to change instead."""
    if view.real or view.cpl <= view.iopl:
        return False
    if view.vm86:
        return view.iopl < 3 and not view.system.cr4 & X86_CR4_VME
    return not (view.cpl == 3 and view.system.cr4 & _X86_CR4_PVI)


def _vm86_flags(view: View) -> bool:
    """Virtual-8086 mode below IOPL 3; with CR4.VME the 16-bit forms use VIF instead."""
    if not view.vm86 or view.iopl == 3:
        return False
    return not view.system.cr4 & X86_CR4_VME or view.insn.operand_bits == 32


def _vm86_interrupt(view: View) -> bool:
    return view.vm86 and view.iopl < 3 and not view.system.cr4 & X86_CR4_VME


def port_of(view: View) -> int:
    """The port of IN, OUT, INS or OUTS."""
    lax = view.insn.lax
    for place in range(lax.op_count):
        if lax.op_kind(place) == OpKind.IMMEDIATE8:
            return int(lax.immediate8)
    return view.case.gpr[VCPU_REGS_RDX] & 0xFFFF


def port_size(insn: Decoded) -> int:
    """Bytes of one port access."""
    return min(insn.operand_bits // 8, 4) if insn.opcode[0] & 1 else 1


def _guarded(view: View) -> bool:
    """The I/O permission bitmap decides about ports (SDM Vol. 1 19.5.2)."""
    return not view.real and (view.vm86 or view.cpl > view.iopl)


def _needs_bitmap(view: View) -> bool:
    return _guarded(view) and not (view.insn.repeats and not view.count)


def bitmap_denies(view: View) -> bool | None:
    """Whether the TSS forbids the port; None if that cannot be read here."""
    task = view.system.seg[VCPU_SREG_TR]
    if not task.p:
        return None
    if task.type & ~2 != _TSS32 or task.limit < _IO_MAP + 1:
        return True
    mask = MASK64 if view.ia32e else MASK32
    start = view.number(task.base + _IO_MAP & mask, 2)
    if start is None:
        return None
    port, size = port_of(view), port_size(view.insn)
    at = start + port // 8
    if at + 1 > task.limit:  # always two bytes are read
        return True
    bits = view.number(task.base + at & mask, 2)
    return None if bits is None else bool(bits >> port % 8 & (1 << size) - 1)


def bitmap_unknown(view: View) -> bool:
    """The bitmap decides, or would if REP had anything to do, and cannot be read here."""
    return _guarded(view) and bitmap_denies(view) is None


def _bitmap(view: View) -> bool:
    return _needs_bitmap(view) and bitmap_denies(view) is True


def _gp(name: str, citation: str, demand: str, mnemonics: tuple[int, ...], due: Due = _not_kernel,
        encoding: Encoding | None = None) -> Rule:  # fmt: skip
    return Rule(name, FAULT, citation, demand, frozenset(mnemonics), encoding, PRIVILEGE, GP0, due)


def _moves(opcodes: tuple[int, ...]) -> Encoding:
    return lambda insn: insn.opcode[0] == 0x0F and insn.opcode[1] in opcodes


# fmt: off
RULES: Final = (
    _gp("gp-cpl-hlt", "SDM Vol. 2A HLT", "HLT is for CPL 0", (Mnemonic.HLT,)),
    _gp("gp-cpl-cache", "SDM Vol. 2B WBINVD", "INVD and WBINVD are for CPL 0",
        (Mnemonic.INVD, Mnemonic.WBINVD)),
    _gp("gp-cpl-clts", "SDM Vol. 2A CLTS", "CLTS is for CPL 0", (Mnemonic.CLTS,)),
    _gp("gp-cpl-lmsw", "SDM Vol. 2A LMSW", "LMSW is for CPL 0", (Mnemonic.LMSW,)),
    _gp("gp-cpl-tables", "SDM Vol. 2A LGDT", "LGDT and LIDT are for CPL 0", (Mnemonic.LGDT, Mnemonic.LIDT)),
    _gp("gp-cpl-lldt-ltr", "SDM Vol. 2A LTR", "LLDT and LTR are for CPL 0", (Mnemonic.LLDT, Mnemonic.LTR),
        lambda view: view.cpl > 0 and view.protected),
    _gp("gp-cpl-invlpg", "SDM Vol. 2A INVLPG", "INVLPG is for CPL 0", (Mnemonic.INVLPG,)),
    _gp("gp-cpl-mov-cr", "SDM Vol. 2B MOV CRn", "control registers are for CPL 0", (Mnemonic.MOV,),
        encoding=_moves((0x20, 0x22))),
    _gp("gp-cpl-mov-dr", "SDM Vol. 2B MOV DRn", "debug registers are for CPL 0", (Mnemonic.MOV,),
        encoding=_moves((0x21, 0x23))),
    _gp("gp-cpl-msr", "SDM Vol. 2B RDMSR", "RDMSR and WRMSR are for CPL 0", (Mnemonic.RDMSR, Mnemonic.WRMSR)),
    _gp("gp-cpl-xsetbv", "SDM Vol. 2D XSETBV", "XSETBV is for CPL 0", (Mnemonic.XSETBV,)),
    _gp("gp-cpl-swapgs", "SDM Vol. 2B SWAPGS", "SWAPGS is for CPL 0", (Mnemonic.SWAPGS,)),
    _gp("gp-cpl-sysret", "SDM Vol. 2B SYSRET", "SYSRET is for CPL 0", (Mnemonic.SYSRET, Mnemonic.SYSRETQ)),
    _gp("gp-cpl-sysexit", "SDM Vol. 2B SYSEXIT", "SYSEXIT is for CPL 0",
        (Mnemonic.SYSEXIT, Mnemonic.SYSEXITQ)),
    _gp("gp-cpl-invpcid", "SDM Vol. 2A INVPCID", "INVPCID is for CPL 0", (Mnemonic.INVPCID,)),
    _gp("gp-real-sysenter", "SDM Vol. 2B SYSENTER", "SYSENTER and SYSEXIT need protected mode",
        (Mnemonic.SYSENTER, Mnemonic.SYSEXIT), lambda view: view.real),
    _gp("gp-tsd", "SDM Vol. 2B RDTSC", "with CR4.TSD the time-stamp counter is for CPL 0",
        (Mnemonic.RDTSC, Mnemonic.RDTSCP), _unprivileged_with(X86_CR4_TSD)),
    _gp("gp-pce", "SDM Vol. 2B RDPMC", "without CR4.PCE the performance counters are for CPL 0",
        (Mnemonic.RDPMC,), _unprivileged_without(_X86_CR4_PCE)),
    _gp("gp-umip", "SDM Vol. 3A 2.5", "with CR4.UMIP system registers are not stored above CPL 0",
        (Mnemonic.SGDT, Mnemonic.SIDT, Mnemonic.SLDT, Mnemonic.STR, Mnemonic.SMSW),
        _unprivileged_with(X86_CR4_UMIP)),
    _gp("gp-iopl-cli-sti", "SDM Vol. 2A CLI", "CLI and STI need CPL <= IOPL", (Mnemonic.CLI, Mnemonic.STI),
        _interrupt_flag),
    _gp("gp-vm86-flags", "SDM Vol. 3B 21.2.7", "PUSHF, POPF and IRET in virtual-8086 mode need IOPL 3",
        (*_FLAG_IMAGES, *_RETURNS), _vm86_flags),
    _gp("gp-vm86-int", "SDM Vol. 3B 21.2.7", "INT n in virtual-8086 mode needs IOPL 3", (Mnemonic.INT,),
        _vm86_interrupt),
    _gp("gp-io-bitmap", "SDM Vol. 1 19.5.2", "the I/O permission bitmap decides about the port",
        tuple(PORTS), _bitmap),
)
# fmt: on

"""What an instruction that completes must leave alone, and where it must leave its results."""

from __future__ import annotations

from typing import Final

from iced_x86 import FlowControl, Mnemonic

from emufuzz.arch.regs import (
    GPR_NAMES,
    SREG_NAMES,
    VCPU_REGS_R8,
    VCPU_REGS_RAX,
    VCPU_REGS_RSP,
)
from emufuzz.arch.rflags import X86_EFLAGS_RF, flag_names
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, Outcome
from emufuzz.oracle.operands import changed_bytes
from emufuzz.oracle.rules.decoded import Decoded
from emufuzz.oracle.rules.memory import opaque
from emufuzz.oracle.rules.rule import ANY, COMPLETED, Check, Encoding, Found, Rule
from emufuzz.oracle.rules.segments import loaded_segment
from emufuzz.oracle.rules.view import MASK32, MASK64, View

#: Bits of RFLAGS that are always 0; bit 1 is always 1 (SDM Vol. 1 3.4.3).
_RFLAGS_ZERO: Final = ~0x3F7FD7 & MASK64
LOAD_SYSTEM: Final = frozenset(
    (Mnemonic.LGDT, Mnemonic.LIDT, Mnemonic.LLDT, Mnemonic.LTR, Mnemonic.LMSW, Mnemonic.CLTS, Mnemonic.WRMSR,
     Mnemonic.XSETBV, Mnemonic.SWAPGS, Mnemonic.SYSCALL, Mnemonic.SYSRET, Mnemonic.SYSRETQ, Mnemonic.SYSENTER,
     Mnemonic.SYSEXIT, Mnemonic.SYSEXITQ, Mnemonic.RSM, Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ,
     Mnemonic.RETF, Mnemonic.INT, Mnemonic.INT3, Mnemonic.INTO, Mnemonic.INT1, Mnemonic.WRFSBASE,
     Mnemonic.WRGSBASE, Mnemonic.WRMSRLIST)
)  # fmt: skip
_LOAD_FLAGS: Final = frozenset(
    (Mnemonic.POPF, Mnemonic.POPFD, Mnemonic.POPFQ, Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ,
     Mnemonic.SYSCALL, Mnemonic.SYSRET, Mnemonic.SYSRETQ, Mnemonic.SYSENTER, Mnemonic.RSM, Mnemonic.INT,
     Mnemonic.INT3, Mnemonic.INTO, Mnemonic.INT1)
)  # fmt: skip
_ELSEWHERE: Final = frozenset((FlowControl.INTERRUPT, FlowControl.XBEGIN_XABORT_XEND, FlowControl.EXCEPTION))
#: Instructions that iced calls no branches, and that do not go on at the next instruction.
_TRANSFERS: Final = frozenset(
    (Mnemonic.SYSENTER, Mnemonic.SYSEXIT, Mnemonic.SYSEXITQ, Mnemonic.SYSCALL, Mnemonic.SYSRET,
     Mnemonic.SYSRETQ, Mnemonic.RSM, Mnemonic.VMCALL, Mnemonic.VMMCALL, Mnemonic.HLT)
)  # fmt: skip
#: A 32-bit destination that these may leave as it is, upper half and all (SDM: undefined or unwritten).
_MAY_LEAVE: Final = frozenset(
    (Mnemonic.BSF, Mnemonic.BSR, Mnemonic.CMPXCHG, Mnemonic.LAR, Mnemonic.LSL, Mnemonic.RDSSPD)
)
#: Bits that do not count: of FSW those that the processor derives from the rest, of FCW the fixed ones.
_FPU_IGNORED: Final = {"fsw": 0x8080, "fcw": 0xE0C0}
_FPU_WORDS: Final = ("fcw", "fsw", "ftw", "mxcsr")


def straight(insn: Decoded) -> bool:
    """The next instruction follows, unless the instruction repeats itself."""
    return insn.valid and insn.lax.flow_control == FlowControl.NEXT and insn.mnemonic not in _TRANSFERS


def _next(view: View, outcome: Outcome) -> Found | None:
    wanted = view.case.rip + view.insn.length & (MASK64 if view.long else MASK32)
    if outcome.rip == wanted or (outcome.rip == view.case.rip and view.insn.repeats):
        return None
    return Found("rip", hex(outcome.rip), f"the next instruction is at {wanted:#x}")


def _upper_rip(view: View, outcome: Outcome) -> Found | None:
    if view.long or outcome.system.efer & 0x400 or not outcome.rip >> 32:
        return None
    return Found("rip", hex(outcome.rip))


def _reserved_flags(_view: View, outcome: Outcome) -> Found | None:
    wrong = outcome.rflags & _RFLAGS_ZERO
    if not wrong and outcome.rflags & 2:
        return None
    return Found("rflags", hex(outcome.rflags))


def _unmodified_flags(view: View, outcome: Outcome) -> Found | None:
    changed = (view.case.rflags ^ outcome.rflags) & ~view.insn.flags & ~X86_EFLAGS_RF
    if not changed:
        return None
    return Found("rflags", f"{' '.join(flag_names(changed)) or hex(changed)} changed")


def _resume(view: View, outcome: Outcome) -> Found | None:
    """RF is cleared by what completes; a repeated instruction between iterations may have it set."""
    if not outcome.rflags & X86_EFLAGS_RF or (view.insn.repeats and outcome.rip == view.case.rip):
        return None
    return Found("rflags", "RF")


def _unwritten(view: View, outcome: Outcome) -> Found | None:
    before, after = view.case.gpr, outcome.gpr
    if after == before:
        return None
    written = view.insn.written
    if view.insn.mnemonic == Mnemonic.PAUSE and view.insn.rex & 1:  # it is XCHG R8, RAX
        written |= 1 << VCPU_REGS_RAX | 1 << VCPU_REGS_R8
    for number, name in enumerate(GPR_NAMES):
        if after[number] != before[number] and not written >> number & 1:
            return Found(name, hex(after[number]), f"{name} stays {before[number]:#x}")
    return None


def _zero_extension(view: View, outcome: Outcome) -> Found | None:
    for number, size, _, certain in view.insn.destinations:
        value = outcome.gpr[number]
        if size == 4 and value >> 32 and (certain or value != view.case.gpr[number]):
            return Found(GPR_NAMES[number], hex(value))
    return None


def _narrow(view: View, outcome: Outcome) -> Found | None:
    """8 and 16-bit destinations keep the rest of their register, if no other operand is in it."""
    for number, size, high, _ in view.insn.destinations:
        keep = ~(0xFF00 if high else (1 << size * 8) - 1) & MASK64
        alone = sum(other.number == number for other in view.insn.destinations) == 1
        if size <= 2 and alone and (outcome.gpr[number] ^ view.case.gpr[number]) & keep:
            return Found(GPR_NAMES[number], hex(outcome.gpr[number]))
    return None


def _stack_pointer(view: View, outcome: Outcome) -> Found | None:
    """RSP moves by what was pushed and popped, within the width of the stack pointer."""
    old, new = view.case.gpr[VCPU_REGS_RSP], outcome.gpr[VCPU_REGS_RSP]
    mask = (1 << view.stack_bits) - 1
    wanted = old & ~mask | old + view.insn.lax.stack_pointer_increment & mask
    if view.stack_bits == 32:
        wanted &= MASK32
        new &= MASK32
    return None if new == wanted else Found("rsp", hex(new), f"rsp becomes {wanted:#x}")


def _plain_stack(insn: Decoded) -> bool:
    """PUSH, POP, CALL, RET and their kin; not what loads the stack pointer."""
    lax = insn.lax
    if not insn.valid or not lax.is_stack_instruction or insn.mnemonic in _LOAD_FLAGS:
        return False
    loads = any(destination.number == VCPU_REGS_RSP for destination in insn.destinations)
    odd = insn.mnemonic in {Mnemonic.ENTER, Mnemonic.LEAVE, Mnemonic.RETF}
    far = lax.flow_control in {FlowControl.CALL, FlowControl.INDIRECT_CALL} and lax.op_kind(0) in {4, 5}
    segment = loaded_segment(insn) is not None
    return not (loads or odd or far or segment) and not (insn.long and 0x66 in insn.prefixes and near(insn))


def near(insn: Decoded) -> bool:
    """CALL or RET."""
    return insn.mnemonic in {Mnemonic.CALL, Mnemonic.RET}


def _reads_only(insn: Decoded) -> bool:
    """The instruction has no operand in memory that it writes, nor anything that marks a descriptor."""
    if not insn.valid or opaque(insn) or insn.mnemonic in LOAD_SYSTEM:
        return False
    if any(reference.write for reference in insn.references) or insn.lax.is_save_restore_instruction:
        return False
    far = insn.opcode[0] in {0x9A, 0xEA} or (insn.opcode[0] == 0xFF and insn.reg in {3, 5})
    return loaded_segment(insn) is None and not far


def _no_write(view: View, outcome: Outcome) -> Found | None:
    if not outcome.pages:
        return None
    changed = changed_bytes(view.case, outcome)  # without accessed and dirty bits
    return Found("mem", f"{len(changed)} bytes at {min(changed):#x}") if changed else None


def _writes_plainly(insn: Decoded) -> bool:
    if not insn.valid or opaque(insn) or insn.mnemonic in LOAD_SYSTEM or insn.repeats:
        return False
    return (
        any(reference.write for reference in insn.references)
        and loaded_segment(insn) is None
        and not (insn.opcode[0] == 0xFF and insn.reg in {3, 5})
        and insn.opcode[0] != 0x9A
    )


def _writes_inside(view: View, outcome: Outcome) -> Found | None:
    """Bytes change only where the instruction writes."""
    if not outcome.pages or not view.flat:
        return None
    mask = MASK64 if view.long else MASK32
    ranges = [(access.linear, access.size) for access in view.accesses if access.reference.write]
    if len(ranges) == 1 and _changed_within(view, outcome, *ranges[0]):
        return None
    for at in changed_bytes(view.case, outcome):
        if not any((at - start & mask) < size for start, size in ranges):
            return Found("mem", f"a byte at {at:#x}")
    return None


def _changed_within(view: View, outcome: Outcome, start: int, size: int) -> bool:
    """The quick answer for what is written to one page of ordinary memory; False says nothing."""
    page = outcome.pages.get(start >> PAGE_SHIFT)
    old = view.case.mem.pages.get(start >> PAGE_SHIFT)
    if page is None or old is None or len(outcome.pages) != 1:
        return False
    at = start & PAGE_MASK
    return page[:at] == old[:at] and page[at + size :] == old[at + size :]


def _ordinary(insn: Decoded) -> bool:
    """No instruction of those that load system state."""
    if not insn.valid or insn.mnemonic in LOAD_SYSTEM:
        return False
    moves = insn.opcode[0] == 0x0F and insn.opcode[1] in {0x22, 0x23}
    far = insn.opcode[0] in {0x9A, 0xEA} or (insn.opcode[0] == 0xFF and insn.reg in {3, 5})
    return not (moves or far) and loaded_segment(insn) is None and insn.lax.flow_control not in _ELSEWHERE


def same_system(view: View, outcome: Outcome) -> Found | None:
    """Nothing but FPU state changes; what CR2 gets from a #PF is a matter of its delivery."""
    before, after = view.system, outcome.system
    if after is before:
        return None
    for name in ("seg", "gdtr", "idtr", "cr0", "cr3", "cr4", "cr8", "efer", "xcr0", "dr", "msr"):
        if getattr(before, name) != getattr(after, name):
            return Found(*_changed(name, getattr(before, name), getattr(after, name)))
    return None


def _changed(name: str, before: object, after: object) -> tuple[str, str]:
    """The member that changed, as comparisons name it, and its new value."""
    if name in {"seg", "dr"} and isinstance(before, tuple) and isinstance(after, tuple):
        at = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
        return f"seg.{SREG_NAMES[at]}" if name == "seg" else f"dr{at}", repr(after[at])
    return name, hex(after) if isinstance(after, int) else repr(after)


def _no_fpu(insn: Decoded) -> bool:
    """No vector, MMX or x87 register is involved, and none of what saves and loads them."""
    if not insn.valid or insn.lax.is_save_restore_instruction or insn.opcode[0] & 0xF8 == 0xD8:
        return False
    return insn.opcode[0] != 0x0F and insn.opcode[0] not in {0x9B, 0x62, 0xC4, 0xC5}


def same_fpu(view: View, outcome: Outcome) -> Found | None:
    """The first FPU register that changed."""
    before, after = view.system.fpu, outcome.system.fpu
    if after is before or after == before:
        return None
    for name in _FPU_WORDS:
        if (getattr(before, name) ^ getattr(after, name)) & ~_FPU_IGNORED.get(name, 0):
            return Found(f"fpu.{name}", hex(getattr(after, name)))
    vectors = before.xmm != after.xmm
    if not vectors and before.mm == after.mm:
        return None
    old, new = (before.xmm, after.xmm) if vectors else (before.mm, after.mm)
    at = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    return Found(f"fpu.{'xmm' if vectors else 'mm'}{at}", hex(new[at]))


def _done(name: str, citation: str, demand: str, encoding: Encoding | None, finds: Check) -> Rule:
    return Rule(name, COMPLETED, citation, demand, None, encoding, finds=finds)


def _ordinary_flags(insn: Decoded) -> bool:
    return insn.valid and insn.mnemonic not in _LOAD_FLAGS


def _ordinary_registers(insn: Decoded) -> bool:
    return insn.valid and insn.mnemonic not in LOAD_SYSTEM and not opaque(insn)


def _four_byte(insn: Decoded) -> bool:
    return insn.long and insn.mnemonic not in _MAY_LEAVE and any(d.size == 4 for d in insn.destinations)


def _short(insn: Decoded) -> bool:
    small = any(destination.size <= 2 for destination in insn.destinations)
    if insn.mnemonic == Mnemonic.POP and any(each.number == VCPU_REGS_RSP for each in insn.destinations):
        return False  # SP is loaded after the stack pointer has moved
    return small and insn.mnemonic not in {Mnemonic.CMPXCHG, Mnemonic.XADD}  # which write two registers


# fmt: off
RULES: Final = (
    _done("next-instruction", "SDM Vol. 1 3.5", "the next instruction follows", straight, _next),
    _done("rip-upper-half", "SDM Vol. 1 3.5", "outside of 64-bit mode EIP has 32 bits", None, _upper_rip),
    _done("flags-unmodified", "SDM Vol. 1 Appendix A", "flags that the instruction does not modify stay",
          _ordinary_flags, _unmodified_flags),
    _done("resume-flag", "SDM Vol. 3B 18.3.1.1", "RF is clear behind the instruction", _ordinary_flags,
          _resume),
    _done("registers-unwritten", "SDM Vol. 2A 3.1.1.9", "registers that are no operand stay",
          _ordinary_registers, _unwritten),
    _done("zero-extension", "SDM Vol. 1 3.4.1.1", "a 32-bit result is zero-extended to 64 bits",
          _four_byte, _zero_extension),
    _done("narrow-result", "SDM Vol. 1 3.4.1.1", "a result of 8 or 16 bits leaves the rest of its register",
          _short, _narrow),
    _done("stack-pointer", "SDM Vol. 1 6.2.3", "the stack pointer moves by what is pushed or popped",
          _plain_stack, _stack_pointer),
    _done("memory-read-only", "SDM Vol. 2A 3.1.1.9", "what only reads memory does not change it",
          _reads_only, _no_write),
    _done("memory-elsewhere", "SDM Vol. 2A 3.1.1.9", "memory changes within the written operand only",
          _writes_plainly, _writes_inside),
    _done("system-unchanged", "SDM Vol. 3A 2.8", "other instructions load system registers and segments",
          _ordinary, same_system),
    _done("fpu-unchanged", "SDM Vol. 1 8.1", "general-purpose instructions leave FPU state alone",
          _no_fpu, same_fpu),
    Rule("rflags-reserved", ANY, "SDM Vol. 1 3.4.3", "bit 1 of RFLAGS is 1, bits 3, 5, 15 and 63:22 are 0",
         finds=_reserved_flags),
)
# fmt: on

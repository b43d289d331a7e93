"""The rules behind the named quirks: whether KVM's known behaviour explains a set of differences.

Each rule works out what exactly KVM does with this case, so that it explains nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from emufuzz.arch.cr import EFER_LMA
from emufuzz.arch.exceptions import DB_VECTOR, GP_VECTOR, PF_VECTOR, SS_VECTOR, UD_VECTOR
from emufuzz.arch.linear import linear_bits
from emufuzz.arch.regs import (
    GPR_NAMES,
    VCPU_REGS_RAX,
    VCPU_REGS_RBP,
    VCPU_REGS_RCX,
    VCPU_REGS_RDI,
    VCPU_REGS_RSI,
    VCPU_REGS_RSP,
    VCPU_SREG_SS,
)
from emufuzz.arch.rflags import (
    X86_EFLAGS_IOPL,
    X86_EFLAGS_RF,
    X86_EFLAGS_SF,
    X86_EFLAGS_VM,
    X86_EFLAGS_ZF,
)
from emufuzz.case.model import PAGE_MASK, Case, Outcome, is_physical
from emufuzz.oracle.device_trace import DEVICE_TRACE
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.operands import changed_bytes, modrm, operand_size, place_of, prefix_facts

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference


def _fields(differences: Sequence[Difference]) -> set[str]:
    return {difference.field for difference in differences}


def _mask(size: int) -> int:
    return (1 << size * 8) - 1


def repeated_scan(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """F3 BSF/BSR: the processor counts zeros, KVM scans."""
    if prefix_facts(case).rep != 0xF3 or subject.exception or oracle.exception:
        return False
    size = operand_size(case, subject.leaf)
    number = modrm(case)[1]
    name = GPR_NAMES[number]
    if not _fields(differences) <= {name, "rflags"} or (subject.rflags ^ oracle.rflags) & ~_STATUS_FLAGS:
        return False
    counted = oracle.gpr[number] & _mask(size)
    if counted == size * 8:  # a zero source: KVM leaves the destination alone
        return subject.gpr[number] == case.gpr[number] and bool(subject.rflags & X86_EFLAGS_ZF)
    index = counted if subject.leaf == "0fbc" else size * 8 - 1 - counted
    high = 0 if size >= 4 else case.gpr[number] & ~_mask(size)
    return subject.gpr[number] == high | index and not subject.rflags & X86_EFLAGS_ZF


#: OF, SF, ZF, AF, PF and CF.
_STATUS_FLAGS: Final = 0x8D5


def ascii_adjust(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """AAM, AAD: SF and ZF of AX or EAX instead of AL."""
    if _fields(differences) != {"rflags"}:
        return False
    size = operand_size(case, subject.leaf)
    value = subject.gpr[VCPU_REGS_RAX] & _mask(size)
    expected = (X86_EFLAGS_SF if value >> size * 8 - 1 else 0) | (0 if value else X86_EFLAGS_ZF)
    changed = X86_EFLAGS_SF | X86_EFLAGS_ZF
    undefined = _ASCII_UNDEFINED
    return subject.rflags & changed == expected and not (subject.rflags ^ oracle.rflags) & ~(
        changed | undefined
    )


#: OF, AF and CF, which AAM and AAD leave undefined.
_ASCII_UNDEFINED: Final = 0x811


def vm86_interrupt_flag(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """CLI, STI in virtual-8086 mode with IOPL 3: KVM refuses."""
    return (
        case.mode == "vm86"
        and case.rflags & X86_EFLAGS_IOPL == X86_EFLAGS_IOPL
        and subject.exception == (GP_VECTOR, 0, None)
        and oracle.exception in {None, (DB_VECTOR, None, None)}
    )


def vm86_flags(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """PUSHF in virtual-8086 mode with IOPL < 3 is not refused; POPF only after it read the stack."""
    if case.mode != "vm86" or case.rflags & X86_EFLAGS_IOPL == X86_EFLAGS_IOPL:
        return False
    if oracle.exception != (GP_VECTOR, 0, None):
        return False
    if subject.exception is not None:
        return subject.exception[0] in (PF_VECTOR, SS_VECTOR)
    return subject.leaf == "9c" and _pushed_flags(case, subject)


def _pushed_flags(case: Case, subject: Outcome) -> bool:
    """The subject pushed RFLAGS without VM and RF, and did nothing else."""
    size, width = operand_size(case, "9c"), _stack_width(case)
    rsp = case.gpr[VCPU_REGS_RSP]
    top = rsp - size & _mask(width)
    registers = list(case.gpr)
    registers[VCPU_REGS_RSP] = rsp & ~_mask(width) | top
    image = (case.rflags & ~(X86_EFLAGS_VM | X86_EFLAGS_RF)).to_bytes(8, "little")[:size]
    base = case.system.seg[VCPU_SREG_SS].base
    written = {place_of(case, base + top + i): byte for i, byte in enumerate(image)}
    changed = changed_bytes(case, subject)
    return (
        list(subject.gpr) == registers
        and _completed(case, subject, 1)
        and all(written.get(at) == byte for at, byte in changed.items())
    )


def _completed(case: Case, subject: Outcome, length: int) -> bool:
    """The subject went to the next instruction, `length` bytes behind the prefixes, and left the flags."""
    end = case.rip + prefix_facts(case).length + length
    return subject.exception is None and subject.rip == end and subject.rflags == case.rflags & ~X86_EFLAGS_RF


def register_prefetch(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """PREFETCH with a register operand is a NOP to KVM."""
    return (
        modrm(case)[0] == 3
        and _completed(case, subject, 3)
        and oracle.exception == (UD_VECTOR, None, None)
        and not subject.pages
        and tuple(subject.gpr) == case.gpr
    )


def _stack_width(case: Case) -> int:
    """Bytes of the stack pointer."""
    if case.mode == "prot64":
        return 8
    return 4 if case.system.seg[VCPU_SREG_SS].db else 2


def enter(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """ENTER n, 0: KVM pushes as many bytes of RBP as the stack pointer has, and probes no frame."""
    at = prefix_facts(case).length + 1
    frame = int.from_bytes(case.code[at : at + 2], "little")
    width = _stack_width(case)
    mask = _mask(width)
    rsp = case.gpr[VCPU_REGS_RSP]
    pushed = rsp - width & mask
    if subject.exception is not None:
        # The push itself: another width than the processor's may reach another page.
        return width != _enter_size(case) and subject.exception[0] in (PF_VECTOR, SS_VECTOR)
    registers = list(case.gpr)
    registers[VCPU_REGS_RBP] = case.gpr[VCPU_REGS_RBP] & ~mask | pushed
    registers[VCPU_REGS_RSP] = rsp & ~mask | pushed - frame & mask
    if registers != list(subject.gpr) or not _completed(case, subject, 4):
        return False
    if not _fields(differences) <= _ENTER_FIELDS or not _pushed_only(case, subject, pushed, width):
        return False
    return width != _enter_size(case) or oracle.exception is not None


#: Where ENTER may leave something else than a processor does.
_ENTER_FIELDS: Final = frozenset(("exception", "rbp", "rsp", "mem", DEVICE_TRACE))


def _pushed_only(case: Case, subject: Outcome, pushed: int, width: int) -> bool:
    """In flat memory nothing has changed but what was pushed."""
    base = 0 if case.mode == "prot64" else case.system.seg[VCPU_SREG_SS].base
    wrap = _mask(8 if case.mode == "prot64" else 4)
    slot = {base + (pushed + n & _mask(width)) & wrap for n in range(width)}
    return is_physical(case) or changed_bytes(case, subject).keys() <= slot


def _enter_size(case: Case) -> int:
    """Bytes that the processor pushes."""
    size = operand_size(case, "c8")
    return 8 if case.mode == "prot64" and size == 4 else size


def zero_count(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """REP with ECX = 0 and a 32-bit address size: RCX is cleared, and MOVS and STOS cut RSI and RDI.

    Intel processors do this (KVM copies them for guests with such a vendor string); Unicorn does not.
    """
    rcx = case.gpr[VCPU_REGS_RCX]
    if case.vendor != "intel" or not prefix_facts(case).rep or rcx & 0xFFFFFFFF or subject.exception:
        return False
    registers = list(case.gpr)
    registers[VCPU_REGS_RCX] = 0
    cut = {"a4": (VCPU_REGS_RSI, VCPU_REGS_RDI), "aa": (VCPU_REGS_RDI,)}
    cut |= {"a5": cut["a4"], "ab": cut["aa"]}
    for number in cut.get(subject.leaf, ()):
        registers[number] &= 0xFFFFFFFF
    allowed = {GPR_NAMES[n] for n in (VCPU_REGS_RCX, VCPU_REGS_RSI, VCPU_REGS_RDI)}
    return (
        prefix_facts(case).small_ad
        and list(subject.gpr) == registers
        and _fields(differences) <= allowed
        and tuple(oracle.gpr) == case.gpr
    )


def wide_segment_store(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """MOV m, Sreg, SLDT and STR with REX.W store 8 bytes, of which 6 are zero.

    SLDT and STR read as many bytes as the operand size says beforehand.
    """
    wide = prefix_facts(case).rex & 8 or subject.leaf != "8c"
    if not wide or modrm(case)[0] == 3:
        return False
    if subject.exception in ((GP_VECTOR, 0, None), (SS_VECTOR, 0, None)):
        return oracle.exception is None and _ends_behind_selector(case, subject)
    if subject.exception is not None:  # on a page that only the bytes more reach
        fault = subject.exception
        return fault[0] == PF_VECTOR and not (fault[2] or 0) & PAGE_MASK and oracle.exception is None
    if oracle.exception is not None or _fields(differences) != {"mem"}:
        return False
    ours, theirs = changed_bytes(case, subject), changed_bytes(case, oracle)
    extra = {at: byte for at, byte in ours.items() if theirs.get(at) != byte}
    few = 0 < len(extra) <= 6
    return few and not any(extra.values()) and all(ours.get(at) == b for at, b in theirs.items())


def _ends_behind_selector(case: Case, subject: Outcome) -> bool:
    """The segment, or the canonical addresses, end within the operand, but not within its two bytes."""
    instruction, size = CaseInstruction(case), operand_size(case, subject.leaf)
    return any(
        instruction.refused(replace(access, size=size)) and not instruction.refused(replace(access, size=2))
        for access in instruction.accesses
    )


def split_write(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """A write across a page end whose second page faults: KVM has written the first part."""
    fault = subject.exception
    if fault is None or fault[0] != PF_VECTOR or fault[2] is None or fault[2] & PAGE_MASK:
        return False
    if _fields(differences) != {"mem"}:
        return False
    ours, theirs = changed_bytes(case, subject), changed_bytes(case, oracle)
    extra = ours.keys() - theirs.keys()
    end = (place_of(case, fault[2] - 1) or 0) + 1
    return (
        bool(extra)
        and all(ours.get(at) == byte for at, byte in theirs.items())
        and min(extra) >= end - 16
        and max(extra) < end
    )


def straddle(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """An access across the end of the lower canonical half: only its first byte is checked.

    What is beyond it is a #PF, but for page tables, in which the upper half's first pages lie there.
    """
    ours = subject.exception
    end = 1 << linear_bits(case.system.cr4) - 1
    refused = oracle.exception in {(GP_VECTOR, 0, None), (SS_VECTOR, 0, None)}
    return case.mode == "prot64" and refused and ours is not None and ours[0] == PF_VECTOR and ours[2] == end


def segment_number(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """REX.R counts as part of a segment register's number, so that 8 to 15 are #UD."""
    return (
        modrm(case)[1] >= 8
        and subject.exception == (UD_VECTOR, None, None)
        and oracle.exception != subject.exception
    )


def late_check(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """MOV to CS or a segment register that does not exist: the source is read before the #UD."""
    return (
        modrm(case)[1] & 7 in {1, 6, 7}
        and modrm(case)[0] != 3
        and oracle.exception == (UD_VECTOR, None, None)
        and subject.exception is not None
        and subject.exception[0] in {GP_VECTOR, SS_VECTOR, PF_VECTOR}
    )


def no_prefix_allowed(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """A prefix of which the SDM says NP is #UD; KVM goes on to its other checks."""
    prefixes = prefix_facts(case)
    other = subject.exception is None or subject.exception == (GP_VECTOR, 0, None)
    return other and bool(prefixes.small_op or prefixes.rep) and oracle.exception == (UD_VECTOR, None, None)


def shadow_on_fault(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """MOV SS and POP SS set their interrupt shadow before the load, which then faults."""
    return (
        _fields(differences) == {"interruptibility"}
        and (subject.leaf == "17" or modrm(case)[1] & 7 == VCPU_SREG_SS)
        and subject.exception is not None
        and (subject.interruptibility, oracle.interruptibility) == (1, 0)
    )


def register_store(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """MOVNTDQ with a register operand is a move between registers to KVM."""
    return (
        modrm(case)[0] == 3
        and _completed(case, subject, 3)
        and oracle.exception == (UD_VECTOR, None, None)
        and tuple(subject.gpr) == case.gpr
        and not subject.pages
    )


def task_in_ldt(_case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """LTR of a selector with TI set: KVM gives #GP(0)."""
    ours, theirs = subject.exception, oracle.exception
    return (
        _fields(differences) == {"exception.error_code"}
        and ours == (GP_VECTOR, 0, None)
        and theirs is not None
        and bool((theirs[1] or 0) & 4)
    )


def real_return(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """IRETD in real mode to an offset above 64 KiB, which an enlarged limit would allow."""
    return (
        case.mode == "real"
        and subject.exception == (GP_VECTOR, 0, None)
        and oracle.exception is None
        and oracle.rip > 0xFFFF
    )


def system_descriptor(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """LLDT, LTR in long mode: KVM reads a descriptor of which only the first 8 bytes are in the table."""
    ours, theirs = subject.exception, oracle.exception
    if ours is None or theirs is None or theirs[0] != GP_VECTOR or not case.system.efer & EFER_LMA:
        return False
    offset = theirs[1] or 0
    table = case.system.gdtr
    cut = offset + 7 <= table.limit < offset + 15
    return cut and ours[0] == PF_VECTOR and table.base <= (ours[2] or 0) <= table.base + table.limit


def table_read(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """LGDT, LIDT with a 16-bit operand: KVM reads 3 bytes of the base, the processor 4."""
    fault = oracle.exception
    return (
        operand_size(case, subject.leaf) == 2
        and subject.exception is None
        and subject.rip == case.rip + (subject.length or 0)
        and subject.rflags == case.rflags & ~X86_EFLAGS_RF
        and tuple(subject.gpr) == case.gpr
        and not subject.pages
        and fault is not None
        and fault[0] == PF_VECTOR
        and not (fault[2] or 0) & PAGE_MASK
    )


def null_stack(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """A null SS in 64-bit mode: KVM fills the hidden part with a flat data segment."""
    if case.mode != "prot64" or _fields(differences) != {"seg.ss"}:
        return False
    ours, theirs = subject.system.seg[VCPU_SREG_SS], oracle.system.seg[VCPU_SREG_SS]
    return ours.sel == theirs.sel and ours.sel < 4 and ours.base == 0 and ours.dpl == ours.sel & 3

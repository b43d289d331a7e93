"""Where KVM's emulator knowingly departs from the hardware: named rules that recognise each.

The port keeps these on purpose. A rule names its leaves and checks the whole set of differences
against what exactly KVM does, so that another fault in the same instruction is still a finding.
A case that a rule explains is counted under the rule's id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from emufuzz.arch.cr import EFER_LMA, X86_CR4_LA57
from emufuzz.arch.exceptions import GP_VECTOR, PF_VECTOR, SS_VECTOR, UD_VECTOR
from emufuzz.arch.leaves import leaf_rows
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
from emufuzz.case.model import PAGE_MASK, Case, Outcome, memory_changes
from emufuzz.oracle.operands import modrm, operand_size, prefix_facts

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

#: Whether a rule explains all differences of (case, subject, oracle).
Explains = Callable[[Case, Outcome, Outcome, "Sequence[Difference]"], bool]


@dataclass(frozen=True, slots=True)
class Quirk:
    """One departure: what KVM does, what the hardware does, and where that is written."""

    id: str
    leaves: frozenset[str]
    kvm: str
    reference: str
    explains: Explains


def _fields(differences: Sequence[Difference]) -> set[str]:
    return {difference.field for difference in differences}


def _mask(size: int) -> int:
    return (1 << size * 8) - 1


def _repeated_scan(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """F3 BSF/BSR: the processor counts zeros, KVM scans."""
    if prefix_facts(case).rep != 0xF3 or subject.exception or oracle.exception:
        return False
    size = operand_size(case, subject.leaf)
    number = modrm(case)[1]
    name = GPR_NAMES[number]
    if not _fields(differences) <= {name, "rflags"}:
        return False
    counted = oracle.gpr[number] & _mask(size)
    if counted == size * 8:  # a zero source: KVM leaves the destination alone
        return subject.gpr[number] == case.gpr[number] and bool(subject.rflags & X86_EFLAGS_ZF)
    index = counted if subject.leaf == "0fbc" else size * 8 - 1 - counted
    high = 0 if size >= 4 else case.gpr[number] & ~_mask(size)
    return subject.gpr[number] == high | index and not subject.rflags & X86_EFLAGS_ZF


def _ascii_adjust(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
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


def _vm86_interrupt_flag(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """CLI, STI in virtual-8086 mode with IOPL 3: KVM refuses."""
    return (
        case.mode == "vm86"
        and case.rflags & X86_EFLAGS_IOPL == X86_EFLAGS_IOPL
        and subject.exception == (GP_VECTOR, 0, None)
        and oracle.exception is None
    )


def _vm86_flags(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
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
    written = {base + top + i: byte for i, byte in enumerate(image)}
    changed = _changed_bytes(case, subject)
    return (
        list(subject.gpr) == registers
        and _completed(case, subject, 1)
        and all(written.get(at) == byte for at, byte in changed.items())
    )


def _completed(case: Case, subject: Outcome, length: int) -> bool:
    """The subject went to the next instruction, `length` bytes behind the prefixes, and left the flags."""
    end = case.rip + prefix_facts(case).length + length
    return subject.exception is None and subject.rip == end and subject.rflags == case.rflags & ~X86_EFLAGS_RF


def _register_prefetch(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
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


def _enter(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
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
    return width != _enter_size(case) or oracle.exception is not None


def _enter_size(case: Case) -> int:
    """Bytes that the processor pushes."""
    size = operand_size(case, "c8")
    return 8 if case.mode == "prot64" and size == 4 else size


def _zero_count(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
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


def _wide_segment_store(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """MOV m, Sreg, SLDT and STR with REX.W store 8 bytes, of which 6 are zero.

    SLDT and STR read as many bytes as the operand size says beforehand.
    """
    wide = prefix_facts(case).rex & 8 or subject.leaf != "8c"
    if not wide or modrm(case)[0] == 3:
        return False
    if subject.exception is not None:  # on a page that only the bytes more reach
        fault = subject.exception
        return fault[0] == PF_VECTOR and not (fault[2] or 0) & PAGE_MASK and oracle.exception is None
    if oracle.exception is not None or _fields(differences) != {"mem"}:
        return False
    ours, theirs = _changed_bytes(case, subject), _changed_bytes(case, oracle)
    extra = {at: byte for at, byte in ours.items() if theirs.get(at) != byte}
    return not any(extra.values()) and len(extra) <= 6 and all(ours.get(at) == b for at, b in theirs.items())


def _split_write(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """A write across a page end whose second page faults: KVM has written the first part."""
    fault = subject.exception
    if fault is None or fault[0] != PF_VECTOR or fault[2] is None or fault[2] & PAGE_MASK:
        return False
    if _fields(differences) != {"mem"}:
        return False
    ours, theirs = _changed_bytes(case, subject), _changed_bytes(case, oracle)
    extra = ours.keys() - theirs.keys()
    return (
        all(ours.get(at) == byte for at, byte in theirs.items())
        and min(extra) >= fault[2] - 16
        and max(extra) < fault[2]
    )


def _changed_bytes(case: Case, outcome: Outcome) -> dict[int, int]:
    """Linear address -> new value of every changed byte."""
    return {at + i: byte for at, data in memory_changes(case, outcome) for i, byte in enumerate(data)}


def _straddle(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """An access across the end of the lower canonical half: only its first byte is checked."""
    ours, theirs = subject.exception, oracle.exception
    end = 1 << (56 if case.system.cr4 & X86_CR4_LA57 else 47)
    return (
        case.mode == "prot64"
        and ours is not None
        and ours[0] == PF_VECTOR
        and ours[2] == end
        and theirs in {(GP_VECTOR, 0, None), (SS_VECTOR, 0, None)}
    )


def _segment_number(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """REX.R counts as part of a segment register's number, so that 8 to 15 are #UD."""
    return (
        modrm(case)[1] >= 8
        and subject.exception == (UD_VECTOR, None, None)
        and oracle.exception != subject.exception
    )


def _late_check(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """MOV to CS or a segment register that does not exist: the source is read before the #UD."""
    return (
        modrm(case)[1] & 7 in {1, 6, 7}
        and modrm(case)[0] != 3
        and oracle.exception == (UD_VECTOR, None, None)
        and subject.exception is not None
        and subject.exception[0] in {GP_VECTOR, SS_VECTOR, PF_VECTOR}
    )


def _register_store(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """MOVNTDQ with a register operand is a move between registers to KVM."""
    return (
        modrm(case)[0] == 3
        and _completed(case, subject, 3)
        and oracle.exception == (UD_VECTOR, None, None)
        and tuple(subject.gpr) == case.gpr
        and not subject.pages
    )


def _task_in_ldt(_case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """LTR of a selector with TI set: KVM gives #GP(0)."""
    ours, theirs = subject.exception, oracle.exception
    return (
        _fields(differences) == {"exception.error_code"}
        and ours == (GP_VECTOR, 0, None)
        and theirs is not None
        and bool((theirs[1] or 0) & 4)
    )


def _real_return(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """IRETD in real mode to an offset above 64 KiB, which an enlarged limit would allow."""
    return (
        case.mode == "real"
        and subject.exception == (GP_VECTOR, 0, None)
        and oracle.exception is None
        and oracle.rip > 0xFFFF
    )


def _system_descriptor(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """LLDT, LTR in long mode: KVM reads a descriptor of which only the first 8 bytes are in the table."""
    ours, theirs = subject.exception, oracle.exception
    if ours is None or theirs is None or theirs[0] != GP_VECTOR or not case.system.efer & EFER_LMA:
        return False
    offset = theirs[1] or 0
    table = case.system.gdtr
    cut = offset + 7 <= table.limit < offset + 15
    return cut and ours[0] == PF_VECTOR and table.base <= (ours[2] or 0) <= table.base + table.limit


def _table_read(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
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


def _null_stack(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """A null SS in 64-bit mode: KVM fills the hidden part with a flat data segment."""
    if case.mode != "prot64" or _fields(differences) != {"seg.ss"}:
        return False
    ours, theirs = subject.system.seg[VCPU_SREG_SS], oracle.system.seg[VCPU_SREG_SS]
    return ours.sel == theirs.sel and ours.sel < 4 and ours.base == 0 and ours.dpl == ours.sel & 3


_ANY: Final = frozenset(row.leaf for row in leaf_rows() if row.implemented)
_STRINGS: Final = frozenset(row.leaf for row in leaf_rows() if "String" in row.flags)

# fmt: off
QUIRKS: Final[tuple[Quirk, ...]] = (
    Quirk("kvm-quirk-06-tzcnt-lzcnt", frozenset(("0fbc", "0fbd")),
          "TZCNT and LZCNT run as BSF and BSR",
          "SDM Vol. 2B LZCNT, TZCNT", _repeated_scan),
    Quirk("kvm-quirk-08-aam-aad-flags", frozenset(("d4", "d5")),
          "SF and ZF describe the whole operand, not AL",
          "SDM Vol. 2A AAM, AAD", _ascii_adjust),
    Quirk("kvm-quirk-14-wide-segment-store", frozenset(("8c", "0f00/0", "0f00/1")),
          "with REX.W a segment selector is stored as 8 bytes",
          "SDM Vol. 2B MOV, SLDT, STR", _wide_segment_store),
    Quirk("kvm-quirk-19-vm86-cli-sti", frozenset(("fa", "fb")),
          "CLI and STI in virtual-8086 mode are #GP(0) whatever the IOPL",
          "SDM Vol. 3B 20.2.7", _vm86_interrupt_flag),
    Quirk("kvm-quirk-20-vm86-pushf-popf", frozenset(("9c", "9d")),
          "PUSHF does not look at IOPL, POPF only after reading the stack",
          "SDM Vol. 3B 20.2.7", _vm86_flags),
    Quirk("kvm-quirk-21-enter", frozenset(("c8",)),
          "ENTER pushes RBP in the stack's address size and does not probe the new frame",
          "SDM Vol. 2A ENTER", _enter),
    Quirk("kvm-quirk-41-prefetch-register", frozenset(("0f0d", "0f18")),
          "a register operand is accepted",
          "SDM Vol. 2B PREFETCHW", _register_prefetch),
    Quirk("kvm-quirk-23-iret-real", frozenset(("cf",)),
          "an offset above FFFFH is #GP(0) whatever the limit of CS",
          "SDM Vol. 2A IRET", _real_return),
    Quirk("kvm-quirk-37-system-descriptor", frozenset(("0f00/2", "0f00/3")),
          "of a 16-byte system descriptor only the first 8 bytes are checked against the table's limit",
          "SDM Vol. 2A LTR", _system_descriptor),
    Quirk("kvm-quirk-43-table-read", frozenset(("0f01/2.mem", "0f01/3.mem")),
          "LGDT and LIDT with a 16-bit operand read 5 bytes instead of 6",
          "SDM Vol. 2A LGDT", _table_read),
    Quirk("kvm-quirk-41-movntdq-register", frozenset(("0fe7.pfx_66",)),
          "a register operand is accepted",
          "SDM Vol. 2B MOVNTDQ", _register_store),
    Quirk("kvm-quirk-16-segment-source-first", frozenset(("8e",)),
          "the source of MOV Sreg is read before a bad register is #UD",
          "SDM Vol. 2B MOV", _late_check),
    Quirk("kvm-rex-r-segment-register", frozenset(("8c", "8e")),
          "REX.R makes the number of a segment register 8 to 15, which is #UD",
          "SDM Vol. 2A 2.2.1.2", _segment_number),
    Quirk("kvm-ltr-ti-error-code", frozenset(("0f00/3",)),
          "LTR of a selector in the LDT is #GP(0) instead of #GP(selector)",
          "SDM Vol. 2A LTR", _task_in_ldt),
    Quirk("kvm-null-ss-hidden-part", frozenset(("8e", "17", "0fb2")),
          "a null SS gets the hidden part of a flat data segment",
          "SDM Vol. 3A 5.4.1", _null_stack),
    Quirk("kvm-quirk-01-canonical-straddle", _ANY,
          "only the first byte of an access is checked for a canonical address",
          "SDM Vol. 1 3.3.7.1", _straddle),
    Quirk("kvm-page-split-write", _ANY,
          "a write that faults on its second page has changed the first",
          "SDM Vol. 3A 6.6", _split_write),
    Quirk("kvm-rep-zero-count", _STRINGS,
          "REP with ECX = 0 and 32-bit addresses truncates RCX, RSI and RDI, as Intel processors do",
          "SDM Vol. 2B REP", _zero_count),
)
# fmt: on


def explaining_quirk(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> str | None:
    """The id of the first quirk that explains all differences, or None."""
    for quirk in QUIRKS:
        if subject.leaf in quirk.leaves and quirk.explains(case, subject, oracle, differences):
            return quirk.id
    return None

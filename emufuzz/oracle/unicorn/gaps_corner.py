"""The rest of the ledger of Unicorn 2.1.4: corner cases of prefixes, widths and partial effects.

Every entry has a proof test in tests/unit/oracle/test_unicorn_corner_gaps.py that fails once
Unicorn no longer behaves so.
"""

from __future__ import annotations

from typing import Final

from iced_x86 import Mnemonic

from emufuzz.arch.cr import EFER_LMA, X86_CR0_EM, X86_CR0_TS
from emufuzz.arch.exceptions import PF_VECTOR, UD_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RSP, VCPU_SREG_CS, VCPU_SREG_SS
from emufuzz.arch.rflags import X86_EFLAGS_IF, X86_EFLAGS_RF, X86_EFLAGS_VM
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, Case, Outcome, case_pages, code_address
from emufuzz.oracle.gaps import Condition, Gap
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.operands import place_of
from emufuzz.oracle.unicorn.engine import UNICORN_VERSION

_REX_R: Final = 4
_MASK16: Final = 0xFFFF
_MASK32: Final = 0xFFFFFFFF
_MASK64: Final = (1 << 64) - 1
_FAR: Final = frozenset((Mnemonic.RETF, Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ))
_LONG_AND_WIDE: Final = 0x60  # L and D in byte 6 of a descriptor
_POP_SEGMENT: Final = frozenset((b"\x07", b"\x17", b"\x1f", b"\x0f\xa1", b"\x0f\xa9"))
_SELECTOR: Final = 2  # bytes
_PUSH_SEGMENT: Final = frozenset((b"\x06", b"\x0e", b"\x16", b"\x1e", b"\x0f\xa0", b"\x0f\xa8"))
#: ModRM of the register forms of 0F 01 /0 to /3, without XGETBV and XSETBV.
_CONTROL_GROUP: Final = frozenset((*range(0xC0, 0xD0), *range(0xD2, 0xE0)))
_VECTOR_LOADS: Final = frozenset((b"\x0f\x10", b"\x0f\x28", b"\x0f\x6f"))


def _rex(instruction: CaseInstruction) -> int:
    """The REX prefix in force, 0 if there is none."""
    last = instruction.prefixes[-1:]
    return last[0] if instruction.long and last and last[0] & 0xF0 == 0x40 else 0


def _base_in_long_mode(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """The access goes through ES, CS, SS or DS, named by a prefix, RETF or IRET, and that has a base."""
    segments = {0x26: 0, 0x2E: 1, 0x36: 2, 0x3E: 3}
    named = [segments[byte] for byte in instruction.prefixes if byte in segments]
    seg = instruction.case.system.seg
    if instruction.mnemonic in _FAR:
        named.append(VCPU_SREG_SS)
    return instruction.long and any(seg[number].base for number in named)


def _rex_high_byte(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return bool(_rex(instruction)) and instruction.opcode[:1] in {b"\x9e", b"\x9f"}


def _rex_group11(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return bool(_rex(instruction) & _REX_R) and instruction.opcode[:1] in {b"\xc6", b"\xc7"}


def _push_segment(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    opcode = instruction.opcode
    wide = not instruction.long and instruction.operand_bits == 32
    return wide and (opcode[:1] in _PUSH_SEGMENT or opcode[:2] in _PUSH_SEGMENT)


def _faulted(outcome: Outcome) -> bool:
    return outcome.exception is not None and outcome.exception[0] == PF_VECTOR


def _partial_popa(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return _faulted(outcome) and instruction.opcode[:1] == b"\x61"


def _partial_vector_load(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return _faulted(outcome) and instruction.opcode[:2] in _VECTOR_LOADS


def _partial_mmx(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return outcome.exception is not None and instruction.opcode[:2] in {b"\x0f\x6f", b"\x0f\x7f"}


def _control_group(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    opcode = instruction.opcode
    return opcode[:2] == b"\x0f\x01" and len(opcode) > 2 and opcode[2] in _CONTROL_GROUP


def _null_task(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return instruction.mnemonic == Mnemonic.LTR and outcome.exception is None


def _far_pointer_rex(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    wide = bool(_rex(instruction) & 8)
    return wide and instruction.mnemonic in {Mnemonic.LSS, Mnemonic.LFS, Mnemonic.LGS}


def _call_order(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A CALL that faults on its push; its target was not looked at."""
    call = instruction.mnemonic == Mnemonic.CALL and instruction.opcode[:1] in {b"\xe8", b"\xff", b"\x9a"}
    return call and _faulted(outcome)


def _movnti_prefix(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return instruction.opcode[:2] == b"\x0f\xc3" and bool({0x66, 0xF2, 0xF3} & set(instruction.prefixes))


def far_stack_fault(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A #PF of a far call or return, which use the stack."""
    opcode = instruction.opcode
    call = opcode[:1] == b"\x9a" or (opcode[:1] == b"\xff" and opcode[1] >> 3 & 7 == 3)
    return _faulted(outcome) and (call or instruction.mnemonic == Mnemonic.RETF)


def is_far_transfer(instruction: CaseInstruction) -> bool:
    """A far CALL, JMP or RET, or IRET."""
    opcode = instruction.opcode
    indirect = opcode[:1] == b"\xff" and opcode[1] >> 3 & 7 in {3, 5}
    return indirect or opcode[:1] in {b"\x9a", b"\xea"} or instruction.mnemonic in _FAR


def _long_and_wide(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A far transfer in IA-32e mode by a code descriptor of which both L and D are set."""
    case = instruction.case
    if not case.system.efer & EFER_LMA or not is_far_transfer(instruction):
        return False
    if outcome.exception is None:
        loaded = outcome.system.seg[VCPU_SREG_CS]
        return bool(loaded.l and loaded.db)
    return _descriptor_byte6(case, outcome.exception[1] or 0) & _LONG_AND_WIDE == _LONG_AND_WIDE


def _descriptor_byte6(case: Case, selector: int) -> int:
    """Byte 6 of a descriptor in the GDT, which has L and D; 0 if it cannot be read."""
    place = place_of(case, case.system.gdtr.base + (selector & ~7) + 6)
    page = None if place is None else case_pages(case).get(place >> PAGE_SHIFT)
    return 0 if place is None or page is None else page[place & PAGE_MASK]


def _pop_segment_fault(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """POP Sreg with a #PF behind the selector."""
    opcode = instruction.opcode
    if not _faulted(outcome) or not (opcode[:1] in _POP_SEGMENT or opcode[:2] in _POP_SEGMENT):
        return False
    address = outcome.exception[2] or 0  # type: ignore[index] # _faulted
    return any(access.linear + _SELECTOR <= address for access in instruction.accesses)


def _compare_order(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return outcome.exception is not None and instruction.opcode[:1] in {b"\xa6", b"\xa7"}


#: The highest SP from which IRETD pops 12 bytes without a carry out of 16 bits.
_LAST_IRET_SP: Final = 0x10000 - 12


def _real_return(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    case = instruction.case
    wide = case.system.seg[VCPU_SREG_SS].db and case.gpr[VCPU_REGS_RSP] > _LAST_IRET_SP
    return case.mode == "real" and bool(wide) and instruction.opcode[:1] == b"\xcf"


def _null_stack_privilege(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A null selector with another RPL than the CPL was loaded into SS."""
    loads = instruction.opcode[:1] == b"\x8e" or instruction.opcode[:2] == b"\x0f\xb2"
    selector = outcome.system.seg[VCPU_SREG_SS].sel
    cpl = instruction.case.system.seg[VCPU_SREG_SS].dpl
    return loads and instruction.long and selector < 4 and selector != cpl


def _return_resume(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """IRET whose image of EFLAGS has RF set."""
    if instruction.opcode[:1] != b"\xcf" or outcome.exception is not None or instruction.operand_bits == 16:
        return False
    case, size = instruction.case, instruction.operand_bits // 8
    wide = case.system.seg[VCPU_SREG_SS].db
    mask = _MASK64 if instruction.long else _MASK32 if wide else _MASK16
    offset = case.gpr[VCPU_REGS_RSP] + 2 * size + 2 & mask  # the byte of the image that has RF
    place = place_of(
        case, instruction.base(VCPU_SREG_SS) + offset & (_MASK64 if instruction.long else _MASK32)
    )
    page = None if place is None else case_pages(case).get(place >> PAGE_SHIFT)
    return place is not None and page is not None and bool(page[place & PAGE_MASK] << 16 & X86_EFLAGS_RF)


def _return_to_vm86(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """IRET ended in virtual-8086 mode, but from another CPL than 0, or from IA-32e mode."""
    case = instruction.case
    if instruction.opcode[:1] != b"\xcf" or case.mode in {"real", "vm86"}:
        return False
    allowed = not case.system.seg[VCPU_SREG_SS].dpl and not case.system.efer & EFER_LMA
    return not allowed and outcome.exception is None and bool(outcome.rflags & X86_EFLAGS_VM)


def _wrap(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A #PF at 4 GiB outside 64-bit mode, where addresses have 32 bits."""
    return _faulted(outcome) and not instruction.long and outcome.exception[2] == 1 << 32  # type: ignore[index] # _faulted


def _push_flags_vm86(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    wide = instruction.operand_bits == 32
    return wide and instruction.case.mode == "vm86" and instruction.opcode[:1] == b"\x9c"


def _table_load(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return instruction.long and instruction.mnemonic in {Mnemonic.LGDT, Mnemonic.LIDT}


def _double_shift_rip(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    immediate = instruction.opcode[:2] in {b"\x0f\xa4", b"\x0f\xac"}
    return immediate and instruction.long and instruction.opcode[2] & 0xC7 == 0x05


def _undefined_early(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """#UD of an instruction that is too long, or that may reach a page that does not exist."""
    if outcome.exception is None or outcome.exception[0] != UD_VECTOR:
        return False
    case = instruction.case
    last = code_address(case) + _MAX_INSTRUCTION - 1 >> PAGE_SHIFT
    absent = last not in case_pages(case)
    return absent or len(instruction.prefixes) > _MAX_INSTRUCTION - _LONGEST_UNPREFIXED


def _too_long(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """15 bytes are not all of the instruction, and one of its accesses faulted."""
    prefixed = len(instruction.prefixes) > _MAX_INSTRUCTION - _LONGEST_UNPREFIXED
    return _faulted(outcome) and prefixed and not instruction.decode(lax=True).code


def _sti_shadow(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """STI that ran where IF was set already."""
    completed = outcome.exception is None and bool(instruction.case.rflags & X86_EFLAGS_IF)
    return completed and instruction.opcode[:1] == b"\xfb"


def _movbe_sse(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """MOVBE with CR0.EM or CR0.TS set."""
    set_bits = instruction.case.system.cr0 & (X86_CR0_EM | X86_CR0_TS)
    return bool(set_bits) and outcome.exception is not None and instruction.mnemonic == Mnemonic.MOVBE


def _prefetchw_register(instruction: CaseInstruction, outcome: Outcome) -> bool:
    opcode = instruction.opcode
    undefined = outcome.exception is not None and outcome.exception[0] == UD_VECTOR
    return undefined and opcode[:2] == b"\x0f\x0d" and opcode[2] >= 0xC0


#: Bytes of the longest instruction without prefixes: opcode, ModRM, SIB, displacement, immediate.
_LONGEST_UNPREFIXED: Final = 11
_MAX_INSTRUCTION: Final = 15


def _gap(
    name: str, applies: Condition, reason: str, reference: str, fields: tuple[str, ...] = ("all",)
) -> Gap:
    return Gap(f"unicorn-{name}", "unicorn", UNICORN_VERSION, fields, reason, reference, applies)


# fmt: off
CORNER_GAPS: Final[tuple[Gap, ...]] = (
    _gap("segment-base64", _base_in_long_mode,
         "in 64-bit mode an ES, CS, SS or DS prefix, RETF and IRET add a segment's base, which counts as 0",
         "SDM Vol. 1 3.4.2.1"),
    _gap("rex-lahf-sahf", _rex_high_byte,
         "with a REX prefix LAHF and SAHF use SPL instead of AH",
         "SDM Vol. 2A LAHF", ("gpr", "rflags")),
    _gap("rex-r-c6-c7", _rex_group11,
         "REX.R makes C6 /0 and C7 /0 #UD, although it does not extend an opcode field",
         "SDM Vol. 2A 2.2.1.2"),
    _gap("push-segment-width", _push_segment,
         "PUSH Sreg with a 32-bit operand writes 4 bytes; processors write the 2 of the selector",
         "SDM Vol. 2B PUSH", ("mem", "exception", "device_trace")),
    _gap("popa-partial", _partial_popa,
         "POPA that faults has loaded some registers",
         "SDM Vol. 2B POPA", ("gpr",)),
    _gap("vector-load-partial", _partial_vector_load,
         "a 16-byte load that faults on its second half has loaded the first",
         "SDM Vol. 3A 6.6", ("fpu",)),
    _gap("mmx-fault-tags", _partial_mmx,
         "an MMX move that faults has marked the x87 registers as valid",
         "SDM Vol. 1 9.5.1", ("fpu.ftw", "fpu.fsw")),
    _gap("control-group", _control_group,
         "privileged register forms of 0F 01 are #UD whatever the CPL",
         "SDM Vol. 3A 5.9"),
    _gap("ltr-null", _null_task,
         "LTR accepts a null selector",
         "SDM Vol. 2A LTR"),
    _gap("far-pointer-rex-w", _far_pointer_rex,
         "LSS, LFS and LGS with REX.W read a 32-bit offset, as AMD processors do",
         "SDM Vol. 2A LDS"),
    _gap("call-order", _call_order,
         "CALL pushes before it looks at its target",
         "SDM Vol. 2A CALL", ("exception",)),
    _gap("movnti-prefix", _movnti_prefix,
         "66, F2 and F3 in front of MOVNTI are ignored instead of #UD",
         "SDM Vol. 2B MOVNTI"),
    _gap("far-stack-supervisor", far_stack_fault,
         "far calls and returns use the stack with the rights of the supervisor",
         "SDM Vol. 3A 4.7", ("exception.error_code",)),
    _gap("far-long-wide", _long_and_wide,
         "in IA-32e mode a far transfer accepts a code descriptor with both L and D set",
         "SDM Vol. 3A 5.2.1"),
    _gap("pop-segment-fault", _pop_segment_fault,
         "POP Sreg reads as much as the operand size says; processors may read the selector only",
         "SDM Vol. 2B POP", ("exception",)),
    _gap("pushf-vm", _push_flags_vm86,
         "PUSHFD in virtual-8086 mode stores VM as 1; processors store 0",
         "SDM Vol. 2B PUSHF", ("mem", "device_trace")),
    _gap("table-base", _table_load,
         "LGDT and LIDT in 64-bit mode accept a base that is not canonical, and prefix 66 cuts it to 24 bits",
         "SDM Vol. 2A LGDT"),
    _gap("double-shift-rip", _double_shift_rip,
         "a RIP-relative operand of SHLD or SHRD imm8 is taken one byte too low",
         "SDM Vol. 2A 2.2.1.6"),
    _gap("compare-order", _compare_order,
         "CMPS reads ES:DI first, so that its fault comes before one of the other operand",
         "SDM Vol. 2A CMPS", ("exception", "device_trace", "mem")),
    _gap("iret-real-stack", _real_return,
         "IRET in real mode uses 16 bits of the stack pointer, also with a 32-bit stack segment",
         "SDM Vol. 2A IRET"),
    _gap("null-ss-rpl", _null_stack_privilege,
         "in 64-bit mode SS takes a null selector whose RPL is not the CPL",
         "SDM Vol. 2A LDS; Vol. 2B MOV"),
    _gap("iret-rf", _return_resume,
         "IRET does not load RF",
         "SDM Vol. 2A IRET", ("rflags",)),
    _gap("iret-vm86", _return_to_vm86,
         "IRET enters virtual-8086 mode whatever the CPL, and in IA-32e mode",
         "SDM Vol. 2A IRET"),
    _gap("wrap-4g", _wrap,
         "an access across 4 GiB outside 64-bit mode does not go on at 0",
         "SDM Vol. 3A 5.3"),
    _gap("too-long-access", _too_long,
         "an instruction of more than 15 bytes accesses memory before its #GP",
         "SDM Vol. 2A 2.3.11", ("exception",)),
    _gap("movbe-em", _movbe_sse,
         "MOVBE is #UD with CR0.EM and #NM with CR0.TS, as if it were an SSE instruction",
         "SDM Vol. 2B MOVBE"),
    _gap("sti-shadow", _sti_shadow,
         "STI blocks interrupts for one instruction also where IF was set",
         "SDM Vol. 2B STI", ("interruptibility",)),
    _gap("prefetchw-register", _prefetchw_register,
         "0F 0D of a register is #UD, as AMD processors have it; the SDM has a NOP",
         "SDM Vol. 2D Table A-3"),
    _gap("undefined-early", _undefined_early,
         "an undefined opcode is #UD before the rest of the instruction is fetched, or found too long",
         "SDM Vol. 3A 6.9", ("exception",)),
)
# fmt: on

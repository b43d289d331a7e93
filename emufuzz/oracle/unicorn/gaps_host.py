"""The ledger of Unicorn 2.1.4, continued: what a processor showed it to get wrong at CPL 3.

Every entry has a proof test in tests/unit/oracle/native/test_unicorn_host_gaps.py that fails once
Unicorn no longer behaves so.
"""

from __future__ import annotations

from typing import Final

from iced_x86 import Code, CpuidFeature, Mnemonic, Register

from emufuzz.arch.exceptions import GP_VECTOR, PF_VECTOR, UD_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RSP, VCPU_SREG_CS, VCPU_SREG_SS
from emufuzz.case.model import PAGE_SHIFT, Outcome, case_pages
from emufuzz.oracle.gaps import Condition, Gap
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.unicorn.engine import UNICORN_VERSION

_VECTOR_STORES: Final = frozenset((b"\x0f\x11", b"\x0f\x29", b"\x0f\x2b", b"\x0f\x7f", b"\x0f\xe7"))
_VECTOR_OPCODES: Final = frozenset(
    (0x0F, *range(0x10, 0x18), *range(0x28, 0x30), *range(0x38, 0x40), *range(0x50, 0x80), 0xC2,
     *range(0xC4, 0xC7), *range(0xD0, 0x100))
)  # fmt: skip
_LAST_LOW: Final = (1 << 47) - 1
_FLOATING: Final = frozenset(
    (0x2A, *range(0x2C, 0x30), 0x3A, 0x51, *range(0x58, 0x60), 0x7C, 0x7D, 0xC2, 0xD0, 0xE6)
)


def _features(instruction: CaseInstruction) -> set[int]:
    return set(instruction.decode(lax=True).cpuid_features())


def _enter_probe(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """ENTER whose new stack pointer points to where nothing can be written."""
    if instruction.mnemonic != Mnemonic.ENTER or outcome.exception is not None:
        return False
    case, rsp = instruction.case, outcome.gpr[VCPU_REGS_RSP]
    if not instruction.long:
        rsp &= 0xFFFFFFFF if case.system.seg[VCPU_SREG_SS].db else 0xFFFF
    linear = instruction.base(VCPU_SREG_SS) + rsp
    pages = case_pages(case)
    return any(address >> PAGE_SHIFT not in pages for address in (linear, linear + 7))


def _enter_frame(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """ENTER whose operand size is not the width of the stack."""
    if instruction.mnemonic != Mnemonic.ENTER:
        return False
    if instruction.long:
        return 0x66 in instruction.prefixes and instruction.operand_bits == 16
    return instruction.operand_bits != (32 if instruction.case.system.seg[VCPU_SREG_SS].db else 16)


def _vector_store(instruction: CaseInstruction, outcome: Outcome) -> bool:
    faulted = outcome.exception is not None and outcome.exception[0] == PF_VECTOR
    return faulted and instruction.opcode[:2] in _VECTOR_STORES


def _vector_opcode(instruction: CaseInstruction) -> bool:
    """Whether it lies among the opcodes of MMX and SSE, valid or not (SDM Vol. 2D Table A-3)."""
    first, second = instruction.opcode[:2]
    return first == 0x0F and second in _VECTOR_OPCODES


def _mmx_tags(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """An MMX instruction that faulted."""
    return outcome.exception is not None and _vector_opcode(instruction)


def _tags(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """MMX forms of SSSE3, and CVTPI2PS and CVTPI2PD from memory."""
    ssse3 = CpuidFeature.SSSE3 in _features(instruction)
    from_memory = instruction.opcode[:2] == b"\x0f\x2a" and instruction.opcode[2] < 0xC0
    return outcome.exception is None and (ssse3 or from_memory)


def _undefined(outcome: Outcome) -> bool:
    return outcome.exception is not None and outcome.exception[0] == UD_VECTOR


def _vector_undefined(instruction: CaseInstruction, outcome: Outcome) -> bool:
    invalid = _vector_opcode(instruction) and instruction.strict.code == Code.INVALID
    return invalid and not _undefined(outcome)


def _mask_move(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return instruction.mnemonic in {Mnemonic.MASKMOVQ, Mnemonic.MASKMOVDQU}


def _reads_first(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """Another fault of an opcode that is undefined: BA /0 to /3, and what AMD processors once had."""
    opcode, faulted = instruction.opcode, outcome.exception is not None and not _undefined(outcome)
    return faulted and (opcode[:2] == b"\x0f\x0f" or (opcode[:2] == b"\x0f\xba" and not opcode[2] & 0x20))


def _prefix_pair(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """66 and one of F2 and F3 in front of a vector instruction; the latter decides."""
    prefixes = set(instruction.prefixes)
    return _vector_opcode(instruction) and 0x66 in prefixes and bool({0xF2, 0xF3} & prefixes)


def _wrap_end(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A #PF within the last bytes below 4 GiB, outside 64-bit mode."""
    if outcome.exception is None or outcome.exception[0] != PF_VECTOR or instruction.long:
        return False
    return (outcome.exception[2] or 0) >= (1 << 32) - 16


def _floating_flags(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """Conversions, comparisons and arithmetic of floating-point numbers."""
    first, second = instruction.opcode[:2]
    return outcome.exception is None and first == 0x0F and second in _FLOATING


def _prefetch_register(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return _undefined(outcome) and instruction.opcode[:2] == b"\x0f\x18" and instruction.opcode[2] >= 0xC0


def _noncanonical_split(_instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A #PF on the last bytes before the addresses that are not canonical."""
    fault = outcome.exception
    return fault is not None and fault[0] == PF_VECTOR and _LAST_LOW - 16 < (fault[2] or 0) <= _LAST_LOW


def _popa_order(instruction: CaseInstruction, outcome: Outcome) -> bool:
    faulted = outcome.exception is not None and outcome.exception[0] == PF_VECTOR
    return faulted and instruction.opcode[:1] == b"\x61"


def _approximation(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return outcome.exception is None and instruction.opcode[:2] in {b"\x0f\x52", b"\x0f\x53"}


def _compare_predicate(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return _undefined(outcome) and instruction.opcode[:2] == b"\x0f\xc2"


def _sized_by_prefix(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    short = not instruction.long and not instruction.case.system.seg[VCPU_SREG_CS].db
    return short and instruction.mnemonic in {Mnemonic.CRC32, Mnemonic.POPCNT}


def _ignored_override(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A #GP of an operand whose base is RSP or RBP, behind an override of ES, CS, SS or DS."""
    overridden = instruction.long and bool({0x26, 0x2E, 0x36, 0x3E} & set(instruction.prefixes))
    general = outcome.exception is not None and outcome.exception[0] == GP_VECTOR
    base = instruction.decode(lax=True).memory_base
    return overridden and general and base in {Register.RSP, Register.RBP, Register.ESP, Register.EBP}


def _fourth(instruction: CaseInstruction) -> int:
    """ModRM of an opcode of three bytes."""
    return instruction.case.code.ljust(20, b"\0")[len(instruction.prefixes) + 3]


def _movbe_register(instruction: CaseInstruction, outcome: Outcome) -> bool:
    opcode = instruction.opcode
    return (
        not _undefined(outcome)
        and opcode[:3] in {b"\x0f\x38\xf0", b"\x0f\x38\xf1"}
        and _fourth(instruction) >= 0xC0
    )


def _gap(
    name: str, applies: Condition, reason: str, reference: str, fields: tuple[str, ...] = ("all",)
) -> Gap:
    return Gap(f"unicorn-{name}", "unicorn", UNICORN_VERSION, fields, reason, reference, applies)


# fmt: off
HOST_GAPS: Final[tuple[Gap, ...]] = (
    _gap("enter-probe", _enter_probe,
         "ENTER does not look whether its new stack pointer could be written to",
         "SDM Vol. 2A ENTER"),
    _gap("enter-frame", _enter_frame,
         "ENTER writes as much of EBP as the stack is wide, not as the operand size says",
         "SDM Vol. 2A ENTER", ("rbp",)),
    _gap("vector-store-partial", _vector_store,
         "a 16-byte store that faults on its second page has written to the first",
         "SDM Vol. 3A 6.5", ("mem",)),
    _gap("mmx-fault-any", _mmx_tags,
         "an MMX instruction that faults has marked the x87 registers as valid",
         "SDM Vol. 1 9.5.1", ("fpu.ftw", "fpu.fsw")),
    _gap("mmx-tags", _tags,
         "MMX forms of SSSE3 do not mark the x87 registers as valid; CVTPI2PS and CVTPI2PD of memory do",
         "SDM Vol. 1 9.5.1; Vol. 2A CVTPI2PS", ("fpu.ftw", "fpu.fsw")),
    _gap("vector-undefined", _vector_undefined,
         "prefixes and operands that make a vector instruction undefined are ignored",
         "SDM Vol. 2A 2.1.2"),
    _gap("vector-prefix-pair", _prefix_pair,
         "66 hides an F2 or F3 in front of a vector instruction, which is what should select it",
         "SDM Vol. 2A 2.1.2"),
    _gap("mask-move", _mask_move,
         "MASKMOVQ and MASKMOVDQU touch only bytes that they write; processors may touch the others",
         "SDM Vol. 2B MASKMOVQ"),
    _gap("undefined-reads", _reads_first,
         "0F BA /0 to /3 and 0F 0F read their operand before they are #UD",
         "SDM Vol. 2D Table A-6", ("exception",)),
    _gap("noncanonical-split", _noncanonical_split,
         "an access that runs into addresses that are not canonical is a #PF if its first page is absent",
         "SDM Vol. 1 3.3.7.1", ("exception",)),
    _gap("popa-order", _popa_order,
         "POPA does not read the slot of ESP, which processors may do",
         "SDM Vol. 2B POPA", ("exception.address",)),
    _gap("approximation", _approximation,
         "RCPPS, RSQRTPS and their scalar forms are exact; processors approximate, each in its own way",
         "SDM Vol. 2B RSQRTPS", ("fpu",)),
    _gap("compare-predicate", _compare_predicate,
         "CMPPS and its like are #UD if reserved bits of the predicate are set",
         "SDM Vol. 2A CMPPS"),
    _gap("operand-size-16", _sized_by_prefix,
         "CRC32 and POPCNT in a 16-bit code segment take the operand size of a 32-bit one",
         "SDM Vol. 2A CRC32"),
    _gap("noncanonical-override", _ignored_override,
         "in 64-bit mode an ignored override makes the #SS of a stack-based address a #GP",
         "SDM Vol. 1 3.4.2.1; Vol. 3A 6.15, #SS", ("exception",)),
    _gap("wrap-end", _wrap_end,
         "a stack access that does not fit below 4 GiB is a #PF instead of #SS",
         "SDM Vol. 3A 5.3", ("exception",)),
    _gap("vector-flags", _floating_flags,
         "exception flags of SSE arithmetic appear in MXCSR only when it is read",
         "SDM Vol. 1 10.2.3", ("fpu.mxcsr",)),
    _gap("prefetch-register", _prefetch_register,
         "0F 18 of a register is #UD; it is a NOP",
         "SDM Vol. 2B NOP"),
    _gap("movbe-register", _movbe_register,
         "0F 38 F0 and F1 of a register access memory before they are #UD",
         "SDM Vol. 2B MOVBE"),
)
# fmt: on

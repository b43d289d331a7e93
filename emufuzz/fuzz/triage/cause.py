"""What two findings of one cause have in common, wherever they were found.

The encoding of an instruction depends on the mode: the prefixes for operand and address size mean the
opposite in 16-bit code, and addresses are encoded otherwise. So instructions are compared by what they
say: mnemonic, operands, prefixes that mean the same everywhere. Sizes count where a prefix chose them:
a shrunk finding keeps such a prefix only if it does not occur without.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from iced_x86 import OpKind, Register, Register_, RegisterExt

from emufuzz.arch.exceptions import PF_VECTOR
from emufuzz.arch.regs import VCPU_SREG_CS
from emufuzz.arch.rflags import flag_names
from emufuzz.fuzz.finding import Finding
from emufuzz.oracle.compare import Difference
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.native_view import judge_case

#: LOCK, REPNE, REP, and the segment overrides.
_SAME_EVERYWHERE: Final = frozenset((0xF0, 0xF2, 0xF3, 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65))
_OPERAND_SIZE: Final = 0x66
_ADDRESS_SIZE: Final = 0x67
_REX_W: Final = 0x48
#: Leaves that a 66 selects have this in their names; there it is no operand size.
_MANDATORY: Final = ".pfx_"

_VECTOR: Final = re.compile(r"vector (\d+)")
_CODE: Final = re.compile(r"error (0x[0-9a-f]+)")
_NUMBER: Final = re.compile(r"0x[0-9a-f]+|\d+")
_FLAGS: Final = frozenset(flag_names((1 << 22) - 1))
_FAULTS: Final = frozenset(("fault-missing", "fault-extra", "fault-vector"))

# fmt: off
_IMMEDIATE_BITS: Final = {
    OpKind.IMMEDIATE8:      8,   OpKind.IMMEDIATE8_2ND:  8,
    OpKind.IMMEDIATE16:     16,  OpKind.IMMEDIATE32:     32,  OpKind.IMMEDIATE64:    64,
    OpKind.IMMEDIATE8TO16:  64,  OpKind.IMMEDIATE8TO32:  64,  OpKind.IMMEDIATE8TO64: 64,
    OpKind.IMMEDIATE32TO64: 64,
}
_BRANCH_BITS: Final = {OpKind.NEAR_BRANCH16: 16, OpKind.NEAR_BRANCH32: 32, OpKind.NEAR_BRANCH64: 64}
# fmt: on
_FAR_BRANCHES: Final = frozenset((OpKind.FAR_BRANCH16, OpKind.FAR_BRANCH32))


class Size(NamedTuple):
    """The operand or address size in bits, and whether a prefix chose it."""

    bits: int
    chosen: bool

    def may_be(self, other: Size) -> bool:
        """The same, or neither was chosen, so that each is that of its mode."""
        return self.bits == other.bits or not (self.chosen or other.chosen)


class Cause(NamedTuple):
    """What findings of one cause share: `common` is equal, and the sizes may be the same.

    `common` holds leaf, kind, verdict, what differs, the instruction and the vendor of the case.
    """

    common: tuple[Any, ...]
    operand: Size
    address: Size

    def may_be(self, other: Cause) -> bool:
        """Whether both may have one cause."""
        sizes = self.operand.may_be(other.operand) and self.address.may_be(other.address)
        return self.common == other.common and sizes


def cause_of(finding: Finding) -> Cause:
    """What tells the cause of a finding."""
    case = judge_case(finding.case)
    instruction = CaseInstruction(case)
    differing = frozenset(_sign(difference) for difference in finding.differences)
    bucket = (finding.leaf, finding.kind, finding.verdict)
    common = (*bucket, differing, _said(instruction), finding.case.vendor)
    return Cause(common, _operand_size(instruction, finding.leaf), _address_size(instruction))


def _sign(difference: Difference) -> tuple[Any, ...]:
    """A difference without the values of the case.

    Of flags it is which differ, of exceptions their vectors, of error codes what is between them.
    """
    field, kind, ours, theirs, _ = difference
    if kind in _FAULTS:
        return field, kind, _fault(ours), _fault(theirs)
    if kind == "fault-error-code":
        return field, kind, _fault(ours), *_codes(ours, theirs)
    if kind == "rflags":
        return field, kind, *sorted(_FLAGS & {*ours.split(), *theirs.split()})
    if kind in {"crash", "hang"}:
        return field, kind, _raised(ours), _raised(theirs)
    return field, kind


def _fault(text: str) -> str:
    """The vector; of a text without one, as that of a rule, the text without numbers."""
    vector = _VECTOR.search(text)
    return vector[1] if vector else _NUMBER.sub("N", text)


def _codes(ours: str, theirs: str) -> tuple[int, ...]:
    """Of page faults the bits that differ, else which error codes are 0."""
    found = [_CODE.search(text) for text in (ours, theirs)]
    a, b = (int(code[1], 16) if code else -1 for code in found)
    return (a ^ b,) if _fault(ours) == str(PF_VECTOR) else (a == 0, b == 0)


def _raised(text: str) -> str:
    """The exception of a crash's text without numbers: its first line, or the last one of a traceback."""
    lines = text.strip().splitlines() or [""]
    return _NUMBER.sub("N", lines[-1 if lines[0].startswith("Traceback") else 0])


def _said(instruction: CaseInstruction) -> tuple[Any, ...]:
    """The instruction without what depends on the mode; its bytes if nobody can read it."""
    case = instruction.case
    decoded = instruction.decode(lax=True)
    if case.count != 1 or not decoded.code:
        return (case.count, case.code)
    prefixes = frozenset(instruction.prefixes) & _SAME_EVERYWHERE
    operands = tuple(_operand(decoded, i) for i in range(decoded.op_count))
    return (decoded.mnemonic, prefixes, operands)


def _operand(decoded: Any, i: int) -> tuple[Any, ...]:
    kind = decoded.op_kind(i)
    if kind == OpKind.REGISTER:
        return "register", _register(decoded.op_register(i))
    if kind in _IMMEDIATE_BITS:
        return "immediate", _signed(decoded.immediate(i), _IMMEDIATE_BITS[kind])
    if kind in _BRANCH_BITS:
        return "near", _signed(decoded.near_branch_target - decoded.next_ip, _BRANCH_BITS[kind])
    if kind in _FAR_BRANCHES:
        offset = decoded.far_branch16 if kind == OpKind.FAR_BRANCH16 else decoded.far_branch32
        return "far", decoded.far_branch_selector, offset
    return "memory", decoded.memory_segment if kind == OpKind.MEMORY else Register.NONE


def _register(register: Register_) -> int:
    """A register whatever its width, but for those of one byte."""
    return register if RegisterExt.size(register) == 1 else RegisterExt.full_register(register)


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


def _operand_size(instruction: CaseInstruction, leaf: str) -> Size:
    rex_w = instruction.long and bool(instruction.prefixes) and instruction.prefixes[-1] & 0xF8 == _REX_W
    prefixed = _OPERAND_SIZE in instruction.prefixes and _MANDATORY not in leaf
    return Size(instruction.operand_bits, rex_w or prefixed)


def _address_size(instruction: CaseInstruction) -> Size:
    prefixed = _ADDRESS_SIZE in instruction.prefixes
    if instruction.long:
        return Size(32 if prefixed else 64, prefixed)
    wide = bool(instruction.case.system.seg[VCPU_SREG_CS].db)
    return Size(32 if wide != prefixed else 16, prefixed)

"""Branches and far transfers: targets that are refused, and where completed ones lead (SDM Vol. 1 6.4)."""

from __future__ import annotations

from typing import Any, Final

from iced_x86 import ConditionCode, FlowControl, Mnemonic, OpKind

from emufuzz.arch.descriptors import DESC_CODE, DESC_CONFORMING, DescStruct
from emufuzz.arch.exceptions import DE_VECTOR, GP_VECTOR, NP_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RDX, VCPU_SREG_CS
from emufuzz.arch.rflags import (
    X86_EFLAGS_CF,
    X86_EFLAGS_NT,
    X86_EFLAGS_OF,
    X86_EFLAGS_PF,
    X86_EFLAGS_SF,
    X86_EFLAGS_ZF,
)
from emufuzz.case.model import Fault, Outcome
from emufuzz.oracle.rules.decoded import Decoded
from emufuzz.oracle.rules.rule import COMPLETED, FAULT, VALUE, Due, Found, Rule
from emufuzz.oracle.rules.segments import gp, null
from emufuzz.oracle.rules.view import MASK32, MASK64, View

_GP0: Final = (GP_VECTOR, 0, None)
_DE: Final = (DE_VECTOR, None, None)
_LOOPS: Final = frozenset((Mnemonic.LOOP, Mnemonic.LOOPE, Mnemonic.LOOPNE))
_COUNT_ZERO: Final = frozenset((Mnemonic.JCXZ, Mnemonic.JECXZ, Mnemonic.JRCXZ))
_NEAR: Final = frozenset((OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH64))
_FAR_IMMEDIATE: Final = frozenset((OpKind.FAR_BRANCH16, OpKind.FAR_BRANCH32))
_RETF: Final = frozenset((Mnemonic.RETF,))
_DIVIDES: Final = frozenset((Mnemonic.DIV, Mnemonic.IDIV))
_CODE_TYPES: Final = frozenset((1, 3, 4, 5, 9, 11, 12))  # TSSs and gates that a far CALL or JMP may name
_CALL_GATE64: Final = 12


def _flag(view: View, bit: int) -> bool:
    return bool(view.case.rflags & bit)


def condition(view: View) -> bool:
    """Whether the condition of Jcc holds."""
    code = view.insn.lax.condition_code
    less = _flag(view, X86_EFLAGS_SF) != _flag(view, X86_EFLAGS_OF)
    zero, carry = _flag(view, X86_EFLAGS_ZF), _flag(view, X86_EFLAGS_CF)
    holds = {
        ConditionCode.O: _flag(view, X86_EFLAGS_OF),
        ConditionCode.B: carry,
        ConditionCode.E: zero,
        ConditionCode.BE: carry or zero,
        ConditionCode.S: _flag(view, X86_EFLAGS_SF),
        ConditionCode.P: _flag(view, X86_EFLAGS_PF),
        ConditionCode.L: less,
        ConditionCode.LE: less or zero,
    }
    if code in holds:
        return holds[code]
    return not holds[code - 1]  # iced numbers the negated condition behind each


def taken(view: View) -> bool:
    """Whether a near branch is taken."""
    insn = view.insn
    if insn.mnemonic in _COUNT_ZERO:
        return view.count == 0
    if insn.mnemonic in _LOOPS:
        left = view.count - 1 & (1 << view.address_bits) - 1
        zero = _flag(view, X86_EFLAGS_ZF)
        wanted = insn.mnemonic == Mnemonic.LOOP or zero == (insn.mnemonic == Mnemonic.LOOPE)
        return left != 0 and wanted
    return condition(view) if insn.lax.condition_code else True


def _ambiguous(insn: Decoded) -> bool:
    """A near branch with 66 in 64-bit mode: Intel ignores the prefix, AMD does not."""
    return insn.long and 0x66 in insn.prefixes


def near_branch(insn: Decoded) -> bool:
    """Jcc, JMP, CALL, LOOP or RET within the segment."""
    if not insn.known or _ambiguous(insn):
        return False
    lax = insn.lax
    near = lax.op_count > 0 and lax.op_kind(0) in _NEAR and insn.mnemonic != Mnemonic.XBEGIN
    return bool(near or _indirect(insn) or insn.mnemonic == Mnemonic.RET)


def _indirect(insn: Decoded) -> bool:
    return insn.opcode[0] == 0xFF and insn.reg in {2, 4}


def branch_target(view: View) -> int | None:
    """Where a near branch leads, None if that cannot be read."""
    insn = view.insn
    bits = 64 if insn.long else insn.operand_bits
    if insn.mnemonic == Mnemonic.RET:
        readable = all(view.segment_allows(access) for access in view.accesses)
        value = view.stack_slot(0, bits // 8) if readable else None
    elif _indirect(insn):
        value = view.operand(0)
    elif taken(view):
        value = insn.lax.near_branch_target + view.case.rip
    else:
        return view.case.rip + insn.length & (MASK64 if insn.long else MASK32)
    return None if value is None else value & (1 << bits) - 1


def _refused(view: View, target: int) -> bool:
    return not view.canonical(target) if view.long else target > view.cs.limit


def target_refused(view: View) -> bool:
    """A near branch that is taken leads out of its segment, or to an address that is not canonical."""
    if view.insn.lax.op_kind(0) in _NEAR and not taken(view):
        return False
    target = branch_target(view)
    return target is not None and _refused(view, target)


def refused_call(view: View) -> bool:
    """CALL to a target that is refused, or that nobody knows: it is looked at before the stack."""
    insn = view.insn
    calls = insn.lax.flow_control in {FlowControl.CALL, FlowControl.INDIRECT_CALL}
    refused = near_branch(insn) and (branch_target(view) is None or target_refused(view))
    return calls and (_ambiguous(insn) or refused)


def _near_end(view: View, outcome: Outcome) -> Found | None:
    target = branch_target(view)
    if target is None or outcome.rip == target:
        return None
    return Found("rip", hex(outcome.rip), f"the branch leads to {target:#x}")


# Far transfers


def far_jump(insn: Decoded) -> bool:
    """CALL or JMP with a far pointer."""
    if not insn.known or not insn.valid:
        return False
    return insn.opcode[0] in {0x9A, 0xEA} or (insn.opcode[0] == 0xFF and insn.reg in {3, 5})


def _far_pointer(view: View) -> tuple[int, int] | None:
    """(selector, offset) of a far CALL or JMP; None if it cannot be read."""
    lax = view.insn.lax
    if lax.op_kind(0) in _FAR_IMMEDIATE:
        wide = lax.op_kind(0) == OpKind.FAR_BRANCH32
        return lax.far_branch_selector, lax.far_branch32 if wide else lax.far_branch16
    access = view.explicit
    if access is None or not view.segment_allows(access):
        return None
    data = view.read(access.linear, access.size)
    if data is None:
        return None
    return int.from_bytes(data[-2:], "little"), int.from_bytes(data[:-2], "little")


def _far_selector(view: View) -> int | None:
    pointer = _far_pointer(view) if view.protected else None
    return None if pointer is None else pointer[0]


def _returned_selector(view: View) -> int | None:
    if not view.protected:
        return None
    size = view.insn.operand_bits // 8
    if any(not view.segment_allows(access) for access in view.accesses):
        return None
    if view.stack_slot(0, size) is None or view.stack_slot(1, size) is None:
        return None
    return (view.stack_slot(1, size) or 0) & 0xFFFF


def _selector(view: View) -> int | None:
    return _returned_selector(view) if view.insn.mnemonic == Mnemonic.RETF else _far_selector(view)


def _null_code(view: View) -> bool:
    selector = _selector(view)
    return selector is not None and null(selector)


def _beyond_table(view: View) -> Fault | None:
    selector = _selector(view)
    if selector is None or null(selector) or view.inside_table(selector):
        return None
    return gp(selector)


def _descriptor(view: View) -> tuple[int, DescStruct] | None:
    selector = _selector(view)
    if selector is None or null(selector):
        return None
    data = view.descriptor(selector)
    return None if data is None else (selector, DescStruct.unpack(data))


def _code_type(view: View) -> Fault | None:
    """Neither code nor, for CALL and JMP, a gate or TSS."""
    found = _descriptor(view)
    if found is None:
        return None
    selector, descriptor = found
    if descriptor.s:
        return None if descriptor.type & DESC_CODE else gp(selector)
    jumps = view.insn.mnemonic != Mnemonic.RETF
    gate = descriptor.type == _CALL_GATE64 if view.ia32e else descriptor.type in _CODE_TYPES
    return None if jumps and gate else gp(selector)


def _code(view: View) -> tuple[int, DescStruct] | None:
    """Selector and descriptor if that is one of a code segment."""
    found = _descriptor(view)
    if found is None or not found[1].s or not found[1].type & DESC_CODE:
        return None
    return found


def _code_privilege(view: View) -> Fault | None:
    found = _code(view)
    if found is None:
        return None
    selector, descriptor = found
    rpl, dpl, conforming = selector & 3, descriptor.dpl, descriptor.type & DESC_CONFORMING
    if view.insn.mnemonic == Mnemonic.RETF:
        wrong = rpl < view.cpl or (dpl > rpl if conforming else dpl != rpl)
    else:
        wrong = dpl > view.cpl if conforming else rpl > view.cpl or dpl != view.cpl
    return gp(selector) if wrong else None


def _code_long_default(view: View) -> Fault | None:
    found = _code(view)
    return gp(found[0]) if found and view.ia32e and found[1].l and found[1].d else None


def _code_present(view: View) -> Fault | None:
    found = _code(view)
    if found is None or found[1].p or _code_privilege(view) or _code_long_default(view):
        return None
    return NP_VECTOR, found[0] & 0xFFFC, None


def _far_offset(view: View) -> bool:
    """The offset is outside of the new code segment, or not canonical there."""
    pointer = _far_pointer(view)
    if pointer is None:
        return False
    if not view.protected:
        return pointer[1] > view.cs.limit
    found = _code(view)
    if found is None or not found[1].p or _code_privilege(view) or _code_long_default(view):
        return False
    if view.ia32e and found[1].l:
        return not view.canonical(pointer[1])
    return pointer[1] & MASK32 > found[1].limit_scaled


def _far_end(view: View, outcome: Outcome) -> Found | None:
    """A jump to a code segment: CS gets the selector with CPL as RPL, RIP the offset."""
    pointer, found = _far_pointer(view), _code(view)
    if pointer is None or found is None:
        return None
    wanted = pointer[0] & ~3 | view.cpl
    selector = outcome.system.seg[VCPU_SREG_CS].sel
    if selector != wanted:
        return Found("seg.cs", f"selector {selector:#x}", f"the selector of CS is {wanted:#x}")
    if outcome.rip != pointer[1]:
        return Found("rip", hex(outcome.rip), f"the transfer leads to {pointer[1]:#x}")
    return None


def _nested_return(view: View) -> bool:
    return view.protected and view.ia32e and bool(view.case.rflags & X86_EFLAGS_NT)


# Divide errors


def _divide(view: View) -> bool:
    """The divisor is 0, or the quotient does not fit."""
    divisor, size = view.operand(0), view.insn.operand_bits
    if view.insn.opcode[0] == 0xF6:
        size = 8
    if divisor is None:
        return False
    gpr, mask = view.case.gpr, (1 << size) - 1
    if size == 8:
        dividend = gpr[VCPU_REGS_RAX] & 0xFFFF
    else:
        dividend = (gpr[VCPU_REGS_RDX] & mask) << size | gpr[VCPU_REGS_RAX] & mask
    if divisor == 0:
        return True
    if view.insn.mnemonic == Mnemonic.DIV:
        return dividend // divisor > mask
    top, bottom = _signed(dividend, size * 2), _signed(divisor, size)
    quotient = abs(top) // abs(bottom) * (-1 if (top < 0) != (bottom < 0) else 1)
    return not -(1 << size - 1) <= quotient < 1 << size - 1


def _signed(value: int, bits: int) -> int:
    return value - (value >> bits - 1 << bits)


def _far(insn: Decoded) -> bool:
    return far_jump(insn) or insn.mnemonic == Mnemonic.RETF


def _gp(name: str, citation: str, demand: str, encoding: Any, due: Due) -> Rule:
    return Rule(name, FAULT, citation, demand, None, encoding, VALUE, _GP0, due)


# fmt: off
RULES: Final = (
    _gp("gp-branch-target", "SDM Vol. 2A JMP", "the target lies within CS, in 64-bit mode it is canonical",
        near_branch, target_refused),
    _gp("gp-far-null", "SDM Vol. 2A JMP", "CS takes no null selector", _far, _null_code),
    _gp("gp-far-table", "SDM Vol. 2A JMP", "the descriptor lies within its table", _far, _beyond_table),
    _gp("gp-far-type", "SDM Vol. 2A JMP",
        "the selector is one of code, or of a gate or TSS where there are any",
        _far, _code_type),
    _gp("gp-far-privilege", "SDM Vol. 3A 5.8.1", "CPL, RPL and DPL allow the transfer", _far,
        _code_privilege),
    _gp("gp-far-l-and-d", "SDM Vol. 3A 5.2.1", "in IA-32e mode CS.L and CS.D are not both set", _far,
        _code_long_default),
    _gp("np-far", "SDM Vol. 2A JMP", "the code segment is present", _far, _code_present),
    _gp("gp-far-offset", "SDM Vol. 2A JMP", "the offset lies within the new CS", far_jump, _far_offset),
    _gp("gp-iret-nested", "SDM Vol. 2A IRET", "in IA-32e mode there is no return from a nested task",
        lambda insn: insn.mnemonic in {Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ}, _nested_return),
    Rule("de-divide", FAULT, "SDM Vol. 2A DIV", "a zero divisor or a quotient that does not fit is #DE",
         _DIVIDES, None, VALUE, _DE, _divide),
    Rule("de-aam", FAULT, "SDM Vol. 2A AAM", "AAM by 0 is #DE",
         frozenset((Mnemonic.AAM,)), lambda insn: insn.lax.immediate8 == 0, VALUE, _DE, lambda _view: True),
    Rule("near-branch-target", COMPLETED, "SDM Vol. 2A JMP",
         "a near branch leads to its target or behind itself",
         None, near_branch, finds=_near_end),
    Rule("far-jump-target", COMPLETED, "SDM Vol. 2A JMP", "a far jump loads CS, with RPL = CPL, and RIP",
         None, far_jump, finds=_far_end),
)
# fmt: on

"""Loads of segment registers, LDTR and TR: which descriptors are refused, and how (SDM Vol. 3A 5.5)."""

from __future__ import annotations

from typing import Final

from iced_x86 import Mnemonic

from emufuzz.arch.descriptors import DESC_CODE, DESC_CONFORMING, DESC_READABLE, DESC_WRITABLE, DescStruct
from emufuzz.arch.exceptions import GP_VECTOR, NP_VECTOR, SS_VECTOR
from emufuzz.arch.regs import (
    VCPU_SREG_DS,
    VCPU_SREG_ES,
    VCPU_SREG_FS,
    VCPU_SREG_GS,
    VCPU_SREG_SS,
)
from emufuzz.case.model import Fault
from emufuzz.oracle.rules.decoded import Decoded
from emufuzz.oracle.rules.rule import FAULT, VALUE, Due, Rule
from emufuzz.oracle.rules.view import View

_GP0: Final = (GP_VECTOR, 0, None)
_POPS: Final = {0x07: VCPU_SREG_ES, 0x17: VCPU_SREG_SS, 0x1F: VCPU_SREG_DS}
_WIDE_POPS: Final = {0xA1: VCPU_SREG_FS, 0xA9: VCPU_SREG_GS}
_POINTERS: Final = {0xB2: VCPU_SREG_SS, 0xB4: VCPU_SREG_FS, 0xB5: VCPU_SREG_GS}
_TYPE_LDT: Final = 2
_TYPE_TSS16: Final = 1
_TYPE_TSS: Final = 9


def loaded_segment(insn: Decoded) -> int | None:
    """The data segment register that MOV, POP or LDS and its kin load; None for other instructions."""
    first, second = insn.opcode[0], insn.opcode[1]
    if not insn.known:
        return None
    if first == 0x8E:
        return insn.reg if insn.reg < 6 and insn.reg != 1 else None
    if first in {0xC4, 0xC5}:
        return VCPU_SREG_ES if first == 0xC4 else VCPU_SREG_DS
    if first == 0x0F:
        return _POINTERS.get(second, _WIDE_POPS.get(second))
    return _POPS.get(first)


def selector_of(view: View) -> int | None:
    """The selector that is loaded; None if it cannot be read."""
    insn = view.insn
    first, second = insn.opcode[0], insn.opcode[1]
    if first == 0x8E:
        return _low(view.operand(1, 2))
    if first in {0xC4, 0xC5} or (first == 0x0F and second in _POINTERS):
        access = view.explicit
        if access is None or not view.segment_allows(access):
            return None
        if view.read(access.linear, access.size) is None:
            return None
        return view.number(access.linear + access.size - 2, 2)
    return view.stack_slot(0, 2) if _stack_readable(view) else None


def _stack_readable(view: View) -> bool:
    """All that POP takes can be read, not only the selector."""
    return all(
        view.segment_allows(access) and view.read(access.linear, access.size) is not None
        for access in view.accesses
    )


def _low(value: int | None) -> int | None:
    return None if value is None else value & 0xFFFF


def _loads_data(insn: Decoded) -> bool:
    number = loaded_segment(insn)
    return number is not None and number != VCPU_SREG_SS


def _loads_stack(insn: Decoded) -> bool:
    return loaded_segment(insn) == VCPU_SREG_SS


def null(selector: int) -> bool:
    """A null selector, whatever its RPL."""
    return not selector & 0xFFFC


def _selector(view: View) -> int | None:
    """The selector to check: none in real and virtual-8086 mode."""
    return selector_of(view) if view.protected else None


def gp(selector: int) -> Fault:
    """#GP with a selector: RPL is not part of the error code."""
    return GP_VECTOR, selector & 0xFFFC, None


def _descriptor(view: View) -> tuple[int, DescStruct] | None:
    """Selector and descriptor if the selector is not null and the descriptor can be read."""
    selector = _selector(view)
    if selector is None or null(selector):
        return None
    data = view.descriptor(selector)
    return None if data is None else (selector, DescStruct.unpack(data))


def _null_stack(view: View) -> Fault | None:
    """In 64-bit mode below CPL 3 SS takes a null selector whose RPL is CPL."""
    selector = _selector(view)
    if selector is None or not null(selector):
        return None
    fine = view.long and view.cpl < 3 and selector & 3 == view.cpl
    return None if fine else _GP0


def _beyond_table(view: View) -> Fault | None:
    selector = _selector(view)
    if selector is None or null(selector) or view.inside_table(selector):
        return None
    return gp(selector)


def _data_type(view: View) -> Fault | None:
    found = _descriptor(view)
    if found is None:
        return None
    selector, descriptor = found
    readable = not descriptor.type & DESC_CODE or descriptor.type & DESC_READABLE
    return None if descriptor.s and readable else gp(selector)


def _is_readable(descriptor: DescStruct) -> bool:
    return bool(descriptor.s) and bool(not descriptor.type & DESC_CODE or descriptor.type & DESC_READABLE)


def _data_privilege(view: View) -> Fault | None:
    found = _descriptor(view)
    if found is None or not _is_readable(found[1]):
        return None
    selector, descriptor = found
    if descriptor.type & DESC_CODE and descriptor.type & DESC_CONFORMING:
        return None
    return gp(selector) if max(selector & 3, view.cpl) > descriptor.dpl else None


def _data_present(view: View) -> Fault | None:
    found = _descriptor(view)
    if found is None or _data_type(view) or _data_privilege(view) or found[1].p:
        return None
    return NP_VECTOR, found[0] & 0xFFFC, None


def _stack_privilege(view: View) -> Fault | None:
    found = _descriptor(view)
    if found is None:
        return None
    selector, descriptor = found
    return gp(selector) if selector & 3 != view.cpl or descriptor.dpl != view.cpl else None


def _stack_type(view: View) -> Fault | None:
    found = _descriptor(view)
    if found is None:
        return None
    selector, descriptor = found
    writable = descriptor.s and not descriptor.type & DESC_CODE and descriptor.type & DESC_WRITABLE
    return None if writable else gp(selector)


def _stack_present(view: View) -> Fault | None:
    found = _descriptor(view)
    if found is None or _stack_privilege(view) or _stack_type(view) or found[1].p:
        return None
    return SS_VECTOR, found[0] & 0xFFFC, None


# LLDT and LTR


def _system_selector(view: View) -> int | None:
    return _low(view.operand(0, 2)) if view.protected and view.cpl == 0 else None


def _system_descriptor(view: View) -> tuple[int, bytes] | None:
    """Selector and descriptor bytes of LLDT or LTR: 16 in 64-bit mode, else the 8 that always count."""
    selector = _system_selector(view)
    if selector is None or null(selector) or selector & 4:
        return None
    data = view.descriptor(selector, 16 if view.long else 8)
    return None if data is None else (selector, data)


def _null_task(view: View) -> Fault | None:
    selector = _system_selector(view)
    return _GP0 if selector is not None and null(selector) else None


def _system_in_ldt(view: View) -> Fault | None:
    selector = _system_selector(view)
    return gp(selector) if selector is not None and not null(selector) and selector & 4 else None


def _system_beyond(view: View) -> Fault | None:
    selector = _system_selector(view)
    if selector is None or null(selector) or selector & 4:
        return None
    return None if view.inside_table(selector, 16 if view.long else 8) else gp(selector)


def _system_type(*types: int) -> Due:
    def due(view: View) -> Fault | None:
        found = _system_descriptor(view)
        if found is None:
            return None
        descriptor = DescStruct.unpack(found[1])
        wanted = types[-1:] if view.ia32e else types
        return None if not descriptor.s and descriptor.type in wanted else gp(found[0])

    return due


def _system_present(*types: int) -> Due:
    wrong_type = _system_type(*types)

    def due(view: View) -> Fault | None:
        found = _system_descriptor(view)
        if found is None or wrong_type(view) or DescStruct.unpack(found[1]).p:
            return None
        return NP_VECTOR, found[0] & 0xFFFC, None

    return due


def _system_canonical(*types: int) -> Due:
    wrong_type, absent = _system_type(*types), _system_present(*types)

    def due(view: View) -> Fault | None:
        found = _system_descriptor(view)
        if found is None or not view.long or wrong_type(view) or absent(view):
            return None
        base = DescStruct.unpack(found[1]).base | int.from_bytes(found[1][8:12], "little") << 32
        return None if view.canonical(base) else gp(found[0])

    return due


_LLDT: Final = frozenset((Mnemonic.LLDT,))
_LTR: Final = frozenset((Mnemonic.LTR,))
_BOTH: Final = _LLDT | _LTR


def _data(name: str, demand: str, due: Due) -> Rule:
    return Rule(name, FAULT, "SDM Vol. 2B MOV", demand, None, _loads_data, VALUE, None, due)


def _stack(name: str, demand: str, due: Due) -> Rule:
    return Rule(name, FAULT, "SDM Vol. 2B MOV", demand, None, _loads_stack, VALUE, None, due)


def _system(name: str, citation: str, demand: str, mnemonics: frozenset[int], due: Due) -> Rule:
    return Rule(name, FAULT, citation, demand, mnemonics, None, VALUE, None, due)


# fmt: off
RULES: Final = (
    _data("gp-load-data-table", "the descriptor lies within its table", _beyond_table),
    _data("gp-load-data-type", "ES, DS, FS and GS take data or readable code", _data_type),
    _data("gp-load-data-privilege", "neither RPL nor CPL is above the DPL of data or non-conforming code",
          _data_privilege),
    _data("np-load-data", "the segment is present", _data_present),
    _stack("gp-load-null-ss", "SS takes a null selector in 64-bit mode below CPL 3 only, with RPL = CPL",
           _null_stack),
    _stack("gp-load-ss-table", "the descriptor lies within its table", _beyond_table),
    _stack("gp-load-ss-privilege", "RPL and DPL of a stack segment are CPL", _stack_privilege),
    _stack("gp-load-ss-type", "a stack segment is writable data", _stack_type),
    _stack("ss-load-ss", "the stack segment is present", _stack_present),
    _system("gp-ltr-null", "SDM Vol. 2A LTR", "TR takes no null selector", _LTR, _null_task),
    _system("gp-system-in-ldt", "SDM Vol. 2A LTR", "the descriptor is in the GDT", _BOTH, _system_in_ldt),
    _system("gp-system-table", "SDM Vol. 2A LTR", "all of the descriptor lies within the GDT", _BOTH,
            _system_beyond),
    _system("gp-lldt-type", "SDM Vol. 2A LLDT", "the descriptor is one of an LDT", _LLDT,
            _system_type(_TYPE_LDT)),
    _system("gp-ltr-type", "SDM Vol. 2A LTR", "the descriptor is one of an available TSS", _LTR,
            _system_type(_TYPE_TSS16, _TYPE_TSS)),
    _system("np-lldt", "SDM Vol. 2A LLDT", "the LDT is present", _LLDT, _system_present(_TYPE_LDT)),
    _system("np-ltr", "SDM Vol. 2A LTR", "the TSS is present", _LTR, _system_present(_TYPE_TSS16, _TYPE_TSS)),
    _system("gp-lldt-canonical", "SDM Vol. 2A LLDT", "the base is canonical", _LLDT,
            _system_canonical(_TYPE_LDT)),
    _system("gp-ltr-canonical", "SDM Vol. 2A LTR", "the base is canonical", _LTR,
            _system_canonical(_TYPE_TSS16, _TYPE_TSS)),
)
# fmt: on

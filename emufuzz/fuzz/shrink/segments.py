"""The pass over segments: flat ones, with the addresses moved so that the same memory is meant."""

from __future__ import annotations

from typing import Final

from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES, VCPU_SREG_DS, VCPU_SREG_SS
from emufuzz.case.model import Case
from emufuzz.fuzz.shrink.defaults import default_case
from emufuzz.fuzz.shrink.fields import Parts, case_of, parts_of
from emufuzz.fuzz.shrink.layout import Layout, effective_address, layout_of
from emufuzz.fuzz.shrink.operand import at_address
from emufuzz.fuzz.shrink.probe import Probe

#: Segment override prefix -> segment register.
_OVERRIDES: Final = {0x26: 0, 0x2E: 1, 0x36: 2, 0x3E: 3, 0x64: 4, 0x65: 5}
#: Registers that are offsets into a segment without a ModRM byte: of stacks and strings, and XLAT's.
_OFFSETS: Final = {"es": ("rdi",), "ss": ("rsp", "rbp"), "ds": ("rsi", "rbx")}


def to_flat_segments(case: Case, probe: Probe) -> Case:
    """Segments with their defaults, all or one by one, of which offsets then are linear addresses."""
    differing = _differing(case)
    for names in (differing, *([name] for name in differing if len(differing) > 1)):
        if set(names) & set(_differing(case)):
            flat = _flat(case, names)
            case = flat if flat is not None and probe.keeps(flat) else case
    return case


def _differing(case: Case) -> list[str]:
    """Data segments whose base is not the default one."""
    default = default_case(case).system.seg
    return [
        name
        for nr, name in enumerate(SREG_NAMES[:6])
        if name != "cs" and case.system.seg[nr].base != default[nr].base
    ]


def _flat(case: Case, names: list[str]) -> Case | None:
    """The case with default segments of these names; None if addresses cannot make up for it."""
    layout = layout_of(case)
    default = parts_of(default_case(case))
    parts = parts_of(case)
    memory = layout is not None and layout.is_memory(case.code)
    for name in names:
        if not memory:
            _move(case, parts, name, parts["seg", name, "base"] - default["seg", name, "base"])
        parts.update((key, value) for key, value in default.items() if key[:2] == ("seg", name))
    flat = case_of(case, parts)
    if layout is None or not memory:
        return flat
    name = _segment_of(case, layout)
    if name not in names:
        return flat
    base = case.system.seg[SREG_NAMES.index(name)].base - default["seg", name, "base"]
    mask = (1 << layout.ad_bytes * 8) - 1
    return at_address(flat, layout, effective_address(case, layout) + base & mask)


def _move(case: Case, parts: Parts, name: str, base: int) -> None:
    """Add a segment's base to the registers that are offsets into it."""
    mask = 0xFFFFFFFFFFFFFFFF if case.mode == "prot64" else 0xFFFFFFFF
    for register in _OFFSETS.get(name, ()):
        parts["gpr", register] = case.gpr[GPR_NAMES.index(register)] + base & mask


def _segment_of(case: Case, layout: Layout) -> str:
    """The segment register of the memory operand (SDM Vol. 1 3.7.4)."""
    chosen = [_OVERRIDES[byte] for byte in case.code[layout.start : layout.opcode] if byte in _OVERRIDES]
    if chosen:
        return SREG_NAMES[chosen[-1]]
    mod, rm = case.code[layout.modrm] >> 6, case.code[layout.modrm] & 7
    if layout.ad_bytes == 2:
        stack = rm in {2, 3} or (rm == 6 and mod != 0)
    else:
        base = case.code[layout.sib] & 7 if layout.sib >= 0 else rm
        stack = (base == 4 and layout.sib >= 0) or (base == 5 and mod != 0)
        stack &= not layout.rex & 1
    return SREG_NAMES[VCPU_SREG_SS if stack else VCPU_SREG_DS]

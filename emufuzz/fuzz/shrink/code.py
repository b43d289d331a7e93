"""Passes over the code: fewer instructions, fewer prefixes, simpler operands."""

from __future__ import annotations

from itertools import pairwise

import iced_x86
import msgspec

from emufuzz.arch.regs import VCPU_SREG_CS
from emufuzz.case.model import Case
from emufuzz.fuzz.shrink.bits import smaller
from emufuzz.fuzz.shrink.fields import with_code
from emufuzz.fuzz.shrink.layout import MASK64, Layout, layout_of
from emufuzz.fuzz.shrink.operand import simpler_forms
from emufuzz.fuzz.shrink.probe import Probe
from emufuzz.fuzz.shrink.reduce import reduced


def fewer_instructions(case: Case, probe: Probe) -> Case:
    """One instruction if one suffices, which need not be the first; else as few as possible."""
    if case.count == 1:
        return case
    pieces = _pieces(case)
    for number, piece in enumerate(pieces):
        ahead = sum(map(len, pieces[:number]))
        moved = msgspec.structs.replace(case, code=piece, count=1, rip=case.rip + ahead & MASK64)
        if probe.keeps(moved):
            return moved
    kept = reduced(pieces, lambda rest: bool(rest) and probe.keeps(_of_pieces(case, rest)))
    if len(kept) < len(pieces):
        case = _of_pieces(case, kept)
    fewer = (msgspec.structs.replace(case, count=count) for count in range(1, case.count))
    return next((simple for simple in fewer if probe.keeps(simple)), case)


def _of_pieces(case: Case, pieces: list[bytes]) -> Case:
    return msgspec.structs.replace(case, code=b"".join(pieces), count=max(1, min(case.count, len(pieces))))


def _pieces(case: Case) -> list[bytes]:
    """The code, cut into its instructions."""
    bits = 64 if case.mode == "prot64" else 32 if case.system.seg[VCPU_SREG_CS].db else 16
    decoder = iced_x86.Decoder(bits, case.code, iced_x86.DecoderOptions.NO_INVALID_CHECK)
    lengths = [instruction.len for instruction in decoder]
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return [case.code[a:b] for a, b in pairwise(ends)]


def without_rest(case: Case, probe: Probe) -> Case:
    """No bytes behind the instruction; of one that was not decoded, none that do not matter."""
    subject = probe.best.subject
    length = subject.length if subject is not None and case.count == 1 else None
    least = length or 1
    if least < len(case.code) and probe.keeps(shorter := with_code(case, case.code[:least])):
        return shorter
    size = max(0, len(case.code) - least + 1) // 2
    while size:
        if size <= len(case.code) - least and probe.keeps(shorter := with_code(case, case.code[:-size])):
            case = shorter
        else:
            size //= 2
    return case


def fewer_prefixes(case: Case, probe: Probe) -> Case:
    """No legacy or REX prefix that does not matter, and no such bit of a REX prefix."""
    layout = layout_of(case)
    if layout is None or layout.opcode == layout.start:
        return case

    def only(places: list[int]) -> Case:
        kept = bytes(case.code[place] for place in places)
        return with_code(case, case.code[: layout.start] + kept + case.code[layout.opcode :])

    places = list(range(layout.start, layout.opcode))
    kept = reduced(places, lambda rest: probe.keeps(only(rest)))
    case = only(kept)
    at = layout.start + len(kept) - 1
    if not layout.rex or not kept or kept[-1] != layout.opcode - 1:
        return case
    bits = smaller(case.code[at], 0x40, lambda rex: probe.keeps(_with_byte(case, at, rex)))
    return _with_byte(case, at, bits)


def _with_byte(case: Case, at: int, value: int) -> Case:
    return with_code(case, case.code[:at] + bytes((value,)) + case.code[at + 1 :])


def simpler_operands(case: Case, probe: Probe) -> Case:
    """A register instead of memory, an address without registers, low registers, small constants."""
    layout = layout_of(case)
    if layout is None:
        return case
    if layout.is_memory(case.code):
        case = next((simple for simple in simpler_forms(case, layout) if probe.keeps(simple)), case)
        layout = layout_of(case) or layout
    if layout.modrm >= 0:
        case = _low_registers(case, layout, probe)
    case = _constant(case, layout.disp, layout.imm, probe)
    return _constant(case, layout.imm, len(case.code), probe)


def _low_registers(case: Case, layout: Layout, probe: Probe) -> Case:
    """Register 0 for what ModRM names, as far as that matters to nobody."""
    for mask in (0x38, 0x07) if case.code[layout.modrm] >= 0xC0 else (0x38,):
        modrm = case.code[layout.modrm]
        if modrm & mask and probe.keeps(lower := _with_byte(case, layout.modrm, modrm & ~mask)):
            case = lower
    return case


def _constant(case: Case, start: int, end: int, probe: Probe) -> Case:
    """A displacement or immediate of fewer bits."""
    if not 0 < end - start <= 8:
        return case

    def with_value(value: int) -> Case:
        return with_code(case, case.code[:start] + value.to_bytes(end - start, "little") + case.code[end:])

    value = int.from_bytes(case.code[start:end], "little")
    return with_value(smaller(value, 0, lambda other: probe.keeps(with_value(other))))

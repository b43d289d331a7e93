"""A case as bytes: version, template, what follows, then code, registers and the rest.

What a fuzzer should change most comes first and always; a section that says what the template says is
left out. docs/atheris.md has the format.
"""

from __future__ import annotations

from typing import Any, Final

from emufuzz.arch.modes import mode_of
from emufuzz.arch.regs import VCPU_SREG_CS
from emufuzz.arch.rflags import X86_EFLAGS_FIXED, X86_EFLAGS_VM
from emufuzz.case.check import check_system
from emufuzz.case.codec.extra import read_extra, write_extra
from emufuzz.case.codec.memory import page_count, read_memory, size_for, write_memory
from emufuzz.case.codec.stream import Source, mask, number
from emufuzz.case.codec.system import read_system, write_system
from emufuzz.case.codec.templates import USUAL_SEED, Template, memory_of, nearest, templates
from emufuzz.case.codec.values import printable
from emufuzz.case.fields import MAX_CODE, MAX_COUNT, MAX_PORT_IN
from emufuzz.case.memory import intern_memory
from emufuzz.case.model import NO_MEMORY, Case, Memory, System, case_memory, is_physical
from emufuzz.case.paths import PATHS

#: The first byte of an encoded case. Another one does not change what the rest means.
VERSION: Final = 1

_SYSTEM, _MEMORY, _EXTRA, _RARE, _PATH, _ID, _REFUSED = (1 << i for i in range(7))
_VENDORS: Final = ("intel", "amd")
_MAX_ID: Final = 256
_LINEAR_BITS: Final = 64
_RFLAGS: Final = 0x3F7FD7


def encode_case(case: Case) -> bytes:
    """The case as bytes: `decode_case` gives an equal one back.

    Raises:
        ValueError: a field is out of the range that docs/case-format.md gives it.
    """
    template = nearest(case.mode, case.system)
    usual = memory_of(template.memory, USUAL_SEED, case.mode)
    sections = _sections(case, template, usual)
    out = bytearray((VERSION, template.number, sections))
    out += number(len(case.code)) + case.code + number(case.rip) + number(case.rflags ^ template.rflags)
    out += mask([bool(value) for value in case.gpr])
    for value in filter(None, case.gpr):
        out += number(value)
    if sections & _PATH:
        out.append(PATHS.index(case.path or ""))
    if sections & _RARE:
        _write_rare(out, case)
    if sections & _SYSTEM:
        write_system(out, case.system, template.system)
    if sections & _EXTRA:
        write_extra(out, case.mode, template.memory, case.extra or {})
    if sections & _MEMORY:
        write_memory(out, case.mode, template.memory, case.mem.entries, _LINEAR_BITS)
    if sections & _ID:
        data = case.id.encode()
        out += number(len(data)) + data
    out += bytes(max(0, size_for(page_count(case_memory(case).entries)) - len(out)))
    return bytes(out)


def _sections(case: Case, template: Template, usual: Memory) -> int:
    """Which sections the encoded case has."""
    rare = (case.count, case.port_in, case.vendor, case.emul_type, case.single) != (1, b"", "intel", 0, 0)
    same = is_physical(case) or case.mem is usual or case.mem == usual
    return (
        _SYSTEM * (case.system != template.system)
        | _MEMORY * (not same)
        | _EXTRA * bool(case.extra)
        | _RARE * rare
        | _PATH * (case.path is not None)
        | _ID * bool(case.id)
        | _REFUSED * bool(check_system(case.system, case.rflags))
    )


def _write_rare(out: bytearray, case: Case) -> None:
    out += mask([case.vendor != "intel", bool(case.single), bool(case.port_in)])
    out += number(case.count - 1, 16) + number(case.emul_type, 32)
    if case.port_in:
        out += number(len(case.port_in)) + case.port_in


# -- reading -------------------------------------------------------------------------------------


def decode_case(data: bytes) -> Case:
    """The case that bytes stand for; any bytes stand for a valid one.

    It is one that `case_from_json` accepts, and unless the byte of sections says otherwise, its state is
    one that VM entry accepts (`emufuzz.case.check`): changes of the template that would be refused are
    dropped. Memory and time are bounded by the number of bytes.
    """
    source = Source(data)
    source.byte()
    known = templates()
    template = known[source.byte() % len(known)]
    sections = source.byte()
    code = source.take(source.below(MAX_CODE + 1))
    rip, rflags = source.number(), source.number() ^ template.rflags
    gpr = _read_registers(source)
    path = PATHS[source.byte() % len(PATHS)] if sections & _PATH else None
    rare = _read_rare(source) if sections & _RARE else {}
    system = read_system(source, template.system) if sections & _SYSTEM else template.system
    if not sections & _REFUSED:
        system, rflags = _accepted(system, rflags, template)
    cs = system.seg[VCPU_SREG_CS]
    mode = mode_of(system.cr0, system.efer, rflags, cs.l, cs.db)
    extra = read_extra(source, mode) if sections & _EXTRA else None
    if extra is not None and "phys" in extra:
        mem = NO_MEMORY
    elif sections & _MEMORY:
        mem = intern_memory(Memory(read_memory(source, mode, _LINEAR_BITS)))
    else:
        mem = memory_of(template.memory, USUAL_SEED, template.mode)
    name = printable(source.take(source.below(4 * _MAX_ID + 1)), _MAX_ID) if sections & _ID else ""
    return Case(name, mode, code, gpr, rip, rflags, system, mem, path=path, extra=extra, **rare)


def _read_registers(source: Source) -> tuple[int, ...]:
    given = source.fixed(2)
    return tuple([source.number() if given >> i & 1 else 0 for i in range(16)])


def _read_rare(source: Source) -> dict[str, Any]:
    given = source.byte()
    rare: dict[str, Any] = {"vendor": _VENDORS[given & 1], "single": given >> 1 & 1}
    rare["count"] = 1 + source.number(16) % MAX_COUNT
    rare["emul_type"] = source.number(32)
    if given & 4:
        rare["port_in"] = source.take(source.below(MAX_PORT_IN + 1))
    return rare


def _accepted(system: System, rflags: int, template: Template) -> tuple[System, int]:
    """The state, or where VM entry refuses it, the template's with as much of RFLAGS as goes with it."""
    if not check_system(system, rflags):
        return system, rflags
    rflags = rflags & _RFLAGS & ~X86_EFLAGS_VM | template.rflags & X86_EFLAGS_VM | X86_EFLAGS_FIXED
    if not check_system(system, rflags):
        return system, rflags
    return template.system, rflags

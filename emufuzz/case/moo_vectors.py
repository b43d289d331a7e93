"""Tests of a MOO file as vectors: a case in real mode, and what the processor made of it.

The suites run each instruction from a jump to it, and end with the HLT behind it or, after a branch,
with one at its target; the final state is the one after that HLT. An exception is delivered, and the
HLT is the handler's first instruction. Both are taken back here, so that the outcome is that of the
one instruction, as everywhere in emufuzz: RIP at the next instruction, exceptions before delivery. A
repeated string instruction that ran to its end is taken back to the point where KVM stops: RCX is 0,
and the instruction, at which RIP still is, has yet to notice (KVM: x86_emulate_insn).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from emufuzz.arch import cr
from emufuzz.arch.exceptions import AC_VECTOR, DE_VECTOR, DF_VECTOR, GP_VECTOR, PF_VECTOR, SS_VECTOR
from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES
from emufuzz.arch.rflags import X86_EFLAGS_FIXED, X86_EFLAGS_RF, X86_EFLAGS_VM, X86_EFLAGS_ZF
from emufuzz.case.errors import CaseError
from emufuzz.case.model import PAGE_SHIFT, UNUSABLE, Case, Memory, Segment, System, TableRegister
from emufuzz.case.moo import MooTest, open_moo
from emufuzz.case.moo_limits import FAMILIES, HLT, I8086, I80386, KVM, Encoding, encoding, unfit, without_halt
from emufuzz.case.segments import TYPE_TSS16_BUSY, segment_paragraph

REVOKED: Final = "revoked"

_SEGMENTS: Final = SREG_NAMES[:6]
_STATUS: Final = 0xFD5  # flags of the 8086: CF PF AF ZF SF TF IF DF OF
_STATUS_386: Final = 0x7FD5 | X86_EFLAGS_RF  # and IOPL, NT, RF
_CR0_BITS: Final = cr.X86_CR0_PE | cr.X86_CR0_MP | cr.X86_CR0_EM | cr.X86_CR0_TS | cr.X86_CR0_PG
_DR6_FIXED, _DR6_BITS = 0xFFFF0FF0, 0xE00F
_DR7_FIXED, _DR7_BITS = 0x400, 0xFFFF23FF
_DR7_ENABLED: Final = 0xFF
_LAST_ADDRESS: Final = 0x10FFEF  # FFFF:FFFF
_REAL_LIMIT: Final = 0xFFFF
_FRAME: Final = 6  # bytes of IP, CS and FLAGS on the stack
_NO_REPEAT_STOP: Final = 1024  # iterations after which KVM stops in any case
_MAX_ID: Final = 256
_WITH_ERROR_CODE: Final = frozenset((DF_VECTOR, 10, 11, SS_VECTOR, GP_VECTOR, PF_VECTOR, AC_VECTOR))
_STRINGS: Final = frozenset(b"\x6c\x6d\x6e\x6f\xa4\xa5\xa6\xa7\xaa\xab\xac\xad\xae\xaf")
_COMPARING: Final = frozenset(b"\xa6\xa7\xae\xaf")

#: Opcode -> number of the interrupt that the instruction delivers itself; INT n has it in its next byte.
_INTERRUPTS: Final = {0xCC: 3, 0xCE: 4, 0xCD: None}


class SkippedError(Exception):
    """A test that becomes no vector; the message is the reason, as a phrase to count."""


def moo_vectors(
    path: str | Path, skipped: Counter[str] | None = None, revoked: frozenset[str] = frozenset()
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """The (case, expect) pairs of a MOO file, as `emufuzz.case.vectors.read_vectors` gives them.

    Args:
        path: The file.
        skipped: Counts the tests that say nothing of later processors, by reason.
        revoked: Hashes of tests that their suite has taken back.

    Raises:
        CaseError: the file is not valid; the message names it, the test, the chunk and the reason.
    """
    file = open_moo(path)
    stem = file.path.name.split(".MOO")[0].split(".moo")[0]
    for test in file.tests():
        try:
            yield vector_of_test(test, file.cpu, stem, revoked)
        except SkippedError as reason:
            if skipped is not None:
                skipped[str(reason)] += 1


def read_revoked(path: Path) -> frozenset[str]:
    """The hashes of a revocation list: one per line, `#` starts a comment.

    Raises:
        CaseError: a line is not a SHA-1 in hexadecimal, or the file cannot be read.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CaseError(f"{path}: {reason}") from None
    hashes = set()
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip().lower()
        if text and (len(text) != 40 or text.strip("0123456789abcdef")):
            raise CaseError(f"{path}:{number}: not 40 hexadecimal digits")
        hashes.add(text)
    return frozenset(hashes - {""})


def vector_of_test(
    test: MooTest, cpu: str, stem: str, revoked: frozenset[str] = frozenset()
) -> tuple[Case, dict[str, Any]]:
    """The case and `expect` of one test; `stem` is the file's name without its suffix.

    Raises:
        SkippedError: It says nothing of later processors; the message is the reason.
    """
    if test.hash and test.hash in revoked:
        raise SkippedError(REVOKED)
    family = FAMILIES.get(cpu)
    if family is None:
        raise SkippedError(f"processor {cpu} is not supported")
    reason = unfit(test, family) or _not_real(test)
    if reason:
        raise SkippedError(reason)
    parts = encoding(without_halt(test.code, family), family)
    before = _registers(test.initial.registers, family)
    name = test.name if family == KVM else f"{stem}:{test.number} {test.name}".strip()
    case = _case(test, family, name[:_MAX_ID], before)
    return case, _expect(test, family, parts, before)


def _not_real(test: MooTest) -> str:
    """Why the state is none of real mode with 64 KiB segments, or the files contradict themselves."""
    state = test.initial
    if state.unknown:
        return f"INIT has a chunk {state.unknown[0]}, which is not understood"
    registers = state.registers
    if registers.get("cr0", 0) & (cr.X86_CR0_PE | cr.X86_CR0_PG) or (
        state.wide and registers["rflags"] & X86_EFLAGS_VM
    ):
        return "not in real mode"
    place = state.address
    if place is not None and (place.base != place.selector << 4 or place.limit != _REAL_LIMIT):
        return "a segment is not one of real mode"
    if registers.get("dr7", 0) & _DR7_ENABLED:
        return "breakpoints are enabled, but their addresses are not recorded"
    if max(state.ram.keys() | test.final.ram.keys(), default=0) > _LAST_ADDRESS:
        return "memory beyond the reach of real mode"
    start = (registers["cs"] << 4) + registers["rip"]
    if any(state.ram.get(start + at, byte) != byte for at, byte in enumerate(test.code)):
        return "BYTS and RAM contradict each other"
    return ""


def _registers(given: dict[str, int], family: str) -> dict[str, int]:
    """Register values with those bits that the processor has, and ones where later ones have them."""
    values = dict(given)
    masks = {
        "rflags": (_STATUS_386 if family == I80386 else _STATUS, X86_EFLAGS_FIXED),
        "cr0": (_CR0_BITS, cr.X86_CR0_ET),
        "dr6": (_DR6_BITS, _DR6_FIXED),
        "dr7": (_DR7_BITS, _DR7_FIXED),
    }
    masks = (masks if family != KVM else {}) | dict.fromkeys(_SEGMENTS, (65535, 0))
    for name, (mask, ones) in masks.items():
        if name in values:
            values[name] = values[name] & mask | ones
    return values


def _case(test: MooTest, family: str, name: str, before: dict[str, int]) -> Case:
    return Case(
        id="".join(char if char.isprintable() else "?" for char in name),
        mode="real",
        code=without_halt(test.code, family),
        gpr=tuple(before.get(register, 0) for register in GPR_NAMES),
        rip=before["rip"],
        rflags=before["rflags"],
        system=_system(before),
        mem=_memory(test),
    )


def _system(before: dict[str, int]) -> System:
    """Real mode as after reset; GDTR, IDTR, TR and LDTR are not in the files."""
    segments = [segment_paragraph(before.get(name, 0), code=name == "cs") for name in _SEGMENTS]
    task = Segment(0, 0, _REAL_LIMIT, TYPE_TSS16_BUSY, p=1)
    return System(
        seg=(*segments, task, UNUSABLE),
        gdtr=TableRegister(0, _REAL_LIMIT),
        idtr=TableRegister(0, 0x3FF),
        cr0=before.get("cr0", cr.X86_CR0_ET),
        cr3=before.get("cr3", 0),
        xcr0=1,
        dr=(0, 0, 0, 0, 0, 0, before.get("dr6", _DR6_FIXED), before.get("dr7", _DR7_FIXED)),
    )


def _memory(test: MooTest) -> Memory:
    """The listed bytes. All memory exists there: so do the pages of every address that was used."""
    used = test.initial.ram.keys() | test.final.ram.keys()
    used |= {address for address in test.latched if address <= _LAST_ADDRESS}
    pages = {address >> PAGE_SHIFT for address in used}
    runs = _runs(test.initial.ram)
    return Memory((*((page << PAGE_SHIFT, b"") for page in sorted(pages)), *runs))


def _runs(ram: dict[int, int]) -> list[tuple[int, bytes]]:
    """Bytes by address as maximal (address, bytes) runs, in order."""
    places = sorted(ram)
    ends = [at for at, following in pairwise(places) if following != at + 1]
    starts = [following for at, following in pairwise(places) if following != at + 1]
    bounds = zip(places[:1] + starts, ends + places[-1:], strict=True)
    return [(start, bytes(ram[at] for at in range(start, end + 1))) for start, end in bounds]


def _expect(test: MooTest, family: str, parts: Encoding, before: dict[str, int]) -> dict[str, Any]:
    after = before | _registers(test.final.registers, family)
    ram = dict(test.final.ram)
    result: dict[str, Any] = {"rc": "continue"}
    if test.exception is not None and _undo_delivery(test, parts, before, after, ram):
        vector = test.exception[0]
        code = 0 if vector in _WITH_ERROR_CODE else None
        result = {"rc": "propagate_fault", "exception": {"vector": vector, "error_code": code}}
    elif family != I8086 and parts.opcode[0] != HLT:
        after["rip"] = after["rip"] - 1 & (_REAL_LIMIT if not after["rip"] else 0xFFFFFFFF)
    if result["rc"] == "continue":
        _stop_repeating(parts, before, after)
    return result | _delta(before, after) | _changed_memory(ram)


def _undo_delivery(
    test: MooTest, parts: Encoding, before: dict[str, int], after: dict[str, int], ram: dict[int, int]
) -> bool:
    """Take the delivery of a fault out of the final state; false if the instruction delivers it itself.

    Registers, and flags that are not undefined, stay as the processor left them.
    """
    number, flags_at = test.exception or (0, 0)
    stack, sp = after["ss"] << 4, after["rsp"]
    frame = [stack + (sp + at & _REAL_LIMIT) for at in range(_FRAME)]
    if frame[4] != flags_at:
        raise SkippedError("the flags of an exception are not on top of the final stack")
    known = test.initial.ram | ram
    if any(place not in known for place in frame):
        raise SkippedError("the stack frame of an exception is not recorded")
    ip, cs, flags = (known[low] | known[high] << 8 for low, high in zip(frame[::2], frame[1::2], strict=True))
    if (ip, cs) != (before["rip"] & _REAL_LIMIT, before["cs"]):
        if _delivers(parts, number):
            return False
        raise SkippedError("a trap: the instruction had ended")
    for place in frame:
        ram.pop(place, None)
    pushed = before["rflags"] & ~_STATUS | flags & _STATUS
    after["rflags"] = before["rflags"] if number == DE_VECTOR else pushed
    after["rsp"] = sp & ~_REAL_LIMIT | sp + _FRAME & _REAL_LIMIT
    after["cs"], after["rip"] = before["cs"], before["rip"]
    return True


def _delivers(parts: Encoding, number: int) -> bool:
    """Whether the instruction is one that raises this interrupt on purpose: INT3, INT n, INTO."""
    opcode = parts.opcode[0]
    wanted = parts.rest[0] if opcode == 0xCD and parts.rest else _INTERRUPTS.get(opcode)
    return len(parts.opcode) == 1 and wanted == number


def _stop_repeating(parts: Encoding, before: dict[str, int], after: dict[str, int]) -> None:
    """Go back to where KVM stops: after the last iteration, before the count is looked at again."""
    repeats = [byte for byte in parts.prefixes if byte in b"\xf2\xf3"]
    if not repeats or len(parts.opcode) != 1 or parts.opcode[0] not in _STRINGS:
        return
    mask = 0xFFFFFFFF if 0x67 in parts.prefixes else 0xFFFF
    count = before["rcx"] & mask
    if count > _NO_REPEAT_STOP:
        raise SkippedError("repeats more often than KVM does at once")
    equal = bool(after["rflags"] & X86_EFLAGS_ZF)
    ended = parts.opcode[0] in _COMPARING and equal != (repeats[-1] == 0xF3)
    if count and not after["rcx"] & mask and not ended:
        after["rip"] = before["rip"]
        after["rflags"] |= X86_EFLAGS_RF


def _delta(before: dict[str, int], after: dict[str, int]) -> dict[str, Any]:
    """Registers that changed, as `expect` has them."""
    changed = {name: hex(value) for name, value in after.items() if value != before[name]}
    gpr = {name: changed[name] for name in GPR_NAMES if name in changed}
    seg = {
        name: {"sel": hex(after[name]), "base": hex(after[name] << 4)}
        for name in _SEGMENTS
        if name in changed
    }
    dr = {name: changed[name] for name in ("dr6", "dr7") if name in changed}
    parts = {"gpr": gpr, "seg": seg, "dr": dr}
    plain = {name: changed[name] for name in ("rip", "rflags", "cr0", "cr3") if name in changed}
    return {name: value for name, value in parts.items() if value} | plain


def _changed_memory(ram: dict[int, int]) -> dict[str, Any]:
    runs = [{"addr": hex(address), "data": data.hex()} for address, data in _runs(ram)]
    return {"mem": runs} if runs else {}

"""Which tests of MOO files cannot speak for the processors that KVM runs on, and why (docs/moo.md).

An old processor is right about most instructions. Left out are those that a later one executes
differently, and those whose result the files do not record. What the SDM leaves undefined is no
reason: comparison knows that (emufuzz.arch.effects).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from emufuzz.case.moo import MooTest

I8086: Final = "8086"
I80286: Final = "80286"
I80386: Final = "80386"
#: What emufuzz's own emulator made of a case: no old processor, so that none of their limits apply.
KVM: Final = "KVM"

#: Processor in the file's header -> the family whose rules hold for it.
FAMILIES: Final = {
    "88": I8086,
    "8088": I8086,
    "8086": I8086,
    "286": I80286,
    "C286": I80286,
    "386": I80386,
    "386E": I80386,
    "KVM": KVM,
}

HLT: Final = 0xF4
_PREFIXES_8086: Final = frozenset(b"\x26\x2e\x36\x3e\xf0\xf2\xf3")
_PREFIXES_386: Final = _PREFIXES_8086 | frozenset(b"\x64\x65\x66\x67")
_LOCK: Final = 0xF0
_OPERAND_SIZE: Final = 0x66
_LONGEST_286: Final = 10  # bytes; longer is #UD
_MEGABYTE: Final = 1 << 20
_SEGMENT: Final = 1 << 16
_GP: Final = 13


class Encoding(NamedTuple):
    """An instruction taken apart as far as rules need it: prefixes, opcode (`0f` and the next), ModRM."""

    prefixes: bytes
    opcode: bytes
    rest: bytes

    @property
    def keys(self) -> tuple[str, str]:
        """The names that tables may have for it: `f6` and, with ModRM.reg, `f6/6`."""
        name = self.opcode.hex()
        return name, f"{name}/{self.rest[0] >> 3 & 7}" if self.rest else name


def encoding(code: bytes, family: str) -> Encoding:
    """Take an instruction apart; 64 to 67 are prefixes since the 80386, 0f is an escape since the 80286."""
    known = _PREFIXES_386 if family in (I80386, KVM) else _PREFIXES_8086
    start = next((at for at, byte in enumerate(code) if byte not in known), len(code))
    size = 2 if code[start : start + 1] == b"\x0f" and family != I8086 else 1
    return Encoding(code[:start], code[start : start + size], code[start + size :])


def without_halt(code: bytes, family: str) -> bytes:
    """The instruction without the HLT that the 286 and 386 suites put behind it."""
    if family == I8086 or len(code) == 1 or code[-1] != HLT:
        return code
    return code[:-1] if encoding(code[:-1], family).opcode else code


def _of(reason: str, names: Iterable[str]) -> dict[str, str]:
    return dict.fromkeys(names, reason)


def _groups(opcode: str, numbers: Iterable[int]) -> list[str]:
    return [f"{opcode}/{reg}" for reg in numbers]


# fmt: off
_ALWAYS: Final[Mapping[str, str]] = {
    **_of("sets an interrupt shadow, which is not recorded", ("17", "8e/2", "fb")),
    **_of("transfers a table register, which is not recorded", _groups("0f01", range(4))),
    **_of("needs a coprocessor, whose state is not recorded",
          ("9b", *(f"{opcode:02x}" for opcode in range(0xD8, 0xE0)))),
    **_of("is for in-circuit emulators", ("f1",)),
}
_ONLY: Final[Mapping[str, Mapping[str, str]]] = {
    I8086: {
        **_of("is another instruction on an 8086",
              ("0f", "c0", "c1", "c8", "c9", *(f"{opcode:02x}" for opcode in range(0x60, 0x70)),
               *_groups("d0", (6,)), *_groups("d1", (6,)))),
        **_of("has operands that only an 8086 accepts",
              (*_groups("8c", range(4, 8)), *_groups("8e", (1, 4, 5, 6, 7)), *_groups("8f", range(1, 8)),
               *_groups("c6", range(1, 8)), *_groups("c7", range(1, 8)),
               *_groups("fe", range(2, 8)), "ff/7")),
        **_of("stores SP as it is after the push on an 8086", ("54",)),
        **_of("takes shift counts of 8 bits on an 8086", ("d2", "d3")),
        **_of("FLAGS of an 8086 have ones in bits 12 to 15", ("9c", "9d", "cc", "cd", "ce", "cf")),
        **_of("division errors of an 8086 are interrupts that the files do not mark",
              ("d4", *_groups("f6", (6, 7)), *_groups("f7", (6, 7)))),
    },
    I80286: {
        **_of("FLAGS of an 80286 in real mode do not take IOPL and NT", ("9d", "cf")),
        **_of("transfers the machine status word, which is not recorded", _groups("0f01", (4, 6))),
        **_of("is a prefix since the 80386", ("64", "65", "66", "67")),
    },
    I80386: {
        **_of("transfers CR0, of which a 386 has other bits", _groups("0f01", (4,))),
        **_of("transfers control, debug or test registers, of which a 386 has other bits",
              (f"0f{opcode:02x}" for opcode in range(0x20, 0x28))),
    },
}
#: With an operand-size prefix, on a 386.
_WIDE: Final[Mapping[str, str]] = {
    **_of("EFLAGS of a 386 has no bits 18 to 31", ("9c", "9d", "cf")),
    **_of("the upper half of a stored segment register depends on the processor",
          ("06", "0e", "16", "1e", "0fa0", "0fa8", "8c")),
}
# fmt: on


def unfit(test: MooTest, family: str) -> str:
    """Why a test says nothing of later processors, as a phrase; empty if it does."""
    code = without_halt(test.code, family)
    parts = encoding(code, family)
    if not parts.opcode:
        return "the instruction has prefixes only"
    for key in parts.keys:
        reason = _ALWAYS.get(key) or _ONLY.get(family, {}).get(key)
        if not reason and family != KVM and _OPERAND_SIZE in parts.prefixes:
            reason = _WIDE.get(key)
        if reason:
            return reason
    return _RULES[family](test, code, parts) if family in _RULES else ""


def _on_8086(test: MooTest, _: bytes, parts: Encoding) -> str:
    if _LOCK in parts.prefixes:
        return "LOCK is legal everywhere before the 80386"
    bases = [test.initial.registers[name] << 4 for name in ("es", "cs", "ss", "ds")]
    touched = test.initial.ram.keys() | test.final.ram.keys()
    lowest = min(touched, default=_MEGABYTE)
    if any(base + _SEGMENT - _MEGABYTE > lowest for base in bases):
        return "may wrap at 1 MiB, as only an 8086 does"
    if any((base + _SEGMENT - 1) % _MEGABYTE in touched and base in touched for base in bases):
        return "may wrap at the end of a segment, as only an 8086 does"
    return ""


def _on_80286(test: MooTest, code: bytes, parts: Encoding) -> str:
    if _LOCK in parts.prefixes:
        return "LOCK is legal everywhere before the 80386"
    if len(code) > _LONGEST_286:
        return "instructions of an 80286 have at most 10 bytes"
    if test.exception is not None and test.exception[0] == _GP:
        return "an 80286 in real mode raises 13 for the stack, too"
    return ""


def _on_80386(test: MooTest, _: bytes, parts: Encoding) -> str:
    """The memory operand that an EA32 chunk announces has its ModRM byte next, and SIB then."""
    if test.initial.address is None or 0x67 not in parts.prefixes or len(parts.rest) < 2:
        return ""
    modrm, sib = parts.rest[:2]
    if modrm & 7 == 4 and modrm < 0xC0 and sib >> 3 & 7 == 4 and sib >> 6:
        return "a scale without an index is undefined on a 386"
    return ""


_RULES: Final = {I8086: _on_8086, I80286: _on_80286, I80386: _on_80386}

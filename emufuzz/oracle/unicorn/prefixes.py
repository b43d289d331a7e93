"""What the prefixes of an instruction say, as far as the oracle must know before it runs.

KVM's stopping points of REP: x86_emulate_instruction repeats a REP string instruction until RCX is
a multiple of 1024, then returns to the guest, which stays at the instruction with RFLAGS.RF set.
Unicorn counts iterations as instructions, so it can be stopped at the same place, a legal point
of interruption (SDM Vol. 2B REP).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_STRING_OPCODES: Final = frozenset((*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0)))
_COMPARING: Final = frozenset((0xA6, 0xA7, 0xAE, 0xAF))
_PREFIXES: Final = bytes((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_PREFIXES_64: Final = _PREFIXES + bytes(range(0x40, 0x50))
_BIT_OPCODES: Final = frozenset((0xA3, 0xAB, 0xB3, 0xBB))
_ROUND: Final = 1024

#: Unicorn would end the process.
GAP_ABORT: Final = "unicorn-lock-bit-register"
#: Breakpoints would outlive the case.
GAP_DEBUG_REGISTER: Final = "unicorn-breakpoints"


_LOCKED: Final = rb"\xf0[\x26\x2e\x36\x3e\x64-\x67\xf0\xf2\xf3\x40-\x4f]*\x0f"
_ABORTS: Final = re.compile(_LOCKED + rb"(?:[\xa3\xab\xb3\xbb][\xc0-\xff]|\xba[\xe0-\xff])")

#: Bytes without which an instruction needs no closer look before it runs: LOCK BT and its kin, MOVBE, and
#: what accesses control, debug and model-specific registers.
may_be_special: Final = re.compile(
    _LOCKED + rb"[\xa3\xab\xb3\xba\xbb]|\x0f(?:[\x01\x20\x22\x23\x30\x32]|\x38[\xf0\xf1])"
).search


@dataclass(frozen=True, slots=True)
class RepString:
    """A REP string instruction.

    Attributes:
        comparing: CMPS or SCAS, which ZF can end early.
        count_mask: Which bits of RCX count, by address size.
    """

    comparing: bool
    count_mask: int

    def iterations(self, rcx: int) -> int:
        """Iterations up to KVM's stopping point, at most 1024; 1 even if there is nothing to do."""
        if not rcx & self.count_mask:
            return 1
        return rcx % _ROUND or _ROUND


def split_prefixes(code: bytes, mode: str) -> tuple[bytes, bytes]:
    """The prefixes of an instruction (REX included) and the rest of the code."""
    rest = code.lstrip(_PREFIXES_64 if mode == "prot64" else _PREFIXES)
    return code[: len(code) - len(rest)], rest


def rep_string(code: bytes, mode: str, cs_db: int) -> RepString | None:
    """What `code` repeats, or None if it is no REP string instruction."""
    prefixes, rest = split_prefixes(code, mode)
    if not rest or rest[0] not in _STRING_OPCODES or not (0xF3 in prefixes or 0xF2 in prefixes):
        return None
    short = 0x67 in prefixes
    if mode == "prot64":
        count_mask = 0xFFFFFFFF if short else 0xFFFFFFFFFFFFFFFF
    else:
        count_mask = 0xFFFFFFFF if bool(cs_db) != short else 0xFFFF
    return RepString(rest[0] in _COMPARING, count_mask)


def unicorn_must_not_run(code: bytes, mode: str) -> str:
    """The id of the gap because of which Unicorn is not asked at all, or an empty string.

    LOCK BT, BTS, BTR and BTC of a register make its translator end the process. MOV to a debug
    register sets breakpoints that no restored state takes back, and a later run may never return.
    """
    if b"\xf0" not in code and b"\x0f\x23" not in code:
        return ""
    prefixes, rest = split_prefixes(code, mode)
    if rest[:2] == b"\x0f\x23":
        return GAP_DEBUG_REGISTER
    if 0xF0 not in prefixes or len(rest) < 3 or rest[0] != 0x0F or rest[2] < 0xC0:
        return ""
    bits = rest[1] in _BIT_OPCODES or (rest[1] == 0xBA and rest[2] & 0x38 >= 0x20)
    return GAP_ABORT if bits else ""


def aborts_ahead(code: bytes) -> bool:
    """Whether one of the bytes behind the first may begin a LOCK BT, BTS, BTR or BTC of a register.

    Unicorn translates the block behind a branch that is not taken before it stops, and ends there, too.
    """
    return _ABORTS.search(code, 1) is not None


def makes_shadow(code: bytes, mode: str) -> bool:
    """POP SS, MOV SS and STI, which end a translation by themselves."""
    _, rest = split_prefixes(code, mode)
    return rest[:1] in {b"\x17", b"\xfb"} or (
        rest[:1] == b"\x8e" and rest[1:2] != b"" and rest[1] & 0x38 == 0x10
    )

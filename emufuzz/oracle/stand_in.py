"""Instructions that KVM takes for other ones: the other one stands in, and everything is compared with it.

Such a departure needs no rule of its own: an oracle runs the instruction that KVM believes in, of the same
length, and the subject must have done all of what that does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from emufuzz.arch.regs import VCPU_SREG_SS
from emufuzz.case.model import Case
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.operands import default_bits, prefix_facts

_FS_GS: Final = frozenset((0x64, 0x65))
_IGNORED_SEGMENTS: Final = frozenset((0x26, 0x2E, 0x36, 0x3E))
_LEGACY: Final = frozenset((*_FS_GS, *_IGNORED_SEGMENTS, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_MANDATORY: Final = frozenset((0x66, 0xF2, 0xF3))
_SHORT: Final = 16
_SS_PREFIX: Final = 0x36
_DS_PREFIX: Final = 0x3E
_MOV_TO_MEMORY: Final = 0x89
_MOVNTI: Final = b"\x0f\xc3"

#: The code that KVM takes the case's code for, from the prefixes on; None if it takes it for what it is.
StandIn = Callable[[Case], "bytes | None"]


def without_override(case: Case) -> bytes | None:
    """64-bit mode: an ES, CS, SS or DS prefix behind FS or GS, which it cancels for KVM."""
    facts = prefix_facts(case)
    if case.mode != "prot64" or _FS_GS.isdisjoint(facts.segments):
        return None
    if facts.segments[-1] not in _IGNORED_SEGMENTS:
        return None
    prefixes = bytes(_DS_PREFIX if byte in _FS_GS else byte for byte in case.code[: facts.length])
    return prefixes + case.code[facts.length :]


def plain_store(case: Case) -> bytes | None:
    """MOVNTI with 66, F2 or F3: a store of 32 bits, or of 64 with REX.W, as MOV makes it."""
    length = prefix_facts(case).length
    rest = case.code[length:]
    if not rest.startswith(_MOVNTI) or _MANDATORY.isdisjoint(case.code[:length]):
        return None
    move = bytes((_MOV_TO_MEMORY,)) + rest[len(_MOVNTI) :]
    size = b"\x66" if default_bits(case) == _SHORT else b""
    return _filled(case, _kept(case), size, move)


def without_mandatory(case: Case) -> bytes | None:
    """VMCALL, FXSAVE, FXRSTOR with 66, F2 or F3, which KVM ignores."""
    length = prefix_facts(case).length
    if _MANDATORY.isdisjoint(case.code[:length]):
        return None
    return _filled(case, _kept(case), b"", case.code[length:])


def _kept(case: Case) -> bytes:
    """The prefixes without 66, F2 and F3, and without a REX that is not directly before the opcode."""
    prefixes = case.code[: prefix_facts(case).length]
    rex = prefixes[-1:] if prefix_facts(case).rex else b""
    return bytes(byte for byte in prefixes if byte in _LEGACY and byte not in _MANDATORY) + rex


def _filled(case: Case, kept: bytes, more: bytes, rest: bytes) -> bytes:
    """Code as long as the case's; overrides of the usual segment in front make up for what is missing."""
    bare = more + kept + rest
    stack = any(
        access.segment == VCPU_SREG_SS
        for access in CaseInstruction(msgspec.structs.replace(case, code=bare)).accesses
    )
    return bytes((_SS_PREFIX if stack else _DS_PREFIX,)) * (len(case.code) - len(bare)) + bare

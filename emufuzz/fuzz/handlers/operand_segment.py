"""What prefixes say of a generated instruction: its segment, its address size, REP."""

from __future__ import annotations

from itertools import takewhile
from typing import Final

from emufuzz.arch.regs import VCPU_SREG_DS
from emufuzz.fuzz.handlers.pair import Pair

_SEGMENTS: Final = {0x26: 0, 0x2E: 1, 0x36: 2, 0x3E: 3, 0x64: 4, 0x65: 5}
_REPEATS: Final = (0xF2, 0xF3)
_PREFIXES: Final = frozenset({*_SEGMENTS, *_REPEATS, 0x66, 0x67, 0xF0})
_MASK32: Final = 0xFFFFFFFF
_EXPAND_DOWN, _CODE = 4, 8


def _prefixes(pair: Pair) -> list[int]:
    return list(takewhile(_PREFIXES.__contains__, pair.case.code))


def rep_prefix(pair: Pair) -> bool:
    """REP or REPNE is among the prefixes."""
    return any(prefix in _REPEATS for prefix in _prefixes(pair))


def address_size(pair: Pair) -> int:
    """Bytes of an address; 67 is not among the prefixes that are generated."""
    if pair.case.mode == "prot64":
        return 8
    return 4 if pair.case.system.seg[1].db else 2


def operand_refused(pair: Pair) -> bool:
    """The segment of INVLPG's operand, DS or the prefix's, does not hold the byte (KVM: __linearize)."""
    named = [_SEGMENTS[prefix] for prefix in _prefixes(pair) if prefix in _SEGMENTS]
    segment = pair.case.system.seg[named[-1] if named else VCPU_SREG_DS]
    if not segment.p:
        return True
    offset = pair.qualification - segment.base & _MASK32
    if segment.type & _CODE == 0 and segment.type & _EXPAND_DOWN:
        return offset <= segment.limit
    return offset > segment.limit

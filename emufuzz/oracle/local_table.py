"""LLDT of a selector whose table is the LDT: whether the subject did exactly what KVM does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from emufuzz.arch.descriptors import DescStruct
from emufuzz.arch.exceptions import GP_VECTOR, NP_VECTOR, PF_VECTOR
from emufuzz.arch.regs import VCPU_SREG_LDTR
from emufuzz.arch.rflags import X86_EFLAGS_RF
from emufuzz.case.model import PAGE_MASK, Case, Outcome, Segment
from emufuzz.oracle.operands import changed_bytes
from emufuzz.oracle.rules.view import MASK32, MASK64, View

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

_LOCAL: Final = 4  # TI of a selector
_INDEX: Final = 0xFFF8
_RPL: Final = 3
_LDT: Final = 2
_HALF: Final = 8  # bytes of a descriptor, or of half of one in IA-32e mode


def local_table(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """A processor says #GP(selector); KVM reads the descriptor from the LDT, and may load it."""
    ours, theirs = subject.exception, oracle.exception
    if theirs is None or theirs[0] != GP_VECTOR or not (theirs[1] or 0) & _LOCAL:
        return False
    selector = theirs[1] or 0
    view = View(case)
    start = view.system.seg[VCPU_SREG_LDTR].base + (selector & _INDEX) & (MASK64 if view.ia32e else MASK32)
    if ours is not None and ours[0] == PF_VECTOR:
        return ours[1] == 0 and ours[2] in _ends(start, 2 * _HALF if view.ia32e else _HALF)
    low = view.read(start, _HALF)
    if low is None:
        return False
    desc = DescStruct.unpack(low)
    if desc.s or desc.type != _LDT:
        return False
    if not desc.p:
        return ours == (NP_VECTOR, selector, None)
    high = view.number(start + _HALF, 4) if view.ia32e else 0
    return ours is None and high is not None and _loaded(case, subject, selector, desc, high)


def _ends(start: int, size: int) -> set[int]:
    """Where reads of a descriptor, eight bytes at a time, may be #PF."""
    firsts = set(range(start, start + size, _HALF))
    return firsts | {first + _HALF - 1 & ~PAGE_MASK for first in firsts if first & PAGE_MASK > PAGE_MASK - 7}


def _loaded(case: Case, subject: Outcome, selector: int, desc: DescStruct, high: int) -> bool:
    """LDTR has what the descriptor says; nothing else but RIP is changed."""
    before, after = list(case.system.seg), list(subject.system.seg)
    ldtr: Segment = after.pop(VCPU_SREG_LDTR)
    before.pop(VCPU_SREG_LDTR)
    return (
        before == after
        and ldtr.sel & ~_RPL == selector
        and (ldtr.base, ldtr.limit) == (desc.base | high << 32, desc.limit_scaled)
        and subject.rip == case.rip + (subject.length or 0)
        and subject.rflags == case.rflags & ~X86_EFLAGS_RF
        and tuple(subject.gpr) == case.gpr
        and not changed_bytes(case, subject)
    )

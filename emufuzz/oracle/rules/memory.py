"""Whether the instruction's data accesses may happen: segments, canonical form, alignment, pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from iced_x86 import EncodingKind, MemorySize, Mnemonic

from emufuzz.arch.cr import X86_CR0_AM
from emufuzz.arch.descriptors import DESC_CODE, DESC_EXPAND_DOWN
from emufuzz.arch.exceptions import AC_VECTOR, GP_VECTOR, PF_VECTOR, PFERR_USER, PFERR_WRITE, SS_VECTOR
from emufuzz.arch.regs import VCPU_SREG_SS
from emufuzz.arch.rflags import X86_EFLAGS_AC
from emufuzz.case.model import PAGE_MASK, Fault
from emufuzz.oracle.rules.decoded import Decoded
from emufuzz.oracle.rules.rule import ACCESS, FAULT, Rule
from emufuzz.oracle.rules.undefined import is_sse
from emufuzz.oracle.rules.view import MASK32, MASK64, Access, View

_GP0: Final = (GP_VECTOR, 0, None)
_SS0: Final = (SS_VECTOR, 0, None)
_AC0: Final = (AC_VECTOR, 0, None)

#: Beside the SSE instructions with 16-byte operands, what must be aligned so.
_ALIGNED: Final = frozenset(
    (Mnemonic.FXSAVE, Mnemonic.FXRSTOR, Mnemonic.FXSAVE64, Mnemonic.FXRSTOR64, Mnemonic.CMPXCHG16B)
)
#: SSE instructions that take any address (SDM Vol. 1 10.4.1.1, Vol. 2 exceptions type 4).
_UNALIGNED: Final = frozenset(
    (Mnemonic.MOVUPS, Mnemonic.MOVUPD, Mnemonic.MOVDQU, Mnemonic.LDDQU, Mnemonic.PCMPESTRI,
     Mnemonic.PCMPESTRM, Mnemonic.PCMPISTRI, Mnemonic.PCMPISTRM, Mnemonic.MASKMOVDQU)
)  # fmt: skip
#: Operands that are aligned on their own size.
_SCALARS: Final = frozenset(
    (MemorySize.UINT16, MemorySize.INT16, MemorySize.UINT32, MemorySize.INT32, MemorySize.UINT64,
     MemorySize.INT64)
)  # fmt: skip
#: Instructions with conditional accesses, or with accesses whose order or extent iced does not tell.
_OPAQUE: Final = frozenset(
    (Mnemonic.ARPL, Mnemonic.VMCALL, Mnemonic.VMMCALL, Mnemonic.VMGEXIT,
     Mnemonic.ENTER, Mnemonic.BOUND, Mnemonic.MASKMOVQ, Mnemonic.MASKMOVDQU, Mnemonic.IRET, Mnemonic.IRETD,
     Mnemonic.IRETQ, Mnemonic.RSM, Mnemonic.LAR, Mnemonic.LSL, Mnemonic.VERR, Mnemonic.VERW)
)  # fmt: skip
_PUSH_SEGMENT: Final = frozenset((0x06, 0x0E, 0x16, 0x1E))


def opaque(insn: Decoded) -> bool:
    """Which accesses the instruction makes is not modelled here."""
    if insn.mnemonic in _OPAQUE or insn.size_unknown:
        return True
    first, second = insn.opcode[0], insn.opcode[1]
    # Processors differ in how many bytes PUSH Sreg writes, and in what PREFETCH and CLFLUSH look at.
    return first in _PUSH_SEGMENT or (first == 0x0F and second in {0xA0, 0xA8, 0x0D, 0x18})


def _touches_memory(insn: Decoded) -> bool:
    return bool(insn.references) and not opaque(insn)


def _outside_long(insn: Decoded) -> bool:
    return not insn.long and _touches_memory(insn)


def _in_long(insn: Decoded) -> bool:
    return insn.long and _touches_memory(insn)


def _aligned(insn: Decoded) -> bool:
    """16-byte operands of legacy SSE instructions, but for those that say otherwise."""
    if not _touches_memory(insn):
        return False
    legacy = insn.lax.encoding == EncodingKind.LEGACY and is_sse(insn)
    return insn.mnemonic in _ALIGNED or (legacy and insn.mnemonic not in _UNALIGNED)


def segment_fault(access: Access) -> Fault:
    """#SS for the stack segment, #GP for the others."""
    return _SS0 if access.reference.segment == VCPU_SREG_SS else _GP0


def _first(forbidden: Callable[[View, Access], bool]) -> Callable[[View], Fault | None]:
    """The fault of the first certain access that a condition forbids."""

    def due(view: View) -> Fault | None:
        for access in view.accesses:
            if access.reference.certain and forbidden(view, access):
                return segment_fault(access)
        return None

    return due


def _unusable(view: View, access: Access) -> bool:
    return view.protected and not view.system.seg[access.reference.segment].p


def _type(view: View, access: Access) -> bool:
    seg = view.system.seg[access.reference.segment]
    return view.protected and bool(seg.p) and view.wrong_type(access)


def _expands_down(view: View, access: Access) -> bool:
    seg = view.system.seg[access.reference.segment]
    return not seg.type & DESC_CODE and bool(seg.type & DESC_EXPAND_DOWN)


def _limit(view: View, access: Access) -> bool:
    seg = view.system.seg[access.reference.segment]
    return bool(seg.p or not view.protected) and not _expands_down(view, access) and view.outside(access)


def _expand_down_limit(view: View, access: Access) -> bool:
    seg = view.system.seg[access.reference.segment]
    return bool(seg.p) and _expands_down(view, access) and view.outside(access)


def _noncanonical(view: View) -> Fault | None:
    for access in view.accesses:
        last = access.linear + max(access.size, 1) - 1 & MASK64
        if access.reference.certain and not (view.canonical(access.linear) and view.canonical(last)):
            # The SDM ignores overrides of the null segments, yet is silent on whose fault it is then.
            return None if view.insn.null_override else segment_fault(access)
    return None


def _sixteen(view: View) -> Fault | None:
    """Beside a limit that forbids the access, too: which of the two is noticed is left open."""
    for access in view.accesses:
        if access.reference.explicit and access.size >= 16 and access.linear & 15:
            return _GP0
    return None


def _alignment(view: View) -> Fault | None:
    if view.cpl != 3 or not view.system.cr0 & X86_CR0_AM or not view.case.rflags & X86_EFLAGS_AC:
        return None
    for access in view.accesses:
        plain = not access.reference.explicit or view.insn.lax.memory_size in _SCALARS
        aligned = not access.linear & access.size - 1 or access.size not in {2, 4, 8}
        if plain and not aligned and access.reference.certain and view.segment_allows(access):
            return _AC0
    return None


def page_faults(view: View) -> tuple[Fault, ...]:
    """The #PF of every certain access to a page that the case does not have."""
    found = []
    for access in view.accesses:
        if access.reference.certain and view.segment_allows(access) and not view.wraps(access):
            fault = _page_fault(view, access)
            if fault is not None:
                found.append(fault)
    return tuple(found)


def _page_fault(view: View, access: Access) -> Fault | None:
    mask = MASK64 if view.long else MASK32
    code = (PFERR_WRITE if access.reference.write else 0) | (PFERR_USER if view.cpl == 3 else 0)
    if view.absent(access.linear):
        return PF_VECTOR, code, access.linear
    last = access.linear + max(access.size, 1) - 1 & mask
    if view.absent(last):
        return PF_VECTOR, code, last & ~PAGE_MASK
    return None


def _page(view: View) -> Fault | None:
    if not view.flat:
        return None
    return next(iter(page_faults(view)), None)


# fmt: off
RULES: Final = (
    Rule("gp-null-segment", FAULT, "SDM Vol. 3A 5.4.1",
         "a segment register with a null selector cannot be used",
         None, _outside_long, ACCESS, None, _first(_unusable)),
    Rule("gp-segment-type", FAULT, "SDM Vol. 3A 5.5", "the type of the segment allows the access",
         None, _outside_long, ACCESS, None, _first(_type)),
    Rule("gp-segment-limit", FAULT, "SDM Vol. 3A 5.3", "the access lies within the limit of the segment",
         None, _outside_long, ACCESS, None, _first(_limit)),
    Rule("gp-expand-down-limit", FAULT, "SDM Vol. 3A 5.3", "in an expand-down segment the limit is below",
         None, _outside_long, ACCESS, None, _first(_expand_down_limit)),
    Rule("gp-canonical", FAULT, "SDM Vol. 1 3.3.7.1", "every byte of an access has a canonical address",
         None, _in_long, ACCESS, None, _noncanonical),
    Rule("gp-alignment-16", FAULT, "SDM Vol. 2B MOVAPS", "the 16-byte operand is aligned",
         None, _aligned, ACCESS, None, _sixteen),
    Rule("ac-alignment", FAULT, "SDM Vol. 3A 6.15, #AC",
         "at CPL 3 with CR0.AM and RFLAGS.AC accesses are aligned",
         None, _touches_memory, ACCESS, None, _alignment),
    Rule("pf-data", FAULT, "SDM Vol. 3A 4.7", "an access to an absent page is #PF",
         None, _touches_memory, ACCESS, None, _page),
)
# fmt: on

"""Faults on fetching the instruction (SDM Vol. 3A Table 6-2, class 7)."""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import EFER_NX, X86_CR4_SMEP
from emufuzz.arch.exceptions import GP_VECTOR, PF_VECTOR, PFERR_FETCH, PFERR_USER
from emufuzz.case.model import Fault, code_address
from emufuzz.oracle.rules.decoded import MAX_INSTRUCTION
from emufuzz.oracle.rules.rule import FAULT, FETCH, Rule
from emufuzz.oracle.rules.view import MASK32, MASK64, View, impossible

_GP0: Final = (GP_VECTOR, 0, None)


def _length(view: View) -> int:
    """Bytes that the processor must fetch; 1 if it cannot be told."""
    if view.insn.truncated:
        return len(view.insn.code) + 1
    return view.insn.length if view.insn.known else 1


def _limit(view: View) -> bool:
    if impossible(view.cs):
        return False
    return view.case.rip + _length(view) - 1 > view.cs.limit


def _noncanonical(view: View) -> bool:
    if not view.long:
        return False
    last = view.case.rip + _length(view) - 1 & MASK64
    return not (view.canonical(view.case.rip) and view.canonical(last))


def _page(view: View) -> Fault | None:
    """#PF at the first byte that is missing; the case's own code has pages, so it lies behind that."""
    start, mask = code_address(view.case), MASK64 if view.long else MASK32
    linear = start + len(view.insn.code) & mask
    if not view.insn.truncated:
        if start + _length(view) - 1 <= mask:
            return None
        linear = 0  # the instruction goes on at the start of the address space
    elif not view.long and view.case.rip + len(view.insn.code) > view.cs.limit:
        return None
    return (PF_VECTOR, fetch_error(view), linear) if view.absent(linear) else None


def fetch_error(view: View) -> int:
    """Error code of a #PF on a fetch from a page that is not there (SDM Vol. 3A 4.7)."""
    execute = view.system.efer & EFER_NX or view.system.cr4 & X86_CR4_SMEP
    return (PFERR_USER if view.cpl == 3 else 0) | (PFERR_FETCH if execute else 0)


def may_not_arrive(view: View) -> bool:
    """Of an opcode of unknown length some byte, up to 15, cannot be fetched."""
    start, mask = code_address(view.case), MASK64 if view.long else MASK32
    last = start + MAX_INSTRUCTION - 1
    if last > mask or _unreachable(view, start) or _unreachable(view, last & mask):
        return True
    if view.long:
        return not (view.canonical(start) and view.canonical(last & mask))
    return view.case.rip + MAX_INSTRUCTION - 1 > view.cs.limit


def _unreachable(view: View, linear: int) -> bool:
    """Nothing is there, or page tables do not lead to memory."""
    return view.absent(linear) or (not view.flat and view.read(linear, 1) is None)


# fmt: off
RULES: Final = (
    Rule("gp-fetch-limit", FAULT, "SDM Vol. 3A 5.3", "the instruction lies within the limit of CS",
         None, lambda insn: not insn.long, FETCH, _GP0, _limit),
    Rule("gp-fetch-canonical", FAULT, "SDM Vol. 1 3.3.7.1",
         "instructions are fetched from canonical addresses",
         None, lambda insn: insn.long, FETCH, _GP0, _noncanonical),
    Rule("pf-fetch", FAULT, "SDM Vol. 3A 4.7", "a fetch from an absent page is #PF at its first byte there",
         None, None, FETCH, None, _page),
)
# fmt: on

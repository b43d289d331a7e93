"""One case on its way through a child."""

from __future__ import annotations

from typing import Final

import msgspec

from emufuzz.arch.regs import VCPU_REGS_RCX
from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, Case
from emufuzz.oracle.native.layout import USER_END
from emufuzz.oracle.native.plan import Plan, plan_of
from emufuzz.oracle.native.space import Pages, Setup

_END32: Final = 1 << 32
_PAGES32: Final = _END32 >> PAGE_SHIFT
_USER_PAGES: Final = USER_END >> PAGE_SHIFT
_MAX_INSTRUCTION: Final = 15


class Run(msgspec.Struct, frozen=True, gc=False):
    """A case, and what is loaded for it.

    Attributes:
        place: Its place in the batch.
        case: The case.
        plan: How it is run.
        laid: The bytes that are laid at `address`.
        address: Linear address of its code.
        flags: RFLAGS with which it runs; TF if it is single-stepped.
        left: Iterations that a REP string instruction is not given: KVM stops before them.
        code_pages: Numbers of the pages in which the code lies.
        behind: Number of the page that the instruction could run on into; -1 if it cannot.
    """

    place: int
    case: Case
    plan: Plan
    laid: bytes
    address: int
    flags: int
    left: int
    code_pages: tuple[int, ...]
    behind: int


def make_run(place: int, case: Case, setup: Setup, pages: Pages, own_flags: int) -> Run:
    """How a case is run.

    Raises:
        UnsupportedCaseError: its code is too long, or where user code cannot lie.
    """
    code = case.code
    plan = plan_of(code, case.mode, setup.code_bits)
    address = setup.code_base + case.rip
    if setup.code_bits != 64:
        address &= _END32 - 1
    first, last = address >> PAGE_SHIFT, address + len(code) - 1 >> PAGE_SHIFT
    code_pages = (first,) if first == last else (first, last)
    if first < pages.lowest or last >= _USER_PAGES or (setup.code_bits != 64 and last >= _PAGES32):
        raise UnsupportedCaseError(f"rip: user code cannot lie at {address:#x}")
    laid = plan.laid
    if len(laid) > len(code) and not (address + len(code)) & PAGE_MASK and last + 1 not in pages.mapped:
        laid = code  # the absent page behind it ends the run as well
    flags = case.rflags & (own_flags | X86_EFLAGS_RF) & ~setup.hidden_flags
    if plan.step or (case.rflags & X86_EFLAGS_TF and plan.rep is None):
        flags |= X86_EFLAGS_TF
    left = 0
    if plan.rep is not None:
        rcx = case.gpr[VCPU_REGS_RCX]
        left = max(0, (rcx & plan.rep.count_mask) - plan.rep.iterations(rcx))
    behind = address + _MAX_INSTRUCTION - 1 >> PAGE_SHIFT
    if behind == last or behind in pages.mapped:
        behind = -1
    return Run(place, case, plan, laid, address, flags, left, code_pages, behind)

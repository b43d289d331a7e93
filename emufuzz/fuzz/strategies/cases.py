"""Strategies for whole cases: on flat memory, and with page tables."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final, TypeAlias

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from emufuzz.arch import cr
from emufuzz.arch.modes import MODES
from emufuzz.case.build import PAGE_TABLES, paging_kind
from emufuzz.case.model import Case, Memory
from emufuzz.case.paging import identity_tables
from emufuzz.fuzz.strategies.instructions import instructions
from emufuzz.fuzz.strategies.states import states

Draw: TypeAlias = Callable[[SearchStrategy[Any]], Any]

#: HLT ends each case's code: nothing behind the instruction runs, whatever an engine translates.
HLT: Final = b"\xf4"


def cases(
    mode: str | None = None, leaves: Collection[str] | None = None, cpl: int | None = None
) -> SearchStrategy[Case]:
    """Valid cases on flat memory: one instruction, HLT behind it.

    Args:
        mode: One of emufuzz.arch.modes.MODES; None for any.
        leaves: As of `instructions`.
        cpl: Privilege level; None for any that the mode has.

    Raises:
        ValueError: As from `instructions` and `states`.
    """
    if mode is not None:
        return _cases(states(mode, cpl), {mode: instructions(mode, leaves)})
    by_mode = {}
    for each in MODES:
        try:
            states(each, cpl)
            by_mode[each] = instructions(each, leaves)
        except ValueError:
            continue
    if not by_mode:
        raise ValueError("no mode has such a CPL and one of the leaves")
    usable = st.sampled_from(sorted(by_mode, key=MODES.index)).flatmap(lambda one: states(one, cpl))
    return _cases(usable, by_mode)


@st.composite
def _cases(draw: Draw, usable: SearchStrategy[Any], by_mode: dict[str, SearchStrategy[bytes]]) -> Case:
    state = draw(usable)
    case: Case = state.case(draw(by_mode[state.mode]) + HLT)
    return case


def phys_cases(
    mode: str | None = None, leaves: Collection[str] | None = None, cpl: int | None = None
) -> SearchStrategy[Case]:
    """As `cases`, with guest-physical memory: page tables map each page to itself where paging is on."""
    return cases(mode, leaves, cpl).map(_physical)


def _physical(case: Case) -> Case:
    """The same memory as `phys`, with the tables at CR3."""
    entries = list(case.mem.entries)
    system = case.system
    if system.cr0 & cr.X86_CR0_PG:
        system = msgspec.structs.replace(system, cr3=PAGE_TABLES)
        entries += identity_tables(paging_kind(system), PAGE_TABLES, [pfn << 12 for pfn in case.mem.pages])
    phys = [{"addr": hex(at), "data": data.hex()} if data else {"addr": hex(at)} for at, data in entries]
    return msgspec.structs.replace(
        case, system=system, mem=Memory(), extra={**(case.extra or {}), "phys": phys}
    )

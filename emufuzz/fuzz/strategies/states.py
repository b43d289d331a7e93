"""Strategies for machine states: valid ones, in the default layout of emufuzz.case.build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from emufuzz.arch import cr, rflags
from emufuzz.arch.modes import MODES
from emufuzz.arch.regs import VCPU_REGS_RSP
from emufuzz.case.build import (
    CODE_BASE,
    CODE_BITS,
    DATA_BASE,
    DATA_PAGES,
    LONG_MODES,
    STACK_TOP,
    build_memory,
    build_system,
    cpls_of,
)
from emufuzz.case.model import UNUSABLE, Case, Memory, Segment, System
from emufuzz.case.segments import segment_data, segment_paragraph
from emufuzz.fuzz.strategies.values import addresses, words

Draw: TypeAlias = Callable[[SearchStrategy[Any]], Any]

_FREE_SEL: Final = 0x80  # a slot of the GDT that the layout leaves free
_DATA_NAMES: Final = ("ds", "es", "fs", "gs")
_CR0: Final = (cr.X86_CR0_TS, cr.X86_CR0_EM, cr.X86_CR0_AM)
_STATUS: Final = rflags.EFLAGS_MASK | rflags.X86_EFLAGS_DF | rflags.X86_EFLAGS_IF | rflags.X86_EFLAGS_IOPL


class State(NamedTuple):
    """A machine state without an instruction; the members are those of a Case."""

    mode: str
    gpr: tuple[int, ...]
    rip: int
    rflags: int
    system: System
    mem: Memory

    def case(self, code: bytes, name: str = "") -> Case:
        """The case that runs this code from here."""
        return Case(name, self.mode, code, self.gpr, self.rip, self.rflags, self.system, self.mem)


def states(mode: str | None = None, cpl: int | None = None) -> SearchStrategy[State]:
    """Valid machine states: registers, flags, segments, control registers, and memory that they point to.

    Args:
        mode: One of emufuzz.arch.modes.MODES; None for any.
        cpl: Privilege level; None for any that the mode has.

    Raises:
        ValueError: There is no such mode, or it has no such privilege level.
    """
    return _pairs(mode, cpl).flatmap(lambda pair: _states(*pair))


def systems(mode: str | None = None, cpl: int | None = None) -> SearchStrategy[System]:
    """Valid segments, tables, control and debug registers; arguments as of `states`."""
    return _pairs(mode, cpl).flatmap(lambda pair: _systems(*pair))


def _pairs(mode: str | None, cpl: int | None) -> SearchStrategy[tuple[str, int]]:
    """Modes with privilege levels that they have."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"{mode} is not one of {', '.join(MODES)}")
    modes = MODES if mode is None else (mode,)
    pairs = [(each, level) for each in modes for level in cpls_of(each) if cpl is None or level == cpl]
    if not pairs:
        raise ValueError(f"no mode of {', '.join(modes)} has CPL {cpl}")
    return st.sampled_from(pairs)


@st.composite
def _states(draw: Draw, mode: str, cpl: int) -> State:
    system = draw(_systems(mode, cpl))
    bits = 64 if mode == "prot64" else 32
    register = st.one_of(words(bits), addresses(bits))
    used = 16 if bits == 64 else 8
    gpr = [draw(register) for _ in range(used)] + [0] * (16 - used)
    gpr[VCPU_REGS_RSP] = draw(st.one_of(st.just(STACK_TOP), st.integers(STACK_TOP - 64, STACK_TOP + 64)))
    vm = rflags.X86_EFLAGS_VM if mode == "vm86" else 0
    flags = draw(st.integers(0, 0x3FFF)) & _STATUS | rflags.X86_EFLAGS_FIXED | vm
    data = dict(draw(st.lists(_contents(), max_size=3)))
    return State(mode, tuple(gpr), CODE_BASE, flags, system, build_memory(mode, system, data))


def _contents() -> SearchStrategy[tuple[int, bytes]]:
    """Bytes somewhere in the data pages."""
    return st.tuples(st.integers(DATA_BASE, DATA_PAGES[-1] + 0xFE0), st.binary(max_size=16))


@st.composite
def _systems(draw: Draw, mode: str, cpl: int) -> System:
    changes: dict[str, Any] = {}
    if draw(st.booleans()):
        changes[draw(st.sampled_from(_DATA_NAMES))] = draw(_data_segments(mode, cpl))
    system = build_system(mode, cpl, **changes)
    flipped = sum(draw(st.sets(st.sampled_from(_CR0))))
    if mode not in LONG_MODES and mode != "real" and draw(st.booleans()):
        flipped |= cr.X86_CR0_PG
    fewer = draw(st.sampled_from((0, cr.X86_CR4_OSFXSR, cr.X86_CR4_OSFXSR | cr.X86_CR4_OSXMMEXCPT)))
    return msgspec.structs.replace(system, cr0=system.cr0 ^ flipped, cr4=system.cr4 & ~fewer)


@st.composite
def _data_segments(draw: Draw, mode: str, cpl: int) -> Segment:
    """Data segments that such code may have loaded."""
    if mode in ("real", "vm86"):
        return segment_paragraph(draw(st.integers(0, DATA_BASE >> 4)), vm86=mode == "vm86")
    kind = draw(st.sampled_from(("small", "based", "read-only", "expand-down", "unusable")))
    if kind == "unusable":
        return UNUSABLE
    limit = draw(st.sampled_from((0xFFFF, DATA_BASE + 0xFF, 0xFFF)))
    return segment_data(
        _FREE_SEL | cpl,
        bits=CODE_BITS.get(mode, 16),
        dpl=cpl,
        base=draw(st.integers(0, 0x2000)) if kind == "based" else 0,
        limit=limit,
        writable=kind != "read-only",
        expand_down=kind == "expand-down",
    )

"""Strategies for cases that enter KVM through its exit paths."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final, NamedTuple

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from emufuzz.arch.leaves import leaves_of
from emufuzz.arch.modes import MODES
from emufuzz.arch.regs import VCPU_REGS_RSP
from emufuzz.case.build import build_system
from emufuzz.case.model import Case
from emufuzz.case.paths import PATHS
from emufuzz.fuzz.corpus.legal import legal_pairs
from emufuzz.fuzz.forms import Form, forms
from emufuzz.fuzz.kvm.select import KINDS
from emufuzz.fuzz.shrink.defaults import cpl_of
from emufuzz.fuzz.strategies import machines as m
from emufuzz.fuzz.strategies.cases import HLT
from emufuzz.fuzz.strategies.instructions import aimed_instructions, instructions
from emufuzz.fuzz.strategies.machines import Draw
from emufuzz.fuzz.strategies.states import State, states

#: Instructions at which hardware exits whatever their operands are, or for any port.
_EXITING: Final = frozenset(
    ("cpuid", "rdmsr", "wrmsr", "in", "out", "hlt", "invd", "wbinvd", "mov r,dr", "mov dr,r")
)
#: Leaves of "memory" that need more than an address: the x87 and SSE state, and stacks.
_NOT_ALONE: Final = frozenset(leaf for family in ("fpu", "sse", "stack") for leaf in leaves_of(family))
#: How far into a page registers point.
_INSIDE: Final = 0xF00


class _Path(NamedTuple):
    """What a path needs.

    Attributes:
        kind: Which instructions (emufuzz.fuzz.kvm.select).
        modes: Where the path exists.
        finish: Changes to a case.
        place: The page that operands in memory are in, None = anywhere.
        inside: How far from its beginning they may be, in bytes.
        cpl: The privilege level, None = any.
    """

    kind: str
    modes: tuple[str, ...]
    finish: tuple[Callable[[Draw, Case], Case], ...]
    place: int | None = None
    inside: int = _INSIDE
    cpl: int | None = None


_NOT_VM86: Final = tuple(mode for mode in MODES if mode != "vm86")
_REAL: Final = ("real",)
_LEGACY: Final = ("real", "prot16", "prot32")
_WIDE: Final = ("prot32", "compat32", "prot64")
# fmt: off
_D: Final = m.DEVICE
_PATHS: Final[dict[str, _Path]] = {
    "ud":                       _Path("ud",          MODES,                ()),
    "fep":                      _Path("any",         MODES,                (m.forced,)),
    "vmware-gp":                _Path("backdoor",    MODES,                (m.backdoor,)),
    "rmode-exception":          _Path("any",         _REAL,                ()),
    "shadow-pf":                _Path("memory",      _LEGACY,              (m.unpaged, m.device), _D),
    "ept-violation":            _Path("memory",      MODES,                (m.device,), _D),
    "ept-violation-maxphyaddr": _Path("memory",      ("prot64",),          (m.high_device,), m.HIGH_DEVICE),
    "ept-misconfig":            _Path("memory",      MODES,                (m.device,), _D),
    "io-string":                _Path("port-string", MODES,                (m.ports,)),
    "apic-access":              _Path("memory",      _WIDE,                (m.local_apic,), m.APIC),
    "desc":                     _Path("tables",      MODES[2:],            (m.umip,)),
    "invalid-guest-state":      _Path("any",         (*_LEGACY, "vm86"),   (m.refused_segment,)),
    "task-switch":              _Path("any",         ("prot16", "prot32"), (m.task,), cpl=0),
    "rmode-inject":             _Path("any",         _REAL,                (m.event,)),
    "io-completion":            _Path("memory",      MODES,                (m.device,), _D),
    "msr-completion":           _Path("msr",         _NOT_VM86,            (m.denied_msr, m.forced), cpl=0),
    "skip":                     _Path("write",       MODES,                (m.device, m.notified), _D, 0),
    "exit":                     _Path("exiting",     _NOT_VM86,            (m.ports,), cpl=0),
}
# fmt: on
#: The exit paths that `path_cases` knows: all of them.
PATHS_OF_STRATEGIES: Final = PATHS


def path_cases(path: str | None = None, mode: str | None = None) -> SearchStrategy[Case]:
    """Cases that enter KVM through an exit path, most of which hardware would take there.

    Args:
        path: One of emufuzz.case.paths.PATHS; None for any of them.
        mode: One of emufuzz.arch.modes.MODES; None for any that the path has.

    Raises:
        ValueError: There is no such path, or the mode does not have it.
    """
    if path is not None and path not in _PATHS:
        raise ValueError(f"{path} is not one of {', '.join(_PATHS)}")
    pairs = [
        (name, each)
        for name, needs in _PATHS.items()
        for each in needs.modes
        if path in (None, name) and mode in (None, each)
    ]
    if not pairs:
        raise ValueError(f"no such path in {mode}")
    return st.sampled_from(pairs).flatmap(lambda pair: _path_cases(*pair))


@st.composite
def _path_cases(draw: Draw, path: str, mode: str) -> Case:
    needs = _PATHS[path]
    state = draw(states(mode, needs.cpl))
    leaves = _leaves_of(needs.kind, mode)
    if needs.place is not None:
        state = _pointing(draw, state, needs.place, needs.inside)
        code = draw(aimed_instructions(mode, leaves, needs.place))
    else:
        code = draw(instructions(mode, leaves))
    case: Case = msgspec.structs.replace(state.case(code + HLT), path=path)
    for finish in needs.finish:
        case = finish(draw, case)
    return case


@cache
def _leaves_of(kind: str, mode: str) -> frozenset[str]:
    """The legal leaves of a kind of instruction."""
    found = frozenset(form.leaf for form in forms() if (form.leaf, mode) in legal_pairs() and _is(form, kind))
    return found - _NOT_ALONE if kind in ("memory", "write") else found


def _is(form: Form, kind: str) -> bool:
    return form.mnemonic in _EXITING if kind == "exiting" else KINDS[kind](form)


def _pointing(draw: Draw, state: State, place: int, inside: int) -> State:
    """All registers but RSP point into a page."""
    where = st.integers(place, place + inside)
    used = 16 if state.mode == "prot64" else 8
    gpr = [draw(where) if i != VCPU_REGS_RSP and i < used else old for i, old in enumerate(state.gpr)]
    plain = build_system(state.mode, cpl_of(state.case(b"")))
    return state._replace(gpr=tuple(gpr), system=plain)

"""Seeded bugs: handlers broken on purpose, one per family, to measure whether a campaign notices.

While `seeded_bug` is active a broken handler stands in for the right one in the opcode tables of
this process. Each bug is of a kind that emulators really have: a flag, an order, a width. Unicorn
sees all of these; those that it cannot see are in emufuzz.fuzz.blind_bugs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Final

from emufuzz.arch.regs import VCPU_REGS_RSP
from emufuzz.arch.rflags import X86_EFLAGS_AF, X86_EFLAGS_CF, X86_EFLAGS_OF, X86_EFLAGS_SF
from emufuzz.emulator.ctxt import X86EmulateCtxt, reg_read, reg_write
from emufuzz.emulator.opcode import Handler, Opcode, leaves
from emufuzz.emulator.tables import ONE_BYTE, THREE_BYTE, TWO_BYTE
from emufuzz.fuzz.blind_bugs import BLIND_BUGS, Change


@dataclass(frozen=True, slots=True)
class Bug:
    """A seeded bug: the mnemonics it breaks, and what it makes of their handlers."""

    family: str
    mnemonics: tuple[str, ...]
    what: str
    breaks: Callable[[Handler], Handler]


def _adc(right: Handler) -> Handler:
    def em_adc(ctxt: X86EmulateCtxt) -> int:
        ctxt.eflags &= ~X86_EFLAGS_CF
        return right(ctxt)

    return em_adc


def _movsx(right: Handler) -> Handler:
    def sw_movsx(ctxt: X86EmulateCtxt) -> int:
        rc = right(ctxt)
        ctxt.dst.val &= 0xFF
        return rc

    return sw_movsx


def _leave(right: Handler) -> Handler:
    def em_leave(ctxt: X86EmulateCtxt) -> int:
        rc = right(ctxt)
        reg_write(ctxt, VCPU_REGS_RSP, reg_read(ctxt, VCPU_REGS_RSP) + 2)
        return rc

    return em_leave


def _shr(right: Handler) -> Handler:
    def em_shr(ctxt: X86EmulateCtxt) -> int:
        rc = right(ctxt)
        if ctxt.dst.bytes == 4 and ctxt.src2.val & 0x1F == 1:
            ctxt.eflags ^= X86_EFLAGS_OF
        return rc

    return em_shr


def _imul(right: Handler) -> Handler:
    def em_imul(ctxt: X86EmulateCtxt) -> int:
        rc = right(ctxt)
        ctxt.eflags &= ~(X86_EFLAGS_CF | X86_EFLAGS_OF)
        return rc

    return em_imul


def _btr(right: Handler) -> Handler:
    def em_btr(ctxt: X86EmulateCtxt) -> int:
        before = ctxt.dst.val
        rc = right(ctxt)
        if ctxt.dst.bytes == 2:
            ctxt.dst.val = before
        return rc

    return em_btr


def _das(right: Handler) -> Handler:
    def em_das(ctxt: X86EmulateCtxt) -> int:
        rc = right(ctxt)
        ctxt.eflags &= ~X86_EFLAGS_AF
        return rc

    return em_das


def _jnl(right: Handler) -> Handler:
    def sw_jcc(ctxt: X86EmulateCtxt) -> int:
        flags = ctxt.eflags
        if flags & X86_EFLAGS_OF:
            ctxt.eflags ^= X86_EFLAGS_SF
        rc = right(ctxt)
        ctxt.eflags = flags
        return rc

    return sw_jcc


def _scas(right: Handler) -> Handler:
    def em_cmp_r(ctxt: X86EmulateCtxt) -> int:
        src, dst = ctxt.src.val, ctxt.dst.val
        ctxt.src.val, ctxt.dst.val = dst, src
        rc = right(ctxt)
        ctxt.src.val, ctxt.dst.val = src, dst
        return rc

    return em_cmp_r


def _cmc(right: Handler) -> Handler:
    def sw_cmc(ctxt: X86EmulateCtxt) -> int:
        rc = right(ctxt)
        ctxt.eflags |= X86_EFLAGS_CF
        return rc

    return sw_cmc


def _xadd(right: Handler) -> Handler:
    def em_xadd(ctxt: X86EmulateCtxt) -> int:
        before = ctxt.src.val
        rc = right(ctxt)
        ctxt.src.val = before
        return rc

    return em_xadd


# fmt: off
BUGS: Final = {
    "adc-carry":   Bug("alu",    ("adc",),                "ADC does not add the carry",              _adc),
    "movsx-zero":  Bug("mov",    ("movsx r,r/m8",),       "MOVSX from a byte zero-extends",          _movsx),
    "leave-rsp":   Bug("stack",  ("leave",),              "LEAVE pops two bytes too many",           _leave),
    "shr-of":      Bug("shift",  ("shr",),                "32-bit SHR by 1 inverts OF",              _shr),
    "imul-flags":  Bug("muldiv", ("imul", "imul r,r/m,imm"), "IMUL never reports overflow",          _imul),
    "btr-16":      Bug("bits",   ("btr",),                "16-bit BTR leaves the bit set",           _btr),
    "das-af":      Bug("bcd",    ("das",),                "DAS clears AF",                           _das),
    "jnl-of":      Bug("branch", ("jnl", "jnl near"),     "JNL tests SF alone",                      _jnl),
    "scas-order":  Bug("string", ("scasb", "scasw/d/q"),  "SCAS subtracts the wrong way round",      _scas),
    "cmc-set":     Bug("flagop", ("cmc",),                "CMC always sets CF",                      _cmc),
    "xadd-source": Bug("xchg",   ("xadd",),               "XADD does not load the old value",        _xadd),
}
# fmt: on


def known_bugs() -> dict[str, tuple[str, str]]:
    """Name -> (family, what it is) of every bug; those that Unicorn does not see have the family `blind`."""
    seen = {name: (bug.family, bug.what) for name, bug in BUGS.items()}
    return seen | {name: ("blind", bug.what) for name, bug in BLIND_BUGS.items()}


@contextmanager
def seeded_bug(name: str) -> Iterator[None]:
    """Have the bug of that name, of BUGS or BLIND_BUGS, in this process's emulator; none for an empty name.

    Raises:
        KeyError: There is no such bug.
    """
    undo: list[Change] = []
    try:
        for change in _changes_of(name) if name else ():
            target, attribute, value = change
            undo.append(Change(target, attribute, getattr(target, attribute)))
            _replace(target, attribute, value)
        yield
    finally:
        for target, attribute, value in reversed(undo):
            _replace(target, attribute, value)


def _changes_of(name: str) -> list[Change]:
    if name in BLIND_BUGS:
        return list(BLIND_BUGS[name].changes())
    bug = BUGS[name]
    return [
        Change(opcode, "execute", bug.breaks(opcode.execute))
        for table in (ONE_BYTE, TWO_BYTE, THREE_BYTE)
        for opcode in leaves(table)
        if opcode.mnemonic in bug.mnemonics and opcode.execute is not None
    ]


def _replace(target: ModuleType | Opcode, attribute: str, value: object) -> None:
    """Opcodes are frozen; this is the one place that means to change one."""
    if isinstance(target, Opcode):
        object.__setattr__(target, attribute, value)
    else:
        setattr(target, attribute, value)

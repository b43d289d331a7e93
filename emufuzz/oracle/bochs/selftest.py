"""Self-test: what the whole oracle rests on, tried when it is opened."""

from __future__ import annotations

from typing import Final

import msgspec

from emufuzz.arch.exceptions import DE_VECTOR, GP_VECTOR, PF_VECTOR, PFERR_USER, PFERR_WRITE
from emufuzz.arch.modes import MODES
from emufuzz.arch.regs import GPR_NAMES, VCPU_REGS_RAX
from emufuzz.case.build import CODE_BASE, DATA_BASE, build_case, cpls_of
from emufuzz.case.model import PAGE_SHIFT, Case
from emufuzz.oracle.base import Oracle, OracleUnavailableError

_ABSENT: Final = 0xE000
_HLT: Final = b"\xf4"


def _case(code: str, mode: str = "prot64", *, level: int | None = None, **gpr: int) -> Case:
    case = build_case(mode, bytes.fromhex(code) + _HLT, cpl=level)
    values = [gpr.get(name, value) for name, value in zip(GPR_NAMES, case.gpr, strict=True)]
    return msgspec.structs.replace(case, gpr=tuple(values))


def modes(oracle: Oracle) -> bool:
    """Registers go in and come out in every mode, at every level, one after the other."""
    places = [(mode, cpl) for mode in MODES for cpl in cpls_of(mode)]
    outcomes = oracle.run([_case("01d8", mode, level=cpl, rax=5, rbx=7) for mode, cpl in places])
    return all((o.gpr[VCPU_REGS_RAX], o.rip, o.exception) == (12, CODE_BASE + 2, None) for o in outcomes)


def stale_code(oracle: Oracle) -> bool:
    """Other code at the same address must not run as what was there before."""
    first, second = oracle.run([_case("ffc0"), _case("ffc8")])
    return (first.gpr[VCPU_REGS_RAX], second.gpr[VCPU_REGS_RAX]) == (1, 0xFFFFFFFF)


def exceptions(oracle: Oracle) -> bool:
    """An exception comes with its error code, and does not stick."""
    divide, privileged = _case("f7f1"), _case("0f06", level=3)
    faults = [outcome.exception for outcome in oracle.run([divide, divide, privileged, _case("90")])]
    return faults == [(DE_VECTOR, None, None)] * 2 + [(GP_VECTOR, 0, None), None]


def memory(oracle: Oracle) -> bool:
    """A store is seen, and not by the next case; absent pages fault in every mode."""
    stored, loaded = oracle.run([_case("8807", rdi=DATA_BASE, rax=9), _case("8a07", rdi=DATA_BASE, rax=1)])
    cases = [_case("8807", rdi=_ABSENT, level=3), _case("678a07", "real", rdi=_ABSENT)]
    absent = [outcome.exception for outcome in oracle.run(cases)]
    written = stored.pages.get(DATA_BASE >> PAGE_SHIFT, b"")[:1]
    faults = [(PF_VECTOR, PFERR_WRITE | PFERR_USER, _ABSENT), (PF_VECTOR, 0, _ABSENT)]
    return (written, loaded.gpr[VCPU_REGS_RAX], loaded.pages, absent) == (b"\x09", 0, {}, faults)


def ports(oracle: Oracle) -> bool:
    """A port access asks the case's devices, which asks for a patched function."""
    case = build_case("prot64", b"\xe4\x60" + _HLT, cpl=0)
    (outcome,) = oracle.run([case])
    return outcome.gpr[VCPU_REGS_RAX] == 0xFF and outcome.extra is not None


def self_test(oracle: Oracle) -> None:
    """Run all of it.

    Raises:
        OracleUnavailableError: a test fails; the message names it.
    """
    for test in (modes, stale_code, exceptions, memory, ports):
        if not test(oracle):
            name = test.__name__.replace("_", " ")
            raise OracleUnavailableError(f"bochs fails its self-test: {name}")

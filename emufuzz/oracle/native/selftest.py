"""Self-test: what the whole oracle rests on, tried when it is opened. It starts two children."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from emufuzz.arch.exceptions import DE_VECTOR, PF_VECTOR, PFERR_USER, PFERR_WRITE, SS_VECTOR
from emufuzz.arch.regs import GPR_NAMES, VCPU_REGS_RAX, VCPU_REGS_RSP, VCPU_SREG_SS
from emufuzz.case.build import CODE_BASE, DATA_BASE, STACK_BASE, STACK_TOP, build_case, build_system
from emufuzz.case.model import PAGE_SHIFT, Case, Memory, System
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.native.child import Child
from emufuzz.oracle.native.runner import NativeRunner

_SHIFT: Final = 1 << 20  # above every vm.mmap_min_addr
_DATA: Final = _SHIFT + DATA_BASE
_STACK: Final = _SHIFT + STACK_BASE
_ABSENT: Final = _STACK - 0x1000
_LONG: Final = build_system("prot64", 3)
_COMPAT: Final = build_system("compat32", 3)
_MEMORY: Final = Memory(((_DATA, b"\5"), (_STACK, b"")))


def _small_stack() -> System:
    seg = list(_COMPAT.seg)
    seg[VCPU_SREG_SS] = msgspec.structs.replace(seg[VCPU_SREG_SS], limit=_STACK + 0xFFF, g=1)
    return msgspec.structs.replace(_COMPAT, seg=tuple(seg))


_SMALL: Final = _small_stack()


def _case(code: str, mode: str = "prot64", system: System = _LONG, **gpr: int) -> Case:
    registers = {"rsp": _SHIFT + STACK_TOP, **gpr}
    case = build_case(mode, bytes.fromhex(code), system=system, mem=_MEMORY, rip=_SHIFT + CODE_BASE)
    return msgspec.structs.replace(case, gpr=tuple(registers.get(name, 0) for name in GPR_NAMES))


def arithmetic(runner: NativeRunner) -> bool:
    """Registers go in and come out, also behind an instruction that is single-stepped."""
    added, jumped = runner.run([_case("4801d8f4", rax=5, rbx=7), _case("eb02")])
    return added.gpr[VCPU_REGS_RAX] == 12 and jumped.rip == _SHIFT + CODE_BASE + 4


def memory(runner: NativeRunner) -> bool:
    """A store is seen, and not by the next case."""
    stored, loaded = runner.run([_case("8807f4", rdi=_DATA, rax=9), _case("8a07f4", rdi=_DATA)])
    written = stored.pages.get(_DATA >> PAGE_SHIFT, b"")[:1]
    return (written, loaded.gpr[VCPU_REGS_RAX], loaded.pages) == (b"\x09", 5, {})


def exceptions(runner: NativeRunner) -> bool:
    """Vector, error code and address of exceptions."""
    divided, stored = runner.run([_case("f7f1f4"), _case("8807f4", rdi=_ABSENT)])
    fault = (PF_VECTOR, PFERR_WRITE | PFERR_USER, _ABSENT)
    return (divided.exception, stored.exception) == ((DE_VECTOR, None, None), fault)


def segments(runner: NativeRunner) -> bool:
    """Segments of 32 bits have limits: the stack ends behind its page."""
    top = _STACK + 0x1000
    inside, outside = runner.run(
        [_case("58f4", "compat32", _SMALL, rsp=top - 4), _case("58f4", "compat32", _SMALL, rsp=top - 3)]
    )
    return (inside.gpr[VCPU_REGS_RSP], outside.exception) == (top, (SS_VECTOR, 0, None))


def confined(child: Child) -> bool:
    """The child is in seccomp's strict mode."""
    status = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii", errors="replace")
    return "Seccomp:\t1\n" in status


def self_test(runner: NativeRunner) -> None:
    """Run all of it.

    Raises:
        OracleUnavailableError: a test fails; the message names it.
    """
    for test in (arithmetic, memory, exceptions, segments):
        if not test(runner):
            raise OracleUnavailableError(f"native fails its self-test: {test.__name__}")
    if not all(confined(child) for child in runner.children()):
        raise OracleUnavailableError("native: seccomp's strict mode is not in force")

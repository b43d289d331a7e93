"""Seeded bugs that Unicorn cannot see: of each check that it does not make, one broken on purpose.

An emulator with such a bug agrees with Unicorn, or Unicorn's own answer is known to be wrong. Who
finds it all the same is in docs/blind-spots.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, NamedTuple

from emufuzz.arch.rflags import X86_EFLAGS_IF
from emufuzz.emulator import access, execute, faults, task
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.flags import Lock
from emufuzz.emulator.insn import io, system
from emufuzz.emulator.opcode import Handler, Opcode, leaves
from emufuzz.emulator.tables import ONE_BYTE, THREE_BYTE, TWO_BYTE
from emufuzz.emulator.x86emul import (
    MASK32,
    OPERAND_NONE,
    X86EMUL_CONTINUE,
    X86EMUL_F_WRITE,
    X86EMUL_MODE_PROT64,
    X86EMUL_PROPAGATE_FAULT,
)

#: Bit of a segment's type: data can be written, code can be read.
_WRITABLE_OR_READABLE: Final = 2
#: Stands for a segment that is not SS.
_NO_STACK: Final = -1


class Change(NamedTuple):
    """One attribute of a module or of an opcode, and what it is while a bug is there."""

    target: ModuleType | Opcode
    attribute: str
    value: Any


@dataclass(frozen=True, slots=True)
class BlindBug:
    """A bug that Unicorn does not see.

    Attributes:
        unchecked: What Unicorn does not check.
        what: How the emulator is broken.
        changes: What to replace; asked anew each time, so that it wraps what is there.
    """

    unchecked: str
    what: str
    changes: Callable[[], Iterable[Change]]


def _opcodes(*mnemonics: str) -> Iterable[Opcode]:
    tables = (ONE_BYTE, TWO_BYTE, THREE_BYTE)
    return [opcode for table in tables for opcode in leaves(table) if opcode.mnemonic in mnemonics]


def _handlers(breaks: Callable[[Handler], Handler], *mnemonics: str) -> Iterable[Change]:
    for opcode in _opcodes(*mnemonics):
        if opcode.execute is not None:
            yield Change(opcode, "execute", breaks(opcode.execute))


def _shared(*places: ModuleType, attribute: str, value: Any) -> Iterable[Change]:
    return [Change(place, attribute, value) for place in places]


# Segments and addresses


def _limit() -> Iterable[Change]:
    right = access.linearize

    def linearize(ctxt: X86EmulateCtxt, seg: int, ea: int, size: int, flags: int) -> int:
        shorter = size - 1 if 1 < size < 16 else size
        return right(ctxt, seg, ea, shorter, flags)

    return _shared(access, attribute="linearize", value=linearize)


def _type(*, written: bool) -> Iterable[Change]:
    right = access._type_allows  # noqa: SLF001 - the check that this bug removes

    def _type_allows(ctxt: X86EmulateCtxt, kind: int, flags: int) -> bool:
        ignored = _WRITABLE_OR_READABLE if written == bool(flags & X86EMUL_F_WRITE) else 0
        return right(ctxt, kind | ignored, flags)

    return _shared(access, attribute="_type_allows", value=_type_allows)


def _null() -> Iterable[Change]:
    right = access.linearize

    def linearize(ctxt: X86EmulateCtxt, seg: int, ea: int, size: int, flags: int) -> int:
        if ctxt.mode != X86EMUL_MODE_PROT64 and not ctxt.ops.get_segment(ctxt, seg).usable:
            ctxt.max_size = MASK32
            return ea & MASK32
        return right(ctxt, seg, ea, size, flags)

    return _shared(access, attribute="linearize", value=linearize)


def _alignment() -> Iterable[Change]:
    return _shared(access, attribute="insn_alignment", value=lambda _ctxt, _size: 1)


def _stack_fault() -> Iterable[Change]:
    right = access._segment_fault  # noqa: SLF001 - what this bug replaces

    def _segment_fault(ctxt: X86EmulateCtxt, seg: int) -> int:
        return right(ctxt, _NO_STACK if ctxt.mode == X86EMUL_MODE_PROT64 else seg)

    return _shared(access, attribute="_segment_fault", value=_segment_fault)


def _branch_target() -> Iterable[Change]:
    def jump(right: Handler) -> Handler:
        def em_jmp_abs(ctxt: X86EmulateCtxt) -> int:
            if right(ctxt) == X86EMUL_PROPAGATE_FAULT:
                ctxt.next_eip = ctxt.src.val
            return X86EMUL_CONTINUE

        return em_jmp_abs

    return _handlers(jump, "jmp r/m")


def _read_for_write() -> Iterable[Change]:
    return _shared(execute, attribute="PFERR_WRITE", value=0)


# Ports


def _iopl() -> Iterable[Change]:
    return _shared(io, attribute="emulator_bad_iopl", value=lambda _ctxt: False)


def _bitmap() -> Iterable[Change]:
    right = io.emulator_io_port_access_allowed

    def emulator_io_port_access_allowed(ctxt: X86EmulateCtxt, port: int, _length: int) -> bool:
        return right(ctxt, port, 1)

    return _shared(io, attribute="emulator_io_port_access_allowed", value=emulator_io_port_access_allowed)


# System registers


def _refusal_dropped(right: Handler) -> Handler:
    """A handler that goes on where the right one refuses a value."""

    def em_write(ctxt: X86EmulateCtxt) -> int:
        rc = right(ctxt)
        if rc != X86EMUL_PROPAGATE_FAULT:
            return rc
        ctxt.dst.type = OPERAND_NONE
        return X86EMUL_CONTINUE

    return em_write


def _general_detect() -> Iterable[Change]:
    return _shared(system, attribute="_DR7_GD", value=0)


def _debug_high() -> Iterable[Change]:
    for opcode in _opcodes("mov dr,r"):
        yield Change(opcode, "check_perm", system.check_dr_read)


# Tasks


def _task_switched() -> Iterable[Change]:
    yield Change(task, "X86_CR0_TS", 0)


# Encodings


def _lock_mov() -> Iterable[Change]:
    for opcode in _opcodes("mov"):
        yield Change(opcode, "d", opcode.d | Lock)


def _group1a() -> Iterable[Change]:
    group = ONE_BYTE[0x8F]
    yield Change(group, "children", (group.children[0],) * 8)


def _vex() -> Iterable[Change]:
    for byte in (0xC4, 0xC5):
        yield Change(ONE_BYTE[byte], "children", (ONE_BYTE[byte].children[0],) * 2)


def _undefined(mnemonic: str) -> Iterable[Change]:
    for opcode in _opcodes(mnemonic):
        yield Change(opcode, "execute", faults.emulate_ud)


# Delivery and system calls


def _syscall_enabled(right: Handler) -> Handler:
    def em_syscall(ctxt: X86EmulateCtxt) -> int:
        if right(ctxt) != X86EMUL_CONTINUE:
            ctxt.next_eip = 0
        return X86EMUL_CONTINUE

    return em_syscall


def _interrupt_flag(right: Handler) -> Handler:
    def sw_int(ctxt: X86EmulateCtxt) -> int:
        flags = ctxt.eflags
        rc = right(ctxt)
        ctxt.eflags |= flags & X86_EFLAGS_IF
        return rc

    return sw_int


# fmt: off
BLIND_BUGS: Final = {
    "limit-last-byte":   BlindBug("segment limits",
                                  "the last byte of an operand may lie beyond the segment's limit", _limit),
    "type-read-only":    BlindBug("types of data segments",
                                  "read-only data segments can be written", lambda: _type(written=True)),
    "type-execute-only": BlindBug("types of code segments",
                                  "execute-only code segments can be read", lambda: _type(written=False)),
    "null-segment":      BlindBug("null segments",
                                  "a null segment register works like a flat one", _null),
    "movaps-alignment":  BlindBug("alignment of 16-byte operands",
                                  "MOVAPS takes any address", _alignment),
    "stack-canonical":   BlindBug("non-canonical stack addresses",
                                  "such a stack address is #GP instead of #SS", _stack_fault),
    "branch-canonical":  BlindBug("non-canonical branch targets",
                                  "JMP goes to an address that is not canonical", _branch_target),
    "iopl":              BlindBug("IOPL for ports",
                                  "ports are open at any privilege level", _iopl),
    "io-bitmap-width":   BlindBug("the I/O permission bitmap",
                                  "the bitmap is asked about the first byte of a port access", _bitmap),
    "cr-value":          BlindBug("values of control registers",
                                  "MOV to CR drops a value that is refused",
                                  lambda: _handlers(_refusal_dropped, "mov cr,r")),
    "dr-detect":         BlindBug("DR7.GD",
                                  "MOV DR does not look at DR7.GD", _general_detect),
    "dr-value":          BlindBug("values of debug registers",
                                  "MOV to DR6 and DR7 drops bits 63:32", _debug_high),
    "task-switched":     BlindBug("task switches",
                                  "a task switch does not set CR0.TS", _task_switched),
    "wrmsr-value":       BlindBug("values of MSRs",
                                  "WRMSR drops a value that is refused",
                                  lambda: _handlers(_refusal_dropped, "wrmsr")),
    "rdmsr-unknown":     BlindBug("MSRs that do not exist",
                                  "RDMSR of an unknown MSR does nothing",
                                  lambda: _handlers(_refusal_dropped, "rdmsr")),
    "lock-mov":          BlindBug("LOCK",
                                  "MOV to memory can be locked", _lock_mov),
    "pop-8f-reg":        BlindBug("8F /1 to /7",
                                  "8F is POP whatever ModRM.reg says", _group1a),
    "int1-undefined":    BlindBug("INT1",
                                  "INT1 is #UD", lambda: _undefined("icebp/int1")),
    "int-undefined":     BlindBug("INT n",
                                  "INT n is #UD", lambda: _undefined("int imm8")),
    "int-real-if":       BlindBug("delivery through the IVT",
                                  "INT n in real mode leaves IF set",
                                  lambda: _handlers(_interrupt_flag, "int imm8")),
    "syscall-disabled":  BlindBug("SYSCALL",
                                  "SYSCALL does not look at EFER.SCE",
                                  lambda: _handlers(_syscall_enabled, "syscall")),
    "sysenter-null":     BlindBug("SYSENTER",
                                  "SYSENTER with a null IA32_SYSENTER_CS does nothing",
                                  lambda: _handlers(_refusal_dropped, "sysenter")),
    "vex-legacy":        BlindBug("VEX",
                                  "C4 and C5 are LES and LDS, whatever the mode and operand", _vex),
    "rmw-error-code":    BlindBug("error code of #PF for operands that are read and written",
                                  "the #PF of a read-modify-write is that of a read", _read_for_write),
}
# fmt: on

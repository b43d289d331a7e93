"""Which VM exit an instruction causes, and what the exit reports (path `exit`).

SDM Vol. 3C 25.1 "Instructions That Cause VM Exits", 27.2.1 "Basic VM-Exit Information" (Tables 28-3,
28-4, 28-5: qualifications of control-register, debug-register and I/O accesses), 27.2.5 and Table
27-9 (instruction information).
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.regs import VCPU_SREG_FS
from emufuzz.emulator.access import linearize
from emufuzz.emulator.ctxt import X86EmulateCtxt, reg_read
from emufuzz.emulator.x86emul import MASK32, MASK64, X86EMUL_CONTINUE, X86EMUL_MODE_PROT64
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm.exit_system import (
    CR_LMSW,
    CR_MOV_FROM,
    CR_MOV_TO,
    CR_REGISTER_SHIFT,
    CR_TYPE_SHIFT,
    DR_REGISTER_SHIFT,
    LMSW_SOURCE_DATA_SHIFT,
    TYPE_MOV_FROM_DR,
)
from emufuzz.kvm.machine import KvmMachine
from emufuzz.subject.kvm.enter import ExitInfo
from emufuzz.subject.kvm.exit_conditions import ExitRow, NoExitError, check_cr, check_entered, check_faults
from emufuzz.subject.kvm.probe import PortExit, Probe, decode_at_rip, probe

__all__ = ["INSTRUCTION_REASONS", "NoExitError", "instruction_exit", "port_exit"]

# fmt: off
#: Second opcode byte after 0F -> exit.
_TWO_BYTE: Final = {
    0x08: ExitRow(er.EXIT_REASON_INVD,      True),
    0x09: ExitRow(er.EXIT_REASON_WBINVD,    True),
    0x20: ExitRow(er.EXIT_REASON_CR_ACCESS, True),
    0x21: ExitRow(er.EXIT_REASON_DR_ACCESS, False),
    0x22: ExitRow(er.EXIT_REASON_CR_ACCESS, True),
    0x23: ExitRow(er.EXIT_REASON_DR_ACCESS, False),
    0x30: ExitRow(er.EXIT_REASON_MSR_WRITE, True),
    0x32: ExitRow(er.EXIT_REASON_MSR_READ,  True),
    0x33: ExitRow(er.EXIT_REASON_RDPMC,     False),
    0x78: ExitRow(er.EXIT_REASON_VMREAD,    False),
    0x79: ExitRow(er.EXIT_REASON_VMWRITE,   False),
    0xA2: ExitRow(er.EXIT_REASON_CPUID,     False),
}
#: ModRM after 0F 01 -> exit, for register forms.
_GROUP7: Final = {
    0xC1: ExitRow(er.EXIT_REASON_VMCALL,              False),
    0xC2: ExitRow(er.EXIT_REASON_VMLAUNCH,            False),
    0xC3: ExitRow(er.EXIT_REASON_VMRESUME,            False),
    0xC4: ExitRow(er.EXIT_REASON_VMOFF,               False),
    0xC8: ExitRow(er.EXIT_REASON_MONITOR_INSTRUCTION, True),
    0xC9: ExitRow(er.EXIT_REASON_MWAIT_INSTRUCTION,   True),
    0xCF: ExitRow(er.EXIT_REASON_ENCLS,               True),
    0xD1: ExitRow(er.EXIT_REASON_XSETBV,              True),
    0xD4: ExitRow(er.EXIT_REASON_VMFUNC,              False),
}
# fmt: on
#: Exits of instructions that 66, F2 and F3 make undefined: "NP" of SDM Vol. 2A 3.1.1.1.
_BARE: Final = frozenset(
    (
        er.EXIT_REASON_VMREAD,
        er.EXIT_REASON_VMWRITE,
        er.EXIT_REASON_ENCLS,
        er.EXIT_REASON_XSETBV,
        er.EXIT_REASON_VMFUNC,
    )
)  # fmt: skip
_SIMD_PREFIXES: Final = frozenset((0x66, 0xF2, 0xF3))
_HLT: Final = ExitRow(er.EXIT_REASON_HLT, True)
_LMSW: Final = ExitRow(er.EXIT_REASON_CR_ACCESS, True)
_INVLPG: Final = ExitRow(er.EXIT_REASON_INVLPG, True)
_PAUSE: Final = ExitRow(er.EXIT_REASON_PAUSE_INSTRUCTION, False)
_RDRAND: Final = ExitRow(er.EXIT_REASON_RDRAND, False)
_RDSEED: Final = ExitRow(er.EXIT_REASON_RDSEED, False)

#: The exits that instructions make: hardware saves RF as 0 in each (SDM Vol. 3C 27.3.3).
INSTRUCTION_REASONS: Final = frozenset(
    row.reason
    for row in (*_TWO_BYTE.values(), *_GROUP7.values(), _HLT, _LMSW, _INVLPG, _PAUSE, _RDRAND, _RDSEED)
)

_IO_SIZE_MASK: Final = 7
_IO_IN: Final = 1 << 3
_IO_STRING: Final = 1 << 4
_IO_REP: Final = 1 << 5
_IO_IMMEDIATE: Final = 1 << 6
_IO_PORT_SHIFT: Final = 16
_LMSW_MEMORY: Final = 1 << 6


def _row(ctxt: X86EmulateCtxt) -> ExitRow | None:
    """The exit of a decoded instruction, ports apart."""
    row = _row_of_opcode(ctxt)
    if row is not None and row.reason in _BARE and _SIMD_PREFIXES.intersection(_prefixes(ctxt)):
        return None
    return row


def _prefixes(ctxt: X86EmulateCtxt) -> bytes:
    """What is before the opcode of an instruction of two opcode bytes."""
    data = bytes(ctxt.fetch_data)
    return data[: data.index(0x0F)]


def _row_of_opcode(ctxt: X86EmulateCtxt) -> ExitRow | None:
    b, modrm = ctxt.b, ctxt.modrm
    if ctxt.opcode_len == 1:
        if b == 0x90 and ctxt.rep_prefix == 0xF3:
            return _PAUSE
        return _HLT if b == 0xF4 else None
    if ctxt.opcode_len != 2:
        return None
    if b == 0x01:
        reg = modrm >> 3 & 7
        if reg == 6:
            return _LMSW
        if modrm >> 6 == 3:
            return _GROUP7.get(modrm)
        return _INVLPG if reg == 7 else None
    if b == 0xC7 and modrm >> 6 == 3:
        return {6: _RDRAND, 7: _RDSEED}.get(modrm >> 3 & 7)
    return _TWO_BYTE.get(b)


def instruction_exit(machine: KvmMachine) -> ExitInfo:
    """The exit of the instruction at RIP.

    Raises:
        NoExitError: It has none, or faults before it.
    """
    check_entered(machine)
    ctxt = decode_at_rip(machine)
    if ctxt.have_exception:
        raise NoExitError("the instruction's last bytes cannot be fetched")
    row = _row(ctxt) if ctxt.opcode is not None else None
    if row is None:
        info = port_exit(machine, probe(machine))
    else:
        check_faults(machine, ctxt, row)
        info = ExitInfo(row.reason, length=ctxt.fetch_pos)
        info.qualification = _qualification(machine, ctxt, row.reason)
        info.by_instruction = True
    return info


def _qualification(machine: KvmMachine, ctxt: X86EmulateCtxt, reason: int) -> int:
    if reason == er.EXIT_REASON_CR_ACCESS:
        return _cr_qualification(machine, ctxt)
    if reason == er.EXIT_REASON_DR_ACCESS:
        direction = TYPE_MOV_FROM_DR if ctxt.b == 0x21 else 0
        dr = ctxt.modrm >> 3 & 7
        if ctxt.rex_prefix & 4:
            raise NoExitError("DR8 and above are #UD")
        return dr | direction | _gpr(ctxt) << DR_REGISTER_SHIFT
    if reason == er.EXIT_REASON_INVLPG:
        return _invlpg_address(ctxt)
    return 0


def _invlpg_address(ctxt: X86EmulateCtxt) -> int:
    """The linear address whatever the segment allows, 32 bits outside 64-bit mode (SDM Vol. 3C 27.2.1)."""
    src = ctxt.src
    if ctxt.mode != X86EMUL_MODE_PROT64:
        return ctxt.ops.get_cached_segment_base(ctxt, src.seg) + src.ea & MASK32
    base = ctxt.ops.get_cached_segment_base(ctxt, src.seg) if src.seg >= VCPU_SREG_FS else 0
    return base + src.ea & MASK64


def _gpr(ctxt: X86EmulateCtxt) -> int:
    return ctxt.modrm & 7 | (ctxt.rex_prefix & 1) << 3


def _cr_qualification(machine: KvmMachine, ctxt: X86EmulateCtxt) -> int:
    if ctxt.b == 0x01:
        return _lmsw_qualification(machine, ctxt)
    cr = ctxt.modrm >> 3 & 7 | (ctxt.rex_prefix & 4) << 1
    kind = CR_MOV_TO if ctxt.b == 0x22 else CR_MOV_FROM
    value = reg_read(ctxt, _gpr(ctxt))
    check_cr(machine.vcpu, kind, cr, value if ctxt.mode == X86EMUL_MODE_PROT64 else value & MASK32)
    return cr | kind << CR_TYPE_SHIFT | _gpr(ctxt) << CR_REGISTER_SHIFT


def _lmsw_qualification(machine: KvmMachine, ctxt: X86EmulateCtxt) -> int:
    memory = ctxt.modrm >> 6 != 3
    if memory:
        la = linearize(ctxt, ctxt.src.seg, ctxt.src.ea, 2, 0)
        if la < 0:
            raise NoExitError("the operand of LMSW is refused by its segment")
        rc, data = ctxt.ops.read_emulated(ctxt, la, 2, ctxt.exception)
        if rc != X86EMUL_CONTINUE:
            raise NoExitError("the operand of LMSW cannot be read")
        source = int.from_bytes(data, "little")
    else:
        source = reg_read(ctxt, _gpr(ctxt)) & 0xFFFF
    check_cr(machine.vcpu, CR_LMSW, 0, source)
    return CR_LMSW << CR_TYPE_SHIFT | (_LMSW_MEMORY if memory else 0) | source << LMSW_SOURCE_DATA_SHIFT


def port_exit(machine: KvmMachine, found: Probe) -> ExitInfo:
    """The exit of IN, OUT, INS or OUTS that a dry run has come to.

    Raises:
        NoExitError: The dry run came to something else.
    """
    cause = found.cause
    if not isinstance(cause, PortExit):
        raise NoExitError("the instruction does not exit")
    b = decode_at_rip(machine).b
    qualification = cause.size - 1 | cause.port << _IO_PORT_SHIFT
    if cause.is_in:
        qualification |= _IO_IN
    if b in range(0x6C, 0x70):
        qualification |= _IO_STRING
        if decode_at_rip(machine).rep_prefix:
            qualification |= _IO_REP
    elif b in range(0xE4, 0xE8):
        qualification |= _IO_IMMEDIATE
    info = ExitInfo(er.EXIT_REASON_IO_INSTRUCTION, qualification, length=found.length)
    info.by_instruction = True
    return info

"""Cases of the path `exit`: instructions whose exit is handled without the emulator, and other exits.

SDM Vol. 3C 25.1 "Instructions That Cause VM Exits", Appendix C "VMX Basic Exit Reasons".
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from emufuzz.arch.regs import (
    VCPU_REGS_RAX,
    VCPU_REGS_RBX,
    VCPU_REGS_RCX,
    VCPU_REGS_RDX,
    VCPU_REGS_RSI,
    VCPU_SREG_SS,
)
from emufuzz.case.model import Case
from emufuzz.case.values import boundary
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm import msr_index as mi

Kvm: TypeAlias = dict[str, Any]
Registers: TypeAlias = Callable[[Random, Case, list[int], Kvm], None]

MASK32: Final = 0xFFFFFFFF
_OSXSAVE: Final = 1 << 18
_IOPL: Final = 3 << 12

#: MSRs of every kind that KVM tells apart, and some that do not exist.
MSRS: Final = tuple(sorted({
    value for name, value in vars(mi).items() if name.isupper() and isinstance(value, int) and value > 16
} | {0, 1, 0x10, 0x1B, 0x808, 0x830, 0x80B, 0x4B564D00, 0x4B564D01, 0x40000000, 0x40000001, 0x40000070,
     0x12345678, 0xC0010114}))  # fmt: skip

MSR_CODES: Final = (b"\x0f\x32", b"\x0f\x30")
_MAP_GPA_RANGE: Final = 12
_HYPERCALLS: Final = (1, 5, 9, 10, 11, 12, 12, 12, 2, 0, 0x1_0000_0005)
_MASK64: Final = (1 << 64) - 1


class Row(NamedTuple):
    """An exit: its reason, encodings of the instruction, and what to put into registers and `kvm`.

    A `privileged` instruction faults above CPL 0 before it exits.
    """

    reason: int
    codes: tuple[bytes, ...]
    registers: Registers
    privileged: bool = True


def msr_access(rng: Random, case: Case, regs: list[int], kvm: Kvm) -> None:  # noqa: ARG001 - one signature
    """RCX names an MSR, EDX:EAX a value that it might take."""
    regs[VCPU_REGS_RCX] = rng.choice(MSRS) if rng.random() < 0.9 else rng.getrandbits(32)
    if rng.random() < 0.7:
        value = rng.choice((0, 1, 0xD01, 0x7010600070106, 0xFFFF800000000000, 0xFEE00900, boundary(rng, 64)))
        regs[VCPU_REGS_RAX], regs[VCPU_REGS_RDX] = value & MASK32, value >> 32


def msr_operands(rng: Random, case: Case, kvm: Kvm) -> Case:
    """RDMSR and WRMSR among other instructions: an MSR that exists, and in one of two cases a filter."""
    if case.code[-3:-1] not in MSR_CODES:
        return case
    regs = list(case.gpr)
    msr_access(rng, case, regs, kvm)
    if rng.getrandbits(1):
        msr_filter(rng, kvm)
    return msgspec.structs.replace(case, gpr=tuple(regs))


def msr_filter(rng: Random, kvm: Kvm) -> None:
    """Userspace refuses some MSRs, and wants to hear of accesses that fail."""
    knobs = kvm.setdefault("knobs", {})
    knobs["msr_denied"] = ",".join(hex(index) for index in rng.sample(MSRS, len(MSRS) // 2))
    knobs.setdefault("user_space_msr_mask", rng.choice((7, 7, 7, 4, 6, 2, 1, 3)))


def _msr(rng: Random, case: Case, regs: list[int], kvm: Kvm) -> None:
    msr_access(rng, case, regs, kvm)
    if rng.random() < 0.4:
        msr_filter(rng, kvm)


def _control(rng: Random, case: Case, regs: list[int], kvm: Kvm) -> None:
    """The operand is the register's value with a bit changed, or anything."""
    system = case.system
    old = rng.choice((system.cr0, system.cr0, system.cr4, system.cr4, system.cr3, 8))
    value = old ^ 1 << rng.choice((0, 1, 3, 4, 5, 7, 11, 13, 16, 17, 18, 20, 29, 30, 31, 40, 63))
    regs[VCPU_REGS_RAX] = regs[VCPU_REGS_RBX] = value if rng.random() < 0.8 else boundary(rng, 64)
    if rng.random() < 0.03:
        kvm["exit_qualification"] = (
            rng.choice((0, 3, 4, 8, 15)) | rng.choice((0, 1, 3)) << 4 | rng.getrandbits(4) << 8
        )


def _debug(rng: Random, case: Case, regs: list[int], kvm: Kvm) -> None:  # noqa: ARG001 - one signature
    regs[VCPU_REGS_RAX] = rng.choice((0x400, 0xFFFF0FF0, 0x2401, 1 << 32, 0x402, 0))
    if rng.random() < 0.4:
        kvm["guest_debug"] = rng.choice((1, 3, 1 | 1 << 17))


def _hypercall(rng: Random, case: Case, regs: list[int], kvm: Kvm) -> None:  # noqa: ARG001 - one signature
    regs[VCPU_REGS_RAX] = rng.choice(_HYPERCALLS)
    regs[VCPU_REGS_RBX] = rng.choice((0x8000, 0x8008, 0, 1, 0x7000))
    regs[VCPU_REGS_RCX] = rng.choice((0, 1, 0x8000, 0x10002, 0x0003))
    regs[VCPU_REGS_RDX] = rng.choice((0, 1, 0x9000))
    regs[VCPU_REGS_RSI] = rng.choice((0, 1))
    if regs[VCPU_REGS_RAX] == _MAP_GPA_RANGE and rng.random() < 0.7:
        regs[VCPU_REGS_RBX], regs[VCPU_REGS_RCX] = 0x8000, 1
    if rng.random() < 0.5:
        kvm.setdefault("knobs", {})["hypercall_exits"] = True
    if rng.random() < 0.3:
        kvm.setdefault("knobs", {}).update({"hyperv": True, "irqchip": True})


def _xsetbv(rng: Random, case: Case, regs: list[int], kvm: Kvm) -> None:  # noqa: ARG001 - one signature
    regs[VCPU_REGS_RCX] = rng.choice((0, 0, 0, 1))
    regs[VCPU_REGS_RAX], regs[VCPU_REGS_RDX] = rng.choice((1, 3, 7, 0xE7, 2, 5, 0)), rng.choice((0, 0, 0, 1))


def _counter(rng: Random, case: Case, regs: list[int], kvm: Kvm) -> None:  # noqa: ARG001 - one signature
    regs[VCPU_REGS_RCX] = rng.choice((0, 1, 0x40000000, 0x80000000, 0x10000))
    if rng.random() < 0.5:
        kvm.setdefault("knobs", {})["enable_pmu"] = True


def _leaf(rng: Random, case: Case, regs: list[int], kvm: Kvm) -> None:  # noqa: ARG001 - one signature
    regs[VCPU_REGS_RAX] = rng.choice((0, 1, 7, 0xD, 0x80000000, 0x80000008, 0x40000000, 0x12345))
    regs[VCPU_REGS_RCX] = rng.choice((0, 1, 2, 0xFFFFFFFF))


def _invpcid(rng: Random, case: Case, regs: list[int], kvm: Kvm) -> None:
    """The operand's description is made up: address size, segment, base, index, register of the type."""
    regs[VCPU_REGS_RAX] = rng.choice((0, 1, 2, 3, 4))
    regs[VCPU_REGS_RBX] = 0x8000 + rng.randrange(0xFF0)
    size = 2 if case.mode == "prot64" else rng.getrandbits(1)
    kvm["instruction_info"] = size << 7 | 3 << 15 | 1 << 22 | 3 << 23 | 1 << 27
    if rng.random() < 0.2:
        kvm["instruction_info"] = rng.getrandbits(32) & 0xFBFFFBFF
    kvm["exit_qualification"] = rng.choice((0, 8, 0x7000, _MASK64))
    kvm.setdefault("cpuid", {"features": {"invpcid": rng.random() < 0.9}})


def _nothing(rng: Random, case: Case, regs: list[int], kvm: Kvm) -> None:
    """The registers are as good as any."""


def _port(rng: Random, case: Case, regs: list[int], kvm: Kvm) -> None:  # noqa: ARG001 - one signature
    regs[VCPU_REGS_RDX] = rng.choice((0x60, 0x7E, 0x80, 0x3F8, 0x5658, 0xFFFF, rng.getrandbits(16)))
    if rng.random() < 0.15:
        port = regs[VCPU_REGS_RDX]
        kvm["ioeventfds"] = [
            {"addr": port, "port": True} | rng.choice(({}, {"len": 1}, {"len": 2, "datamatch": 1}))
        ]


def _bytes(*texts: str) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(text) for text in texts)


# fmt: off
#: Exits that instructions cause; in 64-bit mode also those of `_WIDE`.
INSTRUCTIONS: Final = (
    Row(er.EXIT_REASON_CR_ACCESS, _bytes("0f22c0", "0f22c3", "0f22d8", "0f22e0", "0f22e3", "0f20d8", "0f20d9",
                                         "0f01f0", "0f01f3", "0f0136", "0f0137"), _control),
    Row(er.EXIT_REASON_DR_ACCESS, _bytes("0f23c0", "0f23d8", "0f23e0", "0f23f0", "0f23f8", "0f21c3", "0f21f0",
                                         "0f21f8"), _debug),
    Row(er.EXIT_REASON_MSR_READ,            _bytes("0f32"),     _msr),
    Row(er.EXIT_REASON_MSR_WRITE,           _bytes("0f30"),     _msr),
    Row(er.EXIT_REASON_CPUID,               _bytes("0fa2"),     _leaf,      privileged=False),
    Row(er.EXIT_REASON_HLT,                 _bytes("f4"),       _nothing),
    Row(er.EXIT_REASON_INVD,                _bytes("0f08"),     _nothing),
    Row(er.EXIT_REASON_WBINVD,              _bytes("0f09"),     _nothing),
    Row(er.EXIT_REASON_INVLPG,              _bytes("0f013b", "0f013f"), _nothing),
    Row(er.EXIT_REASON_RDPMC,               _bytes("0f33"),     _counter),
    Row(er.EXIT_REASON_VMCALL,              _bytes("0f01c1"),   _hypercall, privileged=False),
    Row(er.EXIT_REASON_IO_INSTRUCTION,      _bytes("e460", "e560", "e67e", "e780", "ec", "ed", "66ed", "ee",
                                                   "ef", "66ef"), _port, privileged=False),
    Row(er.EXIT_REASON_PAUSE_INSTRUCTION,   _bytes("f390"),     _nothing,   privileged=False),
    Row(er.EXIT_REASON_MWAIT_INSTRUCTION,   _bytes("0f01c9"),   _nothing),
    Row(er.EXIT_REASON_MONITOR_INSTRUCTION, _bytes("0f01c8"),   _nothing),
    Row(er.EXIT_REASON_XSETBV,              _bytes("0f01d1"),   _xsetbv),
    Row(er.EXIT_REASON_INVPCID,             _bytes("660f388203"), _invpcid),
    Row(er.EXIT_REASON_RDRAND,              _bytes("0fc7f0"),   _nothing,   privileged=False),
    Row(er.EXIT_REASON_RDSEED,              _bytes("0fc7f8"),   _nothing,   privileged=False),
    Row(er.EXIT_REASON_VMREAD,              _bytes("0f78c3"),   _nothing,   privileged=False),
    Row(er.EXIT_REASON_VMLAUNCH,            _bytes("0f01c2"),   _nothing,   privileged=False),
    Row(er.EXIT_REASON_ENCLS,               _bytes("0f01cf"),   _nothing),
)
_WIDE: Final = {er.EXIT_REASON_CR_ACCESS: _bytes("440f22c0", "440f20c3", "410f22c0", "440f20c0")}  # CR8, R8
# fmt: on
#: How often an instruction exits by itself, so that an oracle can judge it; else the exit is described,
#: which may be one that hardware would not raise.
OWN_SHARE: Final = 0.85
#: What CPUID says is the machine's own, so that no oracle can tell whether it is right.
_OTHER_SHARE: Final = 0.7
_DESCRIPTION: Final = ("exit_reason", "exit_qualification")
#: The first rows are taken three times as often.
_COMMON: Final = 12

#: Exits apart from those: events, APIC virtualisation, faults of memory, numbers without a handler.
_OTHERS: Final = (
    *(reason for reason in range(80) if reason not in {row.reason for row in INSTRUCTIONS}),
    *(er.EXIT_REASON_NOTIFY, er.EXIT_REASON_BUS_LOCK, er.EXIT_REASON_TRIPLE_FAULT,
      er.EXIT_REASON_EXCEPTION_NMI, er.EXIT_REASON_APIC_WRITE, er.EXIT_REASON_EOI_INDUCED,
      er.EXIT_REASON_INTERRUPT_WINDOW,
      er.EXIT_REASON_NMI_WINDOW, er.EXIT_REASON_TPR_BELOW_THRESHOLD) * 4,
)  # fmt: skip


def direct_exit(rng: Random, case: Case, kvm: Kvm) -> Case:
    """The case with an instruction that exits, or one in ten times with an exit that it does not cause."""
    regs = list(case.gpr)
    if rng.random() < 0.1:
        return _other_exit(rng, case, kvm)
    rows = INSTRUCTIONS[:_COMMON] if rng.random() < 0.75 else INSTRUCTIONS
    kernel = not case.system.seg[VCPU_SREG_SS].dpl
    possible = [row for row in rows if kernel or not row.privileged]
    row = rng.choice(possible)
    if row.reason == er.EXIT_REASON_CPUID and rng.random() < _OTHER_SHARE:
        row = rng.choice([row for row in possible if row.reason != er.EXIT_REASON_CPUID])
    code = rng.choice(row.codes + (_WIDE.get(row.reason, ()) if case.mode == "prot64" else ()))
    kvm["exit_reason"] = row.reason
    if row.reason in (er.EXIT_REASON_CR_ACCESS, er.EXIT_REASON_DR_ACCESS) and (
        described := _register_access(code)
    ):
        kvm["exit_qualification"] = described
    row.registers(rng, case, regs, kvm)
    if row.reason != er.EXIT_REASON_INVPCID and rng.random() < OWN_SHARE:
        for name in _DESCRIPTION:
            kvm.pop(name, None)
    system = case.system
    if row.reason == er.EXIT_REASON_XSETBV and rng.random() < 0.9:
        system = msgspec.structs.replace(system, cr4=system.cr4 | _OSXSAVE)
    if code in _WIDE[er.EXIT_REASON_CR_ACCESS]:
        system = msgspec.structs.replace(system, cr8=rng.randrange(16))
    wide = MASK32 if case.mode != "prot64" else _MASK64
    gpr = tuple(reg & wide for reg in regs)
    return msgspec.structs.replace(
        case, code=code + b"\xf4", gpr=gpr, rflags=case.rflags | _IOPL, system=system
    )


def _register_access(code: bytes) -> int:
    """Exit qualification of MOV from and to CR and DR (SDM Vol. 3C Tables 28-3, 28-4); 0 for LMSW.

    Given even where hardware exits only if bits change that KVM owns.
    """
    rex, code = (code[0], code[1:]) if code[0] >> 4 == 4 else (0, code)
    modrm = code[2]
    number, gpr = modrm >> 3 & 7 | (rex & 4) << 1, modrm & 7 | (rex & 1) << 3
    reads = code[1] in (0x20, 0x21)
    return 0 if code[1] == 0x01 else number | reads << 4 | gpr << 8


def _other_exit(rng: Random, case: Case, kvm: Kvm) -> Case:
    kvm["exit_reason"] = rng.choice(_OTHERS)
    kvm["exit_qualification"] = rng.choice((0, 1, 0x80, 0xB0, 0x300, 0x181, rng.getrandbits(12)))
    kvm["guest_physical_address"] = rng.choice((0x8000, 0x9000, 0xFEE00080, rng.getrandbits(40)))
    if rng.random() < 0.5:
        kvm.setdefault("knobs", {})["irqchip"] = True
    return case

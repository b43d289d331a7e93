"""Real mode without unrestricted guest, and states that hardware does not enter.

SDM Vol. 3C 26.3.1.2 "Checks on Guest Segment Registers"; Vol. 3A 20.1.4 for the interrupt vector table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any, Final

import msgspec

from emufuzz.arch.regs import (
    VCPU_SREG_CS,
    VCPU_SREG_DS,
    VCPU_SREG_ES,
    VCPU_SREG_FS,
    VCPU_SREG_GS,
    VCPU_SREG_LDTR,
    VCPU_SREG_SS,
    VCPU_SREG_TR,
)
from emufuzz.case.model import Case, Memory, Segment, System, TableRegister
from emufuzz.fuzz.environments import Environment
from emufuzz.fuzz.kvm.scenes import Scene, device_scene
from emufuzz.fuzz.kvm.spice import pending_exception

_DATA: Final = (VCPU_SREG_ES, VCPU_SREG_DS, VCPU_SREG_FS, VCPU_SREG_GS)

#: Instructions that may follow one that is emulated, of any mode: loads of segments, flags, far jumps.
_FOLLOWERS: Final = tuple(
    bytes.fromhex(text)
    for text in ("90", "f8", "f9", "8ed8", "8ec0", "8ed0", "0f20c0", "50", "58", "fb", "fa", "9c", "9d",
                 "31c0", "0f01f0", "f4", "cc", "cd20", "ea00000000", "0fa2", "ec", "0f0b", "a5", "f3aa")
)  # fmt: skip


def ivt_scene(rng: Random, env: Environment) -> Scene:
    """Real mode with a vector table, which may be absent, elsewhere or short."""
    roll = rng.random()
    entries = list(env.mem.entries)
    base, limit = 0, 0x3FF
    if roll < 0.8:
        table = b"".join(
            rng.choice((0x0000, 0x0100, 0xFFFF)).to_bytes(2, "little") + b"\x00\x40" for _ in range(256)
        )
        entries.append((0, table))
    if roll > 0.7:
        base = rng.choice((0x8000, 0x7000, 0x8FF0, 0, 0))
        limit = rng.choice((0x3FF, 0x3F, 3, 0x20))
    system = msgspec.structs.replace(env.system, idtr=TableRegister(base, limit))
    return Scene(dataclasses.replace(env, system=system, mem=Memory(tuple(entries))))


def event(rng: Random, case: Case, kvm: dict[str, Any]) -> Case:
    """An exception, an interrupt or NMIs for real mode."""
    kind = rng.randrange(4)
    if kind == 0:
        kvm["interrupt"] = {"vector": rng.choice((8, 0x10, 0x21, 0x80, 0xFF)), "soft": rng.random() < 0.5}
    elif kind == 1:
        kvm["nmi"] = 1 + rng.getrandbits(1)
        kvm["interruptibility"] = 0
    else:
        kvm["pending"] = pending_exception(rng)
        if rng.random() < 0.1:
            kvm["nmi"] = 1
    kvm["instruction_length"] = rng.choice((0, 1, 2, 3))
    return case


# -- invalid states ------------------------------------------------------------------------------


def invalid_scene(rng: Random, env: Environment) -> Scene:
    """The environment with a segment register that VM entry refuses; one in three times with devices."""
    scene = device_scene(rng, env) if rng.random() < 0.33 else Scene(env)
    change = rng.choice(_REAL if env.mode in ("real", "vm86") else _PROTECTED)
    system = change(rng, env.system)
    return dataclasses.replace(scene, env=dataclasses.replace(scene.env, system=system))


def _with(system: System, nr: int, **fields: int) -> System:
    seg = list(system.seg)
    seg[nr] = msgspec.structs.replace(seg[nr], **fields)
    return msgspec.structs.replace(system, seg=tuple(seg))


def _unreal_limit(rng: Random, system: System) -> System:
    """A limit beyond 64 KiB, as protected mode leaves it behind."""
    for nr in rng.sample(_DATA, 1 + rng.getrandbits(2)):
        system = _with(system, nr, limit=0xFFFFFFFF, g=1)
    return system


def _short_limit(rng: Random, system: System) -> System:
    return _with(system, rng.choice(_DATA), limit=rng.choice((0xFFFE, 0xFFF, 0x1FFFF)))


def _odd_base(rng: Random, system: System) -> System:
    """A base that is not the selector times 16."""
    nr = rng.choice((*_DATA, VCPU_SREG_CS, VCPU_SREG_SS))
    return _with(system, nr, sel=system.seg[nr].sel ^ rng.choice((1, 2, 0x10, 0x1000)))


def _odd_type(rng: Random, system: System) -> System:
    return _with(system, rng.choice((*_DATA, VCPU_SREG_SS)), type=rng.choice((1, 5, 7, 9, 11)))


def _big(rng: Random, system: System) -> System:
    return _with(system, rng.choice((*_DATA, VCPU_SREG_SS)), db=1)


def _rpl_of_stack(rng: Random, system: System) -> System:
    """SS.RPL is not CS.RPL, as right after CR0.PE was set."""
    old = system.seg[VCPU_SREG_SS].sel
    return _with(system, VCPU_SREG_SS, sel=old ^ rng.choice((1, 2, 3)))


def _type_of_stack(rng: Random, system: System) -> System:
    return _with(system, VCPU_SREG_SS, type=rng.choice((1, 5, 11)))


def _data_dpl(rng: Random, system: System) -> System:
    """DPL of a data segment below the RPL of its selector."""
    return _with(system, rng.choice(_DATA), dpl=0, sel=rng.choice((0x33, 0x31, 0x32)))


def _system_segment(rng: Random, system: System) -> System:
    """A data register with a system descriptor."""
    return _with(system, rng.choice(_DATA), s=0, type=2)


def _task_register(rng: Random, system: System) -> System:
    """TR is not busy, not there, or from the LDT."""
    old = system.seg[VCPU_SREG_TR]
    broken = rng.choice(({"type": 9}, {"type": 1}, {"p": 0}, {"sel": old.sel | 4}))
    return _with(system, VCPU_SREG_TR, **broken)


def _local_table(rng: Random, system: System) -> System:
    seg = list(system.seg)
    seg[VCPU_SREG_LDTR] = Segment(rng.choice((0x60, 0x64)), 0x8000, 0x7F, rng.choice((2, 9)), p=1)
    if seg[VCPU_SREG_LDTR] == Segment(0x60, 0x8000, 0x7F, 2, p=1):
        seg[VCPU_SREG_LDTR] = Segment(0x64, 0x8000, 0x7F, 2, p=1)
    return msgspec.structs.replace(system, seg=tuple(seg))


def _code_type(rng: Random, system: System) -> System:
    """CS is not accessed code, or its DPL is not that of CPL."""
    return _with(system, VCPU_SREG_CS, type=rng.choice((3, 8, 10)))


Change = Callable[[Random, System], System]
_REAL: Final[tuple[Change, ...]] = (_unreal_limit, _unreal_limit, _short_limit, _odd_base, _odd_type, _big)
_PROTECTED: Final[tuple[Change, ...]] = (
    _rpl_of_stack, _rpl_of_stack, _type_of_stack, _data_dpl, _system_segment, _task_register, _local_table,
    _code_type,
)  # fmt: skip


def several_instructions(rng: Random, case: Case, kvm: dict[str, Any]) -> Case:  # noqa: ARG001 - a Finish
    """One in three: more instructions behind the first, all emulated while the state stays invalid."""
    if rng.random() < 0.67:
        return case
    number = rng.randrange(1, 6)
    code = case.code.removesuffix(b"\xf4") + b"".join(rng.choice(_FOLLOWERS) for _ in range(number)) + b"\xf4"
    count = rng.choice((number, number + 1, 2, 140))
    return msgspec.structs.replace(case, code=code, count=count)

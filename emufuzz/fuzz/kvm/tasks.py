"""Task switches: TSSs, gates and descriptors, valid and broken (SDM Vol. 3A 7.2, 7.3).

0x1000 GDT          0x2000 32-bit TSS   0x2100 16-bit TSS   0x2200 LDT   0x2800 IDT
0x1800 current TSS  0x9000 a device; 0x7000 is absent
"""

from __future__ import annotations

import dataclasses
import struct
from random import Random
from typing import Any, Final

import msgspec

from emufuzz.arch.descriptors import DescStruct
from emufuzz.arch.regs import VCPU_SREG_TR
from emufuzz.case.model import Case, Memory, TableRegister
from emufuzz.fuzz.environments import Environment
from emufuzz.fuzz.kvm.scenes import Scene, mmio
from emufuzz.fuzz.kvm.spice import vectoring_info

_GDT, _OLD_TSS, _TSS32, _TSS16, _LDT, _IDT = 0x1000, 0x1800, 0x2000, 0x2100, 0x2200, 0x2800
_IDT_LIMIT: Final = 0x7FF
_TASK_GATE: Final = 5

#: Selectors of code and data of DPL 0 and 3 in the table below.
_CODE: Final = (0x10, 0x18, 0x33, 0x3B)
_DATA: Final = (0x20, 0x28, 0x43, 0x4B)
_OLD_TR: Final = 0x58
_LDTR: Final = 0x90

# fmt: off
#: Selector -> a descriptor of a task: type, base, limit, present. Types 1, 3: 16 bits; 9, 11: 32 bits.
_TASKS: Final = {
    0x68: (9,  _TSS32, 0x67,  1),
    0x70: (11, _TSS32, 0x67,  1),
    0x78: (1,  _TSS16, 0x2B,  1),
    0x80: (3,  _TSS16, 0x2B,  1),
    0x88: (9,  _TSS32, 0x67,  0),
    0x98: (9,  _TSS32, 0x66,  1),
    0xA0: (1,  _TSS16, 0x2A,  1),
    0xA8: (9,  0x9000, 0x67,  1),  # a device
    0xB0: (9,  0x7000, 0x67,  1),  # no memory
    0xB8: (9,  0x8FC0, 0x67,  1),  # the end of a page
    0xC0: (2,  _LDT,   0x7F,  1),  # no task
}
# fmt: on
#: Tasks that IRET goes back to, and those that all others go to (SDM Vol. 3A 7.2.2).
_BUSY: Final = (0x70, 0x80)
_AVAILABLE: Final = (0x68, 0x68, 0x78)
#: The rest are tasks that hardware refuses before it exits; KVM looks again.
_GOOD_SHARE: Final = 0.85
_IRET: Final = 1
#: Tasks with a selector that is refused: of such a switch not much is defined, and KVM loses it.
_BAD_SHARE: Final = 0.1
_OTHER: Final = (0x00, 0x10, _OLD_TR, 0xF8, 0x6C, 0xFFF8)


def task_scene(rng: Random, env: Environment) -> Scene:
    """The environment with tasks to switch to, and one device."""
    entries = [(addr, data) for addr, data in env.mem.entries if addr in (0x8000, 0xC000)]
    entries += [
        (_GDT, _gdt(rng)),
        (_OLD_TSS, rng.randbytes(0x68)),
        (_TSS32, _tss32(rng)),
        (_TSS16, _tss16(rng)),
        (_LDT, _flat_descriptors() * 4),
        (_IDT, b"".join(_gate(rng) for _ in range(256))),
    ]
    gdtr = TableRegister(_GDT, 0xC7 if rng.random() < 0.95 else rng.choice((0x5F, 0x67, 0x6F)))
    idtr = TableRegister(_IDT, _IDT_LIMIT if rng.random() < 0.95 else 0x87)
    seg = list(env.system.seg)
    seg[VCPU_SREG_TR] = msgspec.structs.replace(seg[VCPU_SREG_TR], type=rng.choice((11, 11, 11, 3)))
    system = msgspec.structs.replace(
        env.system, seg=tuple(seg), gdtr=gdtr, idtr=idtr, cr3=rng.choice((0, 0x7000))
    )
    return Scene(
        dataclasses.replace(env, system=system, mem=Memory(tuple(entries))),
        {"devices": [mmio(rng, 0x9000, 0x1000)]},
    )


def _gdt(rng: Random) -> bytes:
    rows = [bytes(8), bytes(8), _flat_descriptors()]
    rows += [DescStruct(0, 0xFFFFF, 11, 1, 0, 1, l=1, g=1).pack()]
    busy = 11 if rng.random() < 0.9 else 9
    rows += [DescStruct(_OLD_TSS, 0x67, busy, 0, 0, 1).pack(), bytes(8)]
    table = bytearray(b"".join(rows).ljust(0xC8, b"\0"))
    for selector, (kind, base, limit, present) in _TASKS.items():
        dpl = rng.choice((0, 0, 3))
        table[selector : selector + 8] = DescStruct(base, limit, kind, 0, dpl, present).pack()
    table[_LDTR : _LDTR + 8] = DescStruct(_LDT, 0x7F, 2, 0, 0, int(rng.random() >= _BAD_SHARE)).pack()
    return bytes(table)


def _flat_descriptors() -> bytes:
    """Code and data of 32 and 16 bits, at DPL 0 and 3: selectors 0x10 to 0x48 of the GDT."""
    rows = []
    for dpl in (0, 3):
        for kind in (11, 3):
            rows += [
                DescStruct(0, 0xFFFFF, kind, 1, dpl, 1, d=1, g=1),
                DescStruct(0, 0xFFFF, kind, 1, dpl, 1),
            ]
    return b"".join(row.pack() for row in rows)


def _selectors(rng: Random) -> list[int]:
    """ES CS SS DS FS GS: those of one privilege level, now and then one that is not."""
    level = rng.getrandbits(1)
    code, data = _CODE[2 * level + rng.getrandbits(1)], _DATA[2 * level]
    selectors = [data, code, data, rng.choice((data, 0)), rng.choice((data, 0)), 0]
    if rng.random() < _BAD_SHARE:
        selectors[rng.randrange(6)] = rng.choice((0, 0x68, 0x50, 0xF8, *_CODE, *_DATA, 0x14, 0x21))
    return selectors


def _ldt(rng: Random) -> int:
    return rng.choice((0, _LDTR)) if rng.random() >= _BAD_SHARE else rng.choice((0x68, 0xF8))


def _eflags(rng: Random) -> int:
    return rng.choice((2, 0x202, 0x20002, 0x4202, 0x3202, 0x10002, 0x302))


def _tss32(rng: Random) -> bytes:
    words = [
        0x58,
        *(0xC800, 0x20) * 3,
        rng.choice((0, 0x7000, 0x1000, 0xFFFFFFFF)),
        rng.choice((0x40000, 0x41000)),
    ]
    words += [_eflags(rng), *(rng.getrandbits(32) for _ in range(4)), 0xC700, 0xC600]
    words += [rng.getrandbits(32), rng.getrandbits(32), *_selectors(rng), _ldt(rng), rng.getrandbits(1)]
    return struct.pack("<26I", *words)


def _tss16(rng: Random) -> bytes:
    words = [0x58, *(0xC800, 0x28) * 3, rng.getrandbits(16), _eflags(rng) & 0xFFFF]
    words += [rng.getrandbits(16) for _ in range(4)] + [0xC700, 0xC600, 1, 2]
    words += [*_selectors(rng)[:4], _ldt(rng)]
    return struct.pack("<22H", *words)


def _gate(rng: Random) -> bytes:
    return DescStruct(rng.choice((*_AVAILABLE, *_BUSY)) << 16, 0, _TASK_GATE, 0, rng.choice((0, 3)), 1).pack()


def task_switch(rng: Random, case: Case, kvm: dict[str, Any]) -> Case:
    """Which task, and why: CALL, IRET, JMP, or a gate, with the event that went through it."""
    reason = rng.randrange(4)
    good = _BUSY if reason == _IRET else _AVAILABLE
    selector = rng.choice(good) if rng.random() < _GOOD_SHARE else rng.choice((*_TASKS, *_OTHER))
    kvm["exit_qualification"] = selector | reason << 30
    if reason == 3 or rng.random() < 0.1:
        kvm["vectoring_info"], kvm["vectoring_error_code"] = vectoring_info(rng)
    kvm["instruction_length"] = rng.choice((1, 2, 2, 5, 7))
    return case

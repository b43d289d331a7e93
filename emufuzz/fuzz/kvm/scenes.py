"""Scenes: environments of the generator with a machine around them, and addresses that hit it.

A scene keeps a few instructions together. Some of the pages that its environment has become devices;
effective addresses then aim at them: inside, at their ends, at the ends of pages, and beside them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from emufuzz.arch.regs import VCPU_SREG_DS, VCPU_SREG_ES, VCPU_SREG_SS
from emufuzz.case.model import PAGE_SIZE, Memory, Segment
from emufuzz.fuzz.environments import CHOICES, EDGE_END, Environment

MASK32: Final = 0xFFFFFFFF
MASK64: Final = 0xFFFFFFFFFFFFFFFF

#: Pages of an environment that are no data: GDT and TSS, and the stack.
_SYSTEM_PAGES: Final = frozenset((0x1000, 0x1800))
_STACK_PAGE: Final = 0xC000
#: Different addresses among the CHOICES of a segment.
_AIMED: Final = 64
_CODE: Final = range(0x40000, EDGE_END + PAGE_SIZE)

BEHAVIOURS: Final = ("stream", "ram", "float")
PORTS: Final = (0x20, 0x60, 0x64, 0x70, 0x80, 0xCF8, 0xCFC, 0x3F8, 0x5658, 0x5659, 0xFFFF, 0x7E, 0x1F0)


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """An environment and what its cases have in common beside it.

    `extra` is the cases' `phys` and `devices`, `kvm` what their `kvm` starts from, `ports` ports
    worth using and `spots` linear addresses of devices and other things that exit.
    """

    env: Environment
    extra: dict[str, Any] = field(default_factory=dict)
    kvm: dict[str, Any] = field(default_factory=dict)
    ports: tuple[int, ...] = PORTS
    spots: tuple[int, ...] = ()


def data_pages(env: Environment) -> list[int]:
    """Addresses of the environment's data pages; tables and the stack are none."""
    return sorted(addr for addr, _ in env.mem.entries if addr not in _SYSTEM_PAGES and addr != _STACK_PAGE)


def reachable_pages(env: Environment) -> list[int]:
    """Data pages whose middle DS and ES reach; all data pages if there are none."""
    pages = data_pages(env)
    width = 64 if env.mode == "prot64" else 32 if env.bits == 32 else 16
    space = MASK64 if env.mode == "prot64" else MASK32
    flat = env.mode == "prot64"
    segments = [env.system.seg[nr] for nr in (VCPU_SREG_DS, VCPU_SREG_ES)]
    good = [
        page
        for page in pages
        if all(
            _reaches(page + 0x800 - (0 if flat else seg.base) & space, seg, env.mode, width)
            for seg in segments
        )
    ]
    return good or pages


def device_scene(rng: Random, env: Environment) -> Scene:
    """One or two of the data pages become devices; one in eight times the stack or the GDT, too."""
    data = reachable_pages(env)
    pages = rng.sample(data, min(len(data), 1 + rng.getrandbits(1)))
    roll = rng.random()
    if roll < 0.08:
        pages.append(_STACK_PAGE)
    elif roll < 0.12 and 0x1000 in (addr for addr, _ in env.mem.entries):
        pages.append(0x1000)
    mem = without_pages(env.mem, pages)
    devices = [device for page in pages for device in page_devices(rng, page, mem, pages)]
    spots = tuple(device_spots(rng, devices))
    if _STACK_PAGE in pages:
        env = dataclasses.replace(env, stacks=aimed_stacks(rng, env, spots))
    env = dataclasses.replace(env, mem=mem)
    pio, ports = port_devices(rng)
    return Scene(aimed(rng, env, spots, 0.96), {"devices": devices + pio}, ports=ports, spots=spots)


def without_pages(mem: Memory, pages: list[int]) -> Memory:
    """The memory less what starts in these pages."""
    return Memory(tuple(entry for entry in mem.entries if entry[0] & ~0xFFF not in pages))


def page_devices(rng: Random, page: int, mem: Memory, pages: list[int]) -> list[dict[str, Any]]:
    """Devices in one of `pages`, which have no memory: one for it all, small ones, one across its end."""
    shape = rng.randrange(5)
    above = page + PAGE_SIZE
    free = above <= MASK64 - PAGE_SIZE and above >> 12 not in mem.pages and above not in _CODE
    free = free and above not in pages
    if shape == 0 and free:
        return [mmio(rng, above - rng.randrange(8, 256), rng.randrange(256, 512))]
    if shape <= 2:
        return [mmio(rng, page, PAGE_SIZE)]
    places = sorted(rng.sample(range(0, PAGE_SIZE, 128), 1 + rng.getrandbits(2)))
    return [mmio(rng, page + place + rng.randrange(8), rng.choice((1, 2, 4, 8, 24, 64))) for place in places]


def mmio(rng: Random, addr: int, size: int) -> dict[str, Any]:
    """An MMIO device."""
    return {"kind": "mmio", "addr": hex(addr), "size": size} | _behaviour(rng, size)


def _behaviour(rng: Random, size: int) -> dict[str, Any]:
    behaviour = rng.choice(BEHAVIOURS)
    reads = rng.randbytes(min(size, rng.choice((0, 3, 16, 64)))).hex()
    return {"behaviour": behaviour, "reads": reads} if behaviour != "float" else {"behaviour": behaviour}


def port_devices(rng: Random) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """Up to three port devices, and ports in, beside and apart from them."""
    first = rng.sample(PORTS, rng.randrange(4))
    devices, ports, taken = [], list(PORTS), set[int]()
    for port in first:
        size = min(rng.choice((1, 1, 2, 4, 8)), 0x10000 - port)
        if taken & set(range(port, port + size)):
            continue
        taken |= set(range(port, port + size))
        devices.append({"kind": "pio", "port": port, "size": size} | _behaviour(rng, size))
        ports += [port, port + size - 1, port - 1, port] * 2
    return devices, tuple(port & 0xFFFF for port in ports)


def device_spots(rng: Random, devices: list[dict[str, Any]]) -> list[int]:
    """Addresses that hit MMIO devices fully, partly, across their ends and across pages."""
    spots = []
    for device in devices:
        addr, size = int(device["addr"], 16), device["size"]
        last = addr + size
        page_end = (addr | 0xFFF) + 1
        for _ in range(6):
            spots += [
                addr + rng.randrange(0, size, 8),
                addr + rng.randrange(size),
                last - rng.randrange(1, 17),
            ]
        spots += [addr - rng.randrange(8), page_end - rng.randrange(1, 9), addr]
    return [spot & MASK64 for spot in spots]


def aimed(rng: Random, env: Environment, spots: tuple[int, ...], share: float) -> Environment:
    """The environment with this share of its effective addresses at `spots` where segments allow that."""
    width = 64 if env.mode == "prot64" else 32
    wide = [_aim(rng, env, nr, spots, share, width) for nr in range(6)]
    narrow = [_aim(rng, env, nr, spots, share, 16) for nr in range(6)]
    return dataclasses.replace(env, targets=tuple(wide), targets16=tuple(narrow))


def _aim(
    rng: Random, env: Environment, nr: int, spots: tuple[int, ...], share: float, width: int
) -> tuple[int, ...]:
    old = (env.targets16 if width == 16 else env.targets)[nr]
    seg = env.system.seg[nr]
    base = 0 if env.mode == "prot64" and nr < 4 else seg.base
    space = MASK64 if env.mode == "prot64" else MASK32
    good = [ea for spot in spots if _reaches(ea := spot - base & space, seg, env.mode, width)]
    if not good:
        return old
    pick, roll = rng.choice, rng.random
    return tuple(pick(good) if roll() < share else pick(old) for _ in range(_AIMED)) * (CHOICES // _AIMED)


def _reaches(ea: int, seg: Segment, mode: str, width: int) -> bool:
    """An address of `width` bits can be `ea`, and that byte lies within the segment (SDM Vol. 3A 5.3)."""
    if ea >> width:
        return False
    if mode == "prot64":
        return True
    if not seg.s or seg.type & 12 != 4:
        return ea <= seg.limit
    return seg.limit < ea <= (MASK32 if seg.db else 0xFFFF)


def aimed_stacks(rng: Random, env: Environment, spots: tuple[int, ...]) -> tuple[int, ...]:
    """Stack pointers at `spots`."""
    seg = env.system.seg[VCPU_SREG_SS]
    base = 0 if env.mode == "prot64" else seg.base
    space = MASK64 if env.mode == "prot64" else MASK32
    width = 64 if env.mode == "prot64" else 32 if seg.db else 16
    good = [ea for spot in spots if _reaches(ea := spot - base & space, seg, env.mode, width)]
    if not good:
        return env.stacks
    return tuple(rng.choice(good) for _ in range(_AIMED)) * (CHOICES // _AIMED)

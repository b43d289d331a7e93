"""Scenes with the guest's own page tables: built for an environment, then damaged.

SDM Vol. 3A 4.3 "32-Bit Paging", 4.4 "PAE Paging", 4.5 "4-Level and 5-Level Paging". The tables lie at
TABLES and are mapped themselves, at ALIASES, so that the guest can write to them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from random import Random
from typing import Any, Final

import msgspec

from emufuzz.arch import cr
from emufuzz.arch.regs import VCPU_SREG_SS
from emufuzz.case.arena import ARENA_BASE
from emufuzz.case.model import NO_MEMORY, PAGE_SIZE
from emufuzz.case.paging import PTE_A, PTE_D, PTE_P, PTE_RW, PTE_US
from emufuzz.fuzz.environments import EDGE_END, Environment
from emufuzz.fuzz.kvm.scenes import Scene, aimed, device_spots, mmio, port_devices, reachable_pages

TABLES: Final = 0x100000
ALIASES: Final = 0x20000  # linear address of the first table
_HOLE: Final = 0xD0000000  # guest-physical, nothing there
_PREVENTION: Final = cr.X86_CR4_SMEP | cr.X86_CR4_SMAP | cr.X86_CR4_PKE
_PS: Final = 1 << 7
_G: Final = 1 << 8
_NX: Final = 1 << 63
_LEAF: Final = PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D
_FRAME: Final = 0x000FFFFFFFFFF000

#: Kind of paging -> bytes per entry, address bits per level from the top.
KINDS: Final = {
    "2-level": (4, (10, 10)),
    "pae":     (8, (2, 9, 9)),
    "4-level": (8, (9, 9, 9, 9)),
    "5-level": (8, (9, 9, 9, 9, 9)),
}  # fmt: skip


@dataclass(slots=True)
class Tables:
    """Page tables under construction: `tables` in the order in which they were made, the root first.

    `slots` are (table, offset) of the entries in use, per level, the root's at 0.
    """

    kind: str
    tables: dict[int, bytearray]
    slots: list[list[tuple[int, int]]]

    @property
    def size(self) -> int:
        """Bytes per entry."""
        return KINDS[self.kind][0]

    def entry(self, table: int, offset: int) -> int:
        """An entry's value."""
        return int.from_bytes(self.tables[table][offset : offset + self.size], "little")

    def store(self, table: int, offset: int, value: int) -> None:
        """Set an entry; bits that it does not have are dropped."""
        value &= (1 << self.size * 8) - 1
        self.tables[table][offset : offset + self.size] = value.to_bytes(self.size, "little")

    def map(self, linear: int, physical: int, flags: int = _LEAF) -> None:
        """Map a page, making the tables on the way."""
        size, widths = KINDS[self.kind]
        shift = 12 + sum(widths)
        linear &= (1 << shift) - 1
        table = TABLES
        for level, width in enumerate(widths):
            shift -= width
            offset = (linear >> shift & (1 << width) - 1) * size
            if level == len(widths) - 1:
                self.store(table, offset, physical | flags)
            elif not self.entry(table, offset):
                self._grow(table, offset, level)
            if (table, offset) not in self.slots[level]:
                self.slots[level].append((table, offset))
            table = self.entry(table, offset) & _FRAME

    def _grow(self, table: int, offset: int, level: int) -> None:
        new = TABLES + PAGE_SIZE * len(self.tables)
        self.tables[new] = bytearray(PAGE_SIZE)
        # the PDPTEs of PAE paging have no R/W, U/S and A bits (SDM Vol. 3A Table 4-8)
        flags = PTE_P if self.kind == "pae" and not level else PTE_P | PTE_RW | PTE_US | PTE_A
        self.store(table, offset, new | flags)


def empty_tables(kind: str) -> Tables:
    """Only a root."""
    return Tables(kind, {TABLES: bytearray(PAGE_SIZE)}, [[] for _ in KINDS[kind][1]])


def kind_for(rng: Random, env: Environment) -> str | None:
    """A kind of paging that the environment's mode may have; None for real mode."""
    if env.mode == "real":
        return None
    if env.mode in ("compat16", "compat32", "prot64"):
        return rng.choice(("4-level", "4-level", "4-level", "5-level"))
    return rng.choice(("2-level", "pae"))


def physical_scene(
    rng: Random,
    env: Environment,
    *,
    frames: int = _HOLE,
    devices: bool = True,
    table_share: float = 0.05,
    sound: bool = False,
    damaged: float = 0.3,
    wide: bool = False,
) -> Scene:
    """The environment with its memory behind page tables, one of its data pages a device; damaged at times.

    `frames` is where the device lies, `table_share` how often instructions also aim at the tables and
    `damaged` how often these are; with `sound` they never are, and the guest may fetch and access
    everything, and with `wide` entries have 8 bytes. Real mode has no page tables: its memory just
    becomes physical.
    """
    kind = kind_for(rng, env)
    kind = "pae" if wide and kind == "2-level" else kind
    pages = sorted({addr & ~0xFFF for addr, _ in env.mem.entries})
    device_page = rng.choice(reachable_pages(env)) if devices else None
    kept = [(addr, data) for addr, data in env.mem.entries if addr & ~0xFFF != device_page]
    hole = frames if kind else device_page
    declared = [] if hole is None or device_page is None else _devices(rng, hole)
    spots = _device_aim(rng, declared, hole, device_page)
    if kind is None:
        return _scene(rng, env, [_hex(a, d) for a, d in kept if a < 1 << 52], declared, spots, {})
    system, knobs = paging_system(rng, env, kind)
    if sound:
        system = msgspec.structs.replace(system, cr4=system.cr4 & ~_PREVENTION)
    leaf = _leaf(rng, env, system.cr4)
    tables = empty_tables(kind)
    for page in [*pages, *range(ARENA_BASE, EDGE_END, PAGE_SIZE)]:
        at = hole if page == device_page and hole is not None else frame_of(page)
        tables.map(page, at, leaf | (_G if rng.random() < 0.1 else 0))
    _alias(tables, leaf)
    env = dataclasses.replace(env, system=system)
    if not sound and rng.random() < damaged:
        damage(rng, tables, nx=bool(system.efer & cr.EFER_NX))
    memory = [_hex(frame_of(addr), data) for addr, data in kept]
    memory += [_hex(addr, bytes(table)) for addr, table in tables.tables.items()]
    if rng.random() < table_share:
        spots = (*spots, *_table_spots(rng, tables))
    kvm: dict[str, Any] = {"knobs": knobs} if knobs else {}
    if rng.random() < 0.3 and system.cr4 & cr.X86_CR4_PKE:
        kvm["pkru"] = rng.getrandbits(32)
    return _scene(rng, env, memory, declared, spots, kvm)


def _scene(
    rng: Random, env: Environment, memory: list[dict[str, Any]], devices: list[dict[str, Any]],
    spots: tuple[int, ...], kvm: dict[str, Any],
) -> Scene:  # fmt: skip
    pio, ports = port_devices(rng)
    env = aimed(rng, dataclasses.replace(env, mem=NO_MEMORY), spots, 0.95) if spots else env
    env = dataclasses.replace(env, mem=NO_MEMORY)
    return Scene(env, {"phys": memory, "devices": devices + pio}, kvm, ports, spots)


def frame_of(page: int) -> int:
    """Where a linear page of an environment lies in physical memory; low ones at the same address."""
    return page & 0xFFFFFFF if page < 1 << 28 else 0x2000000 | page >> 12 & 0xFFF000 | page & 0xFFF


def _hex(addr: int, data: bytes) -> dict[str, str]:
    return {"addr": hex(addr), "data": data.hex()} if data else {"addr": hex(addr)}


def _devices(rng: Random, frame: int) -> list[dict[str, Any]]:
    if rng.random() < 0.6:
        return [mmio(rng, frame, PAGE_SIZE)]
    return [mmio(rng, frame + 64 * i, rng.choice((1, 4, 8, 24))) for i in sorted(rng.sample(range(64), 4))]


def _device_aim(
    rng: Random, devices: list[dict[str, Any]], frame: int | None, page: int | None
) -> tuple[int, ...]:
    """Linear addresses of the devices."""
    if frame is None or page is None:
        return ()
    return tuple(spot - frame + page for spot in device_spots(rng, devices))


def _leaf(rng: Random, env: Environment, cr4: int) -> int:
    """Flags of pages: the guest's privilege level can use them, mostly."""
    if env.system.seg[VCPU_SREG_SS].dpl == 3:
        return _LEAF
    protected = cr4 & (cr.X86_CR4_SMEP | cr.X86_CR4_SMAP)
    return _LEAF & ~PTE_US if rng.random() < (0.9 if protected else 0.3) else _LEAF


def _alias(tables: Tables, leaf: int) -> None:
    """Map the tables themselves, as pages of the guest."""
    done = 0
    while done < len(tables.tables):  # mapping one may make another
        for i, table in enumerate(list(tables.tables)):
            tables.map(ALIASES + i * PAGE_SIZE, table, leaf)
            done = i + 1


def _table_spots(rng: Random, tables: Tables) -> list[int]:
    """Linear addresses of table entries, mostly of those that are in use."""
    index = {table: i for i, table in enumerate(tables.tables)}
    spots = []
    for level in tables.slots:
        for table, offset in rng.sample(level, min(len(level), 6)):
            spots.append(ALIASES + index[table] * PAGE_SIZE + offset + rng.choice((0, 0, 0, 1, 5)))
    spots.append(ALIASES + rng.randrange(len(index)) * PAGE_SIZE + rng.randrange(PAGE_SIZE))
    return spots * 2


def paging_system(rng: Random, env: Environment, kind: str) -> tuple[Any, dict[str, Any]]:
    """The environment's System with paging of this kind, and the knobs that it needs."""
    old = env.system
    cr0 = old.cr0 & ~cr.X86_CR0_WP | cr.X86_CR0_PG | (cr.X86_CR0_WP if rng.random() < 0.7 else 0)
    cr4 = old.cr4 & ~(cr.X86_CR4_PAE | cr.X86_CR4_PSE)
    cr4 |= 0 if kind == "2-level" else cr.X86_CR4_PAE
    cr4 |= cr.X86_CR4_PSE if rng.random() < 0.6 else 0
    for bit in (cr.X86_CR4_SMEP, cr.X86_CR4_SMAP, cr.X86_CR4_PGE):
        cr4 |= bit if rng.random() < 0.15 else 0
    knobs: dict[str, Any] = {}
    if kind == "5-level":
        cr4 |= cr.X86_CR4_LA57
        knobs["host_la57"] = True
    if kind in ("4-level", "5-level") and rng.random() < 0.2:
        cr4 |= cr.X86_CR4_PKE
    efer = old.efer & ~cr.EFER_NX | (cr.EFER_NX if rng.random() < 0.6 else 0)
    return msgspec.structs.replace(old, cr0=cr0, cr3=TABLES, cr4=cr4, efer=efer), knobs


def damage(rng: Random, tables: Tables, *, nx: bool) -> None:
    """Change a few entries, mostly of the last level: rights, flags, reserved bits, where they point."""
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        level = len(tables.slots) - 1 if rng.random() < 0.92 else rng.randrange(len(tables.slots))
        table, offset = rng.choice(tables.slots[level])
        value = tables.entry(table, offset)
        tables.store(table, offset, _damaged(rng, tables, value, level, nx=nx))


def _damaged(rng: Random, tables: Tables, value: int, level: int, *, nx: bool) -> int:
    roll = rng.randrange(12)
    if roll < 5:
        return value & ~rng.choice((PTE_A, PTE_D, PTE_RW, PTE_US, PTE_P, PTE_A | PTE_D, PTE_RW | PTE_US))
    if roll == 5:
        return value | (1 << rng.choice((51, 46, 40)) if tables.size == 8 else 1 << 13)
    if roll == 6:
        return value | _NX if tables.size == 8 and (nx or rng.random() < 0.3) else value ^ _G
    if roll == 7 and level < len(tables.slots) - 1:  # a large page, in the top level a reserved bit
        return value & ~_FRAME | _PS | (PTE_D if rng.random() < 0.5 else 0)
    if roll == 8:  # a table or page that has no memory
        return value & ~_FRAME | 0x3000000
    if roll == 9:  # a table that refers to a table of another level
        return value & ~_FRAME | rng.choice(list(tables.tables))
    if roll == 10:
        return value | rng.getrandbits(4) << 59 if tables.size == 8 else value ^ 1 << rng.randrange(9)
    return value ^ 1 << rng.randrange(tables.size * 8)

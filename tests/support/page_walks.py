"""Random page tables, walked by KVM's walker and by Unicorn, for one access each."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from typing import Any

from support.mmu import load_pdptrs

from emufuzz.arch.cr import (
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    X86_CR0_ET,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
    X86_CR4_PSE,
    X86_CR4_SMAP,
    X86_CR4_SMEP,
)
from emufuzz.arch.rflags import X86_EFLAGS_AC
from emufuzz.case.build import build_case
from emufuzz.kvm.memslots import GuestMemory
from emufuzz.kvm.mmu.pferr import PFERR_FETCH_MASK, PFERR_USER_MASK, PFERR_WRITE_MASK
from emufuzz.kvm.mmu.state import PlainPagingState
from emufuzz.kvm.mmu.walker import walk_addr_generic
from emufuzz.oracle.unicorn.engine import NO_VECTOR, UC_ERR_OK, Engine
from emufuzz.oracle.unicorn.image import Template
from emufuzz.oracle.unicorn.layout import probe

MODES = ("2-level", "pae", "4-level")
MEMORY_SIZE = 48 << 20
FRAMES = MEMORY_SIZE >> 12
UNICORN_MAXPHYADDR = 40
_ROOTS = {"2-level": 0x10, "pae": 0x11, "4-level": 0x12}
_POOL = range(0x10, 0x19)  # the roots serve as lower tables too
_CODE_TABLES = 0x20  # three tables that map the code, per mode
_CODE_FRAME = 0x30
_TAG, _SCRATCH, _HLT = 0xFF0, 0xFF4, 0xFF8  # in every frame; no table entry is used there
_HF_SMAP = 1 << 23
_UC_UNMAPPED = (6, 7, 8)  # UC_ERR_READ_UNMAPPED, WRITE, FETCH: translated, but no memory there
_ALWAYS = 0x67  # present, writable, user, accessed, dirty
_WRITTEN = struct.pack("<I", 0x5EED5EED)
_ENTRY = {4: struct.Struct("<I"), 8: struct.Struct("<Q")}


@dataclass(slots=True)
class Trial:
    """One set of tables and one access."""

    mode: str
    addr: int
    access: int
    cr0: int
    cr4: int
    efer: int
    rflags: int
    entries: list[tuple[int, int]] = field(
        default_factory=list
    )  # physical address, value; by level from the top

    @property
    def size(self) -> int:
        return 4 if self.mode == "2-level" else 8


@dataclass(slots=True)
class Result:
    """`error` is the #PF's code or None, `gfn` the frame if it is known, `entries` after the walk."""

    error: int | None
    gfn: int | None
    entries: list[int]
    refused: bool = False  # the PDPTEs cannot be loaded: MOV to CR3 would have raised #GP


def random_trial(rng: random.Random, mode: str) -> Trial:
    """Tables for one address; most entries are usable, some have reserved bits or lead nowhere."""
    user = rng.random() < 0.5
    access = rng.choice((0, PFERR_WRITE_MASK, PFERR_FETCH_MASK)) | (PFERR_USER_MASK if user else 0)
    cr0 = X86_CR0_PG | X86_CR0_ET | X86_CR0_PE | rng.choice((0, X86_CR0_WP))
    cr4 = rng.choice((0, X86_CR4_PSE)) | rng.choice((0, X86_CR4_SMEP)) | rng.choice((0, X86_CR4_SMAP))
    efer = rng.choice((0, EFER_NX))
    if mode != "2-level":
        cr4 |= X86_CR4_PAE
    if mode == "4-level":
        efer |= EFER_LME | EFER_LMA
    rflags = 2 | rng.choice((0, X86_EFLAGS_AC))
    trial = Trial(mode, 0, access, cr0, cr4, efer, rflags)
    _fill(rng, trial)
    return trial


def _fill(rng: random.Random, trial: Trial) -> None:
    size = trial.size
    bits, levels = (10, 2) if size == 4 else (9, 4 if trial.mode == "4-level" else 3)
    frame, addr = _ROOTS[trial.mode], 0
    last = 1019 if size == 4 else 509
    for level in range(levels, 0, -1):
        top = trial.mode == "pae" and level == 3
        index = rng.randint(1, 3) if top else rng.randint(1, last)
        addr |= index << 12 + bits * (level - 1)
        entry, frame = _entry(rng, trial, level, top)
        trial.entries.append(((trial_table := _table_of(trial, len(trial.entries))) + index * size, entry))
        assert trial_table < MEMORY_SIZE
        if frame not in _POOL:
            # Nothing below is ever walked, but the address has to have all its bits.
            addr |= rng.getrandbits(12 + bits * (level - 1)) & ~0xFFF & _tame(level, bits, last)
            break
    offset = {0: _TAG, PFERR_WRITE_MASK: _SCRATCH}.get(trial.access & ~PFERR_USER_MASK, _HLT)
    trial.addr = addr | offset
    if trial.mode == "4-level" and addr >> 47:
        trial.addr |= 0xFFFF << 48


def _tame(level: int, bits: int, last: int) -> int:
    """Keep indices below the tags: clear one high bit of each."""
    mask = (1 << 64) - 1
    for lower in range(1, level):
        mask &= ~(1 << 12 + bits * lower - 1)
    return mask


def _table_of(trial: Trial, depth: int) -> int:
    if depth == 0:
        return _ROOTS[trial.mode] << 12
    return trial.entries[depth - 1][1] & (0xFFFFF000 if trial.size == 4 else 0xFFFFFFF000)


def _entry(rng: random.Random, trial: Trial, level: int, top: bool) -> tuple[int, int]:
    """An entry and the frame of the next table, or 0 if the walk is to end here."""
    large = level in ((2,) if trial.mode != "4-level" else (2, 3)) and rng.random() < 0.25
    leaf = level == 1 or large
    frame = rng.randrange(0x40, FRAMES) if leaf else rng.choice(_POOL)
    chance = rng.random()
    if leaf and chance < 0.03:
        frame = rng.getrandbits(20 if trial.size == 4 else 28)
    if large and chance < 0.9:
        frame &= ~((1 << (10 if trial.size == 4 else 9 * (level - 1))) - 1)
    entry = frame << 12 | (rng.random() < 0.95)
    if top:
        entry |= rng.choice((0, 0, 0, 0, 0, 0, 1 << rng.choice((1, 2, 5, 6, 7, 8, 9, 41, 51, 52, 62, 63))))
        return entry, frame
    for bit, probability in ((1, 0.75), (2, 0.75), (3, 0.2), (4, 0.2), (5, 0.5), (6, 0.5), (8, 0.2)):
        entry |= (rng.random() < probability) << bit
    entry |= rng.getrandbits(3) << 9 | large << 7
    if level == 1:
        entry |= rng.getrandbits(1) << 7
    elif not large and rng.random() < 0.03:
        entry |= 1 << 7
    if trial.size == 8 and rng.random() < 0.2:
        entry |= 1 << 63
    if trial.size == 8 and rng.random() < 0.06:
        entry |= 1 << rng.randint(40, 62)
    ends = leaf or (entry >> 7 & 1 and level < 4)
    return entry, 0 if ends else frame


class Walkers:
    """Unicorn and its memory; the same memory is shown to KVM's walker."""

    def __init__(self) -> None:
        self.engine = Engine(MEMORY_SIZE)
        self.layout = probe(self.engine)
        self.engine.save()
        self.pristine = bytes(self.engine.state)
        self.images: dict[tuple[Any, ...], bytes] = {}
        buffer = self.engine.buffer
        for frame in range(FRAMES):
            struct.pack_into("<II8s", buffer, (frame << 12) + _TAG, frame, 0, b"\xf4" * 8)
        buffer[_CODE_FRAME << 12 : (_CODE_FRAME << 12) + _TAG] = b"\xf4" * _TAG
        for at, code in ((0, b"\x8b\x03"), (0x40, b"\x89\x03")):  # mov eax, [rbx]; mov [rbx], eax
            buffer[(_CODE_FRAME << 12) + at : (_CODE_FRAME << 12) + at + 2] = code
        self._map_code()

    def close(self) -> None:
        self.engine.close()

    def _map_code(self) -> None:
        """Linear page 1 is the code for CPL 0, page 2 for CPL 3."""
        for number, mode in enumerate(MODES):
            table = _CODE_TABLES + number * 4
            size, levels = (4, 2) if mode == "2-level" else (8, 3 if mode == "pae" else 4)
            above = _ROOTS[mode]
            for level in range(levels, 1, -1):
                flags = 1 if mode == "pae" and level == 3 else _ALWAYS
                self._put(size, above << 12, table << 12 | flags)
                above, table = table, table + 1
            self._put(size, (above << 12) + size, _CODE_FRAME << 12 | _ALWAYS & ~4)
            self._put(size, (above << 12) + 2 * size, _CODE_FRAME << 12 | _ALWAYS)

    def _put(self, size: int, address: int, value: int) -> None:
        _ENTRY[size].pack_into(self.engine.buffer, address, value)

    def _get(self, size: int, address: int) -> int:
        return int(_ENTRY[size].unpack_from(self.engine.buffer, address)[0])

    def _image(self, trial: Trial) -> bytes:
        user = trial.access & PFERR_USER_MASK
        mode = "prot64" if trial.mode == "4-level" else "prot32"
        key = (mode, user, trial.cr0, trial.cr4, trial.efer)
        image = self.images.get(key)
        if image is None:
            system = build_case(mode, b"", cpl=3 if user else 0).system
            raw = bytearray(Template(self.layout, self.pristine, system, mode).image)
            cr3 = _ROOTS[trial.mode] << 12
            struct.pack_into("<5Q", raw, self.layout.cr, trial.cr0, 0, 0, cr3, trial.cr4)
            struct.pack_into("<Q", raw, self.layout.efer, trial.efer)
            (hflags,) = struct.unpack_from("<I", raw, self.layout.hflags)
            hflags |= _HF_SMAP if trial.cr4 & X86_CR4_SMAP else 0
            struct.pack_into("<I", raw, self.layout.hflags, hflags)
            image = self.images[key] = bytes(raw)
        return image

    def run(self, trial: Trial) -> tuple[Result, Result]:
        """What KVM's walker and Unicorn make of it."""
        size = trial.size
        for address, value in trial.entries:
            self._put(size, address, value)
        ours = self._kvm(trial)
        theirs = self._unicorn(trial, ours.gfn)
        for address, _ in trial.entries:
            self._put(size, address, 0)
        return ours, theirs

    def _kvm(self, trial: Trial) -> Result:
        buffer = self.engine.buffer
        memory = GuestMemory({frame: buffer[frame << 12 : (frame + 1) << 12] for frame in _POOL})
        memory.set_memory_region(0, 0, FRAMES)
        slots = memory.spaces[0]
        cr3 = _ROOTS[trial.mode] << 12
        state = PlainPagingState(
            trial.cr0, cr3, trial.cr4, trial.efer, trial.rflags, maxphyaddr=UNICORN_MAXPHYADDR
        )
        if trial.mode == "pae":
            pdptrs = load_pdptrs(slots, cr3, UNICORN_MAXPHYADDR)
            if pdptrs is None:
                return Result(None, None, [], refused=True)
            state.pdptrs = pdptrs
        addr = trial.addr if trial.mode == "4-level" else trial.addr & 0xFFFFFFFF
        walker = walk_addr_generic(state, slots, addr, trial.access)
        entries = []
        for address, _ in trial.entries:
            data = slots.read_guest(address, trial.size)
            assert data is not None
            entries.append(int.from_bytes(data, "little"))
        if walker.fault is not None:
            return Result(walker.fault.error_code, None, entries)
        return Result(None, walker.gfn, entries)

    def _unicorn(self, trial: Trial, expected: int | None) -> Result:
        engine, layout = self.engine, self.layout
        fetch, write = trial.access & PFERR_FETCH_MASK, trial.access & PFERR_WRITE_MASK
        code = 0x2000 if trial.access & PFERR_USER_MASK else 0x1000
        rip = trial.addr if fetch else code + (0x40 if write else 0)
        state = engine.state
        state[:] = self._image(trial)
        struct.pack_into("<QQQQ", state, layout.regs, 0x5EED5EED, 0, 0, trial.addr)
        struct.pack_into("<QQ", state, layout.regs + 128, rip, trial.rflags)
        engine.restore()
        engine.flush_tlb()
        engine.vector = NO_VECTOR
        error = engine.start(rip, 1)
        vector = engine.vector
        engine.save()
        entries = [self._get(trial.size, address) for address, _ in trial.entries]
        if vector == 14:
            (code_bits,) = struct.unpack_from("<i", engine.state, layout.error_code)
            return Result(code_bits, None, entries)
        if error in _UC_UNMAPPED:
            return Result(None, None, entries)
        assert error == UC_ERR_OK or (fetch and vector == 13), (trial, error, vector)
        return Result(None, self._frame(trial, expected), entries)

    def _frame(self, trial: Trial, expected: int | None) -> int | None:
        """The frame that the access reached, told by its tag or by what was written there.

        What was written is looked for everywhere only if it is not where it is expected.
        """
        if trial.access & PFERR_FETCH_MASK:
            return None
        if not trial.access & PFERR_WRITE_MASK:
            return int(struct.unpack_from("<I", self.engine.state, self.layout.regs)[0])
        found = (
            -1 if expected is None else self.engine.buffer.find(_WRITTEN, expected << 12, expected + 1 << 12)
        )
        if found < 0:
            found = self.engine.buffer.find(_WRITTEN)
        assert found >= 0
        assert found & 0xFFF == _SCRATCH
        struct.pack_into("<I", self.engine.buffer, found, 0)
        return found >> 12

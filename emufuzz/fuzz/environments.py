"""Environments: the (System, Memory) pairs in which generated instructions run.

There are few of them per seed, shared by many cases, so that engines can keep what they derive
from one. Each knows which effective addresses are good in it: inside pages that exist and segment
limits; and which are bad: absent pages, page crossings, beyond limits, non-canonical.

Linear memory, the same in all modes (all of it below 1 MiB, within reach of real mode), and of few
pages, as engines compare all of them after each case:

    0x01000            GDT and, at 0x1800, a TSS; only in the ordinary variants
    0x08000, 0x09000   data; 0x07000 and 0x0a000 are absent
    0x0c000            stack (and data); 0x0b000 and 0x0d000 are absent
    0x40000 - 0x4efff  code, a fresh slot of 32 bytes per instruction
    0x4f000            code that runs into the absent page at 0x50000

The variants `high` and `odd` have pages at the ends of the address space instead of 0x9000.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Final

import msgspec

from emufuzz.arch import cr, rflags
from emufuzz.arch.descriptors import DescStruct
from emufuzz.arch.regs import VCPU_SREG_CS, VCPU_SREG_SS
from emufuzz.case.model import PAGE_SIZE, UNUSABLE, Memory, Segment, System, TableRegister
from emufuzz.fuzz.values import boundary

ARENA_BASE: Final = 0x40000
ARENA_SIZE: Final = 0xF000
SLOT_SIZE: Final = 32
ARENA_SLOTS: Final = ARENA_SIZE // SLOT_SIZE
EDGE_END: Final = 0x50000  # first address behind the last code page

_GDT, _TSS = 0x1000, 0x1800
_LOW_PAGES: Final = (0x8000, 0x9000, 0xC000)
_STACK_PAGES: Final = (0xC000,)
_HIGH32_PAGES: Final = (0x0, 0x8000, 0xC000, 0x7FFFF000, 0x80000000, 0xFFFFF000)
_HIGH64_PAGES: Final = (
    0x8000, 0xC000, 0xFFFFF000, 0x100000000, 0x7FFFFFFFF000, 0xFFFF800000000000,
)  # fmt: skip

#: Length of the lists of addresses, stack pointers and flags; a power of two.
CHOICES: Final = 256

MASK32: Final = 0xFFFFFFFF
MASK64: Final = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, slots=True, eq=False)
class Environment:
    """Where an instruction runs.

    `targets` and `targets16` are effective addresses per segment register (ES..GS), the latter for
    16-bit addressing; `stacks` values of RSP, `flags` of RFLAGS, `branches` near branch targets.
    `first_rip` is RIP of code slot 0; `edge_rip` the one past the last code page.
    """

    name: str
    mode: str
    bits: int
    system: System
    mem: Memory
    first_rip: int
    edge_rip: int
    targets: tuple[tuple[int, ...], ...]
    targets16: tuple[tuple[int, ...], ...]
    stacks: tuple[int, ...]
    flags: tuple[int, ...]
    branches: tuple[int, ...]


#: Variants of segmentation per mode; the first is the most ordinary one and counts twice.
VARIANTS: Final = {
    "real": ("flat", "based", "cs32"),
    "vm86": ("flat", "based"),
    "prot16": ("flat", "based", "small", "stack32", "expand-down"),
    "prot32": ("flat", "based", "small", "stack16", "expand-down", "odd"),
    "compat16": ("flat", "based", "stack32"),
    "compat32": ("flat", "based", "small", "stack16", "odd"),
    "prot64": ("flat", "high", "based"),
}
_CPLS: Final[dict[str, tuple[int, ...]]] = {"real": (0,), "vm86": (3,)}
_BITS: Final = {"prot32": 32, "compat32": 32, "prot64": 64}


@lru_cache(maxsize=8)
def environments(seed: int, mode: str) -> tuple[Environment, ...]:
    """The environments of one mode for a seed: every variant at CPL 0 and 3, some at 1 and 2."""
    rng = Random(f"environments {seed} {mode}")
    memories = {
        "flat": _memory(rng, _LOW_PAGES, tables=True),
        "high": _memory(rng, _HIGH64_PAGES if mode == "prot64" else _HIGH32_PAGES, tables=False),
    }
    plain = _memory(rng, _LOW_PAGES, tables=False)
    memories["odd"] = memories["high"]
    found: list[Environment] = []
    for i, variant in enumerate(VARIANTS[mode]):
        cpls = _CPLS.get(mode, (0, 3))
        if i == 1 and len(cpls) > 1 and mode != "prot64":
            cpls = (*cpls, 1 + rng.getrandbits(1))
        memory = memories.get(variant, plain)
        found += [_environment(rng, mode, variant, cpl, memory) for cpl in cpls]
    return (*found, *(env for env in found if env.name.endswith("flat")))


def _memory(rng: Random, pages: tuple[int, ...], *, tables: bool) -> Memory:
    entries = [(page, _contents(rng)) for page in pages]
    if tables:
        entries += [(_GDT, _gdt()), (_TSS, bytes(0x68))]
    return Memory(tuple(entries))


def _contents(rng: Random) -> bytes:
    """A page of quadwords: boundary values, pairs of them, and small ones (branch targets, counts)."""
    words = []
    for _ in range(PAGE_SIZE // 8):
        kind = rng.randrange(4)
        if kind == 0:
            words.append(rng.getrandbits(16))
        elif kind == 1:
            words.append(boundary(rng, 32) << 32 | boundary(rng, 32))
        else:
            words.append(boundary(rng, 64))
    return b"".join(word.to_bytes(8, "little") for word in words)


def _gdt() -> bytes:
    """Null, code, data and stack descriptors of CPL 0 and 3, 16 and 32 bits, and a TSS."""
    rows = [DescStruct(), DescStruct()]
    for dpl in (0, 3):
        for kind in (11, 3):
            rows += [
                DescStruct(0, 0xFFFFF, kind, 1, dpl, 1, d=1, g=1),
                DescStruct(0, 0xFFFF, kind, 1, dpl, 1),
            ]
    rows += [DescStruct(0, 0xFFFFF, 11, 1, 0, 1, l=1, g=1), DescStruct(_TSS, 0x67, 11, 0, 0, 1), DescStruct()]
    return b"".join(row.pack() for row in rows)


def _environment(rng: Random, mode: str, variant: str, cpl: int, mem: Memory) -> Environment:
    bits = _BITS.get(mode, 16)
    if variant == "cs32":
        bits = 32
    segments = _segments(rng, mode, variant, cpl)
    system = _system(rng, mode, segments)
    code_base = 0 if mode == "prot64" else segments[VCPU_SREG_CS].base
    reach = [segments[i] for i in range(6)]
    pages = sorted(addr for addr, _ in mem.entries)
    return Environment(
        name=f"{mode}-cpl{cpl}-{variant}",
        mode=mode,
        bits=bits,
        system=system,
        mem=mem,
        first_rip=ARENA_BASE - code_base,
        edge_rip=EDGE_END - code_base,
        targets=tuple(_targets(rng, seg, i, mode, pages, 64 if mode == "prot64" else 32)
                      for i, seg in enumerate(reach)),
        targets16=tuple(_targets(rng, seg, i, mode, pages, 16) for i, seg in enumerate(reach)),
        stacks=tuple(_stack_pointer(rng, segments[VCPU_SREG_SS], mode) for _ in range(CHOICES)),
        flags=tuple(_flags(rng, mode) for _ in range(CHOICES)),
        branches=tuple(_branch(rng, segments[VCPU_SREG_CS], mode) for _ in range(CHOICES)),
    )  # fmt: skip


def _system(rng: Random, mode: str, segments: tuple[Segment, ...]) -> System:
    long = mode in ("compat16", "compat32", "prot64")
    cr0 = cr.X86_CR0_ET | cr.X86_CR0_NE | cr.X86_CR0_MP
    cr4 = cr.X86_CR4_OSFXSR | cr.X86_CR4_OSXMMEXCPT
    efer = rng.choice((0, cr.EFER_SCE, cr.EFER_NX))
    if mode != "real":
        cr0 |= cr.X86_CR0_PE
    if long:
        cr0 |= cr.X86_CR0_PG | cr.X86_CR0_WP
        cr4 |= cr.X86_CR4_PAE
        efer |= cr.EFER_LME | cr.EFER_LMA
    elif mode != "real" and rng.getrandbits(1):
        cr0 |= cr.X86_CR0_PG
    return System(
        seg=segments,
        gdtr=TableRegister(_GDT, len(_gdt()) - 1),
        idtr=TableRegister(0, 0x3FF if mode == "real" else 0xFFF),
        cr0=cr0,
        cr3=0x7000,
        cr4=cr4,
        efer=efer,
        xcr0=3,
        dr=(0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400),
    )


def _segments(rng: Random, mode: str, variant: str, cpl: int) -> tuple[Segment, ...]:
    """ES CS SS DS FS GS TR LDTR."""
    if mode in ("real", "vm86"):
        data = _paragraph_segments(rng, mode, variant)
    else:
        data = _descriptor_segments(rng, mode, variant, cpl)
    tss = Segment(0x58, _TSS, 0x67, 11, 0, 0, 1)
    return (*data, tss, UNUSABLE)


def _paragraph_segments(rng: Random, mode: str, variant: str) -> tuple[Segment, ...]:
    """Real and virtual-8086 mode: base = selector << 4."""
    dpl = 3 if mode == "vm86" else 0
    wide = variant == "cs32"

    def seg(base: int) -> Segment:
        limit = MASK32 if wide else 0xFFFF
        return Segment(base >> 4, base, limit, 3, 1, dpl, 1, 0, 0, int(wide), int(wide))

    if variant == "based":
        bases = [rng.randrange(0x7800, 0x8800, 16) for _ in range(3)]
        return (seg(bases[0]), seg(0x3FFF0), seg(0xB000), seg(bases[1]), seg(0), seg(bases[2]))
    return (seg(0x8000), seg(ARENA_BASE), seg(0xC000), seg(0x8000), seg(0), seg(0x9000))


def _data(sel: int, base: int, limit: int, kind: int, dpl: int, big: int) -> Segment:
    """A data segment; limits of whole pages above 1 MiB are granular."""
    return Segment(sel | dpl, base, limit, kind, 1, dpl, 1, 0, 0, big, int(limit > 0xFFFFF))


def _descriptor_segments(rng: Random, mode: str, variant: str, cpl: int) -> tuple[Segment, ...]:
    """Protected and long modes."""
    big = int(mode in ("prot32", "compat32", "prot64"))
    stack_big = {"stack16": 0, "stack32": 1}.get(variant, big)
    base, limit, kind = 0, MASK32, 3
    if variant in ("based", "small"):
        base = 0x8000 + rng.randrange(0, 0x800, 4)
    if variant == "small":
        limit = rng.choice((0xFFF, 0x17FF, 0x13F0))
    elif variant == "expand-down":
        limit, kind = 0x83FF, 7
    ds = _data(0x30, base, limit, kind, cpl, big)
    es = _data(0x30, 0x4000 if variant not in ("flat", "high") else 0, MASK32, 3, cpl, big)
    stack_base = 0x8000 if variant == "based" else 0
    ss = _data(0x30, stack_base, MASK32 if stack_big or variant != "small" else 0xFFFF, 3, cpl, stack_big)
    fs = _data(0x30, rng.randrange(0x4000, 0x8000), MASK32, 3, cpl, big)
    gs = _data(0x30, rng.randrange(0x8000, 0x8800), MASK32, 3, cpl, big)
    if variant == "odd":
        fs, gs = UNUSABLE, msgspec.structs.replace(gs, type=1)
    return (es, _code_segment(mode, variant, cpl), ss, ds, fs, gs)


def _code_segment(mode: str, variant: str, cpl: int) -> Segment:
    if mode == "prot64":
        return Segment(0x60 | cpl, 0, MASK32, 11, 1, cpl, 1, 0, 1, 0, 1)
    if mode in ("prot16", "compat16"):
        return Segment(0x18 | cpl, ARENA_BASE, 0x1FFFF, 11, 1, cpl, 1, 0, 0, 0, 0)
    base = 0x30000 if variant in ("based", "odd") else 0
    return Segment(0x10 | cpl, base, MASK32, 11, 1, cpl, 1, 0, 0, 1, 1)


def _in_limit(seg: Segment, ea: int) -> bool:
    """A byte at effective address `ea` is inside the segment (SDM Vol. 3A 5.3)."""
    if not seg.s or seg.type & 12 != 4:
        return ea <= seg.limit
    return seg.limit < ea <= (MASK32 if seg.db else 0xFFFF)


def _targets(rng: Random, seg: Segment, nr: int, mode: str, pages: list[int], width: int) -> tuple[int, ...]:
    """CHOICES effective addresses in segment `nr` for addresses of `width` bits, most of them good."""
    base, mask = seg.base, (1 << width) - 1
    if mode == "prot64" and nr < 4:
        base = 0
    space = MASK64 if width == 64 else MASK32
    data = [page for page in pages if page not in (_GDT, _TSS)]
    good = [page for page in data if _reachable(page, base, seg, mode, mask, space)]
    targets = []
    for _ in range(CHOICES):
        roll = rng.random()
        if roll < 0.86 and good:
            ea = rng.choice(good) + _offset(rng) - base
        elif roll < 0.92:
            ea = rng.choice(data) + rng.choice((0, PAGE_SIZE)) - rng.randrange(17) - base
        elif roll < 0.95:
            ea = rng.choice((seg.limit, 0x10000, 0x100000000, 0)) - rng.randrange(17)
        elif roll < 0.97:
            ea = boundary(rng, width)
        else:
            ea = rng.choice((0x7000, 0xA000, 0xD000, 0x800000)) + rng.getrandbits(12) - base
        targets.append(ea & space & mask if width == 16 else ea & space)
    return tuple(targets)


def _reachable(page: int, base: int, seg: Segment, mode: str, mask: int, space: int) -> bool:
    """The middle of a page lies within the segment for addresses up to `mask`."""
    ea = page + PAGE_SIZE // 2 - base & space
    return ea <= mask and (mode == "prot64" or _in_limit(seg, ea))


def _offset(rng: Random) -> int:
    """An offset into a page: mostly aligned and inside, sometimes at its very end."""
    roll = rng.random()
    if roll < 0.6:
        return rng.randrange(0, PAGE_SIZE - 64, 8)
    if roll < 0.93:
        return rng.randrange(PAGE_SIZE - 64)
    return PAGE_SIZE - rng.randrange(1, 17)


def _stack_pointer(rng: Random, seg: Segment, mode: str) -> int:
    """RSP: mostly in the middle of a stack page, sometimes at its ends or at nothing."""
    width = 64 if mode == "prot64" else 32 if seg.db else 16
    base, mask = (0 if mode == "prot64" else seg.base), (1 << width) - 1
    pages = [page for page in _STACK_PAGES if 0 <= page - base <= mask]
    roll = rng.random()
    if roll < 0.86:
        rsp = rng.choice(pages) - base + rng.randrange(0x200, 0xE00, 8)
    elif roll < 0.92:
        rsp = rng.choice(pages) - base + rng.randrange(0x200, 0xE00)
    elif roll < 0.97:
        rsp = rng.choice(pages) - base + rng.choice((0, PAGE_SIZE)) + rng.randrange(-17, 18)
    else:
        rsp = boundary(rng, width)
    high = 0 if width != 16 or rng.getrandbits(1) else rng.getrandbits(16) << 16
    return (rsp & mask) | high


def _flags(rng: Random, mode: str) -> int:
    """RFLAGS: status flags at random; TF and NT hardly ever matter and stay clear."""
    flags = rng.getrandbits(12) & rflags.EFLAGS_MASK | rflags.X86_EFLAGS_FIXED
    flags |= rflags.X86_EFLAGS_DF if rng.random() < 0.25 else 0
    flags |= rflags.X86_EFLAGS_IF if rng.random() < 0.7 else 0
    flags |= rng.choice((0, 0, 3, rng.getrandbits(2))) << rflags.X86_EFLAGS_IOPL_BIT
    flags |= rflags.X86_EFLAGS_ID if rng.random() < 0.1 else 0
    flags |= rflags.X86_EFLAGS_RF if rng.random() < 0.05 else 0
    flags |= rflags.X86_EFLAGS_NT if rng.random() < 0.03 else 0
    return flags | (rflags.X86_EFLAGS_VM if mode == "vm86" else 0)


def _branch(rng: Random, seg: Segment, mode: str) -> int:
    """A near branch target: mostly in the code segment."""
    if rng.random() < 0.85:
        return rng.getrandbits(16)
    if mode == "prot64":
        return boundary(rng, 64)
    return (seg.limit + rng.randrange(-3, 4)) & MASK32

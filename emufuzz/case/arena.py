"""The arena of generated cases: its memory, and segments and control registers of each mode in it.

Linear memory, the same in all modes (all of it below 1 MiB, within reach of real mode), and of few
pages, as engines compare all of them after each case:

    0x01000            GDT and, at 0x1800, a TSS; only in the ordinary variants
    0x08000, 0x09000   data; 0x07000 and 0x0a000 are absent
    0x0c000            stack (and data); 0x0b000 and 0x0d000 are absent
    0x40000 - 0x4efff  code, a fresh slot of 32 bytes per instruction
    0x4f000            code that runs into the absent page at 0x50000

The variants `high` and `odd` have pages at the ends of the address space instead of 0x9000. Data is
pseudo-random: the memories of a seed and mode are what `arena_memories` makes of their generator.
"""

from __future__ import annotations

from random import Random
from typing import Final

import msgspec

from emufuzz.arch import cr
from emufuzz.arch.descriptors import DescStruct
from emufuzz.case.model import PAGE_SIZE, UNUSABLE, Memory, Segment, System, TableRegister
from emufuzz.case.values import boundary

ARENA_BASE: Final = 0x40000
GDT_BASE: Final = 0x1000
TSS_BASE: Final = 0x1800
STACK_PAGES: Final = (0xC000,)
_LOW_PAGES: Final = (0x8000, 0x9000, 0xC000)
_HIGH32_PAGES: Final = (0x0, 0x8000, 0xC000, 0x7FFFF000, 0x80000000, 0xFFFFF000)
_HIGH64_PAGES: Final = (
    0x8000, 0xC000, 0xFFFFF000, 0x100000000, 0x7FFFFFFFF000, 0xFFFF800000000000,
)  # fmt: skip

MASK32: Final = 0xFFFFFFFF

#: Variants of segmentation per mode; the first is the most ordinary one.
VARIANTS: Final = {
    "real": ("flat", "based", "cs32"),
    "vm86": ("flat", "based"),
    "prot16": ("flat", "based", "small", "stack32", "expand-down"),
    "prot32": ("flat", "based", "small", "stack16", "expand-down", "odd"),
    "compat16": ("flat", "based", "stack32"),
    "compat32": ("flat", "based", "small", "stack16", "odd"),
    "prot64": ("flat", "high", "based"),
}
#: Variants that do not have the memory called `plain`.
_MEMORY_OF: Final = {"flat": "flat", "high": "high", "odd": "high"}


def arena_rng(seed: int, mode: str) -> Random:
    """The generator that the environments of a seed and mode come from; its memories are made first."""
    return Random(f"environments {seed} {mode}")


def memory_name(variant: str) -> str:
    """Which of `arena_memories` a variant has."""
    return _MEMORY_OF.get(variant, "plain")


def arena_memories(rng: Random, mode: str) -> dict[str, Memory]:
    """The memories `flat`, `high` and `plain` of a mode."""
    return {
        "flat": _memory(rng, _LOW_PAGES, tables=True),
        "high": _memory(rng, _HIGH64_PAGES if mode == "prot64" else _HIGH32_PAGES, tables=False),
        "plain": _memory(rng, _LOW_PAGES, tables=False),
    }


def _memory(rng: Random, pages: tuple[int, ...], *, tables: bool) -> Memory:
    entries = [(page, _contents(rng)) for page in pages]
    if tables:
        entries += [(GDT_BASE, _gdt()), (TSS_BASE, bytes(0x68))]
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
    rows += [
        DescStruct(0, 0xFFFFF, 11, 1, 0, 1, l=1, g=1),
        DescStruct(TSS_BASE, 0x67, 11, 0, 0, 1),
        DescStruct(),
    ]
    return b"".join(row.pack() for row in rows)


def arena_system(rng: Random, mode: str, segments: tuple[Segment, ...]) -> System:
    """Control registers and tables of a mode around its segments."""
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
        gdtr=TableRegister(GDT_BASE, len(_gdt()) - 1),
        idtr=TableRegister(0, 0x3FF if mode == "real" else 0xFFF),
        cr0=cr0,
        cr3=0x7000,
        cr4=cr4,
        efer=efer,
        xcr0=3,
        dr=(0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400),
    )


def arena_segments(rng: Random, mode: str, variant: str, cpl: int) -> tuple[Segment, ...]:
    """ES CS SS DS FS GS TR LDTR."""
    if mode in ("real", "vm86"):
        data = _paragraph_segments(rng, mode, variant)
    else:
        data = _descriptor_segments(rng, mode, variant, cpl)
    tss = Segment(0x58, TSS_BASE, 0x67, 11, 0, 0, 1)
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

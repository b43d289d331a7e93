"""Environments: the (System, Memory) pairs in which generated instructions run.

There are few of them per seed, shared by many cases, so that engines can keep what they derive
from one. Each knows which effective addresses are good in it: inside pages that exist and segment
limits; and which are bad: absent pages, page crossings, beyond limits, non-canonical.

emufuzz.case.arena has their memory and segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Final

from emufuzz.arch import rflags
from emufuzz.arch.regs import VCPU_SREG_CS, VCPU_SREG_SS
from emufuzz.case.arena import (
    ARENA_BASE,
    GDT_BASE,
    MASK32,
    STACK_PAGES,
    TSS_BASE,
    VARIANTS,
    arena_memories,
    arena_rng,
    arena_segments,
    arena_system,
    memory_name,
)
from emufuzz.case.model import PAGE_SIZE, Memory, Segment, System
from emufuzz.case.values import boundary

ARENA_SIZE: Final = 0xF000
SLOT_SIZE: Final = 32
ARENA_SLOTS: Final = ARENA_SIZE // SLOT_SIZE
EDGE_END: Final = 0x50000  # first address behind the last code page

#: Length of the lists of addresses, stack pointers and flags; a power of two.
CHOICES: Final = 256

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


_CPLS: Final[dict[str, tuple[int, ...]]] = {"real": (0,), "vm86": (3,)}
_BITS: Final = {"prot32": 32, "compat32": 32, "prot64": 64}


@lru_cache(maxsize=8)
def environments(seed: int, mode: str) -> tuple[Environment, ...]:
    """The environments of one mode for a seed: every variant at CPL 0 and 3, some at 1 and 2.

    The ordinary variant counts twice.
    """
    rng = arena_rng(seed, mode)
    memories = arena_memories(rng, mode)
    found: list[Environment] = []
    for i, variant in enumerate(VARIANTS[mode]):
        cpls = _CPLS.get(mode, (0, 3))
        if i == 1 and len(cpls) > 1 and mode != "prot64":
            cpls = (*cpls, 1 + rng.getrandbits(1))
        memory = memories[memory_name(variant)]
        found += [_environment(rng, mode, variant, cpl, memory) for cpl in cpls]
    return (*found, *(env for env in found if env.name.endswith("flat")))


def _environment(rng: Random, mode: str, variant: str, cpl: int, mem: Memory) -> Environment:
    bits = _BITS.get(mode, 16)
    if variant == "cs32":
        bits = 32
    segments = arena_segments(rng, mode, variant, cpl)
    system = arena_system(rng, mode, segments)
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
    data = [page for page in pages if page not in (GDT_BASE, TSS_BASE)]
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
    pages = [page for page in STACK_PAGES if 0 <= page - base <= mask]
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

"""Machine states that have a number in an encoded case: what a case differs in is all that it states.

The default states of emufuzz.case.build for every mode and privilege level, and those of the arena of
generated cases for every variant of segmentation at CPL 0 and 3. Their order is part of the format.
"""

from __future__ import annotations

from functools import cache, lru_cache
from random import Random
from typing import Final, NamedTuple

from emufuzz.arch.modes import MODES
from emufuzz.arch.rflags import X86_EFLAGS_FIXED, X86_EFLAGS_VM
from emufuzz.case.arena import (
    VARIANTS,
    arena_memories,
    arena_rng,
    arena_segments,
    arena_system,
    memory_name,
)
from emufuzz.case.build import build_memory, build_system, cpls_of
from emufuzz.case.model import NO_MEMORY, Memory, System

#: Memories that have a number: none, that of the template (see `built_memory`), and those of the arena.
MEMORIES: Final = ("none", "built", "flat", "high", "plain")
#: Seeds whose arena an encoded case can name.
SEEDS: Final = 16
#: The seed of a campaign that names none, and so of most generated cases.
USUAL_SEED: Final = 1


class Template(NamedTuple):
    """A state: its number, `memory` one of MEMORIES, `rflags` without what instructions change."""

    number: int
    mode: str
    memory: str
    system: System
    rflags: int


@cache
def templates() -> tuple[Template, ...]:
    """All templates; a template's place is its number."""
    found: list[Template] = []
    for mode in MODES:
        states = [("built", build_system(mode, cpl)) for cpl in cpls_of(mode)]
        for variant in VARIANTS[mode]:
            memory = memory_name(variant)
            states += [(memory, _arena(mode, variant, cpl)) for cpl in (0, 3) if cpl in cpls_of(mode)]
        flags = X86_EFLAGS_FIXED | (X86_EFLAGS_VM if mode == "vm86" else 0)
        found += [
            Template(len(found) + i, mode, name, system, flags) for i, (name, system) in enumerate(states)
        ]
    return tuple(found)


def _arena(mode: str, variant: str, cpl: int) -> System:
    rng = Random(f"template {mode} {variant} {cpl}")
    return arena_system(rng, mode, arena_segments(rng, mode, variant, cpl))


@cache
def _of_mode(mode: str) -> tuple[Template, ...]:
    return tuple(template for template in templates() if template.mode == mode)


@lru_cache(maxsize=4096)
def nearest(mode: str, system: System) -> Template:
    """The template of a mode that differs least from a state; of several, the first."""
    return min(_of_mode(mode), key=lambda template: _distance(template.system, system))


def _distance(one: System, other: System) -> int:
    """How many bytes telling the difference takes, roughly."""
    distance = 0
    for old, new in zip(one.seg, other.seg, strict=True):
        if old != new:
            distance += (
                2 + 2 * (old.sel != new.sel) + 3 * (old.base != new.base) + 2 * (old.limit != new.limit)
            )
    for old_table, new_table in ((one.gdtr, other.gdtr), (one.idtr, other.idtr)):
        distance += 3 * (old_table != new_table)
    pairs = ((one.cr0, other.cr0), (one.cr3, other.cr3), (one.cr4, other.cr4), (one.efer, other.efer))
    return distance + 2 * sum(old != new for old, new in pairs)


@lru_cache(maxsize=len(MODES) * SEEDS)
def arena_memory(seed: int, mode: str) -> dict[str, Memory]:
    """The arena's memories of a seed and mode."""
    return arena_memories(arena_rng(seed, mode), mode)


def memory_of(name: str, seed: int, mode: str) -> Memory:
    """One of MEMORIES; `built` is that of the mode's first template."""
    if name == "none":
        return NO_MEMORY
    if name == "built":
        return _built(mode)
    return arena_memory(seed, mode)[name]


@cache
def _built(mode: str) -> Memory:
    return build_memory(mode, _of_mode(mode)[0].system)

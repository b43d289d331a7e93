"""Modes: the same instruction in another mode or at another privilege level; bits of CR0, CR4, EFER, DR7."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Final

import msgspec

from emufuzz.arch import cr
from emufuzz.case.model import Case
from emufuzz.fuzz.environments import ARENA_SLOTS, CHOICES, SLOT_SIZE, Environment, environments
from emufuzz.fuzz.mutate.base import Scope, with_system

#: Seed of the environments that mutants move to: few, so that engines keep what they derive from them.
_SEED: Final = 1
_CR0: Final = (cr.X86_CR0_TS, cr.X86_CR0_EM, cr.X86_CR0_AM, cr.X86_CR0_WP, cr.X86_CR0_MP)
_CR4: Final = (
    cr.X86_CR4_TSD, cr.X86_CR4_UMIP, cr.X86_CR4_OSXSAVE, cr.X86_CR4_PSE, cr.X86_CR4_PGE, cr.X86_CR4_OSFXSR,
    cr.X86_CR4_OSXMMEXCPT, cr.X86_CR4_PCE, cr.X86_CR4_VME, cr.X86_CR4_PVI, cr.X86_CR4_DE,
    cr.X86_CR4_SMEP, cr.X86_CR4_SMAP, cr.X86_CR4_FSGSBASE,
)  # fmt: skip
_EFER: Final = (cr.EFER_SCE, cr.EFER_NX)


@cache
def places(mode: str) -> tuple[Environment, ...]:
    """The environments of a mode that mutants move to."""
    return environments(_SEED, mode)


def moved(case: Case, rng: Random, env: Environment) -> Case:
    """The case's code and registers in an environment, with a stack and flags of it."""
    bits = 64 if env.mode == "prot64" else 32
    gpr = [value & (1 << bits) - 1 for value in case.gpr]
    gpr[4] = env.stacks[rng.randrange(CHOICES)]
    rip = env.first_rip + rng.randrange(ARENA_SLOTS) * SLOT_SIZE
    flags = env.flags[rng.randrange(CHOICES)]
    return msgspec.structs.replace(
        case, mode=env.mode, gpr=tuple(gpr), rip=rip, rflags=flags, system=env.system, mem=env.mem
    )


def other_mode(case: Case, rng: Random, scope: Scope) -> Case | None:
    """Another mode, or another environment of the same one; not for exit paths, which have their scenes."""
    if case.path is not None or case.extra:
        return None
    mode = rng.choice((*scope.modes, case.mode))
    return moved(case, rng, rng.choice(places(mode)))


def other_control(case: Case, rng: Random) -> Case:
    """One or two bits of CR0, CR4 or EFER that leave the mode as it is, or DR7.GD."""
    system = case.system
    cr0, cr4, efer, dr = system.cr0, system.cr4, system.efer, system.dr
    for _ in range(rng.randrange(1, 3)):
        kind = rng.randrange(8)
        if kind < 3:
            cr0 ^= rng.choice(_CR0)
        elif kind < 6:
            cr4 ^= rng.choice(_CR4)
        elif kind == 6:
            efer ^= rng.choice(_EFER)
        else:
            dr = (*dr[:7], dr[7] ^ 1 << 13)
    return with_system(case, cr0=cr0, cr4=cr4, efer=efer, dr=dr)

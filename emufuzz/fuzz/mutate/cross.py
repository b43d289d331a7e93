"""Crossover: an instruction of one parent, the machine of the other; or some of each.

Only what fits together is exchanged: code of the same size, segments of the same mode, devices of the
same path.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final, TypeAlias

import msgspec

from emufuzz.case.model import Case, Memory, System, is_physical
from emufuzz.fuzz.encode import effect_of
from emufuzz.fuzz.mutate.base import (
    Scope,
    address_mask,
    agreed,
    code_bits,
    is_valid,
    with_extra,
    with_system,
)
from emufuzz.fuzz.mutate.instruction import encoded, put_together, taken_apart
from emufuzz.fuzz.mutate.operands import at_same_place, other_registers, tamed
from emufuzz.fuzz.mutate.sequence import LONGEST, may_be_several, of_pieces, pieces
from emufuzz.fuzz.plans import Plan, plans

_ATTEMPTS: Final = 4
_ANY: Final = Scope()

Cross: TypeAlias = Callable[[Case, Case, Random], Case | None]


def crossover(a: Case, b: Case, rng: Random, scope: Scope = _ANY) -> Case:
    """A case with something of both parents, with the id and, mostly, the machine of `a`.

    Args:
        a: A parent.
        b: The other parent.
        rng: Decides everything.
        scope: As for `mutate`.
    """
    for _ in range(_ATTEMPTS):
        child = rng.choice(_CROSSES)(a, b, rng)
        if child is not None and rng.getrandbits(1):
            child = rng.choice(_CROSSES)(child, b, rng) or child
        if child is not None and is_valid(child, a, scope):
            return agreed(tamed(child, rng))
    return tamed(other_registers(a, rng), rng)


def _instruction(a: Case, b: Case, rng: Random) -> Case | None:
    """The first instruction of `b`, as it is; for other code sizes one of the same leaf."""
    mine, theirs = taken_apart(a), taken_apart(b)
    if mine is None or theirs is None or a.path != b.path:
        return None
    bits = code_bits(a)
    insn, form = theirs
    if bits != code_bits(b):
        plan = _plan_of(bits, form.leaf)
        if plan is None:
            return None
        insn = encoded(rng, bits, plan)
    child = put_together(a, insn._replace(head=mine[0].head, rest=mine[0].rest))
    return at_same_place(a, child) if rng.getrandbits(2) else child


def _plan_of(bits: int, leaf: str) -> Plan | None:
    return next((plan for plan in plans(bits) if plan.form.leaf == leaf), None)


def _operand(a: Case, b: Case, rng: Random) -> Case | None:  # noqa: ARG001 - a Cross
    """ModRM, SIB and displacement of `b`, with the registers that they use."""
    mine, theirs = taken_apart(a), taken_apart(b)
    if mine is None or theirs is None or not (mine[0].modrm and theirs[0].modrm):
        return None
    sizes = [effect_of(code_bits(case), insn.prefixes) for case, (insn, _) in ((a, mine), (b, theirs))]
    if sizes[0].ad_bytes != sizes[1].ad_bytes or mine[1].reg >= 0 or mine[1].rm >= 0 or mine[1].mod:
        return None
    insn = mine[0]._replace(modrm=theirs[0].modrm, sib=theirs[0].sib, disp=theirs[0].disp)
    mask = address_mask(a)
    gpr = tuple([value & mask for value in b.gpr])
    return put_together(msgspec.structs.replace(a, gpr=gpr), insn)


def _registers(a: Case, b: Case, rng: Random) -> Case:
    """Each register, and the flags, of one or the other."""
    mix, mask = rng.getrandbits(16), address_mask(a)
    gpr = tuple(
        [
            (theirs if mix >> i & 1 else mine) & mask
            for i, (mine, theirs) in enumerate(zip(a.gpr, b.gpr, strict=True))
        ]
    )
    flags = b.rflags if a.mode == b.mode and rng.getrandbits(1) else a.rflags
    return msgspec.structs.replace(a, gpr=gpr, rflags=flags)


def _system(a: Case, b: Case, rng: Random) -> Case | None:
    """Some segment registers or other fields of the System of `b`, which has the same mode."""
    if a.mode != b.mode or a.system is b.system:
        return None
    if rng.getrandbits(1):
        seg = tuple([rng.choice(pair) for pair in zip(a.system.seg, b.system.seg, strict=True)])
        return with_system(a, seg=seg)
    names = rng.sample(System.__struct_fields__[1:], 3)
    return with_system(a, **{name: getattr(b.system, name) for name in names})


def _memory(a: Case, b: Case, rng: Random) -> Case | None:
    """Some pages of `b`; of flat memory only, as page tables tell where a page lies."""
    if is_physical(a) or is_physical(b) or a.mem is b.mem:
        return None
    mine, theirs = a.mem.pages, b.mem.pages
    taken = {pfn: page for pfn, page in theirs.items() if pfn in mine and rng.getrandbits(1)}
    if not taken:
        return None
    pages = sorted({**mine, **taken}.items())
    return msgspec.structs.replace(a, mem=Memory(tuple([(pfn << 12, page) for pfn, page in pages])))


def _sequence(a: Case, b: Case, rng: Random) -> Case | None:
    """Instructions of `a` and then some of `b`."""
    if not may_be_several(a) or code_bits(a) != code_bits(b):
        return None
    mine, theirs = pieces(a), pieces(b)
    if not mine or not theirs:
        return None
    joined = mine[: rng.randrange(1, len(mine) + 1)] + theirs[rng.randrange(len(theirs)) :]
    return of_pieces(a, joined[:LONGEST])


def _machine(a: Case, b: Case, rng: Random) -> Case | None:
    """Devices, or members of `kvm`, of `b`, which is on the same path."""
    if a.path is None or a.path != b.path:
        return None
    mine, theirs = a.extra or {}, b.extra or {}
    if rng.getrandbits(1) and theirs.get("devices"):
        return with_extra(a, "devices", theirs["devices"])
    taken = {name: value for name, value in (theirs.get("kvm") or {}).items() if rng.getrandbits(1)}
    return with_extra(a, "kvm", {**(mine.get("kvm") or {}), **taken})


_CROSSES: Final[tuple[Cross, ...]] = (
    _instruction, _instruction, _operand, _registers, _registers, _system, _memory, _sequence, _machine,
)  # fmt: skip

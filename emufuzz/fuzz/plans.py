"""Plans: what the generator needs to know to encode one form in one bitness, resolved beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Final

from emufuzz.arch.leaves import FAMILIES
from emufuzz.emulator.flags import OP_CL, OP_REG, OP_XLAT, BitOp, Lock, MemAbs, No64, NoMod, String
from emufuzz.fuzz.encode import Prefixes, immediates, prefix_runs
from emufuzz.fuzz.forms import MOD_REGISTER, Form, forms
from emufuzz.fuzz.prepare import (
    Prepare,
    prepare_bit_offset,
    prepare_branch,
    prepare_cmpxchg,
    prepare_count,
    prepare_dividend,
    prepare_frame,
    prepare_loop,
    prepare_string,
    prepare_xlat,
)

#: Entries of a table of plans; a power of two, so that random bits index it.
PLAN_COUNT: Final = 1 << 14

#: Share of each family among the generated instructions; what the port refuses gets little.
SHARES: Final = {
    "alu": 22, "mov": 10, "stack": 10, "shift": 11, "muldiv": 7, "bits": 14, "bcd": 2, "branch": 10,
    "string": 7, "flagop": 3, "xchg": 6, "hint": 1, "sse": 1, "fpu": 0.3, "io": 0.5, "system": 1,
    "segment": 0.5, "farbranch": 0.5, "virt": 0.3, "undefined": 0.5, "notimpl": 4.5,
}  # fmt: skip

#: Within a family: leaves with a ModRM byte have more to try than one-byte ones.
_MODRM_WEIGHT: Final = 3.0
_INVALID64_WEIGHT: Final = 0.1


@dataclass(slots=True, eq=False)
class Plan:
    """One form in 16-, 32- or 64-bit code.

    `immediates[op_bytes, ad_bytes]` lists encoded immediates, `op_bytes` maps the size that prefixes
    give to the one in effect. `moffs` marks a displacement without ModRM.
    """

    form: Form
    prefixes: tuple[Prefixes, ...]
    opcode: bytes
    has_modrm: bool
    reg: int
    rm: int
    mod: int
    immediates: dict[tuple[int, int], tuple[bytes, ...]]
    prepare: Prepare | None
    moffs: bool
    op_bytes: dict[int, int]


@cache
def plans(bits: int) -> tuple[Plan, ...]:
    """PLAN_COUNT plans for `bits`-bit code; every form that can occur in it has at least one entry."""
    usable = [form for form in forms() if form.mode64 is None or form.mode64 == (bits == 64)]
    weights = _weights(usable, bits)
    made = [_plan(form, bits) for form in usable]
    counts = [max(1, round(weight * (PLAN_COUNT - len(made)))) for weight in weights]
    table = [plan for plan, count in zip(made, counts, strict=True) for _ in range(count)]
    rng = Random(f"plans {bits}")
    while len(table) < PLAN_COUNT:
        table.append(rng.choice(made))
    rng.shuffle(table)
    return tuple(table[:PLAN_COUNT]) if _covers(table[:PLAN_COUNT], made) else tuple(_repair(table, made))


@cache
def even_plans(bits: int) -> tuple[Plan, ...]:
    """PLAN_COUNT plans like `plans`, of implemented forms alone, and all of them equally often."""
    made = list({id(plan): plan for plan in plans(bits) if plan.form.implemented}.values())
    table = (made * (PLAN_COUNT // len(made) + 1))[:PLAN_COUNT]
    Random(f"even plans {bits}").shuffle(table)
    return tuple(table)


def _covers(table: list[Plan], made: list[Plan]) -> bool:
    return len({id(plan) for plan in table}) == len(made)


def _repair(table: list[Plan], made: list[Plan]) -> list[Plan]:
    """Cut the table to size without losing the only entry of a plan."""
    kept = {id(plan): plan for plan in table}
    spare = [plan for plan in table if kept.pop(id(plan), None) is None]
    return made + spare[: PLAN_COUNT - len(made)]


def _weights(usable: list[Form], bits: int) -> list[float]:
    """The share of each form, 1 in total."""
    raw = [_weight(form, bits) for form in usable]
    totals = dict.fromkeys(FAMILIES, 0.0)
    for form, weight in zip(usable, raw, strict=True):
        totals[form.family] += weight
    share = sum(SHARES[family] for family, total in totals.items() if total)
    return [
        weight / totals[form.family] * SHARES[form.family] / share
        for form, weight in zip(usable, raw, strict=True)
    ]


def _weight(form: Form, bits: int) -> float:
    weight = _MODRM_WEIGHT if form.has_modrm else 1.0
    return weight * _INVALID64_WEIGHT if bits == 64 and form.d & No64 else weight


def _plan(form: Form, bits: int) -> Plan:
    mod = form.mod
    if form.d & NoMod or form.rm >= 0:
        mod = MOD_REGISTER
    sizes = [(op, ad) for op in (2, 4, 8) for ad in (2, 4, 8)]
    op_bytes = {op: form.operand_bytes(op, bits) for op in (2, 4, 8)}
    return Plan(
        form,
        prefix_runs(bits, _prefix_class(form)),
        form.opcode,
        form.has_modrm,
        form.reg,
        form.rm,
        mod,
        {(op, ad): immediates(_immediate_size(form, op_bytes[op], ad)) for op, ad in sizes},
        _prepare(form),
        bool(form.d & MemAbs),
        op_bytes,
    )


def _immediate_size(form: Form, op_bytes: int, ad_bytes: int) -> int:
    """Bytes behind ModRM; for leaves whose operands the tables do not know, enough to look plausible."""
    return form.immediate_bytes(op_bytes, ad_bytes) if form.family != "notimpl" else 5


def _prefix_class(form: Form) -> str:
    if form.prefix:
        return form.prefix
    if form.d & String:
        return "rep"
    return "lock" if form.d & Lock and form.mod != MOD_REGISTER else "any"


def _prepare(form: Form) -> Prepare | None:
    """What to do to the registers so that the instruction does more than fault."""
    if form.d & String:
        return prepare_string
    if form.src == OP_XLAT:
        return prepare_xlat
    if form.d & BitOp and form.src == OP_REG:
        return prepare_bit_offset
    if OP_CL in (form.src, form.src2):
        return prepare_count
    return _PREPARE_BY_MNEMONIC.get(form.mnemonic)


_PREPARE_BY_MNEMONIC: Final = {
    "div": prepare_dividend,
    "idiv": prepare_dividend,
    "loop": prepare_loop,
    "loope": prepare_loop,
    "loopne": prepare_loop,
    "jcxz/jecxz/jrcxz": prepare_loop,
    "enter": prepare_frame,
    "leave": prepare_frame,
    "cmpxchg": prepare_cmpxchg,
    "call r/m": prepare_branch,
    "jmp r/m": prepare_branch,
}

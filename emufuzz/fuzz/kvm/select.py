"""Plans of the generator by what their instructions do, so that they exit on the path they are made for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Final

from emufuzz.emulator.flags import (
    OP_DI,
    OP_MEM,
    OP_MEM8,
    OP_MEM16,
    OP_MEM32,
    OP_MEM64,
    OP_MEMFADDR,
    OP_SI,
    OP_XLAT,
    EmulateOnUD,
    MemAbs,
    NoAccess,
    NoWrite,
    Stack,
    String,
)
from emufuzz.fuzz.encode import Prefixes
from emufuzz.fuzz.forms import MOD_MEMORY, MOD_REGISTER, Form
from emufuzz.fuzz.plans import Plan, plans

_MEMORY: Final = frozenset(
    (OP_MEM, OP_MEM8, OP_MEM16, OP_MEM32, OP_MEM64, OP_MEMFADDR, OP_DI, OP_SI, OP_XLAT)
)
_WRITTEN: Final = frozenset((OP_MEM, OP_MEM8, OP_MEM16, OP_MEM32, OP_MEM64, OP_DI))
_PORT_STRINGS: Final = frozenset((0x6C, 0x6D, 0x6E, 0x6F))
_PORTS: Final = frozenset((*range(0xE4, 0xE8), *range(0xEC, 0xF0))) | _PORT_STRINGS
_RDPMC: Final = b"\x0f\x33"
#: Forms that the tables do not know touch memory, too, one in so many plans.
_UNKNOWN_SHARE: Final = 16


def is_port(form: Form) -> bool:
    """IN, OUT, INS, OUTS."""
    return len(form.opcode) == 1 and form.opcode[0] in _PORTS


def is_port_string(form: Form) -> bool:
    """INS, OUTS."""
    return len(form.opcode) == 1 and form.opcode[0] in _PORT_STRINGS


def touches_memory(form: Form) -> bool:
    """An operand in memory is read or written."""
    if form.d & NoAccess or form.mod == MOD_REGISTER or is_port(form):
        return False
    operands = {form.dst, form.src, form.src2}
    return form.implemented and bool(operands & _MEMORY or form.d & (MemAbs | String))


def writes_memory(form: Form) -> bool:
    """The destination is in memory."""
    return touches_memory(form) and form.dst in _WRITTEN and not form.d & NoWrite


def uses_stack(form: Form) -> bool:
    """Pushes or pops."""
    return form.implemented and bool(form.d & Stack)


def is_table_access(form: Form) -> bool:
    """SLDT, STR, LLDT, LTR, and SGDT, SIDT, LGDT, LIDT."""
    if form.opcode == b"\x0f\x00":
        return 0 <= form.reg <= 3
    return form.opcode == b"\x0f\x01" and 0 <= form.reg <= 3 and form.mod == MOD_MEMORY


def _any(_: Form) -> bool:
    return True


#: What a path asks for -> which forms it means.
KINDS: Final[dict[str, Callable[[Form], bool]]] = {
    "any": _any,
    "memory": touches_memory,
    "write": writes_memory,
    "stack": uses_stack,
    "port": is_port,
    "port-string": is_port_string,
    "backdoor": lambda form: is_port(form) or form.opcode == _RDPMC,
    "msr": lambda form: form.opcode in (b"\x0f\x30", b"\x0f\x32"),
    "ud": lambda form: bool(form.d & EmulateOnUD),
    "tables": is_table_access,
    "unknown": lambda form: not form.implemented and form.has_modrm and form.mod != MOD_REGISTER,
}


@cache
def chosen_plans(kind: str, bits: int) -> tuple[Plan, ...]:
    """The plans of one of KINDS for `bits`-bit code, in the shares that the generator gives them.

    Those of `memory` and `write` have their operand in memory.
    """
    found = [plan for plan in plans(bits) if KINDS[kind](plan.form)]
    if kind in ("memory", "write", "unknown"):
        found = [_in_memory(plan) for plan in found]
    if kind == "memory":
        unknown = [_in_memory(plan) for plan in plans(bits) if KINDS["unknown"](plan.form)]
        found += unknown[: len(found) // _UNKNOWN_SHARE]
    return tuple(found)


def _in_memory(plan: Plan) -> Plan:
    plan = dataclasses.replace(plan, mod=MOD_MEMORY) if plan.has_modrm else plan
    return dataclasses.replace(plan, prefixes=_usual(plan.prefixes))


@cache
def _usual(runs: tuple[Prefixes, ...]) -> tuple[Prefixes, ...]:
    """As many runs of prefixes, with few LOCKs, which fault, and few other sizes of addresses, which miss."""
    sizes = Counter(run.ad_bytes for run in runs)
    default = max(sizes, key=sizes.__getitem__)
    usual = [run for i, run in enumerate(runs) if (not run.lock and run.ad_bytes == default) or i % 8 == 0]
    return tuple(usual[i % len(usual)] for i in range(len(runs)))

"""Instructions: another one, or another prefix, opcode, ModRM, SIB, displacement or immediate.

SDM Vol. 2A 2.1 "Instruction Format". What follows the first instruction stays where it is in the code.
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Final, NamedTuple

import msgspec

from emufuzz.case.model import Case
from emufuzz.case.paths import EXIT_PATH
from emufuzz.fuzz.encode import Prefixes, displacements, effect_of, memory_forms, prefix_runs
from emufuzz.fuzz.forms import MOD_MEMORY, MOD_REGISTER, PREFIX_CLASSES, Form, forms
from emufuzz.fuzz.generate import HLT
from emufuzz.fuzz.kvm.recipes import RECIPES
from emufuzz.fuzz.kvm.select import chosen_plans
from emufuzz.fuzz.mutate.base import MASK64, code_bits
from emufuzz.fuzz.plans import PLAN_COUNT, Plan, plans
from emufuzz.fuzz.shrink.layout import layout_of
from emufuzz.fuzz.values import boundary_bytes

#: What the port refuses, or decodes as nothing, gets one in so many new instructions.
_REFUSED: Final = 24
_MOST_IMMEDIATE: Final = 10
#: ModRM of an operand relative to RIP, without its reg (SDM Vol. 2A 2.2.1.6).
_RIP_RELATIVE: Final = 5
#: Instructions that a path is not made for get one in so many, too.
_STRANGERS: Final = 16
#: Paths of which each case has the one instruction that its exit is about.
_OWN_CODE: Final = (EXIT_PATH, "msr-completion")


class Insn(NamedTuple):
    """An instruction's parts in order; `head` is a prefix of forced emulation, `rest` what follows it."""

    head: bytes
    prefixes: bytes
    opcode: bytes
    modrm: bytes
    sib: bytes
    disp: bytes
    imm: bytes
    rest: bytes

    def bytes(self) -> bytes:
        """All of the code."""
        return b"".join(self)


def taken_apart(case: Case, at: int = 0) -> tuple[Insn, Form] | None:
    """The instruction at offset `at` of the code, and the form it has; None if its bytes end too early."""
    case = msgspec.structs.replace(case, code=case.code[at:]) if at else case
    layout = layout_of(case)
    if layout is None:
        return None
    code, bits = case.code, code_bits(case)
    opcode = code[layout.opcode : layout.modrm if layout.modrm >= 0 else layout.imm]
    prefixes = code[layout.start : layout.opcode]
    modrm = code[layout.modrm : layout.modrm + 1] if layout.modrm >= 0 else b""
    form = _form_of(bits, opcode, modrm, prefixes)
    if form is None:
        return None
    sib = code[layout.sib : layout.sib + 1] if layout.sib >= 0 else b""
    size = min(immediate_size(form, effect_of(bits, prefixes), bits), len(code) - layout.imm)
    end = layout.imm + size
    disp = code[layout.disp : layout.imm]
    parts = (code[: layout.start], prefixes, opcode, modrm, sib, disp, code[layout.imm : end], code[end:])
    return Insn(*parts), form


def immediate_size(form: Form, prefixes: Prefixes, bits: int) -> int:
    """Bytes behind ModRM, SIB and displacement."""
    return form.immediate_bytes(form.operand_bytes(prefixes.op_bytes, bits), prefixes.ad_bytes)


@cache
def _forms_by_opcode() -> dict[bytes, tuple[Form, ...]]:
    found: dict[bytes, list[Form]] = {}
    for form in forms():
        found.setdefault(form.opcode, []).append(form)
    return {opcode: tuple(those) for opcode, those in found.items()}


def _form_of(bits: int, opcode: bytes, modrm: bytes, prefixes: bytes) -> Form | None:
    """The form that these bytes select; one with the same opcode if their ModRM selects none."""
    candidates = [form for form in _forms_by_opcode().get(opcode, ()) if form.mode64 in (None, bits == 64)]
    if not candidates:
        return None
    kind = _prefix_class(prefixes)
    return next((form for form in candidates if _selects(form, modrm, kind)), candidates[0])


def _selects(form: Form, modrm: bytes, kind: str) -> bool:
    if form.prefix and form.prefix != kind:
        return False
    if not modrm:
        return True
    mod, reg, rm = modrm[0] >> 6, modrm[0] >> 3 & 7, modrm[0] & 7
    if form.reg not in (-1, reg) or form.rm not in (-1, rm):
        return False
    return not form.mod or (form.mod == MOD_REGISTER) == (mod == 3)


def _prefix_class(prefixes: bytes) -> str:
    """The mandatory prefix that a run of prefixes amounts to, one of PREFIX_CLASSES."""
    for byte in reversed(prefixes):
        if byte in (0xF2, 0xF3):
            return PREFIX_CLASSES[2 + (byte & 1)]
    return PREFIX_CLASSES[1 if 0x66 in prefixes else 0]


def put_together(case: Case, insn: Insn) -> Case:
    """The case with this code; code that ends with its page, and not with HLT, goes on doing that."""
    code = insn.bytes()
    rip = case.rip
    if case.count == 1 and not case.code.endswith(HLT):
        rip = rip + len(case.code) - len(code) & (MASK64 if case.mode == "prot64" else 0xFFFFFFFF)
    return msgspec.structs.replace(case, code=code, rip=rip)


def moved_code(case: Case, distance: int) -> Case:
    """The case with its code so many bytes further; an operand relative to RIP stays where it is."""
    mask = MASK64 if case.mode == "prot64" else 0xFFFFFFFF
    moved = msgspec.structs.replace(case, rip=case.rip + distance & mask)
    if case.mode != "prot64" or not any(byte & 0xC7 == _RIP_RELATIVE for byte in case.code):
        return moved
    layout = layout_of(case)
    if layout is None or layout.modrm < 0 or case.code[layout.modrm] & 0xC7 != _RIP_RELATIVE:
        return moved
    disp = int.from_bytes(case.code[layout.disp : layout.imm], "little") - distance & 0xFFFFFFFF
    code = case.code[: layout.disp] + disp.to_bytes(4, "little") + case.code[layout.imm :]
    return msgspec.structs.replace(moved, code=code)


# -- new instructions ----------------------------------------------------------------------------


@cache
def _implemented(bits: int) -> tuple[Plan, ...]:
    return tuple(plan for plan in plans(bits) if plan.form.implemented)


@cache
def _each(bits: int) -> tuple[Plan, ...]:
    """Every implemented form once."""
    return tuple({id(plan): plan for plan in _implemented(bits)}.values())


def any_plan(rng: Random, bits: int) -> Plan:
    """A form, half of them with equal chances, half in the generator's shares; few that the port refuses."""
    if rng.getrandbits(1):
        table = _each(bits)
        return table[rng.randrange(len(table))]
    if rng.randrange(_REFUSED):
        table = _implemented(bits)
        return table[rng.randrange(len(table))]
    return plans(bits)[rng.getrandbits(PLAN_COUNT.bit_length() - 1)]


def fitting_plan(case: Case, rng: Random) -> Plan:
    """A form for the case's code; on an exit path mostly one that leads there."""
    bits = code_bits(case)
    if case.path is None or not rng.randrange(_STRANGERS):
        return any_plan(rng, bits)
    table = chosen_plans(rng.choice(RECIPES[case.path].kinds), bits)
    return table[rng.randrange(len(table))]


def encoded(rng: Random, bits: int, plan: Plan, run: Prefixes | None = None) -> Insn:
    """An instruction of this form with random operands and, unless given, prefixes."""
    run = plan.prefixes[rng.getrandbits(9)] if run is None else run
    modrm = sib = disp = b""
    if plan.has_modrm:
        modrm, sib, disp = operand(rng, bits, plan.form, run, plan.mod)
    imm = boundary_bytes(rng, size) if (size := immediate_size(plan.form, run, bits)) else b""
    return Insn(b"", run.data, plan.opcode, modrm, sib, disp, imm, b"")


def operand(rng: Random, bits: int, form: Form, run: Prefixes, mod: int) -> tuple[bytes, bytes, bytes]:
    """ModRM, SIB and displacement that the form allows; `mod` is a MOD_* constraint."""
    reg = form.reg if form.reg >= 0 else rng.getrandbits(3)
    if mod == MOD_MEMORY or (mod != MOD_REGISTER and rng.getrandbits(2)):
        chosen = memory_forms(run.ad_bytes, run.rex & 3, bits == 64)[rng.getrandbits(11)]
        data = chosen.by_reg[reg]
        return data[:1], data[1:], displacements(chosen.disp)[rng.getrandbits(8)][1]
    rm = form.rm if form.rm >= 0 else rng.getrandbits(3)
    return bytes((0xC0 | reg << 3 | rm,)), b"", b""


def new_instruction(case: Case, rng: Random) -> Case | None:
    """Another instruction instead of the first one."""
    if case.path in _OWN_CODE:
        return None
    insn = encoded(rng, code_bits(case), fitting_plan(case, rng))
    found = taken_apart(case)
    head, rest = (found[0].head, found[0].rest) if found else (b"", HLT)
    return put_together(case, insn._replace(head=head, rest=rest))


def other_opcode(case: Case, rng: Random) -> Case | None:
    """Another opcode with the same operands; an immediate if it has one."""
    found = taken_apart(case)
    if found is None or case.path in _OWN_CODE:
        return None
    insn, form = found
    bits = code_bits(case)
    for _ in range(8):
        plan = fitting_plan(case, rng)
        if plan.has_modrm == bool(insn.modrm) and plan.form is not form:
            break
    other = plan.form
    run = effect_of(bits, insn.prefixes)
    insn = insn._replace(opcode=plan.opcode, imm=_fitted(rng, insn.imm, immediate_size(other, run, bits)))
    if plan.has_modrm and (not insn.modrm or not _selects(other, insn.modrm, other.prefix)):
        modrm, sib, disp = operand(rng, bits, other, run, plan.mod)
        insn = insn._replace(modrm=modrm, sib=sib, disp=disp)
    if not plan.has_modrm:
        insn = insn._replace(modrm=b"", sib=b"", disp=b"")
    if other.prefix and other.prefix != _prefix_class(insn.prefixes):
        insn = insn._replace(prefixes=prefix_runs(bits, other.prefix)[rng.getrandbits(9)].data)
    return put_together(case, insn)


def _fitted(rng: Random, old: bytes, size: int) -> bytes:
    """An immediate of this size, the old one as far as it goes."""
    if len(old) >= size:
        return old[:size]
    return old + boundary_bytes(rng, size - len(old))


def other_prefixes(case: Case, rng: Random) -> Case | None:
    """Another run of prefixes; operands keep their sizes in bytes only as far as those stay valid."""
    found = taken_apart(case)
    if found is None:
        return None
    insn, form = found
    bits = code_bits(case)
    run = prefix_runs(bits, form.prefix or "any")[rng.getrandbits(9)]
    if insn.modrm and insn.modrm[0] < 0xC0 and run.ad_bytes != effect_of(bits, insn.prefixes).ad_bytes:
        modrm, sib, disp = operand(rng, bits, form, run, MOD_MEMORY)
        insn = insn._replace(modrm=modrm, sib=sib, disp=disp)
    imm = _fitted(rng, insn.imm, immediate_size(form, run, bits))
    return put_together(case, insn._replace(prefixes=run.data, imm=imm))


def other_modrm(case: Case, rng: Random) -> Case | None:
    """Another operand: registers, or memory in another form."""
    found = taken_apart(case)
    if found is None or not found[0].modrm:
        return None
    insn, form = found
    bits = code_bits(case)
    run = effect_of(bits, insn.prefixes)
    modrm, sib, disp = operand(rng, bits, form, run, form.mod if form.rm < 0 else MOD_REGISTER)
    return put_together(case, insn._replace(modrm=modrm, sib=sib, disp=disp))


def other_sib(case: Case, rng: Random) -> Case | None:
    """Another scale, index or base."""
    found = taken_apart(case)
    if found is None or not found[0].sib:
        return None
    insn = found[0]
    sib = insn.sib[0] ^ 1 << rng.randrange(8)
    disp = insn.disp
    if insn.modrm[0] < 0x40:  # mod 0: base 5 stands for a displacement of 4 bytes
        disp = _fitted(rng, disp, 4) if sib & 7 == 5 else b""
    return put_together(case, insn._replace(sib=bytes((sib,)), disp=disp))


def other_displacement(case: Case, rng: Random) -> Case | None:
    """Another displacement of the same size."""
    found = taken_apart(case)
    if found is None or not found[0].disp:
        return None
    return put_together(case, found[0]._replace(disp=_other_bytes(rng, found[0].disp)))


def other_immediate(case: Case, rng: Random) -> Case | None:
    """Another immediate of the same size."""
    found = taken_apart(case)
    if found is None or not found[0].imm:
        return None
    return put_together(case, found[0]._replace(imm=_other_bytes(rng, found[0].imm)))


def _other_bytes(rng: Random, old: bytes) -> bytes:
    """A boundary value, or one near the old one."""
    size = len(old)
    if rng.getrandbits(1):
        return boundary_bytes(rng, min(size, _MOST_IMMEDIATE)).ljust(size, b"\0")
    change = rng.choice((1, -1, 2, 8, -8, 1 << 8 * size - 1))
    return (int.from_bytes(old, "little") + change & (1 << 8 * size) - 1).to_bytes(size, "little")

"""Structured generation: cases from the opcode tables.

`generate_batch` gives a numbered batch of cases that depends on its arguments alone. A batch is
made of runs of instructions in one environment, so that engines switch environments seldom. An
instruction is put together from tables (`encode`, `plans`); then, per register state, the
registers that form its address are solved for an effective address that the environment offers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Final, NamedTuple

from emufuzz.arch.modes import MODES
from emufuzz.arch.regs import VCPU_SREG_DS
from emufuzz.case.model import Case
from emufuzz.fuzz.encode import displacements, memory_forms
from emufuzz.fuzz.environments import ARENA_SLOTS, SLOT_SIZE, Environment, environments
from emufuzz.fuzz.forms import MOD_MEMORY, MOD_REGISTER
from emufuzz.fuzz.plans import PLAN_COUNT, Plan, even_plans, plans
from emufuzz.fuzz.prepare import Encoding
from emufuzz.fuzz.values import pool

#: Instructions in a row that share an environment.
RUN_LENGTH: Final = 32
#: Register files made per batch.
FILE_COUNT: Final = 128
#: HLT ends each case's code: nothing behind the instruction runs, whatever an engine translates.
HLT: Final = b"\xf4"

MASK64: Final = 0xFFFFFFFFFFFFFFFF
_ADDRESS_MASK: Final = {2: 0xFFFF, 4: 0xFFFFFFFF, 8: MASK64}
_DISP_MASK: Final = {2: 0xFFFF, 4: 0xFFFFFFFF}
_REGISTER_MODRM: Final = tuple(tuple(bytes((0xC0 | reg << 3 | rm,)) for rm in range(8)) for reg in range(8))


@dataclass(frozen=True, slots=True)
class Options:
    """What a campaign generates: modes, and register states per instruction (1..64)."""

    modes: tuple[str, ...] = MODES
    states: int = 1


def generate_batch(seed: int, number: int, size: int, options: Options = Options()) -> list[Case]:
    """The first `size` cases of batch `number`; ids are `s<seed>-b<number>-<index>`.

    A longer batch of the same number starts with the same cases.
    """
    return Generator(seed, number, options).cases(size)


@lru_cache(maxsize=16)
def _values(seed: int, bits: int) -> list[int]:
    """Register values for a seed; 32-bit ones outside 64-bit mode."""
    return pool(Random(f"values {seed} {bits}"), bits, 4096)


class Address(NamedTuple):
    """A memory operand whose registers are still to be chosen: base + index << shift + disp."""

    base: int
    index_reg: int
    shift: int
    disp: int
    ad_bytes: int
    targets: tuple[int, ...]


class Generator:
    """One batch in the making."""

    _plans = staticmethod(plans)

    def __init__(self, seed: int, number: int, options: Options) -> None:
        self._rng = Random(f"batch {seed} {number}")
        self._environments = [environments(seed, mode) for mode in options.modes]
        self._states = options.states
        self._prefix = f"s{seed}-b{number}-"
        self._cases: list[Case] = []
        self._leaves: list[str] = []
        self._slot = number * 997 % ARENA_SLOTS
        choices = self._rng.choices
        self._files = {
            bits: [choices(_values(seed, bits), k=16) for _ in range(FILE_COUNT)] for bits in (32, 64)
        }

    def cases(self, size: int) -> list[Case]:
        """The first `size` cases."""
        cases, rng = self._cases, self._rng
        while len(cases) < size:
            env = rng.choice(rng.choice(self._environments))
            table = self._plans(env.bits)
            for _ in range(RUN_LENGTH):
                bits = rng.getrandbits(64)
                self._instruction(env, table[bits & PLAN_COUNT - 1], bits >> 14)
        del cases[size:]
        return cases

    def leaf_of(self, index: int) -> str:
        """The leaf for which the case at `index` was generated; its prefixes may make it another."""
        return self._leaves[index // self._states]

    def _instruction(self, env: Environment, plan: Plan, bits: int) -> None:
        """Encode one instruction and add its register states; uses 50 random bits."""
        self._leaves.append(plan.form.leaf)
        data, op, ad, seg, rex, _, rep = plan.prefixes[bits & 511]
        code = data + plan.opcode
        imm = plan.immediates[op, ad][bits >> 9 & 1023]
        rip = env.first_rip + self._slot * SLOT_SIZE
        reg = rm = ea = -1
        solve = None
        if plan.has_modrm:
            field = plan.reg if plan.reg >= 0 else bits >> 19 & 7
            reg = field | (rex & 4) << 1
            if plan.mod == MOD_MEMORY or (plan.mod != MOD_REGISTER and bits >> 22 & 3):
                form = memory_forms(ad, rex & 3, env.bits == 64)[bits >> 24 & 2047]
                seg = seg if seg >= 0 else form.seg
                targets = (env.targets16 if ad == 2 else env.targets)[seg]
                code += form.by_reg[field]
                if form.base < 0 and form.index_reg < 0:
                    ea = targets[bits >> 35 & 255]
                    end = rip + len(code) + 4 + len(imm) if form.rip_relative else 0
                    code += ((ea - end) & _DISP_MASK[form.disp]).to_bytes(form.disp, "little")
                else:
                    disp, disp_bytes = displacements(form.disp)[bits >> 35 & 255]
                    code += disp_bytes
                    solve = Address(form.base, form.index_reg, form.shift, disp, ad, targets)
            else:
                low = plan.rm if plan.rm >= 0 else bits >> 24 & 7
                rm = low | (rex & 1) << 3
                code += _REGISTER_MODRM[field][low]
        elif plan.moffs:
            seg = seg if seg >= 0 else VCPU_SREG_DS
            ea = (env.targets16 if ad == 2 else env.targets)[seg][bits >> 35 & 255]
            imm = (ea & _ADDRESS_MASK[ad]).to_bytes(ad, "little")
        code, rip = self._place(env, code + imm, rip)
        insn = Encoding(env, plan.op_bytes[op], ad, seg, reg, rm, ea, rep)
        self._add_states(env, plan, code, rip, solve, insn)

    def _place(self, env: Environment, code: bytes, rip: int) -> tuple[bytes, int]:
        """Where the instruction lies: in the next slot with HLT behind it, or at the edge of memory.

        One in 512 lies at the end of a page with no page behind it, half of them cut short.
        """
        getrandbits = self._rng.getrandbits
        if getrandbits(9):
            self._slot = (self._slot + 1) % ARENA_SLOTS
            return code + HLT, rip
        if getrandbits(1) and len(code) > 1:
            code = code[: 1 + getrandbits(8) % (len(code) - 1)]
        return code, env.edge_rip - len(code)

    def _add_states(
        self, env: Environment, plan: Plan, code: bytes, rip: int, solve: Address | None, insn: Encoding
    ) -> None:
        """Append the instruction once per register state."""
        cases, prefix, getrandbits, prepare = self._cases, self._prefix, self._rng.getrandbits, plan.prepare
        files = self._files[64 if env.mode == "prot64" else 32]
        for _ in range(self._states):
            bits = getrandbits(64)
            regs = files[bits & 127].copy()
            regs[4] = env.stacks[bits >> 7 & 255]
            # The files of a batch are few: a fresh value and a swap make each state its own.
            regs[bits >> 15 & 3] = getrandbits(64 if env.mode == "prot64" else 32)
            if solve is not None:
                target = solve.targets[bits >> 17 & 255]
                _solve(regs, solve, target)
                insn = insn._replace(ea=target) if prepare is not None else insn
            if prepare is not None:
                prepare(regs, insn, bits >> 25 & 0xFFFFFFFF)
            cases.append(
                Case(
                    prefix + str(len(cases)),
                    env.mode,
                    code,
                    tuple(regs),
                    rip,
                    env.flags[bits >> 56],
                    env.system,
                    env.mem,
                )
            )


class EvenGenerator(Generator):
    """One that gives every implemented form the same share."""

    _plans = staticmethod(even_plans)


def _solve(regs: list[int], address: Address, target: int) -> None:
    """Set the base (or index) register so that base + index << shift + disp is `target`."""
    base, index, shift, disp, ad_bytes, _ = address
    value = target - disp
    nr = base
    if base < 0:
        nr, value = index, value >> shift
    elif index == base:
        value //= 1 + (1 << shift)
    elif index >= 0:
        value -= regs[index] << shift
    mask = _ADDRESS_MASK[ad_bytes]
    regs[nr] = regs[nr] & ~mask | value & mask

"""Pieces of instruction encodings, made once: prefixes, ModRM/SIB bytes, displacements, immediates.

The generator puts an instruction together from these by table look-ups. SDM Vol. 2A 2.1
"Instruction Format", tables 2-1 to 2-3; 2.2.1 "REX Prefixes".
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Final, NamedTuple

from emufuzz.arch.regs import VCPU_REGS_RBP, VCPU_REGS_RSP, VCPU_SREG_DS, VCPU_SREG_SS
from emufuzz.case.values import boundary
from emufuzz.fuzz.values import boundary_bytes

#: Sizes of the tables below; powers of two, so that random bits index them.
PREFIX_COUNT: Final = 512
MEMORY_COUNT: Final = 2048
DISPLACEMENT_COUNT: Final = 256
IMMEDIATE_COUNT: Final = 1024

SEGMENT_PREFIXES: Final = (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65)  # ES CS SS DS FS GS, in SREG order


class Prefixes(NamedTuple):
    """A run of prefixes and what it does to the decoder's state.

    `seg` is the segment override (-1 = none), `rex` the REX byte in force (0 = none).
    """

    data: bytes
    op_bytes: int
    ad_bytes: int
    seg: int
    rex: int
    lock: bool
    rep: int


class MemoryForm(NamedTuple):
    """A memory form of ModRM and SIB.

    `by_reg` is the ModRM (and SIB) bytes for each ModRM.reg. `base` and `index_reg` are GPR numbers
    (-1 = none), `seg` the default segment, `disp` the displacement's size in bytes.
    """

    by_reg: tuple[bytes, ...]
    base: int
    index_reg: int
    shift: int
    disp: int
    seg: int
    rip_relative: bool


# What a run of prefixes is made of, per class: chances of 66, 67, segment, lock, repeat, REX.
#                 66    67    seg   F0    F2/F3 REX
_CHANCES: Final = {
    "any":       (0.20, 0.10, 0.14, 0.02, 0.04, 0.55),
    "lock":      (0.20, 0.08, 0.10, 0.30, 0.04, 0.55),
    "rep":       (0.20, 0.12, 0.14, 0.01, 0.55, 0.45),
    "no":        (0.00, 0.10, 0.14, 0.02, 0.00, 0.45),
    "66":        (1.00, 0.10, 0.14, 0.02, 0.00, 0.45),
    "f2":        (0.00, 0.10, 0.14, 0.02, 1.00, 0.45),
    "f3":        (0.00, 0.10, 0.14, 0.02, 1.00, 0.45),
}  # fmt: skip


@cache
def prefix_runs(bits: int, kind: str) -> tuple[Prefixes, ...]:
    """PREFIX_COUNT runs of prefixes for 16-, 32- or 64-bit code; `kind` as in _CHANCES."""
    rng = Random(f"prefixes {bits} {kind}")
    return tuple(_prefix_run(rng, bits, kind) for _ in range(PREFIX_COUNT))


def _prefix_run(rng: Random, bits: int, kind: str) -> Prefixes:
    p66, p67, pseg, plock, prep, prex = _CHANCES[kind]
    run: list[int] = []
    if rng.random() < p66:
        run.append(0x66)
    if rng.random() < p67:
        run.append(0x67)
    if rng.random() < pseg:
        run.append(rng.choice(SEGMENT_PREFIXES))
    if rng.random() < plock:
        run.append(0xF0)
    if rng.random() < prep:
        run.append({"f2": 0xF2, "f3": 0xF3}.get(kind) or rng.choice((0xF2, 0xF3)))
    rng.shuffle(run)
    _add_redundant(rng, run)
    rex = 0x40 | rng.getrandbits(4) if bits == 64 and rng.random() < prex else 0
    if rex and run and rng.random() < 0.03:
        # A REX in front of another prefix counts for nothing (SDM Vol. 2A 2.2.1).
        return effect_of(bits, bytes((rex, *run)))
    return effect_of(bits, bytes((*run, rex)) if rex else bytes(run))


def _add_redundant(rng: Random, run: list[int]) -> None:
    """Now and then: the same prefix again, a second segment, or nearly too many of them."""
    if not run or rng.random() >= 0.06:
        return
    if rng.random() < 0.1:
        run.extend([run[0]] * rng.randrange(8, 13))
    elif run[-1] in SEGMENT_PREFIXES:
        run.append(rng.choice(SEGMENT_PREFIXES))
    else:
        run.append(run[-1])


def effect_of(bits: int, data: bytes) -> Prefixes:
    """What a run of prefixes means to the decoder of `bits`-bit code (x86_decode_insn)."""
    small_op, small_ad, seg, rex, lock, rep = False, False, -1, 0, False, 0
    for byte in data:
        rex = byte if bits == 64 and byte & 0xF0 == 0x40 else 0
        if byte == 0x66:
            small_op = True
        elif byte == 0x67:
            small_ad = True
        elif byte in SEGMENT_PREFIXES:
            seg = SEGMENT_PREFIXES.index(byte)
        elif byte == 0xF0:
            lock = True
        elif byte in (0xF2, 0xF3):
            rep = byte
    op_bytes = {16: (2, 4), 32: (4, 2), 64: (4, 2)}[bits][small_op]
    ad_bytes = {16: (2, 4), 32: (4, 2), 64: (8, 4)}[bits][small_ad]
    return Prefixes(data, 8 if rex & 8 else op_bytes, ad_bytes, seg, rex, lock, rep)


@cache
def memory_forms(ad_bytes: int, rex_xb: int, long_mode: bool) -> tuple[MemoryForm, ...]:
    """MEMORY_COUNT picks among all memory forms of an address size; every form occurs.

    `rex_xb` is REX.X << 1 | REX.B. Forms without SIB, as compilers emit them, are the majority.
    """
    if ad_bytes == 2:
        every, plain = _forms16(), _forms16()
    else:
        every = _forms32(rex_xb, long_mode)
        plain = [form for form in every if len(form.by_reg[0]) == 1]
    picks = every + [plain[i % len(plain)] for i in range(MEMORY_COUNT - len(every))]
    Random(f"memory {ad_bytes} {rex_xb}").shuffle(picks)
    return tuple(picks)


def _modrm(mod: int, rm: int, sib: int = -1) -> tuple[bytes, ...]:
    """ModRM (and SIB) for each reg."""
    tail = b"" if sib < 0 else bytes((sib,))
    return tuple(bytes((mod << 6 | reg << 3 | rm,)) + tail for reg in range(8))


#: rm -> (base, index) of 16-bit addressing (SDM Vol. 2A Table 2-1).
_PAIRS16: Final = ((3, 6), (3, 7), (5, 6), (5, 7), (-1, 6), (-1, 7), (5, -1), (3, -1))


def _forms16() -> list[MemoryForm]:
    forms = []
    for mod in range(3):
        for rm, (base, index) in enumerate(_PAIRS16):
            disp = mod
            if mod == 0 and rm == 6:
                base, disp = -1, 2  # noqa: PLW2901 - the one form without registers
            seg = VCPU_SREG_SS if base == VCPU_REGS_RBP else VCPU_SREG_DS
            forms.append(MemoryForm(_modrm(mod, rm), base, index, 0, disp, seg, False))
    return forms


def _forms32(rex_xb: int, long_mode: bool) -> list[MemoryForm]:
    high_base, high_index = (rex_xb & 1) << 3, (rex_xb & 2) << 2
    forms = []
    for mod in range(3):
        for rm in range(8):
            if rm == 4:
                forms += [_sib_form(mod, sib, high_base, high_index) for sib in range(256)]
            elif mod == 0 and rm == 5:
                forms.append(MemoryForm(_modrm(0, 5), -1, -1, 0, 4, VCPU_SREG_DS, long_mode))
            else:
                base = rm | high_base
                disp = (0, 1, 4)[mod]
                forms.append(MemoryForm(_modrm(mod, rm), base, -1, 0, disp, _default_seg(base), False))
    return forms


def _sib_form(mod: int, sib: int, high_base: int, high_index: int) -> MemoryForm:
    base, index, disp = sib & 7 | high_base, sib >> 3 & 7 | high_index, (0, 1, 4)[mod]
    if sib & 7 == 5 and mod == 0:
        base, disp = -1, 4
    if index == VCPU_REGS_RSP:
        index = -1
    return MemoryForm(_modrm(mod, 4, sib), base, index, sib >> 6, disp, _default_seg(base), False)


def _default_seg(base: int) -> int:
    return VCPU_SREG_SS if base in (VCPU_REGS_RSP, VCPU_REGS_RBP) else VCPU_SREG_DS


@cache
def displacements(size: int) -> tuple[tuple[int, bytes], ...]:
    """DISPLACEMENT_COUNT displacements of 0, 1, 2 or 4 bytes: (signed value, encoding)."""
    if not size:
        return ((0, b""),) * DISPLACEMENT_COUNT
    rng = Random(f"displacements {size}")
    values = [boundary(rng, size * 8) for _ in range(DISPLACEMENT_COUNT)]
    sign = 1 << size * 8 - 1
    return tuple(((v ^ sign) - sign, v.to_bytes(size, "little")) for v in values)


@cache
def immediates(size: int) -> tuple[bytes, ...]:
    """IMMEDIATE_COUNT immediates of 0..10 bytes."""
    rng = Random(f"immediates {size}")
    return tuple(boundary_bytes(rng, size) if size else b"" for _ in range(IMMEDIATE_COUNT))

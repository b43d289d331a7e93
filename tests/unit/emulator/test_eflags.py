"""Literal results of the ALU model: the corners that the SDM or the CPU's habits decide."""

from __future__ import annotations

import pytest

from emufuzz.emulator import eflags
from emufuzz.emulator.eflags_tables import CONDITION, PARITY

CF, PF, AF, ZF, SF, OF = 0x001, 0x004, 0x010, 0x040, 0x080, 0x800
ALL = CF | PF | AF | ZF | SF | OF


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        # Arithmetic at the edges of signed and unsigned range
        (lambda: eflags.add(1, 0xFF, 1, 0), (0, CF | PF | AF | ZF)),
        (lambda: eflags.add(4, 0x7FFFFFFF, 1, 0), (0x80000000, PF | AF | SF | OF)),
        (lambda: eflags.adc(8, (1 << 64) - 1, (1 << 64) - 1, CF), ((1 << 64) - 1, CF | PF | AF | SF)),
        (lambda: eflags.sub(2, 0x8000, 1, 0), (0x7FFF, PF | AF | OF)),
        (lambda: eflags.sbb(1, 0, 0xFF, CF), (0, CF | PF | AF | ZF)),
        (lambda: eflags.neg(1, 0x80, 0), (0x80, CF | SF | OF)),
        (lambda: eflags.neg(4, 0, ALL), (0, PF | ZF)),
        (lambda: eflags.inc(2, 0xFFFF, CF), (0, CF | PF | AF | ZF)),
        (lambda: eflags.dec(1, 0x80, 0), (0x7F, AF | OF)),
        # AF of logic is undefined; Zen 5 clears it
        (lambda: eflags.and_(4, 0xF0, 0xFF, ALL), (0xF0, PF)),
        # Shifts: AF set, CF 0 beyond the width, OF by its 1-bit formula at any count
        (lambda: eflags.shl(1, 0x81, 8, 0), (0, CF | PF | AF | ZF | OF)),
        (lambda: eflags.shl(1, 0xFF, 9, 0), (0, PF | AF | ZF)),
        (lambda: eflags.shr(4, 0x80000000, 1, 0), (0x40000000, PF | AF | OF)),
        (lambda: eflags.shr(4, 0xC0000000, 2, 0), (0x30000000, PF | AF)),
        (lambda: eflags.sar(1, 0x80, 31, 0), (0xFF, CF | PF | AF | SF)),
        (lambda: eflags.shl(4, 0x1234, 32, ALL), (0x1234, ALL)),
        (lambda: eflags.shl(8, 1, 32, 0), (1 << 32, PF | AF)),
        # Rotates keep SF ZF AF PF; 8-bit RCL by 9 is the identity but for OF
        (lambda: eflags.rol(1, 0x80, 8, 0), (0x80, OF)),
        (lambda: eflags.ror(2, 0x0001, 1, ZF), (0x8000, CF | ZF | OF)),
        (lambda: eflags.rcl(1, 0x80, 9, CF), (0x80, CF)),
        (lambda: eflags.rcl(1, 0x80, 9, 0), (0x80, OF)),
        (lambda: eflags.rcr(2, 0x4000, 17, 0), (0x4000, OF)),
        # SHLD, SHRD r16: OF at count 16, and the undefined counts above
        (lambda: eflags.shld(2, 0x831B, 0xB6EB, 16, 0), (0xB6EB, CF | PF | AF | SF | OF)),
        (lambda: eflags.shld(2, 0x8000, 0x94C9, 17, CF | OF), (0x2993, PF | AF)),
        (lambda: eflags.shrd(2, 0x8000, 0x94C9, 16, 0), (0x94C9, CF | PF | AF | SF | OF)),
        (lambda: eflags.shrd(2, 0x8000, 0x94C9, 17, 0), (0xCA64, AF | SF)),
        (lambda: eflags.shld(4, 0, 0, 1, ALL), (0, PF | AF | ZF)),
        (lambda: eflags.shrd(8, 2, 1, 0x41, 0), ((1 << 63) | 1, AF | SF | OF)),
        # Products and quotients
        (lambda: eflags.mul(1, 0x10, 0x10, ZF), (0, 1, CF | ZF | OF)),
        (lambda: eflags.mul(4, 2, 3, ALL), (6, 0, PF | AF | ZF | SF)),
        (lambda: eflags.imul(1, 0xFF, 0x80, 0), (0x80, 0, CF | OF)),
        (lambda: eflags.imul2(4, 0xFFFFFFFF, 0xFFFFFFFF, OF), (1, 0)),
        (lambda: eflags.div(1, 7, 0, 2, ALL), (3, 1, CF | AF | OF)),
        (lambda: eflags.div(1, 0, 2, 2, 0), None),
        (lambda: eflags.div(8, 1, 0, 0, 0), None),
        (lambda: eflags.idiv(1, 0xF9, 0xFF, 2, 0), (0xFD, 0xFF, AF)),
        (lambda: eflags.idiv(4, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF, 0), None),
        (lambda: eflags.idiv(4, 0x80000000, 0xFFFFFFFF, 1, 0), (0x80000000, 0, AF)),
        (lambda: eflags.idiv(2, 5, 0, 0, 0), None),
        # Bits: only CF changes; a scan's PF is that of the index
        (lambda: eflags.bt(4, 2, 33, ALL), (2, ALL)),
        (lambda: eflags.btc(2, 1, 16, ALL), (0, ALL)),
        (lambda: eflags.bsf(4, 7, 0x80, ALL), (7, 0)),
        (lambda: eflags.bsr(8, 7, 1 << 63, 0), (63, PF)),
        (lambda: eflags.bsf(2, 7, 0x10000, ALL), (7, PF | ZF)),
    ],
)
def test_corner(call, expected):
    assert call() == expected


@pytest.mark.parametrize("name", [name for name in eflags.__all__ if name != "test_cc"])
def test_flags_that_are_not_status_flags_pass_through(name):
    function, other = getattr(eflags, name), 0x3FF202 & ~ALL
    arity = {"inc": 1, "dec": 1, "neg": 1, "not_": 1, "shld": 3, "shrd": 3, "div": 3, "idiv": 3}.get(name, 2)
    operands = (9, 0, 3) if name in {"div", "idiv"} else (9, 3, 5)[:arity]
    assert function(4, *operands, other)[-1] & ~ALL == other


@pytest.mark.parametrize(
    ("code", "holds_under"),
    [
        (0x0, OF), (0x2, CF), (0x4, ZF), (0x6, CF), (0x6, ZF), (0x8, SF), (0xA, PF),
        (0xC, SF), (0xC, OF), (0xE, ZF), (0xE, SF), (0x1, 0), (0xD, SF | OF), (0xF, SF | OF),
    ],
)  # fmt: skip
def test_conditions(code, holds_under):
    assert eflags.test_cc(0x70 | code, holds_under | 0x3F0000)
    assert not eflags.test_cc(0x70 | code ^ 1, holds_under)


def test_tables_have_every_entry():
    assert len(PARITY) == 256
    assert [len(answers) for answers in CONDITION] == [0x1000] * 16
    assert PARITY[0] == PF
    assert PARITY[1] == 0

"""Handlers of the ALU, shift, multiplication, bit and BCD families: what they do around the ALU model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from emufuzz.emulator import faults
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.flags import ByteOp
from emufuzz.emulator.insn import alu, bcd, bits, muldiv, shift
from emufuzz.emulator.x86emul import (
    KVM_X86_SHADOW_INT_STI,
    OPERAND_NONE,
    OPERAND_REG,
    X86EMUL_CONTINUE,
    X86EMUL_MODE_PROT32,
    X86EMUL_MODE_PROT64,
    X86EMUL_MODE_REAL,
    X86EMUL_MODE_VM86,
    X86EMUL_PROPAGATE_FAULT,
    X86EMUL_UNHANDLEABLE,
)

CF, PF, AF, ZF, SF, IF, DF, OF = 0x001, 0x004, 0x010, 0x040, 0x080, 0x200, 0x400, 0x800
IOPL3 = 0x3000


def context(size=4, dst=0, src=0, src2=0, flags=2, **fields):
    ops = SimpleNamespace(
        cpl=lambda _ctxt: fields.get("cpl", 0),
        guest_has_movbe=lambda _ctxt: fields.get("movbe", True),
        read_gpr=lambda _ctxt, nr: fields.get("gpr", {}).get(nr, 0),
        vm_bugged=fields.get("bugged", []).append,
    )
    ctxt = X86EmulateCtxt(ops)
    ctxt.mode = fields.get("mode", X86EMUL_MODE_PROT64)
    ctxt.op_bytes, ctxt.eflags, ctxt.b = size, flags, fields.get("b", 0)
    for op, value in ((ctxt.dst, dst), (ctxt.src, src), (ctxt.src2, src2)):
        op.type, op.bytes, op.val = OPERAND_REG, size, value
    return ctxt


def run(handler, **fields):
    ctxt = context(**fields)
    assert handler(ctxt) == X86EMUL_CONTINUE
    return ctxt


@pytest.mark.parametrize(
    ("handler", "dst", "src", "result", "flags"),
    [
        (alu.em_add, 5, 3, 8, 0),
        (alu.em_or, 5, 3, 7, 0),
        (alu.em_adc, 5, 3, 9, PF),
        (alu.em_sbb, 5, 3, 1, 0),
        (alu.em_and, 5, 3, 1, 0),
        (alu.em_sub, 5, 3, 2, 0),
        (alu.em_xor, 5, 3, 6, PF),
        (alu.em_cmp, 5, 3, 5, 0),
        (alu.em_cmp_r, 3, 5, 3, 0),
        (alu.em_test, 5, 3, 5, 0),
        (alu.em_inc, 5, 0, 6, CF | PF),
        (alu.em_dec, 5, 0, 4, CF),
        (alu.em_neg, 5, 0, 0xFFFFFFFB, CF | AF | SF),
        (alu.em_not, 5, 0, 0xFFFFFFFA, CF),
        (muldiv.em_imul, 5, 3, 15, 0),
        (bits.em_bt, 5, 2, 5, CF),
        (bits.em_bts, 5, 1, 7, 0),
        (bits.em_btr, 5, 2, 1, CF),
        (bits.em_btc, 5, 0, 4, CF),
    ],
)
def test_dst_src(handler, dst, src, result, flags):
    ctxt = run(handler, dst=dst, src=src, flags=2 | CF)
    assert ctxt.dst.val == result
    assert ctxt.eflags == 2 | flags


@pytest.mark.parametrize(
    ("handler", "result"),
    [
        (shift.em_rol, 0x00001214),
        (shift.em_ror, 0x50000048),
        (shift.em_rcl, 0x00001216),
        (shift.em_rcr, 0xB0000048),
        (shift.em_shl, 0x00001210),
        (shift.em_shr, 0x10000048),
        (shift.em_sar, 0xF0000048),
        (shift.em_shld, 0x00001215),
        (shift.em_shrd, 0x70000048),
    ],
)
def test_shifts_take_their_count_from_src2(handler, result):
    assert run(handler, dst=0x80000242, src=0xA0000003, src2=3, flags=2 | CF).dst.val == result


def test_xadd_hands_the_old_value_to_src():
    ctxt = run(alu.em_xadd, dst=5, src=3)
    assert (ctxt.dst.val, ctxt.src.val) == (8, 5)


def test_imul_3op_multiplies_src_by_the_immediate():
    assert run(muldiv.em_imul_3op, dst=99, src=5, src2=7).dst.val == 35


@pytest.mark.parametrize(
    ("handler", "low", "high", "by", "expected"),
    [
        (muldiv.em_mul_ex, 0x80000000, 9, 4, (0, 2)),
        (muldiv.em_imul_ex, 0xFFFFFFFF, 9, 2, (0xFFFFFFFE, 0xFFFFFFFF)),
        (muldiv.em_div_ex, 1, 1, 2, (0x80000000, 1)),
        (muldiv.em_idiv_ex, 0xFFFFFFF9, 0xFFFFFFFF, 2, (0xFFFFFFFD, 0xFFFFFFFF)),
    ],
)
def test_one_operand_forms_use_rdx_rax(handler, low, high, by, expected):
    ctxt = run(handler, dst=low, src=high, src2=by)
    assert (ctxt.dst.val, ctxt.src.val) == expected


@pytest.mark.parametrize(
    ("handler", "ax", "by", "result"),
    [
        (muldiv.em_mul_ex, 0x1280, 4, 0x0200),
        (muldiv.em_imul_ex, 0x12FF, 2, 0xFFFE),
        (muldiv.em_div_ex, 0x0007, 2, 0x0103),
        (muldiv.em_idiv_ex, 0xFFF9, 2, 0xFFFD),
    ],
)
def test_byte_forms_put_both_halves_into_ax(handler, ax, by, result):
    ctxt = context(size=2, dst=ax, src2=by)
    ctxt.d = ByteOp
    assert handler(ctxt) == X86EMUL_CONTINUE
    assert ctxt.dst.val == result


@pytest.mark.parametrize("handler", [muldiv.em_div_ex, muldiv.em_idiv_ex])
@pytest.mark.parametrize("d", [0, ByteOp])
def test_division_by_zero_raises_de(handler, d):
    ctxt = context(size=2, dst=7, src=0, src2=0, flags=2 | CF)
    ctxt.d = d
    assert handler(ctxt) == X86EMUL_PROPAGATE_FAULT
    assert (ctxt.exception.vector, ctxt.exception.error_code_valid) == (0, False)
    assert (ctxt.dst.val, ctxt.eflags) == (7, 2 | CF)


@pytest.mark.parametrize(("handler", "index"), [(bits.em_bsf_c, 4), (bits.em_bsr_c, 8)])
def test_bit_scans(handler, index):
    ctxt = run(handler, dst=0x55, src=0x110)
    assert (ctxt.dst.val, ctxt.dst.type) == (index, OPERAND_REG)
    ctxt = run(handler, dst=0x55, src=0)
    assert ctxt.dst.type == OPERAND_NONE
    assert ctxt.eflags & ZF


@pytest.mark.parametrize(
    ("size", "value", "result"),
    [(2, 0x1234, 0), (4, 0x12345678, 0x78563412), (8, 0x0102030405060708, 0x0807060504030201)],
)
def test_bswap(size, value, result):
    assert run(bits.em_bswap, size=size, dst=value).dst.val & (1 << 8 * size) - 1 == result


@pytest.mark.parametrize(("size", "result"), [(2, 0x3412), (4, 0x34120000), (8, 0x3412 << 48)])
def test_movbe(size, result):
    assert run(bits.em_movbe, size=size, src=0x1234).dst.val == result


def test_movbe_needs_its_cpuid_bit():
    ctxt = context(src=1, movbe=False)
    assert bits.em_movbe(ctxt) == X86EMUL_PROPAGATE_FAULT
    assert ctxt.exception.vector == 6


@pytest.mark.parametrize(("flags", "value"), [(ZF, 1), (0, 0)])
def test_setcc(flags, value):
    assert run(bits.sw_setcc, b=0x94, flags=2 | flags).dst.val == value


@pytest.mark.parametrize(
    ("size", "flags", "value", "kind"),
    [(4, ZF, 7, OPERAND_REG), (4, 0, 5, OPERAND_REG), (2, 0, 5, OPERAND_NONE), (8, 0, 5, OPERAND_NONE)],
)
def test_cmov_writes_32_bit_registers_in_any_case(size, flags, value, kind):
    ctxt = run(bits.sw_cmov, size=size, dst=5, src=7, b=0x44, flags=2 | flags)
    assert (ctxt.dst.val, ctxt.dst.type) == (value, kind)


@pytest.mark.parametrize(
    ("size", "value", "result"),
    [
        (2, 0x1280, 0xFF80),
        (4, 0x12348000, 0xFFFF8000),
        (8, 0x7FFFFFFF, 0x7FFFFFFF),
        (8, 1 << 31, 0xFFFFFFFF80000000),
    ],
)
def test_cbw(size, value, result):
    assert run(alu.sw_cbw, size=size, dst=value).dst.val == result


@pytest.mark.parametrize(("value", "result"), [(0x8000, 0xFFFF), (0x7FFF, 0)])
def test_cwd_writes_rdx(value, result):
    ctxt = run(alu.em_cwd, size=2, src=value)
    assert (ctxt.dst.type, ctxt.dst.reg, ctxt.dst.bytes, ctxt.dst.val) == (OPERAND_REG, 2, 2, result)


def test_sahf_and_lahf():
    assert run(alu.em_sahf, flags=OF, gpr={0: 0xFF00}).eflags == OF | SF | ZF | AF | PF | CF | 2
    assert run(alu.em_lahf, flags=SF | CF | 2 | OF, gpr={0: 0x123411FF}).regs[0] == 0x123483FF


@pytest.mark.parametrize(("flags", "value"), [(CF, 0xFF), (0, 0)])
def test_salc(flags, value):
    ctxt = run(alu.em_salc, flags=2 | flags)
    assert (ctxt.dst.val, ctxt.eflags) == (value, 2 | flags)


@pytest.mark.parametrize(
    ("handler", "before", "after"),
    [
        (alu.sw_clc, CF, 0), (alu.sw_stc, 0, CF), (alu.sw_cmc, 0, CF), (alu.sw_cmc, CF, 0),
        (alu.sw_cld, DF, 0), (alu.sw_std, 0, DF),
    ],
)  # fmt: skip
def test_flag_operations(handler, before, after):
    assert run(handler, flags=2 | before | ZF).eflags == 2 | after | ZF


@pytest.mark.parametrize(
    ("mode", "cpl", "iopl", "allowed"),
    [
        (X86EMUL_MODE_REAL, 0, 0, True),
        (X86EMUL_MODE_VM86, 3, IOPL3, False),
        (X86EMUL_MODE_PROT32, 3, 0, False),
        (X86EMUL_MODE_PROT32, 3, IOPL3, True),
        (X86EMUL_MODE_PROT64, 0, 0, True),
    ],
)
def test_cli_and_sti_obey_iopl(mode, cpl, iopl, allowed):
    for handler, before, after in ((alu.em_cli, IF, 0), (alu.em_sti, 0, IF)):
        ctxt = context(mode=mode, cpl=cpl, flags=2 | iopl | before)
        rc = handler(ctxt)
        if allowed:
            assert (rc, ctxt.eflags) == (X86EMUL_CONTINUE, 2 | iopl | after)
            assert ctxt.interruptibility == (KVM_X86_SHADOW_INT_STI if handler is alu.em_sti else 0)
        else:
            assert (rc, ctxt.eflags, ctxt.interruptibility) == (X86EMUL_PROPAGATE_FAULT, 2 | iopl | before, 0)
            assert (ctxt.exception.vector, ctxt.exception.error_code) == (13, 0)


def das_of_the_sdm(al, cf, af):
    """SDM Vol. 2A DAS, "Operation"."""
    old_al, old_cf, cf = al, cf, 0
    if al & 0xF > 9 or af:
        cf = old_cf | (al < 6)
        al = al - 6 & 0xFF
        af = 1
    if old_al > 0x99 or old_cf:
        al = al - 0x60 & 0xFF
        cf = 1
    return al, cf, af


def test_das_of_every_input():
    for al in range(256):
        for carries in (0, CF, AF, CF | AF):
            ctxt = run(bcd.em_das, size=1, dst=al, flags=2 | OF | carries)
            value, cf, af = das_of_the_sdm(al, carries & CF, int(bool(carries & AF)))
            status = (0 if value.bit_count() & 1 else PF) | (0 if value else ZF) | value & SF
            assert (ctxt.dst.val, ctxt.eflags) == (value, 2 | status | cf | af * AF), (al, carries)


def test_aam_and_aad():
    ctxt = run(bcd.em_aam, size=2, dst=0x1237, src=10, flags=2 | OF | CF | AF)
    assert (ctxt.dst.val, ctxt.eflags) == (0x0505, 2 | PF)
    ctxt = run(bcd.em_aad, size=2, dst=0x0505, src=10, flags=2 | OF | CF | AF)
    assert (ctxt.dst.val, ctxt.eflags) == (0x37, 2)
    # KVM deviation: SF describes the operand, here EAX
    assert run(bcd.em_aam, size=4, dst=0x80000000, src=10).eflags == 2 | SF | PF


def test_aam_by_zero_raises_de():
    ctxt = context(size=2, dst=1, src=0)
    assert bcd.em_aam(ctxt) == X86EMUL_PROPAGATE_FAULT
    assert ctxt.exception.vector == 0


@pytest.mark.parametrize(
    ("raise_", "vector", "error"),
    [
        (faults.emulate_de, 0, None),
        (faults.emulate_db, 1, None),
        (faults.emulate_ud, 6, None),
        (faults.emulate_nm, 7, None),
        (lambda ctxt: faults.emulate_ts(ctxt, 0x28), 10, 0x28),
        (lambda ctxt: faults.emulate_ss(ctxt, 0), 12, 0),
        (lambda ctxt: faults.emulate_gp(ctxt, 0x18), 13, 0x18),
    ],
)
def test_faults_fill_the_exception(raise_, vector, error):
    ctxt = context()
    assert raise_(ctxt) == X86EMUL_PROPAGATE_FAULT
    exception = ctxt.exception
    assert exception.vector == vector
    assert (exception.error_code if exception.error_code_valid else None) == error


def test_a_vector_above_31_kills_the_machine():
    bugged = []
    ctxt = context(bugged=bugged)
    assert faults.emulate_exception(ctxt, 32, 0, valid=False) == X86EMUL_UNHANDLEABLE
    assert bugged == [ctxt]

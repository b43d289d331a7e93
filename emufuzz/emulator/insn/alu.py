"""ALU instructions, flag operations and sign extension of the accumulator.

emulate.c: FASTOP2(add ... test), FASTOP1(not, neg, inc, dec), FASTOP2(xadd), FASTOP2R(cmp, cmp_r),
em_sahf, em_lahf, em_salc, em_cli, em_sti, em_cwd and the opcode switch. SDM Vol. 1 7.3, Vol. 2.
"""

from __future__ import annotations

from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RDX
from emufuzz.arch.rflags import (
    X86_EFLAGS_AF,
    X86_EFLAGS_CF,
    X86_EFLAGS_DF,
    X86_EFLAGS_FIXED,
    X86_EFLAGS_IF,
    X86_EFLAGS_IOPL,
    X86_EFLAGS_IOPL_BIT,
    X86_EFLAGS_PF,
    X86_EFLAGS_SF,
    X86_EFLAGS_ZF,
)
from emufuzz.emulator import eflags
from emufuzz.emulator.ctxt import X86EmulateCtxt, reg_rmw, reg_write
from emufuzz.emulator.eflags_tables import BITS, MASK, SIGN
from emufuzz.emulator.faults import emulate_gp
from emufuzz.emulator.x86emul import (
    KVM_X86_SHADOW_INT_STI,
    OPERAND_REG,
    X86EMUL_CONTINUE,
    X86EMUL_MODE_REAL,
    X86EMUL_MODE_VM86,
)

_add, _adc, _sub, _sbb = eflags.add, eflags.adc, eflags.sub, eflags.sbb
_and, _or, _xor = eflags.and_, eflags.or_, eflags.xor
_inc, _dec, _neg, _not = eflags.inc, eflags.dec, eflags.neg, eflags.not_

_SAHF_FLAGS = X86_EFLAGS_SF | X86_EFLAGS_ZF | X86_EFLAGS_AF | X86_EFLAGS_PF | X86_EFLAGS_CF


# Two operands: ADD OR ADC SBB AND SUB XOR CMP TEST, XADD


def em_add(ctxt: X86EmulateCtxt) -> int:
    """ADD: dst += src (SDM Vol. 2A ADD)."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _add(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_or(ctxt: X86EmulateCtxt) -> int:
    """OR: dst |= src (SDM Vol. 2B OR)."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _or(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_adc(ctxt: X86EmulateCtxt) -> int:
    """ADC: dst += src + CF (SDM Vol. 2A ADC)."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _adc(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_sbb(ctxt: X86EmulateCtxt) -> int:
    """SBB: dst -= src + CF (SDM Vol. 2B SBB)."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _sbb(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_and(ctxt: X86EmulateCtxt) -> int:
    """AND: dst &= src (SDM Vol. 2A AND)."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _and(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_sub(ctxt: X86EmulateCtxt) -> int:
    """SUB: dst -= src (SDM Vol. 2B SUB)."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _sub(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_xor(ctxt: X86EmulateCtxt) -> int:
    """XOR: dst ^= src (SDM Vol. 2D XOR)."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _xor(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_cmp(ctxt: X86EmulateCtxt) -> int:
    """CMP: flags of dst - src (SDM Vol. 2A CMP)."""
    dst = ctxt.dst
    ctxt.eflags = _sub(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)[1]
    return X86EMUL_CONTINUE


def em_cmp_r(ctxt: X86EmulateCtxt) -> int:
    """CMPS, SCAS: flags of src - dst (SDM Vol. 2A CMPS, Vol. 2B SCAS)."""
    dst = ctxt.dst
    ctxt.eflags = _sub(dst.bytes, ctxt.src.val, dst.val, ctxt.eflags)[1]
    return X86EMUL_CONTINUE


def em_test(ctxt: X86EmulateCtxt) -> int:
    """TEST: flags of dst & src (SDM Vol. 2D TEST)."""
    dst = ctxt.dst
    ctxt.eflags = _and(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)[1]
    return X86EMUL_CONTINUE


def em_xadd(ctxt: X86EmulateCtxt) -> int:
    """XADD: dst += src, src = old dst, both written back, src first (SDM Vol. 2D XADD)."""
    dst = ctxt.dst
    src = ctxt.src
    old = dst.val
    dst.val, ctxt.eflags = _add(dst.bytes, old, src.val, ctxt.eflags)
    src.val = old
    return X86EMUL_CONTINUE


# One operand: INC DEC NEG NOT


def em_inc(ctxt: X86EmulateCtxt) -> int:
    """INC: dst += 1, CF stays (SDM Vol. 2A INC)."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _inc(dst.bytes, dst.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_dec(ctxt: X86EmulateCtxt) -> int:
    """DEC: dst -= 1, CF stays (SDM Vol. 2A DEC)."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _dec(dst.bytes, dst.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_neg(ctxt: X86EmulateCtxt) -> int:
    """NEG: dst = -dst (SDM Vol. 2B NEG)."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _neg(dst.bytes, dst.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_not(ctxt: X86EmulateCtxt) -> int:
    """NOT: dst = ~dst, no flags (SDM Vol. 2B NOT)."""
    dst = ctxt.dst
    dst.val = _not(dst.bytes, dst.val, ctxt.eflags)[0]
    return X86EMUL_CONTINUE


# Sign extension of the accumulator


def sw_cbw(ctxt: X86EmulateCtxt) -> int:
    """CBW, CWDE, CDQE: the accumulator's lower half sign-extended (SDM Vol. 2A CBW)."""
    size = ctxt.op_bytes
    sign = SIGN[size >> 1]
    dst = ctxt.dst
    dst.val = ((dst.val & MASK[size >> 1]) ^ sign) - sign & MASK[size]
    return X86EMUL_CONTINUE


def em_cwd(ctxt: X86EmulateCtxt) -> int:
    """CWD, CDQ, CQO: rDX = the accumulator's sign in every bit (SDM Vol. 2A CWD)."""
    src, dst = ctxt.src, ctxt.dst
    size = src.bytes
    dst.type = OPERAND_REG
    dst.bytes = size
    dst.reg = VCPU_REGS_RDX
    dst.shift = 0
    dst.val = MASK[size] if src.val >> BITS[size] - 1 & 1 else 0
    return X86EMUL_CONTINUE


# Flag operations


def em_sahf(ctxt: X86EmulateCtxt) -> int:
    """SAHF: SF ZF AF PF CF = AH (SDM Vol. 2B SAHF).

    KVM deviation: not gated by CPUID.80000001H:ECX.LAHF-SAHF in 64-bit mode (SDM Vol. 2B SAHF).
    """
    flags = reg_rmw(ctxt, VCPU_REGS_RAX) >> 8 & _SAHF_FLAGS
    ctxt.eflags = ctxt.eflags & ~0xFF | flags | X86_EFLAGS_FIXED
    return X86EMUL_CONTINUE


def em_lahf(ctxt: X86EmulateCtxt) -> int:
    """LAHF: AH = the low byte of EFLAGS (SDM Vol. 2A LAHF); not gated by CPUID, as em_sahf."""
    rax = reg_rmw(ctxt, VCPU_REGS_RAX)
    reg_write(ctxt, VCPU_REGS_RAX, rax & ~0xFF00 | (ctxt.eflags & 0xFF) << 8)
    return X86EMUL_CONTINUE


def em_salc(ctxt: X86EmulateCtxt) -> int:
    """SALC: AL = CF in every bit, no flags (APM Vol. 3 Appendix A, opcode D6)."""
    ctxt.dst.val = 0xFF if ctxt.eflags & X86_EFLAGS_CF else 0
    return X86EMUL_CONTINUE


def sw_clc(ctxt: X86EmulateCtxt) -> int:
    """CLC: CF = 0 (SDM Vol. 2A CLC)."""
    ctxt.eflags &= ~X86_EFLAGS_CF
    return X86EMUL_CONTINUE


def sw_stc(ctxt: X86EmulateCtxt) -> int:
    """STC: CF = 1 (SDM Vol. 2B STC)."""
    ctxt.eflags |= X86_EFLAGS_CF
    return X86EMUL_CONTINUE


def sw_cmc(ctxt: X86EmulateCtxt) -> int:
    """CMC: CF inverted (SDM Vol. 2A CMC)."""
    ctxt.eflags ^= X86_EFLAGS_CF
    return X86EMUL_CONTINUE


def sw_cld(ctxt: X86EmulateCtxt) -> int:
    """CLD: DF = 0 (SDM Vol. 2A CLD)."""
    ctxt.eflags &= ~X86_EFLAGS_DF
    return X86EMUL_CONTINUE


def sw_std(ctxt: X86EmulateCtxt) -> int:
    """STD: DF = 1 (SDM Vol. 2B STD)."""
    ctxt.eflags |= X86_EFLAGS_DF
    return X86EMUL_CONTINUE


def emulator_bad_iopl(ctxt: X86EmulateCtxt) -> bool:
    """Whether IOPL forbids CLI, STI and I/O without the bitmap (SDM Vol. 1 19.5.1).

    KVM deviation: always in virtual-8086 mode, even with IOPL 3; VME and PVI are not known
    (SDM Vol. 3B 21.3.3).
    """
    mode = ctxt.mode
    if mode == X86EMUL_MODE_REAL:
        return False
    if mode == X86EMUL_MODE_VM86:
        return True
    return ctxt.ops.cpl(ctxt) > (ctxt.eflags & X86_EFLAGS_IOPL) >> X86_EFLAGS_IOPL_BIT


def em_cli(ctxt: X86EmulateCtxt) -> int:
    """CLI: IF = 0, else #GP(0) by IOPL (SDM Vol. 2A CLI)."""
    if emulator_bad_iopl(ctxt):
        return emulate_gp(ctxt, 0)
    ctxt.eflags &= ~X86_EFLAGS_IF
    return X86EMUL_CONTINUE


def em_sti(ctxt: X86EmulateCtxt) -> int:
    """STI: IF = 1 and an interrupt shadow, else #GP(0) by IOPL (SDM Vol. 2B STI).

    KVM deviation: the shadow is set even if IF was 1 before (SDM Vol. 2B STI).
    """
    if emulator_bad_iopl(ctxt):
        return emulate_gp(ctxt, 0)
    ctxt.interruptibility = KVM_X86_SHADOW_INT_STI
    ctxt.eflags |= X86_EFLAGS_IF
    return X86EMUL_CONTINUE

"""Opcode groups, x87 escapes and prefix-selected slots of the opcode maps (emulate.c: group1 .. pfx_*).

A group used by several opcodes is a function of what differs between them.
"""

from __future__ import annotations

from typing import Final

from emufuzz.emulator.flags import (
    Aligned,
    Aligned16,
    BitOp,
    ByteOp,
    CheckPerm,
    EmulateOnUD,
    Fastop,
    IncSP,
    Intercept,
    IsBranch,
    Lock,
    Mmx,
    ModRM,
    Mov,
    NearBranch,
    NoAccess,
    NotImpl,
    NoWrite,
    Op3264,
    PageTable,
    Priv,
    Prot,
    SrcWrite,
    Sse,
    Stack,
    TwoMemOp,
    Unaligned,
    Undefined,
)
from emufuzz.emulator.insn.alu import (
    em_adc,
    em_add,
    em_and,
    em_cmp,
    em_dec,
    em_inc,
    em_neg,
    em_not,
    em_or,
    em_sbb,
    em_sub,
    em_test,
    em_xor,
)
from emufuzz.emulator.insn.bits import (
    em_bt,
    em_btc,
    em_btr,
    em_bts,
    em_movbe,
)
from emufuzz.emulator.insn.branch import em_call_near_abs, em_jmp_abs
from emufuzz.emulator.insn.farbranch import em_call_far, em_jmp_far
from emufuzz.emulator.insn.fpu import (
    em_fninit,
    em_fnstcw,
    em_fnstsw,
    em_fxrstor,
    em_fxsave,
)
from emufuzz.emulator.insn.mov import em_cmpxchg8b, em_mov
from emufuzz.emulator.insn.msr import check_rdtsc, em_rdpid
from emufuzz.emulator.insn.muldiv import (
    em_div_ex,
    em_idiv_ex,
    em_imul_ex,
    em_mul_ex,
)
from emufuzz.emulator.insn.segreg import (
    em_lgdt,
    em_lidt,
    em_lldt,
    em_ltr,
    em_sgdt,
    em_sidt,
    em_sldt,
    em_str,
)
from emufuzz.emulator.insn.shift import (
    em_rcl,
    em_rcr,
    em_rol,
    em_ror,
    em_sar,
    em_shl,
    em_shr,
)
from emufuzz.emulator.insn.stack import em_pop, em_push
from emufuzz.emulator.insn.system import (
    check_svme,
    check_svme_pa,
    em_clflush,
    em_clflushopt,
    em_hypercall,
    em_invlpg,
    em_lmsw,
    em_smsw,
    em_xsetbv,
)
from emufuzz.emulator.opcode import (
    Entry,
    N,
    by_prefix,
    dual,
    escape,
    group,
    group_dual,
    op,
    rm_ext,
)
from emufuzz.emulator.tables.words import (
    AccHi,
    AccLo,
    Imm,
    ImmByte,
    Implicit,
    Mem,
    Mem16,
    Mem64,
    MemFAddr,
    Reg,
    ___,
)


# fmt: off
def group1(src: int, flags: int) -> Entry:
    """80..83: arithmetic with an immediate."""
    return group(flags, (
        op("add", em_add, Mem, src, ___, Lock | Fastop),
        op("or",  em_or,  Mem, src, ___, Lock | PageTable | Fastop),
        op("adc", em_adc, Mem, src, ___, Lock | Fastop),
        op("sbb", em_sbb, Mem, src, ___, Lock | Fastop),
        op("and", em_and, Mem, src, ___, Lock | PageTable | Fastop),
        op("sub", em_sub, Mem, src, ___, Lock | Fastop),
        op("xor", em_xor, Mem, src, ___, Lock | Fastop),
        op("cmp", em_cmp, Mem, src, ___, NoWrite | Fastop),
    ))


#: 8F: POP r/m.
GROUP1A: Final = group(0, (op("pop", em_pop, Mem, ___, ___, Stack | Mov | IncSP | TwoMemOp), *(N,) * 7))


def group2(count: int, flags: int) -> Entry:
    """C0, C1, D0..D3: rotates and shifts; /6 is SHL again."""
    return group(flags, (
        op("rol", em_rol, Mem, ___, count, Fastop),
        op("ror", em_ror, Mem, ___, count, Fastop),
        op("rcl", em_rcl, Mem, ___, count, Fastop),
        op("rcr", em_rcr, Mem, ___, count, Fastop),
        op("shl", em_shl, Mem, ___, count, Fastop),
        op("shr", em_shr, Mem, ___, count, Fastop),
        op("shl", em_shl, Mem, ___, count, Fastop),
        op("sar", em_sar, Mem, ___, count, Fastop),
    ))


def group3(flags: int) -> Entry:
    """F6, F7: unary arithmetic; /1 is TEST again."""
    return group(flags, (
        op("test", em_test,    Mem,   Imm,   ___, NoWrite | Fastop),
        op("test", em_test,    Mem,   Imm,   ___, NoWrite | Fastop),
        op("not",  em_not,     Mem,   ___,   ___, Lock | Fastop),
        op("neg",  em_neg,     Mem,   ___,   ___, Lock | Fastop),
        op("mul",  em_mul_ex,  AccLo, AccHi, Mem, SrcWrite | Fastop),
        op("imul", em_imul_ex, AccLo, AccHi, Mem, SrcWrite | Fastop),
        op("div",  em_div_ex,  AccLo, AccHi, Mem, SrcWrite | Fastop),
        op("idiv", em_idiv_ex, AccLo, AccHi, Mem, SrcWrite | Fastop),
    ))


_UNDEFINED: Final = op("(undefined)", None, ___, ___, ___, Undefined)

#: FE: INC and DEC of a byte.
GROUP4: Final = group(0, (
    op("inc", em_inc, Mem, ___, ___, ByteOp | Lock | Fastop),
    op("dec", em_dec, Mem, ___, ___, ByteOp | Lock | Fastop),
    N, N, N, N, N, N,
))

#: FF: INC, DEC, indirect branches, PUSH.
GROUP5: Final = group(0, (
    op("inc",        em_inc,           Mem,      ___,      ___, Lock | Fastop),
    op("dec",        em_dec,           Mem,      ___,      ___, Lock | Fastop),
    op("call r/m",   em_call_near_abs, ___,      Mem,      ___, NearBranch | IsBranch),
    op("call far m", em_call_far,      Implicit, MemFAddr, ___, IsBranch),
    op("jmp r/m",    em_jmp_abs,       ___,      Mem,      ___, NearBranch | IsBranch),
    op("jmp far m",  em_jmp_far,       Implicit, MemFAddr, ___, IsBranch),
    op("push",       em_push,          ___,      Mem,      ___, Stack | TwoMemOp),
    _UNDEFINED,
))

#: 0F 00: local descriptor table and task register.
GROUP6: Final = group(0, (
    op("sldt", em_sldt, Mem, ___,   ___, Prot | Intercept,        intercept="sldt"),
    op("str",  em_str,  Mem, ___,   ___, Prot | Intercept,        intercept="str"),
    op("lldt", em_lldt, ___, Mem16, ___, Prot | Priv | Intercept, intercept="lldt"),
    op("ltr",  em_ltr,  ___, Mem16, ___, Prot | Priv | Intercept, intercept="ltr"),
    N, N, N, N,
))

_SMSW: Final = op("smsw", em_smsw, Mem, ___, ___, Mov | Intercept, intercept="smsw")
_LMSW: Final = op("lmsw", em_lmsw, ___, Mem16, ___, Mov | Priv | Intercept, intercept="lmsw")

#: 0F 01: descriptor-table registers, machine status word, INVLPG; hypercalls and SVM by register form.
GROUP7: Final = group_dual(0, (
    op("sgdt",   em_sgdt,   Mem, ___, ___, Mov | Intercept,                     intercept="sgdt"),
    op("sidt",   em_sidt,   Mem, ___, ___, Mov | Intercept,                     intercept="sidt"),
    op("lgdt",   em_lgdt,   ___, Mem, ___, Priv | Intercept,                    intercept="lgdt"),
    op("lidt",   em_lidt,   ___, Mem, ___, Priv | Intercept,                    intercept="lidt"),
    _SMSW,
    N,
    _LMSW,
    op("invlpg", em_invlpg, ___, Mem, ___, ByteOp | NoAccess | Priv | Intercept, intercept="invlpg"),
), (
    rm_ext((N, op("vmcall", em_hypercall, ___, ___, ___, EmulateOnUD | Priv), *(N,) * 6)),
    rm_ext((
        op("monitor", None, ___, ___, ___, Priv | Intercept, intercept="monitor"),
        op("mwait",   None, ___, ___, ___, Priv | Intercept, intercept="mwait"),
        *(N,) * 6,
    )),
    rm_ext((N, op("xsetbv", em_xsetbv, Implicit, ___, ___, Priv | Intercept, intercept="xsetbv"), *(N,) * 6)),
    rm_ext((
        op("vmrun",   None,         ___, ___, ___, Prot | Priv | Intercept | CheckPerm, check_svme_pa, "vmrun"),
        op("vmmcall", em_hypercall, ___, ___, ___, Prot | EmulateOnUD | Intercept, intercept="vmmcall"),
        op("vmload",  None,         ___, ___, ___, Prot | Priv | Intercept | CheckPerm, check_svme_pa, "vmload"),
        op("vmsave",  None,         ___, ___, ___, Prot | Priv | Intercept | CheckPerm, check_svme_pa, "vmsave"),
        op("stgi",    None,         ___, ___, ___, Prot | Priv | Intercept | CheckPerm, check_svme, "stgi"),
        op("clgi",    None,         ___, ___, ___, Prot | Priv | Intercept | CheckPerm, check_svme, "clgi"),
        op("skinit",  None,         ___, ___, ___, Prot | Priv | Intercept | CheckPerm, check_svme, "skinit"),
        op("invlpga", None,         ___, ___, ___, Prot | Priv | Intercept | CheckPerm, check_svme, "invlpga"),
    )),
    _SMSW,
    N,
    _LMSW,
    rm_ext((N, op("rdtscp", None, ___, ___, ___, Intercept | CheckPerm, check_rdtsc, "rdtscp"), *(N,) * 6)),
))

#: 0F BA: bit operations with an immediate.
GROUP8: Final = group(BitOp, (
    N, N, N, N,
    op("bt",  em_bt,  Mem, ImmByte, ___, NoWrite | Fastop),
    op("bts", em_bts, Mem, ImmByte, ___, Lock | PageTable | Fastop),
    op("btr", em_btr, Mem, ImmByte, ___, Lock | Fastop),
    op("btc", em_btc, Mem, ImmByte, ___, Lock | PageTable | Fastop),
))

#: 0F C7: CMPXCHG8B/16B and RDPID.
GROUP9: Final = group_dual(0, (
    N, op("cmpxchg8b/cmpxchg16b", em_cmpxchg8b, Mem64, ___, ___, Lock | PageTable), N, N, N, N, N, N,
), (
    N, N, N, N, N, N, N,
    by_prefix(
        N, N, N,
        op("rdpid", em_rdpid, Mem, ___, ___, EmulateOnUD | Op3264 | Intercept, intercept="rdpid"),
    ),
))


def group11(flags: int) -> Entry:
    """C6, C7: MOV of an immediate."""
    return group(flags, (op("mov", em_mov, Mem, Imm, ___, Mov | PageTable), *(_UNDEFINED,) * 7))


#: 0F AE: FXSAVE, FXRSTOR, cache-line flushes.
GROUP15: Final = group_dual(0, (
    op("fxsave",  em_fxsave,  ___, ___, ___, Aligned16),
    op("fxrstor", em_fxrstor, ___, ___, ___, Aligned16),
    N, N, N, N, N,
    by_prefix(
        op("clflush",    em_clflush,    ___, Mem, ___, ByteOp),
        op("clflushopt", em_clflushopt, ___, Mem, ___, ByteOp),
        N, N,
    ),
), (N, N, N, N, N, N, N, N))

#: D9, DB, DD: the x87 instructions that KVM knows.
ESCAPE_D9: Final = escape("d9", (*(N,) * 7, op("fnstcw", em_fnstcw, Mem16, ___, ___, Mov)), (N,) * 64)
ESCAPE_DB: Final = escape(
    "db", (N,) * 8, (*(N,) * 0x23, op("fninit", em_fninit, Implicit, ___, ___, 0), *(N,) * 0x1C)
)
ESCAPE_DD: Final = escape("dd", (*(N,) * 7, op("fnstsw m16", em_fnstsw, Mem16, ___, ___, Mov)), (N,) * 64)


def sse_mov(no: str, p66: str, dst: int, src: int, align: int) -> Entry:
    """0F 10/11/28/29: packed moves; the scalar forms are not implemented."""
    return by_prefix(
        op(no,  em_mov, dst, src, ___, align),
        op(p66, em_mov, dst, src, ___, align),
        op("",  None,   dst, src, ___, NotImpl),
        op("",  None,   dst, src, ___, NotImpl),
        flags=ModRM | Mov | Sse,
    )


def mmx_sse_mov(dst: int, src: int) -> Entry:
    """0F 6F/7F: MOVQ of an MMX register, MOVDQA, MOVDQU."""
    return by_prefix(
        op("movq mm", em_mov, dst, src, ___, Mmx),
        op("movdqa",  em_mov, dst, src, ___, Sse | Aligned),
        op("",        None,   dst, src, ___, NotImpl),
        op("movdqu",  em_mov, dst, src, ___, Sse | Unaligned),
        flags=ModRM | Mov,
    )


_NO_SSE_STORE: Final = op("", None, Mem, Reg, ___, NotImpl)

#: 0F 2B: MOVNTPS, MOVNTPD.
MOVNT: Final = by_prefix(
    dual(op("movntps", em_mov, Mem, Reg, ___, 0), _NO_SSE_STORE),
    dual(op("movntpd", em_mov, Mem, Reg, ___, 0), _NO_SSE_STORE),
    _NO_SSE_STORE,
    _NO_SSE_STORE,
    flags=ModRM | Mov | Sse,
)

#: 0F E7: MOVNTDQ.
MOVNTDQ: Final = by_prefix(
    _NO_SSE_STORE,
    # KVM deviation: the register form, invalid on processors, is taken (SDM Vol. 2B MOVNTDQ).
    op("movntdq", em_mov, Mem, Reg, ___, Sse),
    _NO_SSE_STORE,
    _NO_SSE_STORE,
    flags=ModRM | Mov,
)


def movbe(dst: int, src: int) -> Entry:
    """0F 38 F0/F1: MOVBE; with F2 they are CRC32, which is not implemented."""
    form = dual(op("movbe", em_movbe, dst, src, ___, Mov), N)
    return by_prefix(form, form, N, N, flags=ModRM | EmulateOnUD)
# fmt: on

"""The two-byte opcode map, 0F xx (emulate.c: twobyte_table; SDM Vol. 2D Table A-3).

Opcodes without a row are not implemented.
"""

from __future__ import annotations

from typing import Final

from emufuzz.emulator.flags import (
    Aligned,
    BitOp,
    ByteOp,
    CheckPerm,
    EmulateOnUD,
    Fastop,
    Intercept,
    IsBranch,
    Lock,
    ModRM,
    Mov,
    NearBranch,
    No16,
    NoAccess,
    NoMod,
    NoWrite,
    Op3264,
    PageTable,
    Priv,
    SrcWrite,
    Stack,
    Unaligned,
)
from emufuzz.emulator.insn.alu import em_xadd
from emufuzz.emulator.insn.bits import (
    em_bsf_c,
    em_bsr_c,
    em_bswap,
    em_bt,
    em_btc,
    em_btr,
    em_bts,
    sw_cmov,
    sw_setcc,
)
from emufuzz.emulator.insn.branch import sw_jcc
from emufuzz.emulator.insn.farbranch import em_rsm
from emufuzz.emulator.insn.mov import (
    em_cmpxchg,
    em_mov,
    sw_movsx,
    sw_movzx,
    sw_nop,
)
from emufuzz.emulator.insn.msr import (
    check_rdpmc,
    check_rdtsc,
    em_rdmsr,
    em_rdpmc,
    em_rdtsc,
    em_wrmsr,
)
from emufuzz.emulator.insn.muldiv import em_imul
from emufuzz.emulator.insn.segreg import em_lseg, em_pop_sreg
from emufuzz.emulator.insn.shift import em_shld, em_shrd
from emufuzz.emulator.insn.stack import em_push_sreg
from emufuzz.emulator.insn.syscall import em_syscall, em_sysenter, em_sysexit
from emufuzz.emulator.insn.system import (
    check_cr_access,
    check_dr_read,
    check_dr_write,
    em_clts,
    em_cpuid,
    em_cr_write,
    em_dr_write,
    sw_cr_read,
    sw_dr_read,
    sw_invd,
    sw_wbinvd,
)
from emufuzz.emulator.opcode import (
    Entry,
    N,
    dual,
    op,
    switch,
)
from emufuzz.emulator.tables.groups import (
    GROUP6,
    GROUP7,
    GROUP8,
    GROUP9,
    GROUP15,
    MOVNT,
    MOVNTDQ,
    mmx_sse_mov,
    sse_mov,
)
from emufuzz.emulator.tables.words import (
    CL,
    FS,
    GS,
    SS,
    Imm,
    ImmByte,
    Implicit,
    Mem,
    Mem8,
    Mem16,
    MemFAddr,
    Reg,
    ___,
)

# fmt: off
#    op    how    mnemonic, handler, dst, src, src2, flags[, permission hook[, intercept]]
TWO_BYTE_ROWS: Final[tuple[tuple[int, Entry], ...]] = (
    # 00 - 0f
    (0x00, GROUP6),
    (0x01, GROUP7),
    (0x05, op(    "syscall",               em_syscall,   Implicit, ___,      ___,     EmulateOnUD | IsBranch)),
    (0x06, op(    "clts",                  em_clts,      Implicit, ___,      ___,     Priv | Intercept, intercept="clts")),
    (0x08, switch("invd",                  sw_invd,      Implicit, ___,      ___,     Priv | Intercept, intercept="invd")),
    (0x09, switch("wbinvd",                sw_wbinvd,    Implicit, ___,      ___,     Priv | Intercept, intercept="wbinvd")),
    # KVM deviation: register forms, #UD on AMD processors, are taken (APM Vol. 3 PREFETCH).
    (0x0d, switch("prefetch(w) group",     sw_nop,       Implicit, Mem,      ___,     ModRM | NoAccess)),
    # 10 - 1f
    (0x10, sse_mov("movups", "movupd", Reg, Mem, Unaligned)),
    (0x11, sse_mov("movups", "movupd", Mem, Reg, Unaligned)),
    (0x18, switch("prefetchh group / nop", sw_nop,       Implicit, Mem,      ___,     ModRM | NoAccess)),
    (0x19, op(    "reserved nop",          None,         Implicit, Mem,      ___,     ModRM | NoAccess)),
    (0x1c, op(    "reserved nop",          None,         Implicit, Mem,      ___,     ModRM | NoAccess)),
    (0x1d, op(    "reserved nop",          None,         Implicit, Mem,      ___,     ModRM | NoAccess)),
    (0x1e, op(    "reserved nop",          None,         Implicit, Mem,      ___,     ModRM | NoAccess)),
    (0x1f, switch("nop",                   sw_nop,       Implicit, Mem,      ___,     ModRM | NoAccess)),
    # 20 - 2f
    (0x20, switch("mov r,cr",              sw_cr_read,   Mem,      ___,      ___,     ModRM | Op3264 | Priv | NoMod | Intercept | CheckPerm, check_cr_access, "cr_read")),
    (0x21, switch("mov r,dr",              sw_dr_read,   Mem,      ___,      ___,     ModRM | Op3264 | Priv | NoMod | Intercept | CheckPerm, check_dr_read, "dr_read")),
    (0x22, op(    "mov cr,r",              em_cr_write,  ___,      Mem,      ___,     ModRM | Op3264 | Priv | NoMod | Intercept | CheckPerm, check_cr_access, "cr_write")),
    (0x23, op(    "mov dr,r",              em_dr_write,  ___,      Mem,      ___,     ModRM | Op3264 | Priv | NoMod | Intercept | CheckPerm, check_dr_write, "dr_write")),
    (0x28, sse_mov("movaps", "movapd", Reg, Mem, Aligned)),
    (0x29, sse_mov("movaps", "movapd", Mem, Reg, Aligned)),
    (0x2b, MOVNT),
    # 30 - 3f
    (0x30, op(    "wrmsr",                 em_wrmsr,     Implicit, ___,      ___,     Priv | Intercept, intercept="wrmsr")),
    (0x31, op(    "rdtsc",                 em_rdtsc,     Implicit, ___,      ___,     Intercept | CheckPerm, check_rdtsc, "rdtsc")),
    (0x32, op(    "rdmsr",                 em_rdmsr,     Implicit, ___,      ___,     Priv | Intercept, intercept="rdmsr")),
    (0x33, op(    "rdpmc",                 em_rdpmc,     Implicit, ___,      ___,     Intercept | CheckPerm, check_rdpmc, "rdpmc")),
    (0x34, op(    "sysenter",              em_sysenter,  Implicit, ___,      ___,     EmulateOnUD | IsBranch)),
    (0x35, op(    "sysexit",               em_sysexit,   Implicit, ___,      ___,     EmulateOnUD | Priv | IsBranch)),
    # 40 - 4f
    (0x40, switch("cmovo",                 sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x41, switch("cmovno",                sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x42, switch("cmovb",                 sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x43, switch("cmovnb",                sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x44, switch("cmovz",                 sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x45, switch("cmovnz",                sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x46, switch("cmovbe",                sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x47, switch("cmovnbe",               sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x48, switch("cmovs",                 sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x49, switch("cmovns",                sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x4a, switch("cmovp",                 sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x4b, switch("cmovnp",                sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x4c, switch("cmovl",                 sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x4d, switch("cmovnl",                sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x4e, switch("cmovle",                sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    (0x4f, switch("cmovnle",               sw_cmov,      Reg,      Mem,      ___,     ModRM)),
    # 60 - 6f
    (0x6f, mmx_sse_mov(Reg, Mem)),
    # 70 - 7f
    (0x7f, mmx_sse_mov(Mem, Reg)),
    # 80 - 8f
    (0x80, switch("jo near",               sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x81, switch("jno near",              sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x82, switch("jb near",               sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x83, switch("jnb near",              sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x84, switch("jz near",               sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x85, switch("jnz near",              sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x86, switch("jbe near",              sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x87, switch("jnbe near",             sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x88, switch("js near",               sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x89, switch("jns near",              sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x8a, switch("jp near",               sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x8b, switch("jnp near",              sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x8c, switch("jl near",               sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x8d, switch("jnl near",              sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x8e, switch("jle near",              sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    (0x8f, switch("jnle near",             sw_jcc,       ___,      Imm,      ___,     NearBranch | IsBranch)),
    # 90 - 9f
    (0x90, switch("seto",                  sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x91, switch("setno",                 sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x92, switch("setb",                  sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x93, switch("setnb",                 sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x94, switch("setz",                  sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x95, switch("setnz",                 sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x96, switch("setbe",                 sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x97, switch("setnbe",                sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x98, switch("sets",                  sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x99, switch("setns",                 sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x9a, switch("setp",                  sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x9b, switch("setnp",                 sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x9c, switch("setl",                  sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x9d, switch("setnl",                 sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x9e, switch("setle",                 sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    (0x9f, switch("setnle",                sw_setcc,     Mem,      ___,      ___,     ByteOp | ModRM | Mov)),
    # a0 - af
    (0xa0, op(    "push fs",               em_push_sreg, ___,      ___,      FS,      Stack)),
    (0xa1, op(    "pop fs",                em_pop_sreg,  ___,      ___,      FS,      Stack)),
    (0xa2, op(    "cpuid",                 em_cpuid,     Implicit, ___,      ___,     Intercept, intercept="cpuid")),
    (0xa3, op(    "bt",                    em_bt,        Mem,      Reg,      ___,     BitOp | ModRM | Fastop | NoWrite)),
    (0xa4, op(    "shld",                  em_shld,      Mem,      Reg,      ImmByte, ModRM | Fastop)),
    (0xa5, op(    "shld",                  em_shld,      Mem,      Reg,      CL,      ModRM | Fastop)),
    (0xa8, op(    "push gs",               em_push_sreg, ___,      ___,      GS,      Stack)),
    (0xa9, op(    "pop gs",                em_pop_sreg,  ___,      ___,      GS,      Stack)),
    (0xaa, op(    "rsm",                   em_rsm,       Implicit, ___,      ___,     EmulateOnUD | Intercept, intercept="rsm")),
    (0xab, op(    "bts",                   em_bts,       Mem,      Reg,      ___,     BitOp | ModRM | Lock | PageTable | Fastop)),
    (0xac, op(    "shrd",                  em_shrd,      Mem,      Reg,      ImmByte, ModRM | Fastop)),
    (0xad, op(    "shrd",                  em_shrd,      Mem,      Reg,      CL,      ModRM | Fastop)),
    (0xae, GROUP15),
    (0xaf, op(    "imul",                  em_imul,      Reg,      Mem,      ___,     ModRM | Fastop)),
    # b0 - bf
    (0xb0, op(    "cmpxchg",               em_cmpxchg,   Mem,      Reg,      ___,     ByteOp | ModRM | Lock | PageTable | SrcWrite)),
    (0xb1, op(    "cmpxchg",               em_cmpxchg,   Mem,      Reg,      ___,     ModRM | Lock | PageTable | SrcWrite)),
    (0xb2, op(    "lss",                   em_lseg,      Reg,      MemFAddr, SS,      ModRM)),
    (0xb3, op(    "btr",                   em_btr,       Mem,      Reg,      ___,     BitOp | ModRM | Lock | Fastop)),
    (0xb4, op(    "lfs",                   em_lseg,      Reg,      MemFAddr, FS,      ModRM)),
    (0xb5, op(    "lgs",                   em_lseg,      Reg,      MemFAddr, GS,      ModRM)),
    (0xb6, switch("movzx r,r/m8",          sw_movzx,     Reg,      Mem8,     ___,     ModRM | Mov)),
    (0xb7, switch("movzx r,r/m16",         sw_movzx,     Reg,      Mem16,    ___,     ModRM | Mov)),
    (0xba, GROUP8),
    (0xbb, op(    "btc",                   em_btc,       Mem,      Reg,      ___,     BitOp | ModRM | Lock | PageTable | Fastop)),
    (0xbc, op(    "bsf",                   em_bsf_c,     Reg,      Mem,      ___,     ModRM)),
    (0xbd, op(    "bsr",                   em_bsr_c,     Reg,      Mem,      ___,     ModRM)),
    (0xbe, switch("movsx r,r/m8",          sw_movsx,     Reg,      Mem8,     ___,     ModRM | Mov)),
    (0xbf, switch("movsx r,r/m16",         sw_movsx,     Reg,      Mem16,    ___,     ModRM | Mov)),
    # c0 - cf
    (0xc0, op(    "xadd",                  em_xadd,      Mem,      Reg,      ___,     ByteOp | ModRM | Lock | Fastop | SrcWrite)),
    (0xc1, op(    "xadd",                  em_xadd,      Mem,      Reg,      ___,     ModRM | Lock | Fastop | SrcWrite)),
    (0xc3, dual(op("movnti", em_mov, Mem, Reg, ___, Mov | No16), N)),
    (0xc7, GROUP9),
    (0xc8, op(    "bswap",                 em_bswap,     Reg,      ___,      ___,     0)),
    (0xc9, op(    "bswap",                 em_bswap,     Reg,      ___,      ___,     0)),
    (0xca, op(    "bswap",                 em_bswap,     Reg,      ___,      ___,     0)),
    (0xcb, op(    "bswap",                 em_bswap,     Reg,      ___,      ___,     0)),
    (0xcc, op(    "bswap",                 em_bswap,     Reg,      ___,      ___,     0)),
    (0xcd, op(    "bswap",                 em_bswap,     Reg,      ___,      ___,     0)),
    (0xce, op(    "bswap",                 em_bswap,     Reg,      ___,      ___,     0)),
    (0xcf, op(    "bswap",                 em_bswap,     Reg,      ___,      ___,     0)),
    # e0 - ef
    (0xe7, MOVNTDQ),
)
# fmt: on

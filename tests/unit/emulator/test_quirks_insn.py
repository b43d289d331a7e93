"""Quirks of stack, arithmetic, flag, system and FPU instructions; numbered as in docs/porting.md."""

from __future__ import annotations

import pytest
from support.emulate import GP, PF, UD, Run, run, segment

from emufuzz.arch.cr import X86_CR0_TS, X86_CR4_DE, X86_CR4_OSXSAVE
from emufuzz.arch.rflags import (
    X86_EFLAGS_IF,
    X86_EFLAGS_IOPL,
    X86_EFLAGS_SF,
    X86_EFLAGS_VIF,
    X86_EFLAGS_VIP,
    X86_EFLAGS_ZF,
)
from emufuzz.case.build import CODE_BASE, DATA_BASE, STACK_TOP
from emufuzz.case.model import Fpu
from emufuzz.emulator.x86emul import KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI

ABSENT = 0xB000
DR7_GD = 1 << 13
DRS = (0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400)
CR4 = 0x600


def test_quirk_08_aam_and_aad_look_at_the_whole_register():
    aam = run("prot32", "66d40a", rax=0x00FF)  # AX = 1905h: AL 5, AH 25
    assert aam.reg("rax") == 0x1905
    aam = run("prot32", "d40a", rax=0x8000_0000)  # AL = AH = 0, bit 31 is no part of AL
    assert aam.flags & X86_EFLAGS_SF
    assert not aam.flags & X86_EFLAGS_ZF
    aad = run("prot32", "d50a", rax=0x8000_0000)
    assert aad.flags & (X86_EFLAGS_SF | X86_EFLAGS_ZF) == X86_EFLAGS_SF


@pytest.mark.parametrize("code", ["488c18", "480f0000", "480f0008"])
def test_quirk_14_rex_w_stores_eight_bytes_of_selector(code):
    done = run("prot64", code, rax=DATA_BASE, data={DATA_BASE: b"\xff" * 8})
    assert done.mem(DATA_BASE, 8) < 0x10000
    narrow = run("prot64", code[2:], rax=DATA_BASE, data={DATA_BASE: b"\xff" * 8})
    assert narrow.mem(DATA_BASE, 8) >> 16 == 0xFFFF_FFFF_FFFF


@pytest.mark.parametrize("code", ["0f0000", "0f0008"])
def test_quirk_15_sldt_and_str_read_their_destination(code):
    assert run("prot64", code, rax=DATA_BASE).events[0] == ("read", DATA_BASE, 4)
    assert run("prot64", code, rax=ABSENT).fault == (PF, 2, ABSENT)
    assert run("prot64", "8c18", rax=DATA_BASE).events[0][0] == "write"


@pytest.mark.parametrize("code", ["8e08", "8e30"])
def test_quirk_16_mov_sreg_reads_before_it_looks_at_the_register(code):
    assert run("prot64", code, rax=ABSENT).fault == (PF, 0, ABSENT)
    assert run("prot64", code, rax=DATA_BASE).fault == UD


def test_quirk_17_mov_ss_shadow_in_spite_of_a_fault():
    for done in (run("prot32", "8ed0", rax=0), run("prot32", "17", data={STACK_TOP: b"\0\0\0\0"})):
        assert done.fault == GP
        assert done.outcome.interruptibility == KVM_X86_SHADOW_INT_MOV_SS


def test_quirk_18_sti_shadow_even_with_if_set():
    done = run("prot32", "fb", flags=X86_EFLAGS_IF)
    assert done.outcome.interruptibility == KVM_X86_SHADOW_INT_STI


@pytest.mark.parametrize("code", ["fa", "fb"])
def test_quirk_19_cli_and_sti_in_vm86(code):
    assert run("vm86", code, flags=X86_EFLAGS_IOPL).fault == GP
    assert run("prot32", code, flags=X86_EFLAGS_IOPL, cpl=3).rc == "continue"


def test_quirk_20_pushf_and_popf_in_vm86():
    assert run("vm86", "9c").rc == "continue"
    popf = run("vm86", "9d")
    assert popf.fault == GP
    assert popf.events == [("read", STACK_TOP, 2)]


def test_quirk_21_enter():
    assert run("prot32", "c8100001").rc == "unhandleable"
    done = run("prot32", "66c8100000", rbp=0x11112222)
    assert done.events == [("write", STACK_TOP - 4, b"\x22\x22\x11\x11")]  # SS.B decides, not 66
    assert (done.reg("rsp"), done.reg("rbp")) == (STACK_TOP - 20, STACK_TOP - 4)
    small = run("prot32", "c8100000", rbp=0xAAAA0000, ss=segment("prot16", "ss"))
    assert small.reg("rbp") == 0xAAAA0000 | STACK_TOP - 2
    assert run("prot32", "c8008000", rsp=STACK_TOP).rc == "continue"  # the frame's end is absent


def test_quirk_22_real_mode_interrupts():
    ivt = {0: bytes(0x83 * 4) + b"\x34\x12\x00\x20"}
    done = run("real", "66cd03", data={0: bytes(12) + b"\x34\x12\x00\x20"}, idtr=_table(0, 0))
    assert done.rip == 0x1234
    assert done.seg("cs").sel == 0x2000
    assert done.reg("rsp") == STACK_TOP - 12  # three dwords; and IDTR's limit of 0 is ignored
    assert done.mem(STACK_TOP - 12, 4) == CODE_BASE + 3
    assert run("real", "cc", data=ivt, idtr=_table(0x83 * 4 - 12, 0)).rip == 0x1234


def _table(base: int, limit: int):
    from emufuzz.case.model import TableRegister

    return TableRegister(base, limit)


def test_quirk_30_privilege_comes_before_an_instructions_own_checks():
    assert run("prot64", "0f20c8", cpl=3).fault == GP  # CR1 does not exist
    assert run("prot64", "0f20c8").fault == UD
    assert run("prot64", "0f01d1", cpl=3).fault == GP  # XSETBV without OSXSAVE
    assert run("prot64", "0f01d1").fault == UD
    assert run("prot64", "0f01d1", cr4=CR4 | 0x20 | X86_CR4_OSXSAVE, rax=3).outcome.system.xcr0 == 3


def test_quirk_31_high_bits_for_cr0_and_cr4_are_dropped():
    done = run("prot64", "0f22c0", rax=0xFFFFFFFF_80010031)
    assert done.rc == "continue"
    assert done.outcome.system.cr0 == 0x80010031
    done = run("prot64", "0f22e0", rax=0x1_00000020)
    assert done.outcome.system.cr4 == 0x20
    assert run("prot64", "0f22d8", rax=1 << 62).fault == GP  # CR3 is looked at whole


def test_quirk_32_a_bad_value_for_dr4_and_dr5_is_ignored():
    for code in ("0f23e0", "0f23e8"):
        done = run("prot64", code, rax=1 << 40, dr=DRS)
        assert done.rc == "continue"
        assert done.outcome.system.dr == DRS


def test_quirk_33_high_bits_rank_above_dr7_gd():
    gd = (*DRS[:7], 0x400 | DR7_GD)
    assert run("prot64", "0f23f0", rax=1 << 40, dr=gd).fault == GP
    detected = run("prot64", "0f23f0", rax=0, dr=gd)
    assert detected.fault == (1, None, None)
    assert detected.outcome.system.dr[6] & DR7_GD  # DR6.BD, at the same place, was written here
    assert run("prot64", "0f23e0", rax=1 << 40, dr=DRS, cr4=CR4 | 0x20 | X86_CR4_DE).fault == UD


def test_quirk_34_lmsw_and_clts_ignore_a_refusal():
    refused = [{"op": "set_cr", "result": 1}]
    for code in ("0f06", "0f01f0"):
        done = run("prot64", code, rax=0, cr0=0x80010033 | X86_CR0_TS, callbacks=refused)
        assert done.rc == "continue"
        assert done.outcome.system.cr0 & X86_CR0_TS
    real = run("real", "0f01f0", rax=1)
    assert real.outcome.system.cr0 & 1
    assert (real.rc, real.rip) == ("continue", CODE_BASE + 3)


def test_quirk_35_invlpg_of_a_bad_address_is_a_nop():
    assert run("prot64", "0f0138", rax=1 << 47).events == []
    assert run("prot64", "0f0138", rax=DATA_BASE).events == [("invlpg", DATA_BASE)]


@pytest.mark.parametrize("code", ["0fae38", "660fae38"])
def test_quirk_36_clflush_reads(code):
    assert run("prot64", code, rax=DATA_BASE).events == [("read", DATA_BASE, 1)]
    assert run("prot64", "0f1808", rax=ABSENT).events == []  # a prefetch does not


def test_quirk_40_cmpxchg16b():
    assert run("prot64", "480fc708", rax=0, rsi=0).rc != "continue"
    done = run("prot64", "480fc70e", rsi=DATA_BASE)
    assert (done.rc, done.events) == ("unhandleable", [("read", DATA_BASE, 16)])
    assert run("prot64", "480fc70e", rsi=DATA_BASE + 8).fault == GP
    assert run("prot64", "0fc70e", rsi=DATA_BASE).flags & X86_EFLAGS_ZF  # 8 bytes, no CPUID asked


def test_quirk_43_sgdt_and_lgdt():
    done = run(
        "prot32", "660f0100", rax=DATA_BASE, gdtr=_table(0x12345678, 0xFFF), data={DATA_BASE: b"\xff" * 8}
    )
    assert done.mem(DATA_BASE, 8) == 0xFFFF_0034_5678_0FFF
    load = run("prot32", "660f0110", rax=DATA_BASE, data={DATA_BASE: bytes.fromhex("ff0f78563412")})
    assert [event for event in load.events if event[-1] == "std"] == [
        ("read", DATA_BASE, 2, "std"), ("read", DATA_BASE + 2, 3, "std"),
    ]  # fmt: skip
    assert load.outcome.system.gdtr.base == 0x345678


def test_quirk_44_fxsave_and_fxrstor():
    assert run("prot64", "0fae00", rax=DATA_BASE).rc == "unhandleable"
    saved = run("prot32", "0fae00", rax=DATA_BASE)
    assert [len(event[2]) for event in saved.events] == [288]
    assert [len(e[2]) for e in run("prot32", "0fae00", rax=DATA_BASE, cr4=0).events] == [160]
    reserved = run("prot32", "0fae08", rax=DATA_BASE, data={DATA_BASE + 24: b"\x00\x00\x01\x00"})
    assert reserved.fault == GP


def test_quirk_57_hypercall():
    done = run("prot32", "0f01c1", cs=segment("prot32", "cs", base=0x1000), rip=CODE_BASE)
    assert done.events[0] == ("fix_hypercall", CODE_BASE)
    assert done.events[1][:2] == ("write", CODE_BASE)  # not CS.base + EIP
    assert done.rip == CODE_BASE
    assert run("prot32", "0f01c1", cpl=3).fault == GP


def test_quirk_59_popf_knows_no_virtual_interrupts():
    flags = X86_EFLAGS_VIF | X86_EFLAGS_VIP | X86_EFLAGS_IOPL
    done = run("vm86", "9d", flags=flags, cr4=CR4 | 1, data={STACK_TOP: b"\x02\x02"})
    assert done.rc == "continue"  # with VIP and IF the SDM has #GP
    assert done.flags & X86_EFLAGS_IF


def test_quirk_67_lss_with_rex_w_reads_ten_bytes_for_amd_too():
    for vendor in ("intel", "amd"):
        done = run("prot64", "480fb418", rax=DATA_BASE, vendor=vendor)
        assert done.events[0] == ("read", DATA_BASE, 10)


def test_quirk_68_x87():
    pending = Fpu(fcw=0x340, fsw=1)
    assert run("prot32", "d938", rax=DATA_BASE, fpu=pending).rc == "continue"
    assert run("prot32", "dd38", rax=DATA_BASE, fpu=pending).mem(DATA_BASE, 2) == 0x8081
    assert run("prot32", "dfe0").outcome.decode_rc == "failed"


def test_quirk_69_int_n_has_a_signed_vector():
    below = {0x1000 - 0x200: b"\x34\x12\x00\x20"}
    done = run("real", "cd80", data=below, idtr=_table(0x1000, 0x3FF))
    assert (done.rip, done.seg("cs").sel) == (0x1234, 0x2000)


def test_quirk_70_a_failed_cmpxchg_zero_extends_a_register_destination():
    done = run("prot64", "0fb1d8", rax=0xFFFFFFFF_00000001, rbx=2)
    assert isinstance(done, Run)
    assert done.reg("rax") == 2  # RAX is its own destination
    done = run("prot64", "0fb1d1", rax=1, rcx=0xFFFFFFFF_00000005)
    assert (done.reg("rcx"), done.reg("rax")) == (5, 5)

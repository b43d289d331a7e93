"""Quirks of addresses, segments limits, fetching and decoding; numbered as in docs/porting.md."""

from __future__ import annotations

import pytest
from support.emulate import GP, PF, SS, UD, run, segment

from emufuzz.arch.cr import X86_CR0_AM, X86_CR4_LA57
from emufuzz.arch.rflags import X86_EFLAGS_AC, X86_EFLAGS_ZF
from emufuzz.case.build import DATA_BASE, STACK_TOP
from emufuzz.emulator.x86emul import EMULTYPE_TRAP_UD

LOW_END = 1 << 47  # first address behind the lower canonical half
NO_EXECUTOR = (
    "0f19c0", "0f1cc0", "0f1dc0", "f30f1efa", "f30f1efb", "0f01f9", "0f01c8", "0f01c9", "f1",
)  # fmt: skip


def test_quirk_01_only_the_first_byte_must_be_canonical():
    straddling = run("prot64", "488b18", rax=LOW_END - 4, data={LOW_END - 0x1000: b""})
    assert straddling.fault == (PF, 0, LOW_END)  # no #GP: the second page is looked for
    assert straddling.events == [("read", LOW_END - 4, 8)]
    assert run("prot64", "488b18", rax=LOW_END).fault == GP


def test_quirk_02_a_4g_segment_wraps():
    pages = {0: b"\x11\x22\x33\x44", 0xFFFFF000: b""}
    emulated = run("prot32", "8b18", rax=0xFFFFFFFE, data=pages)
    assert emulated.rc == "continue"
    assert emulated.reg("rbx") == 0x22110000
    # The accesses that do not go through read_emulated are not cut to 32 bits.
    standard = run("prot32", "0f0100", rax=0xFFFFFFFE, data=pages)
    assert standard.fault == (PF, 2, 0x100000000)


def test_quirk_03_no_alignment_check():
    done = run("prot32", "8b18", rax=DATA_BASE + 1, cpl=3, flags=X86_EFLAGS_AC, cr0=0x80010033 | X86_CR0_AM)
    assert done.rc == "continue"


def test_quirk_04_code_may_be_fetched_from_a_data_segment():
    assert run("prot32", "90", cs=segment("prot32", "cs", type=3)).rc == "continue"


@pytest.mark.parametrize(
    ("code", "fault"), [("3e658b03", GP), ("653e8b03", None), ("65368b00", SS), ("658b00", GP)]
)
def test_quirk_05_the_last_segment_prefix_counts_in_64_bit_mode(code, fault):
    done = run("prot64", code, rax=LOW_END, rbx=DATA_BASE, gs=segment("prot64", "gs", base=LOW_END))
    assert done.fault == fault


@pytest.mark.parametrize(("code", "result"), [("f30fbcd8", 4), ("f30fbdd8", 5)])
def test_quirk_06_tzcnt_and_lzcnt_scan(code, result):
    done = run("prot64", code, rax=0x30, rbx=0)
    assert done.reg("rbx") == result  # LZCNT would be 26
    assert not done.flags & X86_EFLAGS_ZF


@pytest.mark.parametrize("code", ["0fbcd8", "0fbdd8"])
def test_quirk_07_a_scan_of_zero_leaves_the_whole_register(code):
    done = run("prot64", code, rax=0, rbx=0xFFFFFFFF_00000001)
    assert done.reg("rbx") == 0xFFFFFFFF_00000001
    assert done.flags & X86_EFLAGS_ZF


@pytest.mark.parametrize(
    "code",
    ["27", "37", "3f", "62c0", "63c0", "9b", "f30fb8c0", "f20f38f1c0", "0f02c0", "0f03c0",
     "0f00e0", "0f00e8", "0f07", "0f01f8", "0fff", "0f0b", "0fb9", "0fc7f0", "0fae20", "0f58c0"],
)  # fmt: skip
def test_quirk_09_not_implemented(code):
    done = run("prot32", code)
    assert (done.rc, done.outcome.decode_rc, done.fault) == ("unhandleable", "failed", None)


@pytest.mark.parametrize("code", NO_EXECUTOR[:5])
def test_quirk_10_reserved_nops_and_endbr_fail(code):
    done = run("prot64", code)
    assert (done.rc, done.outcome.decode_rc, done.fault) == ("unhandleable", "ok", None)


@pytest.mark.parametrize("code", NO_EXECUTOR[5:])
def test_quirk_11_decoded_but_without_executor(code):
    done = run("prot64", code)
    assert (done.rc, done.outcome.decode_rc, done.fault) == ("unhandleable", "ok", None)
    assert run("prot64", "0f01f9", cpl=3, cr4=0x620 | 4).fault == GP  # RDTSCP: its check comes first
    assert run("prot64", "0f01d8").fault == UD  # VMRUN: no EFER.SVME


@pytest.mark.parametrize("code", ["66f20f1000", "66f30f6f00"])
def test_quirk_13_66_with_f2_or_f3_is_refused(code):
    assert run("prot64", code, rax=DATA_BASE).outcome.decode_rc == "failed"


def test_quirk_41_register_forms_of_movntdq_and_prefetch():
    assert run("prot64", "660fe7c8").rc == "continue"
    assert run("prot64", "0f0dc8").rc == "continue"
    assert run("prot64", "0f18c8").rc == "continue"


def test_quirk_42_movsxd_reads_four_bytes_and_bswap16_gives_zero():
    movsxd = run(
        "prot64", "666318", rax=DATA_BASE, rbx=0xAAAA_BBBB_CCCC, data={DATA_BASE: b"\x01\x80\xff\xff"}
    )
    assert movsxd.events == [("read", DATA_BASE, 4)]
    assert movsxd.reg("rbx") == 0xAAAA_BBBB_8001
    assert run("prot64", "660fc8", rax=0x1234_5678).reg("rax") == 0x1234_0000


def test_quirk_60_real_mode_with_cs_d_decodes_as_32_bit():
    unreal = run("real", "b801020304", cs=segment("real", "cs", db=1))
    assert (unreal.reg("rax"), unreal.rip) == (0x04030201, 0x6005)
    assert run("real", "b80102").rip == 0x6003


@pytest.mark.parametrize("code", ["9f", "9e", "0fb018", "0fc318", "0f1018"])
def test_quirk_61_no_cpuid_gates(code):
    done = run("prot64", code, rax=DATA_BASE, cr4=0x620)
    assert done.rc == "continue"
    assert not any(event[0] == "cpuid" for event in done.events)


def test_quirk_63_rep_with_zero_count():
    last = 0xFFFFFFFE
    assert run("prot32", "f3a4", rip=last, rcx=0).rip == 1 << 32  # not cut to 32 bits
    assert run("prot32", "8bc0", rip=last).rip == 0
    stages = run("prot32", "f36c", rcx=0, callbacks=[{"op": "intercept", "nth": 3, "result": "intercepted"}])
    assert stages.rc == "continue"  # POST_MEMACCESS would have been the third question


def test_quirk_65_a_failed_push_moves_nothing_but_memory():
    at = 0xC004  # room for one of the eight registers, below is an absent page
    done = run("prot32", "60", rax=0x11223344, rsp=at)
    assert done.fault == (PF, 2, 0xBFFC)
    assert done.mem(0xC000, 4) == 0x11223344
    assert done.reg("rsp") == at


def test_decoding_on_ud_takes_only_what_is_emulated_on_ud():
    assert run("prot64", "90").rc == "continue"
    for code, rc in (("90", "failed"), ("0f05", "ok")):
        done = run("prot64", code, emul_type=EMULTYPE_TRAP_UD)
        assert done.outcome.decode_rc == rc


def test_la57_widens_the_canonical_range():
    address = 1 << 50
    assert run("prot64", "488b18", rax=address).fault == GP
    wide = run("prot64", "488b18", rax=address, cr4=0x620 | X86_CR4_LA57, data={address: b"\x07"})
    assert wide.reg("rbx") == 7
    assert run("prot64", "488b18", rax=1 << 56, cr4=0x620 | X86_CR4_LA57).fault == GP
    assert run("prot64", "488b18", rax=-(1 << 56) & (1 << 64) - 1, cr4=0x620 | X86_CR4_LA57).fault[0] == PF


def test_stack_addresses_fault_as_ss():
    assert run("prot64", "50", rsp=LOW_END + 8).fault == SS
    assert run("prot32", "50", rsp=STACK_TOP, ss=segment("prot32", "ss", limit=0xFF, g=0)).fault == SS


@pytest.mark.parametrize("prefix", ["66", "f2", "f3"])
def test_quirk_71_prefixes_that_are_not_looked_at(prefix):
    stored = run("prot64", prefix + "0fc318", rax=DATA_BASE, rbx=0x1122334455)
    assert stored.rc == "continue"
    assert stored.events == [("write", DATA_BASE, bytes.fromhex("55443322"))]
    assert run("prot32", prefix + "0fae00", rax=DATA_BASE).rc == "continue"


def test_quirk_72_a_segment_is_read_before_it_is_found_read_only():
    code = segment("prot32", "cs", type=11)
    absent = run("prot32", "2e0118", rax=0x50000000, cs=code)
    assert absent.fault == (PF, 2, 0x50000000)
    assert run("prot32", "2e0118", rax=DATA_BASE, cs=code).fault == GP


def test_quirk_73_a_store_that_faults_has_marked_the_x87_registers():
    faulted = run("prot64", "0f7f00", rax=0x50000000)
    assert faulted.fault == (PF, 2, 0x50000000)
    assert faulted.outcome.system.fpu.ftw == 0xFF

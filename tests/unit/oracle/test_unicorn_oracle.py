"""What the oracle reports of ordinary cases, in every mode."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Fpu

MODES = ("real", "vm86", "prot16", "prot32", "compat16", "compat32", "prot64")
CPLS = {"real": (0,), "vm86": (3,), "compat16": (0, 3), "compat32": (0, 3)}
LEVELS = [(mode, cpl) for mode in MODES for cpl in CPLS.get(mode, (0, 1, 2, 3))]
SHORT = {"real", "vm86", "prot16", "compat16"}


@pytest.mark.parametrize(("mode", "cpl"), LEVELS)
def test_a_load_and_a_fault_in_every_mode(oracle, case, mode, cpl):
    code = "8b1c" if mode in SHORT else "8b1e"  # mov (e)bx, [(e)si]
    good = case(mode, code, {6: 0x8010}, cpl)
    bad = case(mode, code, {6: 0x1000}, cpl)
    loaded, faulted = oracle.run([good, bad])
    assert loaded.gpr[3] == (0x1110 if mode in SHORT else 0x13121110)
    assert loaded.rip == 0x6002
    assert loaded.system is good.system
    user = 4 if cpl == 3 or mode == "vm86" else 0
    assert faulted.exception == (14, user, 0x1000)
    assert faulted.rc == "propagate_fault"
    assert (faulted.rip, faulted.gpr) == (bad.rip, bad.gpr)


@pytest.mark.parametrize(("mode", "cpl"), LEVELS)
def test_a_store_in_every_mode(oracle, case, mode, cpl):
    code = "881c" if mode in SHORT else "881e"  # mov [(e)si], bl
    stored = oracle.run([case(mode, code, {3: 0xEE, 6: 0x8FFF}, cpl)])[0]
    assert list(stored.pages) == [8]
    assert stored.pages[8][-2:] == b"\xfe\xee"
    user = 4 if cpl == 3 or mode == "vm86" else 0
    faulted = oracle.run([case(mode, code, {3: 0xEE, 6: 0x9000}, cpl)])[0]
    assert faulted.exception == (14, 2 | user, 0x9000)


def test_fetch_faults_carry_the_fetch_bit_only_with_nx_or_smep(oracle, case):
    def fetch(**changes: object) -> tuple[int, int | None, int | None] | None:
        truncated = case("prot64", "48", rip=0x6FFF, **changes)
        return oracle.run([truncated])[0].exception

    assert fetch() == (14, 0, 0x7000)
    assert fetch(efer=0xD00) == (14, 16, 0x7000)
    assert fetch(cr4=0x1006A0) == (14, 16, 0x7000)


def test_an_instruction_may_end_with_its_page(oracle, case):
    outcome = oracle.run([case("prot32", "40", rip=0x6FFF)])[0]
    assert (outcome.exception, outcome.gpr[0], outcome.rip) == (None, 1, 0x7000)


def test_the_code_page_can_be_read(oracle, case):
    outcome = oracle.run([case("prot64", "488b05f9ffffff", rip=0x6000)])[0]
    assert outcome.gpr[0] == 0x00FFFFFFF9058B48


def test_other_code_pages_are_absent(oracle, case):
    oracle.run([case("prot64", "90f4", rip=0x7000)])
    outcome = oracle.run([case("prot64", "8b06f4", {6: 0x7000}, rip=0x6000)])[0]
    assert outcome.exception == (14, 0, 0x7000)


def test_five_level_paging_addresses(oracle, case):
    address = 0x0080_0000_0000_0000
    mem = ((address, b"\x2a"),)
    wide = oracle.run([case("prot64", "8b06", {6: address}, cr4=0x16A0, mem=mem)])[0]
    narrow = oracle.run([case("prot64", "8b06", {6: address}, mem=mem)])[0]
    assert (wide.gpr[0], wide.exception) == (0x2A, None)
    assert narrow.exception == (13, 0, None)


@pytest.mark.parametrize(
    ("rcx", "left", "done"), [(0, 0, 0), (1, 0, 1), (5, 0, 5), (1024, 0, 1024), (2000, 1024, 976)]
)
def test_rep_goes_to_the_stopping_point(oracle, case, rcx, left, done):
    outcome = oracle.run([case("prot64", "f3aa", {0: 0x55, 1: rcx, 7: 0x8000})])[0]
    assert (outcome.gpr[1], outcome.gpr[7]) == (left, 0x8000 + done)
    stopped = bool(rcx)
    assert (outcome.rip, outcome.rflags) == ((0x6000, 0x10002) if stopped else (0x6002, 2))


def test_repne_scas_ends_when_found(oracle, case):
    outcome = oracle.run([case("prot32", "f2ae", {0: 3, 1: 100, 7: 0x8000})])[0]
    assert (outcome.gpr[1], outcome.gpr[7], outcome.rip) == (96, 0x8004, 0x6002)
    assert not outcome.rflags & 0x10000


def test_rep_fault_keeps_finished_iterations_and_flags(oracle, case):
    outcome = oracle.run([case("prot32", "f3a6", {1: 9, 6: 0x8FFE, 7: 0x8FFE}, rflags=0x2)])[0]
    assert outcome.exception is not None
    assert (outcome.gpr[1], outcome.rflags, outcome.rip) == (7, 2, 0x6000)


def test_single_step_flag_is_kept_and_does_not_trap(oracle, case):
    pushed = oracle.run([case("prot32", "9c", rflags=0x102)])[0]
    assert (pushed.exception, pushed.rflags, pushed.pages[12][0x7FC:0x7FE]) == (None, 0x102, b"\x02\x01")
    assert pushed.system.dr[6] == 0xFFFF0FF0


def test_interrupt_shadows(oracle, case):
    sti = oracle.run([case("prot32", "fb")])[0]
    mov_ss = oracle.run([case("real", "8ed0")])[0]
    mov_ss_at_page_end = oracle.run([case("real", "8ed0", rip=0x6FFE)])[0]
    assert (sti.interruptibility, mov_ss.interruptibility, mov_ss_at_page_end.interruptibility) == (2, 1, 1)


def test_changed_system_state_is_reported(oracle, case):
    fpu = Fpu(xmm=(1 << 100, *(0,) * 15))
    moved = case("prot64", "0f28c8", fpu=fpu)  # movaps xmm1, xmm0
    outcome = oracle.run([moved])[0]
    assert outcome.system.fpu.xmm[:2] == (1 << 100, 1 << 100)
    assert msgspec.structs.replace(outcome.system, fpu=fpu) == moved.system


def test_segment_loads_are_reported(oracle, case):
    outcome = oracle.run([case("real", "8ed8", {0: 0x1234})])[0]  # mov ds, ax
    assert (outcome.system.seg[3].sel, outcome.system.seg[3].base) == (0x1234, 0x12340)


def test_many_memories_and_code_pages_reuse_the_buffer(oracle, case):
    for number in range(1500):
        mem = ((0x100000 + number * 0x1000, number.to_bytes(4, "little")),)
        load = case("prot64", "8b06f4", {6: mem[0][0]}, rip=0x4000000 + number * 0x1000, mem=mem)
        assert oracle.run([load])[0].gpr[0] == number


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "task-switch"}, "path: task-switch switches tasks"),
        ({"path": "rmode-inject"}, "path: rmode-inject delivers an event"),
        ({"path": "ud", "extra": {"kvm": {"pending": {"vector": 13}}}}, "kvm.pending: an exception is"),
        ({"extra": {"kvm": {"vectoring_info": 0x80000300}}}, "kvm.vectoring_info"),
        ({"extra": {"callbacks": []}}, "callbacks"),
        ({"extra": {"phys": [{"addr": "0x10000000000"}]}}, "phys: unicorn has addresses of 40 bits"),
        ({"extra": {"devices": [{"kind": "mmio", "addr": 0, "size": 0x801000}]}}, "mem: more than 2048"),
        ({"count": 2, "path": "ud"}, "count"),
        ({"emul_type": 4}, "emul_type"),
    ],
)
def test_unsupported_cases_are_named(oracle, case, change, message):
    with pytest.raises(UnsupportedCaseError, match=message):
        oracle.check(msgspec.structs.replace(case("prot32", "90"), **change))


def test_raw_starts_are_timed(oracle, case):
    batch = [case("prot64", "01d8f4", {0: n}, rip=0x50000 + 32 * n) for n in range(50)]
    assert 0 < oracle.raw_starts(batch) < 1


def test_code_over_the_end_of_linear_memory_is_not_run(oracle, case):
    built = case("prot32", "8cd4", rip=0xFFFFFFFF)
    outcome = oracle.run([built])[0]
    assert outcome.unchecked == (("all", "unicorn-code-wrap"),)
    assert (outcome.rip, outcome.gpr) == (built.rip, built.gpr)


def test_a_change_of_paging_registers_does_not_reach_the_next_case(oracle, case):
    """MOV to CR0 clears PG behind the hidden page tables: the TLB must not keep what follows from it."""
    store = case("prot32", "8903", {0: 0x11223344, 3: 0x8000})
    gprs = (0x60000011, *store.gpr[1:])
    paging_off = msgspec.structs.replace(store, code=bytes.fromhex("0f22c0f4"), gpr=gprs, rip=store.rip + 64)
    stores = [msgspec.structs.replace(store, rip=store.rip + 32 * slot) for slot in range(4, 8)]
    expected = [outcome.pages for outcome in oracle.run(stores)]
    moved = [msgspec.structs.replace(store, rip=store.rip + 32 * slot) for slot in range(8, 12)]
    outcomes = oracle.run([paging_off, *moved])[1:]
    assert [outcome.pages for outcome in outcomes] == expected
    assert {outcome.rc for outcome in outcomes} == {"continue"}

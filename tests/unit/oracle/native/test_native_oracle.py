"""The host's processor runs cases at CPL 3, with the segments and pages of the case."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from emufuzz.case.build import build_case, build_system
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Fpu, Memory, Segment, System
from emufuzz.oracle.base import Capabilities
from emufuzz.oracle.native.runner import SHARED_FROM

MODES = ("prot16", "prot32", "compat16", "compat32", "prot64")
AC, TF, NT, ID, DF, RF = 1 << 18, 1 << 8, 1 << 14, 1 << 21, 1 << 10, 1 << 16
DATA = bytes(range(256)) * 16


def make(mode: str, code: str, **options: Any) -> Case:
    return build_case(mode, bytes.fromhex(code), cpl=3, data={0x8000: DATA}, **options)


def with_segment(mode: str, name: str, **changes: Any) -> System:
    system = build_system(mode, 3)
    number = ("es", "cs", "ss", "ds", "fs", "gs").index(name)
    seg = list(system.seg)
    seg[number] = msgspec.structs.replace(seg[number], **changes)
    return msgspec.structs.replace(system, seg=tuple(seg))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tail", ["f4", "", "90f4"])
def test_an_instruction_runs_alone(native, mode, tail):
    outcome = native.run([make(mode, "01d8" + tail, rax=2, rbx=3, flags=0x8D5)])[0]
    assert (outcome.gpr[0] & 0xFFFF, outcome.rip, outcome.exception) == (5, 0x6002, None)
    assert outcome.rflags == 0x2 | 0x4


@pytest.mark.parametrize("mode", MODES)
def test_memory_is_read_and_written_and_put_back(native, mode):
    store = make(mode, "8807f4" if "16" not in mode else "8805f4", rdi=0x8123, rax=0x77)
    load = make(mode, "8a07f4" if "16" not in mode else "8a05f4", rdi=0x8123)
    stored, loaded = native.run([store, msgspec.structs.replace(load, system=store.system, mem=store.mem)])
    page = stored.pages[8]
    assert (page[0x123], page[:0x123], page[0x124:]) == (0x77, DATA[:0x123], DATA[0x124:])
    assert (loaded.gpr[0] & 0xFF, loaded.pages) == (0x23, {})


FAULTS = (
    ("prot64", "0f0b", {}, (6, None, None)),
    ("prot64", "f7f1", {}, (0, None, None)),
    ("prot64", "8b07", {"rdi": 0xB123}, (14, 4, 0xB123)),
    ("prot64", "8907", {"rdi": 0xB123}, (14, 6, 0xB123)),
    ("prot64", "0107", {"rdi": 0xB123}, (14, 6, 0xB123)),
    ("prot64", "8b07", {"rdi": 0xFFFF_9000_0000_0000}, (14, 4, 0xFFFF_9000_0000_0000)),
    ("prot64", "8b07", {"rdi": 1 << 63}, (13, 0, None)),
    ("prot64", "50", {"rsp": 1 << 63}, (12, 0, None)),
    ("prot64", "ffe0", {"rax": 1 << 63}, (13, 0, None)),
    ("prot64", "f08907", {"rdi": 0x8000}, (6, None, None)),
    ("prot64", "0f2807", {"rdi": 0x8001}, (13, 0, None)),
    ("prot64", "f4", {}, (13, 0, None)),
    ("prot64", "fa", {}, (13, 0, None)),
    ("prot64", "0f20c0", {}, (13, 0, None)),
    ("prot64", "67ce", {}, (6, None, None)),
    ("compat32", "d400", {}, (0, None, None)),
    ("compat32", "6207", {"rdi": 0x8000, "rax": 1 << 30}, (5, None, None)),
    ("prot32", "0f01d0", {}, None),
)


@pytest.mark.parametrize(("mode", "code", "gpr", "fault"), FAULTS)
def test_exceptions_have_vector_error_code_and_address(native, mode, code, gpr, fault):
    case = make(mode, code + "f4", flags=0x8D5, **gpr)
    outcome = native.run([case])[0]
    assert outcome.exception == fault
    if fault is not None:
        assert (outcome.rip, outcome.rflags, outcome.gpr) == (case.rip, case.rflags, case.gpr)
        assert outcome.rc == "propagate_fault"


SEGMENTS = (
    ("push beyond the limit", "50", "ss", {"limit": 0xC7FB, "g": 0}, {"rsp": 0xC801}, (12, 0, None)),
    ("push within the limit", "50", "ss", {"limit": 0xC7FF, "g": 0}, {"rsp": 0xC800}, None),
    ("read at the limit", "8b07", "ds", {"limit": 0x8003, "g": 0}, {"rdi": 0x8000}, None),
    ("read beyond the limit", "8b07", "ds", {"limit": 0x8003, "g": 0}, {"rdi": 0x8001}, (13, 0, None)),
    ("write to read-only data", "8907", "ds", {"type": 1}, {"rdi": 0x8000}, (13, 0, None)),
    ("write to code", "2e8907", "cs", {}, {"rdi": 0x8000}, (13, 0, None)),
    ("read of code", "2e8b07", "cs", {}, {"rdi": 0x8000}, None),
    ("read of execute-only code", "2e8b07", "cs", {"type": 9}, {"rdi": 0x8000}, (13, 0, None)),
    ("below expand-down", "8b07", "ds", {"limit": 0x8003, "g": 0, "type": 7}, {"rdi": 0x8003}, (13, 0, None)),
    ("in expand-down", "8b07", "ds", {"limit": 0x8003, "g": 0, "type": 7}, {"rdi": 0x8004}, None),
    ("no segment", "8b07", "ds", {"p": 0, "sel": 0}, {"rdi": 0x8000}, (13, 0, None)),
    ("jump beyond the limit", "eb7f", "cs", {"limit": 0x6080, "g": 0}, {}, (13, 0, None)),
    ("jump to the limit", "eb7e", "cs", {"limit": 0x6080, "g": 0}, {}, None),
)


@pytest.mark.parametrize("mode", ["compat32", "prot32"])
@pytest.mark.parametrize(
    ("code", "segment", "changes", "gpr", "fault"),
    [row[1:] for row in SEGMENTS],
    ids=[r[0] for r in SEGMENTS],
)
def test_segments_have_their_limits_and_types(native, mode, code, segment, changes, gpr, fault):
    system = with_segment(mode, segment, **changes)
    outcome = native.run([make(mode, code + "f4", system=system, **gpr)])[0]
    assert outcome.exception == fault


def test_segment_bases_count(native):
    system = with_segment("compat32", "ds", base=0x100)
    outcome = native.run([make("compat32", "8a07f4", system=system, rdi=0x8000 - 0xF0)])[0]
    assert outcome.gpr[0] == 0x10


@pytest.mark.parametrize(("prefix", "segment"), [("64", "fs"), ("65", "gs")])
def test_fs_and_gs_have_bases_in_64_bit_mode(native, prefix, segment):
    system = with_segment("prot64", segment, base=0x8042)
    outcome = native.run([make("prot64", prefix + "8a07f4", system=system)])[0]
    assert outcome.gpr[0] == 0x42


def test_a_16_bit_stack_wraps_and_keeps_the_upper_half_of_esp(native):
    case = make("compat16", "50f4", rsp=0x1234C800, rax=0x5678)
    outcome = native.run([case])[0]
    assert outcome.gpr[4] == 0x1234C7FE
    assert outcome.pages[0xC][0x7FE:0x800] == b"\x78\x56"


@pytest.mark.parametrize(("am", "fault"), [(0, None), (1 << 18, (17, 0, None))])
def test_alignment_is_checked_as_the_case_has_it(native, am, fault):
    system = build_system("prot64", 3)
    system = msgspec.structs.replace(system, cr0=system.cr0 | am)
    outcome = native.run([make("prot64", "8b07f4", system=system, rdi=0x8001, flags=AC)])[0]
    assert (outcome.exception, outcome.rflags) == (fault, AC | 2)


@pytest.mark.parametrize("flag", [NT, ID, DF, AC, TF, 1 << 9, 3 << 12])
def test_flags_of_the_case_stay(native, flag):
    outcome = native.run([make("prot64", "90f4", flags=flag)])[0]
    assert (outcome.rflags, outcome.rip, outcome.exception) == (flag | 2, 0x6001, None)


def test_popf_loads_what_the_privilege_level_allows(native):
    case = make("prot64", "9df4", rsp=0xC800, flags=1 << 9)
    case = msgspec.structs.replace(case, mem=Memory((*case.mem.entries, (0xC800, b"\xff\xff\x27"))))
    outcome = native.run([case])[0]
    assert outcome.rflags == 0xFD5 | AC | ID | NT | 2


def test_resume_flag_ends_with_the_instruction(native):
    assert native.run([make("prot64", "90f4", flags=RF)])[0].rflags == 2


def test_vector_registers_and_mxcsr(native):
    fpu = Fpu(xmm=(0x3F800000, 0x40400000, *[7] * 14), mxcsr=0x1F80)
    system = build_system("prot64", 3, fpu=fpu)
    divided, same = native.run(
        [make("prot64", "f30f5ec1f4", system=system), make("prot64", "90f4", system=system)]
    )
    assert divided.system.fpu.xmm[0] == 0x3EAAAAAB
    assert divided.system.fpu.xmm[1:] == fpu.xmm[1:]
    assert divided.system.fpu.mxcsr == 0x1FA0
    assert same.system is system


def test_mmx_registers(native):
    system = build_system("prot64", 3, fpu=Fpu(mm=tuple(range(8))))
    outcome = native.run([make("prot64", "0ffdcaf4", system=system)])[0]
    assert outcome.system.fpu.mm[:3] == (0, 3, 2)
    assert outcome.system.fpu.ftw == 0xFF


def test_code_sees_itself(native):
    outcome = native.run([make("prot64", "8b05fafffffff4")])[0]
    assert outcome.gpr[0] == int.from_bytes(bytes.fromhex("8b05faff"), "little")


def test_a_write_to_its_own_code_is_seen(native):
    case = make("prot64", "c605f9ffffff90f4")
    outcome = native.run([case])[0]
    assert (outcome.exception, outcome.rip) == (None, 0x6007)
    assert outcome.pages[6][:8] == bytes.fromhex("90" + "05f9ffffff90f4")


def test_instruction_at_the_end_of_memory(native):
    whole, cut = make("prot64", "90", rip=0x7FFF), make("prot64", "8b", rip=0x7FFF)
    done, faulted = native.run([whole, cut])
    assert (done.exception, done.rip) == (None, 0x8000)
    missing = msgspec.structs.replace(cut, mem=Memory(((0xC000, b""),)))
    faulted = native.run([missing])[0]
    assert faulted.exception == (14, 0x14, 0x8000)


@pytest.mark.parametrize(
    ("code", "rcx", "left", "rip"),
    [("f3aa", 5, 0, 0x6000), ("f3aa", 0, 0, 0x6002), ("f3aa", 2050, 2048, 0x6000), ("f2ae", 5, 4, 0x6002)],
)
def test_repeated_instructions_stop_where_kvm_stops(native, code, rcx, left, rip):
    outcome = native.run([make("prot64", code + "f4", rcx=rcx, rdi=0x8000)])[0]
    assert (outcome.gpr[1], outcome.rip, outcome.exception) == (left, rip, None)
    assert bool(outcome.rflags & RF) == (rip == 0x6000)


def test_a_repeated_instruction_that_faults_has_gone_as_far_as_it_could(native):
    outcome = native.run([make("prot64", "f3a4f4", rcx=4096, rsi=0x8000, rdi=0xAFF0)])[0]
    assert outcome.exception == (14, 6, 0xB000)
    assert (outcome.gpr[1], outcome.gpr[6], outcome.gpr[7]) == (4096 - 16, 0x8010, 0xB000)


REFUSED = (
    ("mode: ", make("prot64", "90"), {"mode": "real"}),
    ("seg.ss.dpl: native runs at CPL 3", build_case("prot64", b"\x90", cpl=0), {}),
    ("count: ", make("prot64", "90"), {"count": 2}),
    ("emul_type: ", make("prot64", "90"), {"emul_type": 1}),
    ("phys: ", make("prot64", "90"), {"extra": {"phys": []}}),
    ("devices: ", make("prot64", "90"), {"extra": {"devices": []}}),
    ("path: ", make("prot64", "90"), {"path": "task-switch"}),
    ("code: native takes 1 to 63 bytes, got 64", make("prot64", "90" * 64), {}),
    ("code: native takes 1 to 63 bytes, got 0", make("prot64", ""), {}),
    ("rip: user code cannot lie at", make("prot64", "90", rip=0x7FFF_FFFF_F000), {}),
    ("rip: user code cannot lie at", make("prot64", "90", rip=0xFFFF_8000_0000_0000), {}),
    ("mem: native has room for 62 pages", make("prot64", "90", mem=Memory(((0, bytes(1 << 18)),))), {}),
    ("seg.fs.base: ", make("prot64", "90", system=with_segment("prot64", "fs", base=1 << 60)), {}),
    ("seg.cs.type: ", make("prot32", "90", system=with_segment("prot32", "cs", type=15)), {}),
    ("seg.ss.type: ", make("prot32", "90", system=with_segment("prot32", "ss", type=1)), {}),
    ("seg.ds.limit: ", make("prot32", "90", system=with_segment("prot32", "ds", limit=0x100001)), {}),
    ("fpu.mxcsr: ", make("prot64", "90", system=build_system("prot64", 3, fpu=Fpu(mxcsr=1 << 20))), {}),
)


@pytest.mark.parametrize(("reason", "case", "changes"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_run_is_refused_with_a_reason(native, reason, case, changes):
    with pytest.raises(UnsupportedCaseError) as refused:
        native.check(msgspec.structs.replace(case, **changes))
    assert str(refused.value).startswith(reason)


def test_forced_emulation_is_judged_as_the_instruction_behind_the_prefix(native):
    case = msgspec.structs.replace(make("prot64", "0f0b6b766d01d8f4", rax=1, rbx=2), path="fep")
    native.check(case)
    outcome = native.run([case])[0]
    assert (outcome.gpr[0], outcome.rip) == (3, 0x6007)


def test_outcomes_come_in_the_order_of_the_cases(native):
    cases = [
        make(mode, "01d8f4", id=f"{mode}-{n}", rax=n, rbx=1, rip=0x6000 + 32 * n)
        for n in range(20)
        for mode in MODES
    ]
    outcomes = native.run(cases)
    assert [outcome.id for outcome in outcomes] == [case.id for case in cases]
    assert [outcome.gpr[0] for outcome in outcomes] == [case.gpr[0] + 1 for case in cases]


def test_more_cases_than_fit_into_one_wake_up(native):
    base = make("prot64", "ffc0f4")
    cases = [msgspec.structs.replace(base, gpr=(n, *base.gpr[1:])) for n in range(1000)]
    assert [outcome.gpr[0] for outcome in native.run(cases)] == [n + 1 for n in range(1000)]


def test_a_write_to_another_cases_code_is_a_page_fault(native):
    base = make("prot64", "90f4", mem=Memory(((0xC000, b""),)), rip=0x40000)
    others = [msgspec.structs.replace(base, rip=0x41000 + 32 * n) for n in range(SHARED_FROM)]
    writer = msgspec.structs.replace(
        base, code=bytes.fromhex("8807f4"), gpr=(1, *base.gpr[1:7], 0x41800, *base.gpr[8:])
    )
    outcomes = native.run([*others, writer, *others])
    assert outcomes[SHARED_FROM].exception == (14, 6, 0x41800)
    del outcomes[SHARED_FROM]
    ends = [(outcome.exception, outcome.rip) for outcome in outcomes]
    assert ends == [(None, case.rip + 1) for case in [*others, *others]]


def test_nothing_of_one_case_is_left_for_the_next(native):
    base = make("prot64", "48ffc8f4", rax=0)
    spoil = make("prot64", "8907f4", rdi=0x8000, rax=0xFFFFFFFF)
    load = make("prot64", "8b07f4", rdi=0x8000)
    cases = [base, spoil, load] * 10
    shared = [msgspec.structs.replace(case, system=base.system, mem=base.mem) for case in cases]
    outcomes = native.run(shared)
    assert {o.gpr[0] for o in outcomes[2::3]} == {0x03020100}
    assert {o.gpr[0] for o in outcomes[::3]} == {(1 << 64) - 1}


def test_pages_of_the_kernel_are_named_when_a_case_needs_them(native):
    high = 0xFFFF_8000_0000_0000
    case = make("prot64", "8b07f4", rdi=high, mem=Memory(((0x8000, DATA), (high, DATA))))
    outcome = native.run([case])[0]
    assert outcome.unchecked == (("all", "native-kernel-page"),)
    other = msgspec.structs.replace(case, gpr=(*case.gpr[:7], 0x8000, *case.gpr[8:]))
    assert native.run([other])[0].gpr[0] == 0x03020100
    assert native.unchecked(other, native.run([other])[0]) == ()


def test_capabilities_and_fingerprint(native):
    capabilities = native.capabilities
    assert capabilities == Capabilities(
        modes=frozenset(MODES), cpls=frozenset({3}), paths=True, vendor=native.fingerprint()["vendor"]
    )
    assert {"oracle", "vendor", "family", "model", "stepping"} <= native.fingerprint().keys()


def test_unused_segments_are_null(native):
    system = build_system("compat32", 3)
    seg = (*system.seg[:4], Segment(), Segment(), *system.seg[6:])
    system = msgspec.structs.replace(system, seg=seg)
    outcome = native.run([make("compat32", "648b07f4", system=system, rdi=0x8000)])[0]
    assert outcome.exception == (13, 0, None)

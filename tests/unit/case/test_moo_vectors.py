"""Tests of MOO files as vectors: what the last HLT and the delivery of exceptions are taken back to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from emufuzz.case.delta import expect_to_outcome
from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_from_obj, case_to_obj
from emufuzz.case.model import Case
from emufuzz.case.moo_vectors import moo_vectors, read_revoked
from emufuzz.case.vectors import read_vectors
from emufuzz.oracle.compare import AGREE, compare, judge
from emufuzz.oracle.vectors import VectorsOracle
from emufuzz.subject.flat import FlatSubject
from tests.support.moo import CODE_AT, DATA_AT, STACK_AT, START_16, chunk, cycles, frame, moo, one_test

HANDLER = {"cs": 0x4000, "rip": 0x11}


def import_test(folder: Path, data: bytes, cpu: str = "C286") -> tuple[Case, dict[str, Any]]:
    path = folder / "01.MOO"
    path.write_bytes(moo(data, cpu=cpu))
    (vector,) = moo_vectors(path)
    return vector


def why_skipped(folder: Path, data: bytes, cpu: str = "C286", revoked: frozenset[str] = frozenset()) -> str:
    path = folder / "01.MOO"
    path.write_bytes(moo(data, cpu=cpu))
    skipped: Counter[str] = Counter()
    assert list(moo_vectors(path, skipped, revoked)) == []
    ((reason, number),) = skipped.items()
    assert number == 1
    return reason


def agrees(case: Case, expect: dict[str, Any]) -> bool:
    """Whether the emulator does what the processor did, as an oracle would judge."""
    (outcome,) = FlatSubject().run([case])
    return judge(case, outcome, expect_to_outcome(case, expect), VectorsOracle(())).kind == AGREE


# fmt: off
#: The examples in the READMEs of the three suites: processor, registers, memory, what changed.
EXAMPLES = {
    "8088": ("8088", "008aa7dd", {
        "rax": 53139, "rbx": 10002, "rcx": 25563, "rdx": 1580, "cs": 46716, "ss": 56284, "ds": 33035,
        "es": 63307, "rsp": 3860, "rbp": 34194, "rsi": 31963, "rdi": 35563, "rip": 13514, "rflags": 62531,
    }, {957908: 244}, {"rip": 13518, "rflags": 62599}, {957908: 207}),
    "80286": ("C286", "005f0ef4", {
        "rax": 715, "rbx": 26659, "rcx": 49548, "rdx": 64181, "cs": 65535, "ss": 41175, "ds": 65535,
        "es": 43996, "rsp": 39769, "rbp": 65535, "rsi": 35262, "rdi": 34633, "rip": 38072, "rflags": 6291,
    }, {1075233: 222}, {"rip": 38076, "rflags": 19}, {1075233: 1}),
    "80386": ("386E", "005e60f4", {
        "cr0": 2147418096, "cr3": 0, "rax": 46917154, "rbx": 1747202472, "rcx": 3247246033,
        "rdx": 4206235108, "rsi": 8323072, "rdi": 4054220768, "rbp": 524289, "rsp": 56811, "cs": 7970,
        "ds": 809, "es": 17715, "fs": 0, "gs": 3855, "ss": 63468, "rip": 29344, "rflags": 4294707347,
        "dr6": 4294905840, "dr7": 0,
    }, {1015585: 11}, {"rip": 29348, "rflags": 4294705298}, {1015585: 179}),
}
# fmt: on


@pytest.mark.parametrize("suite", EXAMPLES)
def test_the_example_of_each_suite_is_what_the_emulator_does(tmp_path: Path, suite: str) -> None:
    cpu, code, before, data, after, written = EXAMPLES[suite]
    wide = "cr0" in before
    test = one_test(bytes.fromhex(code), after, before=before, data=data, written=written, wide=wide)
    case, expect = import_test(tmp_path, test, cpu)
    assert case.code == bytes.fromhex(code)[: 4 if suite == "8088" else 3]
    assert int(expect["rip"], 16) - case.rip == len(case.code)
    assert agrees(case, expect)
    (address,) = written
    (outcome,) = FlatSubject().run([case])
    outcome.pages = {}
    wrong = compare(case, outcome, expect_to_outcome(case, expect))
    assert [(d.kind, d.at) for d in wrong] == [("memory", address)]


def test_a_vector_survives_json_and_has_a_name(tmp_path: Path) -> None:
    test = one_test(b"\x01\xd8\xf4", {"rip": 0x103, "rflags": 0x46}, number=12, name="add ax,bx")
    case, expect = import_test(tmp_path, test)
    assert case.id == "01:12 add ax,bx"
    assert case_from_obj(case_to_obj(case)) == case
    assert expect == {"rc": "continue", "rip": "0x102", "rflags": "0x46"}


def test_bits_that_the_processor_lacks_are_taken_out_of_the_state(tmp_path: Path) -> None:
    test = one_test(b"\x90\xf4", {"rip": 0x102, "rflags": 0xFFFC0002}, wide=True)
    case, expect = import_test(tmp_path, test, "386E")
    assert (case.rflags, case.system.cr0, case.system.dr[6:]) == (2, 0x10, (0xFFFF0FF0, 0x400))
    assert expect == {"rc": "continue", "rip": "0x101"}
    old, _ = import_test(tmp_path, one_test(b"\x90\xf4", {"rip": 0x102}, before={"rflags": 0xF002}))
    assert old.rflags == 2


def test_memory_is_there_wherever_the_processor_was(tmp_path: Path) -> None:
    more = [cycles([0x51234, 0xFFFFFE])]
    test = one_test(b"\x90\xf4", {"rip": 0x102}, written={0x43210: 1}, more=more)
    case, expect = import_test(tmp_path, test)
    assert sorted(case.mem.pages) == [0x10, 0x43, 0x51]
    assert case.mem.pages[0x10][0x100:0x103] == b"\x90\xf4\0"
    assert expect["mem"] == [{"addr": "0x43210", "data": "01"}]


def test_a_branch_ends_with_the_halt_at_its_target(tmp_path: Path) -> None:
    far = one_test(bytes.fromhex("ea34120050f4"), {"cs": 0x5000, "rip": 0x1235})
    case, expect = import_test(tmp_path, far)
    assert (expect["rip"], expect["seg"]) == ("0x1234", {"cs": {"sel": "0x5000", "base": "0x50000"}})
    assert agrees(case, expect)
    edge = one_test(bytes.fromhex("eaffff0050f4"), {"cs": 0x5000, "rip": 0})
    assert import_test(tmp_path, edge)[1]["rip"] == "0xffff"


def test_hlt_ends_itself(tmp_path: Path) -> None:
    case, expect = import_test(tmp_path, one_test(b"\xf4", {"rip": 0x101}))
    assert (case.code, expect["rip"]) == (b"\xf4", "0x101")
    assert agrees(case, expect)


def test_ports_read_as_ones(tmp_path: Path) -> None:
    assert agrees(*import_test(tmp_path, one_test(b"\xe5\x60\xf4", {"rax": 0xFFFF, "rip": 0x103})))


def fault(code: str, vector: int, pushed: int = 2, sp: int = 0x7FA, **after: Any) -> bytes:
    """A test that ends in a handler; what else changed is in `after`."""
    before = {"rbx": 0xFFFF} | after.pop("before", {})
    stack = frame(START_16["rip"], START_16["cs"], pushed, STACK_AT + sp) | after.pop("written", {})
    final = {"rsp": sp, "rflags": 2, **HANDLER, **after}
    data = {STACK_AT + sp + 4: 0x55, STACK_AT + sp + 5: 0x55}
    return one_test(
        bytes.fromhex(code), final, before=before, data=data, written=stack,
        exception=(vector, STACK_AT + sp + 4), wide=True,
    )  # fmt: skip


def test_the_delivery_of_a_fault_is_taken_back(tmp_path: Path) -> None:
    case, expect = import_test(tmp_path, fault("8b07f4", 13, pushed=0x403, before={"rflags": 0x403}), "386E")
    assert expect == {"rc": "propagate_fault", "exception": {"vector": 13, "error_code": 0}}
    assert agrees(case, expect)


def test_division_errors_leave_undefined_flags_alone(tmp_path: Path) -> None:
    case, expect = import_test(tmp_path, fault("f7f1f4", 0, pushed=0x97), "386E")
    assert expect == {"rc": "propagate_fault", "exception": {"vector": 0, "error_code": None}}
    assert agrees(case, expect)


def test_a_fault_in_a_repetition_keeps_what_was_done(tmp_path: Path) -> None:
    before = {"rcx": 5, "rdi": 0xFFFB, "rax": 0x1111}
    written = dict.fromkeys(range(DATA_AT + 0xFFFB, DATA_AT + 0xFFFF), 0x11)
    test = fault("f3abf4", 13, before=before, written=written, rcx=3, rdi=0xFFFF)
    case, expect = import_test(tmp_path, test, "386E")
    assert expect["gpr"] == {"rcx": "0x3", "rdi": "0xffff"}
    assert expect["mem"] == [{"addr": "0x2fffb", "data": "11111111"}]
    assert agrees(case, expect)


def test_registers_that_a_fault_left_changed_stay(tmp_path: Path) -> None:
    case, expect = import_test(tmp_path, fault("8b07f4", 13, sp=0x7F8, rax=9), "386E")
    assert expect["gpr"] == {"rax": "0x9", "rsp": "0x7fe"}
    assert not agrees(case, expect)


@pytest.mark.parametrize(("code", "number"), [("ccf4", 3), ("cd42f4", 0x42), ("cef4", 4)])
def test_interrupts_of_instructions_stay_delivered(tmp_path: Path, code: str, number: int) -> None:
    vector = {number * 4 + at: byte for at, byte in enumerate(b"\x10\x00\x00\x40")}
    ip = 0x100 + len(code) // 2 - 1
    test = one_test(
        bytes.fromhex(code), {"rsp": 0x7FA, "rflags": 0x802, **HANDLER}, before={"rflags": 0x802},
        data=vector, written=frame(ip, 0x1000, 0x802, STACK_AT + 0x7FA),
        exception=(number, STACK_AT + 0x7FE), wide=True,
    )  # fmt: skip
    case, expect = import_test(tmp_path, test, "386E")
    assert (expect["rc"], expect["rip"]) == ("continue", "0x10")
    assert agrees(case, expect)


REPEATS = {
    "stos": ("f3aaf4", {}, {"rcx": 0, "rdi": 5}, dict.fromkeys(range(DATA_AT, DATA_AT + 5), 0), True),
    "ins": ("f36cf4", {}, {"rcx": 0, "rdi": 5}, dict.fromkeys(range(DATA_AT, DATA_AT + 5), 0xFF), True),
    "scas to the end": ("f2aef4", {"rax": 7}, {"rcx": 0, "rdi": 5}, {}, True),
    "scas found at last": ("f2aef4", {"rcx": 1}, {"rcx": 0, "rdi": 1, "rflags": 0x46}, {}, False),
    "scas found": ("f2aef4", {}, {"rcx": 4, "rdi": 1, "rflags": 0x46}, {}, False),
    "nothing to do": ("f3aaf4", {"rcx": 0}, {}, {}, False),
    "no string": ("f390f4", {}, {}, {}, False),
}


@pytest.mark.parametrize(
    ("code", "before", "after", "written", "stops"), REPEATS.values(), ids=REPEATS.keys()
)
def test_a_repetition_stops_where_kvm_stops(
    tmp_path: Path,
    code: str,
    before: dict[str, int],
    after: dict[str, int],
    written: dict[int, int],
    stops: bool,
) -> None:
    test = one_test(
        bytes.fromhex(code), {"rip": 0x103} | after, before={"rcx": 5} | before,
        data={DATA_AT: 0}, written=written, wide=True,
    )  # fmt: skip
    case, expect = import_test(tmp_path, test, "386E")
    assert ("rip" not in expect) == stops
    assert bool(int(expect.get("rflags", "0"), 16) & 0x10000) == stops
    assert agrees(case, expect)


def plain(code: str, **changes: Any) -> bytes:
    return one_test(bytes.fromhex(code), {}, **changes)


# fmt: off
UNFIT: dict[str, tuple[str, bytes, str]] = {
    "mov ss":       ("C286", plain("8ed0f4"), "sets an interrupt shadow"),
    "pop ss":       ("386E", plain("17f4", wide=True), "sets an interrupt shadow"),
    "sti":          ("8088", plain("fb"), "sets an interrupt shadow"),
    "lgdt":         ("C286", plain("0f0117f4"), "transfers a table register"),
    "fpu":          ("8086", plain("d8c0"), "needs a coprocessor"),
    "icebp":        ("386E", plain("f1f4", wide=True), "is for in-circuit emulators"),
    "pop cs":       ("8088", plain("0f"), "another instruction on an 8086"),
    "fs on 8086":   ("8088", plain("64"), "another instruction on an 8086"),
    "setmo":        ("8088", plain("d0f0"), "another instruction on an 8086"),
    "mov cs":       ("8088", plain("8ec8"), "operands that only an 8086 accepts"),
    "push sp":      ("8088", plain("54"), "stores SP as it is after the push"),
    "shift by cl":  ("8088", plain("d3e0"), "shift counts of 8 bits"),
    "pushf":        ("8088", plain("9c"), "ones in bits 12 to 15"),
    "div":          ("8088", plain("f6f3"), "division errors of an 8086"),
    "lock 8086":    ("8088", plain("f090"), "LOCK is legal everywhere"),
    "megabyte":     ("8088", plain("90", before={"ds": 0xFFFF}, data={5: 1}), "may wrap at 1 MiB"),
    "segment":      ("8088", plain("90", data={0x2FFFF: 1, 0x20000: 1}), "may wrap at the end of a segment"),
    "popf 286":     ("C286", plain("9df4"), "do not take IOPL and NT"),
    "lmsw":         ("C286", plain("0f01f0f4"), "the machine status word"),
    "lock 286":     ("C286", plain("f090f4"), "LOCK is legal everywhere"),
    "prefix 286":   ("C286", plain("6690f4"), "is a prefix since the 80386"),
    "long 286":     ("C286", plain("26" * 10 + "90f4"), "at most 10 bytes"),
    "overrun 286":  ("C286", plain("8b07f4", exception=(13, 0)), "raises 13 for the stack"),
    "smsw":         ("386E", plain("0f01e0f4", wide=True), "transfers CR0"),
    "mov dr":       ("386E", plain("0f21c0f4", wide=True), "control, debug or test registers"),
    "pushfd":       ("386E", plain("669cf4", wide=True), "has no bits 18 to 31"),
    "push es":      ("386E", plain("6606f4", wide=True), "upper half of a stored segment register"),
    "prefixes":     ("386E", plain("2e2e", wide=True), "prefixes only"),
    "nec":          ("V20", plain("90"), "processor V20 is not supported"),
    "protected":    ("386E", plain("90f4", wide=True, before={"cr0": 1}), "not in real mode"),
    "vm86":         ("386E", plain("90f4", wide=True, before={"rflags": 0x20002}), "not in real mode"),
    "breakpoints":  ("386E", plain("90f4", wide=True, before={"dr7": 1}), "breakpoints are enabled"),
    "unreal":       ("386E", plain("90f4", wide=True, init=[chunk("DC32", b"")]), "INIT has a chunk DC32"),
    "far memory":   ("C286", plain("90f4", data={0x110000: 1}), "memory beyond the reach"),
    "other bytes":  ("C286", plain("90f4", data={CODE_AT: 0x91}), "BYTS and RAM contradict"),
    "many":         ("386E", plain("67f3aaf4", wide=True, before={"rcx": 0x401}), "repeats more often"),
    "lost flags":   ("386E", plain("8b07f4", wide=True, exception=(13, 0x1234)), "not on top of the final"),
    "lost frame":   ("386E", plain("8b07f4", wide=True, exception=(13, 0x30804)), "the stack frame of an"),
    "trap":         ("386E", plain("cd03f4", wide=True, exception=(1, 0x30804),
                                   data=frame(0x102, 0x1000, 2, 0x30800)), "a trap"),
}
# fmt: on


@pytest.mark.parametrize(("cpu", "test", "reason"), UNFIT.values(), ids=UNFIT.keys())
def test_what_says_nothing_of_later_processors_is_counted(
    tmp_path: Path, cpu: str, test: bytes, reason: str
) -> None:
    assert reason in why_skipped(tmp_path, test, cpu)


def test_neighbours_of_what_is_left_out_are_taken(tmp_path: Path) -> None:
    for cpu, code in (
        ("C286", "8ed8f4"),
        ("C286", "0f06f4"),
        ("8088", "d0e0"),
        ("8088", "f6e3"),
        ("8088", "8ed8"),
    ):
        assert import_test(tmp_path, one_test(bytes.fromhex(code), {}), cpu)[1]["rc"] == "continue"
    for code in ("9cf4", "6658f4", "06f4", "8cd8f4"):
        assert import_test(tmp_path, plain(code, wide=True), "386E")[1]["rc"] == "continue"


def operand(sib: int) -> bytes:
    """ADD [..],BL with a SIB byte and an EA32 chunk."""
    place = chunk("EA32", b"\x02", (0x2000).to_bytes(2, "little"), (0x20000).to_bytes(4, "little"),
                  (0xFFFF).to_bytes(4, "little"), bytes(12))  # fmt: skip
    return plain(f"67001c{sib:02x}f4", wide=True, init=[place])


def test_a_scale_without_an_index_is_left_out(tmp_path: Path) -> None:
    assert "scale without an index" in why_skipped(tmp_path, operand(0x63), "386E")
    assert import_test(tmp_path, operand(0x23), "386E")[0].code == bytes.fromhex("67001c23")
    assert import_test(tmp_path, operand(0x5B), "386E")[0].code == bytes.fromhex("67001c5b")


def test_a_segment_that_real_mode_does_not_have_is_seen(tmp_path: Path) -> None:
    place = chunk("EA32", b"\x02", (0x2000).to_bytes(2, "little"), (0x99999).to_bytes(4, "little"), bytes(16))
    assert why_skipped(tmp_path, plain("90f4", wide=True, init=[place]), "386E") == (
        "a segment is not one of real mode"
    )


def test_revoked_tests_are_left_out(tmp_path: Path) -> None:
    test = plain("90f4", more=[chunk("HASH", bytes(range(20)))])
    revoked = tmp_path / "list.txt"
    revoked.write_text(f"# bad ones\n\n{bytes(range(20)).hex().upper()} # this\n")
    assert why_skipped(tmp_path, test, revoked=read_revoked(revoked)) == "revoked"
    assert import_test(tmp_path, test)[0].code == b"\x90"


def test_a_bad_revocation_list_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("# fine\n1234\n")
    with pytest.raises(CaseError, match=r"list\.txt:2: not 40 hexadecimal digits"):
        read_revoked(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CaseError, match=r"list\.txt: not UTF-8 text"):
        read_revoked(path)
    with pytest.raises(CaseError, match=r"none\.txt: No such file"):
        read_revoked(tmp_path / "none.txt")


def test_a_moo_file_is_a_file_of_vectors_and_an_oracle(tmp_path: Path) -> None:
    path = tmp_path / "00.MOO"
    path.write_bytes(moo(plain("8ed0f4"), one_test(b"\x01\xd8\xf4", {"rip": 0x103, "rflags": 0x46})))
    ((case, expect),) = read_vectors(path)
    oracle = VectorsOracle([path])
    assert len(oracle) == 1
    oracle.check(case)
    (answer,) = oracle.run([case])
    assert answer.rip == int(expect["rip"], 16) == 0x102

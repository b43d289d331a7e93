"""Cases as MOO files: what is written is read back as it was, and what cannot be has a reason."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from emufuzz.case.build import build_case, build_system
from emufuzz.case.delta import expect_to_outcome
from emufuzz.case.model import TableRegister
from emufuzz.case.moo import open_moo
from emufuzz.case.moo_vectors import moo_vectors
from emufuzz.case.moo_write import MooHeader, moo_bytes
from emufuzz.case.recorded import recorded_differences
from emufuzz.fuzz.corpus.moo_export import MooExporter, UnfitError
from emufuzz.fuzz.generate import Options, generate_batch
from emufuzz.subject.flat import FlatSubject

UNRECORDED = {"length", "restarts", "events"}


def exported(cases):
    exporter, tests, reasons = MooExporter(), [], Counter()
    for case in cases:
        try:
            tests.append(exporter.export(case, len(tests)))
        except UnfitError as error:
            reasons[str(error)] += 1
    return tests, reasons


def write(path, tests):
    path.write_bytes(moo_bytes(MooHeader("KVM"), [one.test for one in tests], [one.mask for one in tests]))
    return path


def one(code, **state):
    (made,), _ = exported([build_case("real", bytes.fromhex(code), **state)])
    return made


@pytest.fixture(scope="module")
def generated():
    return exported(generate_batch(3, 0, 200, Options(modes=("real",))))


def test_a_file_of_our_own_is_read_without_loss(tmp_path, generated):
    tests, _ = generated
    assert len(tests) > 60
    skipped = Counter()
    vectors = list(moo_vectors(write(tmp_path / "own.moo", tests), skipped))
    assert not skipped
    assert [case for case, _ in vectors] == [test.case for test in tests]
    for (case, expect), test in zip(vectors, tests, strict=True):
        (outcome,) = FlatSubject().run([case])
        differences = recorded_differences(case, outcome, expect_to_outcome(case, expect))
        assert set(differences) <= UNRECORDED, (case.id, differences)
        assert outcome.gpr == test.outcome.gpr


def test_what_was_read_is_written_as_the_same_bytes(tmp_path, generated):
    first = write(tmp_path / "first.moo", generated[0])
    again, reasons = exported(case for case, _ in moo_vectors(first))
    assert not reasons
    assert write(tmp_path / "second.moo", again).read_bytes() == first.read_bytes()


def test_every_case_is_exported_or_has_a_reason(generated):
    tests, reasons = generated
    assert len(tests) + sum(reasons.values()) == 200
    assert set(reasons) <= {
        "a segment is not one of real mode",
        "a page is absent, as none is without paging",
        "the emulator returns unhandleable",
        "needs a coprocessor, whose state is not recorded",
        "transfers a table register, which is not recorded",
        "sets an interrupt shadow, which is not recorded",
        "is for in-circuit emulators",
        "the code is beyond the reach of real mode",
        "BYTS and RAM contradict each other",
        "dr is not recorded",
        "fpu is not recorded",
        "ends beyond the reach of real mode",
    }


def test_a_test_ends_with_its_halt(tmp_path):
    made = one("01d8f4", rax=1, rbx=2)
    (test,) = open_moo(write(tmp_path / "a.moo", [made])).tests()
    assert test.code == bytes.fromhex("01d8f4")
    assert test.final.registers["rip"] == 0x6003
    assert test.initial.ram[0x6002] == 0xF4


def test_a_branch_has_its_halt_at_the_target():
    made = one("eb10f4")
    assert made.test.final.registers["rip"] == 0x6013
    assert made.test.initial.ram[0x6012] == 0xF4
    assert made.outcome.rip == 0x6012


def test_a_fault_is_delivered_to_a_handler(tmp_path):
    made = one("f7f1f4", rax=1)  # DIV by 0
    assert made.test.exception == (0, 0xC7FE)
    after = made.test.final
    assert (after.registers["rip"], after.registers["cs"], after.registers["rsp"]) == (1, 0x500, 0xC7FA)
    assert bytes(after.ram[0xC7FA + i] for i in range(4)) == b"\x00\x60\x00\x00"
    assert made.test.initial.ram[0x5000] == 0xF4
    ((_, expect),) = moo_vectors(write(tmp_path / "a.moo", [made]))
    assert expect == {"rc": "propagate_fault", "exception": {"vector": 0, "error_code": None}}


def test_an_interrupt_names_its_number():
    vectors = {0: bytes(0x400), 0x84: b"\x00\x00\x00\x07"}
    made = one("cd21f4", data=vectors, system=build_system("real", idtr=TableRegister(0, 0x3FF)))
    assert made.test.exception is not None
    assert made.test.exception[0] == 0x21
    assert made.test.final.registers["cs"] == 0x700


def test_a_repeated_instruction_goes_on_to_its_halt():
    made = one("f3aaf4", rcx=3, rdi=0x8000, rax=0x5A)
    assert made.outcome.rip == 0x6000
    assert made.test.final.registers["rip"] == 0x6003


def test_undefined_flags_are_masked(tmp_path):
    made = one("d1e0f4", rax=1)  # SHL: AF
    assert made.mask["rflags"] & 0x10 == 0
    data = write(tmp_path / "a.moo", [made]).read_bytes()
    assert data.count(b"RM32") == 1


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (build_case("prot32", b"\x90"), "not in real mode"),
        (build_case("real", b"\xfb"), "sets an interrupt shadow, which is not recorded"),
        (build_case("real", b"\xa0\x00\xd0"), "a page is absent, as none is without paging"),
        (msgspec.structs.replace(build_case("real", b"\x90"), path="fep"), "needs a machine around"),
        (msgspec.structs.replace(build_case("real", b"\xec"), port_in=b"1"), "reads ports"),
        (msgspec.structs.replace(build_case("real", b"\x90"), count=2), "runs in a special way"),
        (build_case("real", b"\x62\x07"), "the emulator returns unhandleable"),
    ],
)
def test_what_a_file_cannot_hold_has_a_reason(case, reason):
    with pytest.raises(UnfitError, match=reason):
        MooExporter().export(case, 0)

"""External programs: the protocol, and everything that a program can do wrong."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import msgspec
import pytest

from emufuzz.case.build import build_case
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.program import Program, ProgramError
from emufuzz.subject.command import CommandSubject

SAMPLE = Path(__file__).parents[2] / "support" / "sample_program.py"


def _program(fault="", timeout=5.0):
    return Program(f"{sys.executable} {SAMPLE} {fault}", timeout)


def _cases(*ids, mode="prot64"):
    return [build_case(mode, b"\x90\x90", id=name) for name in ids]


@pytest.fixture
def program():
    running = _program()
    yield running
    running.close()


def test_cases_are_answered_in_order(program):
    cases = _cases(*[f"c{i}" for i in range(200)])
    outcomes = program.run(cases)
    assert [o.id for o in outcomes] == [c.id for c in cases]
    assert {o.rip - c.rip for o, c in zip(outcomes, cases, strict=True)} == {2}
    assert outcomes[7].gpr == cases[7].gpr
    assert program.restarts == 0


def test_large_cases_do_not_block_the_pipes(program):
    memory = build_case("prot64", b"\x90", data={0x8000: bytes(range(256)) * 16}).mem
    cases = [msgspec.structs.replace(case, mem=memory) for case in _cases(*map(str, range(150)))]
    assert [o.rc for o in program.run(cases)] == ["continue"] * 150


def test_the_hello_says_what_the_program_is(program):
    hello = program.hello
    assert (hello.name, hello.version, hello.modes) == ("sample", "7", {"real", "prot64"})
    assert (hello.physical, hello.devices, hello.count, hello.paths) == (False, False, False, frozenset())


@pytest.mark.parametrize(
    ("case", "field"),
    [
        (build_case("prot32", b"\x90"), "mode"),
        (msgspec.structs.replace(build_case("prot64", b"\x90"), count=2), "count"),
        (msgspec.structs.replace(build_case("prot64", b"\x90"), path="fep"), "path"),
        (build_case("prot64", b"\x90", physical=True), "phys"),
        (msgspec.structs.replace(build_case("prot64", b"\x90"), extra={"devices": []}), "devices"),
    ],
)
def test_cases_that_were_not_offered_are_refused(program, case, field):
    with pytest.raises(UnsupportedCaseError, match=f"^{field}: sample"):
        program.check(case)


@pytest.mark.parametrize(
    ("fault", "says"), [("die", "exited with code 3"), ("garbage", "no outcome"), ("hang", "")]
)
def test_a_case_that_breaks_the_program_is_named_and_no_other_is_lost(fault, says):
    program = _program(fault, timeout=0.5)
    outcomes = program.run(_cases("a", "bad", "b", "c"))
    program.close()
    assert [o.id for o in outcomes] == ["a", "bad", "b", "c"]
    assert outcomes[1].hang == (fault == "hang")
    assert says in outcomes[1].crash
    assert bool(outcomes[1].crash) == (fault != "hang")
    assert [bool(o.crash or o.hang) for o in outcomes] == [False, True, False, False]
    assert program.restarts == (fault != "garbage")


@pytest.mark.parametrize(
    ("fault", "victim", "says"),
    [
        ("skip", "bad", "answered 'b' in place of 'bad'"),
        ("twice", "b", "answered 'bad' in place of 'b'"),
    ],
)
def test_answers_are_not_taken_for_those_of_other_cases(fault, victim, says):
    program = _program(fault)
    outcomes = program.run(_cases("a", "bad", "b", "c"))
    program.close()
    assert [o.id for o in outcomes] == ["a", "bad", "b", "c"]
    assert {o.id: o.crash for o in outcomes if o.crash} == {victim: f"the program {says}"}
    assert [o.rip for o in outcomes if not o.crash] == [
        0x6002,
        *([0x6002] if fault == "skip" else [0x6000]),
        0x6002,
    ]
    assert program.restarts == 1


def test_an_answer_too_many_is_no_answer_of_the_next_batch():
    program = _program("twice")
    (last,) = program.run(_cases("bad"))
    (following,) = program.run(_cases("next"))
    program.close()
    noticed = (
        "the program wrote more answers than there were cases",
        "the program answered 'bad' in place of 'next'",
    )
    assert [last.crash, following.crash].count("") == 1  # whenever the second answer comes
    assert (last.crash or following.crash) in noticed
    assert following.crash or following.rip == 0x6002


def test_what_a_program_has_started_ends_with_it(capfd):
    program = _program("child", timeout=1)
    (outcome,) = program.run(_cases("bad"))
    program.close()
    assert outcome.hang
    pid = int(capfd.readouterr().err)
    for _ in range(100):
        if not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes():
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {pid} is still there")


def test_a_program_that_does_not_start_again_has_crashed_on_all_that_is_left(tmp_path):
    mark = tmp_path / "started"
    script = tmp_path / "once.sh"
    script.write_text(f"test -e {mark} && exit 5\ntouch {mark}\nexec {sys.executable} {SAMPLE} die\n")
    program = Program(f"sh {script}")
    outcomes = program.run(_cases("a", "bad", "b", "c"))
    assert [o.id for o in outcomes] == ["a", "bad", "b", "c"]
    assert [bool(o.crash) for o in outcomes] == [False, True, True, True]
    assert all("does not start again" in o.crash and "code 5" in o.crash for o in outcomes[2:])
    mark.unlink()
    assert [o.crash for o in program.run(_cases("d"))] == [""]
    program.close()


def test_a_subject_refuses_what_it_has_not_offered_and_knows_the_leaf():
    subject = CommandSubject(f"{sys.executable} {SAMPLE}")
    taken, refused, other = subject.run([*_cases("a"), *_cases("b", mode="prot32"), *_cases("c")])
    subject.close()
    assert [taken.id, refused.id, other.id] == ["a", "b", "c"]
    assert (refused.rc, refused.reason) == ("unhandleable", "unsupported: mode: sample has no prot32")
    assert (taken.leaf, taken.rip, other.leaf) == ("90", 0x6002, "90")


def test_ctrl_c_is_not_for_the_program(program):
    assert os.getpgid(program._process.pid) == program._process.pid


def test_a_program_may_refuse_a_single_case():
    program = _program("unsupported")
    (outcome,) = program.run(_cases("bad"))
    program.close()
    assert (outcome.rc, outcome.reason) == ("unhandleable", "unsupported: no such thing")
    assert outcome.unchecked == (("all", "command-unsupported"),)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("", "empty"),
        ("/no/such/program", "does not start"),
        ("'unclosed", "does not start"),
        (f"{sys.executable} -c pass", "exited with code 0 before it said hello"),
        (f"{sys.executable} -c print(7)", "hello: expected an object"),
        (f"{sys.executable} {SAMPLE} bad-hello", "hello.surprise: unknown field"),
    ],
)
def test_programs_that_do_not_say_hello_are_refused_in_one_line(command, says):
    with pytest.raises(ProgramError, match=says) as caught:
        Program(command)
    assert "\n" not in str(caught.value)

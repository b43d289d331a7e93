"""`emufuzz oracles`, and oracles as engines of exec."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from emufuzz.case.build import build_case
from emufuzz.case.json import case_to_json

Run = Callable[..., "CompletedProcess[bytes]"]

SAMPLE = Path(__file__).parents[3] / "docs" / "samples" / "incdec.py"
INC_EAX = case_to_json(build_case("prot64", b"\xff\xc0"))


def test_all_oracles_are_listed_with_what_they_can(run: Run) -> None:
    done = run("oracles", "--json")
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert done.returncode == 0
    assert {"unicorn", "native", "rules"} <= found.keys()
    unicorn = found["unicorn"]
    assert (unicorn["available"], unicorn["fingerprint"]["unicorn"]) == (True, "2.1.4")
    assert set(unicorn["takes"]) >= {"phys", "devices", "paths"}
    assert unicorn["gaps"] == len(unicorn["ledger"]) > 40
    assert all(each["available"] or each["reason"] for each in found.values())


def test_one_oracle_is_shown_with_its_gaps(run: Run) -> None:
    done = run("oracles", "unicorn")
    assert done.returncode == 0
    assert "unicorn 2.1.4" in done.stdout.decode()
    assert "known gaps" in done.stdout.decode()
    assert "    unicorn-" in done.stdout.decode()


def test_gaps_that_only_a_run_shows_are_listed_too(run: Run) -> None:
    ledger = {gap["id"]: gap for gap in json.loads(run("oracles", "unicorn", "--json").stdout)["ledger"]}
    assert ledger["unicorn-pkru"]["reference"] == "met while a case runs"
    assert ledger["unicorn-umip"]["versions"] == "2.1.4"
    assert b"rules-undetermined" in run("oracles", "rules").stdout


def test_a_program_is_an_oracle(run: Run) -> None:
    done = run("oracles", f"cmd:{sys.executable} {SAMPLE}")
    assert (done.returncode, "version 1.0" in done.stdout.decode()) == (0, True)


def test_what_does_not_start_is_unavailable(run: Run) -> None:
    done = run("oracles", "cmd:/no/such/program")
    assert (done.returncode, "not available" in done.stdout.decode()) == (4, True)


def test_unknown_names_are_one_line(run: Run) -> None:
    for arguments in (("oracles", "oracle-of-delphi"), ("exec", "--engine", "oracle-of-delphi")):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.count(b"\n") == 1
        assert "oracle-of-delphi" in done.stderr.decode()
        assert "unicorn" in done.stderr.decode()


def test_exec_runs_a_program(run: Run) -> None:
    done = run("exec", "--engine", f"cmd:{sys.executable} {SAMPLE}", data=INC_EAX)
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["rip"], answer["gpr"]["rax"]) == (0, "0x6002", "0x1")

"""`emufuzz vouch`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

Run = Callable[..., "CompletedProcess[bytes]"]


def test_the_report_accounts_for_every_case_and_field(run: Run) -> None:
    done = run("vouch", "--cases", "300", "--oracles", "unicorn,rules", "--json")
    found = json.loads(done.stdout)
    assert done.returncode in {0, 1}
    assert sum(found["classes"].values()) == found["cases"] == 300
    for table in ("paths", "leaves", "kinds"):
        assert sum(row["fields"] for row in found[table]) == found["fields"]
        assert sum(row["unvouched"] for row in found[table]) == found["unvouched"]
        assert all(sum(row["causes"].values()) == row["unvouched"] for row in found[table])
    assert found["share"] == round(found["unvouched"] / found["fields"], 6)
    assert set(found["oracles"]) >= {"unicorn"}


def test_the_tables_are_as_long_as_asked_for(run: Run) -> None:
    done = run("vouch", "--cases", "200", "--subject", "emulator", "--oracles", "unicorn", "--top", "2")
    lines = done.stdout.decode().splitlines()
    assert lines[0] == "200 cases"
    assert any("changed fields" in line for line in lines)
    start = next(i for i, line in enumerate(lines) if line.startswith("by leaf"))
    assert lines[start + 3] == ""


def test_one_path_in_one_mode(run: Run) -> None:
    done = run("vouch", "--cases", "64", "--subject", "kvm", "--paths", "fep", "--modes", "prot32",
               "--oracles", "unicorn", "--json")  # fmt: skip
    assert [row["name"] for row in json.loads(done.stdout)["paths"]] == ["fep"]


def test_a_file_of_another_run_is_refused_and_stays(run: Run, tmp_path: Path) -> None:
    keep = tmp_path / "counts.json"
    small = ("vouch", "--cases", "8", "--subject", "emulator", "--oracles", "unicorn", "--keep", str(keep))
    first = run(*small)
    assert run(*small).stdout == first.stdout
    before = keep.read_bytes()
    done = run(*small, "--seed", "2")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert "run.seed" in done.stderr.decode()
    assert keep.read_bytes() == before
    assert list(tmp_path.iterdir()) == [keep]


def test_bad_options_are_one_line(run: Run) -> None:
    for arguments, word in (
        (("--subject", "qemu"), "qemu"),
        (("--oracles", "rules"), "unicorn"),
        (("--oracles", "unicorn,delphi"), "delphi"),
        (("--modes", "long"), "long"),
        (("--paths", "door"), "door"),
        (("--subject", "emulator", "--paths", "fep"), "--paths"),
        (("--paths", "rmode-inject", "--modes", "prot64"), "prot64"),
    ):
        done = run("vouch", *arguments)
        assert done.returncode == 2
        assert done.stderr.count(b"\n") == 1
        assert word in done.stderr.decode()

"""`emufuzz vectors import`, and `vectors check --oracle` of what it wrote."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from emufuzz.case.vectors import read_vectors
from emufuzz.cli.main import run
from tests.support.moo import chunk, moo, one_test

HASH = bytes(range(20))
ADD = one_test(b"\x01\xd8\xf4", {"rip": 0x103, "rflags": 0x46}, number=0, name="add ax,bx")
#: SHL leaves AF undefined for a count that is not 0; here the processor set it.
SHL = one_test(b"\xd1\xe0\xf4", {"rax": 2, "rip": 0x103, "rflags": 0x12}, before={"rax": 1}, number=1)
WRONG = one_test(b"\x40\xf4", {"rax": 2, "rip": 0x102}, number=2, name="inc ax", more=[chunk("HASH", HASH)])
#: AAD: KVM has its SF and ZF from the whole operand, which is a known quirk.
AAD = one_test(b"\xd5\x0a\xf4", {"rax": 0x2, "rip": 0x103}, before={"rax": 0x2}, number=3)
AAM_QUIRK = one_test(
    b"\xd4\x0a\xf4", {"rax": 0x100, "rip": 0x103, "rflags": 0x46}, before={"rax": 0xA}, number=4
)
BOUND = one_test(b"\x62\x07\xf4", {"rip": 0x103}, number=5)
SHADOW = one_test(b"\xfb\xf4", {"rip": 0x102, "rflags": 0x202}, number=6)
V20 = moo(ADD, cpu="V20")


def write(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def imported(folder: Path, *tests: bytes) -> str:
    out = str(folder / "some.jsonl")
    assert run(["vectors", "import", write(folder, "00.MOO", moo(*tests)), "--out", out]) == 0
    return out


def test_files_become_vectors_and_the_rest_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        write(tmp_path, "00.MOO", moo(ADD, SHADOW, SHADOW)),
        write(tmp_path, "01.MOO.gz", gzip.compress(moo(SHL))),
        write(tmp_path, "02.MOO", V20),
    ]
    out = tmp_path / "all.jsonl.zst"
    assert run(["vectors", "import", *files, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in (lines[0], *lines[2:6])] == [
        ["file", "tests", "imported", "skipped"],
        ["00.MOO", "3", "1", "2"],
        ["01.MOO.gz", "1", "1", "0"],
        ["02.MOO", "1", "0", "1"],
        ["all", "5", "2", "3"],
    ]
    assert lines[6:] == [
        "2 skipped: sets an interrupt shadow, which is not recorded",
        "1 skipped: processor V20 is not supported",
    ]
    assert out.read_bytes()[:4] == b"\x28\xb5\x2f\xfd"
    assert [case.id for case, _ in read_vectors(out)] == ["00:0 add ax,bx", "01:1 test"]


def test_the_counts_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path, "00.MOO", moo(ADD, SHADOW)), str(tmp_path / "some.jsonl")
    assert run(["vectors", "import", file, "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "imported": 1,
        "skipped": {"sets an interrupt shadow, which is not recorded": 1},
        "files": {file: {"imported": 1, "skipped": 1}},
    }


def test_a_bad_file_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = write(tmp_path, "00.MOO", moo(ADD)), write(tmp_path, "01.MOO", moo(ADD)[:-1])
    out = tmp_path / "some.jsonl"
    out.write_text("kept")
    assert run(["vectors", "import", good, bad, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"emufuzz: {bad}: TEST: length ")
    assert error.count("\n") == 1
    assert out.read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00.MOO", "01.MOO", "some.jsonl"]


def test_an_input_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "00.MOO", moo(ADD))
    assert run(["vectors", "import", file, "--out", file]) == 2
    assert "is one of the files to read" in capsys.readouterr().err
    assert Path(file).read_bytes() == moo(ADD)


def test_a_list_of_revoked_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path, "00.MOO", moo(ADD, WRONG)), str(tmp_path / "some.jsonl")
    revoked = write(tmp_path, "revocation_list.txt", f"# bad\n{HASH.hex()}\n".encode())
    assert run(["vectors", "import", file, "--out", out, "--revoked", revoked]) == 0
    assert "1 skipped: revoked" in capsys.readouterr().out
    Path(revoked).write_text("zz\n")
    assert run(["vectors", "import", file, "--out", out, "--revoked", revoked]) == 2
    assert "revocation_list.txt:1: not 40 hexadecimal digits" in capsys.readouterr().err


def test_vectors_of_a_processor_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = imported(tmp_path, ADD, SHL, WRONG, BOUND)
    capsys.readouterr()
    assert run(["vectors", "check", out, "--oracle"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["family", "total", "agreed", "explained", "refused", "findings"]
    assert ["all", "4", "2", "0", "1", "1"] in [line.split() for line in lines]
    assert [line for line in lines if ":" in line] == [
        "alu: differing: 00:2 inc ax",
        "notimpl: 1 refused: not implemented by KVM",
    ]


def test_quirks_are_explained_and_undefined_flags_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = imported(tmp_path, SHL, AAM_QUIRK)
    capsys.readouterr()
    assert run(["vectors", "check", out, "--oracle", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["shift"]["agreed"] == 1
    (other,) = (count for name, count in counts.items() if name != "shift")
    assert other == {
        "total": 1, "agreed": 0, "refused": {}, "findings": [],
        "explained": {"kvm-quirk-08-aam-aad-flags": 1},
    }  # fmt: skip
    assert run(["vectors", "check", out]) == 1
    assert "differing" in capsys.readouterr().out


def test_a_moo_file_is_judged_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "00.MOO", moo(ADD, AAD))
    assert run(["vectors", "check", file, "--oracle", "--family", "alu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "1", "1", "0", "0", "0"]


def test_options_that_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "00.MOO", moo(ADD))
    assert run(["vectors", "check", file, "--oracle", "--path", "fep"]) == 2
    assert capsys.readouterr().err == "emufuzz: --oracle: cannot be given together with --path\n"
    assert run(["vectors", "check", write(tmp_path, "x.MOO", b"?"), "--oracle"]) == 2
    assert capsys.readouterr().err.endswith("x.MOO: 1 bytes at the end are too few for a chunk\n")

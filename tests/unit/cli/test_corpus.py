"""`emufuzz corpus`: what it writes, counts and refuses, as the real command line."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import pytest

from emufuzz.case.build import build_case
from emufuzz.case.json import case_to_json
from emufuzz.cli.main import run as main
from emufuzz.fuzz.corpus.directory import read_corpus

ADD = build_case("prot32", b"\x01\xd8\xf4", id="add", rax=1, rbx=2)
NOP = build_case("real", b"\x90\xf4", id="nop")
MOV = build_case("real", b"\xa1\x00\x80\xf4", id="mov")
VECTOR = b'{"case":%s,"expect":{"rc":"continue","rip":"0x6001"}}' % case_to_json(NOP)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "some.jsonl"
    path.write_bytes(case_to_json(ADD) + b"\n" + VECTOR + b"\n" + case_to_json(MOV) + b"\n")
    return path


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(arg) for arg in ("corpus", *args)])
    out, err = capsys.readouterr()
    return code, out, err


def test_cases_go_to_the_files_of_their_families_once(tmp_path, capsys, lines):
    folder = tmp_path / "corpus"
    assert call(capsys, "add", folder, lines)[:2] == (0, "3 cases read, 3 written\n")
    assert [(name, entry.case.id) for name, entry in read_corpus(folder)] == [
        ("alu", "add"), ("mov", "mov"), ("xchg", "nop"),
    ]  # fmt: skip
    code, out, _ = call(capsys, "add", folder, lines, folder, "--json")
    assert code == 0
    assert json.loads(out) == {"read": 6, "written": 0, "skipped": {"is in the corpus": 6}}


def test_a_directory_of_other_files_is_no_corpus(tmp_path, capsys):
    assert call(capsys, "list", tmp_path) == (0, "no cases\n", "")
    (tmp_path / "case.json").write_bytes(case_to_json(NOP))
    code, out, err = call(capsys, "list", tmp_path)
    assert (code, out) == (2, "")
    said = "no corpus: no .jsonl files in it; `emufuzz corpus add` makes one"
    assert err == f"emufuzz: {tmp_path}: {said}\n"


def test_a_corpus_is_listed_and_its_cases_shown(tmp_path, capsys, lines):
    folder = tmp_path / "corpus"
    call(capsys, "import", folder, lines)
    rows = json.loads(call(capsys, "list", folder, "--json")[1])
    assert [(row["file"], row["cases"], row["vectors"]) for row in rows] == [
        ("alu.jsonl", 1, 0), ("mov.jsonl", 1, 0), ("xchg.jsonl", 1, 1),
    ]  # fmt: skip
    assert call(capsys, "list", folder)[1].splitlines()[-1].split()[:3] == ["all", "3", "1"]
    code, out, _ = call(capsys, "show", folder, "alu/add")
    assert code == 0
    assert "add eax, ebx" in out
    assert "leaf 01, CPL 0, ok" in out
    code, out, _ = call(capsys, "show", folder, "nop", "--json")
    assert json.loads(out)["expect"] == {"rc": "continue", "rip": "0x6001"}


def test_merge_takes_only_what_covers_something_new(tmp_path, capsys, lines):
    folder = tmp_path / "corpus"
    call(capsys, "add", folder, lines)
    same = tmp_path / "same.jsonl"
    other = build_case("prot32", b"\x01\xd8\xf4", id="more", rax=5, rbx=2)
    fault = build_case("prot32", b"\x01\x1b\xf4", id="fault", rbx=0xD000)
    same.write_bytes(case_to_json(other) + b"\n" + case_to_json(fault) + b"\n")
    code, out, _ = call(capsys, "merge", folder, same)
    assert (code, out) == (0, "2 cases read, 1 written\n1 skipped: covers nothing new\n")
    assert {entry.case.id for _, entry in read_corpus(folder)} == {"add", "nop", "mov", "fault"}


def test_merge_cuts_cases_down_if_asked(tmp_path, capsys):
    long = build_case("prot32", b"\x01\x1b\xf4", id="long", rbx=0x8000, r8=5)
    source = tmp_path / "long.jsonl"
    source.write_bytes(case_to_json(long) + b"\n")
    for folder, options in (("whole", ()), ("cut", ("--cut",))):
        assert call(capsys, "merge", tmp_path / folder, source, *options)[1] == "1 cases read, 1 written\n"
    sizes = [(tmp_path / folder / "alu.jsonl").stat().st_size for folder in ("cut", "whole")]
    assert sizes[0] < sizes[1] / 3


def test_distill_is_small_says_how_far_it_is_and_gives_the_same_again(tmp_path, capsys):
    arguments = ("flat:5:60", "--cells", "leaf,mode", "--json")
    code, out, err = call(capsys, "distill", *arguments, "--out", tmp_path / "a")
    assert code == 0
    counts = json.loads(out)
    assert counts["read"] == 60
    assert 0 < counts["written"] <= 60
    assert "done" in err
    call(capsys, "distill", *arguments, "--out", tmp_path / "b")
    files = [sorted((tmp_path / name).iterdir()) for name in "ab"]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    code, _, err = call(capsys, "distill", *arguments, "--out", tmp_path / "a")
    assert (code, err) == (2, f"emufuzz: {tmp_path / 'a'}: has cases already\n")


def test_moo_files_go_out_and_come_back(tmp_path, capsys, lines):
    folder, files, again = tmp_path / "corpus", tmp_path / "moo", tmp_path / "again"
    call(capsys, "add", folder, lines)
    code, out, _ = call(capsys, "export", folder, "--format", "moo", "--to", files)
    assert (code, out) == (0, "3 cases read, 2 written\n1 skipped: not in real mode\n")
    assert sorted(file.name for file in files.iterdir()) == ["mov.moo", "xchg.moo"]
    assert call(capsys, "import", again, files)[:2] == (0, "2 cases read, 2 written\n")
    assert {entry.case.id for _, entry in read_corpus(again)} == {"nop", "mov"}
    assert main(["vectors", "check", str(files / "mov.moo"), "--oracle"]) == 0


def test_libfuzzer_directories_go_out_and_come_back(tmp_path, capsys, lines):
    folder, files, again = tmp_path / "corpus", tmp_path / "fuzz", tmp_path / "again"
    call(capsys, "add", folder, lines)
    assert call(capsys, "export", folder, "--format", "libfuzzer", "--to", files)[0] == 0
    assert all(len(file.name) == 40 for file in files.iterdir())
    (files / ".hidden").write_bytes(b"x")
    (files / "link").symlink_to(lines)
    assert call(capsys, "import", again, files)[:2] == (0, "3 cases read, 3 written\n")
    before = {case_to_json(entry.case) for _, entry in read_corpus(folder)}
    assert {case_to_json(entry.case) for _, entry in read_corpus(again)} == before


def test_any_bytes_are_a_case_of_a_libfuzzer_directory(tmp_path, capsys):
    files = tmp_path / "fuzz"
    files.mkdir()
    (files / "a").write_bytes(b"")
    (files / "b").write_bytes(bytes(range(256)))
    code, out, _ = call(capsys, "add", tmp_path / "corpus", files)
    assert code == 0
    assert out.startswith("2 cases read, ")
    (files / "c").write_bytes(bytes(1 << 20) + b"1")
    code, _, err = call(capsys, "add", tmp_path / "corpus", files)
    assert (code, err) == (2, f"emufuzz: {files / 'c'}: more than 1 MiB\n")


def test_lines_go_out_and_nothing_is_replaced_unasked(tmp_path, capsys, lines):
    folder, out = tmp_path / "corpus", tmp_path / "all.jsonl"
    call(capsys, "add", folder, lines)
    export = ("export", folder, "--format", "cases", "--to", out)
    assert call(capsys, *export)[0] == 0
    assert len(out.read_bytes().splitlines()) == 3
    code, _, err = call(capsys, *export)
    assert (code, err) == (2, f"emufuzz: --to: {out}: exists (--force replaces it)\n")
    assert call(capsys, *export, "--force")[0] == 0


def test_coverage_says_what_a_corpus_reaches(tmp_path, capsys, lines):
    folder = tmp_path / "corpus"
    call(capsys, "add", folder, lines)
    code, out, _ = call(capsys, "coverage", folder, "--json", "--fail-under", "0.01,5,50")
    value = json.loads(out)
    assert code == 1
    assert (value["cases"], value["reached"]) == (3, 3)
    total, taken = value["branches"]["emulator"]
    assert 0.05 * total < taken < total
    assert value["branches"]["kvm"][1] < 0.5 * value["branches"]["kvm"][0]
    assert {branch["file"] for branch in value["missing"]} >= {"emulator/task.py", "kvm/lapic.py"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "none"), "none: no such file or directory"),
        (("add", "new", "none.jsonl"), "none.jsonl: no such file or directory"),
        (("add", "new", "bad.jsonl"), "bad.jsonl:2: code: missing"),
        (("add", "new", "bad.moo"), "bad.moo: the first chunk is not MOO"),
        (("add", "new", "some.jsonl", "--format", "elf"), "--format: unknown format 'elf', known are"),
        (("merge", "new", "some.jsonl", "--cells", "leaf,colour"), "--cells: unknown aspect 'colour'"),
        (("show", "here", "nobody"), "here: nobody: no such case"),
        (("export", "here", "--format", "pdf", "--to", "x"), "--format: unknown format 'pdf'"),
        (("coverage", "here", "--fail-under", "9"), "--fail-under: expected three percentages"),
        (("distill", "flat:1:5", "--out", "some.jsonl"), "some.jsonl: "),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch, lines, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_bytes(case_to_json(ADD) + b"\n{}\n")
    (tmp_path / "bad.moo").write_bytes(b"TEST\0\0\0\0")
    call(capsys, "add", "here", lines)
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"emufuzz: {message}")
    assert err.count("\n") == 1
    assert not list((tmp_path / "new").iterdir() if (tmp_path / "new").exists() else ())


def test_a_corpus_that_is_being_written_is_not_written_by_another(tmp_path, capsys, lines):
    import fcntl

    folder = tmp_path / "corpus"
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        code, _, err = call(capsys, "add", folder, lines)
    finally:
        os.close(handle)
    assert (code, err) == (2, f"emufuzz: {folder}: another process writes to this corpus\n")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided campaign that has findings, and a corpus of its own."""
    out = tmp_path_factory.mktemp("campaign") / "c"
    options = ("--generator", "guided", "--cases", "6000", "--seed-bug", "adc-carry", "--modes", "prot32")
    assert main(["fuzz", *options, "--workers", "local:1", "--out", str(out)]) == 1
    return out


def kept(campaign: Path) -> int:
    with sqlite3.connect(campaign / "campaign.sqlite") as db:
        return int(db.execute("SELECT count(*) FROM corpus").fetchone()[0])


def test_a_campaign_is_a_source_its_findings_and_what_guided_it(tmp_path, capsys, campaign):
    findings = sorted((campaign / "findings").glob("*.json"))
    folder = tmp_path / "corpus"
    code, out, err = call(capsys, "import", folder, campaign, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["read"] == len(findings) + kept(campaign) > len(findings) > 0
    assert said["written"] == said["read"] - said["skipped"].get("is in the corpus", 0)
    names = {entry.case.code for _, entry in read_corpus(folder)}
    for file in findings:
        assert bytes.fromhex(json.loads(file.read_bytes())["case"]["code"]) in names
    rows = json.loads(call(capsys, "list", folder, "--json")[1])
    assert sum(row["cases"] for row in rows) == said["written"]
    assert call(capsys, "add", folder, campaign, "--format", "campaign")[1].startswith(
        f"{said['read']} cases read"
    )


def test_a_campaign_is_merged_and_distilled_as_any_source(tmp_path, capsys, campaign):
    folder, small = tmp_path / "corpus", tmp_path / "small"
    merged = json.loads(call(capsys, "merge", folder, campaign, "--json")[1])
    assert 0 < merged["written"] < merged["read"]
    assert call(capsys, "distill", campaign, "--out", small, "--json")[0] == 0
    assert 0 < len(list(read_corpus(small))) <= merged["written"]


def test_a_campaign_that_cannot_be_read_is_one_line(tmp_path, capsys):
    broken = tmp_path / "c"
    broken.mkdir()
    (broken / "campaign.sqlite").write_bytes(b"no database at all, but long enough for one" * 40)
    code, out, err = call(capsys, "import", tmp_path / "corpus", broken)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(broken) in err
    assert not (tmp_path / "corpus").exists()

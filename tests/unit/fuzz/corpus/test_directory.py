"""A corpus as files: families, ids, no case twice, whole files, one writer, nothing outside."""

from __future__ import annotations

import json
import os

import msgspec
import pytest

from emufuzz.case.build import build_case
from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_from_json, case_to_json
from emufuzz.fuzz.corpus import directory as module
from emufuzz.fuzz.corpus.directory import (
    CorpusError,
    CorpusWriter,
    Entry,
    corpus_files,
    digest,
    family_name,
    locked,
    read_corpus,
)
from emufuzz.subject.flat import FlatSubject

ADD = build_case("prot32", b"\x01\xd8\xf4", id="add", rax=1)
NOP = build_case("prot32", b"\x90\xf4", id="nop")


def write(folder, *entries):
    writer = CorpusWriter(folder)
    for family, entry in entries:
        writer.add(family, entry)
    return writer.write()


def test_what_is_written_is_read_again(tmp_path):
    vector = Entry(NOP, {"rc": "continue", "rip": "0x6001"})
    assert write(tmp_path / "new", ("alu", Entry(ADD)), ("xchg", vector)) == (2, 0)
    assert list(read_corpus(tmp_path / "new")) == [("alu", Entry(ADD)), ("xchg", vector)]
    assert [file.name for file in corpus_files(tmp_path / "new")] == ["alu.jsonl", "xchg.jsonl"]


def test_lines_that_are_there_stay_byte_for_byte(tmp_path):
    text = b' {"code":"90", "id":"mine"}'  # no newline at its end
    (tmp_path / "xchg.jsonl").write_bytes(text)
    assert write(tmp_path, ("xchg", Entry(NOP))).added == 1
    assert (tmp_path / "xchg.jsonl").read_bytes() == text + b"\n" + case_to_json(NOP) + b"\n"


def test_an_equal_case_is_not_added_again_whatever_its_id_and_file(tmp_path):
    write(tmp_path, ("alu", Entry(ADD)))
    again = msgspec.structs.replace(ADD, id="other")
    assert digest(again) == digest(ADD) != digest(NOP)
    assert write(tmp_path, ("mov", Entry(again)), ("alu", Entry(ADD))) == (0, 2)
    assert CorpusWriter(tmp_path).knows(again)
    assert not (tmp_path / "mov.jsonl").exists()


def test_ids_are_unique_in_a_file(tmp_path):
    unnamed = msgspec.structs.replace(NOP, id="")
    same = build_case("prot16", b"\x90", id="nop")
    write(tmp_path, ("xchg", Entry(NOP)), ("xchg", Entry(same)))
    write(tmp_path, ("xchg", Entry(msgspec.structs.replace(unnamed, rflags=0x46))))
    names = [entry.case.id for _, entry in read_corpus(tmp_path)]
    assert names[0] == "nop"
    assert len(set(names)) == 3
    assert names[1] == f"xchg-{digest(same)[:12]}"


def test_families_are_those_of_the_leaf_or_the_path():
    (outcome,) = FlatSubject().run([ADD])
    assert family_name(ADD, outcome) == "alu"
    assert family_name(msgspec.structs.replace(ADD, path="fep"), outcome) == "path-fep"
    outcome.leaf = ""
    assert family_name(ADD, outcome) == "undefined"


def test_a_line_that_is_no_case_is_named(tmp_path):
    (tmp_path / "alu.jsonl").write_bytes(case_to_json(ADD) + b'\n{"code":1}\n')
    with pytest.raises(CaseError, match=r"alu.jsonl:2: code: expected"):
        list(read_corpus(tmp_path))
    with pytest.raises(CaseError, match=r"alu.jsonl:2"):
        CorpusWriter(tmp_path)


def test_a_directory_that_is_none_or_holds_something_else_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="no such file or directory"):
        corpus_files(tmp_path / "none")
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(CorpusError, match=r"dir.jsonl: not a file"):
        corpus_files(tmp_path)
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(CorpusError, match=r"a.jsonl: not a file"):
        corpus_files(tmp_path)


def test_the_number_of_cases_is_bounded(tmp_path, monkeypatch):
    write(tmp_path, ("alu", Entry(ADD)), ("xchg", Entry(NOP)))
    monkeypatch.setattr(module, "MAX_CASES", 1)
    with pytest.raises(CorpusError, match="more than 1 cases"):
        list(read_corpus(tmp_path))


def test_the_number_of_files_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILES", 3)
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(b"")
    assert len(corpus_files(tmp_path)) == 3
    (tmp_path / "d.jsonl").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"no corpus: more than 3 \.jsonl files; `emufuzz corpus add "):
        corpus_files(tmp_path)


def test_there_is_one_writer_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(CorpusError, match="another process writes"), locked(tmp_path):
        pass
    with locked(tmp_path / "new"):
        assert list((tmp_path / "new").iterdir()) == []


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path, ("alu", Entry(ADD)))
    before = (tmp_path / "alu.jsonl").read_bytes()

    def full(path, _data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(CorpusError, match=r"alu.jsonl: no space left"):
        write(tmp_path, ("alu", Entry(build_case("real", b"\x00\xc0"))))
    assert (tmp_path / "alu.jsonl").read_bytes() == before


def test_a_link_is_replaced_not_written_through(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(case_to_json(ADD) + b"\n")
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "alu.jsonl").symlink_to(outside)
    write(folder, ("alu", Entry(build_case("real", b"\x00\xc0"))))
    assert outside.read_bytes() == case_to_json(ADD) + b"\n"
    assert len(list(read_corpus(folder))) == 2


def test_a_vector_line_keeps_what_was_recorded():
    entry = Entry(NOP, {"rc": "continue", "rip": "0x6001"})
    value = json.loads(entry.line())
    assert value["expect"] == entry.expect
    assert case_from_json(json.dumps(value["case"])) == NOP

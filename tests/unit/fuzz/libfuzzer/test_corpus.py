"""Directories of encoded cases, as libFuzzer and the structured generator share them."""

from __future__ import annotations

import hashlib
import os

import msgspec

from emufuzz.case.codec import encode_case
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.generate import generate_batch
from emufuzz.fuzz.libfuzzer.corpus import MAX_FILE, read_cases, seed_corpus, write_cases


def test_cases_come_back_without_their_ids(tmp_path):
    cases = generate_batch(1, 0, 30)
    assert write_cases(tmp_path / "corpus", cases) == 30
    assert write_cases(tmp_path / "corpus", cases) == 0
    named = {encode_case(msgspec.structs.replace(case, id="")): case for case in cases}
    for case in read_cases(tmp_path / "corpus"):
        data = (tmp_path / "corpus" / case.id).read_bytes()
        assert case.id == hashlib.sha1(data, usedforsecurity=False).hexdigest()
        assert msgspec.structs.replace(case, id=named[data].id) == named[data]


def test_what_is_no_case_of_a_corpus_is_passed_over(tmp_path):
    (tmp_path / ".hidden").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "long").write_bytes(bytes(MAX_FILE + 1))
    (tmp_path / "any").write_bytes(os.urandom(50))
    assert [case.id for case in read_cases(tmp_path)] == ["any"]


def test_only_an_empty_corpus_is_seeded(tmp_path):
    setup = CampaignConfig(modes=("real",)).setup()
    assert seed_corpus(tmp_path / "c", setup) > 100
    assert {case.mode for case in read_cases(tmp_path / "c")} == {"real"}
    assert seed_corpus(tmp_path / "c", setup) == 0

"""Cases as named fields: nothing is lost on the way, and ordinary cases have none that count."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_cases import random_system

from emufuzz.arch.modes import MODES
from emufuzz.case.build import CODE_PAGES, build_case, build_system, cpls_of
from emufuzz.case.json import case_to_json
from emufuzz.case.model import Memory, case_pages
from emufuzz.case.paths import PATHS
from emufuzz.fuzz.kvm.generate import PathOptions, generator_of
from emufuzz.fuzz.shrink import non_default_fields
from emufuzz.fuzz.shrink.defaults import cpl_of, default_case
from emufuzz.fuzz.shrink.fields import (
    case_of,
    differing_fields,
    differing_parts,
    field_name,
    parts_of,
    with_defaults,
    with_parts,
)

CODE_ONLY = Memory(tuple((page, bytes(4096)) for page in CODE_PAGES))


def in_order(case):
    """The case with its memory in ascending order."""
    return msgspec.structs.replace(case, mem=Memory(tuple(sorted(case.mem.entries))))


@settings(max_examples=40)
@given(st.integers(0, 1 << 32), st.sampled_from(MODES))
def test_a_case_is_its_parts(seed, mode):
    rng = Random(seed)
    system = random_system(rng, mode)
    gpr = tuple(rng.getrandbits(64) for _ in range(16))
    case = build_case(mode, b"\x90", system=system)
    case = msgspec.structs.replace(case, gpr=gpr, port_in=b"\1\2", vendor="amd", count=2)
    assert case_to_json(case_of(case, parts_of(case))) == case_to_json(in_order(case))


@pytest.mark.parametrize("path", PATHS)
def test_a_case_of_a_path_is_its_parts(path):
    for case in generator_of(5, 0, PathOptions(paths=(path,))).cases(40):
        taken_apart = case_of(case, parts_of(case))
        assert parts_of(taken_apart) == parts_of(case)
        assert case_of(taken_apart, parts_of(taken_apart)) == taken_apart
        assert case_pages(taken_apart) == case_pages(case)


@pytest.mark.parametrize("mode", MODES)
def test_a_default_case_has_no_field_that_counts(mode):
    for cpl in cpls_of(mode):
        case = build_case(mode, b"\x90", cpl=cpl)
        assert cpl_of(case) == cpl
        plain = default_case(case)
        assert non_default_fields(plain) == ()
        assert set(non_default_fields(case)) >= {"gpr.rsp", "mem[0x8000]"}


def test_fields_have_the_names_of_the_format():
    system = build_system("prot32", 0)
    ds = msgspec.structs.replace(system.seg[3], limit=0xFFF, type=1)
    segments = (*system.seg[:3], ds, *system.seg[4:])
    system = msgspec.structs.replace(system, seg=segments, msr=((0x174, 8),), dr=(1, *system.dr[1:]))
    case = build_case("prot32", b"\x90", system=system, mem=CODE_ONLY, rax=1, rsp=0)
    case = msgspec.structs.replace(case, port_in=b"\1")
    names = non_default_fields(case)
    assert {"gpr.rax", "seg.ds", "msr.0x174", "dr0", "port_in"} <= set(names)
    assert "gpr.rsp" not in names
    assert len(names) == len(set(names))


def test_members_of_a_segment_are_one_field_and_several_parts():
    system = build_system("prot32", 0)
    ds = msgspec.structs.replace(system.seg[3], limit=0xFFF, type=1)
    case = build_case("prot32", b"\x90", system=msgspec.structs.replace(
        system, seg=(*system.seg[:3], ds, *system.seg[4:])))  # fmt: skip
    fields = [key for key in differing_fields(case) if key[0] == "seg"]
    parts = [key for key in differing_parts(case) if key[0] == "seg"]
    assert fields == [("seg", "ds")]
    assert parts == [("seg", "ds", "limit"), ("seg", "ds", "type")]
    assert field_name(fields[0]) == "seg.ds"


def test_fields_go_back_to_their_defaults_and_others_stay():
    case = build_case("prot64", b"\x90", rax=5, rbx=6)
    plain = with_defaults(case, {("gpr", "rax"), ("mem", 0x8000)})
    assert plain.gpr[0] == 0
    assert plain.gpr[3] == 6
    assert 0x8 not in plain.mem.pages
    assert 0x9 in plain.mem.pages
    assert non_default_fields(with_defaults(case, frozenset(differing_fields(case)))) == ()


def test_parts_can_be_given_other_values():
    case = with_parts(build_case("prot64", b"\x90"), {("gpr", "rcx"): 9, ("cr2",): 0x1000})
    assert case.gpr[1] == 9
    assert case.system.cr2 == 0x1000

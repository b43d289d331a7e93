"""The writer of MOO files is the reader's inverse, in both versions of the format."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emufuzz.case.moo import REGISTERS_16, REGISTERS_32, MooState, MooTest, open_moo
from emufuzz.case.moo_write import MooHeader, moo_bytes

RAM = st.dictionaries(st.integers(0, 0x10FFEF), st.integers(0, 255), max_size=6)


def states(wide, *, complete):
    names, top = (REGISTERS_32, 0xFFFFFFFF) if wide else (REGISTERS_16, 0xFFFF)
    values = st.lists(st.integers(0, top), min_size=len(names), max_size=len(names))
    kept = st.just(-1) if complete else st.integers(0, (1 << len(names)) - 1)

    def state(values, kept, ram):
        chosen = {name: values[i] for i, name in enumerate(names) if kept >> i & 1}
        return MooState(wide, chosen, ram, None, ())

    return st.builds(state, values, kept, RAM)


@st.composite
def some_test(draw, wide):
    return MooTest(
        draw(st.integers(0, 1 << 20)),
        draw(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)),
        draw(st.binary(min_size=1, max_size=16)),
        draw(states(wide, complete=True)),
        draw(states(wide, complete=False)),
        draw(st.none() | st.tuples(st.integers(0, 255), st.integers(0, 0x10FFEF))),
        frozenset(),
        draw(st.binary(min_size=20, max_size=20)).hex(),
    )


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(some_test(wide=False), max_size=3), st.sampled_from([(1, 0), (1, 1)]))
def test_sixteen_bits_in_both_versions(tmp_path_factory, tests, version):
    path = tmp_path_factory.mktemp("moo") / "a.moo"
    path.write_bytes(moo_bytes(MooHeader("C286", version, "add", 7), tests))
    file = open_moo(path)
    assert (file.cpu, file.announced) == ("C286", len(tests))
    assert list(file.tests()) == tests


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(some_test(wide=True), max_size=3))
def test_thirty_two_bits(tmp_path_factory, tests):
    path = tmp_path_factory.mktemp("moo") / "a.moo"
    masks = [{"rflags": 0xFFFFFFEF}] * len(tests)
    path.write_bytes(moo_bytes(MooHeader("386E"), tests, masks))
    assert list(open_moo(path).tests()) == tests


def test_a_test_without_a_hash_gets_one(tmp_path):
    state = MooState(True, dict.fromkeys(REGISTERS_32, 0), {}, None, ())
    final = MooState(True, {}, {}, None, ())
    test = MooTest(0, "nop", b"\x90", state, final, None, frozenset(), "")
    other = test._replace(code=b"\x91")
    path = tmp_path / "a.moo"
    path.write_bytes(moo_bytes(MooHeader("KVM"), [test, other]))
    hashes = [found.hash for found in open_moo(path).tests()]
    assert len(set(hashes)) == 2
    assert all(len(text) == 40 for text in hashes)


def test_version_1_0_has_no_32_bit_registers():
    state = MooState(True, dict.fromkeys(REGISTERS_32, 0), {}, None, ())
    test = MooTest(0, "", b"\x90", state, state, None, frozenset(), "")
    with pytest.raises(ValueError, match=r"32-bit registers need version 1\.1"):
        moo_bytes(MooHeader("KVM", (1, 0)), [test])
    with pytest.raises(ValueError, match="is not one of"):
        moo_bytes(MooHeader("KVM", (2, 0)), [])

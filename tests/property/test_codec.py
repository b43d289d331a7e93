"""Laws of the byte codec: nothing is lost, and any bytes are a valid case, in bounded time and memory."""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_cases import RandomCases

from emufuzz.arch.modes import MODES, mode_of
from emufuzz.case.check import check_system
from emufuzz.case.codec import decode_case, encode_case
from emufuzz.case.codec.stream import Source, number
from emufuzz.case.errors import CaseError
from emufuzz.case.fields import EXTRA
from emufuzz.case.json import case_from_json, case_from_obj, case_to_json
from emufuzz.case.model import case_memory
from emufuzz.case.paths import PATHS
from emufuzz.case.vectors import read_vectors
from emufuzz.case.write import to_json
from emufuzz.fuzz.generate import generate_batch
from emufuzz.fuzz.kvm.generate import PathOptions, generator_of, possible_paths
from tests.property.test_case_machine import devices as declared_devices
from tests.property.test_case_machine import values
from tests.property.test_case_roundtrip import cases

VECTORS = Path(__file__).parents[1] / "data" / "vectors" / "kvm-6.12.jsonl.zst"
physical = st.lists(
    st.fixed_dictionaries(
        {"addr": st.integers(0, 1 << 52).map(hex)}, optional={"data": st.binary(max_size=40).map(bytes.hex)}
    ),
    max_size=4,
)
#: The bit of the third byte that says that VM entry refuses the state.
REFUSED = 0x40


def assert_lossless(found):
    encoded = [(case, encode_case(case)) for case in found]
    assert encoded
    assert [case.id for case, data in encoded if decode_case(data) != case] == []
    return [len(data) for _, data in encoded]


def assert_valid(data):
    case = decode_case(data)
    assert case_from_json(case_to_json(case)) == case
    assert decode_case(encode_case(case)) == case
    if len(data) > 2 and not data[2] & REFUSED:
        assert check_system(case.system, case.rflags) == []
    return case


@given(st.integers(1, 64), st.data())
def test_every_number_has_a_short_form(bits, data):
    value = data.draw(st.integers(0, (1 << bits) - 1))
    encoded = number(value, bits)
    assert Source(encoded).number(bits) == value
    assert len(encoded) <= 1 + max((value.bit_length() + 7) // 8, 1)


@given(st.binary(max_size=10), st.integers(1, 64))
def test_any_bytes_are_a_number_in_range(data, bits):
    assert 0 <= Source(data).number(bits) < 1 << bits


@settings(max_examples=40, deadline=None)
@given(cases())
def test_any_valid_case_survives(case):
    assert decode_case(encode_case(case)) == case


@settings(deadline=None)
@given(st.sampled_from(["devices", "kvm", "callbacks", "phys"]), st.data())
def test_any_machine_around_the_emulator_survives(field, data):
    spec = EXTRA[field]
    forms = {"devices": declared_devices, "phys": physical}
    form = data.draw(forms[field] if field in forms else values(spec).map(lambda value: to_json(spec, value)))
    try:
        case = case_from_obj({"code": "90", field: json.loads(json.dumps(form))})
    except CaseError:
        return  # not every value is a machine; those that are not are no cases
    assert decode_case(encode_case(case)) == case


@pytest.mark.parametrize(
    "extra",
    [
        {"devices": [{"kind": "mmio", "addr": 0x9000, "size": "0x10", "reads": "0A"}]},
        {"phys": [{"addr": 4096, "data": ""}, {"addr": "0x0002000", "data": "Ab"}]},
        {"phys": [], "devices": [], "callbacks": []},
        {"callbacks": [{"op": "no such callback", "nth": "0x1", "result": 3, "fault": None}]},
        {"kvm": {"knobs": {"no_such_knob": "text", "": 5}, "lapic": {"0x80": "0x20"}}, "path": "ud"},
    ],
)
def test_unusual_forms_survive(extra):
    case = case_from_obj({"code": "90"} | extra)
    assert decode_case(encode_case(case)) == case


def labelled(case):
    """A random state with the mode that it is in."""
    system, cs = case.system, case.system.seg[1]
    mode = mode_of(system.cr0, system.efer, case.rflags, cs.l, cs.db)
    return msgspec.structs.replace(case, mode=mode)


def test_random_states_survive():
    source = RandomCases(1, states=14)
    assert_lossless([labelled(source.case()) for _ in range(300)])


def test_generated_cases_take_tens_of_bytes():
    for seed in (1, 7):
        sizes = sorted(assert_lossless(case for b in range(2) for case in generate_batch(seed, b, 100)))
        assert sizes[len(sizes) // 2] < 110
        assert sizes[-1] < 200


def test_cases_of_exit_paths_take_little_more():
    options = PathOptions(MODES, 1, possible_paths(PATHS, MODES))
    batches = [generator_of(1, number, options).cases(8) for number in range(20)]
    sizes = sorted(assert_lossless(itertools.chain.from_iterable(batches)))
    assert sizes[len(sizes) // 2] < 300


def test_a_page_of_another_mode_is_told_by_its_place():
    cases = {case.mode: case for case in generate_batch(1, 0, 600) if case.mem.entries}
    one, other = list(cases.values())[:2]
    case = msgspec.structs.replace(one, mem=msgspec.structs.replace(one.mem, entries=other.mem.entries[::-1]))
    assert decode_case(encode_case(case)) == case
    assert len(encode_case(case)) < 200


def test_a_changed_page_of_the_arena_is_told_by_its_patches():
    case = next(case for case in generate_batch(1, 0, 200) if len(case.mem.entries) > 2)
    addr, data = case.mem.entries[0]
    changed = data[:100] + b"changed" + data[107:]
    mem = msgspec.structs.replace(case.mem, entries=((addr, changed), *case.mem.entries[1:]))
    case = msgspec.structs.replace(case, mem=mem)
    assert decode_case(encode_case(case)) == case
    assert len(encode_case(case)) < 200


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_valid_case(data):
    assert_valid(data)


def damaged(rng, corpus):
    """An encoded case with a few bytes changed, put in, taken out or brought over from another."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.randrange(1, 8)):
        at = rng.randrange(len(data) + 1)
        change = rng.randrange(4)
        if change == 0:
            data[at : at + 1] = rng.randbytes(1)
        elif change == 1:
            data[at:at] = rng.randbytes(rng.randrange(1, 5))
        elif change == 2:
            del data[at : at + rng.randrange(1, 9)]
        else:
            other = rng.choice(corpus)
            start = rng.randrange(len(other))
            data[at:at] = other[start : start + rng.randrange(60)]
    return bytes(data)


def test_damaged_cases_are_valid_cases_and_most_have_a_state_that_vm_entry_accepts():
    options = PathOptions(MODES, 1, possible_paths(PATHS, MODES))
    batches = [generator_of(1, number, options).cases(6) for number in range(8)]
    corpus = [encode_case(case) for case in itertools.chain.from_iterable(batches)]
    corpus += [encode_case(case) for case in generate_batch(1, 0, 100)]
    rng = random.Random(5)
    found = [assert_valid(damaged(rng, corpus)) for _ in range(400)]
    accepted = sum(not check_system(case.system, case.rflags) for case in found)
    assert accepted > 0.85 * len(found)


def test_time_and_memory_are_bounded_by_the_number_of_bytes():
    rng = random.Random(3)
    for kind in range(40):
        # the sections of memory and of devices, then lengths and counts as large as they can be
        tail = bytes(rng.choice((0xFF, 0xBF, 0x37, rng.randrange(256))) for _ in range(4000))
        data = bytes((1, kind * 5, 0x02 if kind % 2 else 0x04, 0, 0, 0, 0, 0)) + tail
        started = time.process_time()
        case = decode_case(data)
        assert time.process_time() - started < 2
        assert len(case_memory(case).pages) <= 64 + len(data) // 2


def test_some_vectors_survive():
    assert_lossless(case for case, _ in itertools.islice(read_vectors(VECTORS), 0, 4000, 16))


@pytest.mark.slow
def test_every_vector_survives():
    assert len(assert_lossless(case for case, _ in read_vectors(VECTORS))) == 63122

"""The machine around the emulator: any `kvm` and any devices are read or refused, and keep their meaning."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from emufuzz.case.devices import Devices, trace_from_obj, trace_to_obj
from emufuzz.case.errors import CaseError
from emufuzz.case.fields import KVM
from emufuzz.case.json import case_from_json, case_from_obj, case_to_json
from emufuzz.case.read import reader
from emufuzz.case.spec import Choice, Flag, ListOf, MapOf, Named, Nullable, Number, Object, Text
from emufuzz.case.write import to_json

names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), max_size=20)


def values(spec):  # one branch per kind of declaration
    """What a reader of `spec` may return."""
    match spec:
        case Number():
            return st.integers(spec.min, spec.max)
        case Flag():
            return st.booleans()
        case Text():
            return st.sampled_from(spec.choices) if spec.choices else names
        case Nullable():
            return st.none() | values(spec.item)
        case ListOf():
            return st.lists(values(spec.item), max_size=3)
        case MapOf():
            return st.dictionaries(st.integers(0, spec.max_key), values(spec.item), max_size=3)
        case Named():
            return st.dictionaries(names, values(spec.item), max_size=3)
        case Choice():
            # a number that may be given as text is one option with two types
            return st.one_of([values(option) for kind, option in spec.options.items() if kind is not int])
        case Object():
            required = {name: values(spec.fields[name]) for name in spec.required}
            optional = {name: values(item) for name, item in spec.fields.items() if name not in required}
            return st.fixed_dictionaries(required, optional=optional)
    raise AssertionError(spec)


@given(values(KVM))
def test_every_kvm_is_written_and_read_without_loss(kvm):
    written = json.loads(json.dumps(to_json(KVM, kvm)))
    assert reader(KVM)(written) == kvm


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def with_junk(spec):
    """Values of `spec`, one member of which is replaced by anything."""
    return st.tuples(values(spec), st.sampled_from(sorted(spec.fields)), JSON).map(
        lambda drawn: to_json(spec, drawn[0]) | {drawn[1]: drawn[2]}
    )


@given(st.one_of(values(KVM).map(lambda kvm: to_json(KVM, kvm)), with_junk(KVM)))
def test_any_kvm_is_a_case_that_round_trips_or_one_line(kvm):
    try:
        case = case_from_obj({"code": "90", "kvm": kvm})
    except CaseError as error:
        assert str(error).startswith("kvm.")  # noqa: PT017 - many values raise, some are valid
        assert "\n" not in str(error)  # noqa: PT017 - as above
    else:
        assert case_from_json(case_to_json(case)) == case


devices = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"kind": st.just("mmio"), "addr": st.integers(0, 64), "size": st.integers(0, 20)},
            optional={
                "behaviour": st.sampled_from(["stream", "ram", "float"]),
                "reads": st.binary(max_size=24).map(bytes.hex),
            },
        ),
        st.fixed_dictionaries(
            {"kind": st.just("pio"), "port": st.integers(0, 64), "size": st.integers(0, 20)},
            optional={
                "behaviour": st.sampled_from(["stream", "ram", "float"]),
                "reads": st.binary(max_size=24).map(bytes.hex),
            },
        ),
    ),
    max_size=3,
)
addresses = st.integers(0, 80)
accesses = st.lists(
    st.one_of(
        st.tuples(st.just("mmio_read"), addresses, st.integers(1, 8)),
        st.tuples(st.just("mmio_write"), addresses, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("pio_in"), addresses, st.integers(1, 4), st.integers(0, 3)),
        st.tuples(
            st.just("pio_out"), addresses, st.just(2), st.binary(max_size=3).map(lambda data: data * 2)
        ),
    ),
    max_size=12,
)


@given(devices, st.binary(max_size=8), accesses)
def test_devices_answer_every_access_and_trace_it(declared, port_in, script):
    try:
        machine = Devices(declared, port_in)
    except CaseError as error:
        assert str(error).startswith("devices")  # noqa: PT017 - overlaps and empty devices raise
        return
    count = 0
    for name, *arguments in script:
        answer = getattr(machine, name)(*arguments)
        new = machine.trace[count:]
        count = len(machine.trace)
        data = b"".join(access.data for access in new)
        assert data == (arguments[-1] if answer is None else answer)
        assert {access.write for access in new} <= {answer is None}
    assert trace_from_obj(trace_to_obj(machine.trace)) == machine.trace


@given(st.lists(st.tuples(st.integers(0, 31), st.binary(min_size=1, max_size=8)), max_size=12))
def test_ram_is_memory(writes):
    machine = Devices([{"kind": "mmio", "addr": 0, "size": 32, "behaviour": "ram"}])
    memory = bytearray(40)
    for addr, data in writes:
        machine.mmio_write(addr, data)
        memory[addr : addr + len(data)] = data
    assert b"".join(machine.mmio_read(addr, 8) for addr in range(0, 32, 8)) == memory[:32]

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from emufuzz.case.catalogue import catalogue
from emufuzz.case.delta import expect_to_outcome
from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_from_obj, case_to_obj, outcome_from_obj, outcome_to_obj
from emufuzz.case.schema import case_schema, delta_schema, outcome_schema, schema_of
from emufuzz.case.spec import Number
from emufuzz.case.vectors import read_vectors

VECTORS = Path(__file__).parents[2] / "data" / "vectors" / "kvm-6.12.jsonl.zst"
CASE = Draft202012Validator(case_schema())
OUTCOME = Draft202012Validator(outcome_schema())
DELTA = Draft202012Validator(delta_schema())


@pytest.mark.parametrize("schema", [case_schema, outcome_schema, delta_schema])
def test_schemas_are_valid_and_json(schema):
    Draft202012Validator.check_schema(schema())
    assert json.loads(json.dumps(schema())) == schema()


def test_vectors_validate():
    checked = 0
    for case, expect in itertools.islice(read_vectors(VECTORS), 0, None, 631):
        CASE.validate(case_to_obj(case))
        DELTA.validate(expect)
        OUTCOME.validate(outcome_to_obj(case, expect_to_outcome(case, expect)))
        checked += 1
    assert checked > 99


def test_catalogue_validates():
    for name, case in catalogue().items():
        assert CASE.is_valid(case_to_obj(case)), name


@pytest.mark.parametrize(
    "change",
    [
        {"foo": 1},
        {"rip": "0x10000000000000000"},
        {"rip": 2**64},
        {"rip": -1},
        {"rip": "12"},
        {"rip": 1.5},
        {"code": "9"},
        {"code": "zz"},
        {"mode": "prot8"},
        {"seg": {"cs": {"p": 2}}},
        {"seg": {"cs": {"dpl": "0x4"}}},
        {"seg": {"xs": {}}},
        {"msr": {"x": 0}},
        {"mem": [{}]},
        {"count": 0},
        {"fpu": {"xmm": ["0x1" + "0" * 32]}},
        {"fpu": {"xmm": [0] * 17}},
        {"vendor": "via"},
        {"devices": [{"kind": "usb", "size": 1}]},
        {"devices": [{"kind": "mmio", "addr": 0, "size": "0x1000001"}]},
        {"devices": [{"kind": "mmio", "addr": 0, "size": "0x00"}]},
        {"path": "ept_violation"},
        {"kvm": {"nmi": "0x3"}},
        {"kvm": {"cpuid": {"maxphyaddr": "0x1f"}}},
        {"kvm": {"cpuid": {"maxphyaddr": "0x35"}}},
        {"kvm": {"guest_mode": {"mtf": 2}}},
        {"kvm": {"guest_debug": []}},
    ],
    ids=str,
)
def test_schema_and_reader_refuse_the_same(change):
    obj = {"code": "90"} | change
    assert not CASE.is_valid(obj)
    with pytest.raises(CaseError):
        case_from_obj(obj)


@pytest.mark.parametrize(
    "value", ["0x0", "0x00000000000000000000f", "0xFFFFFFFFFFFFFFFF", "0xabcdef", 0, 2**64 - 1], ids=str
)
def test_schema_and_reader_accept_the_same_numbers(value):
    obj = {"code": "90", "rip": value}
    CASE.validate(obj)
    assert case_from_obj(obj).rip == (value if isinstance(value, int) else int(value, 16))


@pytest.mark.parametrize(
    "spec", [Number(52, min=32), Number(0x1234, min=1), Number(0x1FF), Number(9), Number(0xF0)]
)
def test_numbers_as_text_have_the_same_bounds(spec):
    schema = Draft202012Validator(schema_of(spec))
    for number in range(0x1300):
        text = f"0x00{number:X}" if number % 2 else f"{number:#x}"
        assert schema.is_valid(text) == schema.is_valid(number) == (spec.min <= number <= spec.max)


def test_code_is_required():
    assert not CASE.is_valid({})


@pytest.mark.parametrize(
    "obj", [{"rc": "fine"}, {"length": 16}, {"events": [["jump"]]}, {"hang": 2}], ids=str
)
def test_bad_outcomes(obj):
    assert not OUTCOME.is_valid(obj)
    with pytest.raises(CaseError):
        outcome_from_obj(obj, catalogue()["push-rsp"])

# ruff: noqa: E501 - one bad input per row reads best
from __future__ import annotations

import json

import msgspec
import pytest

from emufuzz.case.catalogue import catalogue
from emufuzz.case.errors import CaseError
from emufuzz.case.json import (
    case_from_json,
    case_from_obj,
    case_to_json,
    case_to_obj,
    outcome_from_json,
    outcome_from_obj,
    outcome_to_json,
    outcome_to_obj,
)
from emufuzz.case.model import Outcome

MINIMAL = {"code": "90"}


def outcome_like(case, **changes):
    fields = {"id": case.id, "gpr": case.gpr, "rip": case.rip, "rflags": case.rflags, "system": case.system}
    return Outcome(**(fields | changes))


@pytest.mark.parametrize("name", catalogue())
def test_catalogue_round_trips(name):
    case = catalogue()[name]
    assert case_from_json(case_to_json(case)) == case


def test_defaults():
    case = case_from_obj(MINIMAL)
    assert (case.id, case.mode, case.count, case.vendor) == ("", "real", 1, "intel")
    assert (case.rip, case.rflags, case.gpr) == (0, 0, (0,) * 16)
    assert (case.system.fpu.fcw, case.system.fpu.mxcsr) == (0x37F, 0x1F80)
    assert not any(seg.p for seg in case.system.seg)


def test_numbers_are_read_in_both_forms():
    as_text = case_from_obj({"code": "90", "rip": "0x1F", "count": "0x2", "seg": {"cs": {"type": "0xb"}}})
    as_number = case_from_obj({"code": "90", "rip": 31, "count": 2, "seg": {"cs": {"type": 11}}})
    assert as_text == as_number


def test_xmm_holds_128_bits_in_both_forms():
    top = 2**128 - 1
    for value in (top, hex(top)):
        case = case_from_json(json.dumps({"code": "90", "fpu": {"xmm": [value]}}))
        assert case.system.fpu.xmm == (top, *(0,) * 15)


def test_equal_parts_are_one_object():
    first, second = (
        case_from_obj({"code": code, "cr0": "0x10", "mem": [{"addr": "0x1000", "data": "00ff"}]})
        for code in ("90", "91")
    )
    assert first.system is second.system
    assert first.mem is second.mem


def test_case_without_code_memory_or_registers_writes_little():
    assert case_to_obj(case_from_obj(MINIMAL)) == {
        "id": "", "mode": "real", "code": "90", "rip": "0x0", "rflags": "0x0",
    }  # fmt: skip


def test_fields_of_the_kvm_model_are_kept():
    obj = {
        "code": "90",
        "path": "ept-violation",
        "phys": [{"addr": "0x1000", "data": "90"}],
        "devices": [{"kind": "mmio", "addr": "0xfee00000", "size": 4096, "reads": "00", "behaviour": "ram"}],
        "kvm": {"knobs": {"ept": True}, "memslots": [{"base": "0x0", "size": "0x1000", "flags": 0}]},
        "callbacks": [{"op": "read_std", "nth": 1, "result": "propagate_fault", "fault": {"vector": 14}}],
    }
    case = case_from_obj(obj)
    assert case.path == "ept-violation"
    memslots = [{"base": 0, "size": 0x1000, "flags": 0}]
    assert case.extra == {name: obj[name] for name in ("phys", "devices", "callbacks")} | {
        "kvm": {"knobs": {"ept": True}, "memslots": memslots}
    }
    assert case_from_json(case_to_json(case)) == case


BAD_CASES = {
    "unknown field":       ({"code": "90", "foo": 1}, "foo: unknown field"),
    "no code":             ({}, "code: missing"),
    "register too large":  ({"code": "90", "gpr": {"rax": "0x10000000000000000"}},
                            "gpr.rax: 0x10000000000000000 is out of range (max 0xffffffffffffffff)"),
    "limit too large":     ({"code": "90", "seg": {"cs": {"limit": "0x1ffffffff"}}},
                            "seg.cs.limit: 0x1ffffffff is out of range (max 0xffffffff)"),
    "selector too large":  ({"code": "90", "seg": {"ds": {"sel": 65536}}}, "seg.ds.sel: 65536 is out of range"),
    "bit too large":       ({"code": "90", "seg": {"ss": {"p": 2}}}, "seg.ss.p: 2 is out of range (max 0x1)"),
    "negative":            ({"code": "90", "rip": -1}, "rip: -1 is out of range (min 0)"),
    "minus in text":       ({"code": "90", "rip": "-0x1"}, "rip: '-0x1' is not a number"),
    "no 0x":               ({"code": "90", "rip": "12"}, "rip: '12' is not a number"),
    "underscore":          ({"code": "90", "rip": "0x1_0"}, "rip: '0x1_0' is not a number"),
    "only 0x":             ({"code": "90", "rip": "0x"}, "rip: '0x' is not a number"),
    "other digits":        ({"code": "90", "rip": "0x\u0661"}, "rip: '0x\\u0661' is not a number"),
    "boolean":             ({"code": "90", "rip": True}, "rip: expected a number"),
    "fraction":            ({"code": "90", "rip": 1.0}, "rip: expected a number"),
    "null":                ({"code": "90", "rip": None}, "rip: expected a number"),
    "odd hex":             ({"code": "9"}, "code: '9': odd number of digits"),
    "hex with a space":    ({"code": "90 9"}, "code: '90 9': not hexadecimal digits"),
    "code is a number":    ({"code": 90}, "code: expected hexadecimal digits"),
    "code too long":       ({"code": "90" * 4097}, "code: 4097 bytes are too many (max 4096)"),
    "unknown mode":        ({"code": "90", "mode": "prot8"}, "mode: 'prot8' is unknown"),
    "contradicting mode":  ({"code": "90", "mode": "prot32"}, "mode: prot32 contradicts the state, which is real"),
    "unknown vendor":      ({"code": "90", "vendor": "via"}, "vendor: 'via' is unknown; expected one of"),
    "unknown register":    ({"code": "90", "gpr": {"eax": 1}}, "gpr.eax: unknown field"),
    "gpr is a list":       ({"code": "90", "gpr": []}, "gpr: expected an object, got an array"),
    "17 xmm":              ({"code": "90", "fpu": {"xmm": [0] * 17}}, "fpu.xmm: 17 items are too many (max 16)"),
    "xmm too large":       ({"code": "90", "fpu": {"xmm": [0, 2**128]}}, "fpu.xmm[1]: "),
    "mem without addr":    ({"code": "90", "mem": [{"data": "00"}]}, "mem[0].addr: missing"),
    "odd mem":             ({"code": "90", "mem": [{"addr": 0}, {"addr": 0, "data": "0"}]}, "mem[1].data: '0'"),
    "mem past 2^64":       ({"code": "90", "mem": [{"addr": 2**64 - 1, "data": "0000"}]}, "mem[0].data: reaches"),
    "phys past 2^52":      ({"code": "90", "phys": [{"addr": 2**52 - 1, "data": "0000"}]}, "phys[0].data: reaches beyond the 52-bit"),
    "mem and phys":        ({"code": "90", "mem": [], "phys": []}, "phys: cannot be given together with mem"),
    "msr index":           ({"code": "90", "msr": {"0x100000000": 0}}, "msr.0x100000000: "),
    "msr twice":           ({"code": "90", "msr": {"0x10": 0, "16": 0}}, "msr: the same key twice"),
    "count 0":             ({"code": "90", "count": 0}, "count: 0 is out of range (min 1)"),
    "single 2":            ({"code": "90", "single": 2}, "single: 2 is out of range"),
    "id with a newline":   ({"code": "90", "id": "a\nb"}, "id: 'a\\nb' holds characters"),
    "unknown device":      ({"code": "90", "devices": [{"kind": "usb", "size": 1}]}, "devices[0].kind: 'usb'"),
    "unknown kvm field":   ({"code": "90", "kvm": {"foo": 1}}, "kvm.foo: unknown field"),
    "fault vector":        ({"code": "90", "callbacks": [{"op": "x", "fault": {"vector": 256}}]},
                            "callbacks[0].fault.vector: 256 is out of range"),
}  # fmt: skip


@pytest.mark.parametrize(("obj", "message"), BAD_CASES.values(), ids=BAD_CASES)
def test_bad_case(obj, message):
    with pytest.raises(CaseError) as error:
        case_from_json(json.dumps(obj))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_too_much_memory():
    entries = [{"addr": hex(i << 12)} for i in range(4097)]
    assert len(case_from_obj({"code": "90", "mem": entries[1:]}).mem.pages) == 4096
    for name in ("mem", "phys"):
        with pytest.raises(CaseError, match=f"^{name}: more than 16 MiB of pages"):
            case_from_obj({"code": "90", name: entries})


BAD_DOCUMENTS = {
    "empty":         (b"", "not valid JSON"),
    "not JSON":      (b"{", "not valid JSON"),
    "binary":        (b"\x00\xff\xfe", "not "),
    "not UTF-8":     (b'{"code":"90","id":"\xff"}', "not UTF-8 text"),
    "an array":      (b"[]", "expected an object, got an array"),
    "two documents": (b"{}{}", "not valid JSON"),
    "twice":         (b'{"code":"90","code":"91"}', "code: given twice"),
    "twice inside":  (b'{"code":"90","gpr":{"rax":1,"rax" : 1}}', "rax: given twice"),
    "too deep":      (b'{"code":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), BAD_DOCUMENTS.values(), ids=BAD_DOCUMENTS)
def test_bad_document(data, message):
    with pytest.raises(CaseError) as error:
        case_from_json(data)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_too_long_a_document(monkeypatch):
    monkeypatch.setattr("emufuzz.case.document.MAX_DOCUMENT", 10)
    with pytest.raises(CaseError, match="13 bytes are too many"):
        case_from_json(b'{"code":"90"}')


def test_colons_in_strings_are_no_duplicates():
    assert case_from_json(b'{"code" : "90", "id": "a:b\\":"}').id == 'a:b":'


def test_outcome_writes_the_whole_state():
    case = catalogue()["data-crosses-page"]
    obj = outcome_to_obj(case, outcome_like(case, length=3))
    assert set(obj) == {
        "id", "decode_rc", "rc", "length", "exception", "interruptibility", "restarts", "gpr", "rip", "rflags",
        "seg", "gdtr", "idtr", "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "xcr0", "dr", "msr", "fpu", "mem",
        "events",
    }  # fmt: skip
    assert (len(obj["gpr"]), len(obj["seg"]), len(obj["dr"]), len(obj["fpu"]["xmm"])) == (16, 8, 8, 16)
    assert all(len(seg) == 11 for seg in obj["seg"].values())
    assert "events" not in outcome_to_obj(case, outcome_like(case), events=False)


EVENTS = [
    ("fetch", 0x6000, 15),
    ("read", 0x8000, 4),
    ("read", 0x1008, 8, "sys"),
    ("write", 0x8000, b"\x00\xff"),
    ("write", 0x8000, b"\x00\xff", "std"),
    ("cmpxchg", 0x8000, b"\x01", b"\x02"),
    ("in", 0x60, 1),
    ("in", 0x60, 1, 4),
    ("out", 0x60, b"\x2d"),
    ("halt",),
    ("wbinvd",),
    ("invlpg", 2**64 - 1),
    ("set_cr", 0, 0x11),
    ("set_dr", 7, 0x400),
    ("get_msr", 0xC0000080),
    ("set_msr", 0x174, 2**64 - 1),
    ("set_segment", 0, 0x30),
    ("set_gdt", 0x1000, 0xFFFF),
    ("set_idt", 0x1000, 0),
    ("set_xcr", 0, 3),
    ("fix_hypercall", 0x6000),
    ("set_nmi_mask", 0),
    ("cpuid", 0x80000001, 0, 1),
    ("rdpmc", 0x40000002),
]


def test_outcome_round_trips_with_everything_changed():
    case = catalogue()["data-crosses-page"]
    system = msgspec.structs.replace(case.system, cr2=5, msr=((0x10, 1),))
    page = bytearray(case.mem.pages[8])
    page[1] ^= 0xFF
    outcome = outcome_like(
        case,
        gpr=tuple(range(16)),
        rc="propagate_fault",
        length=15,
        exception=(14, 2, 0x1234),
        interruptibility=1,
        restarts=3,
        system=system,
        pages={8: bytes(page)},
        events=EVENTS,
        unchecked=(("all", "gap-1"),),
        extra={"interrupt_shadow": 1},
    )
    assert outcome_from_json(outcome_to_json(case, outcome), case) == outcome
    assert json.loads(outcome_to_json(case, outcome))["events"][16] == ["set_segment", "es", "0x30"]


def test_outcome_may_omit_everything():
    case = catalogue()["push-rsp"]
    assert outcome_from_obj({}, case) == outcome_like(case)
    assert outcome_from_obj({}, case).system is case.system


def test_crash_and_hang_stand_alone():
    case = catalogue()["push-rsp"]
    crash = outcome_like(case, crash="Traceback\nValueError")
    assert outcome_to_obj(case, crash) == {"id": "push-rsp", "crash": "Traceback\nValueError"}
    assert outcome_from_json(outcome_to_json(case, crash), case) == crash
    assert outcome_to_obj(case, outcome_like(case, hang=True)) == {"id": "push-rsp", "hang": True}


BAD_OUTCOMES = {
    "unknown rc":      ({"rc": "fine"}, "rc: 'fine' is unknown"),
    "vector":          ({"exception": {"vector": 256}}, "exception.vector: 256 is out of range"),
    "no vector":       ({"exception": {}}, "exception.vector: missing"),
    "length":          ({"length": 16}, "length: 16 is out of range"),
    "unknown event":   ({"events": [["halt"], ["jump"]]}, "events[1][0]: 'jump' is not a kind of event"),
    "short event":     ({"events": [["read", "0x0"]]}, "events[0]: a read event has 3 or 4 items, not 2"),
    "event port":      ({"events": [["in", 65536, 1]]}, "events[0][1]: 65536 is out of range"),
    "event segment":   ({"events": [["set_segment", "xs", 1]]}, "events[0][1]: 'xs' is unknown"),
    "empty event":     ({"events": [[]]}, "events[0]: expected an array"),
    "hang":            ({"hang": 2}, "hang: expected true or false"),
    "gap":             ({"unchecked": [{"field": "all"}]}, "unchecked[0].gap: missing"),
    "case field":      ({"code": "90"}, "code: unknown field"),
}  # fmt: skip


@pytest.mark.parametrize(("obj", "message"), BAD_OUTCOMES.values(), ids=BAD_OUTCOMES)
def test_bad_outcome(obj, message):
    with pytest.raises(CaseError) as error:
        outcome_from_obj(obj, catalogue()["push-rsp"])
    assert str(error.value).startswith(message)

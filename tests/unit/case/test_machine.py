# ruff: noqa: E501 - one bad input per row reads best
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from emufuzz.case.catalogue import catalogue
from emufuzz.case.devices import devices_of, trace_from_obj
from emufuzz.case.errors import CaseError
from emufuzz.case.fields import DEVICE, KVM, OUTCOME_EXTRA
from emufuzz.case.json import (
    case_from_json,
    case_from_obj,
    case_to_json,
    case_to_obj,
    outcome_from_obj,
    outcome_to_obj,
)
from emufuzz.case.model import Outcome
from emufuzz.case.paths import EXIT_PATH, PATHS
from emufuzz.case.schema import case_schema, outcome_schema
from emufuzz.kvm.cpuid import guest_cpuid
from emufuzz.kvm.debugregs import KVM_GUESTDBG_ENABLE
from emufuzz.kvm.hooks import IsolatedHooks
from emufuzz.kvm.state import vcpu_of_case

CASE = Draft202012Validator(case_schema())
OUTCOME = Draft202012Validator(outcome_schema())
DOCUMENT = (Path(__file__).parents[3] / "docs" / "case-format.md").read_text(encoding="utf-8")

#: Every member of `kvm`, in the form of docs/case-format.md, and the same as it is read.
# fmt: off
FULL = {
    "knobs":                  ({"ept": False, "vpid": 7, "msr_denied": "0x10,0x174"},) * 2,
    "exit_reason":            (48, 48),
    "exit_qualification":     ("0x18a", 0x18A),
    "guest_physical_address": ("0xfee00000", 0xFEE00000),
    "instruction_info":       ("0x1", 1),
    "instruction_length":     (15, 15),
    "vectoring_info":         ("0x80000b0e", 0x80000B0E),
    "vectoring_error_code":   ("0x2", 2),
    "interruptibility":       ("0x1", 1),
    "pending":                ({"vector": 14, "error_code": 2, "payload": "0x1234", "injected": False, "nested": True},
                               {"vector": 14, "error_code": 2, "payload": 0x1234, "injected": False, "nested": True}),
    "interrupt":              ({"vector": 255, "soft": True},) * 2,
    "nmi":                    (2, 2),
    "pkru":                   ("0xffffffff", 0xFFFFFFFF),
    "guest_debug":            ({"control": "0x20001", "dr": ["0x1"] * 8}, {"control": 0x20001, "dr": [1] * 8}),
    "cpuid":                  ({"leaves": [{"function": "0x7", "index": "0x1", "eax": "0x10"}],
                                "features": {"smap": True}, "maxphyaddr": 40},
                               {"leaves": [{"function": 7, "index": 1, "eax": 16}],
                                "features": {"smap": True}, "maxphyaddr": 40}),
    "memslots":               ([{"base": "0x1000", "size": "0x2000", "flags": "0x2"}],
                               [{"base": 0x1000, "size": 0x2000, "flags": 2}]),
    "ioeventfds":             ([{"addr": "0x2000", "len": 0}, {"addr": "0x60", "len": 1, "port": True, "datamatch": "0x5"}],
                               [{"addr": 0x2000, "len": 0}, {"addr": 0x60, "len": 1, "port": True, "datamatch": 5}]),
    "lapic":                  ({"0x80": "0x20", "0xff0": "0x0"}, {0x80: 0x20, 0xFF0: 0}),
    "guest_mode":             ({"exception_bitmap": "0x4000", "page_fault_error_code_mask": "0x0",
                                "page_fault_error_code_match": "0x0", "exit_on_nmi": True, "exit_on_intr": False,
                                "mtf": True, "intercepts": ["desc", "unrestricted_guest"]},
                               {"exception_bitmap": 0x4000, "page_fault_error_code_mask": 0,
                                "page_fault_error_code_match": 0, "exit_on_nmi": True, "exit_on_intr": False,
                                "mtf": True, "intercepts": ["desc", "unrestricted_guest"]}),
    "smm":                    (True, True),
}
# fmt: on


def case_with(kvm, **fields):
    return case_from_obj({"code": "90", "kvm": kvm} | fields)


def test_full_is_full():
    assert FULL.keys() == KVM.fields.keys()
    assert ADDED.keys() == OUTCOME_EXTRA.keys()


@pytest.mark.parametrize("name", [*PATHS, *KVM.fields, *DEVICE.fields, *OUTCOME_EXTRA])
def test_the_document_explains(name):
    assert re.search(rf"^\|[^|]*`{name}`[^|]*\|", DOCUMENT, re.MULTILINE)


def test_the_devices_of_the_document_are_devices():
    example = re.search(r"^### Devices\n\n`(.*)`$", DOCUMENT, re.MULTILINE).group(1)
    case = case_from_obj({"code": "90", "devices": json.loads(example)})
    assert devices_of(case).mmio_read(0x9000, 3) == b"\x00\xff\x00"


def test_the_accesses_of_the_document_are_accesses():
    example = re.search(r"`(\[\{\"kind\".*?), \.\.\]`: every access", DOCUMENT).group(1)
    assert len(trace_from_obj(json.loads(example + "]"))) == 1


def test_numbers_of_kvm_are_read_as_numbers_and_written_as_the_format_says():
    written = {name: as_json for name, (as_json, _) in FULL.items()}
    case = case_with(written)
    assert case.extra == {"kvm": {name: as_read for name, (_, as_read) in FULL.items()}}
    assert case_to_obj(case)["kvm"] == written
    CASE.validate(case_to_obj(case))
    assert case_from_json(case_to_json(case)) == case


def test_either_form_of_a_number_is_the_same_case():
    numbers = case_with({"pkru": 16, "lapic": {"128": 1}, "guest_debug": 1, "smm": 1, "nmi": "0x1"})
    texts = case_with({"pkru": "0x10", "lapic": {"0x80": "0x1"}, "guest_debug": "0x1", "smm": True, "nmi": 1})
    assert numbers == texts


def test_a_case_made_by_hand_is_written_as_it_was_made():
    case = case_with({})
    for kvm in ({"pkru": "0x10"}, {"unheard-of": [1]}, {"lapic": {"0x80": 1}}, {"lapic": 5}, {"cpuid": None}):
        case.extra["kvm"] = kvm
        obj = json.loads(case_to_json(case))["kvm"]
        assert obj == (kvm if "lapic" not in kvm or kvm["lapic"] == 5 else {"lapic": {"0x80": "0x1"}})


def test_the_kvm_model_takes_what_was_read():
    case = case_with(
        {name: FULL[name][0] for name in ("knobs", "pkru", "interruptibility", "guest_debug", "cpuid", "smm")}
        | {"guest_mode": FULL["guest_mode"][0]},
        cr0="0x10",
    )
    vcpu = vcpu_of_case(case, IsolatedHooks())
    assert (vcpu.pkru, vcpu.smm, vcpu.vpid) == (0xFFFFFFFF, True, 7)
    assert vcpu.guest_debug & KVM_GUESTDBG_ENABLE
    assert vcpu.cpuid.has("smap")
    assert vcpu.cpuid.maxphyaddr == 40
    assert vcpu.guest_mode.intercepts == {"desc", "unrestricted_guest"}
    assert guest_cpuid("intel").maxphyaddr != 40


def test_each_path_is_a_case():
    for path in PATHS:
        case = case_with({"exit_reason": 10} if path == EXIT_PATH else {}, path=path)
        assert case_from_json(case_to_json(case)).path == path
    assert case_from_obj({"code": "90", "path": None}).path is None


NESTED = {"vector": 14, "nested": True}
BAD_KVM = {
    "pending is no object":  ({"pending": 14}, "kvm.pending: expected an object, got a number"),
    "pending nothing":       ({"pending": {"error_code": 0}}, "kvm.pending.vector: missing"),
    "vector 32":             ({"pending": {"vector": 32}}, "kvm.pending.vector: 32 is out of range (max 0x1f)"),
    "NMI as exception":      ({"pending": {"vector": 2}}, "kvm.pending.vector: 2 is no exception; NMIs are in nmi"),
    "nested without nest":   ({"pending": NESTED}, "kvm.pending.nested: there is no nested guest without guest_mode"),
    "not nested":            ({"pending": NESTED, "guest_mode": 0}, "kvm.pending.nested: there is no nested guest"),
    "nested and injected":   ({"pending": NESTED | {"injected": True}, "guest_mode": {}}, "kvm.pending.nested: an exception that is"),
    "two injected":          ({"pending": {"vector": 14, "injected": True}, "interrupt": {"vector": 32}}, "kvm.interrupt: is being injected"),
    "interrupt 256":         ({"interrupt": {"vector": 256}}, "kvm.interrupt.vector: 256 is out of range"),
    "soft":                  ({"interrupt": {"vector": 1, "soft": "yes"}}, "kvm.interrupt.soft: expected true or false"),
    "3 NMIs":                ({"nmi": 3}, "kvm.nmi: 3 is out of range (max 0x2)"),
    "length 16":             ({"instruction_length": 16}, "kvm.instruction_length: 16 is out of range"),
    "reason":                ({"exit_reason": 65536}, "kvm.exit_reason: 65536 is out of range"),
    "debug a list":          ({"guest_debug": [1]}, "kvm.guest_debug: an array is not expected here"),
    "debug no control":      ({"guest_debug": {"dr": [0] * 8}}, "kvm.guest_debug.control: missing"),
    "seven debug registers": ({"guest_debug": {"control": 1, "dr": [0] * 7}}, "kvm.guest_debug.dr: 7 values, not those of DR0 to DR7"),
    "nine debug registers":  ({"guest_debug": {"control": 1, "dr": [0] * 9}}, "kvm.guest_debug.dr: 9 items are too many"),
    "cpuid is a list":       ({"cpuid": []}, "kvm.cpuid: expected an object, got an array"),
    "leaf of nothing":       ({"cpuid": {"leaves": [{"eax": 1}]}}, "kvm.cpuid.leaves[0].function: missing"),
    "leaf register":         ({"cpuid": {"leaves": [{"function": 1, "rax": 1}]}}, "kvm.cpuid.leaves[0].rax: unknown field"),
    "feature":               ({"cpuid": {"features": {"smap": "on"}}}, "kvm.cpuid.features.smap: expected true or false"),
    "31 address bits":       ({"cpuid": {"maxphyaddr": 31}}, "kvm.cpuid.maxphyaddr: 31 is out of range (min 32)"),
    "guest mode 2":          ({"guest_mode": 2}, "kvm.guest_mode: expected true or false, got 2"),
    "guest mode member":     ({"guest_mode": {"vmcs": 1}}, "kvm.guest_mode.vmcs: unknown field"),
    "intercepts":            ({"guest_mode": {"intercepts": "desc"}}, "kvm.guest_mode.intercepts: expected an array"),
    "smm":                   ({"smm": 2}, "kvm.smm: expected true or false, got 2"),
    "slot base":             ({"memslots": [{"base": 1, "size": 4096}]}, "kvm.memslots[0].base: 0x1 is not a multiple of 0x1000"),
    "slot size":             ({"memslots": [{"base": 0, "size": 1}]}, "kvm.memslots[0].size: 0x1 is not a multiple"),
    "slot of nothing":       ({"memslots": [{"base": 0, "size": 0}]}, "kvm.memslots[0].size: is 0"),
    "slot too high":         ({"memslots": [{"base": 2**52 - 4096, "size": 8192}]}, "kvm.memslots[0].size: reaches beyond address 0xfffffffffffff"),
    "slot flags":            ({"memslots": [{"base": 0, "size": 4096, "flags": 4}]}, "kvm.memslots[0].flags: 0x4 has unknown bits"),
    "slots overlap":         ({"memslots": [{"base": 4096, "size": 4096}, {"base": 0, "size": 8192}]}, "kvm.memslots[1].base: overlaps memslots[0]"),
    "eventfd length":        ({"ioeventfds": [{"addr": 0, "len": 3}]}, "kvm.ioeventfds[0].len: 3 is not one of 0, 1, 2, 4, 8"),
    "eventfd nowhere":       ({"ioeventfds": [{"len": 1}]}, "kvm.ioeventfds[0].addr: missing"),
    "eventfd match":         ({"ioeventfds": [{"addr": 0, "len": 1}, {"addr": 0, "datamatch": 1}]}, "kvm.ioeventfds[1].datamatch: needs a len"),
    "eventfd port":          ({"ioeventfds": [{"addr": 0xFFFF, "len": 2, "port": 1}]}, "kvm.ioeventfds[0].addr: reaches beyond"),
    "apic register":         ({"lapic": {"0x81": 0}}, "kvm.lapic.0x81: registers lie at multiples of 0x10"),
    "apic page":             ({"lapic": {"0x1000": 0}}, "kvm.lapic.0x1000: 0x1000 is out of range"),
    "apic value":            ({"lapic": {"0x80": 2**32}}, "kvm.lapic.0x80: 4294967296 is out of range"),
}  # fmt: skip


@pytest.mark.parametrize(("kvm", "message"), BAD_KVM.values(), ids=BAD_KVM)
def test_bad_kvm(kvm, message):
    with pytest.raises(CaseError) as error:
        case_with(kvm)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_an_unknown_path_is_refused_with_the_names_there_are():
    with pytest.raises(
        CaseError, match=r"path: 'ept_violation' is unknown; expected one of ud, fep, .*, exit$"
    ):
        case_from_obj({"code": "90", "path": "ept_violation"})


def test_the_exit_path_takes_the_instructions_own_exit_or_a_given_one():
    assert case_from_obj({"code": "0fa2", "path": "exit"}).extra is None
    assert case_from_obj({"code": "90", "path": "exit", "kvm": {"exit_reason": 10}}).path == "exit"


ADDED = {
    "exits": [{"reason": "MMIO", "phys_addr": "0x1000", "data": "00", "is_write": False}, {"reason": "HLT"}],
    "device_trace": [{"kind": "mmio", "addr": "0x1000", "size": 1, "direction": "read", "data": "00"}],
    "injected": [{"vector": 14, "error_code": 2, "payload": "0x1000"}, {"vector": 6, "error_code": None}],
    "interrupt_shadow": 2,
    "livelock": True,
    "no_exit": "the instruction accesses nothing that exits",
}


def test_what_a_path_adds_to_an_outcome_round_trips():
    case = catalogue()["push-rsp"]
    outcome = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system, extra=ADDED)
    obj = outcome_to_obj(case, outcome)
    assert ADDED.items() <= obj.items()
    OUTCOME.validate(obj)
    assert outcome_from_obj(obj, case).extra == ADDED


BAD_OUTCOMES = {
    "exit without reason": ({"exits": [{"data": "00"}]}, "exits[0].reason: missing"),
    "reason of two lines": ({"exits": [{"reason": "a\nb"}]}, "exits[0].reason: 'a\\nb' holds characters"),
    "fraction":            ({"exits": [{"reason": "IO", "port": 1.5}]}, "exits[0].port: 1.5 is a fraction"),
    "odd name":            ({"exits": [{"reason": "IO", "a\n": 1}]}, "exits[0].a\\n: unknown field"),
    "trace data":          ({"device_trace": [ADDED["device_trace"][0] | {"size": 2}]}, "device_trace[0].data: 1 bytes, but the size is 2"),
    "trace kind":          ({"device_trace": [{"kind": "usb"}]}, "device_trace[0].kind: 'usb' is unknown"),
    "injected vector":     ({"injected": [{}]}, "injected[0].vector: missing"),
    "shadow":              ({"interrupt_shadow": 4}, "interrupt_shadow: 4 is out of range"),
    "livelock":            ({"livelock": 2}, "livelock: expected true or false, got 2"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD_OUTCOMES.values(), ids=BAD_OUTCOMES)
def test_bad_outcomes(fields, message):
    with pytest.raises(CaseError) as error:
        outcome_from_obj(fields, catalogue()["push-rsp"])
    assert str(error.value).startswith(message)

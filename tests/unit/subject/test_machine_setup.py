"""What is worked out once for many cases is the same as worked out anew."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from emufuzz.case.build import build_case, build_system
from emufuzz.case.model import Case, System
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.options import OptionsError, options_from_knobs
from emufuzz.kvm.segments import SEGMENT_FIELDS, segment_fields, vmx_get_segment
from emufuzz.kvm.state import to_system
from emufuzz.subject.kvm.build import build_machine
from emufuzz.subject.kvm.paths import PATH_SPECS

VECTORING_SOFT_INT = 0x80000480  # INT 80h, being delivered


def machine_of(system: System, mode: str, **knobs: Any) -> KvmMachine:
    case = msgspec.structs.replace(build_case(mode, b"\x90", system=system), path="ud")
    return build_machine(case, knobs)[0]


@pytest.mark.parametrize("mode", ["real", "vm86", "prot16", "prot32", "compat16", "compat32", "prot64"])
@pytest.mark.parametrize("unrestricted", [True, False])
def test_segments_of_a_second_case_are_those_of_the_first(mode: str, unrestricted: bool) -> None:
    system = build_system(mode)
    first = machine_of(system, mode, unrestricted_guest=unrestricted).vcpu
    second = machine_of(system, mode, unrestricted_guest=unrestricted).vcpu
    fresh = machine_of(msgspec.structs.replace(system), mode, unrestricted_guest=unrestricted).vcpu
    fields = [vcpu.vmcs.values[field] for vcpu in (first, second, fresh) for field in SEGMENT_FIELDS]
    assert fields[: len(SEGMENT_FIELDS)] * 3 == fields
    for seg in range(8):
        assert vmx_get_segment(second, seg).key() == vmx_get_segment(fresh, seg).key()


def test_both_kinds_of_guest_may_share_a_system() -> None:
    system = build_system("prot32")
    cs = msgspec.structs.replace(system.seg[1], type=10)
    system = msgspec.structs.replace(system, seg=(system.seg[0], cs, *system.seg[2:]))
    types = [
        vmx_get_segment(machine_of(system, "prot32", unrestricted_guest=on).vcpu, 1).type for on in (1, 0, 1)
    ]
    assert types == [11, 10, 11]


def test_a_segment_that_was_read_before_counts_as_it_was_read() -> None:
    system = build_system("prot64")
    vcpu = machine_of(system, "prot64").vcpu
    assert to_system(vcpu, system) is system
    vmx_get_segment(vcpu, 4)
    assert segment_fields(vcpu) == tuple(vcpu.vmcs.values[field] for field in SEGMENT_FIELDS)
    vcpu.segment_cache[4 * 4 + 1] = 0x1234  # FS.base
    assert to_system(vcpu, system).seg[4].base == 0x1234


def test_a_changed_segment_is_seen() -> None:
    system = build_system("prot64")
    vcpu = machine_of(system, "prot64").vcpu
    vcpu.vmcs.write(vf.GUEST_GS_BASE, 0x5000)
    after = to_system(vcpu, system)
    assert after.seg[5].base == 0x5000
    assert after.seg[:5] + after.seg[6:] == system.seg[:5] + system.seg[6:]


@pytest.mark.parametrize("value", [[1], {"a": 1}, None])
def test_a_knob_of_a_wrong_kind_is_refused(value: Any) -> None:
    with pytest.raises(OptionsError, match="knob ept"):
        options_from_knobs({"ept": value})


def test_one_is_not_true_where_a_number_is_asked_for() -> None:
    assert options_from_knobs({"vpid": 1}).vpid == 1
    with pytest.raises(OptionsError, match="vpid"):
        options_from_knobs({"vpid": True})


@pytest.mark.parametrize(
    ("kvm", "length"), [({}, 0), ({"vectoring_info": VECTORING_SOFT_INT, "instruction_length": 2}, 2)]
)
@pytest.mark.parametrize("path", ["ud", "vmware-gp"])
def test_a_fault_has_no_length_of_its_own(path: str, kvm: dict[str, int], length: int) -> None:
    case: Case = build_case("prot64", bytes.fromhex("4801d8"))
    spec = PATH_SPECS[path]
    machine, _ = build_machine(msgspec.structs.replace(case, path=path), spec.knobs)
    spec.enter(machine, kvm)
    assert machine.vcpu.vmcs.values[vf.VM_EXIT_INSTRUCTION_LEN] == length

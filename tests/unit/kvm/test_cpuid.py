"""Guest CPUID: leaves, out-of-range functions, features and what hangs on them."""

from __future__ import annotations

import pytest

from emufuzz.kvm.cpuid import CpuidError, guest_cpuid, implied_features
from emufuzz.subject.flat import cpuid as flat

FUNCTIONS = (0, 1, 7, 0x80000000, 0x80000001, 0x80000008)


@pytest.mark.parametrize("vendor", ["intel", "amd"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_default_leaves_are_those_of_the_flat_machine(vendor, function):
    assert guest_cpuid(vendor).cpuid(function, 0, exact_only=True) == flat.leaf(vendor, function, 0)


@pytest.mark.parametrize(
    ("vendor", "function", "index", "expected"),
    [
        ("intel", 2, 0, (False, 0, 0, 0, 0)),  # in range, absent
        ("intel", 0x80000002, 0, (False, 0, 0, 0, 0)),
        ("intel", 0xE, 0, (False, 0xAA, 0, 0, 0)),  # beyond: the highest basic leaf
        ("intel", 0x40000000, 0, (False, 0xAA, 0, 0, 0)),
        ("intel", 0xC0000000, 0, (False, 0xAA, 0, 0, 0)),
        ("intel", 0x80000009, 0, (False, 0xAA, 0, 0, 0)),
        ("intel", 0x80000009, 5, (False, 0, 0, 0, 0)),  # the index is that of the request
        ("amd", 0xE, 0, (False, 0, 0, 0, 0)),
    ],
)
def test_out_of_range(vendor, function, index, expected):
    cpuid = guest_cpuid(vendor, {"leaves": [{"function": 0xD, "index": 0, "eax": 0xAA}]})
    assert cpuid.cpuid(function, index) == expected
    assert cpuid.cpuid(function, index, exact_only=True) == (False, 0, 0, 0, 0)


def test_subleaves_count_only_where_they_exist():
    cpuid = guest_cpuid("intel")
    assert cpuid.cpuid(1, 99)[0]
    assert not cpuid.cpuid(7, 1, exact_only=True)[0]


def test_topology_leaves_pass_cl_through():
    cpuid = guest_cpuid("intel", {"leaves": [{"function": "0xb", "index": 1, "eax": 1, "edx": 7}]})
    assert cpuid.cpuid(0xB, 0x302) == (False, 0, 0, 2, 7)


def test_features_and_vendors():
    cpuid = guest_cpuid("intel")
    assert cpuid.has("movbe")
    assert cpuid.has("fxsr")
    assert cpuid.has("rdpid")
    assert not cpuid.has("smep")
    assert cpuid.intel_compatible
    assert not guest_cpuid("amd").intel_compatible
    with pytest.raises(KeyError):
        cpuid.has("no such feature")


@pytest.mark.parametrize(("bits", "reserved"), [(52, 0xFFF << 52), (36, ((1 << 28) - 1) << 36)])
def test_maxphyaddr(bits, reserved):
    cpuid = guest_cpuid("intel", {"maxphyaddr": bits})
    assert (cpuid.maxphyaddr, cpuid.reserved_gpa_bits) == (bits, reserved)


def test_maxphyaddr_is_36_bits_without_the_leaf():
    cpuid = guest_cpuid("intel", {"leaves": [{"function": 0x80000000, "eax": 0x80000004}]})
    assert cpuid.maxphyaddr == 36


@pytest.mark.parametrize(
    ("feature", "bit"),
    [("smep", 20), ("smap", 21), ("pku", 22), ("umip", 11), ("la57", 12), ("pcid", 17), ("fsgsbase", 16),
     ("xsave", 18), ("vmx", 13), ("lam", 28)],
)  # fmt: skip
def test_cr4_bits_need_their_feature(feature, bit):
    assert guest_cpuid("intel").cr4_guest_rsvd_bits >> bit & 1
    assert not guest_cpuid("intel", {"features": {feature: True}}).cr4_guest_rsvd_bits >> bit & 1
    assert implied_features(1 << bit) == {feature}
    without = guest_cpuid("intel", {"features": {feature: False}}, implied_features(1 << bit))
    assert without.cr4_guest_rsvd_bits >> bit & 1


def test_runtime_bits_do_not_leak_into_other_vcpus():
    cpuid = guest_cpuid("intel", None, frozenset({"xsave"}))
    cpuid.set_runtime("osxsave", on=True)
    assert cpuid.cpuid(1, 0)[3] >> 27 & 1
    assert cpuid.has("osxsave")
    assert not guest_cpuid("intel", None, frozenset({"xsave"})).has("osxsave")
    cpuid.set_runtime("osxsave", on=False)
    assert not cpuid.cpuid(1, 0)[3] >> 27 & 1
    assert cpuid.supported_xcr0 == 7
    assert guest_cpuid("intel").supported_xcr0 == 0


def test_kvm_leaves():
    signature = {"function": 0x40000000, "eax": 0x40000001, "ebx": 0x4B4D564B, "ecx": 0x564B4D56, "edx": 0x4D}
    leaves = [signature, {"function": 0x40000001, "eax": 0x21}]
    assert guest_cpuid("intel", {"leaves": leaves}).pv_features() == 0x21
    assert guest_cpuid("intel", {"leaves": leaves[1:]}).pv_features() == 0
    assert guest_cpuid("intel", {"leaves": leaves[:1]}).pv_features() == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "expecting an object"),
        ({"foo": 1}, "expecting an object"),
        ({"leaves": [{"eax": 1}]}, "expecting objects"),
        ({"leaves": [{"function": 1, "rax": 1}]}, "unknown field 'rax'"),
        ({"leaves": [{"function": "one"}]}, "not a number"),
        ({"leaves": [{"function": 1 << 32}]}, "more than 32 bits"),
        ({"features": {"warp": True}}, "unknown feature"),
        ({"maxphyaddr": 60}, "not from 32 to 52"),
    ],
)
def test_malformed_overrides(overrides, message):
    with pytest.raises(CpuidError, match=message):
        guest_cpuid("intel", overrides)

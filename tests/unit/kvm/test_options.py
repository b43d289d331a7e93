"""Knobs of a case."""

from __future__ import annotations

import pytest

from emufuzz.kvm.options import KvmOptions, OptionsError, options_from_knobs


def test_defaults_are_kvms():
    options = options_from_knobs(None)
    assert options == KvmOptions()
    assert (options.ept, options.unrestricted_guest, options.force_emulation_prefix) == (True, True, 0)
    assert options.has_quirk("fix_hypercall_insn")
    assert not options.umip_emulated


def test_values_of_every_type():
    options = options_from_knobs(
        {
            "force_emulation_prefix": 3,
            "fasteoi": 0,
            "msr_denied": "0x10, 0x174",
            "disabled_quirks": "lapic_mmio_hole",
        }
    )
    assert options.force_emulation_prefix == 3
    assert options.fasteoi is False
    assert options.msr_denied == {0x10, 0x174}
    assert not options.has_quirk("lapic_mmio_hole")
    assert options_from_knobs({"host_umip": False}).umip_emulated


def test_unrestricted_guest_needs_ept():
    assert not options_from_knobs({"ept": False}).unrestricted_guest
    with pytest.raises(OptionsError, match="unrestricted_guest needs ept"):
        options_from_knobs({"ept": False, "unrestricted_guest": True})


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"eptt": 1}, "unknown knob 'eptt'"),
        ({"ept": 2}, "knob ept: 2 is not a bool"),
        ({"ept": "yes"}, "is not a bool"),
        ({"force_emulation_prefix": 4}, "not a number from 0 to 3"),
        ({"force_emulation_prefix": True}, "not a number"),
        ({"host_maxphyaddr": 30}, "from 36 to 52"),
        ({"msr_denied": 16}, "comma-separated"),
        ({"msr_denied": "tsc"}, "knob msr_denied: 'tsc' is not the index of an MSR"),
        ({"msr_denied": "0x100000000"}, "32 bits"),
        ({"disabled_quirks": "foo"}, "unknown quirk 'foo'"),
    ],
)
def test_refused(knobs, message):
    with pytest.raises(OptionsError, match=message):
        options_from_knobs(knobs)


def test_a_quirk_must_exist():
    with pytest.raises(KeyError):
        KvmOptions().has_quirk("nothing")

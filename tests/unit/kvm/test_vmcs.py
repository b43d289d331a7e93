"""Field encodings of SDM Vol. 3D Appendix B, and what VMREAD and VMWRITE make of them."""

from __future__ import annotations

import pytest

from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.vmcs import (
    TYPE_CONTROL,
    TYPE_GUEST,
    TYPE_HOST,
    TYPE_READ_ONLY,
    VMXERR_UNSUPPORTED_VMCS_COMPONENT,
    VMXERR_VMWRITE_READ_ONLY_VMCS_COMPONENT,
    Vmcs,
    VmcsError,
    decode_field,
    field_name,
)

ONES = (1 << 64) - 1


@pytest.mark.parametrize(
    ("field", "kind", "bits", "number"),
    [
        (vf.VIRTUAL_PROCESSOR_ID, TYPE_CONTROL, 16, 0),
        (vf.GUEST_ES_SELECTOR, TYPE_GUEST, 16, 0),
        (vf.GUEST_TR_SELECTOR, TYPE_GUEST, 16, 7),
        (vf.HOST_TR_SELECTOR, TYPE_HOST, 16, 6),
        (vf.EPT_POINTER, TYPE_CONTROL, 64, 13),
        (vf.GUEST_PHYSICAL_ADDRESS, TYPE_READ_ONLY, 64, 0),
        (vf.GUEST_PDPTR3, TYPE_GUEST, 64, 8),
        (vf.EXCEPTION_BITMAP, TYPE_CONTROL, 32, 2),
        (vf.VM_EXIT_REASON, TYPE_READ_ONLY, 32, 1),
        (vf.GUEST_INTERRUPTIBILITY_INFO, TYPE_GUEST, 32, 18),
        (vf.CR4_READ_SHADOW, TYPE_CONTROL, 64, 3),
        (vf.EXIT_QUALIFICATION, TYPE_READ_ONLY, 64, 0),
        (vf.GUEST_RIP, TYPE_GUEST, 64, 15),
        (vf.HOST_RIP, TYPE_HOST, 64, 11),
    ],
)
def test_encodings(field, kind, bits, number):
    info = decode_field(field)
    assert (info.type, info.bits, info.number, info.high) == (kind, bits, number, False)


@pytest.mark.parametrize("field", sorted(vf.FIELDS.values()), ids=sorted(vf.FIELDS, key=vf.FIELDS.get))
def test_values_are_cut_to_the_fields_width(field):
    vmcs = Vmcs()
    vmcs.hw_write(field, ONES)
    assert vmcs.read(field) == (1 << decode_field(field).bits) - 1
    if decode_field(field).type == TYPE_READ_ONLY:
        with pytest.raises(VmcsError) as error:
            vmcs.write(field, 0)
        assert error.value.number == VMXERR_VMWRITE_READ_ONLY_VMCS_COMPONENT
    else:
        vmcs.write(field, -2)
        assert vmcs.read(field) == (1 << decode_field(field).bits) - 2


def test_upper_half_of_a_64_bit_field():
    vmcs = Vmcs()
    vmcs.write(vf.TSC_OFFSET, 0x1122334455667788)
    assert vmcs.read(vf.TSC_OFFSET + 1) == 0x11223344
    vmcs.write(vf.TSC_OFFSET + 1, 0xAABBCCDD)
    assert vmcs.read(vf.TSC_OFFSET) == 0xAABBCCDD55667788
    assert field_name(vf.TSC_OFFSET + 1) == "TSC_OFFSET_HIGH"
    with pytest.raises(VmcsError, match="GUEST_PHYSICAL_ADDRESS is read-only"):
        vmcs.write(vf.GUEST_PHYSICAL_ADDRESS + 1, 0)


@pytest.mark.parametrize("field", [vf.GUEST_RIP + 1, 0x4800 + 1, 0x1_0000, 0x8000, 0x203E, 0x203F])
def test_encodings_without_a_field(field):
    for access in (lambda v: v.read(field), lambda v: v.write(field, 1)):
        with pytest.raises(VmcsError) as error:
            access(Vmcs())
        assert error.value.number == VMXERR_UNSUPPORTED_VMCS_COMPONENT


def test_failure_is_recorded():
    vmcs = Vmcs()
    with pytest.raises(VmcsError) as error:
        vmcs.write(vf.VM_EXIT_REASON, 1)
    vmcs.fail(error.value)
    assert vmcs.read(vf.VM_INSTRUCTION_ERROR) == 13
    assert field_name(0x7FFE) == "0x7ffe"


def test_bits_and_link_pointer():
    vmcs = Vmcs()
    assert vmcs.read(vf.VMCS_LINK_POINTER) == ONES
    vmcs.set_bits(vf.EXCEPTION_BITMAP, 0x6)
    vmcs.clear_bits(vf.EXCEPTION_BITMAP, 0x2)
    assert vmcs.read(vf.EXCEPTION_BITMAP) == 4
    assert Vmcs().read(vf.EXCEPTION_BITMAP) == 0

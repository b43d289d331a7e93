"""Whether NMIs are blocked, from their delivery until IRET (KVM: vmx_get_nmi_mask, vmx_set_nmi_mask).

SDM Vol. 3A 6.7.1 "Handling Multiple NMIs"; without virtual NMIs (SDM Vol. 3C 24.6.1) KVM keeps the blocking
itself.
"""

from __future__ import annotations

from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.vcpu import Vcpu
from emufuzz.kvm.vmx_bits import GUEST_INTR_STATE_NMI


def vmx_get_nmi_mask(vcpu: Vcpu) -> bool:
    """NMIs are blocked until IRET."""
    if not vcpu.options.vnmi:
        return vcpu.soft_vnmi_blocked
    if vcpu.nmi_known_unmasked:
        return False
    masked = bool(vcpu.vmcs.values[vf.GUEST_INTERRUPTIBILITY_INFO] & GUEST_INTR_STATE_NMI)
    vcpu.nmi_known_unmasked = not masked
    return masked


def vmx_set_nmi_mask(vcpu: Vcpu, *, masked: bool) -> None:
    """Block NMIs, or let them in."""
    if not vcpu.options.vnmi:
        vcpu.soft_vnmi_blocked = masked
        return
    vcpu.nmi_known_unmasked = not masked
    if masked:
        vcpu.vmcs.set_bits(vf.GUEST_INTERRUPTIBILITY_INFO, GUEST_INTR_STATE_NMI)
    else:
        vcpu.vmcs.clear_bits(vf.GUEST_INTERRUPTIBILITY_INFO, GUEST_INTR_STATE_NMI)

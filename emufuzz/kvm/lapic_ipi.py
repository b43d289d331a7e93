"""Interrupt messages: whom they are for. The machine has one processor, so it is this one or nobody.

KVM: kvm_irq_delivery_to_apic, kvm_irq_delivery_to_apic_fast, kvm_apic_map_get_dest_lapic,
kvm_recalculate_logical_map, kvm_apic_match_dest, kvm_apic_send_ipi, kvm_pv_send_ipi,
kvm_pv_kick_cpu_op. SDM Vol. 3A 10.6.2 "Determining IPI Destination".
"""

from __future__ import annotations

from typing import Final, NamedTuple

from emufuzz.kvm import lapic_regs as r
from emufuzz.kvm.lapic_irq import apic_of, apic_x2apic_mode, emit, kvm_apic_present, kvm_apic_set_irq
from emufuzz.kvm.vcpu import Vcpu

#: The APIC map of a machine whose highest APIC ID is below 256.
MAX_APIC_ID: Final = 255
KVM_EINVAL: Final = 22
_EOPNOTSUPP: Final = 95
_MASK32: Final = 0xFFFFFFFF


class LapicIrq(NamedTuple):
    """struct kvm_lapic_irq: a message on the APIC bus; `is_ipi` tells that this APIC sent it."""

    vector: int
    delivery_mode: int
    dest_mode: int
    shorthand: int
    dest_id: int
    level: bool
    trig_mode: bool
    is_ipi: bool = True


def kvm_apic_send_ipi(vcpu: Vcpu, icr_low: int, icr_high: int) -> None:
    """ICR was written: send the message that it describes."""
    irq = LapicIrq(
        vector=icr_low & r.APIC_VECTOR_MASK,
        delivery_mode=icr_low & r.APIC_MODE_MASK,
        dest_mode=icr_low & r.APIC_DEST_MASK,
        shorthand=icr_low & r.APIC_SHORT_MASK,
        dest_id=icr_high if apic_x2apic_mode(vcpu) else icr_high >> 24,
        level=bool(icr_low & r.APIC_INT_ASSERT),
        trig_mode=bool(icr_low & r.APIC_INT_LEVELTRIG),
    )
    emit(vcpu, "kvm_apic_ipi", icr_low=icr_low, dest_id=irq.dest_id)
    kvm_irq_delivery_to_apic(vcpu, irq)


def kvm_irq_delivery_to_apic(vcpu: Vcpu, irq: LapicIrq) -> int:
    """Deliver a message: 1 if it was accepted, 0 if dropped, -1 if it matched no APIC (slow path)."""
    if irq.shorthand == r.APIC_DEST_SELF:
        return _set_irq(vcpu, irq)
    if irq.shorthand or _is_broadcast(vcpu, irq):
        everybody = irq.shorthand != r.APIC_DEST_ALLBUT or not irq.is_ipi
        return _deliver_slow(vcpu, irq, matches=everybody)
    if irq.dest_mode == r.APIC_DEST_PHYSICAL:
        return _set_irq(vcpu, irq) if _is_physical_id(vcpu, irq.dest_id) else 0
    mask = _logical_map_mask(vcpu, irq.dest_id)
    if mask is None:
        return _deliver_slow(vcpu, irq, matches=_match_logical_addr(vcpu, irq.dest_id))
    return _set_irq(vcpu, irq) if _is_chosen(irq, *mask) else 0


def _set_irq(vcpu: Vcpu, irq: LapicIrq) -> int:
    return kvm_apic_set_irq(vcpu, irq.delivery_mode, irq.vector, level=irq.level, trig_mode=irq.trig_mode)


def _is_broadcast(vcpu: Vcpu, irq: LapicIrq) -> bool:
    """0xff, in IPIs of an x2APIC 0xffffffff."""
    x2apic_ipi = irq.is_ipi and apic_x2apic_mode(vcpu)
    return irq.dest_id == (r.X2APIC_BROADCAST if x2apic_ipi else r.APIC_BROADCAST)


def _deliver_slow(vcpu: Vcpu, irq: LapicIrq, *, matches: bool) -> int:
    """Ask each APIC; of lowest priority only an enabled one, unless it is a physical broadcast."""
    if not matches or not kvm_apic_present(vcpu):
        return -1
    if irq.delivery_mode == r.APIC_DM_LOWEST:
        if irq.dest_mode == r.APIC_DEST_PHYSICAL and irq.dest_id == r.APIC_BROADCAST:
            irq = irq._replace(delivery_mode=r.APIC_DM_FIXED)
        elif not apic_of(vcpu).sw_enabled:
            return -1
    return _set_irq(vcpu, irq)


def _is_physical_id(vcpu: Vcpu, dest_id: int) -> bool:
    """The map of physical IDs has this vCPU there; in x2APIC mode its ID is fixed."""
    if not kvm_apic_present(vcpu) or dest_id > MAX_APIC_ID:
        return False
    return dest_id == (0 if apic_x2apic_mode(vcpu) else apic_of(vcpu).get_reg(r.APIC_ID) >> 24)


def _logical_map_mask(vcpu: Vcpu, dest_id: int) -> tuple[int, int] | None:
    """(bits of the destination, this vCPU's own bit) by the map; None where KVM gives the map up.

    KVM deviation: any DFR but the flat one selects the cluster model, and an APIC that is disabled by
    software gets not even an NMI (SDM Vol. 3A 10.6.2.2).
    """
    apic = apic_of(vcpu)
    ldr = apic.get_reg(r.APIC_LDR)
    if not kvm_apic_present(vcpu) or not apic.sw_enabled or not ldr:
        return 0, 0
    if apic_x2apic_mode(vcpu):
        cluster = dest_id >> 16
        return (dest_id & 0xFFFF if cluster * 16 <= MAX_APIC_ID else 0), int(cluster == 0)
    logical_id = ldr >> 24
    if apic.get_reg(r.APIC_DFR) == r.APIC_DFR_FLAT:
        own, mask = logical_id, dest_id & 0xFF
        same_cluster = True
    else:
        own, mask = logical_id & 0xF, dest_id & 0xF
        same_cluster = dest_id >> 4 & 0xF == logical_id >> 4
    if own & own - 1:
        return None
    return mask, own if same_cluster else 0


def _is_chosen(irq: LapicIrq, mask: int, own: int) -> bool:
    """This vCPU is among the destinations, and for lowest priority the chosen one.

    KVM deviation: the vector chooses among the bits of the destination, whether processors are there or
    not; if none is, the interrupt is lost (SDM Vol. 3A 10.6.2.4).
    """
    if irq.delivery_mode != r.APIC_DM_LOWEST or not mask:
        return bool(mask & own)
    bits = [bit for bit in range(16) if mask >> bit & 1]
    return bool(own >> bits[irq.vector % len(bits)] & 1)


def _match_logical_addr(vcpu: Vcpu, mda: int) -> bool:
    """Without the map, which only xAPIC mode gives up (KVM: kvm_apic_match_logical_addr)."""
    apic = apic_of(vcpu)
    logical_id = apic.get_reg(r.APIC_LDR) >> 24
    dfr = apic.get_reg(r.APIC_DFR)
    if dfr == r.APIC_DFR_FLAT:
        return bool(logical_id & mda)
    if dfr == r.APIC_DFR_CLUSTER:
        return logical_id >> 4 == mda >> 4 and bool(logical_id & mda & 0xF)
    return False


# -- paravirtual -------------------------------------------------------------------------------


def kvm_pv_kick_cpu_op(vcpu: Vcpu, apic_id: int) -> None:
    """Wake the vCPU with this APIC ID (32 bits) from its halt, by a remote-read message."""
    if vcpu.apic is None:
        return
    irq = LapicIrq(
        vector=0, delivery_mode=r.APIC_DM_REMRD, dest_mode=r.APIC_DEST_PHYSICAL,
        shorthand=r.APIC_DEST_NOSHORT, dest_id=apic_id & _MASK32, level=False, trig_mode=False, is_ipi=False,
    )  # fmt: skip
    kvm_irq_delivery_to_apic(vcpu, irq)


def kvm_pv_send_ipi(vcpu: Vcpu, bitmap_low: int, bitmap_high: int, first: int, icr: int, bits: int) -> int:
    """Send an IPI to the APIC IDs `first` + n of two bitmaps: how many took it, or -errno.

    `bits` is the number of IDs that `bitmap_low` stands for, 32 or 64.
    """
    if icr & (r.APIC_DEST_MASK | r.APIC_SHORT_MASK):
        return -KVM_EINVAL
    if vcpu.apic is None:
        return -_EOPNOTSUPP
    count = 0
    for bitmap, base in ((bitmap_low, first & _MASK32), (bitmap_high, first + bits & _MASK32)):
        for index in range(64):
            if bitmap >> index & 1 and _is_physical_id(vcpu, base + index):
                count += kvm_apic_set_irq(
                    vcpu, icr & r.APIC_MODE_MASK, icr & r.APIC_VECTOR_MASK,
                    level=bool(icr & r.APIC_INT_ASSERT), trig_mode=bool(icr & r.APIC_INT_LEVELTRIG),
                )  # fmt: skip
    return count

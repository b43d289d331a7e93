"""The APIC timer as far as it goes without time: modes, counts, a deadline that is past already.

KVM: apic_update_lvtt, set_target_expiration, start_apic_timer, kvm_set_lapic_tscdeadline_msr,
kvm_inject_apic_timer_irqs, kvm_apic_local_deliver. SDM Vol. 3A 10.5.4 "APIC Timer".

The guest's TSC is IA32_TIME_STAMP_COUNTER as it was last written. A count that was started stays where
it is; it never reaches 0.
"""

from __future__ import annotations

from typing import Final

from emufuzz.kvm import lapic_regs as r
from emufuzz.kvm.lapic_irq import (
    apic_of,
    kvm_apic_hw_enabled,
    kvm_apic_present,
    kvm_apic_set_irq,
    kvm_lapic_enabled,
)
from emufuzz.kvm.msr_index import MSR_IA32_TSC
from emufuzz.kvm.vcpu import Vcpu

_MODES: Final = r.APIC_LVT_TIMER_PERIODIC | r.APIC_LVT_TIMER_TSCDEADLINE
_BUS_CYCLE_NS: Final = 1
_MIN_PERIOD_NS: Final = 200_000  # module parameter min_timer_period_us


def timer_mode_mask(vcpu: Vcpu) -> int:
    """Mode bits of the timer's LVT entry that the guest's CPUID allows."""
    return _MODES if vcpu.cpuid.has("tsc_deadline") else r.APIC_LVT_TIMER_PERIODIC


def apic_update_lvtt(vcpu: Vcpu) -> None:
    """The timer's LVT entry was written: changing to or from TSC-deadline mode disarms the timer."""
    apic = apic_of(vcpu)
    mode = apic.get_reg(r.APIC_LVTT) & timer_mode_mask(vcpu)
    if mode == apic.timer_mode:
        return
    if r.APIC_LVT_TIMER_TSCDEADLINE in (mode, apic.timer_mode):
        apic.timer_pending = False
        apic.set_reg(r.APIC_TMICT, 0)
        apic.timer_count = 0
        apic.tscdeadline = 0
    apic.timer_mode = mode


def apic_get_tmcct(vcpu: Vcpu) -> int:
    """The current count; 0 in TSC-deadline mode and without an initial count."""
    apic = apic_of(vcpu)
    if apic.timer_mode == r.APIC_LVT_TIMER_TSCDEADLINE or not apic.get_reg(r.APIC_TMICT):
        return 0
    return apic.timer_count


def set_tmict(vcpu: Vcpu, count: int) -> None:
    """The initial count was written, which starts the timer; ignored in TSC-deadline mode."""
    apic = apic_of(vcpu)
    if apic.timer_mode == r.APIC_LVT_TIMER_TSCDEADLINE:
        return
    apic.set_reg(r.APIC_TMICT, count)
    start_apic_timer(vcpu)


def start_apic_timer(vcpu: Vcpu, *, at: int | None = None) -> None:
    """Start the timer in its mode, at the initial count or at a saved one (KVM: __start_apic_timer).

    KVM deviation: a periodic timer is made no faster than 200 us, so its current count may exceed the
    initial one (SDM Vol. 3A 10.5.4).
    """
    apic = apic_of(vcpu)
    apic.timer_pending = False
    if apic.timer_mode == r.APIC_LVT_TIMER_TSCDEADLINE:
        apic.timer_pending = 0 < apic.tscdeadline <= vcpu.msrs.get(MSR_IA32_TSC, 0)
        return
    initial = apic.get_reg(r.APIC_TMICT)
    if not initial:
        return
    periodic = apic.timer_mode == r.APIC_LVT_TIMER_PERIODIC
    if periodic:
        initial = max(initial, _MIN_PERIOD_NS // (_BUS_CYCLE_NS * apic.divide_count))
    if at is None or at > initial or (periodic and not at):
        at = initial
    apic.timer_count = at
    apic.timer_pending = not at


def kvm_get_lapic_tscdeadline_msr(vcpu: Vcpu) -> int:
    """IA32_TSC_DEADLINE; 0 outside TSC-deadline mode and without an APIC."""
    if not kvm_apic_present(vcpu) or apic_of(vcpu).timer_mode != r.APIC_LVT_TIMER_TSCDEADLINE:
        return 0
    return apic_of(vcpu).tscdeadline


def kvm_set_lapic_tscdeadline_msr(vcpu: Vcpu, data: int) -> None:
    """Store a deadline; ignored outside TSC-deadline mode and without an APIC. One that is past expires."""
    if not kvm_apic_present(vcpu) or apic_of(vcpu).timer_mode != r.APIC_LVT_TIMER_TSCDEADLINE:
        return
    apic_of(vcpu).tscdeadline = data
    start_apic_timer(vcpu)


def apic_has_pending_timer(vcpu: Vcpu) -> bool:
    """The timer has expired, and its interrupt is not masked (KVM: kvm_cpu_has_pending_timer)."""
    if vcpu.apic is None or not kvm_lapic_enabled(vcpu):
        return False
    return vcpu.apic.timer_pending and not vcpu.apic.get_reg(r.APIC_LVTT) & r.APIC_LVT_MASKED


def kvm_inject_apic_timer_irqs(vcpu: Vcpu) -> None:
    """Deliver the interrupt of a timer that has expired; what is not periodic is disarmed."""
    apic = apic_of(vcpu)
    if not apic.timer_pending:
        return
    kvm_apic_local_deliver(vcpu, r.APIC_LVTT)
    if apic.timer_mode != r.APIC_LVT_TIMER_PERIODIC:
        apic.tscdeadline = 0
    apic.timer_pending = False


def kvm_apic_local_deliver(vcpu: Vcpu, lvt: int) -> int:
    """A local interrupt source fires: 1 if its LVT entry lets it through and the APIC accepts it."""
    apic = apic_of(vcpu)
    entry = apic.get_reg(lvt)
    if not kvm_apic_hw_enabled(vcpu) or entry & r.APIC_LVT_MASKED:
        return 0
    accepted = kvm_apic_set_irq(
        vcpu,
        entry & r.APIC_MODE_MASK,
        entry & r.APIC_VECTOR_MASK,
        level=True,
        trig_mode=bool(entry & r.APIC_LVT_LEVEL_TRIGGER),
    )
    if accepted and lvt == r.APIC_LVTPC and vcpu.cpuid.intel_compatible:
        apic.set_reg(lvt, entry | r.APIC_LVT_MASKED)
    return accepted

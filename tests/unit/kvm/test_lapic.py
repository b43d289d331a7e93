"""The local APIC: registers through MMIO and MSRs, priorities, messages, the timer (SDM Vol. 3A ch. 10)."""

from __future__ import annotations

import pytest
from support.vcpus import make_vcpu

from emufuzz.kvm import lapic_regs as r
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.cr import kvm_get_cr8, kvm_set_cr8
from emufuzz.kvm.exceptions import kvm_queue_interrupt
from emufuzz.kvm.fastpath import handle_fastpath_set_msr_irqoff
from emufuzz.kvm.inject import kvm_check_and_inject_events
from emufuzz.kvm.lapic import (
    LocalApic,
    apic_base_changed,
    kvm_apic_get_state,
    kvm_apic_set_state,
    kvm_apic_write_nodecode,
    kvm_lapic_reg_read,
    kvm_lapic_reg_write,
    kvm_lapic_set_eoi,
)
from emufuzz.kvm.lapic_ipi import kvm_pv_kick_cpu_op, kvm_pv_send_ipi
from emufuzz.kvm.lapic_irq import (
    apic_of,
    kvm_apic_has_interrupt,
    kvm_apic_set_eoi_accelerated,
    kvm_apic_set_irq,
    kvm_cpu_get_interrupt,
    kvm_cpu_has_injectable_intr,
)
from emufuzz.kvm.lapic_timer import (
    apic_has_pending_timer,
    kvm_apic_local_deliver,
    kvm_inject_apic_timer_irqs,
)
from emufuzz.kvm.msr import kvm_get_msr, kvm_set_msr
from emufuzz.kvm.msr_index import MSR_IA32_APICBASE, MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE
from emufuzz.kvm.options import OptionsError
from emufuzz.kvm.regs import kvm_rip_read
from emufuzz.kvm.trace import Trace, format_event
from emufuzz.kvm.vmx_bits import (
    CPU_BASED_INTR_WINDOW_EXITING,
    SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES,
    SECONDARY_EXEC_VIRTUALIZE_X2APIC_MODE,
)

BASE = 0xFEE00000
XAPIC, X2APIC = 0xFEE00900, 0xFEE00D00
IF = 1 << 9
FEATURES = {"features": {"x2apic": True, "tsc_deadline": True}}


def make(registers=None, *, base=XAPIC, guest_mode=None, **options):
    """A vCPU with an APIC that software has enabled."""
    knobs = {"irqchip": True, **options.pop("knobs", {})}
    lapic = {r.APIC_SPIV: 0x1FF, **(registers or {})}
    kvm = {"lapic": lapic, "cpuid": FEATURES, "guest_mode": guest_mode}
    vcpu = make_vcpu(knobs=knobs, kvm=kvm, msr=((MSR_IA32_APICBASE, base),), **options)
    vcpu.requests.clear()
    return vcpu


def read(vcpu, reg, size=4):
    return apic_of(vcpu).mmio_read(vcpu, BASE + reg, size)


def write(vcpu, reg, value, size=4):
    return apic_of(vcpu).mmio_write(vcpu, BASE + reg, value.to_bytes(size, "little"))


def value(vcpu, reg):
    return int.from_bytes(read(vcpu, reg), "little")


def bits(vcpu, bitmap):
    return {vector for vector in range(256) if apic_of(vcpu).test_vector(vector, bitmap)}


# -- state -------------------------------------------------------------------------------------


def test_reset_state():
    apic = LocalApic()
    assert (apic.get_reg(r.APIC_LVR), apic.get_reg(r.APIC_SPIV)) == (0x50014, 0xFF)
    assert apic.get_reg(r.APIC_DFR) == 0xFFFFFFFF
    assert apic.get_reg(r.APIC_LVT0) == 0x700  # KVM's quirk: ExtINT, not masked
    assert {apic.get_reg(reg) for reg in r.APIC_LVT_WRITABLE if reg != r.APIC_LVT0} == {0x10000}
    assert LocalApic(lint0_reenabled=False).get_reg(r.APIC_LVT0) == 0x10000
    assert not apic.sw_enabled


def test_no_apic_without_irqchip():
    vcpu = make_vcpu()
    assert vcpu.apic is None
    assert not kvm_cpu_has_injectable_intr(vcpu)
    assert kvm_apic_has_interrupt(vcpu) == -1
    assert not apic_has_pending_timer(vcpu)
    assert kvm_cpu_get_interrupt(vcpu) == -1
    kvm_queue_interrupt(vcpu, 0x41, soft=False)
    assert kvm_cpu_has_injectable_intr(vcpu)  # what is being injected already
    assert kvm_cpu_get_interrupt(vcpu) == 0x41
    with pytest.raises(ValueError, match="no in-kernel local APIC"):
        apic_of(vcpu)
    with pytest.raises(OptionsError, match=r"kvm\.lapic: needs the knob irqchip"):
        make_vcpu(kvm={"lapic": {r.APIC_SPIV: 0x1FF}})


def test_case_registers_are_added_to_the_state():
    vcpu = make({r.APIC_LVTT: 0x20}, cr8=3)
    assert value(vcpu, r.APIC_TASKPRI) == 0x30
    assert value(vcpu, r.APIC_LVTT) == 0x20
    assert kvm_apic_get_state(vcpu)[r.APIC_SPIV] == 0x1FF
    kvm_apic_set_state(vcpu, LocalApic.from_registers(kvm_apic_get_state(vcpu)))
    assert "EVENT" in vcpu.requests


def test_state_in_x2apic_mode_has_the_kernels_ids_and_a_split_icr():
    vcpu = make({r.APIC_ID: 7 << 24, r.APIC_LDR: 0xFF << 24, r.APIC_ICR: 0x31, r.APIC_ICR2: 9}, base=X2APIC)
    assert kvm_get_msr(vcpu, 0x802) == (0, 0)
    assert kvm_get_msr(vcpu, 0x80D) == (0, 1)
    assert kvm_get_msr(vcpu, 0x830) == (0, 9 << 32 | 0x31)
    assert kvm_apic_get_state(vcpu)[r.APIC_ICR2] == 9


# -- MMIO --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "size", "data"),
    [
        (0x30, 4, "14000500"),
        (0x30, 1, "14"),
        (0x32, 1, "05"),
        (0x32, 2, "0500"),
        (0x33, 2, "0000"),  # crosses the register
        (0x30, 3, "000000"),
        (0x34, 4, "00000000"),
        (0x30, 8, "00" * 8),
        (0x00, 4, "00000000"),
        (0xB0, 4, "00000000"),  # EOI is write-only
        (0x90, 4, "00000000"),  # arbitration priority
        (0x2F0, 4, "00000000"),  # no CMCI
        (0x400, 4, "00000000"),
        (0xE0, 4, "ffffffff"),
    ],
)
def test_mmio_read(offset, size, data):
    assert read(make(), offset, size).hex() == data


def test_reads_that_are_refused_are_not_traced():
    vcpu = make()
    vcpu.trace = Trace()
    assert kvm_lapic_reg_read(vcpu, 0xB0, 4) is None
    assert kvm_lapic_reg_read(vcpu, 0x32, 2) == b"\x05\0"
    assert [format_event(event) for event in vcpu.trace.events] == ["kvm_apic: apic_read 0x32 = 0x50014"]


@pytest.mark.parametrize("gpa", [BASE - 4, BASE + 0x1000, 0, 0x1_FEE0_0030])
def test_outside_the_page_nothing_is_the_apics(gpa):
    vcpu = make()
    assert apic_of(vcpu).mmio_read(vcpu, gpa, 4) is None
    assert not apic_of(vcpu).mmio_write(vcpu, gpa, bytes(4))


def test_the_page_follows_its_base_up_to_4_gib():
    vcpu = make(base=0x1_2345_6900)
    assert apic_of(vcpu).mmio_read(vcpu, 0x23456030, 4) == b"\x14\0\5\0"
    assert apic_of(vcpu).mmio_read(vcpu, 0x1_2345_6030, 4) is None


@pytest.mark.parametrize("base", [X2APIC, 0xFEE00100])
def test_hole_where_no_registers_are(base):
    vcpu = make(base=base)
    assert read(vcpu, r.APIC_LVR) == b"\xff" * 4
    assert write(vcpu, r.APIC_TASKPRI, 0x20)
    vcpu = make(base=base, knobs={"disabled_quirks": "lapic_mmio_hole"})
    assert read(vcpu, r.APIC_LVR) is None
    assert not write(vcpu, r.APIC_TASKPRI, 0x20)
    assert apic_of(vcpu).get_reg(r.APIC_TASKPRI) == 0


@pytest.mark.parametrize(("offset", "size"), [(0x80, 1), (0x80, 2), (0x80, 8), (0x84, 4), (0x82, 4)])
def test_writes_of_another_form_are_swallowed(offset, size):
    vcpu = make()
    assert write(vcpu, offset, 0x55, size)
    assert value(vcpu, r.APIC_TASKPRI) == 0


# fmt: off
MMIO_WRITE_CASES = [
    (r.APIC_ID,       0xFFFFFFFF, 0xFF000000),
    (r.APIC_TASKPRI,  0xFFFFFFFF, 0xFF),
    (r.APIC_LDR,      0xFFFFFFFF, 0xFF000000),
    (r.APIC_DFR,      0x10000000, 0x1FFFFFFF),
    (r.APIC_SPIV,     0xFFFFFFFF, 0x3FF),
    (r.APIC_ICR2,     0xFFFFFFFF, 0xFF000000),
    (r.APIC_ESR,      0xFFFFFFFF, 0),
    (r.APIC_LVTT,     0xFFFFFFFF, 0x710FF),
    (r.APIC_LVTTHMR,  0xFFFFFFFF, 0x117FF),
    (r.APIC_LVTPC,    0xFFFFFFFF, 0x117FF),
    (r.APIC_LVT0,     0xFFFFFFFF, 0x1F7FF),
    (r.APIC_LVT1,     0xFFFFFFFF, 0x1F7FF),
    (r.APIC_LVTERR,   0xFFFFFFFF, 0x110FF),
    (r.APIC_TDCR,     0xFFFFFFFF, 0xB),
    (r.APIC_TMICT,    0x12345678, 0x12345678),
    (r.APIC_LVR,      0xFFFFFFFF, 0x50014),
    (r.APIC_IRR,      0xFFFFFFFF, 0),
    (r.APIC_TMCCT,    0xFFFFFFFF, 0),
]
# fmt: on


@pytest.mark.parametrize(("reg", "written", "stored"), MMIO_WRITE_CASES)
def test_mmio_write(reg, written, stored):
    vcpu = make()
    assert write(vcpu, reg, written)
    assert value(vcpu, reg) == stored


def test_disabling_by_software_masks_the_lvt():
    vcpu = make({r.APIC_LVTERR: 0x31})
    write(vcpu, r.APIC_SPIV, 0xFF)
    assert value(vcpu, r.APIC_LVTERR) == 0x10031
    write(vcpu, r.APIC_LVTERR, 0x32)
    assert value(vcpu, r.APIC_LVTERR) == 0x10032


# -- priorities --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tpr", "in_service", "ppr"),
    [(0, [], 0), (0x2F, [], 0x2F), (0x20, [0x31], 0x30), (0x35, [0x31], 0x35), (0x45, [0x31, 0x39], 0x45)],
)
def test_processor_priority(tpr, in_service, ppr):
    vcpu = make({r.APIC_TASKPRI: tpr})
    for vector in in_service:
        apic_of(vcpu).set_vector(vector, r.APIC_ISR)
    assert value(vcpu, r.APIC_PROCPRI) == ppr


@pytest.mark.parametrize(
    ("tpr", "pending", "taken"),
    [
        (0, [], -1),
        (0, [0x0F], -1),
        (0, [0x10], 0x10),
        (0, [0x31, 0xFE], 0xFE),
        (0x30, [0x3F], -1),
        (0x2F, [0x30], 0x30),
    ],
)
def test_highest_pending_interrupt_above_the_priority(tpr, pending, taken):
    vcpu = make({r.APIC_TASKPRI: tpr})
    for vector in pending:
        apic_of(vcpu).set_vector(vector, r.APIC_IRR)
    assert kvm_apic_has_interrupt(vcpu) == taken
    assert kvm_cpu_has_injectable_intr(vcpu) is (taken != -1)
    assert kvm_cpu_get_interrupt(vcpu) == taken
    assert bits(vcpu, r.APIC_ISR) == ({taken} - {-1})
    assert bits(vcpu, r.APIC_IRR) == set(pending) - {taken}


def test_eoi_ends_the_highest_and_lets_the_next_in():
    vcpu = make()
    apic = apic_of(vcpu)
    for vector in (0x31, 0x52):
        apic.set_vector(vector, r.APIC_ISR)
    apic.set_vector(0x48, r.APIC_IRR)
    assert kvm_apic_has_interrupt(vcpu) == -1
    kvm_lapic_set_eoi(vcpu)
    assert bits(vcpu, r.APIC_ISR) == {0x31}
    assert "EVENT" in vcpu.requests
    assert kvm_apic_has_interrupt(vcpu) == 0x48


def test_eoi_without_an_interrupt_in_service():
    vcpu = make()
    vcpu.trace = Trace()
    write(vcpu, r.APIC_EOI, 0)
    assert vcpu.requests == set()
    assert [format_event(event) for event in vcpu.trace.events] == [
        "kvm_apic: apic_write APIC_EOI = 0x0",
        "kvm_eoi: apicid 0 vector -1",
    ]


def test_eoi_by_hardware_only_requests_events():
    vcpu = make()
    apic_of(vcpu).set_vector(0x31, r.APIC_ISR)
    kvm_apic_set_eoi_accelerated(vcpu, 0x31)
    assert bits(vcpu, r.APIC_ISR) == {0x31}
    assert vcpu.requests == {"EVENT"}


def test_cr8_is_the_class_of_tpr():
    vcpu = make({r.APIC_TASKPRI: 0x57})
    assert kvm_get_cr8(vcpu) == 5
    assert kvm_set_cr8(vcpu, 9) == 0
    assert value(vcpu, r.APIC_TASKPRI) == 0x90
    assert kvm_set_cr8(vcpu, 16) == 1
    assert kvm_get_cr8(vcpu) == 9


@pytest.mark.parametrize(
    ("cr8", "pending", "threshold"), [(5, 0x61, 0), (6, 0x61, 6), (9, 0x61, 6), (9, None, 0)]
)
def test_tpr_threshold(cr8, pending, threshold):
    vcpu = make()
    if pending is not None:
        apic_of(vcpu).set_vector(pending, r.APIC_IRR)
    kvm_set_cr8(vcpu, cr8)
    assert vcpu.vmcs.read(vf.TPR_THRESHOLD) == threshold


def test_lower_tpr_requests_events_for_what_waits():
    vcpu = make({r.APIC_TASKPRI: 0xF0})
    apic_of(vcpu).set_vector(0x61, r.APIC_IRR)
    kvm_set_cr8(vcpu, 7)
    assert vcpu.requests == set()
    kvm_set_cr8(vcpu, 3)
    assert vcpu.requests == {"EVENT"}


@pytest.mark.parametrize("knobs", [{"enable_apicv": True}, {}])
def test_hardware_keeps_threshold_with_apicv_or_for_l2(knobs):
    vcpu = make(knobs=knobs, guest_mode=None if knobs else True)
    apic_of(vcpu).set_vector(0x61, r.APIC_IRR)
    kvm_set_cr8(vcpu, 9)
    assert vcpu.vmcs.read(vf.TPR_THRESHOLD) == 0
    assert kvm_cpu_has_injectable_intr(vcpu) is False
    assert kvm_cpu_get_interrupt(vcpu) == -1


# -- injection ---------------------------------------------------------------------------------


def test_pending_interrupt_is_injected():
    vcpu = make(rflags=2 | IF)
    kvm_apic_set_irq(vcpu, r.APIC_DM_FIXED, 0x61, level=False, trig_mode=False)
    assert vcpu.requests == {"EVENT"}
    assert kvm_check_and_inject_events(vcpu) is False
    assert vcpu.vmcs.read(vf.VM_ENTRY_INTR_INFO_FIELD) == 0x80000061
    assert (vcpu.interrupt.injected, vcpu.interrupt.nr) == (True, 0x61)
    assert bits(vcpu, r.APIC_ISR) == {0x61}
    assert not vcpu.vmcs.read(vf.CPU_BASED_VM_EXEC_CONTROL) & CPU_BASED_INTR_WINDOW_EXITING


@pytest.mark.parametrize("rflags", [2, 2 | IF])
def test_window_opens_for_an_interrupt_that_waits(rflags):
    vcpu = make(rflags=rflags)
    for vector in (0x61, 0x82):
        apic_of(vcpu).set_vector(vector, r.APIC_IRR)
    apic_of(vcpu).set_vector(0x75, r.APIC_ISR)
    assert kvm_check_and_inject_events(vcpu) is False
    window = vcpu.vmcs.read(vf.CPU_BASED_VM_EXEC_CONTROL) & CPU_BASED_INTR_WINDOW_EXITING
    assert bool(window) is (rflags == 2)  # with IF 0x82 is injected, and 0x61 waits for an EOI
    assert bits(vcpu, r.APIC_IRR) == ({0x61, 0x82} if rflags == 2 else {0x61})


def test_interrupt_behind_another_event_exits_at_once():
    vcpu = make(rflags=2 | IF)
    apic_of(vcpu).set_vector(0x61, r.APIC_IRR)
    vcpu.exception.pending, vcpu.exception.vector = True, 6
    assert kvm_check_and_inject_events(vcpu) is True
    assert bits(vcpu, r.APIC_IRR) == {0x61}
    vcpu = make(rflags=2 | IF, guest_mode={"exit_on_intr": True})
    apic_of(vcpu).set_vector(0x61, r.APIC_IRR)
    assert kvm_check_and_inject_events(vcpu) is True


def test_nmi_goes_before_an_interrupt():
    vcpu = make(rflags=2 | IF)
    apic_of(vcpu).set_vector(0x61, r.APIC_IRR)
    vcpu.nmi_pending = 1
    assert kvm_check_and_inject_events(vcpu) is True
    assert vcpu.vmcs.read(vf.VM_ENTRY_INTR_INFO_FIELD) == 0x80000202


# -- messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "level", "trig_mode", "accepted", "effect"),
    [
        (r.APIC_DM_FIXED, False, False, 1, "irr"),
        (r.APIC_DM_LOWEST, True, False, 1, "irr"),
        (r.APIC_DM_FIXED, True, True, 1, "irr tmr"),
        (r.APIC_DM_FIXED, False, True, 0, ""),  # de-assert
        (r.APIC_DM_NMI, False, False, 1, "nmi"),
        (r.APIC_DM_SMI, False, False, 1, "smi"),
        (r.APIC_DM_INIT, False, False, 1, "init"),
        (r.APIC_DM_INIT, True, True, 1, "init"),
        (r.APIC_DM_INIT, False, True, 0, ""),
        (r.APIC_DM_STARTUP, False, False, 1, "sipi"),
        (r.APIC_DM_REMRD, False, False, 1, "kick"),
        (r.APIC_DM_EXTINT, False, False, 0, ""),
    ],
)
def test_acceptance(mode, level, trig_mode, accepted, effect):
    vcpu = make()
    apic = apic_of(vcpu)
    assert kvm_apic_set_irq(vcpu, mode, 0x41, level=level, trig_mode=trig_mode) == accepted
    happened = {
        "irr": bits(vcpu, r.APIC_IRR) == {0x41},
        "tmr": bits(vcpu, r.APIC_TMR) == {0x41},
        "nmi": vcpu.nmi_queued == 1,
        "smi": "SMI" in vcpu.requests,
        "init": apic.pending_events == {"INIT"},
        "sipi": apic.pending_events == {"SIPI"} and apic.sipi_vector == 0x41,
        "kick": apic.pv_unhalted,
    }
    assert {name for name, seen in happened.items() if seen} == set(effect.split())


def test_edge_clears_the_trigger_mode_of_its_vector():
    vcpu = make()
    for trig_mode in (True, False):
        kvm_apic_set_irq(vcpu, r.APIC_DM_FIXED, 0x41, level=True, trig_mode=trig_mode)
        assert bits(vcpu, r.APIC_TMR) == ({0x41} if trig_mode else set())


@pytest.mark.parametrize("registers", [{r.APIC_SPIV: 0xFF}, {}])
def test_disabled_apic_drops_fixed_interrupts_only(registers):
    vcpu = make(registers, base=XAPIC if registers else 0xFEE00100)
    assert kvm_apic_set_irq(vcpu, r.APIC_DM_FIXED, 0x41, level=False, trig_mode=False) == 0
    assert kvm_apic_set_irq(vcpu, r.APIC_DM_NMI, 0, level=False, trig_mode=False) == 1
    assert kvm_apic_has_interrupt(vcpu) == -1


LOGICAL = 0x800
FLAT = {r.APIC_LDR: 4 << 24}
CLUSTER = {r.APIC_DFR: 0x0FFFFFFF, r.APIC_LDR: 0x32 << 24}


# fmt: off
IPI_OF_XAPIC_CASES = [
    ({},                    0x41,                       0x00, True),
    ({},                    0x41,                       0x01, False),
    ({r.APIC_ID: 5 << 24},  0x41,                       0x05, True),
    ({r.APIC_ID: 5 << 24},  0x41,                       0x00, False),
    ({},                    0x41,                       0xFF, True),    # broadcast
    ({},                    0x141,                      0xFF, True),    # lowest priority becomes fixed
    ({},                    0x41 | r.APIC_DEST_SELF,    0x77, True),
    ({},                    0x41 | r.APIC_DEST_ALLINC,  0x77, True),
    ({},                    0x141 | r.APIC_DEST_ALLINC, 0x77, True),
    ({},                    0x41 | r.APIC_DEST_ALLBUT,  0x00, False),
    (FLAT,                  0x41 | LOGICAL,             0x04, True),
    (FLAT,                  0x41 | LOGICAL,             0x06, True),
    (FLAT,                  0x41 | LOGICAL,             0x02, False),
    (FLAT,                  0x41 | LOGICAL,             0xFF, True),
    ({},                    0x41 | LOGICAL,             0x01, False),   # no logical ID
    ({r.APIC_LDR: 6 << 24}, 0x41 | LOGICAL,             0x02, True),    # several bits: no map
    ({r.APIC_LDR: 6 << 24}, 0x41 | LOGICAL,             0x08, False),
    (FLAT,                  0x140 | LOGICAL,            0x06, False),   # even: bit 1, where nobody is
    (FLAT,                  0x141 | LOGICAL,            0x06, True),    # odd: bit 2
    (FLAT,                  0x141 | LOGICAL,            0x00, False),
    (CLUSTER,               0x41 | LOGICAL,             0x32, True),
    (CLUSTER,               0x41 | LOGICAL,             0x3F, True),
    (CLUSTER,               0x41 | LOGICAL,             0x42, False),
    (CLUSTER,               0x41 | LOGICAL,             0x31, False),
    (CLUSTER | {r.APIC_LDR: 0x30 << 24}, 0x41 | LOGICAL, 0x3F, False),
    (CLUSTER | {r.APIC_LDR: 0x33 << 24}, 0x41 | LOGICAL, 0x31, True),
    (CLUSTER | {r.APIC_LDR: 0x33 << 24}, 0x41 | LOGICAL, 0x41, False),
    (CLUSTER | {r.APIC_DFR: 0x7FFFFFFF}, 0x41 | LOGICAL, 0x32, True),   # any other DFR is a cluster
    ({r.APIC_DFR: 0x7FFFFFFF, r.APIC_LDR: 0x33 << 24}, 0x41 | LOGICAL, 0x31, False),
]
# fmt: on


@pytest.mark.parametrize(("registers", "icr", "dest", "arrives"), IPI_OF_XAPIC_CASES)
def test_ipi_of_xapic(registers, icr, dest, arrives):
    vcpu = make(registers)
    write(vcpu, r.APIC_ICR2, dest << 24)
    write(vcpu, r.APIC_ICR, icr | r.APIC_ICR_BUSY)
    assert bits(vcpu, r.APIC_IRR) == ({icr & 0xFF} if arrives else set())
    assert value(vcpu, r.APIC_ICR) == icr


def test_nmi_to_a_logical_id_needs_software_enabling():
    for spiv, nmis in ((0xFF, 0), (0x1FF, 1)):
        vcpu = make({**FLAT, r.APIC_SPIV: spiv})
        write(vcpu, r.APIC_ICR2, 4 << 24)
        write(vcpu, r.APIC_ICR, 0x400 | LOGICAL)
        assert vcpu.nmi_queued == nmis


def test_broadcast_of_lowest_priority_needs_software_enabling():
    vcpu = make({**FLAT, r.APIC_SPIV: 0xFF})
    vcpu.trace = Trace()
    write(vcpu, r.APIC_ICR2, 0xFF << 24)
    write(vcpu, r.APIC_ICR, 0x141 | LOGICAL)
    assert [event.name for event in vcpu.trace.events] == ["kvm_apic", "kvm_apic", "kvm_apic_ipi"]


def test_messages_are_traced():
    vcpu = make()
    vcpu.trace = Trace()
    write(vcpu, r.APIC_ICR, 0x41 | r.APIC_DEST_SELF)
    assert [format_event(event) for event in vcpu.trace.events] == [
        "kvm_apic: apic_write APIC_ICR = 0x40041",
        "kvm_apic_ipi: dst 0 vec 65 (Fixed|physical|de-assert|edge|self)",
        "kvm_apic_accept_irq: apicid 0 vec 65 (Fixed|edge)",
    ]


def test_hardware_writes_are_taken_from_the_page():
    vcpu = make()
    apic_of(vcpu).set_reg(r.APIC_ICR, 0x41 | r.APIC_DEST_SELF)
    kvm_apic_write_nodecode(vcpu, r.APIC_ICR)
    assert bits(vcpu, r.APIC_IRR) == {0x41}
    vcpu = make(base=X2APIC)
    apic_of(vcpu).set_icr64(0x41)
    kvm_apic_write_nodecode(vcpu, r.APIC_ICR)
    assert bits(vcpu, r.APIC_IRR) == {0x41}


@pytest.mark.parametrize(
    ("low", "high", "first", "icr", "bits_of_low", "result"),
    [
        (1, 0, 0, 0x41, 64, 1),
        (2, 0, 0, 0x41, 64, 0),
        (0, 1, (1 << 32) - 64, 0x41, 64, 1),  # the second bitmap starts at 0 again
        (0, 1, (1 << 32) - 32, 0x41, 32, 1),
        (1, 0, 0, 0x41 | LOGICAL, 64, -22),
        (1, 0, 0, 0x41 | r.APIC_DEST_SELF, 64, -22),
        (1, 0, 0, 0x8041, 64, 0),  # level, de-asserted
        ((1 << 64) - 1, (1 << 64) - 1, 256, 0x41, 64, 0),
    ],
)
def test_paravirtual_ipi(low, high, first, icr, bits_of_low, result):
    vcpu = make()
    assert kvm_pv_send_ipi(vcpu, low, high, first, icr, bits_of_low) == result
    assert bits(vcpu, r.APIC_IRR) == ({0x41} if result == 1 else set())


def test_paravirtual_calls_without_an_apic():
    vcpu = make_vcpu()
    assert kvm_pv_send_ipi(vcpu, 1, 0, 0, 0x41, 64) == -95
    kvm_pv_kick_cpu_op(vcpu, 0)
    assert vcpu.requests == set()


@pytest.mark.parametrize(
    ("base", "apic_id", "woken"),
    [(XAPIC, 0, True), (XAPIC, 1, False), (XAPIC, 0xFF, True), (X2APIC, 0xFF, True), (X2APIC, 1 << 32, True)],
)
def test_kick(base, apic_id, woken):
    vcpu = make(base=base)
    kvm_pv_kick_cpu_op(vcpu, apic_id)
    assert apic_of(vcpu).pv_unhalted is woken
    assert ("EVENT" in vcpu.requests) is woken


# -- x2APIC ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("msr", "result"),
    [
        *((msr, 0) for msr in (0x802, 0x803, 0x808)),
        *((msr, 1) for msr in (0x809, 0x80B, 0x80E, 0x831, 0x83F, 0x8FF)),
    ],
)
def test_x2apic_read(msr, result):
    assert kvm_get_msr(make(base=X2APIC), msr)[0] == result
    assert kvm_get_msr(make(), msr) == (1, 0)
    assert kvm_get_msr(make_vcpu(knobs={"ignore_msrs": True}), msr) == (1, 0)


@pytest.mark.parametrize(
    ("msr", "data", "result"),
    [
        (0x808, 0x20, 0),
        (0x808, 1 << 32, 1),
        (0x80B, 0, 0),
        (0x80B, 5, 0),  # KVM does not mind
        (0x828, 0, 0),
        (0x828, 1, 1),
        (0x802, 0, 1),
        (0x80D, 0, 1),
        (0x80E, 0, 1),
        (0x831, 0, 1),
        (0x803, 0, 1),
        (0x82F, 0, 1),
        (0x830, 1 << 13, 1),
        (0x830, 1 << 16, 1),
        (0x830, 1 << 20, 1),
        (0x830, 0x41 | 3 << 32, 0),
        (0x83F, 0x41, 0),
        (0x83F, 0x141, 1),
        (0x838, 5, 0),
    ],
)
def test_x2apic_write(msr, data, result):
    assert kvm_set_msr(make(base=X2APIC), msr, data) == result
    assert kvm_set_msr(make(), msr, data) == 1


# fmt: off
IPI_OF_X2APIC_CASES = [
    (0x41,                0,          True),
    (0x41,                0xFF,       False),
    (0x41,                0x100,      False),
    (0x41,                0xFFFFFFFF, True),
    (0x41 | LOGICAL,      0x00001,    True),
    (0x41 | LOGICAL,      0x00002,    False),
    (0x41 | LOGICAL,      0x10001,    False),
    (0x141 | LOGICAL,     0x00001,    True),
    (0x41 | LOGICAL,      0x1000001,  False),
    (0x41 | r.APIC_DEST_SELF, 0x1234, True),
]
# fmt: on


@pytest.mark.parametrize(("icr", "dest", "arrives"), IPI_OF_X2APIC_CASES)
def test_ipi_of_x2apic(icr, dest, arrives):
    vcpu = make(base=X2APIC)
    assert kvm_set_msr(vcpu, 0x830, dest << 32 | icr | r.APIC_ICR_BUSY) == 0
    assert bits(vcpu, r.APIC_IRR) == ({0x41} if arrives else set())
    assert kvm_get_msr(vcpu, 0x830) == (0, dest << 32 | icr)


def test_self_ipi_register():
    vcpu = make(base=X2APIC)
    assert kvm_set_msr(vcpu, 0x83F, 0x41) == 0
    assert bits(vcpu, r.APIC_IRR) == {0x41}
    assert kvm_lapic_reg_write(make(), r.APIC_SELF_IPI, 0x41) == 1


def test_mode_changes_follow_the_base():
    vcpu = make({r.APIC_ID: 5 << 24})
    both = SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES | SECONDARY_EXEC_VIRTUALIZE_X2APIC_MODE

    def virtualized():
        return vcpu.vmcs.read(vf.SECONDARY_VM_EXEC_CONTROL) & both

    assert virtualized() == SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES
    assert kvm_set_msr(vcpu, MSR_IA32_APICBASE, X2APIC) == 0
    assert virtualized() == SECONDARY_EXEC_VIRTUALIZE_X2APIC_MODE
    assert kvm_get_msr(vcpu, 0x80D) == (0, 1)
    assert kvm_set_msr(vcpu, MSR_IA32_APICBASE, XAPIC) == 1  # only by way of disabled
    assert kvm_set_msr(vcpu, MSR_IA32_APICBASE, 0xFEE00100) == 0
    assert virtualized() == 0
    assert not vcpu.cpuid.has("apic")
    assert kvm_set_msr(vcpu, MSR_IA32_APICBASE, XAPIC) == 0
    assert virtualized() == SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES
    assert "TLB_FLUSH_CURRENT" in vcpu.requests
    assert value(vcpu, r.APIC_ID) == 0


def test_mode_change_leaves_controls_while_l2_runs():
    vcpu = make(guest_mode=True)
    before = vcpu.vmcs.read(vf.SECONDARY_VM_EXEC_CONTROL)
    vcpu.apic_base = X2APIC
    apic_base_changed(vcpu, XAPIC)
    assert vcpu.vmcs.read(vf.SECONDARY_VM_EXEC_CONTROL) == before


# -- timer -------------------------------------------------------------------------------------

PERIODIC, DEADLINE = 1 << 17, 2 << 17


def test_count_stays_where_it_is():
    vcpu = make({r.APIC_LVTT: 0x31})
    write(vcpu, r.APIC_TMICT, 1000)
    assert value(vcpu, r.APIC_TMCCT) == 1000
    write(vcpu, r.APIC_TDCR, 0xB)
    assert value(vcpu, r.APIC_TMCCT) == 1000
    assert not apic_has_pending_timer(vcpu)
    write(vcpu, r.APIC_TMICT, 0)
    assert value(vcpu, r.APIC_TMCCT) == 0


@pytest.mark.parametrize(("tdcr", "count"), [(0, 100_000), (3, 12_500), (0xB, 200_000), (0xA, 1562)])
def test_periodic_timers_are_not_fast(tdcr, count):
    vcpu = make({r.APIC_LVTT: PERIODIC | 0x31, r.APIC_TDCR: tdcr})
    write(vcpu, r.APIC_TMICT, 5)
    assert value(vcpu, r.APIC_TMCCT) == count


@pytest.mark.parametrize(
    ("mode", "initial", "current", "count", "pending"),
    [
        (0, 1000, 10, 10, False),
        (0, 1000, 2000, 1000, False),
        (0, 1000, 0, 0, True),
        (0, 0, 10, 0, False),
        (PERIODIC, 300_000, 0, 300_000, False),
        (PERIODIC, 300_000, 7, 7, False),
    ],
)
def test_saved_timers_go_on(mode, initial, current, count, pending):
    vcpu = make({r.APIC_LVTT: mode | 0x31, r.APIC_TMICT: initial, r.APIC_TMCCT: current})
    assert value(vcpu, r.APIC_TMCCT) == count
    assert apic_has_pending_timer(vcpu) is pending


def test_changing_to_deadline_mode_disarms():
    vcpu = make({r.APIC_LVTT: 0x31})
    write(vcpu, r.APIC_TMICT, 1000)
    write(vcpu, r.APIC_LVTT, PERIODIC | 0x31)
    assert value(vcpu, r.APIC_TMICT) == 1000
    write(vcpu, r.APIC_LVTT, DEADLINE | 0x31)
    assert (value(vcpu, r.APIC_TMICT), value(vcpu, r.APIC_TMCCT)) == (0, 0)
    write(vcpu, r.APIC_TMICT, 1000)  # ignored
    assert value(vcpu, r.APIC_TMICT) == 0


def test_deadline_needs_the_feature():
    vcpu = make_vcpu(knobs={"irqchip": True}, kvm={"lapic": {r.APIC_SPIV: 0x1FF}})
    write(vcpu, r.APIC_LVTT, DEADLINE | 0x31)
    assert value(vcpu, r.APIC_LVTT) == 0x31


@pytest.mark.parametrize(("deadline", "expires"), [(0, False), (500, True), (1000, True), (1001, False)])
def test_deadline_in_the_past_expires_at_once(deadline, expires):
    vcpu = make({r.APIC_LVTT: DEADLINE | 0x31})
    vcpu.msrs[MSR_IA32_TSC] = 1000
    assert kvm_set_msr(vcpu, MSR_IA32_TSC_DEADLINE, deadline) == 0
    assert kvm_get_msr(vcpu, MSR_IA32_TSC_DEADLINE) == (0, deadline)
    assert apic_has_pending_timer(vcpu) is expires
    kvm_inject_apic_timer_irqs(vcpu)
    assert bits(vcpu, r.APIC_IRR) == ({0x31} if expires else set())
    assert kvm_get_msr(vcpu, MSR_IA32_TSC_DEADLINE) == (0, 0 if expires else deadline)
    assert not apic_has_pending_timer(vcpu)


@pytest.mark.parametrize(("lvtt", "base"), [(0x31, XAPIC), (DEADLINE | 0x31, 0xFEE00100)])
def test_deadline_is_ignored_outside_its_mode(lvtt, base):
    vcpu = make({r.APIC_LVTT: lvtt}, base=base)
    assert kvm_set_msr(vcpu, MSR_IA32_TSC_DEADLINE, 5) == 0
    assert kvm_get_msr(vcpu, MSR_IA32_TSC_DEADLINE) == (0, 0)


def test_expired_periodic_timer_keeps_its_count():
    vcpu = make({r.APIC_LVTT: PERIODIC | 0x31, r.APIC_TMICT: 300_000})
    apic_of(vcpu).timer_pending = True
    kvm_inject_apic_timer_irqs(vcpu)
    kvm_inject_apic_timer_irqs(vcpu)  # nothing more
    assert bits(vcpu, r.APIC_IRR) == {0x31}
    assert value(vcpu, r.APIC_TMCCT) == 300_000


def test_apicv_accepts_without_an_event():
    vcpu = make(knobs={"enable_apicv": True})
    assert kvm_apic_set_irq(vcpu, r.APIC_DM_FIXED, 0x41, level=False, trig_mode=False) == 1
    assert vcpu.requests == set()
    assert bits(vcpu, r.APIC_IRR) == {0x41}


def test_masked_timer_is_not_pending():
    vcpu = make({r.APIC_LVTT: 0x10031, r.APIC_TMICT: 1000})
    assert apic_of(vcpu).timer_pending
    assert not apic_has_pending_timer(vcpu)
    write(vcpu, r.APIC_SPIV, 0xFF)
    assert not apic_of(vcpu).timer_pending


def test_performance_counter_masks_itself():
    vcpu = make({r.APIC_LVTPC: 0x41})
    assert kvm_apic_local_deliver(vcpu, r.APIC_LVTPC) == 1
    assert value(vcpu, r.APIC_LVTPC) == 0x10041
    assert kvm_apic_local_deliver(vcpu, r.APIC_LVTPC) == 0


# -- fastpath ----------------------------------------------------------------------------------


# fmt: off
FASTPATH_CASES = [
    (X2APIC, 0x830,                 0x41,                     {},                        "REENTER_GUEST"),
    (X2APIC, 0x830,                 0x41 | 5 << 32,           {},                        "REENTER_GUEST"),
    (X2APIC, 0x830,                 0x41 | 0xFFFFFFFF << 32,  {},                        "NONE"),
    (X2APIC, 0x830,                 0x41 | LOGICAL,           {},                        "NONE"),
    (X2APIC, 0x830,                 0x441,                    {},                        "NONE"),
    (X2APIC, 0x830,                 0x41 | r.APIC_DEST_SELF,  {},                        "NONE"),
    (X2APIC, 0x830,                 0x41 | 1 << 20,           {},                        "NONE"),
    (XAPIC,  0x830,                 0x41,                     {},                        "NONE"),
    (XAPIC,  MSR_IA32_TSC_DEADLINE, 5,                        {},                        "REENTER_GUEST"),
    (XAPIC,  MSR_IA32_TSC_DEADLINE, 5,                        {"mwait_in_guest": True},  "NONE"),
    (X2APIC, 0x808,                 5,                        {},                        "NONE"),
]
# fmt: on


@pytest.mark.parametrize(("base", "msr", "data", "knobs", "result"), FASTPATH_CASES)
def test_fastpath(base, msr, data, knobs, result):
    vcpu = make(base=base, knobs=knobs)
    vcpu.trace = Trace()
    vcpu.regs[1], vcpu.regs[0], vcpu.regs[2] = msr | 1 << 63, data & 0xFFFFFFFF, data >> 32
    vcpu.vmcs.hw_write(vf.VM_EXIT_INSTRUCTION_LEN, 2)
    rip = kvm_rip_read(vcpu)
    assert handle_fastpath_set_msr_irqoff(vcpu) == result
    assert kvm_rip_read(vcpu) == rip + (0 if result == "NONE" else 2)
    written = f"kvm_msr: msr_write {msr:x} = {data:#x}"
    assert (written in map(format_event, vcpu.trace.events)) is (result != "NONE")


def test_fastpath_stops_for_a_debugger():
    vcpu = make(base=X2APIC, rflags=2 | 1 << 8)
    vcpu.guest_debug = 3
    vcpu.regs[1], vcpu.regs[0], vcpu.regs[2] = 0x830, 0x41, 0
    assert handle_fastpath_set_msr_irqoff(vcpu) == "EXIT_USERSPACE"
    assert vcpu.run.exit_reason == "DEBUG"


def test_fastpath_without_an_apic():
    vcpu = make_vcpu()
    vcpu.regs[1] = 0x830
    assert handle_fastpath_set_msr_irqoff(vcpu) == "NONE"
    vcpu.regs[1] = MSR_IA32_TSC_DEADLINE
    assert handle_fastpath_set_msr_irqoff(vcpu) == "REENTER_GUEST"

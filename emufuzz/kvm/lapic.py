"""The in-kernel local APIC: its registers as the guest reads and writes them, through all doors.

KVM: kvm_lapic_reg_read, kvm_lapic_reg_write, apic_mmio_read, apic_mmio_write, kvm_x2apic_msr_read,
kvm_x2apic_msr_write, kvm_x2apic_icr_write, kvm_apic_write_nodecode, kvm_apic_set_state,
__kvm_apic_set_base, vmx_set_virtual_apic_mode. SDM Vol. 3A chapter 10.

The APIC belongs to a full in-kernel interrupt controller (KVM_CREATE_IRQCHIP). Reports of TPR accesses,
EOIs by shared memory and Xen's and async page faults' use of the APIC are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from emufuzz.kvm import lapic_regs as r
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.lapic_ipi import kvm_apic_send_ipi
from emufuzz.kvm.lapic_irq import (
    apic_of,
    apic_set_eoi,
    apic_set_tpr,
    apic_x2apic_mode,
    emit,
    kvm_apic_hw_enabled,
    kvm_apic_update_ppr,
)
from emufuzz.kvm.lapic_state import LapicState
from emufuzz.kvm.lapic_timer import (
    apic_get_tmcct,
    apic_update_lvtt,
    set_tmict,
    start_apic_timer,
    timer_mode_mask,
)
from emufuzz.kvm.msr_index import APIC_BASE_MSR
from emufuzz.kvm.vcpu import KVM_REQ_EVENT, KVM_REQ_TLB_FLUSH_CURRENT, Vcpu
from emufuzz.kvm.vmx_bits import (
    SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES,
    SECONDARY_EXEC_VIRTUALIZE_X2APIC_MODE,
)

X2APIC_MSRS: Final = range(APIC_BASE_MSR, APIC_BASE_MSR + 0x100)

_MASK32: Final = 0xFFFFFFFF
_READ: Final = "read"
_WRITE: Final = "write"


class LocalApic(LapicState):
    """The APIC as a device on the MMIO bus (kvm_iodevice_read, kvm_iodevice_write)."""

    __slots__ = ()

    @classmethod
    def from_registers(cls, registers: Mapping[int, int], *, lint0_reenabled: bool = True) -> LocalApic:
        """An APIC whose registers (byte offset, a multiple of 16 -> 32 bits) replace those after reset.

        Nothing is derived from them yet: `kvm_apic_set_state` does that, for the vCPU that gets it.
        """
        apic = cls(lint0_reenabled=lint0_reenabled)
        for reg, value in registers.items():
            apic.set_reg(reg, value)
        return apic

    def mmio_read(self, vcpu: Vcpu, gpa: int, size: int) -> bytes | None:
        """Answer a read of 1..8 bytes; None if it is not the APIC's.

        KVM deviation: a read that is refused leaves the emulator's buffer as it was; the model has zeros
        there (SDM Vol. 3A 10.4.1 leaves such accesses undefined).
        """
        return apic_mmio_read(vcpu, gpa, size)

    def mmio_write(self, vcpu: Vcpu, gpa: int, data: bytes) -> bool:
        """Take a write of 1..8 bytes; False if it is not the APIC's."""
        return apic_mmio_write(vcpu, gpa, data)


# -- registers ---------------------------------------------------------------------------------


def _read_register(vcpu: Vcpu, reg: int) -> int:
    """The value of a readable register (KVM: __apic_read)."""
    if reg == r.APIC_ARBPRI:
        return 0
    if reg == r.APIC_TMCCT:
        return apic_get_tmcct(vcpu)
    if reg == r.APIC_PROCPRI:
        kvm_apic_update_ppr(vcpu)
    return apic_of(vcpu).get_reg(reg)


def kvm_lapic_reg_read(vcpu: Vcpu, offset: int, size: int) -> bytes | None:
    """Read 1, 2 or 4 bytes within one register; None for what cannot be read."""
    if (offset & 0xF) + size > 4 or size == 3:
        return None
    reg = offset & ~0xF
    readable = r.APIC_READABLE if apic_x2apic_mode(vcpu) else r.XAPIC_READABLE
    if reg not in readable:
        return None
    value = _read_register(vcpu, reg)
    emit(vcpu, "kvm_apic", rw=_READ, reg=offset, val=value)
    start = offset & 0xF
    return value.to_bytes(4, "little")[start : start + size]


def kvm_lapic_reg_write(vcpu: Vcpu, reg: int, val: int) -> int:
    """Write 32 bits to a register: 0, or 1 if it cannot be written, which only x2APIC's MSRs tell.

    KVM deviation: a write to ESR neither latches nor clears errors; in x2APIC mode any value may be
    written to EOI (SDM Vol. 3A 10.5.3, 10.12.1.2).
    """
    emit(vcpu, "kvm_apic", rw=_WRITE, reg=reg, val=val)
    x2apic = apic_x2apic_mode(vcpu)
    if reg in r.APIC_LVT_WRITABLE:
        _write_lvt(vcpu, reg, val)
    elif reg == r.APIC_TASKPRI:
        apic_set_tpr(vcpu, val & 0xFF)
    elif reg == r.APIC_EOI:
        apic_set_eoi(vcpu)
    elif reg == r.APIC_SPIV:
        _write_spiv(vcpu, val)
    elif reg == r.APIC_TMICT:
        set_tmict(vcpu, val)
    elif reg == r.APIC_TDCR:
        apic_of(vcpu).set_reg(reg, val & r.APIC_TDCR_WRITABLE)
        apic_of(vcpu).update_divide_count()
    elif reg == r.APIC_ESR:
        return int(x2apic and val != 0)
    elif reg == r.APIC_SELF_IPI:
        if not x2apic or val & ~r.APIC_VECTOR_MASK:
            return 1
        kvm_apic_send_ipi(vcpu, r.APIC_DEST_SELF | val, 0)
    else:
        return 1 if x2apic else _write_xapic(vcpu, reg, val)
    return 0


def _write_xapic(vcpu: Vcpu, reg: int, val: int) -> int:
    """Registers that x2APIC mode does not have, or only to read."""
    apic = apic_of(vcpu)
    if reg == r.APIC_ID:
        apic.set_reg(reg, val & 0xFF000000)
    elif reg == r.APIC_LDR:
        apic.set_reg(reg, val & r.APIC_LDR_MASK)
    elif reg == r.APIC_DFR:
        apic.set_reg(reg, val | r.APIC_DFR_CLUSTER)
    elif reg == r.APIC_ICR2:
        apic.set_reg(reg, val & 0xFF000000)
    elif reg == r.APIC_ICR:
        val &= ~r.APIC_ICR_BUSY
        kvm_apic_send_ipi(vcpu, val, apic.get_reg(r.APIC_ICR2))
        apic.set_reg(reg, val)
    else:
        return 1
    return 0


def _write_lvt(vcpu: Vcpu, reg: int, val: int) -> None:
    """An LVT entry; all are masked while software has the APIC disabled (SDM Vol. 3A 10.4.7.2)."""
    apic = apic_of(vcpu)
    if not apic.sw_enabled:
        val |= r.APIC_LVT_MASKED
    writable = r.APIC_LVT_WRITABLE[reg]
    if reg == r.APIC_LVTT:
        writable |= timer_mode_mask(vcpu)
    apic.set_reg(reg, val & writable)
    if reg == r.APIC_LVTT:
        apic_update_lvtt(vcpu)


def _write_spiv(vcpu: Vcpu, val: int) -> None:
    apic = apic_of(vcpu)
    apic.set_spiv(val & r.APIC_SPIV_WRITABLE)
    if apic.sw_enabled:
        return
    for reg in r.APIC_LVT_WRITABLE:
        apic.set_reg(reg, apic.get_reg(reg) | r.APIC_LVT_MASKED)
    apic_update_lvtt(vcpu)
    apic.timer_pending = False


def kvm_lapic_set_eoi(vcpu: Vcpu) -> None:
    """End of interrupt, by a write to the APIC page that was not decoded."""
    kvm_lapic_reg_write(vcpu, r.APIC_EOI, 0)


# -- MMIO --------------------------------------------------------------------------------------


def _mmio_offset(vcpu: Vcpu, gpa: int) -> int | None:
    """The offset into the register page; None outside it.

    KVM deviation: bits above 31 of the APIC's base are ignored (SDM Vol. 3A 10.4.4).
    """
    offset = gpa - (vcpu.apic_base & r.MSR_IA32_APICBASE_BASE)
    return offset if 0 <= offset < r.LAPIC_MMIO_LENGTH else None


def apic_mmio_read(vcpu: Vcpu, gpa: int, size: int) -> bytes | None:
    """What `LocalApic.mmio_read` answers; of a disabled or x2APIC-mode page all ones, by a quirk."""
    offset = _mmio_offset(vcpu, gpa)
    if offset is None:
        return None
    if not kvm_apic_hw_enabled(vcpu) or apic_x2apic_mode(vcpu):
        return b"\xff" * size if vcpu.options.has_quirk("lapic_mmio_hole") else None
    data = kvm_lapic_reg_read(vcpu, offset, size)
    return bytes(size) if data is None else data


def apic_mmio_write(vcpu: Vcpu, gpa: int, data: bytes) -> bool:
    """What `LocalApic.mmio_write` does: only aligned writes of 4 bytes count, others are swallowed."""
    offset = _mmio_offset(vcpu, gpa)
    if offset is None:
        return False
    if not kvm_apic_hw_enabled(vcpu) or apic_x2apic_mode(vcpu):
        return vcpu.options.has_quirk("lapic_mmio_hole")
    if len(data) == 4 and not offset & 0xF:
        kvm_lapic_reg_write(vcpu, offset & 0xFF0, int.from_bytes(data, "little"))
    return True


def kvm_apic_write_nodecode(vcpu: Vcpu, offset: int) -> None:
    """Hardware has stored a value in the register page, and its effect is due (SDM Vol. 3C 29.4.3.3)."""
    apic = apic_of(vcpu)
    if apic_x2apic_mode(vcpu) and offset == r.APIC_ICR:
        kvm_x2apic_icr_write(vcpu, apic.get_icr64())
    else:
        kvm_lapic_reg_write(vcpu, offset, apic.get_reg(offset))


# -- x2APIC ------------------------------------------------------------------------------------


def kvm_x2apic_icr_write(vcpu: Vcpu, data: int) -> int:
    """Write x2APIC's 64-bit ICR: 0, or 1 for #GP because of reserved bits; the busy bit is dropped."""
    if data & r.X2APIC_ICR_RESERVED_BITS:
        return 1
    data &= ~r.APIC_ICR_BUSY
    kvm_apic_send_ipi(vcpu, data & _MASK32, data >> 32)
    apic_of(vcpu).set_icr64(data)
    emit(vcpu, "kvm_apic", rw=_WRITE, reg=r.APIC_ICR, val=data)
    return 0


def kvm_lapic_msr_read(vcpu: Vcpu, reg: int) -> tuple[int, int]:
    """(0, value) of a register by MSR, x2APIC's or Hyper-V's; (1, 0) for #GP."""
    if reg == r.APIC_ICR:
        return 0, apic_of(vcpu).get_icr64()
    data = kvm_lapic_reg_read(vcpu, reg, 4)
    return (1, 0) if data is None else (0, int.from_bytes(data, "little"))


def kvm_lapic_msr_write(vcpu: Vcpu, reg: int, data: int) -> int:
    """Write a register by MSR: 0, or 1 for #GP; only ICR has bits above 31."""
    if reg == r.APIC_ICR:
        return kvm_x2apic_icr_write(vcpu, data)
    return 1 if data >> 32 else kvm_lapic_reg_write(vcpu, reg, data)


def kvm_x2apic_msr_read(vcpu: Vcpu, index: int) -> tuple[int, int]:
    """RDMSR of 0x800..0x8ff: (0, value), or (1, 0) for #GP, as ever outside x2APIC mode."""
    if vcpu.apic is None or not apic_x2apic_mode(vcpu):
        return 1, 0
    return kvm_lapic_msr_read(vcpu, (index - APIC_BASE_MSR) << 4)


def kvm_x2apic_msr_write(vcpu: Vcpu, index: int, data: int) -> int:
    """WRMSR of 0x800..0x8ff: 0, or 1 for #GP."""
    if vcpu.apic is None or not apic_x2apic_mode(vcpu):
        return 1
    return kvm_lapic_msr_write(vcpu, (index - APIC_BASE_MSR) << 4, data)


# -- mode and state ----------------------------------------------------------------------------


def apic_base_changed(vcpu: Vcpu, old: int) -> None:
    """IA32_APIC_BASE was `old` until now: IDs and the kind of virtualization follow the mode."""
    apic, changed = vcpu.apic, vcpu.apic_base ^ old
    if apic is None or not changed & (r.MSR_IA32_APICBASE_ENABLE | r.X2APIC_ENABLE):
        return
    if changed & r.X2APIC_ENABLE and vcpu.apic_base & r.X2APIC_ENABLE:
        _set_x2apic_id(apic)
    elif kvm_apic_hw_enabled(vcpu):
        apic.set_reg(r.APIC_ID, 0)
    _vmx_set_virtual_apic_mode(vcpu)


def _set_x2apic_id(apic: LocalApic) -> None:
    """ID 0, and the logical ID that follows from it: bit 0 of cluster 0 (SDM Vol. 3A 10.12.10.2)."""
    apic.set_reg(r.APIC_ID, 0)
    apic.set_reg(r.APIC_LDR, 1)


def _vmx_set_virtual_apic_mode(vcpu: Vcpu) -> None:
    """Accesses of xAPIC mode exit by their page, x2APIC's MSRs are hardware's; put off while L2 runs."""
    if vcpu.guest_mode is not None:
        return
    controls = vcpu.vmcs.read(vf.SECONDARY_VM_EXEC_CONTROL)
    controls &= ~(SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES | SECONDARY_EXEC_VIRTUALIZE_X2APIC_MODE)
    if apic_x2apic_mode(vcpu):
        controls |= SECONDARY_EXEC_VIRTUALIZE_X2APIC_MODE
    elif kvm_apic_hw_enabled(vcpu) and vcpu.options.flexpriority:
        controls |= SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES
        vcpu.make_request(KVM_REQ_TLB_FLUSH_CURRENT)
    vcpu.vmcs.write(vf.SECONDARY_VM_EXEC_CONTROL, controls)


def kvm_apic_get_state(vcpu: Vcpu) -> dict[int, int]:
    """All registers by byte offset, as userspace gets them (ioctl KVM_GET_LAPIC)."""
    apic = apic_of(vcpu)
    registers = {reg: apic.get_reg(reg) for reg in range(0, r.APIC_SELF_IPI, 0x10)}
    registers[r.APIC_TMCCT] = apic_get_tmcct(vcpu)
    if apic_x2apic_mode(vcpu):
        registers[r.APIC_ICR2] = apic.get_icr64() >> 32
    return registers


def kvm_apic_set_state(vcpu: Vcpu, state: LocalApic) -> None:
    """Userspace loads the registers of `state` (ioctl KVM_SET_LAPIC), and what follows from them is derived.

    In x2APIC mode the IDs are KVM's own. A one-shot timer with an initial but no current count has
    expired.
    """
    apic = apic_of(vcpu)
    apic.regs[:] = state.regs
    apic.set_spiv(apic.get_reg(r.APIC_SPIV))
    if apic_x2apic_mode(vcpu):
        _set_x2apic_id(apic)
        apic.set_icr64(apic.get_reg(r.APIC_ICR) | apic.get_reg(r.APIC_ICR2) << 32)
    apic.set_version()
    kvm_apic_update_ppr(vcpu)
    apic_update_lvtt(vcpu)
    apic.update_divide_count()
    start_apic_timer(vcpu, at=apic.get_reg(r.APIC_TMCCT))
    apic.set_reg(r.APIC_TMCCT, 0)
    vcpu.make_request(KVM_REQ_EVENT)

"""The state of the in-kernel local APIC: its register page, and what KVM remembers beside it.

KVM: struct kvm_lapic, kvm_lapic_reset, kvm_lapic_get_reg, find_highest_vector.
"""

from __future__ import annotations

import struct
from typing import Final

from emufuzz.kvm import lapic_regs as r

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


class LapicState:
    """One vCPU's local APIC after reset, with APIC ID 0. There is no time, so timers only keep counts.

    `regs` is the page that the guest sees. `timer_pending` tells that the timer has expired and its
    interrupt is still to be delivered; `timer_count` is the current count; `tscdeadline` is
    IA32_TSC_DEADLINE. `pending_events` holds "INIT" and "SIPI"; `pv_unhalted` a kick by hypercall.
    """

    __slots__ = (
        "divide_count", "pending_events", "pv_unhalted", "regs", "sipi_vector", "sw_enabled",
        "timer_count", "timer_mode", "timer_pending", "tscdeadline",
    )  # fmt: skip

    def __init__(self, *, lint0_reenabled: bool = True) -> None:
        self.regs = bytearray(r.LAPIC_MMIO_LENGTH)
        self.sw_enabled = False
        self.timer_mode = r.APIC_LVT_TIMER_ONESHOT
        self.timer_pending = False
        self.timer_count = 0
        self.tscdeadline = 0
        self.divide_count = 2
        self.pending_events: set[str] = set()
        self.sipi_vector = 0
        self.pv_unhalted = False
        self.set_version()
        for reg in r.APIC_LVT_WRITABLE:
            self.set_reg(reg, r.APIC_LVT_MASKED)
        if lint0_reenabled:
            # KVM deviation: LINT0 of the bootstrap processor is ExtINT, not masked (SDM Vol. 3A 10.5.1)
            self.set_reg(r.APIC_LVT0, r.APIC_DM_EXTINT)
        self.set_reg(r.APIC_DFR, r.APIC_DFR_FLAT)
        self.set_reg(r.APIC_SPIV, 0xFF)

    def set_version(self) -> None:
        """Version and number of LVT entries (KVM: kvm_apic_set_version, with an in-kernel I/O APIC)."""
        self.set_reg(r.APIC_LVR, r.APIC_VERSION | (len(r.APIC_LVT_WRITABLE) - 1) << 16)

    def get_reg(self, reg: int) -> int:
        """The 32 bits at an offset, as stored."""
        value: int = _U32.unpack_from(self.regs, reg)[0]
        return value

    def set_reg(self, reg: int, value: int) -> None:
        """Store 32 bits, without effects."""
        _U32.pack_into(self.regs, reg, value)

    def get_icr64(self) -> int:
        """x2APIC's ICR: on Intel hosts one 64-bit register (KVM: kvm_x2apic_icr_read)."""
        value: int = _U64.unpack_from(self.regs, r.APIC_ICR)[0]
        return value

    def set_icr64(self, value: int) -> None:
        """Store x2APIC's ICR."""
        _U64.pack_into(self.regs, r.APIC_ICR, value)

    def set_spiv(self, value: int) -> None:
        """Store the spurious-interrupt vector register, whose bit 8 enables the APIC (KVM: apic_set_spiv)."""
        self.set_reg(r.APIC_SPIV, value)
        self.sw_enabled = bool(value & r.APIC_SPIV_APIC_ENABLED)

    def update_divide_count(self) -> None:
        """Decode the divide configuration: 2, 4 .. 128, 1 (SDM Vol. 3A Figure 10-10)."""
        tdcr = self.get_reg(r.APIC_TDCR)
        self.divide_count = 1 << ((tdcr & 3 | (tdcr & 8) >> 1) + 1 & 7)

    def test_vector(self, vector: int, bitmap: int) -> bool:
        """A vector's bit in ISR, TMR or IRR."""
        return bool(self.regs[bitmap + (vector >> 5) * 16 + (vector >> 3 & 3)] >> (vector & 7) & 1)

    def set_vector(self, vector: int, bitmap: int) -> None:
        """Set it."""
        self.regs[bitmap + (vector >> 5) * 16 + (vector >> 3 & 3)] |= 1 << (vector & 7)

    def clear_vector(self, vector: int, bitmap: int) -> None:
        """Clear it."""
        self.regs[bitmap + (vector >> 5) * 16 + (vector >> 3 & 3)] &= ~(1 << (vector & 7)) & 0xFF

    def find_highest_vector(self, bitmap: int) -> int:
        """The highest vector of ISR, TMR or IRR; -1 if there is none."""
        for index in range(7, -1, -1):
            value = self.get_reg(bitmap + index * 16)
            if value:
                return index * 32 + value.bit_length() - 1
        return -1

"""Registers of the local APIC: their offsets and bits (SDM Vol. 3A 10.4, Table 10-1; 10.12 x2APIC)."""

from __future__ import annotations

from typing import Final

# fmt: off
APIC_ID:       Final = 0x020
APIC_LVR:      Final = 0x030  # version
APIC_TASKPRI:  Final = 0x080
APIC_ARBPRI:   Final = 0x090
APIC_PROCPRI:  Final = 0x0A0
APIC_EOI:      Final = 0x0B0
APIC_LDR:      Final = 0x0D0
APIC_DFR:      Final = 0x0E0
APIC_SPIV:     Final = 0x0F0
APIC_ISR:      Final = 0x100  # eight registers each of ISR, TMR and IRR
APIC_TMR:      Final = 0x180
APIC_IRR:      Final = 0x200
APIC_ESR:      Final = 0x280
APIC_LVTCMCI:  Final = 0x2F0
APIC_ICR:      Final = 0x300
APIC_ICR2:     Final = 0x310
APIC_LVTT:     Final = 0x320
APIC_LVTTHMR:  Final = 0x330
APIC_LVTPC:    Final = 0x340
APIC_LVT0:     Final = 0x350
APIC_LVT1:     Final = 0x360
APIC_LVTERR:   Final = 0x370
APIC_TMICT:    Final = 0x380
APIC_TMCCT:    Final = 0x390
APIC_TDCR:     Final = 0x3E0
APIC_SELF_IPI: Final = 0x3F0

# IA32_APIC_BASE
MSR_IA32_APICBASE_ENABLE: Final = 1 << 11
X2APIC_ENABLE:            Final = 1 << 10
#: KVM keeps 20 bits of page number, so the registers never lie above 4 GiB.
MSR_IA32_APICBASE_BASE:   Final = 0xFFFFF000
LAPIC_MMIO_LENGTH:        Final = 0x1000

APIC_VERSION:             Final = 0x14
APIC_SPIV_APIC_ENABLED:   Final = 1 << 8
APIC_SPIV_WRITABLE:       Final = 0x3FF
APIC_LDR_MASK:            Final = 0xFF000000
APIC_DFR_CLUSTER:         Final = 0x0FFFFFFF
APIC_DFR_FLAT:            Final = 0xFFFFFFFF
APIC_TDCR_WRITABLE:       Final = 0xB

# ICR and, as far as they are the same, LVT entries
APIC_VECTOR_MASK:         Final = 0xFF
APIC_MODE_MASK:           Final = 0x700
APIC_DM_FIXED:            Final = 0x000
APIC_DM_LOWEST:           Final = 0x100
APIC_DM_SMI:              Final = 0x200
APIC_DM_REMRD:            Final = 0x300
APIC_DM_NMI:              Final = 0x400
APIC_DM_INIT:             Final = 0x500
APIC_DM_STARTUP:          Final = 0x600
APIC_DM_EXTINT:           Final = 0x700
APIC_DEST_MASK:           Final = 0x800
APIC_DEST_PHYSICAL:       Final = 0x000
APIC_ICR_BUSY:            Final = 0x1000
APIC_INT_ASSERT:          Final = 0x4000
APIC_INT_LEVELTRIG:       Final = 0x8000
APIC_SHORT_MASK:          Final = 0xC0000
APIC_DEST_NOSHORT:        Final = 0x00000
APIC_DEST_SELF:           Final = 0x40000
APIC_DEST_ALLINC:         Final = 0x80000
APIC_DEST_ALLBUT:         Final = 0xC0000
APIC_BROADCAST:           Final = 0xFF
X2APIC_BROADCAST:         Final = 0xFFFFFFFF
X2APIC_ICR_RESERVED_BITS: Final = 0xFFF00000 | 0x30000 | 1 << 13

APIC_SEND_PENDING:        Final = 1 << 12
APIC_INPUT_POLARITY:      Final = 1 << 13
APIC_LVT_REMOTE_IRR:      Final = 1 << 14
APIC_LVT_LEVEL_TRIGGER:   Final = 1 << 15
APIC_LVT_MASKED:          Final = 1 << 16
APIC_LVT_TIMER_ONESHOT:     Final = 0 << 17
APIC_LVT_TIMER_PERIODIC:    Final = 1 << 17
APIC_LVT_TIMER_TSCDEADLINE: Final = 2 << 17

_LVT:  Final = APIC_LVT_MASKED | APIC_SEND_PENDING | APIC_VECTOR_MASK
_LINT: Final = _LVT | APIC_MODE_MASK | APIC_INPUT_POLARITY | APIC_LVT_REMOTE_IRR | APIC_LVT_LEVEL_TRIGGER

#: LVT entry -> its writable bits; the timer's mode is added by what CPUID offers. There is no CMCI
#: entry, as IA32_MCG_CAP (`emufuzz.kvm.mce`) has no corrected-error interrupts.
APIC_LVT_WRITABLE: Final = {
    APIC_LVTT:    _LVT,
    APIC_LVTTHMR: _LVT | APIC_MODE_MASK,
    APIC_LVTPC:   _LVT | APIC_MODE_MASK,
    APIC_LVT0:    _LINT,
    APIC_LVT1:    _LINT,
    APIC_LVTERR:  _LVT,
}
# fmt: on

#: Registers that can be read in both modes; those that only xAPIC mode has.
APIC_READABLE: Final = frozenset({
    APIC_ID, APIC_LVR, APIC_TASKPRI, APIC_PROCPRI, APIC_LDR, APIC_SPIV, APIC_ESR, APIC_ICR, APIC_TMICT,
    APIC_TMCCT, APIC_TDCR, *APIC_LVT_WRITABLE, *range(APIC_ISR, APIC_ESR, 0x10),
})  # fmt: skip
XAPIC_READABLE: Final = APIC_READABLE | {APIC_ARBPRI, APIC_DFR, APIC_ICR2}

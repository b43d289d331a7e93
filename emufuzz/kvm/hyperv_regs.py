"""Hyper-V's hypercalls and MSRs: numbers, bits, and the state that they change.

Microsoft, "Hypervisor Top-Level Functional Specification", 3 "Hypercall Interface".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

# fmt: off
HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE:    Final = 0x0002
HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST:     Final = 0x0003
HVCALL_NOTIFY_LONG_SPIN_WAIT:          Final = 0x0008
HVCALL_SEND_IPI:                       Final = 0x000B
HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX: Final = 0x0013
HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX:  Final = 0x0014
HVCALL_SEND_IPI_EX:                    Final = 0x0015
HVCALL_POST_MESSAGE:                   Final = 0x005C
HVCALL_SIGNAL_EVENT:                   Final = 0x005D
HVCALL_POST_DEBUG_DATA:                Final = 0x0069
HVCALL_RETRIEVE_DEBUG_DATA:            Final = 0x006A
HVCALL_RESET_DEBUG_SESSION:            Final = 0x006B
#: Extended hypercalls, HV_EXT_CALL_QUERY_CAPABILITIES to HV_EXT_CALL_MAX.
HV_EXT_CALLS:                          Final = range(0x8001, 0x8001 + 64 + 1)

HV_STATUS_SUCCESS:                     Final = 0
HV_STATUS_INVALID_HYPERCALL_CODE:      Final = 2
HV_STATUS_INVALID_HYPERCALL_INPUT:     Final = 3
HV_STATUS_INVALID_ALIGNMENT:           Final = 4
HV_STATUS_INVALID_PARAMETER:           Final = 5
HV_STATUS_OPERATION_DENIED:            Final = 8
HV_STATUS_INVALID_PORT_ID:             Final = 17

# The control word
HV_HYPERCALL_FAST_BIT:                 Final = 1 << 16
HV_HYPERCALL_VARHEAD_OFFSET:           Final = 17
HV_HYPERCALL_VARHEAD_MASK:             Final = 0x3FF
HV_HYPERCALL_REP_COMP_OFFSET:          Final = 32
HV_HYPERCALL_REP_START_OFFSET:         Final = 48
HV_HYPERCALL_REP_MASK:                 Final = 0xFFF
HV_HYPERCALL_RSVD_MASK:                Final = 0xF << 60 | 0xF << 44 | 0x1F << 27
HV_HYPERCALL_MAX_XMM_REGISTERS:        Final = 6

HV_FLUSH_ALL_PROCESSORS:               Final = 1 << 0
HV_GENERIC_SET_SPARSE_4K:              Final = 0
HV_GENERIC_SET_ALL:                    Final = 1
HV_IPI_LOW_VECTOR:                     Final = 0x10
HV_IPI_HIGH_VECTOR:                    Final = 0xFF

HV_X64_MSR_GUEST_OS_ID:                Final = 0x40000000
HV_X64_MSR_HYPERCALL:                  Final = 0x40000001
HV_X64_MSR_VP_INDEX:                   Final = 0x40000002
HV_X64_MSR_RESET:                      Final = 0x40000003
HV_X64_MSR_TIME_REF_COUNT:             Final = 0x40000020
HV_X64_MSR_EOI:                        Final = 0x40000070
HV_X64_MSR_ICR:                        Final = 0x40000071
HV_X64_MSR_TPR:                        Final = 0x40000072
HV_X64_MSR_SINT15:                     Final = 0x4000009F
HV_X64_MSR_STIMERS:                    Final = range(0x400000B0, 0x400000B8)
HV_X64_MSR_SYNDBG:                     Final = range(0x400000F1, 0x400000F6)
HV_X64_MSR_SYNDBG_OPTIONS:             Final = 0x400000FF
HV_X64_MSR_CRASH:                      Final = range(0x40000100, 0x40000106)
HV_X64_MSR_REENLIGHTENMENT_CONTROL:    Final = 0x40000106
HV_X64_MSR_TSC_EMULATION_CONTROL:      Final = 0x40000107
HV_X64_MSR_TSC_EMULATION_STATUS:       Final = 0x40000108
HV_X64_MSR_TSC_INVARIANT_CONTROL:      Final = 0x40000118
HV_X64_MSR_HYPERCALL_ENABLE:           Final = 1
HV_X64_SYNDBG_OPTION_USE_HCALLS:       Final = 1 << 2

HYPERV_CPUID_INTERFACE:                Final = 0x40000001
HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES: Final = 0x40000082
HYPERV_CPUID_SIGNATURE_EAX:            Final = 0x31237648  # "Hv#1"
HV_X64_SYNDBG_CAP_ALLOW_KERNEL_DEBUGGING:  Final = 1 << 1
# fmt: on

#: Every MSR number that KVM takes for one of Hyper-V's.
HV_MSRS: Final = frozenset({
    *range(HV_X64_MSR_GUEST_OS_ID, HV_X64_MSR_SINT15 + 1), *HV_X64_MSR_STIMERS, *HV_X64_MSR_SYNDBG,
    HV_X64_MSR_SYNDBG_OPTIONS, *HV_X64_MSR_CRASH, HV_X64_MSR_REENLIGHTENMENT_CONTROL,
    HV_X64_MSR_TSC_EMULATION_CONTROL, HV_X64_MSR_TSC_EMULATION_STATUS, HV_X64_MSR_TSC_INVARIANT_CONTROL,
})  # fmt: skip

#: TLB entries that can be asked for one by one; and the mark for all of them.
KVM_HV_TLB_FLUSH_FIFO_SIZE: Final = 16
KVM_HV_TLB_FLUSHALL_ENTRY: Final = (1 << 64) - 1
#: Banks of 64 virtual processors that KVM looks at (1024 vCPUs).
KVM_HV_MAX_SPARSE_VCPU_SET_BITS: Final = 16


@dataclass(slots=True)
class KvmHv:
    """The guest's Hyper-V partition, and this vCPU's part of it.

    `tlb_flush_fifo` holds addresses with the number of further pages in bits 11:0.
    """

    guest_os_id: int = 0
    hypercall: int = 0
    syndbg_options: int = 0
    msrs: dict[int, int] = field(default_factory=dict)
    tlb_flush_fifo: list[int] = field(default_factory=list)

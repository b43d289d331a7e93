"""Bits of VMCS fields: execution controls, event information, access rights.

SDM Vol. 3C 24.4 (guest state), 24.6 (execution controls), 24.7, 24.8 (exit and entry controls).
"""

from __future__ import annotations

from typing import Final

# fmt: off
PIN_BASED_EXT_INTR_MASK:                Final = 1 << 0
PIN_BASED_NMI_EXITING:                  Final = 1 << 3
PIN_BASED_VIRTUAL_NMIS:                 Final = 1 << 5
PIN_BASED_VMX_PREEMPTION_TIMER:         Final = 1 << 6
PIN_BASED_POSTED_INTR:                  Final = 1 << 7

CPU_BASED_INTR_WINDOW_EXITING:          Final = 1 << 2
CPU_BASED_USE_TSC_OFFSETTING:           Final = 1 << 3
CPU_BASED_HLT_EXITING:                  Final = 1 << 7
CPU_BASED_INVLPG_EXITING:               Final = 1 << 9
CPU_BASED_MWAIT_EXITING:                Final = 1 << 10
CPU_BASED_RDPMC_EXITING:                Final = 1 << 11
CPU_BASED_RDTSC_EXITING:                Final = 1 << 12
CPU_BASED_CR3_LOAD_EXITING:             Final = 1 << 15
CPU_BASED_CR3_STORE_EXITING:            Final = 1 << 16
CPU_BASED_ACTIVATE_TERTIARY_CONTROLS:   Final = 1 << 17
CPU_BASED_CR8_LOAD_EXITING:             Final = 1 << 19
CPU_BASED_CR8_STORE_EXITING:            Final = 1 << 20
CPU_BASED_TPR_SHADOW:                   Final = 1 << 21
CPU_BASED_NMI_WINDOW_EXITING:           Final = 1 << 22
CPU_BASED_MOV_DR_EXITING:               Final = 1 << 23
CPU_BASED_UNCOND_IO_EXITING:            Final = 1 << 24
CPU_BASED_USE_IO_BITMAPS:               Final = 1 << 25
CPU_BASED_MONITOR_TRAP_FLAG:            Final = 1 << 27
CPU_BASED_USE_MSR_BITMAPS:              Final = 1 << 28
CPU_BASED_MONITOR_EXITING:              Final = 1 << 29
CPU_BASED_PAUSE_EXITING:                Final = 1 << 30
CPU_BASED_ACTIVATE_SECONDARY_CONTROLS:  Final = 1 << 31

SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES: Final = 1 << 0
SECONDARY_EXEC_ENABLE_EPT:              Final = 1 << 1
SECONDARY_EXEC_DESC:                    Final = 1 << 2
SECONDARY_EXEC_ENABLE_RDTSCP:           Final = 1 << 3
SECONDARY_EXEC_VIRTUALIZE_X2APIC_MODE:  Final = 1 << 4
SECONDARY_EXEC_ENABLE_VPID:             Final = 1 << 5
SECONDARY_EXEC_WBINVD_EXITING:          Final = 1 << 6
SECONDARY_EXEC_UNRESTRICTED_GUEST:      Final = 1 << 7
SECONDARY_EXEC_APIC_REGISTER_VIRT:      Final = 1 << 8
SECONDARY_EXEC_VIRTUAL_INTR_DELIVERY:   Final = 1 << 9
SECONDARY_EXEC_PAUSE_LOOP_EXITING:      Final = 1 << 10
SECONDARY_EXEC_RDRAND_EXITING:          Final = 1 << 11
SECONDARY_EXEC_ENABLE_INVPCID:          Final = 1 << 12
SECONDARY_EXEC_ENABLE_VMFUNC:           Final = 1 << 13
SECONDARY_EXEC_SHADOW_VMCS:             Final = 1 << 14
SECONDARY_EXEC_ENCLS_EXITING:           Final = 1 << 15
SECONDARY_EXEC_RDSEED_EXITING:          Final = 1 << 16
SECONDARY_EXEC_ENABLE_PML:              Final = 1 << 17
SECONDARY_EXEC_ENABLE_XSAVES:           Final = 1 << 20
SECONDARY_EXEC_TSC_SCALING:             Final = 1 << 25
SECONDARY_EXEC_ENABLE_USR_WAIT_PAUSE:   Final = 1 << 26
SECONDARY_EXEC_BUS_LOCK_DETECTION:      Final = 1 << 30
SECONDARY_EXEC_NOTIFY_VM_EXITING:       Final = 1 << 31

VM_EXIT_SAVE_DEBUG_CONTROLS:            Final = 1 << 2
VM_EXIT_HOST_ADDR_SPACE_SIZE:           Final = 1 << 9
VM_EXIT_LOAD_IA32_PERF_GLOBAL_CTRL:     Final = 1 << 12
VM_EXIT_ACK_INTR_ON_EXIT:               Final = 1 << 15
VM_EXIT_SAVE_IA32_PAT:                  Final = 1 << 18
VM_EXIT_LOAD_IA32_PAT:                  Final = 1 << 19
VM_EXIT_SAVE_IA32_EFER:                 Final = 1 << 20
VM_EXIT_LOAD_IA32_EFER:                 Final = 1 << 21
VM_EXIT_SAVE_VMX_PREEMPTION_TIMER:      Final = 1 << 22

VM_ENTRY_LOAD_DEBUG_CONTROLS:           Final = 1 << 2
VM_ENTRY_IA32E_MODE:                    Final = 1 << 9
VM_ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL:    Final = 1 << 13
VM_ENTRY_LOAD_IA32_PAT:                 Final = 1 << 14
VM_ENTRY_LOAD_IA32_EFER:                Final = 1 << 15

# Interruption information, of exits, of vectoring and for entries
INTR_INFO_VECTOR_MASK:                  Final = 0xFF
INTR_INFO_INTR_TYPE_MASK:               Final = 0x700
INTR_INFO_DELIVER_CODE_MASK:            Final = 0x800
INTR_INFO_UNBLOCK_NMI:                  Final = 0x1000
INTR_INFO_VALID_MASK:                   Final = 0x80000000
INTR_TYPE_EXT_INTR:                     Final = 0 << 8
INTR_TYPE_NMI_INTR:                     Final = 2 << 8
INTR_TYPE_HARD_EXCEPTION:               Final = 3 << 8
INTR_TYPE_SOFT_INTR:                    Final = 4 << 8
INTR_TYPE_PRIV_SW_EXCEPTION:            Final = 5 << 8
INTR_TYPE_SOFT_EXCEPTION:               Final = 6 << 8
INTR_TYPE_OTHER_EVENT:                  Final = 7 << 8

# GUEST_INTERRUPTIBILITY_INFO, GUEST_ACTIVITY_STATE
GUEST_INTR_STATE_STI:                   Final = 1 << 0
GUEST_INTR_STATE_MOV_SS:                Final = 1 << 1
GUEST_INTR_STATE_SMI:                   Final = 1 << 2
GUEST_INTR_STATE_NMI:                   Final = 1 << 3
GUEST_ACTIVITY_ACTIVE:                  Final = 0
GUEST_ACTIVITY_HLT:                     Final = 1

# Access rights of segments
VMX_AR_TYPE_MASK:                       Final = 0x0F
VMX_AR_TYPE_ACCESSES_MASK:              Final = 0x01
VMX_AR_TYPE_WRITEABLE_MASK:             Final = 0x04  # the bit that this name has in KVM: conforming
VMX_AR_TYPE_CODE_MASK:                  Final = 0x08
VMX_AR_TYPE_BUSY_64_TSS:                Final = 0x0B
VMX_AR_UNUSABLE:                        Final = 1 << 16
# fmt: on

"""Encodings of the VMCS fields (SDM Vol. 3D Appendix B "Field Encoding in VMCS").

The upper half of a 64-bit field has the encoding of the field plus 1; `emufuzz.kvm.vmcs` decodes
width and type from the number. Names are those of KVM.
"""

from __future__ import annotations

from typing import Final

# fmt: off
# 16-bit control fields
VIRTUAL_PROCESSOR_ID:          Final = 0x0000
POSTED_INTR_NV:                Final = 0x0002
LAST_PID_POINTER_INDEX:        Final = 0x0008

# 16-bit guest-state fields
GUEST_ES_SELECTOR:             Final = 0x0800
GUEST_CS_SELECTOR:             Final = 0x0802
GUEST_SS_SELECTOR:             Final = 0x0804
GUEST_DS_SELECTOR:             Final = 0x0806
GUEST_FS_SELECTOR:             Final = 0x0808
GUEST_GS_SELECTOR:             Final = 0x080A
GUEST_LDTR_SELECTOR:           Final = 0x080C
GUEST_TR_SELECTOR:             Final = 0x080E
GUEST_INTR_STATUS:             Final = 0x0810
GUEST_PML_INDEX:               Final = 0x0812

# 16-bit host-state fields
HOST_ES_SELECTOR:              Final = 0x0C00
HOST_CS_SELECTOR:              Final = 0x0C02
HOST_SS_SELECTOR:              Final = 0x0C04
HOST_DS_SELECTOR:              Final = 0x0C06
HOST_FS_SELECTOR:              Final = 0x0C08
HOST_GS_SELECTOR:              Final = 0x0C0A
HOST_TR_SELECTOR:              Final = 0x0C0C

# 64-bit control fields
IO_BITMAP_A:                   Final = 0x2000
IO_BITMAP_B:                   Final = 0x2002
MSR_BITMAP:                    Final = 0x2004
VM_EXIT_MSR_STORE_ADDR:        Final = 0x2006
VM_EXIT_MSR_LOAD_ADDR:         Final = 0x2008
VM_ENTRY_MSR_LOAD_ADDR:        Final = 0x200A
PML_ADDRESS:                   Final = 0x200E
TSC_OFFSET:                    Final = 0x2010
VIRTUAL_APIC_PAGE_ADDR:        Final = 0x2012
APIC_ACCESS_ADDR:              Final = 0x2014
POSTED_INTR_DESC_ADDR:         Final = 0x2016
VM_FUNCTION_CONTROL:           Final = 0x2018
EPT_POINTER:                   Final = 0x201A
EOI_EXIT_BITMAP0:              Final = 0x201C
EOI_EXIT_BITMAP1:              Final = 0x201E
EOI_EXIT_BITMAP2:              Final = 0x2020
EOI_EXIT_BITMAP3:              Final = 0x2022
EPTP_LIST_ADDRESS:             Final = 0x2024
VMREAD_BITMAP:                 Final = 0x2026
VMWRITE_BITMAP:                Final = 0x2028
VE_INFORMATION_ADDRESS:        Final = 0x202A
XSS_EXIT_BITMAP:               Final = 0x202C
ENCLS_EXITING_BITMAP:          Final = 0x202E
TSC_MULTIPLIER:                Final = 0x2032
TERTIARY_VM_EXEC_CONTROL:      Final = 0x2034
PID_POINTER_TABLE:             Final = 0x2042

# 64-bit read-only data fields
GUEST_PHYSICAL_ADDRESS:        Final = 0x2400

# 64-bit guest-state fields
VMCS_LINK_POINTER:             Final = 0x2800
GUEST_IA32_DEBUGCTL:           Final = 0x2802
GUEST_IA32_PAT:                Final = 0x2804
GUEST_IA32_EFER:               Final = 0x2806
GUEST_IA32_PERF_GLOBAL_CTRL:   Final = 0x2808
GUEST_PDPTR0:                  Final = 0x280A
GUEST_PDPTR1:                  Final = 0x280C
GUEST_PDPTR2:                  Final = 0x280E
GUEST_PDPTR3:                  Final = 0x2810
GUEST_BNDCFGS:                 Final = 0x2812
GUEST_IA32_RTIT_CTL:           Final = 0x2814

# 64-bit host-state fields
HOST_IA32_PAT:                 Final = 0x2C00
HOST_IA32_EFER:                Final = 0x2C02
HOST_IA32_PERF_GLOBAL_CTRL:    Final = 0x2C04

# 32-bit control fields
PIN_BASED_VM_EXEC_CONTROL:     Final = 0x4000
CPU_BASED_VM_EXEC_CONTROL:     Final = 0x4002
EXCEPTION_BITMAP:              Final = 0x4004
PAGE_FAULT_ERROR_CODE_MASK:    Final = 0x4006
PAGE_FAULT_ERROR_CODE_MATCH:   Final = 0x4008
CR3_TARGET_COUNT:              Final = 0x400A
VM_EXIT_CONTROLS:              Final = 0x400C
VM_EXIT_MSR_STORE_COUNT:       Final = 0x400E
VM_EXIT_MSR_LOAD_COUNT:        Final = 0x4010
VM_ENTRY_CONTROLS:             Final = 0x4012
VM_ENTRY_MSR_LOAD_COUNT:       Final = 0x4014
VM_ENTRY_INTR_INFO_FIELD:      Final = 0x4016
VM_ENTRY_EXCEPTION_ERROR_CODE: Final = 0x4018
VM_ENTRY_INSTRUCTION_LEN:      Final = 0x401A
TPR_THRESHOLD:                 Final = 0x401C
SECONDARY_VM_EXEC_CONTROL:     Final = 0x401E
PLE_GAP:                       Final = 0x4020
PLE_WINDOW:                    Final = 0x4022
NOTIFY_WINDOW:                 Final = 0x4024

# 32-bit read-only data fields
VM_INSTRUCTION_ERROR:          Final = 0x4400
VM_EXIT_REASON:                Final = 0x4402
VM_EXIT_INTR_INFO:             Final = 0x4404
VM_EXIT_INTR_ERROR_CODE:       Final = 0x4406
IDT_VECTORING_INFO_FIELD:      Final = 0x4408
IDT_VECTORING_ERROR_CODE:      Final = 0x440A
VM_EXIT_INSTRUCTION_LEN:       Final = 0x440C
VMX_INSTRUCTION_INFO:          Final = 0x440E

# 32-bit guest-state fields
GUEST_ES_LIMIT:                Final = 0x4800
GUEST_CS_LIMIT:                Final = 0x4802
GUEST_SS_LIMIT:                Final = 0x4804
GUEST_DS_LIMIT:                Final = 0x4806
GUEST_FS_LIMIT:                Final = 0x4808
GUEST_GS_LIMIT:                Final = 0x480A
GUEST_LDTR_LIMIT:              Final = 0x480C
GUEST_TR_LIMIT:                Final = 0x480E
GUEST_GDTR_LIMIT:              Final = 0x4810
GUEST_IDTR_LIMIT:              Final = 0x4812
GUEST_ES_AR_BYTES:             Final = 0x4814
GUEST_CS_AR_BYTES:             Final = 0x4816
GUEST_SS_AR_BYTES:             Final = 0x4818
GUEST_DS_AR_BYTES:             Final = 0x481A
GUEST_FS_AR_BYTES:             Final = 0x481C
GUEST_GS_AR_BYTES:             Final = 0x481E
GUEST_LDTR_AR_BYTES:           Final = 0x4820
GUEST_TR_AR_BYTES:             Final = 0x4822
GUEST_INTERRUPTIBILITY_INFO:   Final = 0x4824
GUEST_ACTIVITY_STATE:          Final = 0x4826
GUEST_SYSENTER_CS:             Final = 0x482A
VMX_PREEMPTION_TIMER_VALUE:    Final = 0x482E

# 32-bit host-state fields
HOST_IA32_SYSENTER_CS:         Final = 0x4C00

# natural-width control fields
CR0_GUEST_HOST_MASK:           Final = 0x6000
CR4_GUEST_HOST_MASK:           Final = 0x6002
CR0_READ_SHADOW:               Final = 0x6004
CR4_READ_SHADOW:               Final = 0x6006
CR3_TARGET_VALUE0:             Final = 0x6008
CR3_TARGET_VALUE1:             Final = 0x600A
CR3_TARGET_VALUE2:             Final = 0x600C
CR3_TARGET_VALUE3:             Final = 0x600E

# natural-width read-only data fields
EXIT_QUALIFICATION:            Final = 0x6400
GUEST_LINEAR_ADDRESS:          Final = 0x640A

# natural-width guest-state fields
GUEST_CR0:                     Final = 0x6800
GUEST_CR3:                     Final = 0x6802
GUEST_CR4:                     Final = 0x6804
GUEST_ES_BASE:                 Final = 0x6806
GUEST_CS_BASE:                 Final = 0x6808
GUEST_SS_BASE:                 Final = 0x680A
GUEST_DS_BASE:                 Final = 0x680C
GUEST_FS_BASE:                 Final = 0x680E
GUEST_GS_BASE:                 Final = 0x6810
GUEST_LDTR_BASE:               Final = 0x6812
GUEST_TR_BASE:                 Final = 0x6814
GUEST_GDTR_BASE:               Final = 0x6816
GUEST_IDTR_BASE:               Final = 0x6818
GUEST_DR7:                     Final = 0x681A
GUEST_RSP:                     Final = 0x681C
GUEST_RIP:                     Final = 0x681E
GUEST_RFLAGS:                  Final = 0x6820
GUEST_PENDING_DBG_EXCEPTIONS:  Final = 0x6822
GUEST_SYSENTER_ESP:            Final = 0x6824
GUEST_SYSENTER_EIP:            Final = 0x6826

# natural-width host-state fields
HOST_CR0:                      Final = 0x6C00
HOST_CR3:                      Final = 0x6C02
HOST_CR4:                      Final = 0x6C04
HOST_FS_BASE:                  Final = 0x6C06
HOST_GS_BASE:                  Final = 0x6C08
HOST_TR_BASE:                  Final = 0x6C0A
HOST_GDTR_BASE:                Final = 0x6C0C
HOST_IDTR_BASE:                Final = 0x6C0E
HOST_IA32_SYSENTER_ESP:        Final = 0x6C10
HOST_IA32_SYSENTER_EIP:        Final = 0x6C12
HOST_RSP:                      Final = 0x6C14
HOST_RIP:                      Final = 0x6C16
# fmt: on

#: Name -> encoding of every field above.
FIELDS: Final[dict[str, int]] = {name: code for name, code in globals().items() if name.isupper()}
#: Encoding -> name.
FIELD_NAMES: Final = {code: name for name, code in FIELDS.items()}

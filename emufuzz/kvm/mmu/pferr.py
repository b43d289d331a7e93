"""Words of the MMU: access and error-code bits, results of page-fault handlers, access rights.

KVM: PFERR_* of kvm_host.h, RET_PF_* of mmu_internal.h, ACC_* of spte.h (Linux 6.12). The low bits
are those of a #PF error code (SDM Vol. 3A 4.7 "Page-Fault Exceptions").
"""

from __future__ import annotations

from typing import Final

PFERR_PRESENT_MASK: Final = 1 << 0
PFERR_WRITE_MASK: Final = 1 << 1
PFERR_USER_MASK: Final = 1 << 2
PFERR_RSVD_MASK: Final = 1 << 3
PFERR_FETCH_MASK: Final = 1 << 4
PFERR_PK_MASK: Final = 1 << 5
PFERR_GUEST_FINAL_MASK: Final = 1 << 32  # the access itself faulted, after the guest's own walk
PFERR_GUEST_PAGE_MASK: Final = 1 << 33  # the walk of the guest's tables faulted
PFERR_IMPLICIT_ACCESS: Final = 1 << 48  # by the processor for itself (descriptors, TSS); AC is no excuse

#: The translation of an address that has none.
INVALID_GPA: Final = (1 << 64) - 1

RET_PF_CONTINUE: Final = 0
RET_PF_RETRY: Final = 1
RET_PF_EMULATE: Final = 2
RET_PF_WRITE_PROTECTED: Final = 3
RET_PF_INVALID: Final = 4
RET_PF_FIXED: Final = 5
RET_PF_SPURIOUS: Final = 6

RET_PF_NAMES: Final = {
    RET_PF_CONTINUE: "CONTINUE",
    RET_PF_RETRY: "RETRY",
    RET_PF_EMULATE: "EMULATE",
    RET_PF_WRITE_PROTECTED: "WRITE_PROTECTED",
    RET_PF_INVALID: "INVALID",
    RET_PF_FIXED: "FIXED",
    RET_PF_SPURIOUS: "SPURIOUS",
}

# Access rights of a translation. EPT uses ACC_USER_MASK for "readable".
ACC_EXEC_MASK: Final = 1
ACC_WRITE_MASK: Final = 2
ACC_USER_MASK: Final = 4
ACC_ALL: Final = 7

PT_PRESENT_MASK: Final = 1 << 0
PT_WRITABLE_MASK: Final = 1 << 1
PT_USER_MASK: Final = 1 << 2
PT_ACCESSED_MASK: Final = 1 << 5
PT_DIRTY_MASK: Final = 1 << 6
PT_PAGE_SIZE_MASK: Final = 1 << 7
PT64_NX_MASK: Final = 1 << 63

# EMULTYPE_* bits that a page fault hands to x86_emulate_instruction.
EMULTYPE_ALLOW_RETRY_PF: Final = 1 << 3
EMULTYPE_PF: Final = 1 << 6
EMULTYPE_WRITE_PF_TO_SP: Final = 1 << 8

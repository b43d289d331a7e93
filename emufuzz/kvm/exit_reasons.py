"""VM-exit reasons: the basic reason in bits 15:0 of the exit-reason field, and the bits above it.

SDM Vol. 3D Appendix C "VMX Basic Exit Reasons", Vol. 3C 24.9.1 "Basic VM-Exit Information". The names
are KVM's (asm/vmx.h, union vmx_exit_reason); reasons that KVM has no name for have the SDM's.
"""

from __future__ import annotations

from typing import Final

# fmt: off
EXIT_REASON_EXCEPTION_NMI:       Final = 0
EXIT_REASON_EXTERNAL_INTERRUPT:  Final = 1
EXIT_REASON_TRIPLE_FAULT:        Final = 2
EXIT_REASON_INIT_SIGNAL:         Final = 3
EXIT_REASON_SIPI_SIGNAL:         Final = 4
EXIT_REASON_IO_SMI:              Final = 5   # to the dual-monitor SMM monitor only, as OTHER_SMI
EXIT_REASON_OTHER_SMI:           Final = 6
EXIT_REASON_INTERRUPT_WINDOW:    Final = 7
EXIT_REASON_NMI_WINDOW:          Final = 8
EXIT_REASON_TASK_SWITCH:         Final = 9
EXIT_REASON_CPUID:               Final = 10
EXIT_REASON_GETSEC:              Final = 11
EXIT_REASON_HLT:                 Final = 12
EXIT_REASON_INVD:                Final = 13
EXIT_REASON_INVLPG:              Final = 14
EXIT_REASON_RDPMC:               Final = 15
EXIT_REASON_RDTSC:               Final = 16
EXIT_REASON_RSM:                 Final = 17
EXIT_REASON_VMCALL:              Final = 18
EXIT_REASON_VMCLEAR:             Final = 19
EXIT_REASON_VMLAUNCH:            Final = 20
EXIT_REASON_VMPTRLD:             Final = 21
EXIT_REASON_VMPTRST:             Final = 22
EXIT_REASON_VMREAD:              Final = 23
EXIT_REASON_VMRESUME:            Final = 24
EXIT_REASON_VMWRITE:             Final = 25
EXIT_REASON_VMOFF:               Final = 26  # VMXOFF
EXIT_REASON_VMON:                Final = 27  # VMXON
EXIT_REASON_CR_ACCESS:           Final = 28
EXIT_REASON_DR_ACCESS:           Final = 29
EXIT_REASON_IO_INSTRUCTION:      Final = 30
EXIT_REASON_MSR_READ:            Final = 31
EXIT_REASON_MSR_WRITE:           Final = 32
EXIT_REASON_INVALID_STATE:       Final = 33  # this one, 34 and 41: failed VM entries
EXIT_REASON_MSR_LOAD_FAIL:       Final = 34
EXIT_REASON_MWAIT_INSTRUCTION:   Final = 36
EXIT_REASON_MONITOR_TRAP_FLAG:   Final = 37
EXIT_REASON_MONITOR_INSTRUCTION: Final = 39
EXIT_REASON_PAUSE_INSTRUCTION:   Final = 40
EXIT_REASON_MCE_DURING_VMENTRY:  Final = 41
EXIT_REASON_TPR_BELOW_THRESHOLD: Final = 43
EXIT_REASON_APIC_ACCESS:         Final = 44
EXIT_REASON_EOI_INDUCED:         Final = 45
EXIT_REASON_GDTR_IDTR:           Final = 46
EXIT_REASON_LDTR_TR:             Final = 47
EXIT_REASON_EPT_VIOLATION:       Final = 48
EXIT_REASON_EPT_MISCONFIG:       Final = 49
EXIT_REASON_INVEPT:              Final = 50
EXIT_REASON_RDTSCP:              Final = 51
EXIT_REASON_PREEMPTION_TIMER:    Final = 52
EXIT_REASON_INVVPID:             Final = 53
EXIT_REASON_WBINVD:              Final = 54
EXIT_REASON_XSETBV:              Final = 55
EXIT_REASON_APIC_WRITE:          Final = 56
EXIT_REASON_RDRAND:              Final = 57
EXIT_REASON_INVPCID:             Final = 58
EXIT_REASON_VMFUNC:              Final = 59
EXIT_REASON_ENCLS:               Final = 60
EXIT_REASON_RDSEED:              Final = 61
EXIT_REASON_PML_FULL:            Final = 62
EXIT_REASON_XSAVES:              Final = 63
EXIT_REASON_XRSTORS:             Final = 64
EXIT_REASON_PCONFIG:             Final = 65
EXIT_REASON_SPP:                 Final = 66
EXIT_REASON_UMWAIT:              Final = 67
EXIT_REASON_TPAUSE:              Final = 68
EXIT_REASON_LOADIWKEY:           Final = 69
EXIT_REASON_ENCLV:               Final = 70
EXIT_REASON_ENQCMD_PASID:        Final = 72
EXIT_REASON_ENQCMDS_PASID:       Final = 73
EXIT_REASON_BUS_LOCK:            Final = 74
EXIT_REASON_NOTIFY:              Final = 75
# fmt: on

# The full exit reason.
VMX_EXIT_REASONS_BASIC_MASK: Final = 0xFFFF
VMX_EXIT_REASONS_BUS_LOCK_DETECTED: Final = 1 << 26
VMX_EXIT_REASONS_ENCLAVE_MODE: Final = 1 << 27
VMX_EXIT_REASONS_FAILED_VMENTRY: Final = 1 << 31

# Reasons without a name in KVM, which prints their numbers: no control it sets lets them happen.
_UNNAMED: Final = frozenset(
    {
        EXIT_REASON_IO_SMI,
        EXIT_REASON_OTHER_SMI,
        EXIT_REASON_GETSEC,
        EXIT_REASON_RSM,
        EXIT_REASON_PCONFIG,
        EXIT_REASON_SPP,
        EXIT_REASON_LOADIWKEY,
        EXIT_REASON_ENCLV,
        EXIT_REASON_ENQCMD_PASID,
        EXIT_REASON_ENQCMDS_PASID,
    }
)
_PREFIX: Final = "EXIT_REASON_"

EXIT_REASON_NAMES: Final[dict[int, str]] = {
    value: name.removeprefix(_PREFIX)
    for name, value in list(globals().items())
    if name.startswith(_PREFIX) and value not in _UNNAMED
}

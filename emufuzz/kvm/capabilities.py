"""VMX capability MSRs, and the execution controls that KVM chooses from them.

KVM: setup_vmcs_config, adjust_vmx_controls, vmx_pin_based_exec_ctrl, vmx_exec_control,
vmx_secondary_exec_control, vmx_vmentry_ctrl, vmx_vmexit_ctrl.
SDM Vol. 3D Appendix A "VMX Capability Reporting Facility".
"""

from __future__ import annotations

from typing import Final, NamedTuple

from emufuzz.kvm import msr_index as mi
from emufuzz.kvm import vmx_bits as vb
from emufuzz.kvm.options import KvmOptions

VMX_MSRS: Final = range(mi.MSR_IA32_VMX_BASIC, mi.MSR_IA32_VMX_VMFUNC + 1)

# Controls that KVM cannot do without, and those it uses where hardware has them.
PIN_REQUIRED: Final = vb.PIN_BASED_EXT_INTR_MASK | vb.PIN_BASED_NMI_EXITING
PIN_OPTIONAL: Final = vb.PIN_BASED_VIRTUAL_NMIS | vb.PIN_BASED_POSTED_INTR | vb.PIN_BASED_VMX_PREEMPTION_TIMER
CPU_REQUIRED: Final = (
    vb.CPU_BASED_HLT_EXITING | vb.CPU_BASED_CR3_LOAD_EXITING | vb.CPU_BASED_CR3_STORE_EXITING
    | vb.CPU_BASED_UNCOND_IO_EXITING | vb.CPU_BASED_MOV_DR_EXITING | vb.CPU_BASED_USE_TSC_OFFSETTING
    | vb.CPU_BASED_MWAIT_EXITING | vb.CPU_BASED_MONITOR_EXITING | vb.CPU_BASED_INVLPG_EXITING
    | vb.CPU_BASED_RDPMC_EXITING | vb.CPU_BASED_INTR_WINDOW_EXITING
    | vb.CPU_BASED_CR8_LOAD_EXITING | vb.CPU_BASED_CR8_STORE_EXITING
)  # fmt: skip
CPU_OPTIONAL: Final = (
    vb.CPU_BASED_RDTSC_EXITING | vb.CPU_BASED_TPR_SHADOW | vb.CPU_BASED_USE_IO_BITMAPS
    | vb.CPU_BASED_MONITOR_TRAP_FLAG | vb.CPU_BASED_USE_MSR_BITMAPS | vb.CPU_BASED_NMI_WINDOW_EXITING
    | vb.CPU_BASED_PAUSE_EXITING | vb.CPU_BASED_ACTIVATE_SECONDARY_CONTROLS
)  # fmt: skip
SECONDARY_OPTIONAL: Final = (
    vb.SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES | vb.SECONDARY_EXEC_VIRTUALIZE_X2APIC_MODE
    | vb.SECONDARY_EXEC_WBINVD_EXITING | vb.SECONDARY_EXEC_ENABLE_VPID | vb.SECONDARY_EXEC_ENABLE_EPT
    | vb.SECONDARY_EXEC_UNRESTRICTED_GUEST | vb.SECONDARY_EXEC_PAUSE_LOOP_EXITING | vb.SECONDARY_EXEC_DESC
    | vb.SECONDARY_EXEC_ENABLE_RDTSCP | vb.SECONDARY_EXEC_ENABLE_INVPCID
    | vb.SECONDARY_EXEC_APIC_REGISTER_VIRT | vb.SECONDARY_EXEC_VIRTUAL_INTR_DELIVERY
    | vb.SECONDARY_EXEC_SHADOW_VMCS | vb.SECONDARY_EXEC_ENABLE_XSAVES | vb.SECONDARY_EXEC_RDSEED_EXITING
    | vb.SECONDARY_EXEC_RDRAND_EXITING | vb.SECONDARY_EXEC_ENABLE_PML | vb.SECONDARY_EXEC_TSC_SCALING
    | vb.SECONDARY_EXEC_ENABLE_USR_WAIT_PAUSE | vb.SECONDARY_EXEC_ENABLE_VMFUNC
    | vb.SECONDARY_EXEC_BUS_LOCK_DETECTION | vb.SECONDARY_EXEC_NOTIFY_VM_EXITING
)  # fmt: skip
EXIT_REQUIRED: Final = (
    vb.VM_EXIT_SAVE_DEBUG_CONTROLS | vb.VM_EXIT_ACK_INTR_ON_EXIT | vb.VM_EXIT_HOST_ADDR_SPACE_SIZE
)
EXIT_OPTIONAL: Final = (
    vb.VM_EXIT_LOAD_IA32_PERF_GLOBAL_CTRL | vb.VM_EXIT_SAVE_IA32_PAT | vb.VM_EXIT_LOAD_IA32_PAT
    | vb.VM_EXIT_SAVE_IA32_EFER | vb.VM_EXIT_LOAD_IA32_EFER | vb.VM_EXIT_SAVE_VMX_PREEMPTION_TIMER
)  # fmt: skip
ENTRY_REQUIRED: Final = vb.VM_ENTRY_LOAD_DEBUG_CONTROLS | vb.VM_ENTRY_IA32E_MODE
ENTRY_OPTIONAL: Final = (
    vb.VM_ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL | vb.VM_ENTRY_LOAD_IA32_PAT | vb.VM_ENTRY_LOAD_IA32_EFER
)

# Bits that are 1 in every processor without the TRUE control MSRs (SDM Vol. 3D A.2).
_PIN_ALWAYS: Final = 0x00000016
_CPU_ALWAYS: Final = 0x0401E172
_EXIT_ALWAYS: Final = 0x00036DFF
_ENTRY_ALWAYS: Final = 0x000011FF

_VMCS_REVISION: Final = 0x4
_VMX_BASIC: Final = _VMCS_REVISION | 0x1000 << 32 | 6 << 50 | 1 << 54  # 4 KiB, write-back, INS/OUTS info
_VMX_MISC: Final = 5 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 4 << 16  # timer rate, LMA saved, activities
_CR0_FIXED0: Final = 0x80000021  # PG, NE, PE
_CR4_FIXED0: Final = 0x2000  # VMXE
_CR4_FIXED1: Final = 0x7727FF
_EPT_CAP: Final = 1 | 1 << 6 | 1 << 14 | 1 << 16 | 1 << 17 | 1 << 20 | 1 << 21 | 1 << 25 | 1 << 26
_VPID_CAP: Final = 1 | 0xF << 8


class CapabilityError(RuntimeError):
    """Hardware lacks a control that KVM requires."""


class VmcsConfig(NamedTuple):
    """KVM's vmcs_config: the controls in use on this host, before any one VM's settings."""

    pin_based_exec_ctrl: int
    cpu_based_exec_ctrl: int
    cpu_based_2nd_exec_ctrl: int
    vmexit_ctrl: int
    vmentry_ctrl: int


def _host_secondary(options: KvmOptions) -> int:
    """Secondary controls that this host offers."""
    allowed = SECONDARY_OPTIONAL
    if not options.ept:
        allowed &= ~(vb.SECONDARY_EXEC_ENABLE_EPT | vb.SECONDARY_EXEC_UNRESTRICTED_GUEST)
        allowed &= ~vb.SECONDARY_EXEC_ENABLE_PML
    if not options.unrestricted_guest:
        allowed &= ~vb.SECONDARY_EXEC_UNRESTRICTED_GUEST
    if not options.vpid:
        allowed &= ~vb.SECONDARY_EXEC_ENABLE_VPID
    if not options.flexpriority:
        allowed &= ~vb.SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES
    return allowed


def vmx_capability_msr(options: KvmOptions, index: int) -> int:
    """A capability MSR: of control MSRs the low half must be 1, the high half may be 1; else a value."""
    pin = PIN_REQUIRED | PIN_OPTIONAL
    if not options.vnmi:
        pin &= ~vb.PIN_BASED_VIRTUAL_NMIS
    values = {
        mi.MSR_IA32_VMX_BASIC: _VMX_BASIC,
        mi.MSR_IA32_VMX_PINBASED_CTLS: _control(_PIN_ALWAYS, pin),
        mi.MSR_IA32_VMX_PROCBASED_CTLS: _control(_CPU_ALWAYS, CPU_REQUIRED | CPU_OPTIONAL),
        mi.MSR_IA32_VMX_EXIT_CTLS: _control(_EXIT_ALWAYS, EXIT_REQUIRED | EXIT_OPTIONAL),
        mi.MSR_IA32_VMX_ENTRY_CTLS: _control(_ENTRY_ALWAYS, ENTRY_REQUIRED | ENTRY_OPTIONAL),
        mi.MSR_IA32_VMX_MISC: _VMX_MISC,
        mi.MSR_IA32_VMX_CR0_FIXED0: _CR0_FIXED0,
        mi.MSR_IA32_VMX_CR0_FIXED1: 0xFFFFFFFF,
        mi.MSR_IA32_VMX_CR4_FIXED0: _CR4_FIXED0,
        mi.MSR_IA32_VMX_CR4_FIXED1: _CR4_FIXED1,
        mi.MSR_IA32_VMX_VMCS_ENUM: 0x17 << 1,
        mi.MSR_IA32_VMX_PROCBASED_CTLS2: _control(0, _host_secondary(options)),
        mi.MSR_IA32_VMX_EPT_VPID_CAP: (_EPT_CAP if options.ept else 0)
        | (_VPID_CAP << 32 if options.vpid else 0),
    }
    return values.get(index, 0)


def _control(always: int, allowed: int) -> int:
    return always | (always | allowed) << 32


def adjust_vmx_controls(required: int, optional: int, capability: int) -> int:
    """The controls to use; CapabilityError if a required one is not offered."""
    controls = (required | optional) & capability >> 32 | capability & 0xFFFFFFFF
    if required & ~controls:
        raise CapabilityError(f"VMX controls {required & ~controls:#x} are required and not offered")
    return controls


def setup_vmcs_config(options: KvmOptions) -> VmcsConfig:
    """What KVM would use on this host."""

    def adjust(required: int, optional: int, index: int) -> int:
        return adjust_vmx_controls(required, optional, vmx_capability_msr(options, index))

    second = adjust(0, SECONDARY_OPTIONAL, mi.MSR_IA32_VMX_PROCBASED_CTLS2)
    pin = adjust(PIN_REQUIRED, PIN_OPTIONAL, mi.MSR_IA32_VMX_PINBASED_CTLS)
    if not second & vb.SECONDARY_EXEC_VIRTUAL_INTR_DELIVERY:
        pin &= ~vb.PIN_BASED_POSTED_INTR
    return VmcsConfig(
        pin_based_exec_ctrl=pin,
        cpu_based_exec_ctrl=adjust(CPU_REQUIRED, CPU_OPTIONAL, mi.MSR_IA32_VMX_PROCBASED_CTLS),
        cpu_based_2nd_exec_ctrl=second,
        vmexit_ctrl=adjust(EXIT_REQUIRED, EXIT_OPTIONAL, mi.MSR_IA32_VMX_EXIT_CTLS),
        vmentry_ctrl=adjust(ENTRY_REQUIRED, ENTRY_OPTIONAL, mi.MSR_IA32_VMX_ENTRY_CTLS),
    )


def vmx_pin_based_exec_ctrl(options: KvmOptions, config: VmcsConfig) -> int:
    """Pin-based controls of a VM."""
    controls = config.pin_based_exec_ctrl
    if not options.enable_apicv:
        controls &= ~vb.PIN_BASED_POSTED_INTR
    return controls


def vmx_exec_control(options: KvmOptions, config: VmcsConfig) -> int:
    """Primary processor-based controls of a VM: what exits, and what hardware does by itself."""
    controls = config.cpu_based_exec_ctrl & ~(
        vb.CPU_BASED_RDTSC_EXITING
        | vb.CPU_BASED_USE_IO_BITMAPS
        | vb.CPU_BASED_MONITOR_TRAP_FLAG
        | vb.CPU_BASED_PAUSE_EXITING
        | vb.CPU_BASED_INTR_WINDOW_EXITING
        | vb.CPU_BASED_NMI_WINDOW_EXITING
    )
    cr8 = vb.CPU_BASED_CR8_LOAD_EXITING | vb.CPU_BASED_CR8_STORE_EXITING
    if options.irqchip and controls & vb.CPU_BASED_TPR_SHADOW:
        controls &= ~cr8
    else:
        controls = controls & ~vb.CPU_BASED_TPR_SHADOW | cr8
    if options.ept:
        controls &= ~(
            vb.CPU_BASED_CR3_LOAD_EXITING | vb.CPU_BASED_CR3_STORE_EXITING | vb.CPU_BASED_INVLPG_EXITING
        )
    if options.mwait_in_guest:
        controls &= ~(vb.CPU_BASED_MWAIT_EXITING | vb.CPU_BASED_MONITOR_EXITING)
    if options.hlt_in_guest:
        controls &= ~vb.CPU_BASED_HLT_EXITING
    return controls


def vmx_secondary_exec_control(options: KvmOptions, config: VmcsConfig, features: frozenset[str]) -> int:
    """Secondary processor-based controls of a VM; those of features follow the guest's CPUID."""
    controls = config.cpu_based_2nd_exec_ctrl & ~(
        vb.SECONDARY_EXEC_VIRTUALIZE_X2APIC_MODE
        | vb.SECONDARY_EXEC_ENABLE_VMFUNC
        | vb.SECONDARY_EXEC_DESC
        | vb.SECONDARY_EXEC_SHADOW_VMCS
        | vb.SECONDARY_EXEC_ENABLE_PML
        | vb.SECONDARY_EXEC_BUS_LOCK_DETECTION
        | vb.SECONDARY_EXEC_NOTIFY_VM_EXITING
    )
    if not (options.flexpriority and options.irqchip):
        controls &= ~vb.SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES
    if not options.enable_apicv:
        controls &= ~(vb.SECONDARY_EXEC_APIC_REGISTER_VIRT | vb.SECONDARY_EXEC_VIRTUAL_INTR_DELIVERY)
    for enabled, control in (
        ("xsaves" in features, vb.SECONDARY_EXEC_ENABLE_XSAVES),
        ("rdtscp" in features or "rdpid" in features, vb.SECONDARY_EXEC_ENABLE_RDTSCP),
        ("invpcid" in features, vb.SECONDARY_EXEC_ENABLE_INVPCID),
        ("waitpkg" in features, vb.SECONDARY_EXEC_ENABLE_USR_WAIT_PAUSE),
        ("rdrand" not in features, vb.SECONDARY_EXEC_RDRAND_EXITING),
        ("rdseed" not in features, vb.SECONDARY_EXEC_RDSEED_EXITING),
    ):
        if not enabled:
            controls &= ~control
    return controls


def vmx_vmentry_ctrl(config: VmcsConfig) -> int:
    """VM-entry controls; IA-32e mode and EFER are switched as the guest changes them."""
    return config.vmentry_ctrl & ~(
        vb.VM_ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL | vb.VM_ENTRY_LOAD_IA32_EFER | vb.VM_ENTRY_IA32E_MODE
    )


def vmx_vmexit_ctrl(config: VmcsConfig) -> int:
    """VM-exit controls."""
    return config.vmexit_ctrl & ~(
        vb.VM_EXIT_SAVE_IA32_PAT
        | vb.VM_EXIT_SAVE_IA32_EFER
        | vb.VM_EXIT_SAVE_VMX_PREEMPTION_TIMER
        | vb.VM_EXIT_LOAD_IA32_PERF_GLOBAL_CTRL
        | vb.VM_EXIT_LOAD_IA32_EFER
    )

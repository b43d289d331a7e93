"""Words that have numbers in an encoded case, by the field in which they stand.

The names are those of the model of KVM, which this package does not know: a test compares them. New
ones go to the end of their list; anything else changes what encoded cases mean.
"""

from __future__ import annotations

from typing import Final

# fmt: off
WORDS: Final[dict[str, tuple[str, ...]]] = {
    "knobs": (
        "ept", "unrestricted_guest", "emulate_invalid_guest_state", "fasteoi", "flexpriority", "enable_apicv",
        "allow_smaller_maxphyaddr", "vnmi", "vpid", "nested", "force_emulation_prefix",
        "enable_vmware_backdoor", "mmio_caching", "ignore_msrs", "enable_pmu", "exit_on_emulation_error",
        "exception_payload_enabled", "user_space_msr_mask", "msr_denied", "irqchip", "hlt_in_guest",
        "mwait_in_guest", "platform_info_readable", "disabled_quirks", "hypercall_exits", "hyperv",
        "hyperv_synic", "enforce_pv_features", "tss_addr", "ept_identity_map_addr", "host_la57",
        "host_maxphyaddr", "host_umip", "host_hypervisor", "host_split_lock_detect",
    ),
    "features": (
        "mwait", "vmx", "pcid", "x2apic", "movbe", "tsc_deadline", "xsave", "rdrand", "osxsave", "xmm3",
        "apic", "fxsr", "fsgsbase", "tsc_adjust", "smep", "invpcid", "rtm", "rdseed", "smap", "umip", "pku",
        "ospke", "waitpkg", "la57", "rdpid", "bus_lock_detect", "arch_capabilities", "lam", "xsaves", "nx",
        "gbpages", "rdtscp", "lm",
    ),
    "intercepts": ("io", "desc", "rdtscp", "bus_lock_detection", "unrestricted_guest"),
    "op": (
        "fetch", "read_std", "write_std", "read_emulated", "write_emulated", "cmpxchg_emulated",
        "get_msr_with_filter", "set_msr_with_filter", "fix_hypercall", "intercept", "leave_smm", "set_cr",
        "set_dr", "get_msr", "set_xcr", "check_rdpmc_early", "read_pmc", "pio_in_emulated",
        "pio_out_emulated", "is_canonical_addr", "is_smm", "guest_has_movbe", "guest_has_fxsr",
        "guest_has_rdpid", "guest_cpuid_is_intel_compatible",
    ),
    "result": (
        "continue", "unhandleable", "propagate_fault", "retry_instr", "cmpxchg_failed", "io_needed",
        "intercepted",
    ),
}
# fmt: on

"""Named departures of exits, which models of exits and rules see."""

from __future__ import annotations

from typing import Final

from emufuzz.case.paths import PATHS
from emufuzz.oracle.exit_rules import (
    breakpoint_again,
    fast_eoi,
    hidden_detection,
    hidden_trap_flag,
    lost_port_7e,
    lost_single_step,
    read_before_umip,
    short_priority,
    sysenter_address,
    table_limit,
    table_on_device,
    task_state,
    unfiltered_deadline,
)
from emufuzz.oracle.quirks.quirk import (
    Quirk,
)

# fmt: off
EXIT_QUIRKS: Final[tuple[Quirk, ...]] = (
    Quirk("kvm-task-state", None,
          "a task switch saves the old task in the format of the new one, with LDTR in a 16-bit TSS, clears"
          " upper halves for a 16-bit task, keeps the segments of virtual-8086 mode for it, has no T bit, and"
          " is left where a selector is refused, without the exception",
          "SDM Vol. 3A 7.3, 7.6; Vol. 3B 18.3.1.5", task_state, frozenset(("task-switch",)), of_exit=True),
    Quirk("kvm-vector-table-limit", None,
          "an event in real mode is delivered whatever the limit of the vector table",
          "SDM Vol. 2A INT n", table_limit, frozenset(("rmode-inject",)), of_exit=True),
    Quirk("kvm-sysenter-address", None,
          "WRMSR to IA32_SYSENTER_ESP and _EIP takes an address that is not canonical and extends its sign",
          "SDM Vol. 2B WRMSR", sysenter_address, frozenset(PATHS), of_exit=True),
    Quirk("kvm-quirk-15-read-before-umip", frozenset(("0f00/0", "0f00/1")),
          "SLDT and STR that CR4.UMIP forbids read their destination first, which may be #PF",
          "SDM Vol. 3A 6.9", read_before_umip, frozenset(PATHS)),
    Quirk("kvm-short-priority", None,
          "the exit of MOV to CR8 takes the low byte of the value, whatever is above it",
          "SDM Vol. 3A 10.8.6.1", short_priority, frozenset(("exit",))),
    Quirk("kvm-unfiltered-deadline", None,
          "WRMSR to IA32_TSC_DEADLINE is done in the fast path of its exit, though userspace denies the MSR",
          "KVM_X86_SET_MSR_FILTER", unfiltered_deadline, frozenset(("exit",)), of_exit=True),
    Quirk("kvm-fast-eoi", None,
          "what writes to EOI is taken for a MOV and skipped, whatever else it does",
          "SDM Vol. 3A 10.8.5", fast_eoi, frozenset(("apic-access",))),
    Quirk("kvm-table-on-device", frozenset(("0f01/0.mem", "0f01/1.mem", "0f01/2.mem", "0f01/3.mem")),
          "SGDT, LGDT and their kin on a device do nothing, and are followed by a single-step trap",
          "SDM Vol. 2B SGDT", table_on_device, frozenset(PATHS)),
    Quirk("kvm-breakpoint-again", None,
          "an instruction that exits meets its code breakpoint again, as the exit saves RF as 0",
          "SDM Vol. 3B 18.3.1.1; Vol. 3C 27.3.3", breakpoint_again, frozenset(PATHS), of_exit=True),
    Quirk("kvm-debugged-trap-flag", None,
          "while userspace single-steps the guest, TF does not show and traps nothing",
          "SDM Vol. 3B 18.3.1.4", hidden_trap_flag, frozenset(PATHS), of_exit=True),
    Quirk("kvm-debugged-detection", None,
          "while userspace has breakpoints in the guest, DR7.GD of the guest detects nothing",
          "SDM Vol. 3B 18.2.4", hidden_detection, frozenset(("exit",)), of_exit=True),
    Quirk("kvm-lost-port-7e", None,
          "OUT to port 7eh of a guest that userspace single-steps is lost: the step leaves in its place",
          "SDM Vol. 1 19.6", lost_port_7e, frozenset(("exit",)), of_exit=True),
    Quirk("kvm-lost-single-step", None,
          "what ends with a write that userspace is told of is not followed by a single-step trap",
          "SDM Vol. 3B 18.3.1.4", lost_single_step, frozenset(PATHS), of_exit=True),
)
# fmt: on

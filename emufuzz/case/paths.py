"""Names of the VM exits that lead a case through KVM into its emulator (docs/case-format.md, Paths)."""

from __future__ import annotations

from typing import Final

#: The exit handler does the work itself; `kvm.exit_reason` says which one.
EXIT_PATH: Final = "exit"

#: `path` of a case. The first seventeen end in the emulator.
PATHS: Final = (
    "ud",
    "fep",
    "vmware-gp",
    "rmode-exception",
    "shadow-pf",
    "ept-violation",
    "ept-violation-maxphyaddr",
    "ept-misconfig",
    "io-string",
    "apic-access",
    "desc",
    "invalid-guest-state",
    "task-switch",
    "rmode-inject",
    "io-completion",
    "msr-completion",
    "skip",
    EXIT_PATH,
)

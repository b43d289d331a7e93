"""Where KVM's emulator knowingly departs from the hardware: named rules that recognise each.

The port keeps these on purpose. A rule names its leaves and checks the whole set of differences
against what exactly KVM does, so that another fault in the same instruction is still a finding.
A case that a rule explains is counted under the rule's id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from emufuzz.arch.leaves import leaf_rows
from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.quirk_rules import (
    ascii_adjust,
    enter,
    late_check,
    null_stack,
    real_return,
    register_prefetch,
    register_store,
    repeated_scan,
    segment_number,
    shadow_on_fault,
    split_write,
    straddle,
    system_descriptor,
    table_read,
    task_in_ldt,
    vm86_flags,
    vm86_interrupt_flag,
    wide_segment_store,
    zero_count,
)

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

#: Whether a rule explains all differences of (case, subject, oracle).
Explains = Callable[[Case, Outcome, Outcome, "Sequence[Difference]"], bool]


@dataclass(frozen=True, slots=True)
class Quirk:
    """One departure: what KVM does, what the hardware does, and where that is written."""

    id: str
    leaves: frozenset[str]
    kvm: str
    reference: str
    explains: Explains


_ANY: Final = frozenset(row.leaf for row in leaf_rows() if row.implemented)
_STRINGS: Final = frozenset(row.leaf for row in leaf_rows() if "String" in row.flags)

# fmt: off
QUIRKS: Final[tuple[Quirk, ...]] = (
    Quirk("kvm-quirk-06-tzcnt-lzcnt", frozenset(("0fbc", "0fbd")),
          "TZCNT and LZCNT run as BSF and BSR",
          "SDM Vol. 2B LZCNT, TZCNT", repeated_scan),
    Quirk("kvm-quirk-08-aam-aad-flags", frozenset(("d4", "d5")),
          "SF and ZF describe the whole operand, not AL",
          "SDM Vol. 2A AAM, AAD", ascii_adjust),
    Quirk("kvm-quirk-14-wide-segment-store", frozenset(("8c", "0f00/0", "0f00/1")),
          "with REX.W a segment selector is stored as 8 bytes",
          "SDM Vol. 2B MOV, SLDT, STR", wide_segment_store),
    Quirk("kvm-quirk-19-vm86-cli-sti", frozenset(("fa", "fb")),
          "CLI and STI in virtual-8086 mode are #GP(0) whatever the IOPL",
          "SDM Vol. 3B 20.2.7", vm86_interrupt_flag),
    Quirk("kvm-quirk-20-vm86-pushf-popf", frozenset(("9c", "9d")),
          "PUSHF does not look at IOPL, POPF only after reading the stack",
          "SDM Vol. 3B 20.2.7", vm86_flags),
    Quirk("kvm-quirk-21-enter", frozenset(("c8",)),
          "ENTER pushes RBP in the stack's address size and does not probe the new frame",
          "SDM Vol. 2A ENTER", enter),
    Quirk("kvm-quirk-41-prefetch-register", frozenset(("0f0d", "0f18")),
          "a register operand is accepted",
          "SDM Vol. 2B PREFETCHW", register_prefetch),
    Quirk("kvm-quirk-23-iret-real", frozenset(("cf",)),
          "an offset above FFFFH is #GP(0) whatever the limit of CS",
          "SDM Vol. 2A IRET", real_return),
    Quirk("kvm-quirk-37-system-descriptor", frozenset(("0f00/2", "0f00/3")),
          "of a 16-byte system descriptor only the first 8 bytes are checked against the table's limit",
          "SDM Vol. 2A LTR", system_descriptor),
    Quirk("kvm-quirk-43-table-read", frozenset(("0f01/2.mem", "0f01/3.mem")),
          "LGDT and LIDT with a 16-bit operand read 5 bytes instead of 6",
          "SDM Vol. 2A LGDT", table_read),
    Quirk("kvm-quirk-41-movntdq-register", frozenset(("0fe7.pfx_66",)),
          "a register operand is accepted",
          "SDM Vol. 2B MOVNTDQ", register_store),
    Quirk("kvm-quirk-16-segment-source-first", frozenset(("8e",)),
          "the source of MOV Sreg is read before a bad register is #UD",
          "SDM Vol. 2B MOV", late_check),
    Quirk("kvm-quirk-17-shadow-on-fault", frozenset(("17", "8e")),
          "a load of SS that faults leaves its interrupt shadow behind",
          "SDM Vol. 2B MOV, POP", shadow_on_fault),
    Quirk("kvm-rex-r-segment-register", frozenset(("8c", "8e")),
          "REX.R makes the number of a segment register 8 to 15, which is #UD",
          "SDM Vol. 2A 2.2.1.2", segment_number),
    Quirk("kvm-ltr-ti-error-code", frozenset(("0f00/3",)),
          "LTR of a selector in the LDT is #GP(0) instead of #GP(selector)",
          "SDM Vol. 2A LTR", task_in_ldt),
    Quirk("kvm-null-ss-hidden-part", frozenset(("8e", "17", "0fb2")),
          "a null SS gets the hidden part of a flat data segment",
          "SDM Vol. 3A 5.4.1", null_stack),
    Quirk("kvm-quirk-01-canonical-straddle", _ANY,
          "only the first byte of an access is checked for a canonical address",
          "SDM Vol. 1 3.3.7.1", straddle),
    Quirk("kvm-page-split-write", _ANY,
          "a write that faults on its second page has changed the first",
          "SDM Vol. 3A 6.6", split_write),
    Quirk("kvm-rep-zero-count", _STRINGS,
          "REP with ECX = 0 and 32-bit addresses truncates RCX, RSI and RDI, as Intel processors do",
          "SDM Vol. 2B REP", zero_count),
)
# fmt: on


def explaining_quirk(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> str | None:
    """The id of the first quirk that explains all differences, or None."""
    for quirk in QUIRKS:
        if subject.leaf in quirk.leaves and quirk.explains(case, subject, oracle, differences):
            return quirk.id
    return None

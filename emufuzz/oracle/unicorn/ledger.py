"""All gaps of Unicorn: the ledger's entries, and those that the oracle itself attaches to an outcome."""

from __future__ import annotations

from typing import Final

from emufuzz.oracle.gaps import Gap
from emufuzz.oracle.unicorn.gaps import UNICORN_GAPS
from emufuzz.oracle.unicorn.gaps_control import CONTROL_GAPS
from emufuzz.oracle.unicorn.gaps_corner import CORNER_GAPS
from emufuzz.oracle.unicorn.gaps_host import HOST_GAPS
from emufuzz.oracle.unicorn.gaps_machine import MACHINE_GAPS
from emufuzz.oracle.unicorn.gaps_vm86 import VM86_GAPS

#: What can go wrong with flat memory and no devices.
PLAIN_LEDGER: Final[tuple[Gap, ...]] = (*UNICORN_GAPS, *CONTROL_GAPS, *CORNER_GAPS, *HOST_GAPS, *VM86_GAPS)
LEDGER: Final[tuple[Gap, ...]] = (*PLAIN_LEDGER, *MACHINE_GAPS)

# fmt: off
#: Gaps that only a run shows: id -> reason. Such an outcome is unchecked as a whole.
ATTACHED: Final = {
    "unicorn-breakpoints":       "a breakpoint that MOV to a debug register sets outlives the case",
    "unicorn-code-in-device":    "the code lies, or goes on, where there is no memory",
    "unicorn-code-page-write":   "a write to the page of the running code restarts the instruction for ever",
    "unicorn-code-wrap":         "code that runs over the end of the address space may never come back",
    "unicorn-device-page-split": "an access of no operand goes from a device on to an unknown page",
    "unicorn-engine-error":      "Unicorn gave up for a reason that is not an exception of the guest",
    "unicorn-int-delivery":      "software interrupts stop before they are delivered",
    "unicorn-lock-bit-register": "LOCK BT, BTS, BTR or BTC of a register ends the process",
    "unicorn-pkru":              "PKRU is always 0",
    "unicorn-undefined-before":  "an instruction before the last one left flags undefined",
}
# fmt: on

#: Gap id -> reason, for reports.
REASONS: Final[dict[str, str]] = {**{gap.id: gap.reason for gap in LEDGER}, **ATTACHED}

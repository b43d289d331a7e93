"""All gaps of Unicorn: the ledger's entries, and those that the oracle itself attaches to an outcome."""

from __future__ import annotations

from typing import Final

from emufuzz.oracle.gaps import Gap
from emufuzz.oracle.unicorn.gaps import UNICORN_GAPS
from emufuzz.oracle.unicorn.gaps_corner import CORNER_GAPS

LEDGER: Final[tuple[Gap, ...]] = (*UNICORN_GAPS, *CORNER_GAPS)

# fmt: off
#: Gaps that only a run shows: id -> reason. Such an outcome is unchecked as a whole.
ATTACHED: Final = {
    "unicorn-code-page-write":   "a write to the page of the running code restarts the instruction for ever",
    "unicorn-code-wrap":         "code that runs over the end of the address space may never come back",
    "unicorn-engine-error":      "Unicorn gave up for a reason that is not an exception of the guest",
    "unicorn-lock-bit-register": "LOCK BT, BTS, BTR or BTC of a register ends the process",
}
# fmt: on

#: Gap id -> reason, for reports.
REASONS: Final[dict[str, str]] = {**{gap.id: gap.reason for gap in LEDGER}, **ATTACHED}

"""Named departures that only a log of callbacks shows."""

from __future__ import annotations

from typing import Final

from emufuzz.oracle.event_rules import (
    movsxd_source,
    ports_ahead,
    selector_source,
    selector_store,
    table_image,
)
from emufuzz.oracle.quirks.quirk import (
    Quirk,
)

# fmt: off
EVENT_QUIRKS: Final[tuple[Quirk, ...]] = (
    Quirk("kvm-quirk-14-15-selector-accesses", frozenset(("8c", "0f00/0", "0f00/1")),
          "SLDT and STR read their destination first; with REX.W they, and MOV, write 8 bytes",
          "SDM Vol. 2B MOV, SLDT, STR", selector_store),
    Quirk("kvm-quirk-16-source-accesses", frozenset(("8e",)),
          "MOV to a bad segment register reads its source before it is #UD",
          "SDM Vol. 2B MOV", selector_source),
    Quirk("kvm-quirk-42-movsxd-accesses", frozenset(("63.mode64",)),
          "MOVSXD with a 16-bit operand reads 4 bytes",
          "SDM Vol. 2B MOVSXD", movsxd_source),
    Quirk("kvm-quirk-43-table-accesses", frozenset(("0f01/2.mem", "0f01/3.mem")),
          "LGDT and LIDT read the beginning of their operand twice",
          "SDM Vol. 2A LGDT", table_image),
    Quirk("kvm-quirk-46-port-accesses", frozenset(("e4", "e5", "ec", "ed")),
          "IN with a REP prefix reads its port as often as INS would",
          "SDM Vol. 2A IN", ports_ahead),
)
# fmt: on

"""Where everything lies in the memory that the runner's process and its parent share.

    runtime, at a random address         arena (the shared memfd), by offset
    0x0000  machine code, read-only      CONTROL   position in the batch
    0x4000  CONTROL, the rest of the     COMMON    what all cases of a batch have in common
            arena but for the live       IN        a record per case: what the child reads
            pages                        OUT       a record per case: what the handler writes
            alternate signal stack       PRISTINE  the pages as each case finds them
                                         POOL      copies of pages that cases changed
                                         LIVE      the pages themselves, at the cases' addresses

The child may write CONTROL, OUT, POOL and LIVE, and nothing else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from emufuzz.case.model import PAGE_SIZE

#: Cases of one wake-up.
RECORDS: Final = 256
#: Most pages that a child has for its cases: one bit each in a record.
MAX_PAGES: Final = 64
#: Longest code of a case, in bytes.
MAX_CODE: Final = 64
#: Lowest address behind those that user code may map (TASK_SIZE_MAX with four-level paging).
USER_END: Final = 0x7FFF_FFFF_F000

#: Bytes of machine code at the start of the runtime.
CODE_SIZE: Final = 0x4000
STACK_SIZE: Final = 0x10000

# CONTROL: 64-bit words.
CONTROL_CURRENT: Final = 0  # record that is running
CONTROL_COUNT: Final = 8  # records of this wake-up
CONTROL_POOL: Final = 16  # address of the next free page of POOL
CONTROL_WAKE: Final = 24  # the byte that the parent sent

# COMMON: what the cases of one wake-up share.
COMMON_SELECTORS: Final = 0  # CS SS DS ES FS GS, 16 bits each
COMMON_FS_BASE: Final = 16
COMMON_GS_BASE: Final = 24
COMMON_STAMP: Final = 32  # number of this wake-up
COMMON_FPU: Final = 64  # the part of an FXSAVE image that is loaded
FPU_SIZE: Final = 416  # control words, 8 ST, 16 XMM (SDM Vol. 1 Table 10-2)
SELECTORS_SIZE: Final = 12

# IN: a record.
IN_RIP: Final = 128  # behind 16 GPRs in VCPU_REGS_* order
IN_RFLAGS: Final = 136
IN_CODE_ADDRESS: Final = 144
IN_CODE_LENGTH: Final = 152
IN_PAGES: Final = 160  # bit mask of the pages that are compared
IN_CODE: Final = 192
IN_UNDER: Final = IN_CODE + MAX_CODE  # what lies under the code when it is not there
IN_SIZE: Final = IN_UNDER + MAX_CODE
IN_WORDS: Final = struct.Struct("<21Q")

# OUT: a record.
OUT_RIP: Final = 128
OUT_RFLAGS: Final = 136
OUT_ERROR: Final = 144
OUT_TRAP: Final = 152
OUT_CR2: Final = 160
OUT_PAGES: Final = 168  # bit mask of the pages that changed
OUT_STAMP: Final = 176
OUT_FS_BASE: Final = 184
OUT_GS_BASE: Final = 192
OUT_SELECTORS: Final = 200
OUT_CODE: Final = 224
OUT_FPU: Final = 288
OUT_SIZE: Final = 704
OUT_WORDS: Final = struct.Struct("<25Q")


@dataclass(frozen=True, slots=True)
class Arena:
    """Offsets in the arena of a child with a number of pages.

    Attributes:
        pages: Pages of cases, at most MAX_PAGES.
    """

    pages: int

    control = 0
    common = PAGE_SIZE
    records_in = 2 * PAGE_SIZE
    records_out = records_in + RECORDS * IN_SIZE
    pristine = records_out + RECORDS * OUT_SIZE

    @property
    def pool(self) -> int:
        """Copies of changed pages: as many as a whole wake-up can change."""
        return self.pristine + self.pages * PAGE_SIZE

    @property
    def live(self) -> int:
        """The pages that the cases see."""
        return self.pool + RECORDS * self.pages * PAGE_SIZE

    @property
    def size(self) -> int:
        """Bytes of the whole arena; most of POOL is never touched."""
        return self.live + self.pages * PAGE_SIZE

    @property
    def runtime_size(self) -> int:
        """Bytes of address space of the runtime: code, the arena up to LIVE, the signal stack."""
        return CODE_SIZE + self.live + STACK_SIZE

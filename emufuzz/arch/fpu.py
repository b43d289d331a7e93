"""Constants of the x87 FPU and SSE state."""

from __future__ import annotations

from typing import Final

#: Bits of MXCSR that may be set (SDM Vol. 1 11.6.6), those of the processors on which KVM was recorded:
#: with bit 17, misaligned SSE accesses, which AMD has (APM Vol. 1 4.2.2).
MXCSR_MASK: Final = 0x2FFFF

"""Control registers and EFER: bits that the emulator, the oracles and the state builders use.

SDM Vol. 3A 2.5 "Control Registers", 2.2.1 "Extended Feature Enable Register".
"""

from __future__ import annotations

from typing import Final

X86_CR0_PE: Final = 1 << 0
X86_CR0_MP: Final = 1 << 1
X86_CR0_EM: Final = 1 << 2
X86_CR0_TS: Final = 1 << 3
X86_CR0_ET: Final = 1 << 4
X86_CR0_NE: Final = 1 << 5
X86_CR0_WP: Final = 1 << 16
X86_CR0_AM: Final = 1 << 18
X86_CR0_NW: Final = 1 << 29
X86_CR0_CD: Final = 1 << 30
X86_CR0_PG: Final = 1 << 31

X86_CR4_VME: Final = 1 << 0
X86_CR4_PVI: Final = 1 << 1
X86_CR4_TSD: Final = 1 << 2
X86_CR4_DE: Final = 1 << 3
X86_CR4_PSE: Final = 1 << 4
X86_CR4_PAE: Final = 1 << 5
X86_CR4_MCE: Final = 1 << 6
X86_CR4_PGE: Final = 1 << 7
X86_CR4_PCE: Final = 1 << 8
X86_CR4_OSFXSR: Final = 1 << 9
X86_CR4_OSXMMEXCPT: Final = 1 << 10
X86_CR4_UMIP: Final = 1 << 11
X86_CR4_LA57: Final = 1 << 12
X86_CR4_FSGSBASE: Final = 1 << 16
X86_CR4_PCIDE: Final = 1 << 17
X86_CR4_OSXSAVE: Final = 1 << 18
X86_CR4_SMEP: Final = 1 << 20
X86_CR4_SMAP: Final = 1 << 21
X86_CR4_PKE: Final = 1 << 22

EFER_SCE: Final = 1 << 0
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
EFER_NX: Final = 1 << 11
EFER_SVME: Final = 1 << 12

"""What processors have in common, and what tells one from another."""

from __future__ import annotations

from typing import Final

from iced_x86 import CpuidFeature, Mnemonic

#: Features, by iced's names, of every x86-64 processor of the last fifteen years.
BASELINE: Final = frozenset(
    getattr(CpuidFeature, name)
    for name in (
        "INTEL8086", "INTEL8086_ONLY", "INTEL186", "INTEL286", "INTEL286_ONLY", "INTEL386", "INTEL386_ONLY",
        "INTEL486", "X64", "CPUID", "CMOV", "CX8", "CMPXCHG16B", "MULTIBYTENOP", "PAUSE", "FXSR", "CLFSH",
        "FPU", "FPU287", "FPU387", "MMX", "SSE", "SSE2", "SSE3", "SSSE3", "SSE4_1", "SSE4_2", "POPCNT",
        "MOVBE", "PREFETCHW", "SEP", "SYSCALL", "TSC", "MSR",
    )
)  # fmt: skip

#: Instructions whose results are those of one processor at one moment.
IDENTITY: Final = frozenset(
    (Mnemonic.CPUID, Mnemonic.RDTSC, Mnemonic.RDTSCP, Mnemonic.RDPID, Mnemonic.XGETBV, Mnemonic.RDRAND,
     Mnemonic.RDSEED, Mnemonic.RDPMC)
)  # fmt: skip

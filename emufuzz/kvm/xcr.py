"""XCR0, the state components that XSAVE handles (KVM: __kvm_set_xcr; SDM Vol. 1 13.3)."""

from __future__ import annotations

from typing import Final

from emufuzz.kvm.vcpu import Vcpu

XFEATURE_MASK_FP: Final = 1 << 0
XFEATURE_MASK_SSE: Final = 1 << 1
XFEATURE_MASK_YMM: Final = 1 << 2
XFEATURE_MASK_BNDREGS: Final = 1 << 3
XFEATURE_MASK_BNDCSR: Final = 1 << 4
XFEATURE_MASK_AVX512: Final = 7 << 5
XFEATURE_MASK_XTILE: Final = 3 << 17


def kvm_set_xcr(vcpu: Vcpu, index: int, xcr: int) -> int:
    """XSETBV without its CPL check: 0, or 1 for #GP (KVM: __kvm_set_xcr; SDM Vol. 1 13.3)."""
    if index or not xcr & XFEATURE_MASK_FP:
        return 1
    if xcr & XFEATURE_MASK_YMM and not xcr & XFEATURE_MASK_SSE:
        return 1
    if xcr & ~(vcpu.cpuid.supported_xcr0 | XFEATURE_MASK_FP):
        return 1
    if bool(xcr & XFEATURE_MASK_BNDREGS) != bool(xcr & XFEATURE_MASK_BNDCSR):
        return 1
    if xcr & XFEATURE_MASK_AVX512:
        if not xcr & XFEATURE_MASK_YMM or xcr & XFEATURE_MASK_AVX512 != XFEATURE_MASK_AVX512:
            return 1
    if xcr & XFEATURE_MASK_XTILE and xcr & XFEATURE_MASK_XTILE != XFEATURE_MASK_XTILE:
        return 1
    vcpu.xcr0 = xcr
    return 0

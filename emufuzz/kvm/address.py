"""Linear addresses: canonical form and address masking.

KVM: is_noncanonical_address, __canonical_address, vmx_get_untagged_addr.
SDM Vol. 1 3.3.7.1 "Canonical Addressing"; Vol. 3A 4.4 "Linear-Address Masking".
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch import cr as crs
from emufuzz.emulator.x86emul import (
    X86EMUL_F_DT_LOAD,
    X86EMUL_F_FETCH,
    X86EMUL_F_IMPLICIT,
    X86EMUL_F_INVLPG,
    X86EMUL_F_MSR,
)
from emufuzz.kvm.cpuid import X86_CR4_LAM_SUP
from emufuzz.kvm.regs import kvm_read_cr3, kvm_read_cr4_bits
from emufuzz.kvm.segments import is_64_bit_mode
from emufuzz.kvm.vcpu import Vcpu

X86_CR3_LAM_U57: Final = 1 << 61
X86_CR3_LAM_U48: Final = 1 << 62

_MASK64: Final = (1 << 64) - 1
_BIT_63: Final = 1 << 63
_BY_HOST: Final = X86EMUL_F_INVLPG | X86EMUL_F_MSR | X86EMUL_F_DT_LOAD
_UNMASKED: Final = X86EMUL_F_FETCH | X86EMUL_F_IMPLICIT | X86EMUL_F_INVLPG


def max_host_virt_addr_bits(vcpu: Vcpu) -> int:
    """The host's linear-address width."""
    return 57 if vcpu.options.host_la57 else 48


def vcpu_virt_addr_bits(vcpu: Vcpu) -> int:
    """The guest's current linear-address width."""
    return 57 if kvm_read_cr4_bits(vcpu, crs.X86_CR4_LA57) else 48


def canonical_address(addr: int, bits: int) -> int:
    """`addr` sign-extended from its low `bits` bits."""
    low = addr & (1 << bits) - 1
    return low | _MASK64 & -(1 << bits) if low >> bits - 1 else low


def is_noncanonical_address(vcpu: Vcpu, addr: int, flags: int = 0) -> bool:
    """Not canonical, for an access with X86EMUL_F_* flags.

    INVLPG, MSRs and descriptor-table bases go by what the host supports, not by CR4.LA57.
    """
    bits = max_host_virt_addr_bits(vcpu) if flags & _BY_HOST else vcpu_virt_addr_bits(vcpu)
    return canonical_address(addr, bits) != addr


def is_noncanonical_msr_address(vcpu: Vcpu, addr: int) -> bool:
    """Not canonical as the value of an MSR."""
    return is_noncanonical_address(vcpu, addr, X86EMUL_F_MSR)


def kvm_get_active_cr3_lam_bits(vcpu: Vcpu) -> int:
    """LAM_U48 and LAM_U57 of CR3, 0 for a guest without LAM."""
    if not vcpu.cpuid.has("lam"):
        return 0
    return kvm_read_cr3(vcpu) & (X86_CR3_LAM_U48 | X86_CR3_LAM_U57)


def vmx_get_untagged_addr(vcpu: Vcpu, addr: int, flags: int) -> int:
    """The address without its metadata bits; bit 63 stays, so that user and supervisor do not mix."""
    if flags & _UNMASKED or not is_64_bit_mode(vcpu):
        return addr
    if addr & _BIT_63:
        if not kvm_read_cr4_bits(vcpu, X86_CR4_LAM_SUP):
            return addr
        lam_bit = vcpu_virt_addr_bits(vcpu) - 1
    else:
        active = kvm_get_active_cr3_lam_bits(vcpu)
        if not active:
            return addr
        lam_bit = 56 if active & X86_CR3_LAM_U57 else 47
    return canonical_address(addr, lam_bit + 1) & ~_BIT_63 | addr & _BIT_63

"""Whether the instruction may be emulated at all (KVM: vmx_check_emulate_instruction)."""

from __future__ import annotations

from typing import Final

from emufuzz.arch.exceptions import UD_VECTOR
from emufuzz.kvm.exceptions import kvm_queue_exception
from emufuzz.kvm.vcpu import Vcpu

ENCLAVE_MODE: Final = 1 << 27  # of the exit reason


def vmx_check_emulate_instruction(vcpu: Vcpu) -> bool:
    """False, with #UD queued, if the exit came from an enclave, whose code cannot be read."""
    if vcpu.exit_reason & ENCLAVE_MODE:
        kvm_queue_exception(vcpu, UD_VECTOR)
        return False
    return True

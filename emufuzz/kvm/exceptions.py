"""The exception queue: merging, payloads, page faults.

KVM: kvm_multiple_exception, kvm_queue_exception*, kvm_deliver_exception_payload,
kvm_handle_exception_payload_quirk, kvm_inject_page_fault, __kvm_inject_emulated_page_fault,
nested_vmx_is_exception_vmexit. SDM Vol. 3A 6.15 "Exception and Interrupt Reference", Table 6-5.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch import exceptions as ex
from emufuzz.arch.cr import X86_CR4_DE
from emufuzz.emulator.ctxt import X86Exception
from emufuzz.kvm.regs import kvm_read_cr4_bits
from emufuzz.kvm.segments import vmx_get_cpl
from emufuzz.kvm.vcpu import (
    KVM_REQ_EVENT,
    KVM_REQ_NMI,
    KVM_REQ_TRIPLE_FAULT,
    QueuedException,
    Vcpu,
)

EXCPT_BENIGN: Final = 0
EXCPT_CONTRIBUTORY: Final = 1
EXCPT_PF: Final = 2

EXCPT_FAULT: Final = 0
EXCPT_TRAP: Final = 1
EXCPT_ABORT: Final = 2
EXCPT_INTERRUPT: Final = 3
EXCPT_DB: Final = 4

DR6_BS: Final = 1 << 14
DR6_RTM: Final = 1 << 16
DR_TRAP_BITS: Final = 0xF
#: Bits of DR6 that read 1 unless something happened: the fixed ones, BLD and RTM.
DR6_ACTIVE_LOW: Final = 0xFFFF0FF0
DR6_VOLATILE: Final = 0x0001E80F
DR6_FIXED_1: Final = DR6_ACTIVE_LOW & ~DR6_VOLATILE
_PENDING_DBG_ENABLED_BREAKPOINT: Final = 1 << 12

_CONTRIBUTORY: Final = frozenset({ex.DE_VECTOR, ex.TS_VECTOR, ex.NP_VECTOR, ex.SS_VECTOR, ex.GP_VECTOR})
_HAS_ERROR_CODE: Final = frozenset(
    {ex.DF_VECTOR, ex.TS_VECTOR, ex.NP_VECTOR, ex.SS_VECTOR, ex.GP_VECTOR, ex.PF_VECTOR, ex.AC_VECTOR}
)


def exception_class(vector: int) -> int:
    """EXCPT_BENIGN, _CONTRIBUTORY or _PF (SDM Vol. 3A Table 6-4)."""
    if vector == ex.PF_VECTOR:
        return EXCPT_PF
    return EXCPT_CONTRIBUTORY if vector in _CONTRIBUTORY else EXCPT_BENIGN


def exception_type(vector: int) -> int:
    """Fault, trap, abort or interrupt; #DB may be either, which its caller must know."""
    if vector > 31 or vector == ex.NMI_VECTOR:
        return EXCPT_INTERRUPT
    if vector == ex.DB_VECTOR:
        return EXCPT_DB
    if vector in (ex.BP_VECTOR, ex.OF_VECTOR):
        return EXCPT_TRAP
    return EXCPT_ABORT if vector in (ex.DF_VECTOR, ex.MC_VECTOR) else EXCPT_FAULT


def x86_exception_has_error_code(vector: int) -> bool:
    """The processor pushes an error code (SDM Vol. 3A Table 6-1)."""
    return vector in _HAS_ERROR_CODE


def kvm_exception_is_soft(vector: int) -> bool:
    """INT3 and INTO: their delivery needs the instruction's length."""
    return vector in (ex.BP_VECTOR, ex.OF_VECTOR)


def kvm_is_exception_pending(vcpu: Vcpu) -> bool:
    """An exception waits for injection, for L1, or the vCPU is to shut down."""
    return vcpu.exception.pending or vcpu.exception_vmexit.pending or KVM_REQ_TRIPLE_FAULT in vcpu.requests


def kvm_clear_exception_queue(vcpu: Vcpu) -> None:
    """Forget what is queued, as emulation starts over."""
    vcpu.exception.pending = False
    vcpu.exception.injected = False
    vcpu.exception_vmexit.pending = False


def kvm_queue_interrupt(vcpu: Vcpu, vector: int, *, soft: bool) -> None:
    """An interrupt is being delivered."""
    vcpu.interrupt.injected = True
    vcpu.interrupt.soft = soft
    vcpu.interrupt.nr = vector


def kvm_clear_interrupt_queue(vcpu: Vcpu) -> None:
    """No interrupt is being delivered."""
    vcpu.interrupt.injected = False


def kvm_event_needs_reinjection(vcpu: Vcpu) -> bool:
    """Some event is in the middle of its delivery."""
    return vcpu.exception.injected or vcpu.interrupt.injected or vcpu.nmi_injected


def kvm_queue_exception(vcpu: Vcpu, vector: int) -> None:
    """Queue an exception without error code."""
    kvm_multiple_exception(vcpu, vector)


def kvm_queue_exception_e(vcpu: Vcpu, vector: int, error_code: int) -> None:
    """Queue an exception with an error code."""
    kvm_multiple_exception(vcpu, vector, error_code=error_code)


def kvm_queue_exception_p(vcpu: Vcpu, vector: int, payload: int) -> None:
    """Queue an exception whose payload (DR6 bits, CR2) is stored at its delivery."""
    kvm_multiple_exception(vcpu, vector, payload=payload)


def kvm_requeue_exception(vcpu: Vcpu, vector: int) -> None:
    """An exception was being delivered when a VM exit came in between."""
    kvm_multiple_exception(vcpu, vector, reinject=True)


def kvm_requeue_exception_e(vcpu: Vcpu, vector: int, error_code: int) -> None:
    """The same with an error code."""
    kvm_multiple_exception(vcpu, vector, error_code=error_code, reinject=True)


def kvm_inject_gp(vcpu: Vcpu, error_code: int = 0) -> None:
    """Queue #GP."""
    kvm_queue_exception_e(vcpu, ex.GP_VECTOR, error_code)


def kvm_multiple_exception(
    vcpu: Vcpu,
    vector: int,
    *,
    error_code: int | None = None,
    payload: int | None = None,
    reinject: bool = False,
) -> None:
    """Queue an exception, together with one that is there already.

    Two contributory ones, or a page fault and anything but a benign one, make #DF; anything on top
    of #DF requests a triple fault. Otherwise the new one replaces the old one, in the hope that the
    instruction raises that again. L1's intercepts turn an exception of L2 into an exit.
    """
    vcpu.make_request(KVM_REQ_EVENT)
    if not reinject and _is_exception_vmexit(vcpu, vector, error_code or 0):
        _fill(vcpu.exception_vmexit, vector, error_code, payload, reinject=False)
        return
    queued = vcpu.exception
    if not queued.pending and not queued.injected:
        _fill(queued, vector, error_code, payload, reinject=reinject)
        return
    if queued.vector == ex.DF_VECTOR:
        vcpu.make_request(KVM_REQ_TRIPLE_FAULT)
        return
    before, now = exception_class(queued.vector), exception_class(vector)
    if (before == now == EXCPT_CONTRIBUTORY) or (before == EXCPT_PF and now != EXCPT_BENIGN):
        queued.injected = queued.pending = False
        kvm_queue_exception_e(vcpu, ex.DF_VECTOR, 0)
    else:
        _fill(queued, vector, error_code, payload, reinject=reinject)


def _fill(
    queued: QueuedException, vector: int, error_code: int | None, payload: int | None, *, reinject: bool
) -> None:
    """Replacing a pending exception by a re-injected one leaves it pending as well, as in KVM."""
    if reinject:
        queued.injected = True
        payload = None  # a re-injected event has delivered it
    else:
        queued.pending = True
        queued.injected = False
    queued.has_error_code = error_code is not None
    queued.vector = vector
    queued.error_code = error_code or 0
    queued.has_payload = payload is not None
    queued.payload = payload or 0


def _is_exception_vmexit(vcpu: Vcpu, vector: int, error_code: int) -> bool:
    """L1 intercepts this exception of L2 (KVM: nested_vmx_is_exception_vmexit; SDM Vol. 3C 25.2)."""
    nested = vcpu.guest_mode
    if nested is None:
        return False
    bit = bool(nested.exception_bitmap >> vector & 1)
    if vector != ex.PF_VECTOR:
        return bit
    mismatch = error_code & nested.page_fault_error_code_mask != nested.page_fault_error_code_match
    return mismatch ^ bit


def kvm_deliver_exception_payload(vcpu: Vcpu, queued: QueuedException) -> None:
    """Store the payload of #DB in DR6 (SDM Vol. 3B 17.2.3), that of #PF in CR2.

    DR6's trap bits are replaced, RTM is set unless the payload has it; BD, BS and BT only add up.
    """
    if not queued.has_payload:
        return
    payload = queued.payload
    if queued.vector == ex.DB_VECTOR:
        dr6 = vcpu.dr6 & ~DR_TRAP_BITS | DR6_RTM
        dr6 = dr6 & ~(payload & DR6_ACTIVE_LOW) | payload & ~DR6_ACTIVE_LOW
        vcpu.dr6 = dr6 & ~_PENDING_DBG_ENABLED_BREAKPOINT | DR6_FIXED_1
    elif queued.vector == ex.PF_VECTOR:
        vcpu.cr2 = payload
    queued.has_payload = False
    queued.payload = 0


def kvm_handle_exception_payload_quirk(vcpu: Vcpu) -> None:
    """Userspace reads the state: without KVM_CAP_EXCEPTION_PAYLOAD a pending payload is stored early."""
    queued = vcpu.exception_vmexit if vcpu.exception_vmexit.pending else vcpu.exception
    if not vcpu.options.exception_payload_enabled and queued.pending and queued.has_payload:
        kvm_deliver_exception_payload(vcpu, queued)


def kvm_inject_page_fault(vcpu: Vcpu, fault: X86Exception) -> None:
    """Queue #PF; CR2 is stored at its delivery."""
    kvm_multiple_exception(vcpu, ex.PF_VECTOR, error_code=fault.error_code, payload=fault.address)


def kvm_inject_emulated_page_fault(vcpu: Vcpu, fault: X86Exception) -> None:
    """Queue a #PF that the guest walker found; a stale translation of a present page is dropped."""
    if fault.error_code & ex.PFERR_PRESENT and not fault.error_code & ex.PFERR_RSVD:
        vcpu.hooks.mmu_invalidate_addr(fault.address)
    kvm_inject_page_fault(vcpu, fault)


def kvm_inject_nmi(vcpu: Vcpu) -> None:
    """An NMI arrived."""
    vcpu.nmi_queued += 1
    vcpu.make_request(KVM_REQ_NMI)


def kvm_require_cpl(vcpu: Vcpu, required_cpl: int) -> bool:
    """CPL is at most `required_cpl`; else #GP(0) is queued."""
    if vmx_get_cpl(vcpu) <= required_cpl:
        return True
    kvm_inject_gp(vcpu)
    return False


def kvm_require_dr(vcpu: Vcpu, dr: int) -> bool:
    """DR4 and DR5 exist only with CR4.DE clear; else #UD is queued (SDM Vol. 3B 17.2.2)."""
    if dr not in (4, 5) or not kvm_read_cr4_bits(vcpu, X86_CR4_DE):
        return True
    kvm_queue_exception(vcpu, ex.UD_VECTOR)
    return False

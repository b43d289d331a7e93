"""Hyper-V's hypercalls that reach other processors: TLB flushes and IPIs, here for the only one there is.

KVM: kvm_hv_flush_tlb, kvm_hv_send_ipi, kvm_hv_get_hc_data, hv_tlb_flush_enqueue,
kvm_hv_vcpu_flush_tlb. TLFS 9.4 "Virtual TLB", 10.5 "Interrupt Control".
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import Final

from emufuzz.emulator.x86emul import X86EMUL_F_INVLPG
from emufuzz.kvm import hyperv_regs as hv
from emufuzz.kvm.address import is_noncanonical_address
from emufuzz.kvm.lapic_irq import emit, kvm_apic_set_irq
from emufuzz.kvm.lapic_regs import APIC_DM_FIXED
from emufuzz.kvm.vcpu import KVM_REQ_TLB_FLUSH_GUEST, Vcpu

#: The TLB of this vCPU is to be flushed as `tlb_flush_fifo` says.
KVM_REQ_HV_TLB_FLUSH: Final = "HV_TLB_FLUSH"

_FLUSH: Final = struct.Struct("<3Q")  # address space, flags, processor mask
_FLUSH_EX: Final = struct.Struct("<4Q")  # address space, flags, format, mask of valid banks
_SEND_IPI: Final = struct.Struct("<IIQ")  # vector, reserved, processor mask
_SEND_IPI_EX: Final = struct.Struct("<IIQQ")  # vector, reserved, format, mask of valid banks
_XMM_HALVES: Final = 2 * hv.HV_HYPERCALL_MAX_XMM_REGISTERS
_MASK32: Final = 0xFFFFFFFF
_MASK64: Final = (1 << 64) - 1
_PAGE_MASK: Final = 0xFFF
_PAGE_SIZE: Final = 0x1000


class Target(Enum):
    """Whom a call is for: this processor among others, others only, or an empty set."""

    THIS = 1
    OTHER = 2
    NOBODY = 3


class HvHcall:
    """struct kvm_hv_hcall: a decoded hypercall.

    `offset` counts the bytes of input that were used, or the XMM halves of a fast call.
    """

    __slots__ = ("code", "fast", "ingpa", "offset", "outgpa", "param", "rep_cnt", "rep_idx", "var_cnt", "xmm")

    def __init__(self, param: int, ingpa: int, outgpa: int) -> None:
        self.param = param
        self.ingpa = ingpa
        self.outgpa = outgpa
        self.code = param & 0xFFFF
        self.fast = bool(param & hv.HV_HYPERCALL_FAST_BIT)
        self.var_cnt = param >> hv.HV_HYPERCALL_VARHEAD_OFFSET & hv.HV_HYPERCALL_VARHEAD_MASK
        self.rep_cnt = param >> hv.HV_HYPERCALL_REP_COMP_OFFSET & hv.HV_HYPERCALL_REP_MASK
        self.rep_idx = param >> hv.HV_HYPERCALL_REP_START_OFFSET & hv.HV_HYPERCALL_REP_MASK
        self.xmm = [0] * hv.HV_HYPERCALL_MAX_XMM_REGISTERS
        self.offset = 0

    @property
    def rep(self) -> bool:
        """The control word asks for repetition."""
        return bool(self.rep_cnt or self.rep_idx)

    def xmm_half(self, index: int) -> int:
        """64 bits of the XMM registers, the low half of each first."""
        return self.xmm[index // 2] >> (index % 2 * 64) & _MASK64

    def advance(self, count: int) -> None:
        """Use up `count` numbers of 64 bits."""
        self.offset += count if self.fast else 8 * count


def _hc_data(vcpu: Vcpu, call: HvHcall, count: int, cap: int) -> tuple[int, ...] | None:
    """The next numbers of the input, at most `cap` of `count`; None if they cannot be had."""
    wanted = min(count, cap)
    if call.fast:
        if count > _XMM_HALVES - call.offset:
            return None
        return tuple(call.xmm_half(call.offset + index) for index in range(wanted))
    data = vcpu.hooks.read_phys(call.ingpa + call.offset & _MASK64, 8 * wanted)
    return None if data is None else struct.unpack(f"<{wanted}Q", data)


def _sparse_vp_set(vcpu: Vcpu, call: HvHcall) -> tuple[int, ...] | None:
    """The banks, as many as the header has; those of vCPUs that KVM cannot have are left out."""
    return _hc_data(vcpu, call, call.var_cnt, hv.KVM_HV_MAX_SPARSE_VCPU_SET_BITS)


def _includes_this_vp(valid_bank_mask: int, banks: tuple[int, ...]) -> bool:
    """Virtual processor 0 is bit 0 of bank 0, the first one if it is there at all."""
    return bool(valid_bank_mask & 1 and banks and banks[0] & 1)


# -- TLB ---------------------------------------------------------------------------------------


def kvm_hv_flush_tlb(vcpu: Vcpu, call: HvHcall) -> int:
    """Flush address spaces or lists of addresses: the result.

    KVM deviation: an empty processor mask means all of them, and the address space is ignored (TLFS 9.4.6).
    """
    extended = call.code in (
        hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX,
        hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX,
    )
    for_this_vp = _flush_ex_target(vcpu, call) if extended else _flush_target(vcpu, call)
    if for_this_vp is None:
        return hv.HV_STATUS_INVALID_HYPERCALL_INPUT
    success = hv.HV_STATUS_SUCCESS | call.rep_cnt << hv.HV_HYPERCALL_REP_COMP_OFFSET
    if for_this_vp == Target.NOBODY:
        return success
    entries: tuple[int, ...] | None = None
    by_list = call.code in (hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX)
    if by_list and call.rep_cnt < hv.KVM_HV_TLB_FLUSH_FIFO_SIZE:
        entries = _hc_data(vcpu, call, call.rep_cnt, call.rep_cnt)
        if entries is None:
            return hv.HV_STATUS_INVALID_HYPERCALL_INPUT
    if for_this_vp == Target.THIS:
        _tlb_flush_enqueue(vcpu, entries)
    return success


def _flush_target(vcpu: Vcpu, call: HvHcall) -> Target | None:
    """Whom to flush; None if the input cannot be read."""
    if call.fast:
        space, flags, mask = call.ingpa, call.outgpa, call.xmm_half(0)
        call.offset = 1
    else:
        data = vcpu.hooks.read_phys(call.ingpa, _FLUSH.size)
        if data is None:
            return None
        space, flags, mask = _FLUSH.unpack(data)
        call.offset = _FLUSH.size
    emit(
        vcpu, "kvm_hv_flush_tlb", processor_mask=mask, address_space=space, flags=flags,
        guest_mode=vcpu.guest_mode is not None,
    )  # fmt: skip
    return Target.THIS if flags & hv.HV_FLUSH_ALL_PROCESSORS or not mask or mask & 1 else Target.OTHER


def _flush_ex_target(vcpu: Vcpu, call: HvHcall) -> Target | None:
    """The same with a sparse set of processors, which may also be empty."""
    if call.fast:
        space, flags, form, valid = call.ingpa, call.outgpa, call.xmm_half(0), call.xmm_half(1)
        call.offset = 2
    else:
        data = vcpu.hooks.read_phys(call.ingpa, _FLUSH_EX.size)
        if data is None:
            return None
        space, flags, form, valid = _FLUSH_EX.unpack(data)
        call.offset = _FLUSH_EX.size
    emit(
        vcpu, "kvm_hv_flush_tlb_ex", valid_bank_mask=valid, format=form, address_space=space, flags=flags,
        guest_mode=vcpu.guest_mode is not None,
    )  # fmt: skip
    if call.var_cnt != valid.bit_count():
        return None
    included = True
    if form == hv.HV_GENERIC_SET_SPARSE_4K:
        if not call.var_cnt:
            return Target.NOBODY
        banks = _sparse_vp_set(vcpu, call)
        if banks is None:
            return None
        included = _includes_this_vp(valid, banks)
    call.advance(call.var_cnt)
    return Target.THIS if included else Target.OTHER


def _tlb_flush_enqueue(vcpu: Vcpu, entries: tuple[int, ...] | None) -> None:
    """Ask for a flush, of everything where the entries have no room."""
    fifo = vcpu.hyperv.tlb_flush_fifo
    room = hv.KVM_HV_TLB_FLUSH_FIFO_SIZE - len(fifo)
    if entries and len(entries) < room:
        fifo.extend(entries)
    elif room:
        fifo.append(hv.KVM_HV_TLB_FLUSHALL_ENTRY)
    vcpu.make_request(KVM_REQ_HV_TLB_FLUSH)


def kvm_hv_vcpu_flush_tlb(vcpu: Vcpu) -> None:
    """Before an entry: do what was asked for by KVM_REQ_HV_TLB_FLUSH; a full flush becomes a request.

    Single addresses are flushed only with EPT, as KVM does.
    """
    if not vcpu.check_request(KVM_REQ_HV_TLB_FLUSH):
        return
    fifo = vcpu.hyperv.tlb_flush_fifo
    everything = not vcpu.options.ept or hv.KVM_HV_TLB_FLUSHALL_ENTRY in fifo
    if everything:
        vcpu.make_request(KVM_REQ_TLB_FLUSH_GUEST)
    else:
        for entry in fifo:
            _flush_entry(vcpu, entry)
    fifo.clear()


def _flush_entry(vcpu: Vcpu, entry: int) -> None:
    if is_noncanonical_address(vcpu, entry, X86EMUL_F_INVLPG):
        return
    first = entry & ~_PAGE_MASK
    for page in range((entry & _PAGE_MASK) + 1):
        vcpu.hooks.mmu_invalidate_addr(first + page * _PAGE_SIZE & _MASK64)


# -- IPIs --------------------------------------------------------------------------------------


def kvm_hv_send_ipi(vcpu: Vcpu, call: HvHcall) -> int:
    """Send a fixed interrupt to a set of virtual processors: the result."""
    if vcpu.apic is None:
        return hv.HV_STATUS_INVALID_HYPERCALL_INPUT
    target = _ipi_target(vcpu, call) if call.code == hv.HVCALL_SEND_IPI else _ipi_ex_target(vcpu, call)
    if target is None:
        return hv.HV_STATUS_INVALID_HYPERCALL_INPUT
    vector, included = target
    if included == Target.NOBODY:
        return hv.HV_STATUS_SUCCESS
    if not hv.HV_IPI_LOW_VECTOR <= vector <= hv.HV_IPI_HIGH_VECTOR:
        return hv.HV_STATUS_INVALID_HYPERCALL_INPUT
    if included == Target.THIS:
        kvm_apic_set_irq(vcpu, APIC_DM_FIXED, vector, level=False, trig_mode=False)
    return hv.HV_STATUS_SUCCESS


def _ipi_target(vcpu: Vcpu, call: HvHcall) -> tuple[int, Target] | None:
    """(vector, whom for); None if the input is bad."""
    if call.fast:
        if call.ingpa >> 32:
            return None
        vector, mask = call.ingpa, call.outgpa
    else:
        data = vcpu.hooks.read_phys(call.ingpa, _SEND_IPI.size)
        if data is None:
            return None
        vector, _, mask = _SEND_IPI.unpack(data)
    emit(vcpu, "kvm_hv_send_ipi", vector=vector, processor_mask=mask)
    return vector, Target.THIS if mask & 1 else Target.OTHER


def _ipi_ex_target(vcpu: Vcpu, call: HvHcall) -> tuple[int, Target] | None:
    """The same with a sparse set of processors, which may also be empty."""
    if call.fast:
        vector, form, valid = call.ingpa & _MASK32, call.outgpa, call.xmm_half(0)
        call.offset = 1
    else:
        data = vcpu.hooks.read_phys(call.ingpa, _SEND_IPI_EX.size)
        if data is None:
            return None
        vector, _, form, valid = _SEND_IPI_EX.unpack(data)
        call.offset = _SEND_IPI_EX.size
    emit(vcpu, "kvm_hv_send_ipi_ex", vector=vector, format=form, valid_bank_mask=valid)
    if call.var_cnt != valid.bit_count():
        return None
    if form == hv.HV_GENERIC_SET_ALL:
        return vector, Target.THIS
    if not call.var_cnt:
        return vector, Target.NOBODY
    banks = _sparse_vp_set(vcpu, call)
    if banks is None:
        return None
    return vector, Target.THIS if _includes_this_vp(valid, banks) else Target.OTHER

"""The tracepoints of KVM that the model hits: their fields, and the text they are printed in.

Fields have the names of the record in Linux 6.12 (arch/x86/kvm/trace.h, arch/x86/kvm/mmu/mmutrace.h,
include/trace/events/kvm.h), without the vCPU's number, which is the same for all events of a trace, and
without the instruction set, which is VMX. Two records have other fields: kvm_emulate_insn has the emulator's
X86EMUL_MODE_* for `flags` and a bytes object for `len` and `insn`; the reason of kvm_userspace_exit is a
name, as `KvmRun.exit_reason`. All fields are integers or truth values otherwise, but for these words:
`rw` is "read" or "write", and `type` of kvm_mmio is "unsatisfied-read" (the read leaves to userspace and
`val` is 0), "read" or "write".

The text is that of the kernel's own format, which trace_pipe and `trace-cmd report -N` show; without -N
a plugin of trace-cmd shortens kvm_entry, kvm_exit and kvm_emulate_insn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from emufuzz.kvm import trace_format as f
from emufuzz.kvm.trace_format import DEC, HEX, HEX0X, HEX0X_8, HEX0X_16, READ_WRITE


class Tracepoint:
    """A tracepoint: its fields with their printers, and the text they are put into.

    `text` is a format string over the printed fields, `vcpu` and `derived`. `derived` prints what
    depends on more than one field, or says more than one thing about a field; it sees raw fields.
    """

    __slots__ = ("derived", "fields", "text")

    def __init__(
        self, text: str, derived: Callable[[f.Fields], str] | None = None, /, **fields: f.Printer
    ) -> None:
        self.text = text
        self.derived = derived
        self.fields = fields

    def format(self, values: f.Fields, vcpu_id: int) -> str:
        """The text of an event with the raw `values`, hit by the vCPU `vcpu_id`."""
        printed = {name: show(values[name]) for name, show in self.fields.items()}
        derived = "" if self.derived is None else self.derived(values)
        return self.text.format_map({**printed, "derived": derived, "vcpu": vcpu_id})


_EXIT_TEXT: Final = (
    "vcpu {vcpu} reason {exit_reason} rip {guest_rip} info1 {info1} info2 {info2} "
    "intr_info {intr_info} error_code {error_code}"
)
_EXIT: Final = Tracepoint(
    _EXIT_TEXT,
    exit_reason=f.exit_reason, guest_rip=HEX0X, info1=HEX0X_16, info2=HEX0X_16, intr_info=HEX0X_8,
    error_code=HEX0X_8,
)  # fmt: skip
_EOI: Final = Tracepoint("apicid {apicid} vector {vector}", apicid=HEX, vector=DEC)
_ACCEPT_IRQ: Final = Tracepoint(
    "apicid {apicid} vec {vec} ({dm}|{tm})",
    apicid=HEX, dm=f.delivery_mode, tm=f.choice("level", "edge"), vec=DEC,
)  # fmt: skip
_SET_BIT: Final = Tracepoint("gpa {gpa}", gpa=HEX)

# fmt: off
# Entries, exits and what exits are about.
_RUN: Final = {
    "kvm_entry": Tracepoint(
        "vcpu {vcpu}, rip {rip}{immediate_exit}",
        rip=HEX0X, immediate_exit=f.choice("[immediate exit]")),
    "kvm_exit": _EXIT,
    "kvm_nested_vmexit": _EXIT,
    "kvm_userspace_exit": Tracepoint("reason {derived}", f.userspace_exit, reason=str, errno=DEC),
    "kvm_hypercall": Tracepoint(
        "nr {nr} a0 {a0} a1 {a1} a2 {a2} a3 {a3}", nr=HEX0X, a0=HEX0X, a1=HEX0X, a2=HEX0X, a3=HEX0X),
    "kvm_hv_hypercall": Tracepoint(
        "code {code} {fast} var_cnt {var_cnt} rep_cnt {rep_cnt} idx {rep_idx} in {ingpa} out {outgpa}",
        code=HEX0X, fast=f.choice("fast", "slow"), var_cnt=HEX0X, rep_cnt=HEX0X, rep_idx=HEX0X,
        ingpa=HEX0X, outgpa=HEX0X),
    "kvm_hv_hypercall_done": Tracepoint("result {result}", result=HEX0X),
    "kvm_hv_flush_tlb": Tracepoint(
        "processor_mask {processor_mask} address_space {address_space} flags {flags} {guest_mode}",
        processor_mask=HEX0X, address_space=HEX0X, flags=HEX0X, guest_mode=f.choice("(L2)")),
    "kvm_hv_flush_tlb_ex": Tracepoint(
        "valid_bank_mask {valid_bank_mask} format {format} address_space {address_space} flags {flags} "
        "{guest_mode}",
        valid_bank_mask=HEX0X, format=HEX0X, address_space=HEX0X, flags=HEX0X, guest_mode=f.choice("(L2)")),
    "kvm_hv_send_ipi": Tracepoint(
        "vector {vector} processor_mask {processor_mask}", vector=HEX, processor_mask=HEX0X),
    "kvm_hv_send_ipi_ex": Tracepoint(
        "vector {vector} format {format} valid_bank_mask {valid_bank_mask}",
        vector=HEX, format=HEX, valid_bank_mask=HEX0X),
    "kvm_cpuid": Tracepoint(
        "func {function} idx {index} rax {rax} rbx {rbx} rcx {rcx} rdx {rdx}, "
        "cpuid entry {found}{used_max_basic}",
        function=HEX, index=HEX, rax=HEX, rbx=HEX, rcx=HEX, rdx=HEX,
        found=f.choice("found", "not found"), used_max_basic=f.choice(", used max basic")),
    "kvm_msr": Tracepoint(
        "msr_{write} {ecx} = {data}{exception}",
        write=f.choice("write", "read"), ecx=HEX, data=HEX0X, exception=f.choice(" (#GP)")),
    "kvm_cr": Tracepoint("cr_{rw} {cr} = {val}", rw=READ_WRITE, cr=HEX, val=HEX0X),
    "kvm_ple_window_update": Tracepoint(
        "vcpu {vcpu} old {old} new {new} ({derived})", f.window_change, new=DEC, old=DEC),
    "kvm_smm_transition": Tracepoint(
        "vcpu {vcpu}: {entering} SMM, smbase {smbase}",
        smbase=HEX0X, entering=f.choice("entering", "leaving")),
    "kvm_fpu": Tracepoint("{load}", load=f.choice("load", "unload")),
}

# The emulator and its input and output.
_EMULATION: Final = {
    "kvm_emulate_insn": Tracepoint(
        "{csbase}:{rip}:{insn} ({mode}){failed}",
        rip=HEX, csbase=HEX, insn=f.hex_bytes, mode=f.EMUL_MODE, failed=f.choice(" failed")),
    "kvm_pio": Tracepoint(
        "pio_{rw} at {port} size {size} count {count} val {val} {derived}", f.repeated,
        rw=READ_WRITE, port=HEX0X, size=DEC, count=DEC, val=HEX0X),
    "kvm_mmio": Tracepoint(
        "mmio {type} len {len} gpa {gpa} val {val}", type=f.MMIO_TYPE, len=DEC, gpa=HEX0X, val=HEX0X),
    "kvm_fast_mmio": Tracepoint("fast mmio at gpa {gpa}", gpa=HEX0X),
    "vcpu_match_mmio": Tracepoint(
        "gva {gva} gpa {gpa} {write} {gpa_match}",
        gva=HEX0X, gpa=HEX0X, write=f.choice("Write", "Read"), gpa_match=f.choice("GPA", "GVA")),
}

# Events for the guest, and the local APIC.
_EVENTS: Final = {
    "kvm_inj_virq": Tracepoint(
        "{soft} {vector}{reinjected}",
        vector=HEX0X, soft=f.choice("Soft/INTn", "IRQ"), reinjected=f.choice(" [reinjected]")),
    "kvm_inj_exception": Tracepoint(
        "{exception}{derived}{reinjected}", f.error_code,
        exception=f.EXCEPTION, has_error=DEC, error_code=HEX0X, reinjected=f.choice(" [reinjected]")),
    "kvm_apic": Tracepoint("apic_{rw} {reg} = {val}", rw=READ_WRITE, reg=f.APIC_REGISTER, val=HEX0X),
    "kvm_apic_ipi": Tracepoint("dst {dest_id} {derived}", f.ipi, icr_low=HEX, dest_id=HEX),
    "kvm_apic_accept_irq": _ACCEPT_IRQ,
    "kvm_apicv_accept_irq": _ACCEPT_IRQ,
    "kvm_eoi": _EOI,
    "kvm_pv_eoi": _EOI,
}

# The MMU.
_MMU: Final = {
    "kvm_page_fault": Tracepoint(
        "vcpu {vcpu} rip {guest_rip} address {fault_address} error_code {error_code}",
        guest_rip=HEX0X, fault_address=HEX0X_16, error_code=HEX0X),
    "kvm_mmu_pagetable_walk": Tracepoint(
        "addr {addr} pferr {derived}", f.pferr_and_flags, addr=HEX, pferr=HEX),
    "kvm_mmu_paging_element": Tracepoint("pte {pte} level {level}", pte=HEX, level=DEC),
    "kvm_mmu_set_accessed_bit": _SET_BIT,
    "kvm_mmu_set_dirty_bit": _SET_BIT,
    "kvm_mmu_walker_error": Tracepoint("pferr {derived}", f.pferr_and_flags, pferr=HEX),
    "mark_mmio_spte": Tracepoint(
        "sptep:{sptep} gfn {gfn} access {access} gen {gen}",
        sptep=HEX0X, gfn=HEX, access=HEX, gen=HEX),
    "check_mmio_spte": Tracepoint(
        "spte {spte} kvm_gen {kvm_gen} spte-gen {spte_gen} valid {derived}", f.generation_valid,
        kvm_gen=HEX, spte_gen=HEX, spte=HEX),
    "handle_mmio_page_fault": Tracepoint(
        "addr:{addr} gfn {gfn} access {access}", addr=HEX, gfn=HEX, access=HEX),
    "fast_page_fault": Tracepoint(
        "vcpu {vcpu} gva {cr2_or_gpa} error_code {error_code} sptep {sptep} "
        "old {old_spte} new {new_spte} {derived}", f.fault_result,
        cr2_or_gpa=HEX, error_code=f.pferr, sptep=HEX0X, old_spte=HEX0X, new_spte=HEX, ret=DEC),
}
# fmt: on

TRACEPOINTS: Final[dict[str, Tracepoint]] = {**_RUN, **_EMULATION, **_EVENTS, **_MMU}

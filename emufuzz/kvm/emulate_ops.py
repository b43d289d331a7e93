"""The emulator's callbacks in KVM: registers through the cache, memory through the MMU.

KVM: emulate_ops and the emulator_* functions of x86.c. Memory operands are in
`emufuzz.kvm.emulated_mmio`, linear accesses in `emufuzz.kvm.guest_virt`, ports in `emufuzz.kvm.pio`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emufuzz.arch.descriptors import DescStruct
from emufuzz.arch.exceptions import UD_VECTOR
from emufuzz.emulator.ctxt import X86EmulateCtxt, X86Exception
from emufuzz.emulator.ops import SegmentState
from emufuzz.emulator.x86emul import (
    X86EMUL_CONTINUE,
    X86EMUL_IO_NEEDED,
    X86EMUL_PROPAGATE_FAULT,
)
from emufuzz.kvm.address import is_noncanonical_address, vmx_get_untagged_addr
from emufuzz.kvm.cr import kvm_get_cr8, kvm_set_cr0, kvm_set_cr3, kvm_set_cr4, kvm_set_cr8
from emufuzz.kvm.debugregs import kvm_get_dr, kvm_set_dr
from emufuzz.kvm.emulated_mmio import (
    emulator_cmpxchg_emulated,
    emulator_read_emulated,
    emulator_write_emulated,
)
from emufuzz.kvm.guest_state import vmx_set_segment
from emufuzz.kvm.guest_virt import fetch_guest_virt, read_guest_virt, user_access, write_guest_virt
from emufuzz.kvm.mmu.pferr import PFERR_IMPLICIT_ACCESS, PFERR_WRITE_MASK
from emufuzz.kvm.msr import (
    kvm_get_msr,
    kvm_get_msr_with_filter,
    kvm_msr_user_space,
    kvm_set_msr_with_filter,
)
from emufuzz.kvm.nested import vmx_check_intercept
from emufuzz.kvm.nmi import vmx_set_nmi_mask
from emufuzz.kvm.pio import emulator_pio_in_emulated, emulator_pio_out
from emufuzz.kvm.pmu import kvm_pmu_rdpmc
from emufuzz.kvm.regs import (
    kvm_read_cr0,
    kvm_read_cr3,
    kvm_read_cr4,
    kvm_register_read_raw,
    kvm_register_write_raw,
    kvm_rip_read,
)
from emufuzz.kvm.segments import (
    get_segment_base,
    vmx_get_cpl,
    vmx_get_gdt,
    vmx_get_idt,
    vmx_get_segment,
    vmx_set_gdt,
    vmx_set_idt,
)
from emufuzz.kvm.smm import emulator_leave_smm
from emufuzz.kvm.vcpu import KVM_REQ_TRIPLE_FAULT, KvmSegment, Vcpu
from emufuzz.kvm.x86_completions import complete_emulated_msr_access, complete_emulated_rdmsr
from emufuzz.kvm.xcr import kvm_set_xcr

if TYPE_CHECKING:
    from emufuzz.kvm.machine import KvmMachine

_MASK32: Final = 0xFFFFFFFF
_NO_DESC: Final = DescStruct()
_VMCALL: Final = b"\x0f\x01\xc1"


class EmulatorOps:
    """X86EmulateOps over one machine; what each callback does is said there."""

    __slots__ = ("machine", "vcpu")

    def __init__(self, machine: KvmMachine, vcpu: Vcpu) -> None:
        self.machine = machine
        self.vcpu = vcpu

    def vm_bugged(self, ctxt: X86EmulateCtxt) -> None:
        """X86EmulateOps.vm_bugged: the model contradicts itself, which is a finding."""
        raise AssertionError("KVM_EMULATOR_BUG_ON")

    # -- general-purpose registers ---------------------------------------------------------

    def read_gpr(self, ctxt: X86EmulateCtxt, reg: int) -> int:
        """X86EmulateOps.read_gpr."""
        return kvm_register_read_raw(self.vcpu, reg)

    def write_gpr(self, ctxt: X86EmulateCtxt, reg: int, val: int) -> None:
        """X86EmulateOps.write_gpr."""
        kvm_register_write_raw(self.vcpu, reg, val)

    # -- memory ----------------------------------------------------------------------------

    def read_std(
        self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception | None, system: bool
    ) -> tuple[int, bytes]:
        """X86EmulateOps.read_std."""
        mmu = self.machine.mmu
        return read_guest_virt(mmu, addr, size, PFERR_IMPLICIT_ACCESS if system else user_access(mmu), fault)

    def write_std(
        self, ctxt: X86EmulateCtxt, addr: int, data: bytes, fault: X86Exception | None, system: bool
    ) -> int:
        """X86EmulateOps.write_std."""
        mmu = self.machine.mmu
        access = PFERR_WRITE_MASK | (PFERR_IMPLICIT_ACCESS if system else user_access(mmu))
        return write_guest_virt(mmu, addr, data, access, fault)

    def fetch(self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception) -> tuple[int, bytes]:
        """X86EmulateOps.fetch."""
        return fetch_guest_virt(self.machine.mmu, addr, size, fault)

    def read_emulated(
        self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception
    ) -> tuple[int, bytes]:
        """X86EmulateOps.read_emulated."""
        return emulator_read_emulated(self.machine, ctxt, addr, size, fault)

    def write_emulated(self, ctxt: X86EmulateCtxt, addr: int, data: bytes, fault: X86Exception) -> int:
        """X86EmulateOps.write_emulated."""
        return emulator_write_emulated(self.machine, ctxt, addr, data, fault)

    def cmpxchg_emulated(
        self, ctxt: X86EmulateCtxt, addr: int, old: bytes, new: bytes, fault: X86Exception
    ) -> int:
        """X86EmulateOps.cmpxchg_emulated."""
        return emulator_cmpxchg_emulated(self.machine, ctxt, addr, old, new, fault)

    def invlpg(self, ctxt: X86EmulateCtxt, addr: int) -> None:
        """X86EmulateOps.invlpg."""
        self.machine.mmu.invlpg(addr)

    def get_untagged_addr(self, ctxt: X86EmulateCtxt, addr: int, flags: int) -> int:
        """X86EmulateOps.get_untagged_addr."""
        return vmx_get_untagged_addr(self.vcpu, addr, flags)

    def is_canonical_addr(self, ctxt: X86EmulateCtxt, addr: int, flags: int) -> bool:
        """X86EmulateOps.is_canonical_addr."""
        return not is_noncanonical_address(self.vcpu, addr, flags)

    # -- ports -----------------------------------------------------------------------------

    def pio_in_emulated(self, ctxt: X86EmulateCtxt, size: int, port: int, count: int) -> bytes | None:
        """X86EmulateOps.pio_in_emulated."""
        return emulator_pio_in_emulated(self.vcpu, self.machine.pio, size, port, count)

    def pio_out_emulated(self, ctxt: X86EmulateCtxt, size: int, port: int, data: bytes, count: int) -> bool:
        """X86EmulateOps.pio_out_emulated."""
        return emulator_pio_out(self.vcpu, self.machine.pio, self.machine.buses, size, port, data, count)

    # -- segments and descriptor tables ------------------------------------------------------

    def cpl(self, ctxt: X86EmulateCtxt) -> int:
        """X86EmulateOps.cpl."""
        return vmx_get_cpl(self.vcpu)

    def get_segment(self, ctxt: X86EmulateCtxt, seg: int) -> SegmentState:
        """X86EmulateOps.get_segment."""
        var = vmx_get_segment(self.vcpu, seg)
        if var.unusable:
            return SegmentState(False, var.selector, _NO_DESC, 0)
        limit = var.limit >> 12 if var.g else var.limit
        desc = DescStruct(
            var.base & _MASK32, limit, var.type, var.s, var.dpl, var.present, var.avl, var.l, var.db, var.g
        )
        return SegmentState(True, var.selector, desc, var.base >> 32)

    def set_segment(
        self, ctxt: X86EmulateCtxt, selector: int, desc: DescStruct, base3: int, seg: int
    ) -> None:
        """X86EmulateOps.set_segment."""
        var = KvmSegment(
            selector, desc.base | base3 << 32, desc.limit_scaled, desc.type, desc.s, desc.dpl, desc.p,
            desc.avl, desc.l, desc.d, desc.g, unusable=1 - desc.p,
        )  # fmt: skip
        vmx_set_segment(self.vcpu, var, seg)

    def get_cached_segment_base(self, ctxt: X86EmulateCtxt, seg: int) -> int:
        """X86EmulateOps.get_cached_segment_base."""
        return get_segment_base(self.vcpu, seg)

    def get_gdt(self, ctxt: X86EmulateCtxt) -> tuple[int, int]:
        """X86EmulateOps.get_gdt."""
        return vmx_get_gdt(self.vcpu)

    def get_idt(self, ctxt: X86EmulateCtxt) -> tuple[int, int]:
        """X86EmulateOps.get_idt."""
        return vmx_get_idt(self.vcpu)

    def set_gdt(self, ctxt: X86EmulateCtxt, address: int, limit: int) -> None:
        """X86EmulateOps.set_gdt."""
        vmx_set_gdt(self.vcpu, address, limit)

    def set_idt(self, ctxt: X86EmulateCtxt, address: int, limit: int) -> None:
        """X86EmulateOps.set_idt."""
        vmx_set_idt(self.vcpu, address, limit)

    # -- control, debug and model-specific registers -----------------------------------------

    def get_cr(self, ctxt: X86EmulateCtxt, cr: int) -> int:
        """X86EmulateOps.get_cr."""
        vcpu = self.vcpu
        if cr == 0:
            return kvm_read_cr0(vcpu)
        if cr == 4:
            return kvm_read_cr4(vcpu)
        if cr == 3:
            return kvm_read_cr3(vcpu)
        if cr == 8:
            return kvm_get_cr8(vcpu)
        return vcpu.cr2 if cr == 2 else 0

    def set_cr(self, ctxt: X86EmulateCtxt, cr: int, val: int) -> int:
        """X86EmulateOps.set_cr.

        KVM deviation: bits 63:32 of a value for CR0 or CR4 are ignored (SDM Vol. 2B MOV CRn: #GP).
        """
        vcpu = self.vcpu
        if cr == 0:
            return kvm_set_cr0(vcpu, kvm_read_cr0(vcpu) & ~_MASK32 | val & _MASK32)
        if cr == 2:
            vcpu.cr2 = val
            return 0
        if cr == 3:
            return kvm_set_cr3(vcpu, val)
        if cr == 4:
            return kvm_set_cr4(vcpu, kvm_read_cr4(vcpu) & ~_MASK32 | val & _MASK32)
        return kvm_set_cr8(vcpu, val) if cr == 8 else -1

    def get_dr(self, ctxt: X86EmulateCtxt, dr: int) -> int:
        """X86EmulateOps.get_dr."""
        return kvm_get_dr(self.vcpu, dr)

    def set_dr(self, ctxt: X86EmulateCtxt, dr: int, val: int) -> int:
        """X86EmulateOps.set_dr."""
        return kvm_set_dr(self.vcpu, dr, val)

    def get_msr(self, ctxt: X86EmulateCtxt, index: int) -> tuple[int, int]:
        """X86EmulateOps.get_msr."""
        return kvm_get_msr(self.vcpu, index)

    def get_msr_with_filter(self, ctxt: X86EmulateCtxt, index: int) -> tuple[int, int]:
        """X86EmulateOps.get_msr_with_filter."""
        vcpu = self.vcpu
        result, data = kvm_get_msr_with_filter(vcpu, index)
        if result:
            if kvm_msr_user_space(vcpu, index, None, complete_emulated_rdmsr(self.machine), result):
                return X86EMUL_IO_NEEDED, 0
            data = 0
        if vcpu.trace is not None:
            vcpu.trace.emit("kvm_msr", write=False, ecx=index, data=data, exception=bool(result))
        return X86EMUL_PROPAGATE_FAULT if result else X86EMUL_CONTINUE, data

    def set_msr_with_filter(self, ctxt: X86EmulateCtxt, index: int, data: int) -> int:
        """X86EmulateOps.set_msr_with_filter."""
        vcpu = self.vcpu
        result = kvm_set_msr_with_filter(vcpu, index, data)
        if result and kvm_msr_user_space(
            vcpu, index, data, complete_emulated_msr_access(self.machine), result
        ):
            return X86EMUL_IO_NEEDED
        if vcpu.trace is not None:
            vcpu.trace.emit("kvm_msr", write=True, ecx=index, data=data, exception=bool(result))
        return X86EMUL_PROPAGATE_FAULT if result else X86EMUL_CONTINUE

    def check_rdpmc_early(self, ctxt: X86EmulateCtxt, pmc: int) -> int:
        """X86EmulateOps.check_rdpmc_early: nothing is checked early on Intel."""
        return 0

    def read_pmc(self, ctxt: X86EmulateCtxt, pmc: int) -> tuple[int, int]:
        """X86EmulateOps.read_pmc."""
        return kvm_pmu_rdpmc(self.vcpu, pmc)

    def set_xcr(self, ctxt: X86EmulateCtxt, index: int, val: int) -> int:
        """X86EmulateOps.set_xcr."""
        return kvm_set_xcr(self.vcpu, index, val)

    # -- everything else ---------------------------------------------------------------------

    def halt(self, ctxt: X86EmulateCtxt) -> None:
        """X86EmulateOps.halt.

        KVM deviation: only the handlers of real mode and of invalid guest state look at the request,
        maybe of an earlier instruction; elsewhere HLT does nothing (SDM Vol. 2A HLT).
        """
        self.vcpu.halt_request = True

    def wbinvd(self, ctxt: X86EmulateCtxt) -> None:
        """X86EmulateOps.wbinvd: the model has no caches."""

    def fix_hypercall(self, ctxt: X86EmulateCtxt) -> int:
        """X86EmulateOps.fix_hypercall: patch in VMCALL, or #UD with the quirk disabled."""
        if not self.vcpu.options.has_quirk("fix_hypercall_insn"):
            ctxt.exception.error_code_valid = False
            ctxt.exception.vector = UD_VECTOR
            ctxt.have_exception = True
            return X86EMUL_PROPAGATE_FAULT
        return emulator_write_emulated(self.machine, ctxt, kvm_rip_read(self.vcpu), _VMCALL, ctxt.exception)

    def intercept(self, ctxt: X86EmulateCtxt, stage: int) -> int:
        """X86EmulateOps.intercept."""
        nested = self.vcpu.guest_mode
        return X86EMUL_CONTINUE if nested is None else vmx_check_intercept(ctxt, nested)

    def get_cpuid(
        self, ctxt: X86EmulateCtxt, eax: int, ecx: int, exact_only: bool
    ) -> tuple[bool, int, int, int, int]:
        """X86EmulateOps.get_cpuid."""
        vcpu = self.vcpu
        found, *regs = vcpu.cpuid.cpuid(eax, ecx, exact_only=exact_only)
        if vcpu.trace is not None:
            trace_cpuid(vcpu, eax, ecx, regs, found=found)
        return found, regs[0], regs[1], regs[2], regs[3]

    def guest_has_movbe(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.guest_has_movbe."""
        return self.vcpu.cpuid.has("movbe")

    def guest_has_fxsr(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.guest_has_fxsr."""
        return self.vcpu.cpuid.has("fxsr")

    def guest_has_rdpid(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.guest_has_rdpid."""
        return self.vcpu.cpuid.has("rdpid")

    def guest_cpuid_is_intel_compatible(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.guest_cpuid_is_intel_compatible."""
        return self.vcpu.cpuid.intel_compatible

    def set_nmi_mask(self, ctxt: X86EmulateCtxt, masked: bool) -> None:
        """X86EmulateOps.set_nmi_mask."""
        vmx_set_nmi_mask(self.vcpu, masked=masked)

    def is_smm(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.is_smm."""
        return self.vcpu.smm

    def leave_smm(self, ctxt: X86EmulateCtxt) -> int:
        """X86EmulateOps.leave_smm."""
        return emulator_leave_smm(ctxt, self.vcpu, self.machine.mmu.slots.read_guest)

    def triple_fault(self, ctxt: X86EmulateCtxt) -> None:
        """X86EmulateOps.triple_fault."""
        self.vcpu.make_request(KVM_REQ_TRIPLE_FAULT)


def trace_cpuid(vcpu: Vcpu, eax: int, ecx: int, regs: list[int], *, found: bool) -> None:
    """The tracepoint of CPUID, from the emulator or from the exit."""
    if vcpu.trace is not None:
        rax, rbx, rcx, rdx = regs
        vcpu.trace.emit(
            "kvm_cpuid", function=eax, index=ecx, rax=rax, rbx=rbx, rcx=rcx, rdx=rdx, found=found,
            used_max_basic=False,
        )  # fmt: skip

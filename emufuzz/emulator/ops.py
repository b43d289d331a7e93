"""The callbacks through which the emulator sees its vcpu (struct x86_emulate_ops).

Every callback gets the context first. Results are X86EMUL_* values unless said otherwise; a
callback that also returns data returns (result, data), and the data counts only with
X86EMUL_CONTINUE. On X86EMUL_PROPAGATE_FAULT the callback has filled the exception it was given.
Linear addresses and values are unsigned ints, memory contents are bytes in memory order.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from emufuzz.arch.descriptors import DescStruct
from emufuzz.emulator.ctxt import X86EmulateCtxt, X86Exception


class SegmentState(NamedTuple):
    """What get_segment reports: usable or not, selector, descriptor, base bits 63:32."""

    usable: bool
    selector: int
    desc: DescStruct
    base3: int


class X86EmulateOps(Protocol):
    """KVM's x86_emulate_ops."""

    def vm_bugged(self, ctxt: X86EmulateCtxt) -> None:
        """Mark the virtual machine as dead after an internal inconsistency (KVM_EMULATOR_BUG_ON).

        Called by read_emulated, _finish, emulate_exception.
        """

    def read_gpr(self, ctxt: X86EmulateCtxt, reg: int) -> int:
        """The raw 64-bit value of GPR 0..15; called at most once per register and emulation.

        Called by reg_read.
        """

    def write_gpr(self, ctxt: X86EmulateCtxt, reg: int, val: int) -> None:
        """Store 64 bits into GPR 0..15.

        Called by writeback_registers.
        """

    def read_std(
        self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception | None, system: bool
    ) -> tuple[int, bytes]:
        """Read `size` bytes of RAM at linear `addr`, at CPL 0 if `system`, else at the current CPL.

        Used for descriptors, TSS, IVT, the I/O bitmap and FXRSTOR. X86EMUL_IO_NEEDED where there
        is no RAM. `fault` is None where the caller has no use for it (the I/O bitmap).

        Called by segmented_read_std, linear_read_system, _read_word.
        """

    def write_std(
        self, ctxt: X86EmulateCtxt, addr: int, data: bytes, fault: X86Exception | None, system: bool
    ) -> int:
        """Write RAM at linear `addr`, as read_std reads it.

        Called by segmented_write_std, linear_write_system.
        """

    def fetch(self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception) -> tuple[int, bytes]:
        """Read `size` (1..15) instruction bytes that lie in one page.

        Called by do_insn_fetch_bytes.
        """

    def read_emulated(
        self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception
    ) -> tuple[int, bytes]:
        """Read an operand, 1..16 bytes, from RAM or MMIO; X86EMUL_IO_NEEDED asks userspace first.

        Called by read_emulated.
        """

    def write_emulated(self, ctxt: X86EmulateCtxt, addr: int, data: bytes, fault: X86Exception) -> int:
        """Write an operand to RAM or MMIO; an MMIO write succeeds at once.

        Called by segmented_write.
        """

    def cmpxchg_emulated(
        self, ctxt: X86EmulateCtxt, addr: int, old: bytes, new: bytes, fault: X86Exception
    ) -> int:
        """Replace `old` by `new` atomically; X86EMUL_CMPXCHG_FAILED if memory holds something else.

        Falls back to a plain write where no atomic access is possible.

        Called by segmented_cmpxchg, _mark_and_set.
        """

    def invlpg(self, ctxt: X86EmulateCtxt, addr: int) -> None:
        """Drop translations of the page at linear `addr`.

        Called by em_invlpg.
        """

    def pio_in_emulated(self, ctxt: X86EmulateCtxt, size: int, port: int, count: int) -> bytes | None:
        """Read `count` elements of `size` (1, 2, 4) bytes from a port; None = userspace must do it.

        Called by em_in.
        """

    def pio_out_emulated(self, ctxt: X86EmulateCtxt, size: int, port: int, data: bytes, count: int) -> bool:
        """Write `count` elements to a port; False = userspace must do it.

        Called by em_out.
        """

    def get_segment(self, ctxt: X86EmulateCtxt, seg: int) -> SegmentState:
        """A segment register (VCPU_SREG_*); an unusable one has a zeroed descriptor.

        Called by stack_mask, linearize, emulator_recalc_and_set_mode, _decode_prefixes, em_call_far and
        others.
        """

    def set_segment(
        self, ctxt: X86EmulateCtxt, selector: int, desc: DescStruct, base3: int, seg: int
    ) -> None:
        """Load a segment register with its hidden part; the base is desc.base + base3 << 32.

        Called by em_call_far, _load_flat_segments, set_segment_selector, _set, _do_task_switch.
        """

    def get_cached_segment_base(self, ctxt: X86EmulateCtxt, seg: int) -> int:
        """The 64-bit base of a segment register.

        Called by linearize, _do_task_switch.
        """

    def get_gdt(self, ctxt: X86EmulateCtxt) -> tuple[int, int]:
        """GDTR as (linear base, limit in bytes).

        Called by em_sgdt, _descriptor_table.
        """

    def get_idt(self, ctxt: X86EmulateCtxt) -> tuple[int, int]:
        """IDTR as (linear base, limit in bytes).

        Called by _emulate_int_real, em_sidt, _read_interrupt_descriptor.
        """

    def set_gdt(self, ctxt: X86EmulateCtxt, address: int, limit: int) -> None:
        """Load GDTR (LGDT).

        Called by em_lgdt.
        """

    def set_idt(self, ctxt: X86EmulateCtxt, address: int, limit: int) -> None:
        """Load IDTR (LIDT).

        Called by em_lidt.
        """

    def get_cr(self, ctxt: X86EmulateCtxt, cr: int) -> int:
        """CR0, CR2, CR3, CR4 or CR8.

        Called by _linearize_high, emulator_recalc_and_set_mode, _check_fpu, _check_x87, _check_fxsr and
        others.
        """

    def set_cr(self, ctxt: X86EmulateCtxt, cr: int, val: int) -> int:
        """Load a control register; 0 = done, else the value is not allowed.

        Called by em_cr_write, em_lmsw, em_clts, _do_task_switch, _load_tss32.
        """

    def cpl(self, ctxt: X86EmulateCtxt) -> int:
        """The current privilege level, 0..3.

        Called by _check, emulator_bad_iopl, em_jmp_far, em_call_far, em_ret_far and others.
        """

    def get_dr(self, ctxt: X86EmulateCtxt, dr: int) -> int:
        """DR0..DR7; 4 and 5 alias 6 and 7.

        Called by check_dr_read, sw_dr_read, _do_task_switch.
        """

    def set_dr(self, ctxt: X86EmulateCtxt, dr: int, val: int) -> int:
        """Load a debug register; 0 = done, 1 = the value is not allowed.

        Called by check_dr_read, em_dr_write, _do_task_switch.
        """

    def set_msr_with_filter(self, ctxt: X86EmulateCtxt, index: int, data: int) -> int:
        """WRMSR, through the userspace MSR filter.

        Called by em_wrmsr.
        """

    def get_msr_with_filter(self, ctxt: X86EmulateCtxt, index: int) -> tuple[int, int]:
        """RDMSR, through the userspace MSR filter.

        Called by em_rdmsr.
        """

    def get_msr(self, ctxt: X86EmulateCtxt, index: int) -> tuple[int, int]:
        """Read an MSR for the emulator's own use (EFER, STAR, SYSENTER_* ...); 0 = done.

        Called by emulator_recalc_and_set_mode, em_rdtsc, em_rdpid, _msr, em_cpuid and others.
        """

    def check_rdpmc_early(self, ctxt: X86EmulateCtxt, pmc: int) -> int:
        """0 if the performance counter index exists.

        Called by check_rdpmc.
        """

    def read_pmc(self, ctxt: X86EmulateCtxt, pmc: int) -> tuple[int, int]:
        """A performance counter; result 0 = done.

        Called by em_rdpmc.
        """

    def halt(self, ctxt: X86EmulateCtxt) -> None:
        """HLT was executed.

        Called by sw_hlt.
        """

    def wbinvd(self, ctxt: X86EmulateCtxt) -> None:
        """WBINVD was executed.

        Called by sw_wbinvd.
        """

    def fix_hypercall(self, ctxt: X86EmulateCtxt) -> int:
        """Patch the hypercall at RIP into the one this host's CPU has (em_hypercall).

        Called by em_hypercall.
        """

    def intercept(self, ctxt: X86EmulateCtxt, stage: int) -> int:
        """Ask a nested hypervisor whether it intercepts the decoded instruction at this stage.

        Called by x86_emulate_insn, _check.
        """

    def get_cpuid(
        self, ctxt: X86EmulateCtxt, eax: int, ecx: int, exact_only: bool
    ) -> tuple[bool, int, int, int, int]:
        """CPUID: (leaf exists, EAX, EBX, ECX, EDX).

        Called by string_registers_quirk, em_cpuid.
        """

    def guest_has_movbe(self, ctxt: X86EmulateCtxt) -> bool:
        """CPUID.01H:ECX.MOVBE.

        Called by em_movbe.
        """

    def guest_has_fxsr(self, ctxt: X86EmulateCtxt) -> bool:
        """CPUID.01H:EDX.FXSR.

        Called by _check_fxsr.
        """

    def guest_has_rdpid(self, ctxt: X86EmulateCtxt) -> bool:
        """CPUID.07H:ECX.RDPID.

        Called by em_rdpid.
        """

    def guest_cpuid_is_intel_compatible(self, ctxt: X86EmulateCtxt) -> bool:
        """The guest's CPUID vendor is not AMD's (or Hygon's).

        Called by em_syscall, em_sysenter.
        """

    def set_nmi_mask(self, ctxt: X86EmulateCtxt, masked: bool) -> None:
        """Block or unblock NMIs (IRET unblocks).

        Called by _emulate_iret_real.
        """

    def is_smm(self, ctxt: X86EmulateCtxt) -> bool:
        """The vcpu is in system-management mode.

        Called by em_rsm.
        """

    def leave_smm(self, ctxt: X86EmulateCtxt) -> int:
        """RSM: restore the state from SMRAM; X86EMUL_CONTINUE if it was valid.

        Called by em_rsm.
        """

    def triple_fault(self, ctxt: X86EmulateCtxt) -> None:
        """Request a shutdown of the vcpu.

        Called by em_rsm.
        """

    def set_xcr(self, ctxt: X86EmulateCtxt, index: int, val: int) -> int:
        """XSETBV; 0 = done.

        Called by em_xsetbv.
        """

    def get_untagged_addr(self, ctxt: X86EmulateCtxt, addr: int, flags: int) -> int:
        """Strip address tags (LAM) as the access flags X86EMUL_F_* allow.

        Called by _linearize_high.
        """

    def is_canonical_addr(self, ctxt: X86EmulateCtxt, addr: int, flags: int) -> bool:
        """The address is canonical for this access (48 bits, 57 with CR4.LA57).

        Called by _load_desc_ptr, em_sysexit, _mark_and_set.
        """

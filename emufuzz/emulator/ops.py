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
        """Mark the virtual machine as dead after an internal inconsistency (KVM_EMULATOR_BUG_ON)."""

    def read_gpr(self, ctxt: X86EmulateCtxt, reg: int) -> int:
        """The raw 64-bit value of GPR 0..15; called at most once per register and emulation."""

    def write_gpr(self, ctxt: X86EmulateCtxt, reg: int, val: int) -> None:
        """Store 64 bits into GPR 0..15; called by writeback_registers."""

    def read_std(
        self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception | None, system: bool
    ) -> tuple[int, bytes]:
        """Read `size` bytes of RAM at linear `addr`, at CPL 0 if `system`, else at the current CPL.

        Used for descriptors, TSS, IVT, the I/O bitmap and FXRSTOR. X86EMUL_IO_NEEDED where there
        is no RAM. `fault` is None where the caller has no use for it (the I/O bitmap).
        """

    def write_std(
        self, ctxt: X86EmulateCtxt, addr: int, data: bytes, fault: X86Exception | None, system: bool
    ) -> int:
        """Write RAM at linear `addr`, as read_std reads it."""

    def fetch(self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception) -> tuple[int, bytes]:
        """Read `size` (1..15) instruction bytes that lie in one page; called by _do_insn_fetch_bytes."""

    def read_emulated(
        self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception
    ) -> tuple[int, bytes]:
        """Read an operand, 1..16 bytes, from RAM or MMIO; X86EMUL_IO_NEEDED asks userspace first."""

    def write_emulated(self, ctxt: X86EmulateCtxt, addr: int, data: bytes, fault: X86Exception) -> int:
        """Write an operand to RAM or MMIO; an MMIO write succeeds at once."""

    def cmpxchg_emulated(
        self, ctxt: X86EmulateCtxt, addr: int, old: bytes, new: bytes, fault: X86Exception
    ) -> int:
        """Replace `old` by `new` atomically; X86EMUL_CMPXCHG_FAILED if memory holds something else.

        Falls back to a plain write where no atomic access is possible.
        """

    def invlpg(self, ctxt: X86EmulateCtxt, addr: int) -> None:
        """Drop translations of the page at linear `addr`."""

    def pio_in_emulated(self, ctxt: X86EmulateCtxt, size: int, port: int, count: int) -> bytes | None:
        """Read `count` elements of `size` (1, 2, 4) bytes from a port; None = userspace must do it."""

    def pio_out_emulated(self, ctxt: X86EmulateCtxt, size: int, port: int, data: bytes, count: int) -> bool:
        """Write `count` elements to a port; False = userspace must do it."""

    def get_segment(self, ctxt: X86EmulateCtxt, seg: int) -> SegmentState:
        """A segment register (VCPU_SREG_*); an unusable one has a zeroed descriptor."""

    def set_segment(
        self, ctxt: X86EmulateCtxt, selector: int, desc: DescStruct, base3: int, seg: int
    ) -> None:
        """Load a segment register with its hidden part; the base is desc.base + base3 << 32."""

    def get_cached_segment_base(self, ctxt: X86EmulateCtxt, seg: int) -> int:
        """The 64-bit base of a segment register."""

    def get_gdt(self, ctxt: X86EmulateCtxt) -> tuple[int, int]:
        """GDTR as (linear base, limit in bytes)."""

    def get_idt(self, ctxt: X86EmulateCtxt) -> tuple[int, int]:
        """IDTR as (linear base, limit in bytes)."""

    def set_gdt(self, ctxt: X86EmulateCtxt, address: int, limit: int) -> None:
        """Load GDTR (LGDT)."""

    def set_idt(self, ctxt: X86EmulateCtxt, address: int, limit: int) -> None:
        """Load IDTR (LIDT)."""

    def get_cr(self, ctxt: X86EmulateCtxt, cr: int) -> int:
        """CR0, CR2, CR3, CR4 or CR8."""

    def set_cr(self, ctxt: X86EmulateCtxt, cr: int, val: int) -> int:
        """Load a control register; 0 = done, else the value is not allowed."""

    def cpl(self, ctxt: X86EmulateCtxt) -> int:
        """The current privilege level, 0..3."""

    def get_dr(self, ctxt: X86EmulateCtxt, dr: int) -> int:
        """DR0..DR7; 4 and 5 alias 6 and 7."""

    def set_dr(self, ctxt: X86EmulateCtxt, dr: int, val: int) -> int:
        """Load a debug register; 0 = done, 1 = the value is not allowed."""

    def set_msr_with_filter(self, ctxt: X86EmulateCtxt, index: int, data: int) -> int:
        """WRMSR, through the userspace MSR filter."""

    def get_msr_with_filter(self, ctxt: X86EmulateCtxt, index: int) -> tuple[int, int]:
        """RDMSR, through the userspace MSR filter."""

    def get_msr(self, ctxt: X86EmulateCtxt, index: int) -> tuple[int, int]:
        """Read an MSR for the emulator's own use (EFER, STAR, SYSENTER_* ...); 0 = done."""

    def check_rdpmc_early(self, ctxt: X86EmulateCtxt, pmc: int) -> int:
        """0 if the performance counter index exists."""

    def read_pmc(self, ctxt: X86EmulateCtxt, pmc: int) -> tuple[int, int]:
        """A performance counter; result 0 = done."""

    def halt(self, ctxt: X86EmulateCtxt) -> None:
        """HLT was executed."""

    def wbinvd(self, ctxt: X86EmulateCtxt) -> None:
        """WBINVD was executed."""

    def fix_hypercall(self, ctxt: X86EmulateCtxt) -> int:
        """Patch the hypercall at RIP into the one this host's CPU has (em_hypercall)."""

    def intercept(self, ctxt: X86EmulateCtxt, stage: int) -> int:
        """Ask a nested hypervisor whether it intercepts the decoded instruction at this stage."""

    def get_cpuid(
        self, ctxt: X86EmulateCtxt, eax: int, ecx: int, exact_only: bool
    ) -> tuple[bool, int, int, int, int]:
        """CPUID: (leaf exists, EAX, EBX, ECX, EDX)."""

    def guest_has_movbe(self, ctxt: X86EmulateCtxt) -> bool:
        """CPUID.01H:ECX.MOVBE."""

    def guest_has_fxsr(self, ctxt: X86EmulateCtxt) -> bool:
        """CPUID.01H:EDX.FXSR."""

    def guest_has_rdpid(self, ctxt: X86EmulateCtxt) -> bool:
        """CPUID.07H:ECX.RDPID."""

    def guest_cpuid_is_intel_compatible(self, ctxt: X86EmulateCtxt) -> bool:
        """The guest's CPUID vendor is not AMD's (or Hygon's)."""

    def set_nmi_mask(self, ctxt: X86EmulateCtxt, masked: bool) -> None:
        """Block or unblock NMIs (IRET unblocks)."""

    def is_smm(self, ctxt: X86EmulateCtxt) -> bool:
        """The vcpu is in system-management mode."""

    def leave_smm(self, ctxt: X86EmulateCtxt) -> int:
        """RSM: restore the state from SMRAM; X86EMUL_CONTINUE if it was valid."""

    def triple_fault(self, ctxt: X86EmulateCtxt) -> None:
        """Request a shutdown of the vcpu."""

    def set_xcr(self, ctxt: X86EmulateCtxt, index: int, val: int) -> int:
        """XSETBV; 0 = done."""

    def get_untagged_addr(self, ctxt: X86EmulateCtxt, addr: int, flags: int) -> int:
        """Strip address tags (LAM) as the access flags X86EMUL_F_* allow."""

    def is_canonical_addr(self, ctxt: X86EmulateCtxt, addr: int, flags: int) -> bool:
        """The address is canonical for this access (48 bits, 57 with CR4.LA57)."""

"""One VM with one vCPU: the parts that KVM's code reaches from struct kvm_vcpu.

The machine answers the vCPU's `VcpuHooks`. What the parts do is in their own modules; the functions
of x86.py, exits.py and run.py take the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.insn.farbranch import emulate_int_real
from emufuzz.emulator.x86emul import EMULTYPE_SKIP, X86EMUL_CONTINUE
from emufuzz.kvm.emulate_ops import EmulatorOps
from emufuzz.kvm.emulated_mmio import MmioState
from emufuzz.kvm.io_bus import IoBuses
from emufuzz.kvm.memslots import APIC_ACCESS_PAGE_PRIVATE_MEMSLOT, GuestMemory, KvmMemslots
from emufuzz.kvm.mmu.hidden import HiddenTables
from emufuzz.kvm.mmu.mmio import APIC_DEFAULT_PHYS_BASE
from emufuzz.kvm.mmu.mmu import KvmMmu
from emufuzz.kvm.mmu.vcpu_state import VcpuMmuState
from emufuzz.kvm.pio import PioRequest
from emufuzz.kvm.regs import kvm_rip_write
from emufuzz.kvm.rflags import kvm_set_rflags
from emufuzz.kvm.vcpu import Vcpu
from emufuzz.kvm.x86 import init_emulate_ctxt, x86_emulate_instruction

_PDPTES: Final = 32


class KvmMachine:
    """A VM under construction until `attach` has given it its vCPU.

    Attributes:
        vcpu: The vCPU.
        memory: Guest physical memory.
        mmu: Its translations.
        ctxt: The emulator's context (vcpu->arch.emulate_ctxt).
        mmio: The access to a device that userspace has to do.
        pio: The same for ports.
        buses: In-kernel devices.
        regs_need_sync_to_vcpu: GPRs in the emulator's cache are newer than the vCPU's.
        regs_need_sync_from_vcpu: The vCPU's GPRs were changed behind the emulator's back.
        budget: Instructions that handle_invalid_guest_state may still emulate before a signal.
        emulations: How many times the emulator was entered.
        fast_mmio: Writes that an ioeventfd took without the emulator.
        restarts: How many times a REP went on inside the emulator.
        retired: Instructions that the PMU counts as emulated.
        last_decode: EMULATION_* result of the last decode, None before one.
        attached: The vCPU is there, and so is all that belongs to it.
    """

    __slots__ = (
        "attached", "budget", "buses", "ctxt", "emulations", "fast_mmio", "hidden", "last_decode", "memory",
        "mmio", "mmu", "ops", "pio", "regs_need_sync_from_vcpu", "regs_need_sync_to_vcpu", "restarts",
        "retired", "vcpu",
    )  # fmt: skip

    vcpu: Vcpu
    mmu: KvmMmu
    ops: EmulatorOps
    ctxt: X86EmulateCtxt

    def __init__(
        self, memory: GuestMemory, buses: IoBuses, hidden: HiddenTables | None = None, budget: int = 1
    ) -> None:
        self.memory = memory
        self.buses = buses
        self.hidden = hidden
        self.budget = budget
        self.mmio = MmioState()
        self.pio = PioRequest()
        self.regs_need_sync_to_vcpu = False
        self.regs_need_sync_from_vcpu = False
        self.emulations = 0
        self.fast_mmio = 0
        self.restarts = 0
        self.retired = 0
        self.last_decode: int | None = None
        self.attached = False

    def attach(self, make_vcpu: Callable[[KvmMachine], Vcpu]) -> None:
        """Build the vCPU with this machine as its hooks, and everything that refers to it."""
        self.vcpu = vcpu = make_vcpu(self)
        self.mmu = KvmMmu(VcpuMmuState(vcpu), self.memory, vcpu.options, self.hidden)
        self.ops = EmulatorOps(self, vcpu)
        self.ctxt = X86EmulateCtxt(self.ops)
        vcpu.fpu = self.ctxt.fpu
        self.attached = True
        if vcpu.apic is not None and vcpu.options.flexpriority:
            gfn = APIC_DEFAULT_PHYS_BASE >> 12
            self.memory.set_private_page(APIC_ACCESS_PAGE_PRIVATE_MEMSLOT, gfn)

    def emulate(self, emulation_type: int) -> int:
        """kvm_emulate_instruction: no faulting address."""
        return x86_emulate_instruction(self, 0, emulation_type)

    # -- VcpuHooks -------------------------------------------------------------------------------

    def read_pdptes(self, gpa: int) -> bytes | None:
        """VcpuHooks.read_pdptes; hidden tables have PDPTEs that are not present."""
        if self.hidden is not None:
            return bytes(_PDPTES)
        return self.memory.spaces[0].read_guest(gpa, _PDPTES)

    def read_phys(self, gpa: int, size: int) -> bytes | None:
        """VcpuHooks.read_phys."""
        return self._slots().read_guest(gpa, size)

    def write_phys(self, gpa: int, data: bytes) -> bool:
        """VcpuHooks.write_phys."""
        return self._slots().write_guest(gpa, data) == 0

    def _slots(self) -> KvmMemslots:
        """The vCPU's address space; while its registers are being loaded, the one outside SMM."""
        return self.mmu.slots if self.attached else self.memory.spaces[0]

    def mmu_reset_context(self) -> None:
        """VcpuHooks.mmu_reset_context."""
        self.mmu.reset_context()

    def mmu_new_pgd(self, cr3: int) -> None:  # noqa: ARG002 - roots are looked up by the vCPU's CR3
        """VcpuHooks.mmu_new_pgd."""
        self.mmu.new_pgd()

    def mmu_invalidate_addr(self, addr: int) -> None:
        """VcpuHooks.mmu_invalidate_addr."""
        self.mmu.invalidate_addr(addr)

    def invalidate_pcid(self, pcid: int) -> None:  # noqa: ARG002 - nothing is kept per PCID
        """VcpuHooks.invalidate_pcid: with EPT hardware's entries go, else shadow pages are synchronised."""
        self.mmu.flushes["pcid"] += 1
        if not self.vcpu.options.ept:
            self.mmu.new_pgd()

    def emulate_int_real(self, irq: int, inc_eip: int) -> bool:
        """VcpuHooks.emulate_int_real."""
        ctxt = self.ctxt
        init_emulate_ctxt(self)
        ctxt.op_bytes = ctxt.ad_bytes = 2
        ctxt.next_eip = ctxt.eip + inc_eip
        self.emulations += 1
        if emulate_int_real(ctxt, irq) != X86EMUL_CONTINUE:
            return False
        ctxt.eip = ctxt.next_eip
        kvm_rip_write(self.vcpu, ctxt.eip)
        kvm_set_rflags(self.vcpu, ctxt.eflags)
        return True

    def emulate_skip(self) -> int:
        """VcpuHooks.emulate_skip."""
        return self.emulate(EMULTYPE_SKIP)

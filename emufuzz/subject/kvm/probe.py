"""What the processor would do with the instruction at RIP, up to the first VM exit for memory or a port.

The probe runs the emulator without effect: memory is accessed through KVM's translations as the
processor does (`emufuzz.kvm.mmu.hardware`), and whatever needs KVM ends the run. It serves to set up
exits, not to judge: a path starts from what hardware would have reported.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from emufuzz.arch.descriptors import DescStruct
from emufuzz.case.model import PAGE_MASK, PAGE_SIZE
from emufuzz.emulator.access import linearize
from emufuzz.emulator.ctxt import X86EmulateCtxt, X86Exception
from emufuzz.emulator.decode import x86_decode_insn
from emufuzz.emulator.execute import x86_emulate_insn
from emufuzz.emulator.modrm import decode_modrm
from emufuzz.emulator.x86emul import (
    EMULATION_OK,
    MASK32,
    MASK64,
    X86EMUL_CONTINUE,
    X86EMUL_MODE_PROT64,
)
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.emulate_ops import EmulatorOps
from emufuzz.kvm.guest_virt import user_access
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.mmu.hardware import ept_guest_access, shadow_exit
from emufuzz.kvm.mmu.mmio import APIC_DEFAULT_PHYS_BASE
from emufuzz.kvm.mmu.pferr import (
    INVALID_GPA,
    PFERR_FETCH_MASK,
    PFERR_IMPLICIT_ACCESS,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)
from emufuzz.kvm.vmx_bits import SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES
from emufuzz.kvm.x86 import init_emulate_ctxt

_PAGE: Final = MASK64 - PAGE_MASK
_RIGHTS: Final = PFERR_WRITE_MASK | PFERR_USER_MASK | PFERR_FETCH_MASK | PFERR_IMPLICIT_ACCESS
_LINEAR_READ, _LINEAR_WRITE, _LINEAR_FETCH = 0, 1 << 12, 2 << 12


class MemoryExit(NamedTuple):
    """An access that hardware does not complete.

    `reason` is the exit reason; `qualification`, `gpa` and, for the #PF of shadow paging,
    `error_code` are what the exit reports of it.
    """

    reason: int
    qualification: int
    gpa: int
    error_code: int = 0


class PortExit(NamedTuple):
    """Port I/O that hardware has found permitted: `elements` elements of `size` bytes."""

    port: int
    size: int
    elements: int
    is_in: bool


class StoppedError(Exception):
    """The dry run has come to an exit."""

    def __init__(self, cause: MemoryExit | PortExit) -> None:
        super().__init__(cause)
        self.cause = cause


class NativeFaultError(Exception):
    """The guest's own tables refuse an access: hardware delivers the #PF, and KVM never hears of it."""


class ProbeOps(EmulatorOps):
    """Callbacks that change nothing and stop at what hardware would leave to KVM."""

    __slots__ = ("_gprs",)

    def __init__(self, machine: KvmMachine) -> None:
        super().__init__(machine, machine.vcpu)
        self._gprs: dict[int, int] = {}

    def read_gpr(self, ctxt: X86EmulateCtxt, reg: int) -> int:
        """The vCPU's, unless the dry run has written it."""
        value = self._gprs.get(reg)
        return super().read_gpr(ctxt, reg) if value is None else value

    def write_gpr(self, ctxt: X86EmulateCtxt, reg: int, val: int) -> None:
        """Remember it for the dry run."""
        self._gprs[reg] = val

    # -- memory --------------------------------------------------------------------------------

    def _reach(self, addr: int, size: int, access: int, mask: int = MASK64) -> list[tuple[int, int]]:
        """(gpa, size) of each page's part, once hardware has translated all of them."""
        parts = []
        while size:
            part = min(size, PAGE_SIZE - (addr & PAGE_MASK))
            parts.append((hardware_access(self.machine, addr, access), part))
            addr, size = addr + part & mask, size - part
        return parts

    def _load(self, addr: int, size: int, access: int, mask: int = MASK64) -> tuple[int, bytes]:
        slots = self.machine.mmu.slots
        pieces = [
            slots.read_guest(gpa, part) or bytes(part) for gpa, part in self._reach(addr, size, access, mask)
        ]
        return X86EMUL_CONTINUE, b"".join(pieces)

    def fetch(self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception) -> tuple[int, bytes]:
        """Instruction bytes."""
        return self._load(addr, size, PFERR_FETCH_MASK | user_access(self.machine.mmu))

    def read_std(
        self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception | None, system: bool
    ) -> tuple[int, bytes]:
        """A system structure, or an operand at CPL."""
        return self._load(addr, size, self._std_access(system=system))

    def write_std(
        self, ctxt: X86EmulateCtxt, addr: int, data: bytes, fault: X86Exception | None, system: bool
    ) -> int:
        """The same written; nothing is stored."""
        self._reach(addr, len(data), PFERR_WRITE_MASK | self._std_access(system=system))
        return X86EMUL_CONTINUE

    def _std_access(self, *, system: bool) -> int:
        return PFERR_IMPLICIT_ACCESS if system else user_access(self.machine.mmu)

    def read_emulated(
        self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception
    ) -> tuple[int, bytes]:
        """An operand."""
        return self._load(addr, size, user_access(self.machine.mmu), _mask(ctxt))

    def write_emulated(self, ctxt: X86EmulateCtxt, addr: int, data: bytes, fault: X86Exception) -> int:
        """An operand; nothing is stored."""
        access = PFERR_WRITE_MASK | user_access(self.machine.mmu)
        self._reach(addr, len(data), access, _mask(ctxt))
        return X86EMUL_CONTINUE

    def cmpxchg_emulated(
        self, ctxt: X86EmulateCtxt, addr: int, old: bytes, new: bytes, fault: X86Exception
    ) -> int:
        """An operand; nothing is stored."""
        return self.write_emulated(ctxt, addr, new, fault)

    # -- ports ---------------------------------------------------------------------------------

    def pio_in_emulated(self, ctxt: X86EmulateCtxt, size: int, port: int, count: int) -> bytes | None:
        """IN and INS exit."""
        raise StoppedError(PortExit(port, size, count, is_in=True))

    def pio_out_emulated(self, ctxt: X86EmulateCtxt, size: int, port: int, data: bytes, count: int) -> bool:
        """OUT and OUTS exit."""
        raise StoppedError(PortExit(port, size, count, is_in=False))

    # -- everything that must not happen -------------------------------------------------------

    def set_segment(
        self, ctxt: X86EmulateCtxt, selector: int, desc: DescStruct, base3: int, seg: int
    ) -> None:
        """Nothing is loaded."""

    def set_gdt(self, ctxt: X86EmulateCtxt, address: int, limit: int) -> None:
        """Nothing is loaded."""

    def set_idt(self, ctxt: X86EmulateCtxt, address: int, limit: int) -> None:
        """Nothing is loaded."""

    def set_cr(self, ctxt: X86EmulateCtxt, cr: int, val: int) -> int:
        """Nothing is loaded."""
        return 0

    def set_dr(self, ctxt: X86EmulateCtxt, dr: int, val: int) -> int:
        """Nothing is loaded."""
        return 0

    def set_xcr(self, ctxt: X86EmulateCtxt, index: int, val: int) -> int:
        """Nothing is loaded."""
        return 0

    def get_msr_with_filter(self, ctxt: X86EmulateCtxt, index: int) -> tuple[int, int]:
        """Any value."""
        return X86EMUL_CONTINUE, 0

    def set_msr_with_filter(self, ctxt: X86EmulateCtxt, index: int, data: int) -> int:
        """Nothing is stored."""
        return X86EMUL_CONTINUE

    def invlpg(self, ctxt: X86EmulateCtxt, addr: int) -> None:
        """Nothing is dropped."""

    def halt(self, ctxt: X86EmulateCtxt) -> None:
        """Nobody halts."""

    def fix_hypercall(self, ctxt: X86EmulateCtxt) -> int:
        """Nothing is patched."""
        return X86EMUL_CONTINUE

    def set_nmi_mask(self, ctxt: X86EmulateCtxt, masked: bool) -> None:
        """NMIs stay as they are."""

    def leave_smm(self, ctxt: X86EmulateCtxt) -> int:
        """Nothing is restored."""
        return X86EMUL_CONTINUE

    def triple_fault(self, ctxt: X86EmulateCtxt) -> None:
        """Nobody shuts down."""


def _mask(ctxt: X86EmulateCtxt) -> int:
    return MASK64 if ctxt.mode == X86EMUL_MODE_PROT64 else MASK32


def hardware_access(machine: KvmMachine, gva: int, access: int) -> int:
    """The physical address of an access that goes through; StoppedError at an exit.

    Raises:
        NativeFaultError: The guest's own tables refuse it.
    """
    mmu = machine.mmu
    if _apic_is_virtual(machine):
        gpa = mmu.gva_to_gpa(gva, access & _RIGHTS)
        if gpa & _PAGE == APIC_DEFAULT_PHYS_BASE:
            raise StoppedError(
                MemoryExit(er.EXIT_REASON_APIC_ACCESS, gpa & PAGE_MASK | _apic_type(access), gpa)
            )
    if not machine.vcpu.options.ept:
        return _shadow_access(machine, gva, access)
    result = ept_guest_access(mmu, gva, access)
    if result.exit_reason:
        raise StoppedError(MemoryExit(result.exit_reason, result.qualification, result.gpa))
    if result.fault is not None:
        raise NativeFaultError(f"#PF at {gva:#x}")
    return result.gpa


def _apic_is_virtual(machine: KvmMachine) -> bool:
    controls = machine.vcpu.vmcs.values[vf.SECONDARY_VM_EXEC_CONTROL]
    return machine.vcpu.apic is not None and bool(controls & SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES)


def _apic_type(access: int) -> int:
    if access & PFERR_FETCH_MASK:
        return _LINEAR_FETCH
    return _LINEAR_WRITE if access & PFERR_WRITE_MASK else _LINEAR_READ


def _shadow_access(machine: KvmMachine, gva: int, access: int) -> int:
    if machine.hidden is not None and machine.mmu.gva_to_gpa(gva, access & _RIGHTS) == INVALID_GPA:
        raise NativeFaultError(f"#PF at {gva:#x}")  # flat memory has absent pages without paging, too
    error_code = shadow_exit(machine.mmu, gva, access)
    if error_code is not None:
        raise StoppedError(MemoryExit(er.EXIT_REASON_EXCEPTION_NMI, gva, 0, error_code))
    gpa = machine.mmu.gva_to_gpa(gva, access & _RIGHTS)
    if gpa == INVALID_GPA:
        raise NativeFaultError(f"#PF at {gva:#x}")
    return gpa


class Probe(NamedTuple):
    """What a dry run found: the exit, if any, and the instruction's length, 0 if it has none."""

    cause: MemoryExit | PortExit | None
    length: int


def decode_at_rip(machine: KvmMachine) -> X86EmulateCtxt:
    """A context of its own with the instruction at RIP; `opcode` None if it selects no leaf.

    StoppedError and NativeFaultError as in `hardware_access`, for the fetch.
    """
    probed = _context(machine)
    x86_decode_insn(probed)
    return probed


def _context(machine: KvmMachine) -> X86EmulateCtxt:
    own = machine.ctxt
    probed = X86EmulateCtxt(ProbeOps(machine))
    probed.fpu = own.fpu
    machine.ctxt = probed
    try:
        init_emulate_ctxt(machine)
    finally:
        machine.ctxt = own
    probed.enable_vmware_backdoor = False  # it is KVM's: a processor asks the permission bitmap
    return probed


def probe(machine: KvmMachine) -> Probe:
    """Run the instruction at RIP until it would exit or has ended; nothing in the machine changes.

    An instruction that the emulator does not know is taken to read its memory operand.
    """
    probed = _context(machine)
    fpu = probed.fpu
    saved = (list(fpu.xmm), list(fpu.mm), fpu.fcw, fpu.fsw, fpu.ftw, fpu.mxcsr, fpu.dirty)
    try:
        if x86_decode_insn(probed) == EMULATION_OK:
            x86_emulate_insn(probed)
        else:
            _read_unknown(probed)
    except StoppedError as stop:
        return Probe(stop.cause, probed.fetch_pos)
    finally:
        fpu.xmm, fpu.mm, fpu.fcw, fpu.fsw, fpu.ftw, fpu.mxcsr, fpu.dirty = saved
    return Probe(None, probed.fetch_pos)


def _read_unknown(probed: X86EmulateCtxt) -> None:
    opcode = probed.opcode
    if opcode is None or not opcode.has_modrm or probed.have_exception:
        return
    if decode_modrm(probed) != X86EMUL_CONTINUE or probed.modrm_mod == 3:
        return
    la = linearize(probed, probed.modrm_seg, probed.memop.ea, 1, 0)
    if la >= 0:
        probed.ops.read_emulated(probed, la, 1, probed.exception)

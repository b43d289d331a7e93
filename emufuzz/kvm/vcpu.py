"""The state of one vCPU: kvm_vcpu, kvm_vcpu_arch and vcpu_vmx in one object.

Members have KVM's names. A register that is cached lazily must be read through its accessor
(`regs`, `rflags`, `segments`), as the member may be stale while the value is in the VMCS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from emufuzz.arch import cr as crs
from emufuzz.emulator.ctxt import FpuRegisters
from emufuzz.kvm.cpuid import GuestCpuid
from emufuzz.kvm.hooks import VcpuHooks
from emufuzz.kvm.hyperv_regs import KvmHv
from emufuzz.kvm.options import KvmOptions
from emufuzz.kvm.vmcs import Vmcs

if TYPE_CHECKING:
    from emufuzz.kvm.lapic import LocalApic
    from emufuzz.kvm.trace import Trace

# enum kvm_reg beyond the GPRs.
VCPU_REGS_RIP: Final = 16
VCPU_EXREG_PDPTR: Final = 17
VCPU_EXREG_CR0: Final = 18
VCPU_EXREG_CR3: Final = 19
VCPU_EXREG_CR4: Final = 20
VCPU_EXREG_RFLAGS: Final = 21
VCPU_EXREG_SEGMENTS: Final = 22
VCPU_EXREG_EXIT_INFO_1: Final = 23
VCPU_EXREG_EXIT_INFO_2: Final = 24

# Requests (KVM_REQ_*), by name.
KVM_REQ_TRIPLE_FAULT: Final = "TRIPLE_FAULT"
KVM_REQ_EVENT: Final = "EVENT"
KVM_REQ_NMI: Final = "NMI"
KVM_REQ_SMI: Final = "SMI"
KVM_REQ_VM_DEAD: Final = "VM_DEAD"
KVM_REQ_LOAD_MMU_PGD: Final = "LOAD_MMU_PGD"
KVM_REQ_TLB_FLUSH_GUEST: Final = "TLB_FLUSH_GUEST"
KVM_REQ_TLB_FLUSH_CURRENT: Final = "TLB_FLUSH_CURRENT"
KVM_REQ_CLOCK_UPDATE: Final = "CLOCK_UPDATE"

# Userspace exits that arise on the register side.
KVM_EXIT_UNKNOWN: Final = "UNKNOWN"
KVM_EXIT_DEBUG: Final = "DEBUG"
KVM_EXIT_X86_RDMSR: Final = "X86_RDMSR"
KVM_EXIT_X86_WRMSR: Final = "X86_WRMSR"

MP_STATE_RUNNABLE: Final = "RUNNABLE"
MP_STATE_HALTED: Final = "HALTED"

IA32_PAT_RESET: Final = 0x0007040600070406
APIC_BASE_RESET: Final = 0xFEE00900  # enabled, bootstrap processor
SMBASE_RESET: Final = 0x30000


class KvmSegment:
    """struct kvm_segment: a segment register with its hidden part, `limit` in bytes."""

    __slots__ = (
        "avl", "base", "db", "dpl", "g", "l", "limit", "present", "s", "selector", "type", "unusable"
    )  # fmt: skip

    def __init__(
        self,
        selector: int = 0,
        base: int = 0,
        limit: int = 0,
        type: int = 0,  # noqa: A002 - the architectural name of the field
        s: int = 0,
        dpl: int = 0,
        present: int = 0,
        avl: int = 0,
        l: int = 0,  # noqa: E741 - the architectural name of the bit
        db: int = 0,
        g: int = 0,
        unusable: int = 0,
    ) -> None:
        self.selector = selector
        self.base = base
        self.limit = limit
        self.type = type
        self.s = s
        self.dpl = dpl
        self.present = present
        self.avl = avl
        self.l = l
        self.db = db
        self.g = g
        self.unusable = unusable

    def copy(self) -> KvmSegment:
        """A segment of its own with the same fields."""
        return KvmSegment(*self.key())

    def key(self) -> tuple[int, ...]:
        """All fields, for comparison."""
        return (
            self.selector, self.base, self.limit, self.type, self.s, self.dpl, self.present, self.avl,
            self.l, self.db, self.g, self.unusable,
        )  # fmt: skip


@dataclass(slots=True)
class QueuedException:
    """struct kvm_queued_exception: `pending` is to be injected, `injected` is being delivered."""

    pending: bool = False
    injected: bool = False
    has_error_code: bool = False
    vector: int = 0
    error_code: int = 0
    has_payload: bool = False
    payload: int = 0


@dataclass(slots=True)
class QueuedInterrupt:
    """struct kvm_queued_interrupt; `soft` is INT n, re-injected with its instruction length."""

    injected: bool = False
    soft: bool = False
    nr: int = 0


#: VM-execution controls that L1 may have set. KVM asks about the first row when it emulates for L2;
#: whatever the others say, an instruction that they would intercept is not emulated.
L1_CONTROLS: Final = frozenset({
    "bus_lock_detection", "desc", "io", "rdtscp", "unrestricted_guest",
    "cpuid", "cr3_load", "cr3_store", "hlt", "invlpg", "monitor", "mov_dr", "mwait", "pause", "rdmsr",
    "rdpmc", "rdtsc", "wbinvd", "wrmsr", "xsetbv",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class GuestMode:
    """L2 is running: what L1 intercepts (its vmcs12), as far as registers and events care.

    `intercepts` has names of L1_CONTROLS.
    """

    exception_bitmap: int = 0
    page_fault_error_code_mask: int = 0
    page_fault_error_code_match: int = 0
    exit_on_nmi: bool = False
    exit_on_intr: bool = False
    mtf: bool = False
    intercepts: frozenset[str] = frozenset()


class RealMode:
    """vcpu_vmx.rmode: what stands in for real mode while hardware runs virtual-8086 mode."""

    __slots__ = ("save_rflags", "segs", "vm86_active")

    def __init__(self) -> None:
        self.vm86_active = False
        self.save_rflags = 0
        self.segs = [KvmSegment() for _ in range(8)]


class KvmRun:
    """struct kvm_run: why KVM_RUN returned, and what userspace gets or answers with it."""

    __slots__ = ("data", "exit_reason")

    def __init__(self) -> None:
        self.exit_reason = KVM_EXIT_UNKNOWN
        self.data: dict[str, Any] = {}

    def leave(self, exit_reason: str, **data: Any) -> None:
        """Fill in an exit."""
        self.exit_reason = exit_reason
        self.data = data


class Vcpu:
    """One vCPU. `emulation_required` tells that the guest state cannot be entered by hardware."""

    __slots__ = (
        "apic",
        "apic_base",
        "complete_userspace_io",
        "cpuid",
        "cr0",
        "cr0_guest_owned_bits",
        "cr2",
        "cr3",
        "cr4",
        "cr4_guest_owned_bits",
        "cr8",
        "db",
        "dr6",
        "dr7",
        "efer",
        "eff_db",
        "emulation_required",
        "event_exit_inst_len",
        "exception",
        "exception_vmexit",
        "exit_info_1",
        "exit_info_2",
        "exit_reason",
        "fpu",
        "guest_debug",
        "guest_debug_dr7",
        "guest_mode",
        "halt_request",
        "hooks",
        "hyperv",
        "interrupt",
        "mp_state",
        "msrs",
        "msrs_loaded",
        "msrs_written",
        "mtf_pending",
        "nmi_injected",
        "nmi_known_unmasked",
        "nmi_pending",
        "nmi_queued",
        "options",
        "pdptrs",
        "pkru",
        "regs",
        "regs_avail",
        "regs_dirty",
        "requests",
        "rflags",
        "rmode",
        "run",
        "segment_cache",
        "segment_cache_bitmask",
        "singlestep_rip",
        "smbase",
        "smi_pending",
        "smm",
        "smm_inside_nmi",
        "soft_vnmi_blocked",
        "trace",
        "vmcs",
        "vpid",
        "xcr0",
    )

    def __init__(self, options: KvmOptions, cpuid: GuestCpuid, hooks: VcpuHooks) -> None:
        self.options = options
        self.cpuid = cpuid
        self.hooks = hooks
        self.vmcs = Vmcs()
        self.vpid = options.vpid
        self.apic: LocalApic | None = None
        self.trace: Trace | None = None
        self.hyperv = KvmHv()
        self.fpu: FpuRegisters | None = None  # None: as after FNINIT
        self._reset_registers()
        self._reset_events()

    def _reset_registers(self) -> None:
        self.regs = [0] * 17  # GPRs, then RIP
        self.regs_avail = (1 << 25) - 1
        self.regs_dirty = 0
        self.rflags = 0
        self.cr0 = crs.X86_CR0_ET
        self.cr2 = self.cr3 = self.cr4 = self.cr8 = 0
        self.cr0_guest_owned_bits = self.cr4_guest_owned_bits = 0
        self.efer = 0
        self.xcr0 = 1
        self.pkru = 0
        self.pdptrs = [0] * 4
        self.segment_cache: list[int] = [0] * 32
        self.segment_cache_bitmask = 0
        self.rmode = RealMode()
        self.db = [0] * 4
        self.eff_db = [0] * 4
        self.dr6 = 0xFFFF0FF0
        self.dr7 = 0x400
        self.guest_debug = 0
        self.guest_debug_dr7 = 0
        self.singlestep_rip = 0
        self.apic_base = APIC_BASE_RESET
        self.msrs: dict[int, int] = {}
        self.msrs_loaded: dict[int, int] = {}  # what they read as after userspace has set them
        self.msrs_written: set[int] = set()
        self.exit_info_1 = self.exit_info_2 = 0
        self.exit_reason = 0
        self.smm = False
        self.smm_inside_nmi = False
        self.smbase = SMBASE_RESET
        self.guest_mode: GuestMode | None = None
        self.mtf_pending = False
        self.emulation_required = False

    def _reset_events(self) -> None:
        self.requests: set[str] = set()
        self.exception = QueuedException()
        self.exception_vmexit = QueuedException()
        self.interrupt = QueuedInterrupt()
        self.event_exit_inst_len = 0
        self.nmi_queued = 0
        self.smi_pending = False
        self.nmi_pending = 0
        self.nmi_injected = False
        self.nmi_known_unmasked = False
        self.soft_vnmi_blocked = False
        self.halt_request = False
        self.mp_state = MP_STATE_RUNNABLE
        self.run = KvmRun()
        self.complete_userspace_io: CompleteUserspaceIo | None = None

    def make_request(self, request: str) -> None:
        """KVM: kvm_make_request."""
        self.requests.add(request)

    def check_request(self, request: str) -> bool:
        """KVM: kvm_check_request, which takes the request away."""
        if request in self.requests:
            self.requests.remove(request)
            return True
        return False


#: What runs at the next KVM_RUN: > 0 goes on, 0 leaves again (KVM: complete_userspace_io).
CompleteUserspaceIo: TypeAlias = Callable[[Vcpu], int]


def is_unrestricted_guest(vcpu: Vcpu) -> bool:
    """Hardware runs real mode and odd segments by itself (KVM: is_unrestricted_guest).

    In guest mode L1 decides; `unrestricted_guest` among its controls says that it does allow it.
    """
    if not vcpu.options.unrestricted_guest:
        return False
    return vcpu.guest_mode is None or "unrestricted_guest" in vcpu.guest_mode.intercepts

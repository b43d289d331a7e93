"""The paths into the emulator: what each needs, and how a machine is brought onto it.

Each function sets up the exit that hardware would have raised and handles it: 1 = the guest is
resumed, 0 = userspace is asked. Names are those of `emufuzz.case.paths`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from emufuzz.arch.exceptions import GP_VECTOR, PF_VECTOR, UD_VECTOR
from emufuzz.emulator.ctxt import X86Exception
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm.exits import handle_hardware_exit, vmx_handle_exit
from emufuzz.kvm.guest_virt import kvm_read_guest_virt
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.mmu.page_fault import kvm_mmu_page_fault
from emufuzz.kvm.mmu.pferr import (
    INVALID_GPA,
    PFERR_FETCH_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)
from emufuzz.kvm.mmu.tdp import ept_violation_error_code
from emufuzz.kvm.regs import kvm_rip_read
from emufuzz.kvm.rflags import kvm_get_linear_rip
from emufuzz.kvm.run import inject_events, invalid_state_exit, vmx_vcpu_pre_run
from emufuzz.subject.kvm.enter import ExitInfo, hardware_exit, queue_events
from emufuzz.subject.kvm.instruction_exits import (
    INSTRUCTION_REASONS,
    NoExitError,
    instruction_exit,
    port_exit,
)
from emufuzz.subject.kvm.native_fetch import check_fetch
from emufuzz.subject.kvm.probe import (
    MemoryExit,
    NativeFaultError,
    Probe,
    StoppedError,
    decode_at_rip,
    probe,
)

Kvm = Mapping[str, Any]

#: Faults that hardware and KVM settle between them before one needs the emulator: tables, pages.
_MAX_FAULTS: Final = 64

#: Exits whose cause is an access: path `exit` takes all that they report from the case.
_MEMORY_REASONS: Final = (
    er.EXIT_REASON_APIC_ACCESS, er.EXIT_REASON_EPT_VIOLATION, er.EXIT_REASON_EPT_MISCONFIG,
)  # fmt: skip
_RIGHTS: Final = PFERR_WRITE_MASK | PFERR_USER_MASK | PFERR_FETCH_MASK
_UD2: Final = b"\x0f\x0b"
_TABLE_OPCODES: Final = {0x00: er.EXIT_REASON_LDTR_TR, 0x01: er.EXIT_REASON_GDTR_IDTR}


class PathSpec(NamedTuple):
    """How a path is entered, and the knobs that it implies unless the case names them."""

    enter: Callable[[KvmMachine, Kvm], int]
    knobs: Mapping[str, Any] = {}


def _probe(machine: KvmMachine) -> Probe:
    try:
        return probe(machine)
    except NativeFaultError as fault:
        raise NoExitError(f"the guest gets its own {fault} and no exit happens") from fault


def _handle(machine: KvmMachine, info: ExitInfo, kvm: Kvm, *, fastpath: bool = True) -> int:
    if machine.vcpu.emulation_required:
        raise NoExitError("hardware cannot enter the guest")
    hardware_exit(machine, info, kvm)
    queue_events(machine.vcpu, kvm)
    return handle_hardware_exit(machine) if fastpath else vmx_handle_exit(machine)


# -- exceptions ----------------------------------------------------------------------------------


def _length(machine: KvmMachine) -> int:
    """Bytes of the instruction at RIP, as far as it can be fetched and decoded."""
    try:
        return decode_at_rip(machine).fetch_pos
    except (StoppedError, NativeFaultError):
        return 0


def _fault(vector: int, error_code: int | None = None) -> ExitInfo:
    """A fault's exit; its instruction length is undefined (SDM Vol. 3C 27.2.5), a case may give one."""
    return ExitInfo(er.EXIT_REASON_EXCEPTION_NMI).exception(vector, error_code)


def _ud(machine: KvmMachine, kvm: Kvm, fetched: int = 1) -> int:
    """That the opcode is undefined for the processor is taken as given, if `fetched` bytes can be fetched."""
    try:
        check_fetch(machine, fetched)
    except NativeFaultError as fault:
        raise NoExitError(f"the guest gets its own {fault} and no exit happens") from fault
    return _handle(machine, _fault(UD_VECTOR), kvm)


def _forced(machine: KvmMachine, kvm: Kvm) -> int:
    """UD2 is undefined for every processor, with what makes it the prefix behind it or without."""
    linear = kvm_get_linear_rip(machine.vcpu)
    _, code = kvm_read_guest_virt(machine.mmu, linear, len(_UD2), X86Exception())
    if code and code != _UD2:
        raise NoExitError("the instruction is not UD2")
    return _ud(machine, kvm, len(_UD2))


def _gp(machine: KvmMachine, kvm: Kvm) -> int:
    return _handle(machine, _fault(GP_VECTOR, 0), kvm)


def _rmode_exception(machine: KvmMachine, kvm: Kvm) -> int:
    if not machine.vcpu.rmode.vm86_active:
        raise NoExitError("the guest is not in real mode on virtual-8086 mode")
    return _gp(machine, kvm)


# -- memory --------------------------------------------------------------------------------------


def _memory_exit(machine: KvmMachine, kvm: Kvm, reasons: tuple[int, ...], *, primed: bool = False) -> int:
    """Let hardware access memory until an exit ends in the emulator.

    Faults that only map a page or table are handled as they come. With `primed` the guest is one
    that has accessed the device before, so that the hole is known as MMIO: by an EPT entry that is
    misconfigured, or by a shadow entry with reserved bits.
    """
    for _ in range(_MAX_FAULTS):
        found = _probe(machine)
        cause = found.cause
        if not isinstance(cause, MemoryExit):
            raise NoExitError("the instruction accesses nothing that exits")
        if primed and _prime(machine, cause):
            continue
        entered, rip = machine.emulations, kvm_rip_read(machine.vcpu)
        result = _handle(machine, _memory_info(cause, found.length), kvm)
        done = machine.emulations > entered or kvm_rip_read(machine.vcpu) != rip
        if done or result <= 0:
            if cause.reason not in reasons:
                raise NoExitError(f"the exit is {er.EXIT_REASON_NAMES[cause.reason]}")
            return result
        if machine.vcpu.exception.pending:
            raise NoExitError("the guest gets its own #PF")
    raise NoExitError("the access faults again and again")


def _prime(machine: KvmMachine, cause: MemoryExit) -> bool:
    """What an access before this one would have left in KVM's tables; whether it leaves anything."""
    if cause.reason == er.EXIT_REASON_EPT_VIOLATION:
        kvm_mmu_page_fault(machine.mmu, cause.gpa, ept_violation_error_code(cause.qualification))
        return True
    known = cause.error_code & PFERR_RSVD_MASK
    if cause.reason != er.EXIT_REASON_EXCEPTION_NMI or known or not _is_hole(machine, cause):
        return False
    kvm_mmu_page_fault(machine.mmu, cause.qualification, cause.error_code)
    return True


def _is_hole(machine: KvmMachine, cause: MemoryExit) -> bool:
    """The access is to a physical page without memory; of a #PF, one that the guest's tables allow."""
    gpa = cause.gpa
    if cause.reason == er.EXIT_REASON_EXCEPTION_NMI:
        gpa = machine.mmu.gva_to_gpa(cause.qualification, cause.error_code & _RIGHTS)
    return gpa != INVALID_GPA and machine.mmu.slots.gfn_to_memslot(gpa >> 12) is None


def _memory_info(cause: MemoryExit, length: int) -> ExitInfo:
    info = ExitInfo(cause.reason, cause.qualification, length=length)
    info.gpa = cause.gpa
    if cause.reason == er.EXIT_REASON_EXCEPTION_NMI:
        info.exception(PF_VECTOR, cause.error_code)
    return info


def _ept_violation(machine: KvmMachine, kvm: Kvm) -> int:
    return _memory_exit(machine, kvm, (er.EXIT_REASON_EPT_VIOLATION,))


def _ept_misconfig(machine: KvmMachine, kvm: Kvm) -> int:
    return _memory_exit(machine, kvm, (er.EXIT_REASON_EPT_MISCONFIG,), primed=True)


def _shadow_pf(machine: KvmMachine, kvm: Kvm) -> int:
    return _memory_exit(machine, kvm, (er.EXIT_REASON_EXCEPTION_NMI,))


def _apic_access(machine: KvmMachine, kvm: Kvm) -> int:
    return _memory_exit(machine, kvm, (er.EXIT_REASON_APIC_ACCESS,))


# -- instructions --------------------------------------------------------------------------------


def _mapped(machine: KvmMachine) -> None:
    """Let hardware and KVM settle what the instruction's own bytes and tables need."""
    for _ in range(_MAX_FAULTS):
        try:
            decode_at_rip(machine)
        except NativeFaultError as fault:
            raise NoExitError(f"the guest gets its own {fault} and no exit happens") from fault
        except StoppedError as stop:
            if not isinstance(stop.cause, MemoryExit):
                raise
            entered = machine.emulations
            _handle(machine, _memory_info(stop.cause, 0), {})
            if machine.emulations > entered or machine.vcpu.exception.pending:
                raise NoExitError("the instruction cannot be fetched") from stop
        else:
            return


def _io_string(machine: KvmMachine, kvm: Kvm) -> int:
    found = _settled(machine)
    info = port_exit(machine, found)
    if not info.qualification & 16:
        raise NoExitError("IN and OUT do not need the emulator")
    return _handle(machine, info, kvm)


def _settled(machine: KvmMachine) -> Probe:
    """A dry run that does not end at a page which KVM only has to map."""
    for _ in range(_MAX_FAULTS):
        found = _probe(machine)
        if not isinstance(found.cause, MemoryExit):
            return found
        if found.cause.reason == er.EXIT_REASON_APIC_ACCESS:
            raise NoExitError("the instruction's memory exits first")
        entered = machine.emulations
        _handle(machine, _memory_info(found.cause, found.length), {})
        if machine.emulations > entered or machine.vcpu.exception.pending:
            raise NoExitError("the instruction's memory exits first")
    raise NoExitError("the access faults again and again")


def _desc(machine: KvmMachine, kvm: Kvm) -> int:
    _mapped(machine)
    ctxt = decode_at_rip(machine)
    reg = ctxt.modrm >> 3 & 7
    reason = _TABLE_OPCODES.get(ctxt.b) if ctxt.opcode_len == 2 else None
    if reason is None or reg > 3 or (ctxt.b == 1 and ctxt.modrm >> 6 == 3):
        raise NoExitError("the instruction does not access a descriptor-table register")
    info = ExitInfo(reason, length=ctxt.fetch_pos)
    info.by_instruction = True
    return _handle(machine, info, kvm)


def enter_exit(machine: KvmMachine, kvm: Kvm, *, fastpath: bool = True) -> int:
    """Path `exit`: the exit of the instruction, or the one that the case describes.

    Without `fastpath` the handler does what KVM would already have done with interrupts off.

    Raises:
        NoExitError: The case describes none, and the instruction makes none.
    """
    reason = kvm.get("exit_reason")
    if reason is None:
        _settled(machine)
        return _handle(machine, instruction_exit(machine), kvm, fastpath=fastpath)
    if reason in _MEMORY_REASONS:
        return _handle(machine, ExitInfo(reason, length=_length(machine)), kvm, fastpath=fastpath)
    try:
        _settled(machine)
        own = instruction_exit(machine)
    except (NoExitError, StoppedError, NativeFaultError):
        own = None
    info = ExitInfo(reason, length=_length(machine))
    info.by_instruction = reason in INSTRUCTION_REASONS
    return _handle(machine, own if own is not None and own.reason == reason else info, kvm, fastpath=fastpath)


def _skip(machine: KvmMachine, kvm: Kvm) -> int:
    if not kvm.get("ioeventfds"):
        raise NoExitError("no ioeventfd takes the write")
    return _memory_exit(machine, kvm, (er.EXIT_REASON_EPT_MISCONFIG,), primed=True)


# -- events and states ---------------------------------------------------------------------------


def _task_switch(machine: KvmMachine, kvm: Kvm) -> int:
    if "exit_qualification" not in kvm:
        raise NoExitError("kvm.exit_qualification does not say which task")
    return _handle(machine, ExitInfo(er.EXIT_REASON_TASK_SWITCH, length=_length(machine)), kvm)


def _invalid_guest_state(machine: KvmMachine, kvm: Kvm) -> int:
    vcpu = machine.vcpu
    if not vcpu.emulation_required:
        raise NoExitError("hardware can enter the guest")
    queue_events(vcpu, kvm)
    if vmx_vcpu_pre_run(vcpu) <= 0:
        return 0
    return invalid_state_exit(machine)


def _rmode_inject(machine: KvmMachine, kvm: Kvm) -> int:
    vcpu = machine.vcpu
    if not vcpu.rmode.vm86_active:
        raise NoExitError("the guest is not in real mode on virtual-8086 mode")
    vcpu.event_exit_inst_len = kvm.get("instruction_length", 0)
    queue_events(vcpu, kvm)
    inject_events(vcpu)
    if not machine.emulations:
        raise NoExitError("there is no event to inject")
    return 1


# -- completions ---------------------------------------------------------------------------------


def _io_completion(machine: KvmMachine, kvm: Kvm) -> int:
    """Through whichever exit the instruction takes to a device that userspace has."""
    found = _probe_settled_or_mmio(machine, kvm)
    if isinstance(found.cause, MemoryExit):
        ept = machine.vcpu.options.ept
        reason = er.EXIT_REASON_EPT_MISCONFIG if ept else er.EXIT_REASON_EXCEPTION_NMI
        return _memory_exit(machine, kvm, (reason,), primed=True)
    return _io_string(machine, kvm)


def _probe_settled_or_mmio(machine: KvmMachine, kvm: Kvm) -> Probe:
    """A dry run that ends at a port, or at memory that KVM cannot just map."""
    for _ in range(_MAX_FAULTS):
        found = _probe(machine)
        cause = found.cause
        if not isinstance(cause, MemoryExit) or _is_hole(machine, cause):
            return found
        entered = machine.emulations
        _handle(machine, _memory_info(cause, found.length), kvm)
        if machine.emulations > entered or machine.vcpu.exception.pending:
            raise NoExitError("the instruction's memory exits first")
    raise NoExitError("the access faults again and again")


_SHADOW: Final = {"ept": False, "unrestricted_guest": False, "host_maxphyaddr": 46}
_RESTRICTED: Final = {"unrestricted_guest": False}
_APIC: Final = {"irqchip": True, "flexpriority": True, "enable_apicv": True}

_FORCED_MSR: Final = {"force_emulation_prefix": 1, "user_space_msr_mask": 7}

# fmt: off
PATH_SPECS: Final = {
    "ud":                       PathSpec(_ud),
    "fep":                      PathSpec(_forced,              {"force_emulation_prefix": 1}),
    "vmware-gp":                PathSpec(_gp,                  {"enable_vmware_backdoor": True}),
    "rmode-exception":          PathSpec(_rmode_exception,     _RESTRICTED),
    "shadow-pf":                PathSpec(_shadow_pf,           _SHADOW),
    "ept-violation":            PathSpec(_ept_violation),
    "ept-violation-maxphyaddr": PathSpec(_ept_violation,       {"allow_smaller_maxphyaddr": True}),
    "ept-misconfig":            PathSpec(_ept_misconfig),
    "io-string":                PathSpec(_io_string),
    "apic-access":              PathSpec(_apic_access,         _APIC),
    "desc":                     PathSpec(_desc,                {"host_umip": False}),
    "invalid-guest-state":      PathSpec(_invalid_guest_state, _RESTRICTED),
    "task-switch":              PathSpec(_task_switch),
    "rmode-inject":             PathSpec(_rmode_inject,        _RESTRICTED),
    "io-completion":            PathSpec(_io_completion),
    "msr-completion":           PathSpec(_forced,              _FORCED_MSR),
    "skip":                     PathSpec(_skip,                {"host_hypervisor": True}),
    "exit":                     PathSpec(enter_exit),
}
# fmt: on

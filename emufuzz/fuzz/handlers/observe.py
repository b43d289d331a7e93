"""One case through one of the two ways, and everything that can be seen of the machine afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import msgspec

from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES
from emufuzz.case.model import Case, Outcome, memory_changes
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.lapic import kvm_apic_get_state
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.run import GUEST_ENTERED, USERSPACE, after_exit
from emufuzz.kvm.vmx_bits import CPU_BASED_MOV_DR_EXITING
from emufuzz.subject.kvm.build import build_machine, kvm_of
from emufuzz.subject.kvm.enter import ExitInfo, hardware_exit
from emufuzz.subject.kvm.outcome import outcome_of
from emufuzz.subject.kvm.paths import PATH_SPECS, enter_exit
from emufuzz.subject.kvm.userspace import Userspace

#: What the forced-emulation prefix is: UD2, then "kvm".
PREFIX: Final = b"\x0f\x0bkvm"

#: Name -> value of all that is compared; what is in none of them is not the guest's and not userspace's.
Fields: TypeAlias = dict[str, Any]


class Observed:
    """The end of one run.

    Attributes:
        fields: Everything that is compared.
        outcome: The outcome that the fields were taken from.
        exit_reason: Basic exit reason of the last exit.
        qualification: Its qualification.
        length: Its instruction length.
    """

    __slots__ = ("exit_reason", "fields", "length", "outcome", "qualification")

    def __init__(self, case: Case, machine: KvmMachine, outcome: Outcome, ended: int) -> None:
        values = machine.vcpu.vmcs.values
        self.outcome = outcome
        self.exit_reason = machine.vcpu.exit_reason & 0xFFFF
        self.qualification = values[vf.EXIT_QUALIFICATION]
        self.length = values[vf.VM_EXIT_INSTRUCTION_LEN]
        self.fields = _fields(case, machine, outcome, ended)


def without_prefix(case: Case) -> Case:
    """The case through path `exit`: hardware exits for the instruction, and the handler does its work."""
    return msgspec.structs.replace(case, path="exit")


def with_prefix(case: Case) -> Case:
    """The case through path `fep`, with the forced-emulation prefix before the instruction."""
    return msgspec.structs.replace(
        case, path="fep", code=PREFIX + case.code, rip=case.rip - len(PREFIX) & (1 << 64) - 1
    )


def run_handler(case: Case, *, fastpath: bool = True) -> Observed:
    """The instruction through its own exit; without `fastpath` through the handler in any case.

    Raises:
        NoExitError: Hardware does not exit for it.
    """
    return _run(
        without_prefix(case), lambda machine: enter_exit(machine, kvm_of(case), fastpath=fastpath), "exit"
    )


def run_emulator(case: Case) -> Observed:
    """The instruction behind the forced-emulation prefix."""
    return _run(with_prefix(case), lambda machine: PATH_SPECS["fep"].enter(machine, kvm_of(case)), "fep")


def _run(case: Case, enter: Callable[[KvmMachine], int], path: str) -> Observed:
    """No further instruction is emulated if the state that the first one leaves cannot be entered."""
    machine, devices = build_machine(case, PATH_SPECS[path].knobs)
    machine.budget = 0
    userspace = Userspace(machine, devices, dict(case.system.msr))
    ended = after_exit(machine, enter(machine))
    if ended == USERSPACE:
        ended = userspace.complete()
    return Observed(case, machine, outcome_of(case, machine, devices, userspace.exits), ended)


def _fields(case: Case, machine: KvmMachine, outcome: Outcome, ended: int) -> Fields:
    vcpu = machine.vcpu
    fields: Fields = dict(zip(GPR_NAMES, outcome.gpr, strict=True))
    system = msgspec.structs.asdict(outcome.system)
    fields.update(("seg." + name, seg) for name, seg in zip(SREG_NAMES, system.pop("seg"), strict=True))
    fields.update((f"dr{i}", value) for i, value in enumerate(system.pop("dr")))
    fields.update(system)
    fields.update(outcome.extra or {})
    fields.update(
        rip=outcome.rip,
        rflags=outcome.rflags,
        hardware_rflags=vcpu.vmcs.values[vf.GUEST_RFLAGS],
        memory=memory_changes(case, outcome),
        ended=ended,
        requests=frozenset(vcpu.requests),
        halt_request=vcpu.halt_request,
        mp_state=vcpu.mp_state,
        lapic=kvm_apic_get_state(vcpu) if vcpu.apic is not None else None,
        flushes={name: n for name, n in machine.mmu.flushes.items() if n},
        dr_exiting=bool(vcpu.vmcs.values[vf.CPU_BASED_VM_EXEC_CONTROL] & CPU_BASED_MOV_DR_EXITING),
        completion=vcpu.complete_userspace_io is not None,
        pio=machine.pio.count,
    )
    return fields


def differing(one: Fields, other: Fields) -> list[str]:
    """Names of the fields that differ, in order."""
    return [name for name, value in one.items() if other[name] != value]


def observe_exit(case: Case, at: Observed) -> Observed:
    """The state in which hardware made the exit `at`, before KVM has done anything."""
    case = without_prefix(case)
    machine, devices = build_machine(case, PATH_SPECS["exit"].knobs)
    info = ExitInfo(at.exit_reason, at.qualification, length=at.length)
    info.by_instruction = True
    hardware_exit(machine, info, {})
    return Observed(case, machine, outcome_of(case, machine, devices, []), GUEST_ENTERED)

"""The userspace of a VM: answers exits from the case's devices until the guest goes on or cannot.

Its part of KVM_EXIT_IO, _MMIO, _X86_RDMSR, _X86_WRMSR and _HYPERCALL; every other exit is the end.
"""

from __future__ import annotations

from typing import Any, Final

from emufuzz.case.devices import Devices
from emufuzz.kvm.emulated_mmio import KVM_EXIT_MMIO
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.pio import KVM_EXIT_IO
from emufuzz.kvm.run import USERSPACE, kvm_run
from emufuzz.kvm.vcpu import KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KvmRun

KVM_EXIT_HYPERCALL: Final = "HYPERCALL"

#: Exits after which one more KVM_RUN is of use.
COMPLETED: Final = frozenset(
    {KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_EXIT_HYPERCALL}
)
#: More than any one instruction takes: each exit of a REP INS moves up to 1024 bytes.
_MAX_EXITS: Final = 4096
#: Exits of a case after which userspace sends the signal that ends `count`.
PATIENCE: Final = 1 << 16


class Userspace:
    """Runs one vCPU and remembers why it left: `exits` in the form of an outcome's."""

    def __init__(self, machine: KvmMachine, devices: Devices, msrs: dict[int, int] | None = None) -> None:
        """`msrs` are the MSRs that userspace knows; an access to any other is denied."""
        self._machine = machine
        self._devices = devices
        self._msrs = msrs or {}
        self.exits: list[dict[str, Any]] = []

    def complete(self) -> int:
        """The vCPU has left: do what it asks for, as long as it asks; how the last KVM_RUN ended."""
        machine, run = self._machine, self._machine.vcpu.run
        budget, since = machine.budget, 0
        while since < _MAX_EXITS:
            self.exits.append(exit_to_obj(run))
            if run.exit_reason not in COMPLETED:
                return USERSPACE
            self._answer(run)
            if len(self.exits) >= PATIENCE:
                machine.budget = 0
            ended = kvm_run(machine)
            if ended != USERSPACE:
                return ended
            since = since + 1 if machine.budget == budget else 0
            budget = machine.budget
        raise RuntimeError(f"the guest left {_MAX_EXITS} times for one instruction")

    def _answer(self, run: KvmRun) -> None:
        if run.exit_reason == KVM_EXIT_MMIO:
            self._mmio(run.data)
        elif run.exit_reason == KVM_EXIT_IO:
            self._pio(run.data)
        elif run.exit_reason == KVM_EXIT_HYPERCALL:
            run.data["ret"] = 0
        else:
            self._msr(run)

    def _mmio(self, data: dict[str, Any]) -> None:
        if data["is_write"]:
            self._devices.mmio_write(data["phys_addr"], data["data"])
        else:
            data["data"] = self._devices.mmio_read(data["phys_addr"], data["len"])

    def _pio(self, data: dict[str, Any]) -> None:
        if data["direction"] == "out":
            self._devices.pio_out(data["port"], data["size"], data["data"])
        else:
            self._machine.pio.data = self._devices.pio_in(data["port"], data["size"], data["count"])

    def _msr(self, run: KvmRun) -> None:
        index = run.data["index"]
        run.data["error"] = int(index not in self._msrs)
        if run.exit_reason == KVM_EXIT_X86_RDMSR:
            run.data["data"] = self._msrs.get(index, 0)
        elif index in self._msrs:
            self._msrs[index] = run.data["data"]


def exit_to_obj(run: KvmRun) -> dict[str, Any]:
    """An exit in the form of an outcome's `exits`: bytes as hexadecimal digits.

    Why an MSR access came to userspace is its `msr_reason`, as `reason` says which exit it is.
    """
    members = {name: _value(value) for name, value in run.data.items() if name != "reason"}
    if "reason" in run.data:
        members["msr_reason"] = run.data["reason"]
    return {"reason": run.exit_reason, **members}


def _value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [_value(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return value if value < 1 << 32 else hex(value)

"""A machine right after a VM exit, which the test describes field by field."""

from __future__ import annotations

from typing import Any

import msgspec
from support.guest import Guest

from emufuzz.arch.regs import GPR_NAMES
from emufuzz.case.build import build_case, build_system
from emufuzz.case.model import Case, Fault
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.exits import vmx_handle_exit
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.regs import kvm_register_write_raw
from emufuzz.kvm.vcpu import KvmRun
from emufuzz.kvm.vmx_bits import INTR_INFO_VALID_MASK, INTR_TYPE_HARD_EXCEPTION
from emufuzz.subject.kvm.build import build_machine
from emufuzz.subject.kvm.enter import ExitInfo, hardware_exit

_SYSTEM = (
    "es", "cs", "ss", "ds", "fs", "gs", "tr", "ldtr", "gdtr", "idtr", "cr0", "cr2", "cr3", "cr4", "cr8",
    "efer", "xcr0", "dr", "msr", "fpu",
)  # fmt: skip
UD: Fault = (6, None, None)
GP: Fault = (13, 0, None)


def exit_case(
    mode: str = "prot64",
    code: str = "90",
    *,
    knobs: dict[str, Any] | None = None,
    kvm: dict[str, Any] | None = None,
    devices: list[dict[str, Any]] | None = None,
    count: int = 1,
    path: str | None = None,
    vendor: str = "intel",
    **kwargs: Any,
) -> Case:
    """Hex `code` in the default layout; keywords as build_case takes them, and members of the state."""
    changes = {name: kwargs.pop(name) for name in _SYSTEM if name in kwargs}
    system = build_system(mode, kwargs.get("cpl"), **changes)
    case = build_case(mode, bytes.fromhex(code), system=system, **kwargs)
    extra = {**(case.extra or {}), "kvm": {**(kvm or {}), "knobs": knobs or {}}}
    if devices:
        extra["devices"] = devices
    return msgspec.structs.replace(case, extra=extra, count=count, path=path, vendor=vendor)


class Exited(Guest):
    """A machine in a case's state, and the exits that it is made to take."""

    def __init__(self, mode: str = "prot64", code: str = "90", **kwargs: Any) -> None:
        self.case = exit_case(mode, code, **kwargs)
        self.machine: KvmMachine = build_machine(self.case, {})[0]

    @property
    def run(self) -> KvmRun:
        return self.vcpu.run

    def exit(
        self,
        reason: int,
        qualification: int = 0,
        *,
        length: int = 0,
        intr_info: int = 0,
        error_code: int = 0,
        full_reason: int | None = None,
        **kvm: Any,
    ) -> int:
        """Take an exit and handle it; `kvm` as the exit's part of a case's, `full_reason` with all bits."""
        info = ExitInfo(reason, qualification, length=length)
        info.intr_info, info.error_code = intr_info, error_code
        hardware_exit(self.machine, info, kvm)
        if full_reason is not None:
            self.vcpu.exit_reason = full_reason
        return vmx_handle_exit(self.machine)

    def exception(
        self, vector: int, error_code: int | None = None, qualification: int = 0, **more: Any
    ) -> int:
        """Exit 0 for an exception of hardware's."""
        info = ExitInfo(0).exception(vector, error_code)
        return self.exit(0, qualification, intr_info=info.intr_info, error_code=info.error_code, **more)

    # -- questions -------------------------------------------------------------------------------

    def set_reg(self, name: str, value: int) -> None:
        kvm_register_write_raw(self.vcpu, GPR_NAMES.index(name), value)

    @property
    def interruptibility(self) -> int:
        return self.vcpu.vmcs.values[vf.GUEST_INTERRUPTIBILITY_INFO]

    def field(self, field: int) -> int:
        return self.vcpu.vmcs.values[field]


def event(kind: int, vector: int, *more: int) -> int:
    """Interruption information of a valid event: type, vector, further bits."""
    return INTR_INFO_VALID_MASK | kind | vector | sum(more)


def hard(vector: int) -> int:
    """Interruption information of a hardware exception without error code."""
    return event(INTR_TYPE_HARD_EXCEPTION, vector)

"""Cases that enter KVM through a path, on a machine whose userspace is the test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from support.guest import Guest

from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES
from emufuzz.case.build import build_case, build_segments, build_system
from emufuzz.case.model import Case, Outcome, case_pages
from emufuzz.kvm.interruptibility import vmx_get_interrupt_shadow
from emufuzz.kvm.run import USERSPACE, after_exit, kvm_run
from emufuzz.kvm.trace import Trace
from emufuzz.kvm.userspace_regs import KvmRegs, kvm_get_regs, kvm_set_regs
from emufuzz.kvm.vcpu import KvmRun
from emufuzz.kvm.x86 import x86_emulate_instruction
from emufuzz.subject.kvm.build import build_machine, kvm_of
from emufuzz.subject.kvm.outcome import outcome_of
from emufuzz.subject.kvm.paths import PATH_SPECS
from emufuzz.subject.kvm.subject import KvmSubject
from emufuzz.subject.kvm.userspace import Userspace

UD, GP, DB = (6, None, None), (13, 0, None), 1
#: Pages without memory in the default layout, right below and right above the stack's.
LOW_DEVICE, HIGH_DEVICE = 0xB000, 0xD000
FEP = "0f0b6b766d"
_STATE = (*SREG_NAMES, "gdtr", "idtr", "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "xcr0", "dr", "msr", "fpu")


def mmio(
    addr: int = LOW_DEVICE, size: int = 0x1000, reads: str = "", behaviour: str = "ram"
) -> dict[str, Any]:
    """A memory-mapped device; hex `reads`."""
    return {"kind": "mmio", "addr": addr, "size": size, "behaviour": behaviour, "reads": reads}


def path_case(
    path: str,
    mode: str = "prot64",
    code: str = "90",
    *,
    devices: Sequence[Mapping[str, Any]] = (),
    kvm: Mapping[str, Any] | None = None,
    knobs: Mapping[str, Any] | None = None,
    vendor: str = "intel",
    port_in: bytes = b"",
    count: int = 1,
    **kwargs: Any,
) -> Case:
    """Hex `code` in the default layout; keywords as build_case takes them, and members of the state.

    `kvm` and its `knobs` are those of a case. Path `fep` puts the prefix before the code.
    """
    system = kwargs.pop("system", None)
    changes = {name: kwargs.pop(name) for name in _STATE if name in kwargs}
    if system is None:
        system = build_system(mode, kwargs.get("cpl"), **changes)
    prefix = FEP if path in ("fep", "msr-completion") else ""
    case = build_case(mode, bytes.fromhex(prefix + code), system=system, **kwargs)
    extra = {**(case.extra or {}), "kvm": {**(kvm or {}), "knobs": dict(knobs or {})}}
    if devices:
        extra["devices"] = list(devices)
    return msgspec.structs.replace(case, path=path, extra=extra, vendor=vendor, port_in=port_in, count=count)


class PathVm(Guest):
    """A case on its way through KVM. After `enter`, `run` is one KVM_RUN and `finish` all that follow."""

    def __init__(self, case: Case, *, trace: bool = False) -> None:
        self.case = case
        self.spec = PATH_SPECS[case.path or ""]
        self.machine, self.devices = build_machine(case, self.spec.knobs)
        self.userspace = Userspace(self.machine, self.devices, dict(case.system.msr))
        self.ended: int | None = None
        if trace:
            self.vcpu.trace = Trace()

    @property
    def exit(self) -> KvmRun:
        """Why KVM_RUN returned; `data` is where to answer."""
        return self.vcpu.run

    @property
    def left(self) -> bool:
        """The last KVM_RUN has left for userspace."""
        return self.ended == USERSPACE

    def enter(self) -> PathVm:
        self.ended = after_exit(self.machine, self.spec.enter(self.machine, kvm_of(self.case)))
        return self

    def run(self, **answer: Any) -> PathVm:
        """KVM_RUN after userspace has put `answer` into kvm_run; `pio` is the data of a port."""
        if "pio" in answer:
            self.machine.pio.data = answer.pop("pio")
        self.exit.data.update(answer)
        self.ended = kvm_run(self.machine)
        return self

    def finish(self) -> Outcome:
        """Let the case's devices answer to the end."""
        if self.left:
            self.ended = self.userspace.complete()
        return self.outcome()

    def outcome(self) -> Outcome:
        return outcome_of(self.case, self.machine, self.devices, self.userspace.exits)

    # -- questions -------------------------------------------------------------------------------

    @property
    def shadow(self) -> int:
        return vmx_get_interrupt_shadow(self.vcpu)

    def mem(self, addr: int, size: int) -> bytes:
        data = self.machine.memory.spaces[0].read_guest(addr, size)
        assert data is not None
        return data

    def names(self) -> list[str]:
        """The tracepoints so far."""
        assert self.vcpu.trace is not None
        return [event.name for event in self.vcpu.trace.events]

    # -- userspace's ioctls ----------------------------------------------------------------------

    def get_regs(self) -> KvmRegs:
        return kvm_get_regs(self.machine)

    def set_regs(self, **changes: int) -> None:
        """KVM_GET_REGS, some registers changed by name, KVM_SET_REGS."""
        regs = self.get_regs()
        rip, rflags = changes.pop("rip", regs.rip), changes.pop("rflags", regs.rflags)
        gpr = [changes.pop(name, value) for name, value in zip(GPR_NAMES, regs.gpr, strict=True)]
        assert not changes
        kvm_set_regs(self.machine, gpr, rip, rflags)


def enter(path: str, mode: str = "prot64", code: str = "90", *, trace: bool = False, **kwargs: Any) -> PathVm:
    """A case (as `path_case`) handled up to where userspace is needed or the guest goes on."""
    return PathVm(path_case(path, mode, code, **kwargs), trace=trace).enter()


def built(code: str = "90", mode: str = "prot64", **kwargs: Any) -> PathVm:
    """A case (as `path_case`) that has not run, for calls of x86_emulate_instruction."""
    return PathVm(path_case("ud", mode, code, **kwargs))


def emulate(vm: PathVm, emulation_type: int = 0, addr: int = 0) -> int:
    """x86_emulate_instruction, at the faulting address `addr`: 1 resumes the guest, 0 leaves."""
    return x86_emulate_instruction(vm.machine, addr, emulation_type)


def run_path(path: str, mode: str = "prot64", code: str = "90", **kwargs: Any) -> Outcome:
    """The outcome of a case (as `path_case`) from the KVM subject."""
    case = path_case(path, mode, code, **kwargs)
    subject = KvmSubject()
    subject.check(case)
    outcome = subject.run([case])[0]
    assert not outcome.crash, outcome.crash
    return outcome


def reg(outcome: Outcome, name: str) -> int:
    """A GPR of an outcome."""
    return outcome.gpr[GPR_NAMES.index(name)]


def mem(case: Case, outcome: Outcome, addr: int, size: int) -> bytes:
    """Memory within a page after a case."""
    page = outcome.pages.get(addr >> 12) or case_pages(case)[addr >> 12]
    return page[addr & 0xFFF : (addr & 0xFFF) + size]


def accesses(outcome: Outcome) -> list[tuple[str, int, str]]:
    """(direction, address or port, hex data) of everything that reached a device."""
    trace = (outcome.extra or {})["device_trace"]
    found = []
    for access in trace:
        place = access["port"] if access["kind"] == "pio" else int(str(access["addr"]), 0)
        found.append((access["direction"], place, access["data"]))
    return found


def exits(outcome: Outcome) -> list[str]:
    """Reasons of the exits to userspace."""
    return [item["reason"] for item in (outcome.extra or {})["exits"]]


def unenterable(mode: str = "prot32", cpl: int = 0) -> dict[str, Any]:
    """Keywords for a state that VM entry refuses: the RPLs of CS and SS differ (SDM Vol. 3C 26.3.1.2)."""
    ss = build_segments(mode, cpl)["ss"]
    return {"cpl": cpl, "ss": msgspec.structs.replace(ss, sel=ss.sel ^ 1)}

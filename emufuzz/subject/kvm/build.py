"""A case into a machine: memory, memslots, devices, vCPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emufuzz.case.devices import Devices, devices_of
from emufuzz.case.model import Case, case_pages, is_physical
from emufuzz.kvm.io_bus import IoBuses
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.memslots import GuestMemory, memory_from_pages, memory_from_regions
from emufuzz.kvm.mmu.hidden import HiddenTables
from emufuzz.kvm.mmu.mmio import APIC_DEFAULT_PHYS_BASE
from emufuzz.kvm.state import vcpu_of_case
from emufuzz.subject.flat.ops import load_fpu

_APIC_PAGE = APIC_DEFAULT_PHYS_BASE >> 12


def kvm_of(case: Case) -> Mapping[str, Any]:
    """A case's `kvm`, empty if it has none."""
    kvm: Mapping[str, Any] = (case.extra or {}).get("kvm", {})
    return kvm


def build_machine(case: Case, knobs: Mapping[str, Any]) -> tuple[KvmMachine, Devices]:
    """The machine of a case right before KVM_RUN, and its userspace's devices.

    Args:
        case: The case.
        knobs: Knobs that the path implies; those that the case names rank above them.

    Raises:
        OptionsError, CpuidError, MemslotError: The case's `kvm` contradicts itself.
    """
    kvm = kvm_of(case)
    devices = devices_of(case)
    irqchip = bool({**knobs, **kvm.get("knobs", {})}.get("irqchip"))
    hidden = None if is_physical(case) else HiddenTables(_device_pages(devices, irqchip=irqchip))
    memory = _memory(case, kvm)
    if irqchip or kvm.get("smm"):  # the guest may send an SMI to itself
        memory.share_with_smm()
    machine = KvmMachine(memory, IoBuses(kvm.get("ioeventfds", ())), hidden, case.count)
    machine.attach(lambda hooks: vcpu_of_case(case, hooks, knobs))
    load_fpu(machine.ctxt.fpu, case.system.fpu)
    return machine, devices


def _device_pages(devices: Devices, *, irqchip: bool) -> frozenset[int]:
    """Pages of devices, the local APIC in the kernel among them."""
    return devices.page_numbers() | ({_APIC_PAGE} if irqchip else set())


def _memory(case: Case, kvm: Mapping[str, Any]) -> GuestMemory:
    """Slots as the case declares them, else one for each run of pages that it has."""
    pages = case_pages(case)
    slots = kvm.get("memslots")
    if slots is None:
        return memory_from_pages(pages)
    return memory_from_regions(pages, [(s["base"], s["size"], s.get("flags", 0)) for s in slots])

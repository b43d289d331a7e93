"""What else is true of the machine when the exit comes: debugging, events, nested guests, knobs.

Most cases have none of it, since an oracle can judge only those; the others get one or two.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, Final, TypeAlias

import msgspec

from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.case.model import Case, System, code_address
from emufuzz.kvm.options import QUIRKS
from emufuzz.kvm.rflags import (
    KVM_GUESTDBG_BLOCKIRQ,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_INJECT_BP,
    KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP,
)

Kvm: TypeAlias = dict[str, Any]
Spice: TypeAlias = Callable[[Random, Case, Kvm], Case]

#: The share of cases that get something.
SHARE: Final = 0.25
_VALID: Final = 1 << 31
#: Offset of the local APIC's TPR.
TASK_PRIORITY: Final = 0x80
_DELIVER_CODE: Final = 1 << 11
#: Exceptions with an error code (SDM Vol. 3A Table 6-1).
WITH_CODE: Final = frozenset((8, 10, 11, 12, 13, 14, 17, 21))
_DEBUG: Final = (
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_USE_SW_BP,
    KVM_GUESTDBG_INJECT_DB, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_HW_BP,
)  # fmt: skip

_INTERCEPTS: Final = (
    "io", "desc", "rdtscp", "bus_lock_detection", "cr3_load", "hlt", "invlpg", "rdmsr", "wrmsr", "cpuid",
)  # fmt: skip

#: Knobs that no path depends on, with values other than their defaults.
_KNOBS: Final[tuple[tuple[str, tuple[Any, ...]], ...]] = (
    ("exit_on_emulation_error",   (True,)),
    ("exception_payload_enabled", (True,)),
    ("vnmi",                      (False,)),
    ("vpid",                      (0, 7)),
    ("nested",                    (False,)),
    ("ignore_msrs",               (True,)),
    ("enable_pmu",                (True,)),
    ("fasteoi",                   (False,)),
    ("hlt_in_guest",              (True,)),
    ("mwait_in_guest",            (True,)),
    ("platform_info_readable",    (False,)),
    ("hypercall_exits",           (True,)),
    ("hyperv",                    (True,)),
    ("enforce_pv_features",       (True,)),
    ("host_la57",                 (True,)),
    ("host_split_lock_detect",    (True,)),
    ("host_maxphyaddr",           (39, 46)),
    ("user_space_msr_mask",       (1, 2, 3, 4, 7)),
    ("emulate_invalid_guest_state", (False,)),
    ("disabled_quirks",           (*QUIRKS, ",".join(QUIRKS))),
    ("force_emulation_prefix",    (1, 3)),
    ("enable_vmware_backdoor",    (True,)),
)  # fmt: skip


def season(rng: Random, case: Case, kvm: Kvm, share: float = SHARE) -> Case:
    """The case, perhaps with something more in its state or in `kvm`, which is changed in place."""
    if rng.random() >= share:
        return case
    for _ in range(1 + (rng.random() < 0.2)):
        case = rng.choice(_SPICES)(rng, case, kvm)
    return case


def _knob(rng: Random, case: Case, kvm: Kvm) -> Case:
    name, values = rng.choice(_KNOBS)
    kvm.setdefault("knobs", {}).setdefault(name, rng.choice(values))
    return case


def _trap_flag(_: Random, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Spice
    return msgspec.structs.replace(case, rflags=case.rflags | X86_EFLAGS_TF)


def _breakpoint(rng: Random, case: Case, kvm: Kvm) -> Case:  # noqa: ARG001 - a Spice
    """A breakpoint of the guest's own on the instruction, or beside it, or DR7.GD."""
    dr = list(case.system.dr)
    nr = rng.randrange(4)
    dr[nr] = code_address(case) + rng.choice((0, 0, 0, 1))
    dr[7] |= rng.choice((1, 2, 3)) << 2 * nr | (1 << 13 if rng.random() < 0.2 else 0)
    rflags = case.rflags | (X86_EFLAGS_RF if rng.random() < 0.2 else 0)
    system = msgspec.structs.replace(case.system, dr=tuple(dr))
    return msgspec.structs.replace(case, system=system, rflags=rflags)


def _guest_debug(rng: Random, case: Case, kvm: Kvm) -> Case:
    control = KVM_GUESTDBG_ENABLE | rng.choice(_DEBUG)
    if rng.random() < 0.4:
        at = code_address(case) + (5 if case.path == "fep" and rng.random() < 0.5 else 0)
        registers = [at, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x402 | 1]
        kvm["guest_debug"] = {"control": control | KVM_GUESTDBG_USE_HW_BP, "dr": registers}
    else:
        kvm["guest_debug"] = control
    return case


def _interruptibility(rng: Random, case: Case, kvm: Kvm) -> Case:
    kvm["interruptibility"] = rng.choice((1, 2, 8, 9, 10))
    return case


def pending_exception(rng: Random) -> dict[str, Any]:
    """An exception that waits to be delivered, or whose delivery has begun."""
    vector = rng.choice((0, 1, 3, 4, 6, 8, 10, 11, 12, 13, 13, 14, 14, 17, 18, rng.choice((5, 7, 9, 16, 19))))
    pending: dict[str, Any] = {"vector": vector}
    if vector in WITH_CODE:
        pending["error_code"] = rng.choice((0, 2, 0x18, 0xFFFF))
    if vector in {1, 14}:
        pending["payload"] = rng.choice((0x4000, 1, 0x9008, 0xFFFF800000000000))
    if rng.random() < 0.3:
        pending["injected"] = True
    return pending


def _pending(rng: Random, case: Case, kvm: Kvm) -> Case:
    pending = pending_exception(rng)
    if not pending.get("injected") or "interrupt" not in kvm:
        kvm["pending"] = pending
    return case


def _interrupt(rng: Random, case: Case, kvm: Kvm) -> Case:
    if not kvm.get("pending", {}).get("injected"):
        kvm["interrupt"] = {"vector": rng.choice((8, 0x20, 0x80, 0xFF)), "soft": rng.random() < 0.3}
    return case


def _nmi(rng: Random, case: Case, kvm: Kvm) -> Case:
    kvm["nmi"] = 1 + rng.getrandbits(1)
    return case


def vectoring_info(rng: Random) -> tuple[int, int]:
    """IDT_VECTORING_INFO_FIELD and _ERROR_CODE of an event during whose delivery the exit came."""
    kind = rng.choice((0, 2, 3, 3, 4, 5, 6))
    vector = {0: 0x20, 2: 2, 3: rng.choice((13, 14, 8, 0)), 4: 0x80, 5: 1, 6: 3}[kind]
    info = _VALID | kind << 8 | vector
    if kind == 3 and vector in WITH_CODE:
        return info | _DELIVER_CODE, rng.choice((0, 2, 0x1C))
    return info, 0


def _vectoring(rng: Random, case: Case, kvm: Kvm) -> Case:
    kvm["vectoring_info"], kvm["vectoring_error_code"] = vectoring_info(rng)
    if kvm["vectoring_info"] >> 8 & 7 in (4, 6):
        kvm["instruction_length"] = 2
    return case


def _guest_mode(rng: Random, case: Case, kvm: Kvm) -> Case:
    kvm["guest_mode"] = {
        "exception_bitmap": rng.choice((0, 0, 0xFFFFFFFF, 1 << 13, 1 << 14, 1 << 6)),
        "page_fault_error_code_mask": rng.choice((0, 1, 2)),
        "page_fault_error_code_match": rng.choice((0, 1, 2)),
        "exit_on_nmi": rng.random() < 0.5,
        "exit_on_intr": rng.random() < 0.5,
        "mtf": rng.random() < 0.1,
        "intercepts": rng.sample(_INTERCEPTS, rng.randrange(4)),
    }
    pending = kvm.get("pending")
    if pending is not None and not pending.get("injected") and rng.random() < 0.5:
        pending["nested"] = True
    return case


def _smm(_: Random, case: Case, kvm: Kvm) -> Case:
    kvm["smm"] = True
    return case


def _irqchip(rng: Random, case: Case, kvm: Kvm) -> Case:
    kvm.setdefault("knobs", {}).setdefault("irqchip", True)
    kvm["lapic"] = lapic_registers(rng)
    system = with_priority(case.system, kvm["lapic"])
    return case if system is case.system else msgspec.structs.replace(case, system=system)


def with_priority(system: System, lapic: dict[int, int]) -> System:
    """The system with the CR8 that the local APIC's task priority is (SDM Vol. 3A 10.8.6.1)."""
    priority = lapic[TASK_PRIORITY] >> 4
    return system if priority == system.cr8 else msgspec.structs.replace(system, cr8=priority)


def lapic_registers(rng: Random) -> dict[int, int]:
    """Registers of a local APIC: enabled or not, priorities, interrupts in service and requested, timer."""
    registers = {0xF0: rng.choice((0x1FF, 0x1FF, 0xFF)), TASK_PRIORITY: rng.choice((0, 0x20, 0xF0))}
    for offset in (0x100, 0x110, 0x170, 0x200, 0x210, 0x270, 0x180, 0x320, 0x350, 0x360, 0x370, 0x3E0, 0x380):
        if rng.random() < 0.15:
            registers[offset] = rng.choice((0x10000, 0x1, 0x400, 0x20030, 0x80000000, rng.getrandbits(32)))
    return registers


_COMMON: Final[tuple[Spice, ...]] = (_knob, _trap_flag, _breakpoint, _guest_debug, _guest_mode)
_SPICES: Final[tuple[Spice, ...]] = (
    *_COMMON, *_COMMON, _knob, _interruptibility, _pending, _interrupt, _nmi, _vectoring, _smm, _irqchip,
)  # fmt: skip

"""The local APIC of cases on the path `apic-access`, as a device (SDM Vol. 3A 10.4.1, Table 10-1).

Registers are read and written by 32 bits at their beginning; all else is undefined. Their values are what
the case gives, or those after reset (10.4.7.1); which processor it is, and the time, is not known. Of what
a write does only CR8 shows, which is the task priority.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from iced_x86 import FlowControl, Mnemonic

from emufuzz.case.devices import MMIO, DeviceAccess, trace_from_obj, trace_to_obj
from emufuzz.case.model import PAGE_SHIFT, PAGE_SIZE, Case, Outcome, is_physical
from emufuzz.oracle.instruction import CaseInstruction

APIC_PATH: Final = "apic-access"
#: Field of an outcome that lists accesses to devices.
_TRACE: Final = "device_trace"
_BASE: Final = 0xFEE00000
_REGISTER: Final = 4
_UNIT: Final = 16
_TPR: Final = 0x80
#: DFR is all ones after reset; the rest of these is 0: TPR, LDR, ISR, TMR, IRR, ICR, TMICT, TDCR.
_DFR: Final = 0xE0
_KNOWN: Final = frozenset(
    (_TPR, 0xD0, _DFR, 0xF0, *range(0x100, 0x280, _UNIT), 0x300, 0x310, 0x380, 0x3E0)
)  # fmt: skip
#: What ends by the values that it compares, if it is repeated.
_COMPARES: Final = frozenset(
    (Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.CMPSQ, Mnemonic.SCASB, Mnemonic.SCASW,
     Mnemonic.SCASD, Mnemonic.SCASQ)
)  # fmt: skip
#: What follows from a value that is not known, if it is no branch; RIP and exceptions do not.
_FROM_VALUE: Final = ("gpr", "rflags", "mem", "fpu", _TRACE)


def apic_of(case: Case) -> dict[int, int]:
    """Offset -> value of the registers that a case gives, empty if there is no APIC to be accessed."""
    if case.path != APIC_PATH:
        return {}
    given = ((case.extra or {}).get("kvm") or {}).get("lapic") or {}
    return {int(str(offset), 0): int(str(value), 0) for offset, value in given.items()}


def apic_device(registers: dict[int, int]) -> dict[str, Any]:
    """The device, as a case declares one."""
    image = bytearray(PAGE_SIZE)
    for offset, value in {_DFR: 0xFFFFFFFF, **registers}.items():
        image[offset : offset + _REGISTER] = value.to_bytes(_REGISTER, "little")
    return {"kind": MMIO, "addr": hex(_BASE), "size": PAGE_SIZE, "behaviour": "ram", "reads": image.hex()}


def is_defined(case: Case, view: Case) -> bool:
    """Whether the SDM says what an access to the APIC does; True also where page tables tell what it is.

    Args:
        case: On the path `apic-access`.
        view: The same as hardware executes it natively.
    """
    if is_physical(case):
        return True
    accesses = CaseInstruction(view).accesses
    return all(_defined(each.linear, each.size) for each in accesses if _reaches(each.linear, each.size))


def _reaches(address: int, size: int) -> bool:
    return address < _BASE + PAGE_SIZE and address + size > _BASE


def _defined(address: int, size: int) -> bool:
    return size == _REGISTER and not address % _UNIT


def settle_apic(case: Case, outcome: Outcome, gap: str) -> Outcome:
    """An engine's outcome without the accesses to the APIC, but with what they do.

    Args:
        case: On the path `apic-access`.
        outcome: Of a run with `apic_device`, of a case on the path `apic-access`.
        gap: The id under which the engine does not vouch for what is not known.
    """
    trace = trace_from_obj((outcome.extra or {}).get(_TRACE) or [])
    taken = [a for a in trace if a.kind == MMIO and a.addr >> PAGE_SHIFT == _BASE >> PAGE_SHIFT]
    if not taken:
        return outcome
    outcome.extra = {**(outcome.extra or {}), _TRACE: trace_to_obj([a for a in trace if a not in taken])}
    priorities = [int.from_bytes(a.data, "little") for a in taken if a.write and a.addr - _BASE == _TPR]
    if priorities:
        outcome.system = msgspec.structs.replace(outcome.system, cr8=priorities[-1] >> 4 & 0xF)
    outcome.unchecked += tuple((field, gap) for field in _open_fields(case, outcome, taken))
    return outcome


def without_priority(case: Case, outcome: Outcome) -> Outcome:
    """A subject's outcome with the old CR8, which a write to the APIC may have changed."""
    if not apic_of(case) or outcome.system.cr8 == case.system.cr8:
        return outcome
    system = msgspec.structs.replace(outcome.system, cr8=case.system.cr8)
    return msgspec.structs.replace(outcome, system=system)


def _open_fields(case: Case, outcome: Outcome, taken: list[DeviceAccess]) -> tuple[str, ...]:
    if not all(_defined(a.addr, a.size) for a in taken) or outcome.exception is not None:
        return ("all",)
    if all(a.write or a.addr - _BASE in _KNOWN for a in taken):
        return ()
    decoded = CaseInstruction(case).decode(lax=True)
    repeats = decoded.mnemonic in _COMPARES and (decoded.has_rep_prefix or decoded.has_repne_prefix)
    branches = decoded.flow_control != FlowControl.NEXT
    return ("all",) if branches or repeats else _FROM_VALUE

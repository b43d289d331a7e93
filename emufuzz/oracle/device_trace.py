"""Comparison of what two sides asked of a case's devices.

Order, address, size, direction and data of every access count. Not architectural, and therefore
undone on both sides before they are compared, is where an access is cut:

* At the end of a page. Both cut there; whatever goes on at the start of the next page, in the same
  direction, is joined to what ended the page before.
* An operand of more than 8 bytes, which KVM passes on in pieces of at most 8 from its start in each
  page (KVM: emulator_read_write, struct kvm_mmio_fragment), and Unicorn in pieces of 8 from its own
  start. Of an instruction with such an operand, adjacent accesses of one direction are joined.
* An operand that consists of several values, as far pointers and the images of table registers: a
  processor may read or write them apart. Their accesses are joined in the same way.

Port accesses are never joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import iced_x86

from emufuzz.case.devices import MMIO, DeviceAccess, trace_from_obj
from emufuzz.case.model import PAGE_MASK, Case, Outcome
from emufuzz.oracle.instruction import CaseInstruction

#: Member of `Outcome.extra`, and name of the field in differences and gaps.
DEVICE_TRACE: Final = "device_trace"

_SCALARS: Final = frozenset((1, 2, 4, 8))
_FAR_POINTERS: Final = frozenset(
    (iced_x86.MemorySize.SEG_PTR16, iced_x86.MemorySize.SEG_PTR32, iced_x86.MemorySize.SEG_PTR64)
)


def has_pieces(case: Case) -> bool:
    """Whether an operand in memory is larger than 8 bytes or consists of several values."""
    instruction = CaseInstruction(case)
    if instruction.decode(lax=True).memory_size in _FAR_POINTERS:
        return True
    return not instruction.string_opcode and any(
        access.size > 0 and access.size not in _SCALARS for access in instruction.accesses
    )


def joined(trace: Sequence[DeviceAccess], *, pieces: bool) -> list[DeviceAccess]:
    """The trace with the cuts undone that are not architectural; `pieces`: those within a page, too."""
    accesses: list[DeviceAccess] = []
    for access in trace:
        last = accesses[-1] if accesses else None
        if last is not None and _goes_on(last, access) and (pieces or not access.addr & PAGE_MASK):
            accesses[-1] = last._replace(size=last.size + access.size, data=last.data + access.data)
        else:
            accesses.append(access)
    return accesses


def _goes_on(last: DeviceAccess, access: DeviceAccess) -> bool:
    """Whether an access to memory-mapped devices begins where the last one ended."""
    same = last.kind == access.kind == MMIO and last.write == access.write
    return same and access.addr == last.addr + last.size


def trace_of(outcome: Outcome) -> list[DeviceAccess] | None:
    """What an outcome says was asked of the devices, None if it says nothing."""
    value: Any = (outcome.extra or {}).get(DEVICE_TRACE)
    return None if value is None else trace_from_obj(value)


def differing_accesses(
    case: Case, subject: Outcome, oracle: Outcome
) -> Iterator[tuple[DeviceAccess | None, DeviceAccess | None]]:
    """The first pair of accesses that differ, with None where one side has no more; else nothing.

    What follows the first difference follows from it. Nothing either if one side kept no trace.
    """
    ours, theirs = trace_of(subject), trace_of(oracle)
    if ours is None or theirs is None or ours == theirs:
        return
    pieces = has_pieces(case)
    ours, theirs = joined(ours, pieces=pieces), joined(theirs, pieces=pieces)
    for i in range(max(len(ours), len(theirs))):
        a = ours[i] if i < len(ours) else None
        b = theirs[i] if i < len(theirs) else None
        if a != b:
            yield a, b
            return


def show_access(access: DeviceAccess | None) -> str:
    """An access for a table of differences."""
    if access is None:
        return "none"
    verb = "write" if access.write else "read"
    return f"{access.kind} {verb} {access.addr:#x} {access.data.hex()}"

"""The order in which CMPS asks devices: Unicorn reads ES:DI first, processors and KVM DS:SI.

What a device answers does not depend on the order, unless both operands are in the same stream. So the
accesses are put in the other order, iteration by iteration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from iced_x86 import Mnemonic

from emufuzz.case.devices import MMIO, DeviceAccess
from emufuzz.case.fields import MAX_ACCESS
from emufuzz.case.model import PAGE_MASK, PAGE_SIZE, Case
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.operands import at_iteration, place_of

COMPARES: Final = frozenset((Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.CMPSQ))
#: Iterations up to KVM's stopping point.
_MOST: Final = 1024
_SOURCE, _DESTINATION = 0, 1


def by_source(view: Case, trace: Sequence[DeviceAccess]) -> list[DeviceAccess]:
    """The accesses of CMPS, of each iteration those of DS:SI first; as they are if they are no such ones."""
    numbered = list(_numbered(view, trace, (_DESTINATION, _SOURCE)))
    if len(numbered) != len(trace):
        return list(trace)
    order = sorted(range(len(trace)), key=lambda place: (numbered[place], place))
    return [trace[place] for place in order]


def shares_stream(view: Case, trace: Sequence[DeviceAccess]) -> bool:
    """Whether both operands of CMPS ask one device whose answers depend on what was asked before.

    Also true if it cannot be told which access is whose.

    Args:
        view: As hardware executes it.
        trace: As `by_source` has put it.
    """
    numbered = list(_numbered(view, trace, (_SOURCE, _DESTINATION)))
    if len(numbered) != len(trace):
        return True
    whose = {operand: set[int]() for operand in (_SOURCE, _DESTINATION)}
    for (_, operand), access in zip(numbered, trace, strict=True):
        whose[operand] |= _streams(view, access)
    return bool(whose[_SOURCE] & whose[_DESTINATION])


def _streams(view: Case, access: DeviceAccess) -> set[int]:
    """The devices with a stream that an access reaches, by their number."""
    declared = (view.extra or {}).get("devices") or ()
    return {
        number
        for number, device in enumerate(declared)
        if device["kind"] == MMIO
        and device.get("behaviour", "stream") == "stream"
        and int(str(device["addr"]), 0) < access.addr + access.size
        and access.addr < int(str(device["addr"]), 0) + device["size"]
    }


def _numbered(view: Case, trace: Sequence[DeviceAccess], order: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(iteration, operand) of each access, if the operands of an iteration are read in an order."""
    left = iter(trace)
    access = next(left, None)
    for iteration in range(_MOST):
        operands = _operands(view, iteration)
        for operand in order:
            for place, part in _parts(view, *operands[operand]):
                if access is not None and (access.addr, access.size) == (place, part):
                    yield iteration, operand
                    access = next(left, None)
        if access is None:
            return


def _operands(view: Case, iteration: int) -> list[tuple[int, int]]:
    """(linear address, bytes) of source and destination in an iteration."""
    size = CaseInstruction(view).operand_bits // 8 if CaseInstruction(view).opcode[0] & 1 else 1
    accesses = CaseInstruction(at_iteration(view, iteration, size)).accesses
    return [(access.linear, size) for access in accesses]


def _parts(view: Case, linear: int, size: int) -> Iterator[tuple[int, int]]:
    """(physical address, bytes) of an access in each page, as far as it is mapped."""
    while size > 0:
        part = min(size, PAGE_SIZE - (linear & PAGE_MASK), MAX_ACCESS)
        place = place_of(view, linear)
        if place is not None:
            yield place, part
        linear, size = linear + part, size - part

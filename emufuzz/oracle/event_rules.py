"""The rules behind the quirks that only callbacks show: what KVM's emulator reads more than it must.

A subject that logs its callbacks is held to the accesses that the SDM allows (emufuzz.oracle.rules.events).
Each rule here works out the accesses that KVM makes instead, and wants no others; an instruction that
faults may have made the first of them only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from emufuzz.arch.exceptions import UD_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RCX
from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.device_trace import DEVICE_TRACE
from emufuzz.oracle.operands import default_bits, operand_size, prefix_facts
from emufuzz.oracle.rules.privilege import port_of, port_size
from emufuzz.oracle.rules.view import MASK32, MASK64, View

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

#: read or write, linear address, size.
Touch = tuple[str, int, int]

_MEMORY: Final = frozenset(("read", "write", "cmpxchg"))
_PORTS: Final = frozenset(("in", "out"))
_STORES: Final = frozenset(("0f00/0", "0f00/1"))
_WIDE: Final = 8
_SELECTOR: Final = 2
#: ModRM.reg.
_REGISTER: Final = 0x38
#: Bytes that KVM reads ahead from a port at most.
_READ_AHEAD: Final = 1024


def _touches(subject: Outcome) -> list[Touch]:
    """The accesses to memory, in order; descriptors and their kin apart."""
    return [
        (event[0], event[1], event[2] if event[0] == "read" else len(event[2]))
        for event in subject.events
        if event[0] in _MEMORY and event[-1] != "sys"
    ]


def _are(subject: Outcome, differences: Sequence[Difference], wanted: Sequence[Touch]) -> bool:
    """Only accesses differ, and they are those; with a fault the first of them."""
    if {difference.field for difference in differences} != {DEVICE_TRACE}:
        return False
    if any(event[0] in _PORTS for event in subject.events):
        return False
    found = _touches(subject)
    if subject.exception is None:
        return found == list(wanted)
    return bool(found) and found == list(wanted[: len(found)])


def selector_store(case: Case, subject: Outcome, _: Outcome, differences: Sequence[Difference]) -> bool:
    """SLDT, STR read their destination, in the operand size; with REX.W they, and MOV, write 8 bytes."""
    operand = View(case).explicit
    if operand is None:
        return False
    size = operand_size(case, subject.leaf)
    stored = ("write", operand.linear, _WIDE if size == _WIDE else _SELECTOR)
    reads = [("read", operand.linear, size)] if subject.leaf in _STORES else []
    return _are(subject, differences, [*reads, stored])


def selector_source(case: Case, subject: Outcome, _: Outcome, differences: Sequence[Difference]) -> bool:
    """MOV to a bad segment register reads its source before the #UD."""
    at = prefix_facts(case).length + 1
    decoded = case.code[:at] + bytes((case.code[at] & ~_REGISTER,)) + case.code[at + 1 :]
    operand = View(msgspec.structs.replace(case, code=decoded)).explicit  # of MOV ES, which iced knows
    if operand is None or subject.exception != (UD_VECTOR, None, None):
        return False
    return _are(subject, differences, [("read", operand.linear, _SELECTOR)])


def movsxd_source(case: Case, subject: Outcome, _: Outcome, differences: Sequence[Difference]) -> bool:
    """MOVSXD r16, m16 reads 4 bytes."""
    operand = View(case).explicit
    if operand is None or operand_size(case, subject.leaf) != _SELECTOR:
        return False
    return _are(subject, differences, [("read", operand.linear, 4)])


def table_image(case: Case, subject: Outcome, _: Outcome, differences: Sequence[Difference]) -> bool:
    """LGDT, LIDT read as much as the operand size says and drop it, then limit and base."""
    operand = View(case).explicit
    if operand is None:
        return False
    long = case.mode == "prot64"
    size = operand_size(case, subject.leaf)
    at, mask = operand.linear, MASK64 if long else MASK32
    base = _WIDE if long else 3 if size == _SELECTOR else 4
    wanted = [("read", at, size), ("read", at, 2), ("read", at + 2 & mask, base)]
    return _are(subject, differences, wanted)


def ports_ahead(case: Case, subject: Outcome, _: Outcome, differences: Sequence[Difference]) -> bool:
    """IN with a REP prefix reads its port as often as INS would: RCX times, but 1024 bytes at most."""
    view = View(case)
    if {difference.field for difference in differences} != {DEVICE_TRACE} or not prefix_facts(case).rep:
        return False
    size = port_size(view.insn)
    if _touches(subject):
        return False
    count = max(case.gpr[VCPU_REGS_RCX] & _count_mask(case), 1)
    ports = [event[:4] for event in subject.events if event[0] in _PORTS]
    most = min(count, _READ_AHEAD // size)
    return len(ports) == 1 and ports[0][:3] == ("in", port_of(view), size) and 1 < ports[0][3] <= most


def _count_mask(case: Case) -> int:
    """The bits of RCX that count, by the address size."""
    small = prefix_facts(case).small_ad
    if case.mode == "prot64":
        return MASK32 if small else MASK64
    return MASK32 if (default_bits(case) == 32) != small else 0xFFFF

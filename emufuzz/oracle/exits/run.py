"""The state in which an event, a task or the like is being worked out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from emufuzz.arch.exceptions import DB_VECTOR, GP_VECTOR
from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.case.devices import devices_of
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, Case, Fault, Outcome, Segment, case_pages, is_physical
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.native_view import kvm_of

_MASK32: Final = 0xFFFFFFFF
_LONGEST: Final = 15


#: Gap of fields that a model leaves open.
LEFT_OPEN: Final = "exits-open"
#: Gap of fields that the SDM leaves undefined.
UNDEFINED: Final = "exits-undefined"
#: Gap of cases in which something happens that the models leave open.
FAULTS: Final = "exits-fault"

#: Id -> reason of what is attached to outcomes.
ATTACHED: Final = {
    LEFT_OPEN: "exceptions that wait beside the event, and what #DB says in DR6, are not worked out",
    UNDEFINED: "the SDM leaves it undefined: CR3 without paging, upper halves, segments of a refused task",
    FAULTS: "memory, a stack or a table ends on the way",
}


class NoExitError(UnsupportedCaseError):
    """Hardware would not have come to this exit: it faults before, or does the work itself."""


class UndefinedError(UnsupportedCaseError):
    """The SDM leaves undefined what happens at all."""


class OpenError(Exception):
    """Something happens that these models leave open: a fault on the way, a device."""


class Run:
    """A case's state, to be changed; memory is flat."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.kvm: Mapping[str, Any] = kvm_of(case)
        self.gpr = list(case.gpr)
        self.rip = case.rip
        self.rflags = case.rflags
        self.seg = list(case.system.seg)
        self.fields: dict[str, Any] = {}
        self.open: list[str] = []
        self.undefined: list[str] = []
        flat = not is_physical(case)
        self._memory = case_pages(case) if flat else {}
        self._devices = devices_of(case).page_numbers() if flat else frozenset()
        self._written: dict[int, bytearray] = {}

    # Memory

    def read(self, linear: int, size: int) -> int:
        """A number in memory.

        Raises:
            OpenError: It is not all in memory.
        """
        return int.from_bytes(bytes(self._byte(linear + i & _MASK32) for i in range(size)), "little")

    def _byte(self, linear: int) -> int:
        page = self._page(linear >> PAGE_SHIFT)
        return page[linear & PAGE_MASK]

    def _page(self, number: int) -> bytes | bytearray:
        if number in self._written:
            return self._written[number]
        if number in self._devices or number not in self._memory:
            raise OpenError(f"no memory at {number << PAGE_SHIFT:#x}")
        return self._memory[number]

    def write(self, linear: int, size: int, value: int) -> None:
        """Store a number.

        Raises:
            OpenError: Not all of it is memory.
        """
        for i, byte in enumerate((value & (1 << size * 8) - 1).to_bytes(size, "little")):
            at = linear + i & _MASK32
            page = self._page(at >> PAGE_SHIFT)
            if not isinstance(page, bytearray):
                page = self._written[at >> PAGE_SHIFT] = bytearray(page)
            page[at & PAGE_MASK] = byte

    def pages(self) -> dict[int, bytes]:
        """The pages that are not as they were, by number."""
        return {n: bytes(page) for n, page in self._written.items() if bytes(page) != self._memory[n]}

    # Registers

    def put_segment(self, number: int, segment: Segment) -> None:
        """Load a segment register with its hidden part."""
        self.seg[number] = segment

    # The instruction at RIP

    def length(self) -> int:
        """Bytes of the instruction: what the exit says, else what is at RIP.

        Raises:
            OpenError: There is no whole instruction.
        """
        told = self.kvm.get("instruction_length")
        if told is not None:
            return min(int(told), _LONGEST)
        decoded = CaseInstruction(self.case).decode(lax=True)
        if not decoded.code:
            raise OpenError("no instruction at RIP")
        return int(decoded.len)

    def skip(self) -> None:
        """Go on behind the instruction at RIP (SDM Vol. 3C 27.3.3)."""
        mask = (1 << 64) - 1 if self.case.mode == "prot64" else _MASK32
        self.rip = self.rip + self.length() & mask
        self.rflags &= ~X86_EFLAGS_RF

    # Outcomes

    def outcome(self) -> Outcome:
        """The state now; a single-step trap waits if TF was set at the beginning."""
        outcome = self._plain()
        if self.case.rflags & X86_EFLAGS_TF:
            outcome.exception = (DB_VECTOR, None, None)
        return outcome

    def _plain(self) -> Outcome:
        case = self.case
        system = msgspec.structs.replace(case.system, seg=tuple(self.seg), **self.fields)
        return Outcome(
            case.id,
            tuple(self.gpr),
            self.rip,
            self.rflags,
            case.system if system == case.system else system,
            pages=self.pages(),
            unchecked=tuple(
                (field, gap)
                for fields, gap in ((self.open, LEFT_OPEN), (self.undefined, UNDEFINED))
                for field in fields
            ),
        )

    def delivered(self) -> Outcome:
        """The state now, behind which no single-step trap can wait."""
        return self._plain()

    def faulted(self, fault: Fault = (GP_VECTOR, 0, None)) -> Outcome:
        """An exception, with nothing changed; by default #GP(0)."""
        case = self.case
        rflags = case.rflags & ~X86_EFLAGS_RF
        return Outcome(
            case.id, case.gpr, case.rip, rflags, case.system, rc="propagate_fault", exception=fault
        )

"""Segment registers of a new task (SDM Vol. 3A 7.3, Table 7-1; 5.8 for what is checked).

What is refused is an exception in the new task, which has its other registers by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from emufuzz.arch.descriptors import (
    DESC_ACCESSED,
    DESC_CODE,
    DESC_CONFORMING,
    DESC_READABLE,
    DESC_WRITABLE,
    DescStruct,
)
from emufuzz.arch.exceptions import NP_VECTOR, SS_VECTOR, TS_VECTOR
from emufuzz.arch.regs import VCPU_SREG_CS, VCPU_SREG_LDTR, VCPU_SREG_SS
from emufuzz.case.model import UNUSABLE, Segment
from emufuzz.oracle.exits.run import Run

_LDT: Final = 2
_RPL: Final = 3
_LOCAL: Final = 4
_VM86_LIMIT: Final = 0xFFFF
_VM86_TYPE: Final = 3
_INDEX: Final = 0xFFF8


class RefusedError(Exception):
    """A selector of the new task is refused: `vector`, with the selector as error code."""

    def __init__(self, vector: int, selector: int) -> None:
        super().__init__(f"vector {vector}, selector {selector:#x}")
        self.vector = vector
        self.code = selector & ~_RPL


def descriptor_of(selector: int, value: int) -> Segment:
    """A segment register with the hidden part that 8 bytes of a table are."""
    d = DescStruct.unpack(value.to_bytes(8, "little"))
    return Segment(selector, d.base, d.limit_scaled, d.type, d.s, d.dpl, d.p, d.avl, d.l, d.d, d.g)


class TaskSegments:
    """The loads of one task switch."""

    def __init__(self, run: Run, selectors: list[int], ldt: int, *, virtual: bool) -> None:
        """`selectors` are those of ES, CS, SS, DS and, of a 32-bit task, FS and GS."""
        self._run = run
        self._selectors = selectors
        self._ldt = ldt
        self._virtual = virtual
        self._cpl = selectors[VCPU_SREG_CS] & _RPL

    def load(self) -> list[RefusedError]:
        """Load all that can be loaded, LDTR first, in whose table the others may be; what is refused.

        Raises:
            OpenError: A table is not in memory.
        """
        refused = []
        for step in self._steps():
            try:
                step()
            except RefusedError as error:
                refused.append(error)
        return refused

    def load_until_refused(self) -> RefusedError | None:
        """All selectors first, then their descriptors up to the first that is refused.

        Raises:
            OpenError: As of `load`.
        """
        run = self._run
        for number, selector in ((VCPU_SREG_LDTR, self._ldt), *enumerate(self._selectors)):
            run.put_segment(number, msgspec.structs.replace(run.seg[number], sel=selector))
        for step in self._steps():
            try:
                step()
            except RefusedError as error:
                return error
        return None

    def _steps(self) -> list[Callable[[], None]]:
        pairs = list(enumerate(self._selectors))
        return [self._load_ldt, *(lambda n=n, s=s: self._load(n, s) for n, s in pairs)]

    def _load_ldt(self) -> None:
        run, selector = self._run, self._ldt
        if not selector & ~_RPL:
            run.put_segment(VCPU_SREG_LDTR, Segment(selector))
            return
        if selector & _LOCAL:
            raise RefusedError(TS_VECTOR, selector)
        found, _ = self._descriptor(selector)
        if found.s or found.type != _LDT or not found.p:
            raise RefusedError(TS_VECTOR, selector)
        run.put_segment(VCPU_SREG_LDTR, found)

    def _descriptor(self, selector: int) -> tuple[Segment, int]:
        """(the descriptor, its address)."""
        system = self._run.case.system
        base, limit = system.gdtr.base, system.gdtr.limit
        if selector & _LOCAL:
            table = self._run.seg[VCPU_SREG_LDTR]
            base, limit = table.base, table.limit if table.p else -1
        if (selector & _INDEX) + 7 > limit:
            raise RefusedError(TS_VECTOR, selector)
        at = base + (selector & _INDEX)
        return descriptor_of(selector, self._run.read(at, 8)), at

    def _load(self, number: int, selector: int) -> None:
        if self._virtual:
            self._run.put_segment(number, _virtual_segment(selector))
            return
        if not selector & ~_RPL:
            if number in {VCPU_SREG_CS, VCPU_SREG_SS}:
                raise RefusedError(TS_VECTOR, selector)
            self._run.put_segment(number, _null(selector))
            return
        found, at = self._descriptor(selector)
        if not found.s or not self._allowed(number, found):
            raise RefusedError(TS_VECTOR, selector)
        if not found.p:
            raise RefusedError(SS_VECTOR if number == VCPU_SREG_SS else NP_VECTOR, selector)
        if not found.type & DESC_ACCESSED:
            self._run.write(at + 5, 1, self._run.read(at + 5, 1) | DESC_ACCESSED)
        self._run.put_segment(number, _accessed(found))

    def _allowed(self, number: int, found: Segment) -> bool:
        rpl = found.sel & _RPL
        if number == VCPU_SREG_CS:
            if not found.type & DESC_CODE:
                return False
            return found.dpl <= rpl if found.type & DESC_CONFORMING else found.dpl == rpl
        if number == VCPU_SREG_SS:
            data = not found.type & DESC_CODE and bool(found.type & DESC_WRITABLE)
            return data and rpl == self._cpl == found.dpl
        if found.type & DESC_CODE:
            if not found.type & DESC_READABLE:
                return False
            if found.type & DESC_CONFORMING:
                return True
        return found.dpl >= max(self._cpl, rpl)


def _accessed(found: Segment) -> Segment:
    parts = {name: getattr(found, name) for name in Segment.__struct_fields__}
    return Segment(**{**parts, "type": found.type | DESC_ACCESSED})


def _null(selector: int) -> Segment:
    """An unusable segment register with its null selector."""
    return Segment(selector) if selector else UNUSABLE


def _virtual_segment(selector: int) -> Segment:
    """SDM Vol. 3B 20.2.1."""
    return Segment(selector, selector << 4, _VM86_LIMIT, _VM86_TYPE, 1, 3, 1)

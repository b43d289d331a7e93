"""One instruction through the emulator on flat memory, and questions about what it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from emufuzz.arch.descriptors import DescStruct
from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES
from emufuzz.case.build import GDT_BASE, build_case, build_system
from emufuzz.case.model import Case, Segment, TableRegister, case_pages
from emufuzz.subject.flat import FlatSubject

UD, GP, PF, SS, NP, TS = (6, None, None), (13, 0, None), 14, (12, 0, None), 11, 10
#: Members of the machine state that `run` takes by name.
STATE = (*SREG_NAMES, "gdtr", "idtr", "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "xcr0", "dr", "msr", "fpu")
FLAT = FlatSubject()


class Run:
    """A case and its outcome."""

    def __init__(self, case: Case) -> None:
        FLAT.check(case)
        self.case = case
        self.outcome = FLAT.run([case])[0]
        assert not self.outcome.crash, self.outcome.crash

    def __repr__(self) -> str:
        out = self.outcome
        return f"{self.case.code.hex()} {out.rc} {out.exception} {out.reason} {out.events}"

    def reg(self, name: str) -> int:
        """A GPR after the instruction."""
        return self.outcome.gpr[GPR_NAMES.index(name)]

    def seg(self, name: str) -> Segment:
        """A segment register after the instruction."""
        return self.outcome.system.seg[SREG_NAMES.index(name)]

    def mem(self, addr: int, size: int) -> int:
        """Memory after the instruction, as a number."""
        data = b""
        for at in range(addr, addr + size):
            page = self.outcome.pages.get(at >> 12) or case_pages(self.case)[at >> 12]
            data += page[at & 0xFFF : (at & 0xFFF) + 1]
        return int.from_bytes(data, "little")

    @property
    def rc(self) -> str:
        return self.outcome.rc

    @property
    def fault(self) -> tuple[int, int | None, int | None] | None:
        return self.outcome.exception

    @property
    def rip(self) -> int:
        return self.outcome.rip

    @property
    def flags(self) -> int:
        return self.outcome.rflags

    @property
    def events(self) -> list[tuple]:
        """The callbacks after the first fetch."""
        return list(self.outcome.events[1:])


def run(
    mode: str,
    code: str,
    *,
    callbacks: list[Mapping[str, Any]] | None = None,
    vendor: str = "intel",
    port_in: bytes = b"",
    emul_type: int = 0,
    **kwargs: Any,
) -> Run:
    """Run hex `code` in the default layout of `mode`; keywords as build_case takes them.

    Keywords that name members of the machine state (`cr4`, `ds`, `msr` ...) change that.
    """
    system = kwargs.pop("system", None)
    changes = {name: kwargs.pop(name) for name in STATE if name in kwargs}
    if system is None:
        system = build_system(mode, kwargs.get("cpl"))
    names = changes.keys() & set(SREG_NAMES)
    segs = tuple(
        changes.pop(name) if name in names else seg for name, seg in zip(SREG_NAMES, system.seg, strict=True)
    )
    system = msgspec.structs.replace(system, seg=segs, **changes)
    case = build_case(mode, bytes.fromhex(code), system=system, **kwargs)
    extra = None if callbacks is None else {"callbacks": callbacks}
    return Run(
        msgspec.structs.replace(case, extra=extra, vendor=vendor, port_in=port_in, emul_type=emul_type)
    )


def segment(mode: str, name: str, cpl: int | None = None, **changes: int) -> Segment:
    """A segment register of the default state, changed."""
    return msgspec.structs.replace(build_system(mode, cpl).seg[SREG_NAMES.index(name)], **changes)


def descriptor(type: int, **fields: int) -> bytes:  # noqa: A002 - the architectural name
    """Eight bytes of a descriptor, present; a system one unless s=1."""
    return DescStruct(type=type, **{"p": 1, "limit": 0xFFFF, **fields}).pack()


def gdt_with(slots: Mapping[int, bytes]) -> dict[str, Any]:
    """Keywords for `run`: descriptors at selectors (80h and above), and a GDTR that reaches them."""
    return {
        "gdtr": TableRegister(GDT_BASE, 0xFFF),
        "data": {GDT_BASE + selector: data for selector, data in slots.items()},
    }

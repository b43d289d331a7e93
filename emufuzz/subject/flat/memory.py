"""Flat linear memory behind the memory callbacks: pages exist or fault, nothing is translated."""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import EFER_NX, X86_CR4_SMEP
from emufuzz.arch.exceptions import PF_VECTOR, PFERR_FETCH, PFERR_USER, PFERR_WRITE
from emufuzz.case.model import PAGE_SIZE, ZERO_PAGE, Case, Event, code_address
from emufuzz.emulator.ctxt import X86EmulateCtxt, X86Exception
from emufuzz.emulator.x86emul import (
    MASK32,
    MASK64,
    X86EMUL_CMPXCHG_FAILED,
    X86EMUL_CONTINUE,
    X86EMUL_MODE_PROT64,
    X86EMUL_PROPAGATE_FAULT,
)

_OFFSET: Final = PAGE_SIZE - 1
_ATOMIC_SIZES: Final = (1, 2, 4, 8)


class FlatMemory:
    """Pages of one case: the case's own, overlaid by those that were written.

    `log` receives an event for every callback, or is None. An access to an absent page is a #PF
    with P = 0, also with paging off.
    """

    __slots__ = ("code", "code_at", "cpl_value", "cr4", "efer", "log", "pages", "written")

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}
        self.written: dict[int, bytes] = {}
        self.code: bytes = b""
        self.code_at: int = 0
        self.cpl_value: int = 0
        self.cr4: int = 0
        self.efer: int = 0
        self.log: list[Event] | None = None

    def load_memory(self, case: Case) -> None:
        """Take the memory and the code of a case."""
        self.pages = case.mem.pages
        self.written = {}
        self.code = case.code
        self.code_at = code_address(case)

    def changed_pages(self) -> dict[int, bytes]:
        """The pages whose contents differ from the case's: page number -> contents."""
        written = self.written
        if not written:
            return written
        return {pfn: page for pfn, page in written.items() if page != self._original(pfn)}

    def _original(self, pfn: int) -> bytes | None:
        """A page as the case has it, code included; None if it does not exist."""
        code, at = self.code, self.code_at
        first = at >> 12
        last = at + max(len(code), 1) - 1 >> 12
        page = self.pages.get(pfn)
        if not first <= pfn <= last:
            return page
        page = page or ZERO_PAGE
        offset = at - (pfn << 12)
        start, skip = max(offset, 0), max(-offset, 0)
        part = code[skip : skip + PAGE_SIZE - start]
        return page[:start] + part + page[start + len(part) :]

    def _page(self, pfn: int) -> bytes | None:
        """The current contents of a page; None if it does not exist."""
        page = self.written.get(pfn)
        if page is None:
            code_pfn = self.code_at >> 12
            # Code may cover the page after its first, hardly ever more: ask exactly only then.
            if pfn < code_pfn or pfn > code_pfn + (len(self.code) + _OFFSET >> 12):
                return self.pages.get(pfn)
            return self._original(pfn)
        return page

    def _page_fault(self, fault: X86Exception | None, addr: int, error_code: int, system: bool) -> int:
        if fault is not None:
            if self.cpl_value == 3 and not system:
                error_code |= PFERR_USER
            fault.vector = PF_VECTOR
            fault.error_code_valid = True
            fault.error_code = error_code
            fault.nested_page_fault = False
            fault.address = addr
        return X86EMUL_PROPAGATE_FAULT

    def _read(
        self, addr: int, size: int, fault: X86Exception | None, system: bool, mask: int
    ) -> tuple[int, bytes]:
        """Read page by page; from the second page on the address is cut to `mask`."""
        data = b""
        while True:
            offset = addr & _OFFSET
            part = min(size, PAGE_SIZE - offset)
            page = self._page(addr >> 12)
            if page is None:
                return self._page_fault(fault, addr, 0, system), b""
            data += page[offset : offset + part]
            size -= part
            if not size:
                return X86EMUL_CONTINUE, data
            addr = addr + part & mask

    def _write(self, addr: int, data: bytes, fault: X86Exception | None, system: bool, mask: int) -> int:
        """Write page by page; what was written before a later page faults stays."""
        while True:
            offset = addr & _OFFSET
            part = data[: PAGE_SIZE - offset]
            page = self._page(addr >> 12)
            if page is None:
                return self._page_fault(fault, addr, PFERR_WRITE, system)
            self.written[addr >> 12] = page[:offset] + part + page[offset + len(part) :]
            data = data[len(part) :]
            if not data:
                return X86EMUL_CONTINUE
            addr = addr + len(part) & mask

    def fetch(self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception) -> tuple[int, bytes]:
        """X86EmulateOps.fetch."""
        if self.log is not None:
            self.log.append(("fetch", addr, size))
        pfn = addr >> 12
        if addr == self.code_at and pfn not in self.pages and pfn not in self.written:
            return X86EMUL_CONTINUE, self.code[:size].ljust(size, b"\0")
        page = self._page(pfn)
        if page is None:
            error = PFERR_FETCH if self.efer & EFER_NX or self.cr4 & X86_CR4_SMEP else 0
            return self._page_fault(fault, addr, error, system=False), b""
        offset = addr & _OFFSET
        return X86EMUL_CONTINUE, page[offset : offset + size]

    def read_std(
        self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception | None, system: bool
    ) -> tuple[int, bytes]:
        """X86EmulateOps.read_std."""
        if self.log is not None:
            self.log.append(("read", addr, size, "sys" if system else "std"))
        return self._read(addr, size, fault, system, MASK64)

    def write_std(
        self, ctxt: X86EmulateCtxt, addr: int, data: bytes, fault: X86Exception | None, system: bool
    ) -> int:
        """X86EmulateOps.write_std."""
        if self.log is not None:
            self.log.append(("write", addr, data, "sys" if system else "std"))
        return self._write(addr, data, fault, system, MASK64)

    def read_emulated(
        self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception
    ) -> tuple[int, bytes]:
        """X86EmulateOps.read_emulated."""
        if self.log is not None:
            self.log.append(("read", addr, size))
        offset = addr & _OFFSET
        if offset + size > PAGE_SIZE:
            return self._read(addr, size, fault, False, self._address_mask(ctxt))
        page = self._page(addr >> 12)
        if page is None:
            return self._page_fault(fault, addr, 0, system=False), b""
        return X86EMUL_CONTINUE, page[offset : offset + size]

    def write_emulated(self, ctxt: X86EmulateCtxt, addr: int, data: bytes, fault: X86Exception) -> int:
        """X86EmulateOps.write_emulated."""
        if self.log is not None:
            self.log.append(("write", addr, data))
        return self._write(addr, data, fault, False, self._address_mask(ctxt))

    @staticmethod
    def _address_mask(ctxt: X86EmulateCtxt) -> int:
        return MASK64 if ctxt.mode == X86EMUL_MODE_PROT64 else MASK32

    def cmpxchg_emulated(
        self, ctxt: X86EmulateCtxt, addr: int, old: bytes, new: bytes, fault: X86Exception
    ) -> int:
        """X86EmulateOps.cmpxchg_emulated."""
        if self.log is not None:
            self.log.append(("cmpxchg", addr, old, new))
        offset = addr & _OFFSET
        size = len(new)
        page = self._page(addr >> 12)
        if size not in _ATOMIC_SIZES or offset + size > PAGE_SIZE or page is None:
            return self.write_emulated(ctxt, addr, new, fault)
        if page[offset : offset + size] != old:
            return X86EMUL_CMPXCHG_FAILED
        return self._write(addr, new, fault, False, MASK64)

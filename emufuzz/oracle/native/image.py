"""The program that the child executes: an ELF image of a few kilobytes, made for its address space.

Executing a program of our own leaves nothing of Python in the child: no memory, no files, no
threads. What is left, stack and vDSO, the program unmaps itself.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from emufuzz.case.model import PAGE_SHIFT, PAGE_SIZE, Segment
from emufuzz.oracle.native.handler import handler_code, start_code
from emufuzz.oracle.native.layout import CODE_SIZE, MAX_PAGES, STACK_SIZE, USER_END, Arena

#: File descriptor of the arena in the child, until it is mapped.
ARENA_FD: Final = 2

# Linux, x86-64: system calls and their constants.
_SYS_MMAP, _SYS_MUNMAP, _SYS_RT_SIGACTION, _SYS_CLOSE_RANGE = 9, 11, 13, 436
_SYS_SIGALTSTACK, _SYS_MODIFY_LDT, _SYS_PRCTL, _SYS_PRLIMIT64 = 131, 154, 157, 302
_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 1, 2, 0x10, 0x20
_RLIMIT_CORE: Final = 4
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9
_PR_SET_SECCOMP, _SECCOMP_MODE_STRICT = 22, 1
_WRITE_LDT: Final = 0x11
_LAST_FD: Final = (1 << 32) - 1
_SS_AUTODISARM: Final = 1 << 31
_SA_SIGINFO, _SA_RESTORER, _SA_ONSTACK = 4, 0x0400_0000, 0x0800_0000
#: SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV: what exceptions become.
_SIGNALS: Final = (4, 5, 7, 8, 11)

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_HANDLER_PLACE: Final = 0x80
_ET_EXEC, _EM_X86_64, _PT_LOAD = 2, 62, 1


class Call(NamedTuple):
    """A system call of the start; `what` names it in errors."""

    what: str
    number: int
    arguments: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The address space of a child.

    Attributes:
        base: Address of the runtime.
        pages: Page numbers of the cases, ascending, at most MAX_PAGES.
        ldt: What the entries of its LDT describe; None for an entry that is not used.
    """

    base: int
    pages: tuple[int, ...]
    ldt: tuple[Segment | None, ...]

    @property
    def arena(self) -> Arena:
        """The shared memory."""
        return Arena(len(self.pages))


class _Image:
    """Bytes at their offsets from the start of the runtime."""

    def __init__(self, base: int) -> None:
        self._base = base
        self.data = bytearray(_HANDLER_PLACE)

    def add(self, data: bytes) -> int:
        """Append, 16-byte aligned; the address."""
        self.data += bytes(-len(self.data) % 16)
        place = len(self.data)
        self.data += data
        return self._base + place


def program(layout: Layout) -> tuple[bytes, list[Call]]:
    """The ELF image and the system calls that it makes before its first case.

    Raises:
        ValueError: too many pages or LDT entries for the image.
    """
    image = _Image(layout.base)
    table_size = MAX_PAGES * 8
    handler = image.add(handler_code(layout.arena, CODE_SIZE - table_size))
    calls = _calls(layout, image, handler)
    table = image.add(b"".join(_packed(call) for call in calls))
    entry = layout.base + len(image.data) + -len(image.data) % 16
    stack_top = layout.base + layout.arena.runtime_size
    image.add(start_code(table - entry, len(calls), stack_top - entry))
    if len(image.data) > CODE_SIZE - table_size:
        raise ValueError(f"the program needs {len(image.data)} bytes")
    image.data += bytes(CODE_SIZE - len(image.data))
    addresses = struct.pack(f"<{len(layout.pages)}Q", *(page << PAGE_SHIFT for page in layout.pages))
    image.data[CODE_SIZE - table_size : CODE_SIZE - table_size + len(addresses)] = addresses
    image.data[:_HANDLER_PLACE] = _headers(layout.base, entry)
    return bytes(image.data), calls


def failed_call(calls: Sequence[Call], number: int, result: int) -> str:
    """What the report of a failed start says: the call and the name of its error."""
    code = -result & 0xFFFF
    return f"{calls[number].what}: {errno.errorcode.get(code, code)}"


def _packed(call: Call) -> bytes:
    return struct.pack("<7Q", call.number, *(call.arguments + (0,) * 6)[:6])


def _headers(base: int, entry: int) -> bytes:
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = _HEADER.pack(identity, _ET_EXEC, _EM_X86_64, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    load = _SEGMENT.pack(_PT_LOAD, _PROT_READ | 4, 0, base, base, CODE_SIZE, CODE_SIZE, PAGE_SIZE)
    return (header + load).ljust(_HANDLER_PLACE, b"\0")


def _calls(layout: Layout, image: _Image, handler: int) -> list[Call]:
    """Everything the child asks of the kernel, in order: a stack for reports first, seccomp last."""
    stack = layout.base + CODE_SIZE + layout.arena.live
    end = stack + STACK_SIZE
    alternate = image.add(struct.pack("<QIIQ", stack, _SS_AUTODISARM, 0, STACK_SIZE))
    flags = _SA_SIGINFO | _SA_RESTORER | _SA_ONSTACK
    action = image.add(struct.pack("<4Q", handler, flags, handler, (1 << 64) - 1))
    no_core = image.add(bytes(16))
    anonymous = _MAP_PRIVATE | _MAP_FIXED | _MAP_ANONYMOUS
    rights = _PROT_READ | _PROT_WRITE
    return [
        Call("mmap", _SYS_MMAP, (stack, STACK_SIZE, rights, anonymous, (1 << 64) - 1, 0)),
        Call("prctl(PR_SET_PDEATHSIG)", _SYS_PRCTL, (_PR_SET_PDEATHSIG, _SIGKILL)),
        Call("setrlimit(RLIMIT_CORE)", _SYS_PRLIMIT64, (0, _RLIMIT_CORE, no_core, 0)),
        Call("munmap", _SYS_MUNMAP, (0, layout.base)),
        Call("munmap", _SYS_MUNMAP, (end, USER_END - end)),
        *_runtime(layout),
        *_pages(layout),
        *(_entry(image, number, segment) for number, segment in enumerate(layout.ldt) if segment is not None),
        Call("sigaltstack", _SYS_SIGALTSTACK, (alternate, 0)),
        *(Call("sigaction", _SYS_RT_SIGACTION, (number, action, 0, 8)) for number in _SIGNALS),
        Call("close_range", _SYS_CLOSE_RANGE, (ARENA_FD, _LAST_FD, 0)),
        Call("seccomp", _SYS_PRCTL, (_PR_SET_SECCOMP, _SECCOMP_MODE_STRICT)),
    ]


def _runtime(layout: Layout) -> list[Call]:
    arena, first = layout.arena, layout.base + CODE_SIZE
    readable, writable = _PROT_READ, _PROT_READ | _PROT_WRITE
    parts = (
        (arena.control, arena.common, writable),
        (arena.common, arena.records_out, readable),
        (arena.records_out, arena.pristine, writable),
        (arena.pristine, arena.pool, readable),
        (arena.pool, arena.live, writable),
    )
    return [
        _mapped("mmap of the records", first + start, end - start, rights, start)
        for start, end, rights in parts
        if end > start
    ]


def _pages(layout: Layout) -> list[Call]:
    """The cases' pages, neighbours together; all of them readable, writable and executable."""
    calls: list[Call] = []
    start = 0
    everything = _PROT_READ | _PROT_WRITE | _PROT_EXEC
    for place, page in enumerate(layout.pages):
        if place + 1 < len(layout.pages) and layout.pages[place + 1] == page + 1:
            continue
        address, size = layout.pages[start] << PAGE_SHIFT, (place + 1 - start) * PAGE_SIZE
        offset = layout.arena.live + start * PAGE_SIZE
        calls.append(_mapped(f"mmap of a case's page at {address:#x}", address, size, everything, offset))
        start = place + 1
    return calls


def _mapped(what: str, address: int, size: int, rights: int, offset: int) -> Call:
    return Call(what, _SYS_MMAP, (address, size, rights, _MAP_SHARED | _MAP_FIXED, ARENA_FD, offset))


def _entry(image: _Image, number: int, segment: Segment) -> Call:
    """modify_ldt with a struct user_desc (arch/x86/include/uapi/asm/ldt.h)."""
    code, low = segment.type >> 3 & 1, segment.type >> 1 & 3
    # Writable data and readable code have bit 1 of their type set; bit 2 is expand-down or conforming.
    contents = code << 1 | low >> 1
    limit = segment.limit >> 12 if segment.limit > 0xFFFFF else segment.limit
    bits = segment.db | contents << 1 | (~low & 1) << 3 | int(segment.limit > 0xFFFFF) << 4 | segment.avl << 6
    place = image.add(struct.pack("<4I", number, segment.base & 0xFFFFFFFF, limit, bits))
    return Call("modify_ldt", _SYS_MODIFY_LDT, (_WRITE_LDT, place, 16))

"""One Unicorn engine behind raw ctypes calls.

The Python bindings cost tens of microseconds per call; what runs per case goes through the shared
library directly. The library is opened once more as `PyDLL`, whose calls keep the interpreter
lock: a case takes microseconds, and releasing the lock costs as much as the shorter calls.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any, Final, Protocol

import unicorn
from unicorn.unicorn_py3.unicorn import uclib as _bindings_library
from unicorn.x86_const import UC_CPU_X86_ICELAKE_SERVER, UC_X86_INS_IN, UC_X86_INS_OUT

from emufuzz.oracle.base import OracleUnavailableError

_api: Any = unicorn  # its names are exported in a way that type checkers do not follow

#: The version whose private state layout `layout` knows.
UNICORN_VERSION: Final = "2.1.4"

UC_ERR_OK: Final[int] = _api.UC_ERR_OK
UC_ERR_INSN_INVALID: Final[int] = _api.UC_ERR_INSN_INVALID
UC_ERR_EXCEPTION: Final[int] = _api.UC_ERR_EXCEPTION

#: Bytes in front of CPUX86State in a saved context.
CONTEXT_HEADER: Final = 40

#: The end address of a run, which is not used.
NO_UNTIL: Final = 0

#: `Engine.vector` while nothing was raised.
NO_VECTOR: Final = -1

_CTL_WRITE: Final = 1 << 30
_CTL_FLUSH_TB: Final = _CTL_WRITE | _api.UC_CTL_TB_FLUSH
_CTL_FLUSH_TLB: Final = _CTL_WRITE | _api.UC_CTL_TLB_FLUSH

_InterruptHook: Final = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
_MemoryHook: Final = ctypes.PYFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_void_p,
)
_AccessHook: Final = ctypes.PYFUNCTYPE(
    ctypes.c_bool,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_void_p,
)
_InHook: Final = ctypes.PYFUNCTYPE(
    ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p
)
_OutHook: Final = ctypes.PYFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p
)
_MASK: Final = (1 << 64) - 1
_EVERYWHERE: Final = (1, 0)  # an empty range is all addresses


class Bus(Protocol):
    """What answers the accesses of a guest to memory and ports.

    The library swallows what a hook raises, so these methods must not.
    """

    def access(self, address: int, size: int, written: bytes | None) -> None:
        """Data at a physical address is about to be read, or `written`; at most 8 bytes."""

    def unmapped(self, address: int) -> bool:
        """There is no memory at a physical address; True: there is now."""

    def port_in(self, port: int, size: int) -> int:
        """The value that a port of 1, 2 or 4 bytes has."""

    def port_out(self, port: int, size: int, value: int) -> None:
        """A value is written to a port of 1, 2 or 4 bytes."""


def _prototype(library: Any, name: str, result: Any, *arguments: Any) -> Any:
    function = library[name]
    function.restype = result
    function.argtypes = list(arguments)
    return function


class Engine:
    """An x86-64 engine, its saved context and its physical memory.

    Attributes:
        state: The CPUX86State part of the context, writable; valid after `save`.
        buffer: Guest-physical memory from address 0.
        vector: The last exception or software interrupt; whoever reads it sets it to NO_VECTOR.
    """

    def __init__(self, memory_size: int) -> None:
        """Open an engine with `memory_size` bytes of physical memory.

        Raises:
            OracleUnavailableError: Unicorn is missing a function, has another version or refuses.
        """
        if _api.__version__ != UNICORN_VERSION:
            raise OracleUnavailableError(
                f"unicorn {_api.__version__} is installed, but only {UNICORN_VERSION} is known"
            )
        try:
            self._uc: Any = _api.Uc(_api.UC_ARCH_X86, _api.UC_MODE_64)
            self._uc.ctl_set_cpu_model(UC_CPU_X86_ICELAKE_SERVER)
            # An end address would be looked up through the page tables at the end of each run, and
            # its #PF would overwrite that of the case.
            self._uc.ctl_exits_enabled(True)
            self._handle = ctypes.cast(self._uc._uch, ctypes.c_void_p)  # noqa: SLF001 - the handle has no public name
            self._library = ctypes.PyDLL(_bindings_library._name)  # noqa: SLF001 - nor has the path
            self._bind()
        except (_api.UcError, AttributeError, OSError) as error:
            raise OracleUnavailableError(f"unicorn cannot start: {error}") from error
        self._map(memory_size)
        self._hooks: list[Any] = []
        self.vector = NO_VECTOR
        self._hook(_api.UC_HOOK_INTR, _InterruptHook(self._interrupted), 1, 0)

    @property
    def uc(self) -> Any:
        """The engine as the public Python API knows it."""
        return self._uc

    def _bind(self) -> None:
        library, handle = self._library, self._handle
        pointer, u64, size = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t
        emu_start = _prototype(library, "uc_emu_start", ctypes.c_int, pointer, u64, u64, u64, size)
        restore = _prototype(library, "uc_context_restore", ctypes.c_int, pointer, pointer)
        save = _prototype(library, "uc_context_save", ctypes.c_int, pointer, pointer)
        self._control = _prototype(library, "uc_ctl", ctypes.c_int, pointer, ctypes.c_int)
        stop = _prototype(library, "uc_emu_stop", ctypes.c_int, pointer)
        self._hook_add = library["uc_hook_add"]
        self._map_pages = _prototype(
            library, "uc_mem_map_ptr", ctypes.c_int, pointer, u64, size, ctypes.c_uint32, pointer
        )
        self._unmap_pages = _prototype(library, "uc_mem_unmap", ctypes.c_int, pointer, u64, size)
        self._context_free = _prototype(library, "uc_context_free", ctypes.c_int, pointer)
        context_size = _prototype(library, "uc_context_size", size, pointer)
        context = pointer()
        library["uc_context_alloc"](handle, ctypes.byref(context))
        self._context = context
        self.state_size: int = context_size(handle) - CONTEXT_HEADER
        self.state_address: int = (context.value or 0) + CONTEXT_HEADER
        raw = (ctypes.c_char * self.state_size).from_address(self.state_address)
        self.state = memoryview(raw).cast("B")
        self.raw_emu_start, self.handle, self.context = emu_start, handle, context
        self._raw_restore, self._raw_save, self._raw_stop = restore, save, stop

    def _map(self, memory_size: int) -> None:
        self.buffer = mmap.mmap(-1, memory_size)
        anchor = ctypes.c_char.from_buffer(self.buffer)
        self._uc.mem_map_ptr(0, memory_size, _api.UC_PROT_ALL, ctypes.addressof(anchor))
        self._anchor: Any = anchor

    def start(self, begin: int, instructions: int) -> int:
        """Run at RIP `begin`; returns a UC_ERR_* value.

        The number of instructions is never 0: a change between counted and uncounted runs makes
        Unicorn drop every translation.
        """
        return int(self.raw_emu_start(self.handle, begin, NO_UNTIL, 0, instructions))

    def restore(self) -> None:
        """Load the context into the engine."""
        self._raw_restore(self.handle, self.context)

    def save(self) -> None:
        """Store the engine's registers into the context."""
        self._raw_save(self.handle, self.context)

    def raw_calls(self) -> tuple[Callable[..., int], Callable[..., int], Callable[..., int]]:
        """uc_context_restore, uc_emu_start and uc_context_save for the hot path."""
        return self._raw_restore, self.raw_emu_start, self._raw_save

    def _interrupted(self, _engine: int, vector: int, _user: int) -> None:
        self.vector = vector
        self._raw_stop(self.handle)

    def flush_translations(self) -> None:
        """Forget all translated code, and with it the look-up cache by address."""
        self._control(self.handle, _CTL_FLUSH_TB)

    def flush_tlb(self) -> None:
        """Forget all address translations."""
        self._control(self.handle, _CTL_FLUSH_TLB)

    def hook_reads(self, first: int, last: int, callback: Callable[[], None]) -> None:
        """Call `callback()` for each data read of physical addresses `first` to `last`."""

        def hook(_engine: int, _kind: int, _address: int, _size: int, _value: int, _user: int) -> None:
            callback()

        self._hook(_api.UC_HOOK_MEM_READ, _MemoryHook(hook), first, last)

    def float_ports(self) -> None:
        """Let every port read as all ones."""

        def port_in(_engine: int, _port: int, size: int, _user: int) -> int:
            return (1 << size * 8) - 1

        self._hook(_api.UC_HOOK_INSN, _InHook(port_in), *_EVERYWHERE, UC_X86_INS_IN)

    def attach(self, bus: Bus) -> None:
        """Let `bus` see every data access and answer every port."""

        def access(_engine: int, kind: int, address: int, size: int, value: int, _user: int) -> None:
            written = kind == _api.UC_MEM_WRITE
            data = (value & _MASK).to_bytes(8, "little")[:size] if written else None
            bus.access(address, size, data)

        def unmapped(_engine: int, _kind: int, address: int, _size: int, _value: int, _user: int) -> bool:
            return bus.unmapped(address)

        def port_in(_engine: int, port: int, size: int, _user: int) -> int:
            return bus.port_in(port, size)

        def port_out(_engine: int, port: int, size: int, value: int, _user: int) -> None:
            bus.port_out(port, size, value)

        data, absent = _api.UC_HOOK_MEM_READ | _api.UC_HOOK_MEM_WRITE, _api.UC_HOOK_MEM_READ_UNMAPPED
        self._hook(data, _MemoryHook(access), *_EVERYWHERE)
        self._hook(absent | _api.UC_HOOK_MEM_WRITE_UNMAPPED, _AccessHook(unmapped), *_EVERYWHERE)
        self._hook(_api.UC_HOOK_INSN, _InHook(port_in), *_EVERYWHERE, UC_X86_INS_IN)
        self._hook(_api.UC_HOOK_INSN, _OutHook(port_out), *_EVERYWHERE, UC_X86_INS_OUT)

    def map_memory(self, address: int, size: int, place: int) -> None:
        """Add physical memory that lies at `place` in this process; no memory may be there yet."""
        error = self._map_pages(self.handle, address, size, _api.UC_PROT_ALL, place)
        if error:
            raise OracleUnavailableError(f"unicorn cannot map {address:#x}: error {error}")

    def unmap_memory(self, address: int, size: int) -> None:
        """Take back what `map_memory` added."""
        self._unmap_pages(self.handle, address, size)

    def _hook(self, kind: int, callback: Any, first: int, last: int, *instruction: int) -> None:
        number = ctypes.c_size_t()
        error = self._hook_add(
            self.handle,
            ctypes.byref(number),
            ctypes.c_int(kind),
            callback,
            ctypes.c_void_p(),
            ctypes.c_uint64(first),
            ctypes.c_uint64(last),
            *map(ctypes.c_int, instruction),
        )
        if error:
            raise OracleUnavailableError(f"unicorn refuses a hook: error {error}")
        self._hooks.append(callback)

    def close(self) -> None:
        """Release the engine and its memory."""
        if self._uc is None:
            return
        self._context_free(self._context)
        self.state.release()
        self._uc = None
        self._anchor = None
        self._hooks.clear()

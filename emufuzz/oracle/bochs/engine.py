"""One CPU of Bochs: loads a state, runs one instruction, saves the state.

The order of calls matters (docs/oracle-bochs.md). A run ends behind the instruction, or inside the
exception hook, before anything is delivered.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Final

from emufuzz.arch.rflags import X86_EFLAGS_TF
from emufuzz.case.devices import Devices
from emufuzz.case.model import PAGE_SIZE
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.bochs import abi
from emufuzz.oracle.bochs.patches import PORT_IN, PORT_OUT, apply_patches
from emufuzz.oracle.bochs.space import WINDOW, Frames
from emufuzz.oracle.bochs.state import REGISTERS, REGISTERS_AT, Template, state_size, without_padding

_HARDWARE_RESET: Final = 11
_ALL_OF_PAGE: Final = 0xFFFFFFFF
_NO_FRAME: Final = -(1 << 12)
#: Of `interrupts_inhibited`: by STI, and by MOV SS or POP SS.
_INTERRUPTS, _INTERRUPTS_AND_TRAPS = 1, 3
_SHADOW_MOV_SS, _SHADOW_STI = 1, 2
_CR3: Final = struct.Struct("<Q")
_CR3_AT: Final = abi.CpuState.cr3.offset
_STATUS_WORD: Final = struct.Struct("<H")
_STATUS_AT: Final = abi.CpuState.fpsw.offset
_TOP_SHIFT, _TOP_BITS = 11, 7 << 11
_FDECSTP: Final = b"\xd9\xf6"
_FNINIT: Final = b"\xdb\xe3"
_TOPS: Final = 6
#: Bytes of Bochs' CPU object in which its registers are.
_CPU_SEARCHED: Final = 1 << 16


class Engine:
    """The CPU, all of the process's guest memory, and what the last run met.

    Attributes:
        frames: Guest memory.
        fault: (vector, error code) of the exception that ended the run, or None.
        missing: Physical addresses without memory that were accessed.
        devices: Answers port accesses.
        error: An exception of Python in a callback.
    """

    def __init__(self) -> None:
        """Load and patch the module.

        Raises:
            OracleUnavailableError: it cannot be loaded, or is not the known version.
        """
        library = self._library = abi.load()
        self.frames = Frames()
        self.fault: tuple[int, int] | None = None
        self.missing: list[int] = []
        self.devices = Devices()
        self.error: Exception | None = None
        self._halted = False
        self._scratch = ctypes.create_string_buffer(2 * PAGE_SIZE)
        self._unpaged = ctypes.create_string_buffer(2 * PAGE_SIZE)
        self._port_in, self._port_out = abi.PortIn(self._on_in), abi.PortOut(self._on_out)
        apply_patches(library, {PORT_IN: self._port_in, PORT_OUT: self._port_out})
        self._shown = 0
        self._missing_page = abi.MissingPage(self._on_missing)
        library.bochscpu_mem_missing_page(ctypes.cast(self._missing_page, ctypes.c_void_p))
        self._cpu = library.bochscpu_cpu_new(0)
        self._state = ctypes.create_string_buffer(state_size())
        self._address = ctypes.addressof(self._state)
        self._make_hooks()
        self._top: ctypes.c_uint8 | None = None
        self.blank = self._blank()
        self._top = self._find_top()

    def _blank(self) -> bytes:
        """The state after a reset, with no x87 register in use."""
        state = abi.CpuState.from_buffer_copy(self._save())
        state.fptw = 0xFFFF
        return bytes(state)

    def _make_hooks(self) -> None:
        self._callbacks = (
            abi.ExceptionHook(self._on_exception),
            abi.HltHook(self._on_hlt),
            abi.ExecutionHook(self._on_before),
        )
        exception, hlt, before = (ctypes.cast(c, ctypes.c_void_p).value for c in self._callbacks)
        stop = abi.address_of(self._library, "bochscpu_cpu_stop")
        # The context of the hooks is the CPU, which makes `stop` itself a hook.
        plain = abi.Hooks(context=self._cpu, exception=exception, hlt=hlt, mwait=hlt, after_execution=stop)
        traced = abi.Hooks.from_buffer_copy(plain)
        traced.before_execution = before
        self._hooks = (plain, traced)
        self._plain, self._traced = (
            (ctypes.c_void_p * 2)(ctypes.addressof(hooks), None) for hooks in self._hooks
        )

    def _on_exception(self, _context: int, _cpu: int, vector: int, code: int) -> None:
        self.fault = self.fault or (vector, code)
        self._library.bochscpu_cpu_stop(self._cpu)

    def _on_hlt(self, _context: int, _cpu: int) -> None:
        self._halted = True
        self._library.bochscpu_cpu_stop(self._cpu)

    def _on_before(self, _context: int, _cpu: int, _instruction: int) -> None:
        """TF is not there when an instruction begins: Bochs would trap before it."""
        self._library.cpu_set_eflags(0, self._flags & 0xFFFFFFFF)

    def _on_missing(self, address: int) -> None:
        self.missing.append(address)
        place = (ctypes.addressof(self._scratch) + PAGE_SIZE - 1) & _NO_FRAME
        ctypes.memset(place, 0, PAGE_SIZE)
        self._library.bochscpu_mem_page_insert(address & _NO_FRAME, place)

    def _on_in(self, _devices: int, port: int, size: int) -> int:
        try:
            return int.from_bytes(self.devices.pio_in(port, size), "little")
        except Exception as error:  # noqa: BLE001 - Python cannot raise through C; the runner raises it
            self.error = error
            return 0

    def _on_out(self, _devices: int, port: int, value: int, size: int) -> None:
        try:
            self.devices.pio_out(port, size, value.to_bytes(4, "little")[:size])
        except Exception as error:  # noqa: BLE001 - as above
            self.error = error

    def show_window(self) -> None:
        """Put the frames that are taken at their places in the window, for hidden page tables."""
        for frame in range(self._shown, self.frames.taken):
            self.insert(WINDOW + frame * PAGE_SIZE, frame * PAGE_SIZE)
        self._shown = max(self._shown, self.frames.taken)

    def hide_window(self) -> None:
        """Take them away: a case whose own addresses are physical could reach them."""
        for frame in range(self._shown):
            self.remove(WINDOW + frame * PAGE_SIZE)
        self._shown = 0

    def insert(self, address: int, offset: int) -> None:
        """Put the frame at `offset` of the buffer at a physical address."""
        self._library.bochscpu_mem_page_insert(address, self.frames.address + offset)

    def remove(self, address: int) -> None:
        """Take back what `insert` has put there."""
        self._library.bochscpu_mem_page_remove(address)

    def _find_top(self) -> ctypes.c_uint8:
        """TOP of the x87 stack, which no function loads or saves: what FDECSTP counts down.

        Raises:
            OracleUnavailableError: there is not exactly one such byte.
        """
        start = ctypes.addressof(ctypes.c_char.in_dll(self._library, "bx_cpu"))
        places = set(range(_CPU_SEARCHED))
        for step in range(_TOPS):
            seen = ctypes.string_at(start, _CPU_SEARCHED)
            places = {place for place in places if seen[place] == -step & 7}
            self._run_unpaged(_FDECSTP)
        if len(places) != 1:
            raise OracleUnavailableError(f"bochs: TOP of the x87 stack found at {sorted(places)}")
        return ctypes.c_uint8.from_address(start + places.pop())

    def forget_pointers(self) -> None:
        """Clear the x87 FPU's pointers to its last instruction and operand, which no state holds.

        No case may have memory in the engine that is still to be used.
        """
        self._run_unpaged(_FNINIT)

    def _run_unpaged(self, code: bytes) -> None:
        """Run an instruction in the mode after a reset, unpaged and real."""
        place = (ctypes.addressof(self._unpaged) + PAGE_SIZE - 1) & _NO_FRAME
        ctypes.memmove(place, code, len(code))
        self._library.bochscpu_mem_page_insert(0, place)
        state = abi.CpuState.from_buffer_copy(self.blank)
        state.cs.base = state.rip = 0
        state.rflags = 2
        self._library._Z9handleSMCmj(0, _ALL_OF_PAGE)  # noqa: SLF001 - C++ name
        self._load(bytes(state))
        self._library.bochscpu_cpu_run(self._cpu, self._plain)
        self.remove(0)

    def _save(self) -> bytes:
        self._library.bochscpu_cpu_state(self._cpu, self._address)
        state = without_padding(self._state.raw)
        if self._top is None:
            return state
        (status,) = _STATUS_WORD.unpack_from(state, _STATUS_AT)
        status = status & ~_TOP_BITS | self._top.value << _TOP_SHIFT
        return state[:_STATUS_AT] + _STATUS_WORD.pack(status) + state[_STATUS_AT + 2 :]

    def _load(self, image: bytes, *, pdptes: bool = False) -> None:
        library = self._library
        self._state.raw = image
        if pdptes:
            library._ZN8BX_CPU_C10CheckPDPTREm(_CR3.unpack_from(image, _CR3_AT)[0])  # noqa: SLF001 - C++ name
        # RFLAGS are loaded before EFER: a leftover of IA-32e mode would take VM from them.
        library.cpu_set_efer(0, 0)
        library.bochscpu_cpu_set_state(self._cpu, self._address)
        library._ZN8BX_CPU_C22handleFpuMmxModeChangeEv()  # noqa: SLF001 - C++ name
        if self._top is not None:
            (status,) = _STATUS_WORD.unpack_from(image, _STATUS_AT)
            self._top.value = status >> _TOP_SHIFT & 7

    def learn(self, template: Template) -> None:
        """Find out what Bochs makes of a state that it only loads and saves."""
        if not template.loaded:
            registers = REGISTERS.pack(*(0,) * 17, 2)
            image = template.image
            end = REGISTERS_AT + REGISTERS.size
            self._load(image[:REGISTERS_AT] + registers + image[end:])
            template.loaded = self._save()

    def run(
        self, template: Template, root: int | None, registers: tuple[int, ...], code: list[int]
    ) -> tuple[bytes, int, int]:
        """Run one instruction; with PAE paging there must be memory at CR3.

        Args:
            template: The state.
            root: CR3 of hidden tables.
            registers: 16 GPRs, RIP and RFLAGS.
            code: Physical addresses of the pages with code.

        Returns:
            The state, RFLAGS and the interruptibility (1 = MOV SS, 2 = STI).
        """
        library = self._library
        self.fault, self.missing, self.error, self._halted = None, [], None, False
        for page in code:
            library._Z9handleSMCmj(page, _ALL_OF_PAGE)  # noqa: SLF001 - C++ name
        image = bytearray(template.with_root(root))
        self._flags = registers[17]
        chain = self._traced if self._flags & X86_EFLAGS_TF else self._plain
        loaded = (*registers[:17], self._flags & ~X86_EFLAGS_TF)
        REGISTERS.pack_into(image, REGISTERS_AT, *loaded)
        self._load(bytes(image), pdptes=template.pae)
        library.bochscpu_cpu_run(self._cpu, chain)
        state = self._save()
        flags = library._ZN8BX_CPU_C11force_flagsEv()  # noqa: SLF001 - C++ name
        shadow = self._shadow()
        for address in self.missing:
            library.bochscpu_mem_page_remove(address & _NO_FRAME)
        if self._halted:
            self.reset()
        if self.error is not None:
            raise self.error
        return state, flags, shadow

    def reset(self) -> None:
        """Forget what no state holds: that the CPU has halted, or was delivering an event."""
        self._library._ZN8BX_CPU_C5resetEj(_HARDWARE_RESET)  # noqa: SLF001 - C++ name

    def _shadow(self) -> int:
        """The interrupt shadow, which is ended: no instruction follows."""
        inhibited = self._library._ZN8BX_CPU_C20interrupts_inhibitedEj  # noqa: SLF001 - C++ name
        if not inhibited(_INTERRUPTS):
            return 0
        shadow = _SHADOW_MOV_SS if inhibited(_INTERRUPTS_AND_TRAPS) else _SHADOW_STI
        self._library._ZN8BX_CPU_C18inhibit_interruptsEj(0)  # noqa: SLF001 - C++ name
        return shadow

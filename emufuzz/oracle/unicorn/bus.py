"""The devices of a case behind the hooks of an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from emufuzz.case.devices import Devices
from emufuzz.case.model import PAGE_MASK, PAGE_SIZE
from emufuzz.oracle.unicorn.spaces import Space

_Answer = TypeVar("_Answer")


class CaseBus:
    """What a case's accesses meet (emufuzz.oracle.unicorn.engine.Bus).

    The library swallows exceptions of hooks: `end` raises them.
    """

    def __init__(self) -> None:
        self._space: Space | None = None
        self._devices = Devices()
        self._probing = False
        self._swapped = False
        self._answered = False
        self._error: Exception | None = None

    def begin(self, space: Space, devices: Devices, *, probing: bool, swapped: bool) -> None:
        """Serve a case.

        Args:
            space: Its memory.
            devices: Its devices.
            probing: It is INS, whose destination Unicorn writes to before each port access.
            swapped: It is MOVBE, whose store is shown before its bytes are swapped.
        """
        self._space, self._devices = space, devices
        self._probing, self._swapped, self._answered = probing, swapped, False

    def end(self) -> None:
        """The case is over."""
        self._space = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _guarded(self, answer: Callable[[], _Answer], default: _Answer) -> _Answer:
        try:
            return answer()
        except Exception as error:  # noqa: BLE001 - `end` raises it where it is not swallowed
            self._error = self._error or error
            return default

    def access(self, address: int, size: int, written: bytes | None) -> None:
        """See Bus."""
        self._guarded(lambda: self._access(address, size, written), None)

    def _access(self, address: int, size: int, written: bytes | None) -> None:
        space = self._space
        if space is None or (written is not None and self._is_probe()):
            return
        if written is not None and self._swapped:
            written = written[::-1]
        here = min(size, PAGE_SIZE - (address & PAGE_MASK))
        if here == size:
            self._piece(space, address, size, written)
            return
        following = space.following(address, size)
        if following is None:
            return  # a page fault, before anything is accessed
        space.absent(following)
        self._piece(space, address, here, written and written[:here])
        self._piece(space, following, size - here, written and written[here:])

    def _is_probe(self) -> bool:
        """Whether a write of INS only finds out if there is memory: no port has been read for it."""
        probe = self._probing and not self._answered
        self._answered = False
        return probe

    def _piece(self, space: Space, address: int, size: int, written: bytes | None) -> None:
        """The part of an access that is within one page."""
        device = space.device_address(address, write=written is not None)
        if device is None:
            if written is not None:
                space.wrote(address)
        elif written is None:
            space.store(address, self._devices.mmio_read(device, size))
        else:
            self._devices.mmio_write(device, written)

    def unmapped(self, address: int) -> bool:
        """See Bus."""
        space = self._space
        return space is not None and self._guarded(lambda: space.absent(address), default=False)

    def port_in(self, port: int, size: int) -> int:
        """See Bus."""
        self._answered = True
        data = self._guarded(lambda: self._devices.pio_in(port, size), bytes(size))
        return int.from_bytes(data, "little")

    def port_out(self, port: int, size: int, value: int) -> None:
        """See Bus."""
        data = value.to_bytes(4, "little")[:size]
        self._guarded(lambda: self._devices.pio_out(port, size, data), None)

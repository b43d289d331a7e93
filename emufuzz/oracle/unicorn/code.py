"""Where the code of cases goes, so that no case ever runs the translation of another one's code.

Unicorn translates each piece of code once and does not notice when its bytes change. So every
instruction gets a slot that has not been translated since translations were last flushed; a slot
may be used again only for the same bytes.
"""

from __future__ import annotations

from typing import Final

from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from emufuzz.oracle.unicorn.engine import Engine
from emufuzz.oracle.unicorn.memory import CODE_FRAMES

SLOT_SIZE: Final = 32
SLOT_MASK: Final = SLOT_SIZE - 1
MAX_INSTRUCTION: Final = 15
#: Bytes of a slot that are written: an instruction, then a HLT.
SLOT_EXACT: Final = MAX_INSTRUCTION + 1
_HLT: Final = b"\xf4"
_AFTER_CODE: Final = bytes(MAX_INSTRUCTION) + _HLT
_HLT_PAGE: Final = _HLT * PAGE_SIZE


class CodeSlots:
    """Code pages by linear page number, and what has been translated of them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._buffer = engine.buffer
        self.translated: dict[int, bytes | None] = {}
        self.frames: dict[int, int] = {}
        self.flushes = 0

    def frame(self, number: int) -> int:
        """The frame of a code page, filled with HLT at first; 0 if there is no frame left."""
        frame = self.frames.get(number)
        if frame is None:
            if len(self.frames) == len(CODE_FRAMES):
                return 0
            frame = self.frames[number] = CODE_FRAMES[len(self.frames)]
            self._buffer[frame : frame + PAGE_SIZE] = _HLT_PAGE
        return frame

    def place(self, address: int, code: bytes) -> None:
        """Make `code` the contents of memory at `address`, in a page that `frame` has given.

        As many bytes as an instruction may have (15) are exact, zeros where `code` is shorter.
        HLTs follow and bound the translation.
        """
        self.make_fresh(address, code)
        offset = self.frames[address >> PAGE_SHIFT] + (address & PAGE_MASK)
        self._buffer[offset : offset + SLOT_EXACT] = exact_bytes(code)

    def make_fresh(self, address: int, code: bytes) -> None:
        """See to it that nothing of the slots around `address` is translated with other bytes.

        A flush forgets all translations; most calls find a slot that was not used since the last.
        """
        translated = self.translated
        first = address & ~SLOT_MASK
        last = (address + MAX_INSTRUCTION) & ~SLOT_MASK
        if first in translated or last in translated:
            self.flush()
        if first == address:
            translated[address] = code
        else:
            translated[first] = translated[last] = None

    def branched_to(self, address: int) -> None:
        """Note that a branch ended at `address`: Unicorn has translated what lies there, too."""
        self.translated.setdefault(address & ~SLOT_MASK, None)

    def flush(self) -> None:
        """Forget all translations."""
        self._engine.flush_translations()
        self.translated.clear()
        self.flushes += 1

    def drop_frames(self) -> None:
        """Forget all code pages."""
        self.flush()
        self.frames.clear()


def exact_bytes(code: bytes) -> bytes:
    """As many bytes as an instruction may have, zeros where `code` is shorter, then HLT."""
    return code[:MAX_INSTRUCTION] + _AFTER_CODE[min(len(code), MAX_INSTRUCTION) :]

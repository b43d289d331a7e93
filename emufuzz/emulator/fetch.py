"""The fetch window: instruction bytes, taken a page and at most fifteen at a time.

emulate.c: __do_insn_fetch_bytes, insn_fetch. SDM Vol. 2A 2.3.11 (15-byte limit).

Fetch functions return the value (zero or more, or signed where named so) and leave a failure in
ctxt.rc; their callers look there.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from emufuzz.emulator.access import linearize
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.faults import emulate_gp
from emufuzz.emulator.x86emul import MASK64, MAX_INSN_LENGTH, X86EMUL_CONTINUE, X86EMUL_F_FETCH

SREG_CS: Final = 1
_UNSIGNED: Final = {1: Struct("<B"), 2: Struct("<H"), 4: Struct("<I"), 8: Struct("<Q")}
_SIGNED: Final = {1: Struct("<b"), 2: Struct("<h"), 4: Struct("<i"), 8: Struct("<q")}


def do_insn_fetch_bytes(ctxt: X86EmulateCtxt, op_size: int) -> int:
    """Extend the fetch window as far as the page, the segment and 15 bytes allow.

    At least `op_size` more bytes are needed. #GP(0) when they are beyond the 15-byte limit or
    the end of CS (KVM: __do_insn_fetch_bytes).
    """
    have = len(ctxt.fetch_data)
    la = linearize(ctxt, SREG_CS, ctxt.eip + have & MASK64, 0, X86EMUL_F_FETCH)
    if la < 0:
        return -la
    size = min(MAX_INSN_LENGTH ^ have, ctxt.max_size, 4096 - (la & 4095))
    if size < op_size:
        return emulate_gp(ctxt, 0)
    rc, data = ctxt.ops.fetch(ctxt, la, size, ctxt.exception)
    if rc == X86EMUL_CONTINUE:
        ctxt.fetch_data += data
    return rc


def insn_fetch(ctxt: X86EmulateCtxt, size: int) -> int:
    """The next `size` (1, 2, 4, 8) instruction bytes, unsigned; 0 with ctxt.rc set on failure."""
    pos = ctxt.fetch_pos
    missing = pos + size - len(ctxt.fetch_data)
    if missing > 0:
        ctxt.rc = do_insn_fetch_bytes(ctxt, missing)
        if ctxt.rc != X86EMUL_CONTINUE:
            return 0
    ctxt.fetch_pos = pos + size
    if size == 1:
        return ctxt.fetch_data[pos]
    value: int = _UNSIGNED[size].unpack_from(ctxt.fetch_data, pos)[0]
    return value


def insn_fetch_signed(ctxt: X86EmulateCtxt, size: int) -> int:
    """The next `size` instruction bytes as a signed int; 0 with ctxt.rc set on failure."""
    pos = ctxt.fetch_pos
    missing = pos + size - len(ctxt.fetch_data)
    if missing > 0:
        ctxt.rc = do_insn_fetch_bytes(ctxt, missing)
        if ctxt.rc != X86EMUL_CONTINUE:
            return 0
    ctxt.fetch_pos = pos + size
    value: int = _SIGNED[size].unpack_from(ctxt.fetch_data, pos)[0]
    return value

"""What becomes of guest memory where the emulator meets a hypercall instruction."""

from __future__ import annotations

from typing import Final

from emufuzz.arch.exceptions import PF_VECTOR, PFERR_WRITE
from emufuzz.case.model import case_pages
from emufuzz.fuzz.handlers.pair import Pair

_VMCALL: Final = b"\x0f\x01\xc1"


def predict_patch(pair: Pair) -> None:
    """Nothing but VMCALL, written at RIP as if it were a linear address; RIP stays.

    Generated cases have flat memory, where a page that is absent is #PF.
    """
    address = pair.case.rip
    page = case_pages(pair.case).get(address >> 12)
    if page is None:
        pair.predict_fault(PF_VECTOR, PFERR_WRITE, address)
        return
    pair.predicted = pair.before()
    offset = address & 0xFFF
    old = page[offset : offset + len(_VMCALL)]
    changed = [(address + i, bytes([b])) for i, b in enumerate(_VMCALL) if old[i] != b]
    pair.predicted["memory"] = sorted([*pair.predicted["memory"], *_runs(changed)])
    pair.predict_step()


def _runs(changes: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Neighbouring bytes as one run each."""
    runs: list[tuple[int, bytes]] = []
    for address, data in changes:
        if runs and runs[-1][0] + len(runs[-1][1]) == address:
            runs[-1] = (runs[-1][0], runs[-1][1] + data)
        else:
            runs.append((address, data))
    return runs

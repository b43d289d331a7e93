"""The flat machine's model-specific registers: what a case lists, EFER, and the FS and GS bases."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from emufuzz.arch import cr as crs
from emufuzz.case.model import System
from emufuzz.subject.flat.control import is_canonical

MSR_EFER: Final = 0xC0000080
MSR_LSTAR: Final = 0xC0000082
MSR_CSTAR: Final = 0xC0000083
MSR_FS_BASE: Final = 0xC0000100
MSR_GS_BASE: Final = 0xC0000101
MSR_KERNEL_GS_BASE: Final = 0xC0000102
MSR_TSC_AUX: Final = 0xC0000103

_EFER_KNOWN: Final = 0x5D01
_SEGMENT_OF: Final = {MSR_FS_BASE: 4, MSR_GS_BASE: 5}
_CANONICAL: Final = (MSR_FS_BASE, MSR_GS_BASE, MSR_KERNEL_GS_BASE, MSR_LSTAR, MSR_CSTAR)


def read(system: System, index: int) -> int | None:
    """The value of an MSR; None if there is no such MSR."""
    if index == MSR_EFER:
        return system.efer
    if index in _SEGMENT_OF:
        return system.seg[_SEGMENT_OF[index]].base
    return dict(system.msr).get(index)


def write(system: System, index: int, data: int) -> dict[str, Any] | None:
    """The members of the state that WRMSR changes; None if it is refused."""
    if read(system, index) is None:
        return None
    if index == MSR_EFER:
        return _write_efer(system, data)
    if index in _CANONICAL and not is_canonical(data, system.cr4):
        return None
    if index == MSR_TSC_AUX and data >> 32:
        return None
    if index in _SEGMENT_OF:
        nr = _SEGMENT_OF[index]
        seg = msgspec.structs.replace(system.seg[nr], base=data)
        return {"seg": (*system.seg[:nr], seg, *system.seg[nr + 1 :])}
    return {"msr": tuple((i, data if i == index else value) for i, value in system.msr)}


def _write_efer(system: System, data: int) -> dict[str, Any] | None:
    if data & ~_EFER_KNOWN:
        return None
    if (data ^ system.efer) & crs.EFER_LME and system.cr0 & crs.X86_CR0_PG:
        return None
    return {"efer": data & ~crs.EFER_LMA | system.efer & crs.EFER_LMA}

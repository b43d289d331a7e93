"""RDMSR and WRMSR of every MSR that KVM knows, with values at which it looks, in machines that differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from emufuzz.case.model import Case
from emufuzz.fuzz.corpus.crafted.machine import RDMSR, WRMSR, exiting, msr_registers
from emufuzz.kvm import hyperv_regs as hv
from emufuzz.kvm import msr_index

_NAMED: Final = sorted(
    {value for name, value in vars(msr_index).items() if isinstance(value, int) and name.isupper()}
)
_SYSCALLS: Final = (*range(0xC0000080, 0xC0000085), *range(0xC0000100, 0xC0000104))
_AMD: Final = (0xC0010010, 0xC0010015, 0xC001001F, 0xC0010020, 0xC0010044, 0xC0010055, 0xC0010140, 0xC0011022)
_KVM: Final = (0x11, 0x12, *range(0x4B564D00, 0x4B564D09))
_BANKS: Final = (*range(0x400, 0x408), 0x47F, *range(0x280, 0x283), 0xC0002003)
_OTHER: Final = (0x48, 0x49, 0x122, 0x123, 0x1C4, 0x1C5, 0x560, 0x5FF, 0xC0, 0xDEAD)
INDICES: Final = (*_NAMED, *_SYSCALLS, *_AMD, *_KVM, *_BANKS, *_OTHER)
#: Bits of which some MSR looks at each, alone and together.
_VALUES: Final = (
    0, 1, 2, 3, 5, 6, 0x8, 0x10, 0x100, 0x400, 0x500, 0x800, 0xD01, 0x1001, 0x4000, 0x6000, 0x8000,
    0x40000, 0x40001,
    0x20000001, 0xFEE00900, 0xFEE00D00, 0xFEE00400, 0xFEE01900, 0x606, 0x0007040600070406, 1 << 62,
    (1 << 64) - 1,
    0xFFFFFFFF, 1 << 32, 1 << 63, 0x800000000000,
)  # fmt: skip
_FEW: Final = (0, 1, 0x606, 1 << 62)
_MACHINES: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"knobs": {"irqchip": True, "enable_pmu": True}},
    {"knobs": {"ignore_msrs": True, "hyperv": True, "irqchip": True}},
    {"knobs": {"platform_info_readable": False, "host_hypervisor": True},
     "cpuid": {"features": {"nx": False, "lm": False, "xsaves": True}}},
    {"knobs": {"disabled_quirks": "misc_enable_no_mwait,stuff_feature_msrs,ignore_guest_pat,cd_nw_cleared"},
     "cpuid": {"features": {"mwait": True, "rtm": True, "xsaves": True}}},
)  # fmt: skip
_PRESENT: Final = {0x3A: 1, 0x3B: 5, 0x179: 0x0100000A, 0x10: 1000, 0xCE: 1 << 31, 0x140: 0}
_HYPERV: Final = (
    *range(0x40000000, 0x40000004), 0x40000020, *range(0x40000070, 0x40000074), 0x4000009F, 0x400000B0,
    0x400000F1, 0x400000FF, *hv.HV_X64_MSR_CRASH, *range(0x40000106, 0x40000109), 0x40000118,
)  # fmt: skip


def msr_cases() -> Iterator[Case]:
    """Behind the prefix, so that no MSR bitmap lets hardware do it; one path `exit` with each machine."""
    for number, kvm in enumerate(_MACHINES):
        for index in INDICES:
            yield exiting(RDMSR, kvm, path="fep", **msr_registers(index))
            for value in _VALUES if number == 1 and index in _NAMED else _FEW:
                yield exiting(WRMSR, kvm, path="fep", msr=_PRESENT, **msr_registers(index, value))
    yield from _of_hyperv()
    for index in (0x3B, 0x174, 0xC0000080, 0xDEAD, 0x1B):
        for kvm in _MACHINES[:3]:
            denied = {
                **kvm,
                "knobs": {**kvm.get("knobs", {}), "user_space_msr_mask": 7, "msr_denied": hex(index)},
            }
            yield exiting(RDMSR, denied, **msr_registers(index))
            yield exiting(WRMSR, denied, **msr_registers(index, 1))
            yield exiting(WRMSR, denied, path="fep", **msr_registers(index, 1))
    for mode in ("real", "prot32", "compat32"):
        for index in (0xC0000080, 0x1B, 0x10):
            yield exiting(WRMSR, None, mode=mode, path="fep", **msr_registers(index, 0xD01))


def _of_hyperv() -> Iterator[Case]:
    debug = {"leaves": [{"function": 0x40000082, "eax": 2}]}
    for knobs in ({"hyperv": True}, {"hyperv": True, "irqchip": True}, {}):
        for index in _HYPERV:
            kvm = {"knobs": knobs, "cpuid": debug if index == hv.HV_X64_MSR_SYNDBG_OPTIONS else {}}
            yield exiting(RDMSR, kvm, path="fep", **msr_registers(index))
            for value in (0, 1, 0x8001, 0x70000001, 1 << 63):
                for before in ({}, {0x40000000: 1, index: 1}):
                    yield exiting(WRMSR, kvm, path="fep", msr=before, **msr_registers(index, value))

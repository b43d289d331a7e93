"""Samples of the rules about accesses, system registers, descriptors and transfers that fault."""

from __future__ import annotations

from typing import Any

from emufuzz.case.build import DATA_BASE, GDT_BASE, LDT_BASE
from emufuzz.case.model import UNUSABLE, Fault
from emufuzz.case.segments import segment_data
from tests.unit.oracle.rules.samples import GP0, SS0, Sample, descriptor, fault

_MSR = {"rcx": 0xC0000082}
_SLOT = 0x60  # of the GDT, free for a system descriptor
_LOCAL = 0x0C  # selector of the second descriptor of the LDT
_LOW = 1 << 47
DE: Fault = (0, None, None)
DB: Fault = (1, None, None)


def _local(data: bytes) -> dict[int, bytes]:
    return {LDT_BASE + 8: data}


def _load(rule: str, expected: Fault, code: str, sel: int, data: bytes = b"", **keywords: Any) -> Sample:
    """MOV of a selector from AX; the LDT's second descriptor is `data`."""
    return fault(rule, expected, "prot32", code, rax=sel, data=_local(data), **keywords)


def _system(rule: str, expected: Fault, code: str, data: bytes, mode: str = "prot32") -> Sample:
    """LLDT or LTR of the free slot of the GDT."""
    return fault(rule, expected, mode, code, rax=_SLOT, data={GDT_BASE + _SLOT: data})


def _jump(rule: str, expected: Fault, sel: int, data: bytes = b"", offset: int = 0x6000, mode: str = "prot32",
          **keywords: Any) -> Sample:  # fmt: skip
    """JMP far to a selector of the LDT."""
    code = "ea" + offset.to_bytes(4, "little").hex() + sel.to_bytes(2, "little").hex()
    return fault(rule, expected, mode, code, data=_local(data), **keywords)


# fmt: off
MEMORY = (
    fault("gp-null-segment", GP0, "prot32", "8b03", ds=UNUSABLE, rbx=DATA_BASE),
    fault("gp-segment-type", GP0, "prot32", "8903", ds=segment_data(0x2B, writable=False), rbx=DATA_BASE),
    fault("gp-segment-limit", SS0, "real", "50", rsp=1),
    fault("gp-expand-down-limit", GP0, "prot32", "8a03", rbx=0x7FFF,
          ds=segment_data(0x2B, limit=0x7FFF, expand_down=True)),
    fault("gp-canonical", GP0, "prot64", "8b03", rbx=_LOW - 2),
    fault("gp-alignment-16", GP0, "prot64", "0f2803", rbx=DATA_BASE + 8),
    fault("ac-alignment", (17, 0, None), "prot64", "8b03", cpl=3, cr0=0x80050033, flags=1 << 18,
          rbx=DATA_BASE + 1),
    fault("pf-data", (14, 6, 0xB000), "prot32", "8903", cpl=3, rbx=0xAFFE),
)

SYSTEM = (
    fault("gp-cr0-high", GP0, "prot64", "0f22c0", rax=1 << 32 | 0x80010033),
    fault("gp-cr0-pg-pe", GP0, "prot32", "0f22c0", rax=0x80010032),
    fault("gp-cr0-nw-cd", GP0, "prot32", "0f22c0", rax=0xA0010033),
    fault("gp-cr0-long", GP0, "prot64", "0f22c0", rax=0x10033),
    fault("gp-cr3-reserved", GP0, "prot64", "0f22d8", rax=1 << 52),
    fault("gp-cr4-reserved", GP0, "prot64", "0f22e0", rax=1 << 40 | 0x620),
    fault("gp-cr4-long", GP0, "prot64", "0f22e0", rax=0x600),
    fault("gp-cr4-pcide", GP0, "prot32", "0f22e0", rax=1 << 17),
    fault("gp-cr8-reserved", GP0, "prot64", "440f22c0", rax=16),
    fault("gp-dr6-dr7-high", GP0, "prot64", "0f23f8", rax=1 << 32),
    fault("db-general-detect", DB, "prot32", "0f21c0", dr=(0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x2400)),
    fault("gp-msr-canonical", GP0, "prot64", "0f30", rdx=0x8000, **_MSR),
    fault("gp-efer-reserved", GP0, "prot64", "0f30", rcx=0xC0000080, rax=0xD03),
    fault("gp-efer-lme", GP0, "prot64", "0f30", rcx=0xC0000080, rax=0xC01),
    fault("gp-xcr-index", GP0, "prot64", "0f01d1", cr4=0x40620, rcx=1, rax=3),
    fault("gp-xcr0-value", GP0, "prot64", "0f01d1", cr4=0x40620, rax=4),
    fault("gp-table-canonical", GP0, "prot64", "0f0113", rbx=DATA_BASE,
          data={DATA_BASE: b"\xff\0" + _LOW.to_bytes(8, "little")}),
    fault("gp-sysenter-cs", GP0, "prot32", "0f34", msr=((0x174, 3), (0x175, 0), (0x176, 0))),
)

SEGMENTS = (
    fault("gp-load-data-table", (13, 0x1F8, None), "prot32", "8ed8", rax=0x1FB),
    _load("gp-load-data-type", (13, 0xC, None), "8ed8", _LOCAL, descriptor(9)),
    _load("gp-load-data-privilege", (13, 0xC, None), "8ed8", _LOCAL | 3, descriptor(3)),
    _load("np-load-data", (11, 0xC, None), "8ed8", _LOCAL, descriptor(3, p=0)),
    fault("gp-load-null-ss", GP0, "prot32", "8ed0", rax=0),
    fault("gp-load-ss-table", (13, 0x1F8, None), "prot32", "8ed0", rax=0x1F8),
    _load("gp-load-ss-privilege", (13, 0xC, None), "8ed0", _LOCAL | 1, descriptor(3, dpl=1)),
    _load("gp-load-ss-type", (13, 0xC, None), "8ed0", _LOCAL, descriptor(1)),
    _load("ss-load-ss", (12, 0xC, None), "8ed0", _LOCAL, descriptor(3, p=0)),
    fault("gp-ltr-null", GP0, "prot32", "0f00d8", rax=0),
    fault("gp-system-in-ldt", (13, 0xC, None), "prot32", "0f00d8", rax=_LOCAL),
    fault("gp-system-table", (13, 0x1F8, None), "prot32", "0f00d0", rax=0x1F8),
    _system("gp-lldt-type", (13, _SLOT, None), "0f00d0", descriptor(9, s=0)),
    _system("gp-ltr-type", (13, _SLOT, None), "0f00d8", descriptor(11, s=0)),
    _system("np-lldt", (11, _SLOT, None), "0f00d0", descriptor(2, s=0, p=0)),
    _system("np-ltr", (11, _SLOT, None), "0f00d8", descriptor(9, s=0, p=0)),
    _system("gp-lldt-canonical", (13, _SLOT, None), "0f00d0",
            descriptor(2, s=0) + (1 << 15).to_bytes(8, "little"), "prot64"),
    _system("gp-ltr-canonical", (13, _SLOT, None), "0f00d8",
            descriptor(9, s=0) + (1 << 15).to_bytes(8, "little"), "prot64"),
)

CONTROL = (
    fault("gp-branch-target", GP0, "prot64", "ffe0", rax=_LOW),
    _jump("gp-far-null", GP0, 0),
    _jump("gp-far-table", (13, 0x1F8, None), 0x1F8),
    _jump("gp-far-type", (13, 0xC, None), _LOCAL, descriptor(3)),
    _jump("gp-far-privilege", (13, 0xC, None), _LOCAL, descriptor(11, dpl=3)),
    _jump("gp-far-l-and-d", (13, 0xC, None), _LOCAL, descriptor(11, l=1), mode="compat32"),
    _jump("np-far", (11, 0xC, None), _LOCAL, descriptor(11, p=0)),
    _jump("gp-far-offset", GP0, _LOCAL, descriptor(11, limit=0xFFF, g=0)),
    fault("gp-iret-nested", GP0, "prot64", "48cf", flags=1 << 14),
    fault("de-divide", DE, "prot32", "f7f3", rdx=5, rbx=5),
    fault("de-aam", DE, "prot32", "d400"),
)
# fmt: on

SAMPLES: tuple[Sample, ...] = (*MEMORY, *SYSTEM, *SEGMENTS, *CONTROL)

"""States that hardware cannot enter, and events: KVM emulates, and delivers between instructions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Final

import msgspec

from emufuzz.case.build import build_system
from emufuzz.case.model import Case, Segment, System
from emufuzz.case.segments import segment_paragraph
from emufuzz.fuzz.corpus.crafted.machine import exiting

_CODE: Final = b"\x90\x90\xfb\x90\x90"
_EVENTS: Final[tuple[dict[str, Any], ...]] = (
    {}, {"nmi": 1}, {"nmi": 2}, {"interrupt": {"vector": 0x31}}, {"interrupt": {"vector": 3, "soft": True}},
    {"pending": {"vector": 1, "payload": "0x4000"}}, {"pending": {"vector": 3, "injected": True}},
    {"pending": {"vector": 13, "error_code": 0}}, {"pending": {"vector": 4}},
    {"pending": {"vector": 8, "error_code": 0}},
    {"pending": {"vector": 14, "error_code": 2, "payload": "0x9"}}, {"nmi": 1, "pending": {"vector": 6}},
)  # fmt: skip
_TIMERS: Final = ("0x30", "0x20030", "0x10030", "0x430", "0x8030", "0x730")


def invalid_cases() -> Iterator[Case]:
    """Big real mode, and protected mode with a stack of another privilege, without unrestricted guest."""
    for (mode, system), event in product(_states(), _EVENTS):
        for flags, shadow in product((0, 0x200), (0, 1, 2, 8)):
            for knobs in ({}, {"vnmi": False, "exception_payload_enabled": True}, {"irqchip": True}):
                kvm = {**event, "interruptibility": shadow, "knobs": {"unrestricted_guest": False, **knobs}}
                yield _case(mode, system, kvm, flags)
    for (mode, system), timer, irr, flags in product(_states(), _TIMERS, ("0x0", "0x2000000"), (0, 0x200)):
        for guest_mode, spiv in product((False, True), ("0x1ff", "0xff")):
            lapic = {
                "0xf0": spiv,
                "0x320": timer,
                "0x380": "0x5",
                "0x390": "0x0",
                "0x210": irr,
                "0x80": "0x10",
            }
            kvm = {
                "lapic": lapic,
                "guest_mode": guest_mode,
                "knobs": {"unrestricted_guest": False, "irqchip": True},
            }
            yield _case(mode, system, kvm, flags)
    for (mode, system), reason in product(_states(), ("0x0", "0x1", "0xffffffff")):
        nested = {
            "exception_bitmap": reason,
            "exit_on_nmi": True,
            "exit_on_intr": True,
            "mtf": reason == "0x1",
        }
        for event in _EVENTS:
            kvm = {**event, "guest_mode": nested, "knobs": {"unrestricted_guest": False}}
            yield _case(mode, system, kvm, 0x200)
    yield from _odd_segments()


def _odd_segments() -> Iterator[Case]:
    """DS below its RPL, and conforming code of each DPL; the first instruction may mend DS."""
    protected = build_system("prot32")
    ds = msgspec.structs.replace(protected.seg[3], sel=protected.seg[3].sel | 3)
    kvm = {"knobs": {"unrestricted_guest": False}}
    for dpl, rpl, code in product((0, 1, 3), (0, 3), (b"\x8e\xd8\x90\x90", b"\x90\x90\x90")):
        cs = msgspec.structs.replace(protected.seg[1], type=15, dpl=dpl, sel=8 | rpl)
        for system in (
            _with_segment(protected, 3, ds),
            _with_segment(_with_segment(protected, 3, ds), 1, cs),
        ):
            case = exiting(code, kvm, mode="prot32", path="invalid-guest-state", rax=protected.seg[3].sel)
            yield msgspec.structs.replace(case, system=system, count=4)


def _states() -> Iterator[tuple[str, System]]:
    real = build_system("real")
    big = msgspec.structs.replace(segment_paragraph(0), limit=0xFFFFFFFF, g=1)
    yield "real", _with_segment(real, 3, big)
    protected = build_system("prot32")
    yield "prot32", _with_segment(protected, 2, msgspec.structs.replace(protected.seg[2], dpl=1))


def _with_segment(system: System, number: int, segment: Segment) -> System:
    seg = (*system.seg[:number], segment, *system.seg[number + 1 :])
    return msgspec.structs.replace(system, seg=seg)


def _case(mode: str, system: System, kvm: dict[str, Any], flags: int) -> Case:
    case = exiting(_CODE, kvm, mode=mode, path="invalid-guest-state", flags=flags, data={0: bytes(0x400)})
    return msgspec.structs.replace(case, system=system, count=4)

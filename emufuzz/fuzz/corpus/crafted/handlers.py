"""Exit handlers and the stages around them: INVPCID, MOV CR, exceptions, nested guests, events that wait."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import product
from typing import Any, Final

from emufuzz.arch import cr
from emufuzz.case.build import DATA_BASE
from emufuzz.case.model import Case
from emufuzz.fuzz.corpus.crafted.machine import exiting

_INVPCID: Final = 58
_NO_INDEX: Final = 1 << 22
_NO_BASE: Final = 1 << 27
_PCID: Final = {"features": {"pcid": True, "invpcid": True}}


def handler_cases() -> Iterator[Case]:
    """All of them."""
    yield from _invpcid()
    yield from _operands()
    yield from _nested()
    yield from _control_registers()
    yield from _events()
    yield from _described()


def _invpcid() -> Iterator[Case]:
    """Each type with good and bad descriptors, with and without PCIDs, on both kinds of paging."""
    info = _NO_INDEX | _NO_BASE | 2 << 7 | 3 << 15
    for kind, pcid, address, pcide in product(range(5), (0, 1, 0x1000), (0, 0x8000, 1 << 47), (False, True)):
        system = {"cr4": cr.X86_CR4_PAE | (cr.X86_CR4_PCIDE if pcide else 0)}
        for ept in (True, False):
            kvm = {
                "exit_reason": _INVPCID, "exit_qualification": hex(DATA_BASE), "instruction_info": hex(info),
                "cpuid": _PCID, "knobs": {"ept": ept, "unrestricted_guest": ept},
            }  # fmt: skip
            data = {DATA_BASE: struct.pack("<QQ", pcid, address)}
            yield exiting(b"\x90", kvm, system=system, rax=kind, data=data, physical=True)


def _operands() -> Iterator[Case]:
    """Operands in memory as the instruction-information field describes them."""
    infos = (
        1 << 10, _NO_INDEX | _NO_BASE, _NO_INDEX, _NO_BASE, 1, _NO_INDEX | 2 << 7, 2 << 15 | _NO_INDEX,
        4 << 15 | _NO_INDEX, 3 << 15 | 1 << 7 | _NO_INDEX, 3 << 15 | 1 << 18 | 3 << 23 | 1 << 7,
    )  # fmt: skip
    places = (DATA_BASE, 0xB000, 1 << 47, 0xFFFFFFF8)
    for info, place, mode in product(infos, places, ("prot64", "prot32", "compat32", "prot16")):
        kvm = {
            "exit_reason": _INVPCID, "exit_qualification": hex(place), "instruction_info": hex(info),
            "cpuid": _PCID,
        }  # fmt: skip
        yield exiting(b"\x90", kvm, mode=mode, rbx=0x100, rcx=0x20)


def _nested() -> Iterator[Case]:
    """Instructions that L1 intercepts or not, behind the prefix."""
    codes = (
        b"\xe4\x60", b"\xe6\x60", b"\x6c", b"\x6e", b"\xf3\x90", b"\x90", b"\x0f\x00\xc0", b"\x0f\x01\x03",
        b"\x0f\xa2",
        b"\xf3\x0f\xc7\xf8", b"\x0f\x01\xf9", b"\x0f\x32", b"\xf4", b"\x0f\x20\xc0", b"\x0f\x22\xd8",
    )  # fmt: skip
    wanted: tuple[list[str], ...] = ([], ["io"], ["desc"], ["rdtscp"], ["bus_lock_detection"])
    for code, intercepts in product(codes, wanted):
        kvm = {
            "guest_mode": {"intercepts": intercepts},
            "cpuid": {"features": {"rdpid": True, "rdtscp": True}},
        }
        yield exiting(code, kvm, path="fep", rbx=DATA_BASE)
    for vector, bitmap in product((1, 3, 6, 13, 14), ("0x0", "0xffffffff")):
        nested = {"exception_bitmap": bitmap, "page_fault_error_code_mask": 0, "mtf": True}
        pending = {"vector": vector, "nested": True, **({"error_code": 0} if vector > 12 else {})}
        for extra in ({}, {"pending": pending}, {"pending": {"vector": vector}}):
            yield exiting(b"\x0f\xa2", {"guest_mode": nested, **extra})


def _control_registers() -> Iterator[Case]:
    """MOV to CR0, CR3, CR4 and XSETBV of values that KVM looks at, in machines with other features."""
    features: tuple[dict[str, bool], ...] = (
        {},
        {"pcid": True, "la57": True, "smep": True, "pku": True, "lam": True, "umip": True, "xsave": True},
    )
    machines: tuple[dict[str, Any], ...] = (
        {},
        {"ept": False, "unrestricted_guest": False},
        {"unrestricted_guest": False},
    )
    for chosen, knobs, mode in product(features, machines, ("prot64", "prot32", "real")):
        kvm = {"knobs": knobs, "cpuid": {"features": chosen}}
        physical = knobs.get("ept") is False and mode != "real"
        for number, bits in (
            (0, (16, 29, 30, 31, 0, 3, 2, 18)),
            (4, (5, 7, 9, 12, 13, 16, 17, 18, 20, 21, 22, 23, 28)),
        ):
            now = 0x80010033 if number == 0 else (0x620 if mode == "prot64" else 0x600)
            for bit in bits:
                code = bytes((0x0F, 0x22, 0xC0 | number << 3))
                for path in ("exit", "fep"):
                    yield exiting(code, kvm, mode=mode, path=path, physical=physical, rax=now ^ 1 << bit)
        for value in (0x5000, 0x5001, 1 << 61, 1 << 63 | 0x100000, (1 << 62) | 0x100000, 1 << 52):
            yield exiting(b"\x0f\x22\xd8", kvm, mode=mode, path="fep", physical=physical, rax=value)
        for value in (1, 3, 7, 5, 0xE7, 0x200, 0x18, 0x1F, 0x60003):
            yield exiting(b"\x0f\x01\xd1", kvm, mode=mode, system=_xsave(mode), rax=value, rcx=0)


def _xsave(mode: str) -> dict[str, Any]:
    return {"cr4": cr.X86_CR4_OSXSAVE | (cr.X86_CR4_PAE if mode == "prot64" else 0)}


def _events() -> Iterator[Case]:
    """Exceptions, interrupts and NMIs that wait or are being delivered, while something else exits."""
    codes = (b"\x0f\xa2", b"\xfb", b"\xf4", b"\xcf", b"\x17")
    for code, mode in product(codes, ("prot64", "prot32", "real")):
        for flags, shadow in product((0, 0x200), (0, 1, 8)):
            for kvm in (
                {"nmi": 1}, {"nmi": 2}, {"interrupt": {"vector": 0x31}},
                {"interrupt": {"vector": 3, "soft": True}},
                {"pending": {"vector": 1, "payload": "0x4000"}}, {"pending": {"vector": 3, "injected": True}},
                {"pending": {"vector": 13, "error_code": 0}},
                {"pending": {"vector": 14, "error_code": 2, "payload": "0x9"}},
            ):  # fmt: skip
                for knobs in (
                    {},
                    {"unrestricted_guest": False},
                    {"vnmi": False, "exception_payload_enabled": True},
                ):
                    yield exiting(
                        code, {**kvm, "knobs": knobs, "interruptibility": shadow}, mode=mode, flags=flags
                    )


def _described() -> Iterator[Case]:
    """Exits of every reason as a case describes them, with qualifications, vectoring and nested guests."""
    for reason in range(76):
        for qualification in ("0x0", "0x181"):
            for more in (
                {}, {"guest_mode": True}, {"vectoring_info": "0x80000031"}, {"vectoring_info": "0x80000b0d"},
                {"smm": True}, {"knobs": {"ept": False, "unrestricted_guest": False}},
                {"vectoring_info": "0x80000202"},
                {"vectoring_info": "0x80000403"}, {"vectoring_info": "0x80000603"},
                {"knobs": {"irqchip": True, "enable_apicv": True}},
            ):  # fmt: skip
                kvm = {
                    "exit_reason": reason, "exit_qualification": qualification, "instruction_length": 2,
                    "guest_physical_address": "0x8000", **more,
                }  # fmt: skip
                yield exiting(b"\x0f\xa2", kvm, physical=True)
    for info in ("0x80000301", "0x80000302"):
        yield exiting(b"\xcc", {"exit_reason": 0, "vectoring_info": info})
    for debug in (1, 3, 5, 9, 0x10001, 0x20001):
        for code in (b"\xcc", b"\xf1", b"\x0f\xa2", b"\xcd\x03"):
            yield exiting(code, {"guest_debug": debug}, flags=0x100)
            yield exiting(code, {"guest_debug": debug})

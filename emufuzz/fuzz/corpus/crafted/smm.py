"""RSM: state-save areas of guests in every mode, with values that cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Final

import msgspec

from emufuzz.arch import cr
from emufuzz.case.build import build_system
from emufuzz.case.model import Case, System
from emufuzz.fuzz.corpus.crafted.machine import WRMSR, exiting, msr_registers
from emufuzz.kvm import smram as sm
from emufuzz.kvm.vcpu import KvmSegment

_RSM: Final = b"\x0f\xaa"
_X2APIC: Final = 0xFEE00D00
_SMBASE: Final = 0x30000
_LONG: Final = cr.EFER_LME | cr.EFER_LMA | cr.EFER_SCE
_PE, _PG = cr.X86_CR0_PE, cr.X86_CR0_PG
_NO_LM: Final = {"features": {"lm": False}}
_PCID: Final = {"features": {"pcid": True}}


def smm_cases() -> Iterator[Case]:
    """64-bit and 32-bit areas, PCIDs, refused registers, nested guests, NMIs, no memory."""
    for mode in ("prot64", "prot32", "real"):
        yield from _of_64(mode)
        yield from _of_32(mode)
    yield from _arriving()
    yield exiting(_RSM, {"smm": True}, path="fep")
    yield exiting(_RSM, None, path="fep")


def _arriving() -> Iterator[Case]:
    """A guest that cannot be entered sends itself an SMI; in SMM there is RSM, HLT, or no memory."""
    real, protected = build_system("real"), build_system("prot32")
    big = msgspec.structs.replace(real.seg[3], limit=0xFFFFFFFF, g=1)
    low = msgspec.structs.replace(protected.seg[3], sel=protected.seg[3].sel | 3)
    states = (("real", real, big), ("prot32", protected, low))
    there = {_SMBASE + 0xF000: b""}
    codes: tuple[dict[int, bytes], ...] = (
        {**there, _SMBASE + 0x8000: _RSM},
        {**there, _SMBASE + 0x8000: b"\xf4"},
        {},
    )
    for (mode, system, ds), lm, shadow, data in product(states, (True, False), (0, 8, 1), codes):
        for more in ({}, {"smm": True}, {"guest_mode": True}) if data else ({},):
            kvm = {
                "knobs": {"unrestricted_guest": False, "irqchip": True, "vnmi": shadow != 1},
                "interruptibility": shadow, "lapic": {"0xf0": "0x1ff"}, **more,
                "cpuid": {"features": {"x2apic": True, "lm": lm}},
            }  # fmt: skip
            seg = (*system.seg[:3], ds, *system.seg[4:])
            odd = msgspec.structs.replace(system, seg=seg, msr=((0x1B, _X2APIC),))
            yield _sending(mode, kvm, odd, data)


def _sending(mode: str, kvm: dict[str, Any], system: System, data: dict[int, bytes]) -> Case:
    """WRMSR to ICR, of an SMI to itself, twice; STI has KVM look for events."""
    registers = msr_registers(0x830, 0x44200)
    case = exiting(
        WRMSR + b"\xfb" + WRMSR + b"\xfa\xfb\x90",
        kvm,
        mode=mode,
        path="invalid-guest-state",
        data=data,
        **registers,
    )
    return msgspec.structs.replace(case, system=system, count=12)


def _of_64(mode: str) -> Iterator[Case]:
    good: dict[str, int] = {"CR0": _PG | _PE | 0x10, "CR3": 0x5000, "CR4": cr.X86_CR4_PAE, "EFER": _LONG}
    real = {"CR0": 0x10, "CR3": 0, "CR4": 0, "EFER": 0}
    changes: tuple[dict[str, int], ...] = (
        good, real, {**good, "DR6": 1 << 40}, {**good, "DR7": 1 << 40}, {**good, "EFER": 1 << 20},
        {**good, "CR4": 1 << 40}, {**good, "CR3": 1 << 60}, {**good, "CR0": _PG}, {**good, "INT_SHADOW": 1},
        {**real, "CR4": cr.X86_CR4_PCIDE},
        {**good, "CR4": cr.X86_CR4_PAE | cr.X86_CR4_PCIDE},
        {**good, "CR4": cr.X86_CR4_PAE | cr.X86_CR4_PCIDE, "CR3": 0x5003},
    )  # fmt: skip
    for change, cpuid, guest_mode in product(changes, ({}, _PCID), (False, True)):
        kvm = {"smm": True, "cpuid": cpuid, "guest_mode": guest_mode}
        yield _leaving(mode, kvm, _image_64(change))
    pcid = {"smm": True, "cpuid": _PCID}
    yield _leaving("prot64", pcid, _image_64(good), extra_cr4=cr.X86_CR4_PCIDE)
    yield _leaving(mode, {"smm": True, "nmi": 1, "interruptibility": 8}, _image_64(good))


def _of_32(mode: str) -> Iterator[Case]:
    if mode == "prot64":
        return
    good = {"CR0": _PE | 0x10, "CR3": 0, "CR4": 0}
    changes: tuple[dict[str, int], ...] = (
        good, {"CR0": 0x10}, {**good, "CR4": 0xFFFFFFFF}, {**good, "CR0": _PG}, {**good, "INT_SHADOW": 2},
    )  # fmt: skip
    for change, guest_mode in product(changes, (False, True)):
        kvm = {"smm": True, "cpuid": _NO_LM, "guest_mode": guest_mode}
        yield _leaving(mode, kvm, _image_32(change))


def _leaving(mode: str, kvm: dict[str, Any], image: sm.Smram, *, extra_cr4: int = 0) -> Case:
    data = {_SMBASE + sm.SMRAM_OFFSET: bytes(image.data)}
    system: dict[str, Any] = {}
    if extra_cr4:
        system["cr4"] = cr.X86_CR4_PAE | extra_cr4
    return exiting(_RSM, kvm, mode=mode, path="fep", data=data, system=system)


def _image_64(change: dict[str, int]) -> sm.Smram:
    image = sm.Smram()
    values = {"RIP": 0x6100, "RFLAGS": 0x46, "DR6": 0xFFFF0FF0, "DR7": 0x400, "SMBASE": 0x38000, **change}
    for name, value in values.items():
        image.put(getattr(sm, f"{name}_64"), {"SMBASE": 4, "INT_SHADOW": 1}.get(name, 8), value)
    for seg in sm.SEGMENTS_64:
        image.put_segment_64(seg, _segment(seg))
    return image


def _image_32(change: dict[str, int]) -> sm.Smram:
    image = sm.Smram()
    values = {"EIP": 0x6100, "EFLAGS": 0x46, "DR6": 0xFFFF0FF0, "DR7": 0x400, "SMBASE": 0x38000, **change}
    for name, value in values.items():
        image.put(getattr(sm, f"{name}_32"), 1 if name == "INT_SHADOW" else 4, value)
    for seg in sm.SEGMENTS_32:
        image.put_segment_32(seg, _segment(seg))
    return image


def _segment(seg: int) -> KvmSegment:
    """Flat code, data, a busy TSS, an LDT (numbers of arch.regs)."""
    kind = {6: 0xB, 7: 2, 1: 0xB}.get(seg, 3)
    return KvmSegment(8 * seg + 8, 0, 0xFFFFF, kind, s=int(seg < 6), present=1, l=int(seg == 1))

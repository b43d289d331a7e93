"""Events and their delivery: what waits, what blocks it, and who gets it, L1 and debuggers among them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Final

import msgspec

from emufuzz.case.build import DATA_BASE, build_system
from emufuzz.case.model import Case
from emufuzz.case.segments import segment_paragraph
from emufuzz.fuzz.corpus.crafted.machine import VMCALL, WRMSR, exiting, msr_registers
from emufuzz.kvm import hyperv_regs as hv

_APIC_ON: Final = {"0xf0": "0x1ff"}
_X2APIC: Final = 0xFEE00D00
_X2APIC_CPUID: Final = {"features": {"x2apic": True}}
_HLT: Final = b"\xf4"
_IVT: Final = {0: bytes(0x400)}
_TF, _IF = 0x100, 0x200
_LIST: Final = (hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX)


def delivery_cases() -> Iterator[Case]:
    """All of them."""
    yield from _in_real_mode()
    yield from _while_emulating()
    yield from _halted()
    yield from _own_messages()
    yield from _lists()
    yield from _skipped()


def _real(**knobs: Any) -> dict[str, Any]:
    return {"knobs": {"unrestricted_guest": False, **knobs}}


def _in_real_mode() -> Iterator[Case]:
    """Injection through the IVT: payloads of any exception, TF and shadows with #DB, DR7.GD, IRET and HLT."""
    for vector, payload, flags, gd in product(
        (1, 3, 13, 14, 6), ("0x0", "0x4001"), (0, _TF, _IF), (False, True)
    ):
        pending = {"vector": vector, "payload": payload}
        system = {"dr": (0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x2400 if gd else 0x400)}
        for shadow in (0, 2):
            kvm = {**_real(exception_payload_enabled=True), "pending": pending, "interruptibility": shadow}
            yield exiting(
                b"\x90", kvm, mode="real", path="rmode-inject", flags=flags, data=_IVT, system=system
            )
    for vnmi, path in product((True, False), ("fep", "rmode-exception")):
        for code in (b"\xcf", b"\x66\xcf", _HLT, b"\xfa", b"\x0f\x08"):
            yield exiting(code, _real(vnmi=vnmi), mode="real", path=path, data=_IVT)
    for emulated, path in product((True, False), ("fep", "exit")):
        kvm = _real(emulate_invalid_guest_state=emulated)
        for selector in (0, 0x10, 0x13, 0x1B):
            data = dict.fromkeys(("ds", "es", "ss", "fs", "gs"), segment_paragraph(selector))
            yield exiting(b"\x0f\x22\xc0", kvm, mode="real", path=path, system=data, rax=0x33)


def _while_emulating() -> Iterator[Case]:
    """A guest that cannot be entered, with events that wait for STI, IRET or the end of a shadow."""
    real = build_system("real")
    big = msgspec.structs.replace(segment_paragraph(0), limit=0xFFFFFFFF, g=1)
    system = msgspec.structs.replace(real, seg=(*real.seg[:3], big, *real.seg[4:]))
    codes = (
        b"\x90\xfb\x90\x90\x90\x90",
        b"\xfb\x90\x90\xf4",
        b"\x0f\x30\xf4\x90",
        b"\xf4",
        b"\xeb\xfe",
        b"\xcf",
    )
    lapics: tuple[dict[str, str], ...] = (
        {**_APIC_ON, "0x210": "0x2000000"},
        {**_APIC_ON, "0x210": "0x2000000", "0x320": "0x20030", "0x380": "0x5"},
        {**_APIC_ON, "0x320": "0x30", "0x380": "0x5", "0x390": "0x0"},
        {"0xf0": "0xff", "0x320": "0x30", "0x380": "0x5"},
    )
    nested: tuple[Any, ...] = (False, {"exit_on_nmi": True}, {"exit_on_intr": True})
    events: tuple[dict[str, Any], ...] = (
        {},
        {"nmi": 2},
        {"nmi": 1},
        {"pending": {"vector": 1, "payload": "0x1"}},
    )
    for code, lapic, apicv, flags in product(codes, lapics, (False, True), (0, _IF)):
        for guest_mode, event, vnmi in product(nested, events, (True, False)):
            kvm = {
                **_real(irqchip=True, enable_apicv=apicv, vnmi=vnmi), **event,
                "lapic": lapic, "guest_mode": guest_mode,
            }  # fmt: skip
            yield _emulated(code, kvm, system, flags, 200 if code == b"\xeb\xfe" else 8)
    for low, high in (
        (0x4500, 0),
        (0x44500, 0),
        (0x4400, 0),
        (0x40400, 0),
        (0x44400, 0),
        (0x40200, 0),
        (0x40031, 0),
    ):
        kvm = {**_real(irqchip=True, vnmi=bool(low & 0x4000)), "lapic": _APIC_ON, "cpuid": _X2APIC_CPUID}
        case = _emulated(b"\x0f\x30\xf4\x90\x90", kvm, system, 0, 4)
        gpr = (low, 0x830, high, *case.gpr[3:])
        msr = ((0x1B, _X2APIC),)
        yield msgspec.structs.replace(case, gpr=gpr, system=msgspec.structs.replace(system, msr=msr))


def _emulated(code: bytes, kvm: dict[str, Any], system: Any, flags: int, count: int) -> Case:
    case = exiting(code, kvm, mode="real", path="invalid-guest-state", flags=flags, data=_IVT)
    return msgspec.structs.replace(case, system=system, count=count)


def _halted() -> Iterator[Case]:
    """HLT with something that wakes the guest, or would if L1 did not get it."""
    nested: tuple[Any, ...] = (False, True, {"exit_on_nmi": True}, {"exit_on_intr": True})
    for guest_mode, flags, shadow, path in product(nested, (0, _IF), (0, 1, 8), ("exit", "fep")):
        for nmi, base in product((0, 1, 2), (0xFEE00900, 0xFEE00100)):
            kvm = {
                "knobs": {"irqchip": True, "vnmi": nmi != 2}, "lapic": {**_APIC_ON, "0x210": "0x2000000"},
                "guest_mode": guest_mode, "nmi": nmi, "interruptibility": shadow,
            }  # fmt: skip
            yield exiting(_HLT, kvm, path=path, flags=flags, msr={0x1B: base})
    for vector in (1, 8, 14):
        kvm = {"knobs": {"irqchip": True}, "pending": {"vector": vector}}
        yield exiting(_HLT, kvm, flags=_TF)


def _own_messages() -> Iterator[Case]:
    """Messages of an x2APIC to itself, and switches between the modes of the APIC that are refused."""
    kvm = {"knobs": {"irqchip": True}, "lapic": _APIC_ON, "cpuid": _X2APIC_CPUID}
    for path, index, value in product(("exit", "fep"), (0x83F, 0x830, 0x808), (0, 0x31, 0x131, 1 << 32)):
        yield exiting(WRMSR, kvm, path=path, msr={0x1B: _X2APIC}, **msr_registers(index, value))
    for spiv, shorthand, dest in product(("0xff", "0x1ff"), (0x80000, 0xC0000, 0), (0xFF, 0xFFFFFFFF)):
        lowest = dest << 32 | 0x931 | shorthand  # of lowest priority, to all or to a logical ID
        disabled = {**kvm, "lapic": {"0xf0": spiv}}
        yield exiting(WRMSR, disabled, path="fep", msr={0x1B: _X2APIC}, **msr_registers(0x830, lowest))
    bases = (_X2APIC, 0xFEE00900, 0xFEE00100, 0xFEE00500)
    for before, after, guest_mode in product(bases, bases, (False, True)):
        nested = {**kvm, "guest_mode": guest_mode}
        yield exiting(WRMSR, nested, path="fep", msr={0x1B: before}, **msr_registers(0x1B, after))


def _lists() -> Iterator[Case]:
    """Hyper-V's lists of addresses and sets of processors that are longer than what they come in."""
    for code, count, header in product(
        (*_LIST, hv.HVCALL_SEND_IPI_EX, hv.HVCALL_SEND_IPI), (1, 13, 15), (0, 1, 20)
    ):
        for fast, irqchip in product((hv.HV_HYPERCALL_FAST_BIT, 0), (True, False)):
            control = code | fast | header << hv.HV_HYPERCALL_VARHEAD_OFFSET
            if code in _LIST:
                control |= count << hv.HV_HYPERCALL_REP_COMP_OFFSET
            for place in (0x41, DATA_BASE + 0xFF0, 0x70000000, 0xAFE0):
                yield _hypercall(control, place, (1 << header) - 1, irqchip)


def _hypercall(control: int, place: int, valid: int, irqchip: bool) -> Case:
    words = (0, 0, valid) if control & 0xFFFF in _LIST else (0x41, 0, valid)
    data = {DATA_BASE + 0xFF0: b"".join(word.to_bytes(8, "little") for word in words), 0xAFE0: bytes(8)}
    kvm: dict[str, Any] = {"knobs": {"hyperv": True, "irqchip": irqchip, "host_la57": False}}
    if irqchip:
        kvm["lapic"] = _APIC_ON
    case = exiting(VMCALL, kvm, msr={0x40000000: 1}, rcx=control, rdx=place, r8=0, data=data)
    fpu = msgspec.structs.replace(case.system.fpu, xmm=(valid << 64 | valid, valid, 0, 0, 0, 0))
    return msgspec.structs.replace(case, system=msgspec.structs.replace(case.system, fpu=fpu))


def _skipped() -> Iterator[Case]:
    """Writes that only notify, on a host that does not tell their length; some cannot be decoded."""
    for code, hypervisor, flags in product(
        (b"\x0f\xae\x13", b"\x89\x03", b"\x0f\xc7\x33", b"\xc7\x03\x01\x00\x00\x00"),
        (True, False),
        (0, _TF),
    ):
        for path in ("skip", "ept-misconfig"):
            kvm = {"ioeventfds": [{"addr": "0xb000"}], "knobs": {"host_hypervisor": hypervisor}}
            case = exiting(code, kvm, path=path, rbx=0xB000, flags=flags)
            device = {"kind": "mmio", "addr": "0xb000", "size": 64}
            yield msgspec.structs.replace(case, extra={**(case.extra or {}), "devices": [device]})
    for knobs in ({}, {"mmio_caching": False}):
        device = {"kind": "mmio", "addr": "0x0", "size": 64}
        for path in ("ept-misconfig", "ept-violation", "io-completion"):
            case = exiting(b"\x89\x03", {"knobs": knobs}, path=path, rbx=0)
            yield msgspec.structs.replace(case, extra={**(case.extra or {}), "devices": [device]})
    for repeated in ("0x2", "0x18a", "0x1ba"):
        kvm = {"exit_qualification": repeated, "guest_physical_address": "0x9000"}
        yield exiting(b"\x89\x03", kvm, path="ept-violation", rbx=DATA_BASE, physical=True)

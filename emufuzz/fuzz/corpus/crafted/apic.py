"""The local APIC: its registers by MSR and by its page, messages to itself and to others, its timer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Final

from emufuzz.case.model import Case
from emufuzz.fuzz.corpus.crafted.machine import RDMSR, WRMSR, exiting, msr_registers

_X2APIC: Final = 0xFEE00D00
_XAPIC: Final = 0xFEE00900
_ICR: Final = 0x830
_HV_ICR: Final = 0x40000071
_HV_EOI: Final = 0x40000070
_SPIV_ON: Final = "0x1ff"
#: mov [fee0xxxxh], eax and mov eax, [fee0xxxxh]
_STORE, _LOAD = b"\xa3", b"\xa1"
_PAGE: Final = 0xFEE00000


def apic_cases() -> Iterator[Case]:
    """All of them."""
    yield from _messages()
    yield from _xapic_messages()
    yield from _x2apic_registers()
    yield from _page()
    yield from _pending()


def _machine(lapic: dict[str, str], **knobs: Any) -> dict[str, Any]:
    return {"knobs": {"irqchip": True, **knobs}, "lapic": lapic}


def _messages() -> Iterator[Case]:
    """x2APIC's ICR: delivery mode, destination, shorthand, level and trigger."""
    kinds = product(range(8), (0, 0x800), (0, 0x40000, 0x80000, 0xC0000), (0, 0x4000, 0x8000, 0xC000))
    for number, (delivery, logical, shorthand, level) in enumerate(kinds):
        low = 0x31 | delivery << 8 | logical | shorthand | level
        for dest in (0, 1, 0xFFFFFFFF, 0x00010001)[: 4 if not shorthand else 1]:
            lapic = {"0xf0": _SPIV_ON} if number % 3 else {"0xf0": "0xff"}
            kvm = _machine(lapic, enable_apicv=number % 5 == 0)
            yield exiting(
                WRMSR, kvm, path="fep", msr={0x1B: _X2APIC}, **msr_registers(_ICR, dest << 32 | low)
            )


def _xapic_messages() -> Iterator[Case]:
    """Hyper-V's ICR of an xAPIC, whose logical destinations depend on LDR and DFR."""
    logical = product(
        ("0x0", "0x1000000", "0x3000000", "0x11000000", "0x13000000"),
        ("0xffffffff", "0xfffffff", "0x7fffffff"),
    )
    for (ldr, dfr), delivery, dest in product(logical, (0, 1, 4), (0x01, 0x11, 0x13, 0xFF, 0x02, 0x00)):
        kvm = _machine({"0xf0": _SPIV_ON, "0xd0": ldr, "0xe0": dfr, "0x20": "0x0"}, hyperv=True)
        low = 0x41 | delivery << 8 | 0x800
        yield exiting(WRMSR, kvm, path="fep", **msr_registers(_HV_ICR, dest << 56 | low))
    for dest, delivery, spiv in product((0, 1, 0xFF), range(8), (_SPIV_ON, "0xff")):
        kvm = _machine({"0xf0": spiv}, hyperv=True)
        yield exiting(WRMSR, kvm, path="fep", **msr_registers(_HV_ICR, dest << 56 | 0x41 | delivery << 8))


def _x2apic_registers() -> Iterator[Case]:
    for index in (*range(0x800, 0x840), 0x8FF):
        for base, lapic in (
            (_X2APIC, {"0xf0": _SPIV_ON}),
            (_XAPIC, {}),
            (_X2APIC, {"0xf0": "0x0", "0x320": "0x20030"}),
        ):
            kvm = _machine(lapic)
            yield exiting(RDMSR, kvm, path="fep", msr={0x1B: base}, **msr_registers(index))
            for value in (0, 0x31, 0x1FF, 0x400FF, 0x20031, 1 << 32) if base == _X2APIC else (0x31,):
                yield exiting(WRMSR, kvm, path="fep", msr={0x1B: base}, **msr_registers(index, value))
    for before, after in product(
        (_X2APIC, _XAPIC, 0xFEE00100), (_X2APIC, _XAPIC, 0xFEE00100, 0xFEE00500, 0xFED00900)
    ):
        for guest_mode, flexpriority in product((False, True), (False, True)):
            kvm = {**_machine({"0xf0": _SPIV_ON}, flexpriority=flexpriority), "guest_mode": guest_mode}
            yield exiting(WRMSR, kvm, path="fep", msr={0x1B: before}, **msr_registers(0x1B, after))


def _page() -> Iterator[Case]:
    """Accesses to the page: each register, aligned and not, in each mode of the APIC."""
    for base, quirk in (
        (_XAPIC, ""),
        (_X2APIC, ""),
        (_X2APIC, "lapic_mmio_hole"),
        (0xFEE00100, "lapic_mmio_hole"),
    ):
        some = (0x20, 0x300, 0x81)
        for register in (*range(0, 0x400, 0x10), 0x84, 0x81, 0xFFC) if base == _XAPIC else some:
            for lapic in (
                {"0xf0": _SPIV_ON, "0x320": "0x20030", "0x380": "0x10"},
                {"0xf0": "0xff", "0x320": "0x40030"},
            ):
                kvm = _machine(lapic, disabled_quirks=quirk)
                address = (_PAGE + register).to_bytes(4, "little")
                for code, value in ((_LOAD, 0), (_STORE, 0x00000131), (_STORE, 0xFFFFFFFF)):
                    yield exiting(
                        code + address, kvm, mode="prot32", path="apic-access", msr={0x1B: base}, rax=value,
                        system={"cr0": 0x33},
                    )  # fmt: skip
    for register, value in product(
        (0x300, 0x310, 0xD0, 0xE0, 0x20, 0x280, 0x350, 0x3F0), (0, 0x44030, 0xC4530, 0x8C630)
    ):
        kvm = _machine({"0xf0": _SPIV_ON, "0x310": "0xff000000"})
        address = (_PAGE + register).to_bytes(4, "little")
        yield exiting(
            _STORE + address, kvm, mode="prot32", path="apic-access", rax=value, system={"cr0": 0x33}
        )


def _pending() -> Iterator[Case]:
    """Interrupts that wait, are in service or held back; changes of priority, EOIs, the timer."""
    for irr, isr, tpr in product(("0x0", "0x2000000"), ("0x0", "0x10000"), ("0x0", "0x30", "0xf0")):
        lapic = {"0xf0": _SPIV_ON, "0x210": irr, "0x110": isr, "0x80": tpr}
        for apicv, flags in product((False, True), (0, 0x200)):
            kvm = _machine(lapic, hyperv=True, enable_apicv=apicv)
            yield exiting(WRMSR, kvm, path="fep", flags=flags, **msr_registers(_HV_EOI))
            yield exiting(b"\x44\x0f\x22\xc0", kvm, path="fep", flags=flags, rax=1)  # mov cr8, rax
            yield exiting(b"\xfb", kvm, path="fep", flags=flags)
            yield exiting(b"\xf4", kvm, flags=flags)
    for lvt, spiv in product(("0x30", "0x10030", "0x20030", "0x40030", "0x430", "0x730"), (_SPIV_ON, "0xff")):
        kvm = _machine({"0xf0": spiv, "0x320": lvt, "0x380": "0x0"})
        for index, value in ((0x6E0, 5), (0x6E0, 1 << 40), (0x6E0, 0)):
            yield exiting(WRMSR, kvm, msr={0x10: 1000}, **msr_registers(index, value))
            yield exiting(WRMSR, kvm, path="fep", msr={0x10: 1000}, **msr_registers(index, value))
        yield exiting(
            b"\xf4", {**kvm, "lapic": {**kvm["lapic"], "0x380": "0x5", "0x390": "0x0"}}, flags=0x200
        )

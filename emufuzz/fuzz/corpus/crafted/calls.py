"""VMCALL: KVM's hypercalls and Hyper-V's, by registers and by memory."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import product
from typing import Any, Final

from emufuzz.case.build import DATA_BASE
from emufuzz.case.model import Case, Fpu
from emufuzz.fuzz.corpus.crafted.machine import VMCALL, exiting
from emufuzz.kvm import hyperv_regs as hv

_APIC: Final = {"lapic": {"0xf0": "0x1ff"}}
_FAST: Final = hv.HV_HYPERCALL_FAST_BIT
_SPARSE, _ALL = hv.HV_GENERIC_SET_SPARSE_4K, hv.HV_GENERIC_SET_ALL
_ABSENT: Final = 0x70000000
_CODES: Final = (
    hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST,
    hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX, hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX,
    hv.HVCALL_SEND_IPI, hv.HVCALL_SEND_IPI_EX, hv.HVCALL_NOTIFY_LONG_SPIN_WAIT, hv.HVCALL_SIGNAL_EVENT,
    hv.HVCALL_POST_MESSAGE, hv.HVCALL_POST_DEBUG_DATA, hv.HVCALL_RESET_DEBUG_SESSION, 0x8001, 0xFFF,
)  # fmt: skip


def hypercall_cases() -> Iterator[Case]:
    """KVM's own."""
    machines: tuple[dict[str, Any], ...] = (
        {},
        {"knobs": {"irqchip": True, "hypercall_exits": True}, **_APIC},
        {"knobs": {"enforce_pv_features": True, "irqchip": True}, **_APIC},
        {"knobs": {"irqchip": True}, "lapic": {"0xf0": "0xff"}},
    )
    for kvm, mode in product(machines, ("prot64", "prot32")):
        for number in (0, 1, 5, 9, 10, 11, 12, 13):
            for a0, a1 in (
                (0, 0),
                (1, 0),
                (DATA_BASE, 0),
                (DATA_BASE, 1),
                (_ABSENT, 0),
                (0x5001, 1),
                (1, 1 << 63),
            ):
                yield exiting(VMCALL, kvm, mode=mode, rax=number, rbx=a0, rcx=a1, rdx=0, rsi=0x31)
        for delivery, more in product(range(8), (0, 0x4000, 0x8000, 0xC000, 0x800)):
            yield exiting(
                VMCALL, kvm, mode=mode, rax=10, rbx=1, rcx=0, rdx=0, rsi=0x31 | delivery << 8 | more
            )
    yield exiting(VMCALL, None, cpl=3, rax=1)
    yield exiting(VMCALL, None, path="fep", rax=1)


def hyperv_cases() -> Iterator[Case]:
    """Hyper-V's, of a guest that has said who it is."""
    for code in _CODES:
        for count, start, header in ((0, 0, 0), (0, 0, 1), (1, 0, 0), (2, 0, 1), (40, 0, 0), (1, 1, 0)):
            control = (
                code | count << hv.HV_HYPERCALL_REP_COMP_OFFSET | start << hv.HV_HYPERCALL_REP_START_OFFSET
            )
            control |= header << hv.HV_HYPERCALL_VARHEAD_OFFSET
            for words in _inputs(header):
                yield _fast(control, words)
                yield _slow(control, words)
        yield _slow(code, [], address=_ABSENT)
        yield _slow(code | hv.HV_HYPERCALL_RSVD_MASK, [1])
    yield from _events()
    yield exiting(VMCALL, {"knobs": {"hyperv": True}}, cpl=3, msr={0x40000000: 1}, rcx=8)
    yield exiting(VMCALL, {"knobs": {"hyperv": True}}, mode="prot32", msr={0x40000000: 1}, rax=8)


def _inputs(header: int) -> Iterator[list[int]]:
    """Address space, flags, and the set of processors: none, this one, others, all, an unknown format."""
    for flags, third in product((0, 1), (0, 1, 2, _ALL)):
        yield [flags, 0x41, third, header, 1, 0x8001, 0x800000000000]
        yield [0x41, flags, third, 3, 2, 0x9000]
        yield [0x41 | 1 << 33, third, header, 1, 1]


def _machine(**knobs: Any) -> dict[str, Any]:
    return {"knobs": {"hyperv": True, "irqchip": True, "host_la57": False, **knobs}, **_APIC}


def _fast(control: int, words: list[int], **knobs: Any) -> Case:
    """Input in RDX, R8 and the XMM registers."""
    numbers = [*words, *[0] * 14][:14]
    xmm = tuple(numbers[i] | numbers[i + 1] << 64 for i in range(2, 14, 2))
    return exiting(
        VMCALL, _machine(**knobs), msr={0x40000000: 1}, rcx=control | _FAST, rdx=numbers[0], r8=numbers[1],
        system={"fpu": Fpu(xmm=xmm + (0,) * (16 - len(xmm)))},
    )  # fmt: skip


def _slow(control: int, words: list[int], address: int = DATA_BASE, **knobs: Any) -> Case:
    """Input in memory."""
    data = struct.pack(f"<{len(words)}Q", *words)
    return exiting(
        VMCALL, _machine(**knobs), msr={0x40000000: 1}, rcx=control, rdx=address, r8=DATA_BASE + 0x800,
        data={DATA_BASE: data} if data else None,
    )  # fmt: skip


def _events() -> Iterator[Case]:
    """Signals, messages and the debugger, which userspace may have asked for."""
    for code, synic in product((hv.HVCALL_SIGNAL_EVENT, hv.HVCALL_POST_MESSAGE), (False, True)):
        for value in (0, 1, 1 << 24, 1 << 33, 0xFFFFFF):
            yield _fast(code, [value], hyperv_synic=synic)
            yield _slow(code, [value], hyperv_synic=synic)
        for address in (DATA_BASE + 1, _ABSENT, DATA_BASE + 0xFFC):
            yield _slow(code, [], address, hyperv_synic=synic)
    for code in (hv.HVCALL_POST_DEBUG_DATA, hv.HVCALL_RETRIEVE_DEBUG_DATA, hv.HVCALL_RESET_DEBUG_SESSION):
        for options, leaf, fast in product((0, 4, 0xFF), (0, 2), (0, _FAST)):
            kvm = {**_machine(), "cpuid": {"leaves": [{"function": 0x40000082, "eax": leaf}]}}
            yield exiting(VMCALL, kvm, msr={0x40000000: 1, 0x400000FF: options}, rcx=code | fast)

"""Features, hosts and operands that few guests have: what a handler does because of one bit more or less."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Final

import msgspec

from emufuzz.arch import cr
from emufuzz.case.build import DATA_BASE, build_system
from emufuzz.case.model import Case
from emufuzz.case.segments import segment_code, segment_data
from emufuzz.fuzz.corpus.crafted.machine import RDMSR, WRMSR, exiting, msr_registers

_LOAD: Final = b"\x8a\x00"  # mov al, [rax]
_XSETBV: Final = b"\x0f\x01\xd1"
_LAM_SUP: Final = 1 << 28  # of CR4
_APIC_ON: Final = {"0xf0": "0x1ff"}
_X2APIC: Final = 0xFEE00D00
_X2APIC_CPUID: Final = {"features": {"x2apic": True, "tsc_deadline": True}}
_NO_INDEX, _NO_BASE = 1 << 22, 1 << 27
#: VMREAD with a memory operand whose address is the displacement alone.
_VMREAD, _VMCLEAR, _INVPCID = 23, 19, 58


def edge_cases() -> Iterator[Case]:
    """All of them."""
    yield from _tagged_addresses()
    yield from _control_registers()
    yield from _debug_registers()
    yield from _extended_state()
    yield from _features_of_msrs()
    yield from _hosts()
    yield from _qualifications()
    yield from _operands()
    yield from _cpuid()
    yield from _apic()
    yield from _shadows()


def _tagged_addresses() -> Iterator[Case]:
    """LAM: addresses with metadata, of user and supervisor, with each kind of LAM on and off."""
    features = {"cpuid": {"features": {"lam": True}}}
    for cr4, cr3 in product((0, _LAM_SUP), (0, 1 << 62, 1 << 61, 3 << 61)):
        system = {"cr4": cr.X86_CR4_PAE | cr4, "cr3": 0x100000 | cr3}
        for address in (DATA_BASE, DATA_BASE | 0x55 << 57, DATA_BASE | 0x55 << 48, 0xD5FF << 48 | DATA_BASE):
            yield exiting(_LOAD, features, path="fep", system=system, rax=address)


def _control_registers() -> Iterator[Case]:
    """Paging that is switched on without PAE, with PDPTEs that are not valid; UMIP that L1 watches over."""
    load_cr0, load_cr4 = b"\x0f\x22\xc0", b"\x0f\x22\xe0"
    for path, efer, cr4, ept in product(
        ("exit", "fep"), (0, cr.EFER_LME), (0, cr.X86_CR4_PAE), (True, False)
    ):
        off = {"cr0": 0x33, "efer": efer, "cr4": cr4}
        kvm: dict[str, Any] = {"knobs": {"ept": ept}}
        yield exiting(load_cr0, kvm, mode="prot32", path=path, system=off, rax=0x80000033, physical=True)
    for ept in (True, False):
        yield from _broken_pdptes({"knobs": {"ept": ept}})
    for intercepts, umip in product(([], ["desc"]), (0, cr.X86_CR4_UMIP)):
        kvm = {
            "guest_mode": {"intercepts": intercepts}, "knobs": {"host_umip": False},
            "cpuid": {"features": {"umip": True}},
        }  # fmt: skip
        yield exiting(load_cr4, kvm, path="fep", rax=cr.X86_CR4_PAE | umip)


def _broken_pdptes(kvm: dict[str, Any]) -> Iterator[Case]:
    """A reserved bit of a PDPTE, which loads of CR0 and CR3 look at."""
    load_cr0, load_cr3 = b"\x0f\x22\xc0", b"\x0f\x22\xd8"
    data = {0x5000: (0x6001 | 1 << 1).to_bytes(8, "little")}
    for code, cr0, cr3, value in (
        (load_cr0, 0x80010033, 0x100000, 0xE0000033), (load_cr0, 0x80010033, 0x100000, 0xC0000033),
        (load_cr0, 0x80010033, 0x100000, 0x33), (load_cr3, 0x80010033, 0x100000, 0x5000),
        (load_cr0, 0x33, 0x5000, 0x80000033),
    ):  # fmt: skip
        system = {"cr0": cr0, "cr3": cr3, "cr4": cr.X86_CR4_PAE}
        yield exiting(
            code, kvm, mode="prot32", path="fep", rax=value, system=system, data=data, physical=True
        )


def _debug_registers() -> Iterator[Case]:
    """DR6 of guests that have RTM and bus-lock detection, or one of them."""
    for rtm, bus_lock, value in product((False, True), (False, True), (0, 0xFFFFFFFF)):
        kvm = {"cpuid": {"features": {"rtm": rtm, "bus_lock_detect": bus_lock}}}
        for path in ("exit", "fep"):
            yield exiting(b"\x0f\x23\xf0", kvm, path=path, rax=value)  # mov dr6, rax
        yield exiting(WRMSR, kvm, path="fep", **msr_registers(0x1D9, 1 << 2 | 1 << 15))


def _extended_state() -> Iterator[Case]:
    """XSETBV on processors that have MPX, AVX-512 and AMX."""
    leaf = {"function": 0xD, "index": 0, "eax": "0x600ff"}
    kvm = {"cpuid": {"leaves": [leaf], "features": {"xsave": True}}}
    system = {"cr4": cr.X86_CR4_PAE | cr.X86_CR4_OSXSAVE}
    for value in (1, 9, 0x11, 0x19, 0x20001, 0x40001, 0x60001, 0x27, 0xE7, 0xE3):
        for path in ("exit", "fep"):
            yield exiting(_XSETBV, kvm, path=path, system=system, rax=value)


def _features_of_msrs() -> Iterator[Case]:
    """MSRs of processors with a feature more: nested VMX, RDTSCP, TSC_ADJUST, MWAIT that follows, no LM."""
    pairs: tuple[tuple[int, tuple[int, ...]], ...] = (
        (0x3A, (1, 5)), (0x480, (0,)), (0x48B, (0,)), (0x491, (0,)), (0x3B, (0, 5)),
        (0xC0000103, (7, 1 << 32)), (0x1A0, (0, 1, 1 << 18)), (0xC0000080, (0, 0x100, 0x800, 0xD01)),
        (0xCE, (0, 1 << 31)), (0x1D9, (0, 3)),
    )  # fmt: skip
    machines: tuple[tuple[dict[str, bool], dict[str, Any]], ...] = (
        ({"vmx": True, "rdtscp": True, "tsc_adjust": True}, {}),
        ({"vmx": False, "rdtscp": False, "rdpid": False, "tsc_adjust": False}, {}),
        ({"lm": False, "nx": False, "xmm3": False}, {"disabled_quirks": "misc_enable_no_mwait"}),
        ({"xmm3": True}, {"disabled_quirks": "misc_enable_no_mwait", "platform_info_readable": False}),
    )
    for (features, knobs), (index, values), mode in product(machines, pairs, ("prot64", "prot32")):
        kvm = {"cpuid": {"features": features}, "knobs": knobs}
        yield exiting(RDMSR, kvm, mode=mode, path="fep", **msr_registers(index))
        for value in values:
            for before in ({0x10: 9, 0x1A0: 0}, {0x3B: 7, 0x3A: 1}):
                yield exiting(WRMSR, kvm, mode=mode, path="fep", msr=before, **msr_registers(index, value))
    for index, value, allowed in product((0x400, 0x401, 0x402), (0, 1, (1 << 64) - 1), (0, 1 << 18)):
        case = exiting(WRMSR, None, path="fep", msr={0xC0010015: allowed}, **msr_registers(index, value))
        yield msgspec.structs.replace(case, vendor="amd")
    for value, before in product((0, 1), ({}, {0x40000000: 1})):
        kvm = {"knobs": {"hyperv": True, "irqchip": True}}
        for index in (0x40000003, 0x40000105):
            crash = {**before, 0x40000105: 1 << 63}
            for path in ("exit", "fep"):
                for written in (value, value << 63):
                    yield exiting(WRMSR, kvm, path=path, msr=crash, **msr_registers(index, written))


def _hosts() -> Iterator[Case]:
    """Processors and VMs without one thing: VPIDs, the APIC's page, exits of HLT; locks that are split."""
    knobs: tuple[dict[str, Any], ...] = (
        {"vpid": 0}, {"flexpriority": False}, {"mwait_in_guest": True}, {"hlt_in_guest": True},
        {"vpid": 0, "ept": False}, {"vnmi": False}, {"mwait_in_guest": True, "irqchip": True},
    )  # fmt: skip
    for knob in knobs:
        kvm: dict[str, Any] = {"knobs": knob}
        yield exiting(b"\x0f\xa2", kvm)
        kvm = {"knobs": {"irqchip": True, **knob}, "lapic": {**_APIC_ON, "0x320": "0x40031"}}
        yield exiting(WRMSR, kvm, **msr_registers(0x6E0, 5))
    for split, address in product((False, True), (DATA_BASE + 0x3E, DATA_BASE + 0xFFE, DATA_BASE)):
        kvm = {"knobs": {"host_split_lock_detect": split}}
        yield exiting(b"\xf0\xff\x00", kvm, path="fep", rax=address)  # lock inc dword [rax]
    for flags in (0, 0x200):
        blocked = {"knobs": {"vnmi": False}, "interruptibility": 8, "nmi": 1}
        yield exiting(b"\x0f\xa2", blocked, flags=flags)


def _qualifications() -> Iterator[Case]:
    """Bits of exit qualifications that few exits have: NMIs that IRET unblocked, CLTS, APIC writes."""
    for reason, bits in product((48, 75, 57), (0x1000, 0x1181, 0x1001)):
        for vnmi in (True, False):
            kvm = {
                "exit_reason": reason, "exit_qualification": hex(bits), "instruction_length": 2,
                "guest_physical_address": hex(DATA_BASE), "knobs": {"vnmi": vnmi},
            }  # fmt: skip
            yield exiting(b"\x0f\xa2", kvm, physical=True)
    for bits in (0x20, 0x2F, 0x30):
        yield exiting(b"\x90", {"exit_reason": 28, "exit_qualification": hex(bits), "instruction_length": 3})
    for offset, base in product((0x300, 0x310, 0xF0, 0x20), (_X2APIC, 0xFEE00900)):
        kvm = {
            "cpuid": _X2APIC_CPUID,
            "exit_reason": 56, "exit_qualification": hex(offset), "instruction_length": 2,
            "knobs": {"irqchip": True, "enable_apicv": True}, "lapic": {**_APIC_ON, "0x300": "0x31"},
        }  # fmt: skip
        yield exiting(b"\x90", kvm, msr={0x1B: base})
    for cpl, index in product((0, 3), (0, 1, 0x10000, 99)):
        kvm = {"exit_reason": 15, "instruction_length": 2, "knobs": {"enable_pmu": True}}
        yield exiting(b"\x90", kvm, mode="prot32", cpl=cpl, rcx=index)
    for register in range(8):
        code = bytes((0x0F, 0x20, 0xD8 | register))  # mov REGISTER, cr3
        yield exiting(code, {"knobs": {"ept": False}}, physical=True)


def _operands() -> Iterator[Case]:
    """Operands of handlers in segments that refuse them, and where there is a device instead of memory."""
    segments = (
        segment_code(0x80, readable=False), segment_code(0x80), segment_data(0x80, limit=0xFFF),
        segment_data(0x80, writable=False), segment_data(0x80, limit=0xFFF, expand_down=True),
    )  # fmt: skip
    info = _NO_INDEX | _NO_BASE | 3 << 15
    for segment, reason, place in product(segments, (_INVPCID, _VMREAD, _VMCLEAR), (0x10, DATA_BASE)):
        kvm = {
            "exit_reason": reason, "exit_qualification": hex(place), "instruction_info": hex(info),
            "cpuid": {"features": {"pcid": True, "invpcid": True, "vmx": True}},
        }  # fmt: skip
        yield exiting(b"\x90", kvm, mode="prot32", system={"ds": segment})
    device = {"kind": "mmio", "addr": "0xb000", "size": 64}
    kvm = {
        "exit_reason": _INVPCID, "exit_qualification": "0xb000", "instruction_info": hex(info | 2 << 7),
        "cpuid": {"features": {"pcid": True, "invpcid": True}},
    }  # fmt: skip
    yield _with_device(exiting(b"\x90", kvm), device)
    for code in (b"\x0f\x01\x00", b"\x0f\x01\x08"):  # sgdt, sidt over the end of a page, and of memory
        for address in (DATA_BASE + 0xFFC, 0xAFFC):
            yield exiting(code, None, path="fep", rax=address)


def _with_device(case: Case, device: dict[str, Any]) -> Case:
    return msgspec.structs.replace(case, extra={**(case.extra or {}), "devices": [device]})


def _cpuid() -> Iterator[Case]:
    """CPUID leaves that are not there: topology, KVM's own, widths of addresses."""
    machines: tuple[dict[str, Any], ...] = (
        {"leaves": [{"function": 0, "eax": "0x20"}]},
        {"leaves": [{"function": 0x40000000, "eax": "0x40000001", "ebx": "0x4b4d564b", "ecx": "0x564b4d56",
                     "edx": "0x4d"}]},
        {"leaves": [{"function": 0x80000000, "eax": "0x80000004"}]},
        {"leaves": [{"function": 0xB, "index": 0, "eax": 1}, {"function": 0xB, "index": 1, "eax": 4}]},
    )  # fmt: skip
    for cpuid in machines:
        kvm = {"cpuid": cpuid, "knobs": {"enforce_pv_features": True}}
        for leaf, subleaf in ((0xB, 0), (0xB, 5), (0x1F, 0), (0x40000001, 0), (0x80000008, 0), (0x20, 0)):
            yield exiting(b"\x0f\xa2", kvm, rax=leaf, rcx=subleaf)
        yield exiting(b"\x0f\x01\xc1", kvm, rax=5)  # vmcall
        yield exiting(RDMSR, kvm, path="fep", **msr_registers(0x4B564D00))


def _apic() -> Iterator[Case]:
    """The APIC's page when the APIC is off or has MSRs instead, its MSRs when it has a page."""
    for base, code in product((0xFEE00900, 0xFEE00100, _X2APIC), (b"\xa1", b"\xa3")):
        for quirks in ("", "lapic_mmio_hole"):
            kvm = {"knobs": {"irqchip": True, "disabled_quirks": quirks}, "lapic": _APIC_ON}
            address = 0xFEE00020.to_bytes(4, "little")
            yield exiting(code + address, kvm, mode="prot32", path="fep", msr={0x1B: base})
    for base, guest_mode in product((0xFEE00900, 0xFEE00100, _X2APIC), (False, True)):
        kvm = {
            "knobs": {"irqchip": True}, "lapic": {**_APIC_ON, "0x320": "0x40031"}, "guest_mode": guest_mode,
            "cpuid": _X2APIC_CPUID,
        }  # fmt: skip
        for path, index, value in product(
            ("exit", "fep"), (0x830, 0x838, 0x83F, 0x6E0, 0x1B), (0, 0x31, _X2APIC, 0xFEE00900)
        ):
            yield exiting(WRMSR, kvm, path=path, msr={0x1B: base}, **msr_registers(index, value))


def _shadows() -> Iterator[Case]:
    """Interrupt shadows that are there already; exceptions on top of a double fault."""
    for code, shadow in product((b"\xfb", b"\x8e\xd0", b"\x17"), (0, 1, 2)):
        state = build_system("prot32")
        yield exiting(code, {"interruptibility": shadow}, mode="prot32", path="fep", rax=state.seg[2].sel)
    for vector, code in product((8, 13, 14, 6), (WRMSR, b"\x0f\x22\xc0")):
        for injected in (False, True):
            pending = {"vector": vector, "injected": injected, **({"error_code": 0} if vector > 7 else {})}
            yield exiting(code, {"pending": pending}, rax=1 << 31 | 1 << 29, rcx=0xDEAD, mode="prot32")

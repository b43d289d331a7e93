"""Values that instructions which exit get: control and debug registers, MSRs, leaves, hypercalls."""

from __future__ import annotations

from random import Random
from typing import Any, Final

import msgspec

from emufuzz.arch import cr
from emufuzz.arch.regs import (
    VCPU_REGS_R8,
    VCPU_REGS_RAX,
    VCPU_REGS_RBX,
    VCPU_REGS_RCX,
    VCPU_REGS_RDX,
    VCPU_REGS_RSI,
)
from emufuzz.case.build import PAGE_TABLES
from emufuzz.case.model import UNUSABLE
from emufuzz.case.values import boundary
from emufuzz.fuzz.handlers.draft import CODE_ADDRESS, Draft
from emufuzz.kvm import msr_index
from emufuzz.kvm.cpuid import CR4_FEATURES
from emufuzz.kvm.hyperv_regs import HV_MSRS, HV_X64_MSR_GUEST_OS_ID, HV_X64_MSR_HYPERCALL
from emufuzz.kvm.lapic import X2APIC_MSRS

_MASK32: Final = 0xFFFFFFFF
_CR0_BITS: Final = (0, 1, 2, 3, 4, 5, 16, 18, 29, 30, 31, 6, 15, 28)
_CR4_BITS: Final = (*range(17), 17, 18, 20, 21, 22, 23, 24, 31)
_GD: Final = 1 << 13

#: All MSRs that KVM knows by name, and neighbours.
KNOWN_MSRS: Final = tuple(
    sorted(
        {value for name, value in vars(msr_index).items() if name.startswith(("MSR_", "APIC_BASE"))}
        | {msr_index.MSR_IA32_MC0_CTL + i for i in range(8)}
        | {msr_index.MSR_MTRRphysBase0 + i for i in range(4)}
    )
)
_FASTPATH_MSRS: Final = (msr_index.MSR_IA32_TSC_DEADLINE, msr_index.APIC_BASE_MSR + 0x30)
_ICR: Final = (0x41, 0x000C4041, 0x00000441, 1 << 32 | 0x42, 0xFFFFFFFF << 32 | 0x43, 0x841, 0x0008_0041)
_UNKNOWN_MSRS: Final = (0x4B564DFF, 0x12345, 0xC0011FFF)


# -- control registers ---------------------------------------------------------------------------


def _flipped(rng: Random, value: int, bits: tuple[int, ...]) -> int:
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        value ^= 1 << rng.choice(bits)
    return value


def control_value(draft: Draft, number: int) -> int:
    """What a control register is loaded with: near its present value, at random, or with high bits."""
    rng, system = draft.rng, draft.system
    if rng.random() < 0.1:
        return boundary(rng, 64)
    if number == 3:
        value = rng.choice((system.cr3, PAGE_TABLES, 0x8000, 0x7FFF000, 1 << 50, 1 << 46))
        value ^= rng.choice((0, 0, 0x18, 0x123, rng.getrandbits(12)))
        return value | rng.choice((0, 0, 1 << 63, 1 << 61))
    if number == 8:
        return rng.choice((rng.randrange(16), rng.randrange(0x120), boundary(rng, 64)))
    now = draft.changes.get(f"cr{number}", system.cr0 if number == 0 else system.cr4)
    value = _flipped(rng, int(now), _CR0_BITS if number == 0 else _CR4_BITS)
    return value | (1 << rng.randrange(32, 64) if rng.random() < 0.2 else 0)


def vary_paging(draft: Draft) -> None:
    """Bits of CR0, CR4 and EFER that decide what may be loaded, as far as the mode keeps its name."""
    rng, system = draft.rng, draft.system
    cr0, cr4 = system.cr0, system.cr4
    cr0 ^= rng.choice((0, 0, cr.X86_CR0_TS, cr.X86_CR0_WP, cr.X86_CR0_CD, cr.X86_CR0_EM))
    cr4 ^= rng.choice((0, 0, cr.X86_CR4_DE, cr.X86_CR4_PGE, cr.X86_CR4_PSE, cr.X86_CR4_TSD))
    if draft.mode in ("prot16", "prot32") and rng.random() < 0.4:
        cr0 &= ~cr.X86_CR0_PG
        draft.changes["efer"] = rng.choice((0, cr.EFER_LME, cr.EFER_LME | cr.EFER_NX))
    if draft.mode in ("prot64", "compat16", "compat32") and rng.random() < 0.3:
        cr4 |= cr.X86_CR4_PCIDE
    draft.changes.update(cr0=cr0, cr4=cr4, cr8=rng.randrange(16))
    if rng.random() < 0.4:
        draft.kvm["cpuid"] = {"features": {name: True for name in CR4_FEATURES if rng.getrandbits(1)}}


# -- debug registers -----------------------------------------------------------------------------


def debug_value(draft: Draft) -> int:
    """What a debug register is loaded with."""
    rng = draft.rng
    low = rng.choice((0x400, 0x2400, 0xFFFF0FF0, 0, CODE_ADDRESS, boundary(rng, 32), rng.getrandbits(32)))
    return low | (1 << rng.randrange(32, 64) if rng.random() < 0.25 else 0)


def vary_debug_registers(draft: Draft) -> None:
    """Contents of the debug registers; CR4.DE; DR7.GD."""
    rng, system = draft.rng, draft.system
    addresses = [rng.choice((CODE_ADDRESS, 0x8000, boundary(rng, 64))) for _ in range(4)]
    dr6 = 0xFFFF0FF0 | rng.choice((0, 1, 0x4000, 0xF))
    dr7 = 0x400 | rng.choice((0, 0, 0, _GD, _GD, 1, 0x0001_0001, rng.getrandbits(32) & 0xFFFF23FF))
    draft.changes["dr"] = (*addresses, 0, 0, dr6, dr7)
    if rng.random() < 0.4:
        draft.changes["cr4"] = system.cr4 | cr.X86_CR4_DE


# -- MSRs ----------------------------------------------------------------------------------------


def choose_msr(draft: Draft) -> None:
    """ECX, and what the VM thinks of that MSR: filters, userspace, an APIC."""
    rng = draft.rng
    x2apic = rng.random() < 0.3
    index = rng.choice(KNOWN_MSRS)
    if x2apic and rng.random() < 0.7:
        index = rng.choice((*_FASTPATH_MSRS * 8, *sorted(X2APIC_MSRS)))
    elif rng.random() < 0.1:
        index = rng.choice((*sorted(HV_MSRS), *_UNKNOWN_MSRS, *_FASTPATH_MSRS))
    draft.gpr[VCPU_REGS_RCX] = index | (rng.getrandbits(32) << 32 if draft.long else 0)
    msrs = {index: boundary(rng, 64)} if rng.random() < 0.3 else {}
    if x2apic:
        msrs[msr_index.MSR_IA32_APICBASE] = 0xFEE00C00
        use_apic(draft, {"x2apic": True, "tsc_deadline": True})
    draft.changes["msr"] = tuple(sorted(msrs.items()))
    _choose_msr_knobs(draft, index)


def _choose_msr_knobs(draft: Draft, index: int) -> None:
    rng, knobs = draft.rng, draft.knobs
    if rng.random() < 0.4:
        knobs["user_space_msr_mask"] = rng.randrange(1, 8)
    if rng.random() < 0.25:
        knobs["msr_denied"] = hex(index)
    if rng.random() < 0.15:
        knobs["ignore_msrs"] = True
    if index in HV_MSRS:
        knobs["hyperv"] = True
    if index in _FASTPATH_MSRS and rng.random() < 0.1:
        knobs["mwait_in_guest"] = True


def choose_msr_value(draft: Draft) -> None:
    """EDX:EAX for the MSR in ECX."""
    rng = draft.rng
    index = draft.gpr[VCPU_REGS_RCX] & _MASK32
    value = rng.choice((0, 1, boundary(rng, 32), boundary(rng, 64), 0x0007040600070406, 0x900, 0xD00))
    if index == _FASTPATH_MSRS[1]:
        value = rng.choice(_ICR)
    high = rng.getrandbits(32) << 32 if draft.long and rng.getrandbits(1) else 0
    draft.gpr[VCPU_REGS_RAX] = value & _MASK32 | high
    draft.gpr[VCPU_REGS_RDX] = value >> 32 | high


def use_apic(draft: Draft, features: dict[str, bool]) -> None:
    """An enabled in-kernel APIC, its timer in one of its modes."""
    rng = draft.rng
    draft.knobs["irqchip"] = True
    draft.kvm["cpuid"] = {"features": features}
    registers: dict[int, int] = {0xF0: 0x1FF, 0x320: rng.choice((0x00040041, 0x00040041, 0x41, 0x10041))}
    if rng.random() < 0.3:
        registers[0x220] = 2  # IRR: vector 0x41
    draft.kvm["lapic"] = registers


def maybe_apic(draft: Draft) -> None:
    """An in-kernel APIC in half of the cases."""
    if draft.rng.getrandbits(1):
        use_apic(draft, {})


# -- the rest ------------------------------------------------------------------------------------


def cpuid_leaf(rng: Random) -> int:
    """A leaf number: basic, extended, the hypervisor's, or none; upper halves at random."""
    leaf = rng.choice(
        (
            rng.randrange(0x20),
            0x80000000 | rng.randrange(0x10),
            0x40000000 | rng.randrange(4),
            boundary(rng, 32),
        )
    )
    return leaf | (rng.getrandbits(32) << 32 if rng.getrandbits(1) else 0)


def linear_address(draft: Draft) -> int:
    """An address for INVLPG, one in three not canonical in 64-bit mode."""
    rng = draft.rng
    if not draft.long:
        return rng.choice((0x8000, 0x6000, 0xFFFF, 0xFFFFFFFF, boundary(rng, 32)))
    return rng.choice(
        (0x8000, 0x7FFFFFFFFFFF, 0xFFFF800000000000, 1 << 47, 1 << 50, 1 << 56, 1 << 57, boundary(rng, 64))
    )


def vary_data_segment(draft: Draft, seg: int) -> None:
    """A base and a limit, or none at all, for a data segment."""
    rng = draft.rng
    if draft.mode in ("real", "vm86") or rng.random() < 0.4:
        return
    segments = list(draft.changes.get("seg", draft.system.seg))
    segment = segments[seg]
    if rng.random() < 0.2:
        segments[seg] = UNUSABLE
    else:
        base, limit = rng.choice((0, 0x1000, 0xFFFFF000)), rng.choice((segment.limit, 0x7FFF, 0x8000))
        segments[seg] = msgspec.structs.replace(segment, base=base, limit=limit, g=int(limit > 0xFFFFF))
    draft.changes["seg"] = tuple(segments)


def choose_hypercall(draft: Draft) -> None:
    """RAX and its arguments for KVM's hypercalls; or Hyper-V's, switched on by its MSRs."""
    rng, gpr = draft.rng, draft.gpr
    gpr[VCPU_REGS_RAX] = rng.choice((*range(13), 12, 12, 9, boundary(rng, 64)))
    gpr[VCPU_REGS_RBX] = rng.choice((0x8000, 0x9000, 0x123, boundary(rng, 32)))
    gpr[VCPU_REGS_RCX] = rng.choice((0, 1, 16, boundary(rng, 32)))
    gpr[VCPU_REGS_RDX] = rng.choice((0, 1, boundary(rng, 32)))
    gpr[VCPU_REGS_RSI] = rng.choice((0, 0x41, boundary(rng, 32)))
    if rng.random() < 0.5:
        draft.knobs["hypercall_exits"] = True
    if rng.random() < 0.2:
        draft.knobs["enforce_pv_features"] = True
    maybe_apic(draft)
    if rng.random() < 0.3:
        _use_hyperv(draft)


def _use_hyperv(draft: Draft) -> None:
    rng, gpr = draft.rng, draft.gpr
    draft.knobs["hyperv"] = True
    draft.changes["msr"] = ((HV_X64_MSR_GUEST_OS_ID, 1), (HV_X64_MSR_HYPERCALL, 0x9001))
    code: Any = rng.choice((2, 3, 8, 0xB, 0x13, 0x5C, 0x5D, 0x69, 0x8001, rng.getrandbits(16)))
    control = code | rng.choice((0, 1 << 16, 1 << 32, 1 << 27))
    if draft.long:
        gpr[VCPU_REGS_RCX], gpr[VCPU_REGS_RDX], gpr[VCPU_REGS_R8] = control, 0x8000, 0x8100
    else:
        gpr[VCPU_REGS_RDX], gpr[VCPU_REGS_RAX] = control >> 32, control & _MASK32
        gpr[VCPU_REGS_RBX], gpr[VCPU_REGS_RCX] = 0, 0x8000

"""Cases into vCPUs and back: what userspace does with KVM_SET_REGS, _SREGS, _MSRS ... and KVM_GET_*.

KVM: __set_regs, __set_sregs_common, init_vmcs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import msgspec

from emufuzz.arch.rflags import X86_EFLAGS_FIXED
from emufuzz.case.model import UNUSABLE, Case, Segment, System, TableRegister
from emufuzz.kvm import msr_index as mi
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.capabilities import (
    setup_vmcs_config,
    vmx_exec_control,
    vmx_pin_based_exec_ctrl,
    vmx_secondary_exec_control,
    vmx_vmentry_ctrl,
    vmx_vmexit_ctrl,
)
from emufuzz.kvm.cpuid import guest_cpuid, implied_features
from emufuzz.kvm.cr import (
    kvm_get_cr8,
    kvm_set_cr8,
    load_pdptrs,
    set_guest_owned_bits,
    vmx_set_cr0,
    vmx_set_cr4,
    vmx_set_efer,
)
from emufuzz.kvm.debugregs import kvm_set_guest_debug, kvm_update_dr7
from emufuzz.kvm.guest_state import vmx_emulation_required
from emufuzz.kvm.hooks import VcpuHooks
from emufuzz.kvm.lapic import LocalApic, kvm_apic_get_state, kvm_apic_set_state
from emufuzz.kvm.msr import kvm_get_msr, kvm_set_msr
from emufuzz.kvm.options import KvmOptions, OptionsError, options_from_knobs
from emufuzz.kvm.regs import (
    is_pae_paging,
    kvm_read_cr0,
    kvm_read_cr3,
    kvm_read_cr4,
    kvm_register_mark_dirty,
    kvm_register_write_raw,
    kvm_rip_write,
    kvm_rsp_read,
)
from emufuzz.kvm.rflags import kvm_set_rflags
from emufuzz.kvm.rmode import vmx_update_exception_bitmap
from emufuzz.kvm.segments import (
    SEGMENT_FIELDS,
    segment_fields,
    set_segment_raw,
    vmx_get_gdt,
    vmx_get_idt,
    vmx_get_segment,
    vmx_segment_access_rights,
    vmx_segment_cache_clear,
)
from emufuzz.kvm.vcpu import (
    L1_CONTROLS,
    VCPU_EXREG_CR3,
    GuestMode,
    KvmSegment,
    Vcpu,
    is_unrestricted_guest,
)
from emufuzz.kvm.vmcs import Vmcs
from emufuzz.kvm.vmx_bits import VMX_AR_TYPE_ACCESSES_MASK, VMX_AR_UNUSABLE

#: The access rights of an unusable segment with KVM's accessed bit.
_EMPTIED: Final = VMX_AR_UNUSABLE | VMX_AR_TYPE_ACCESSES_MASK
_IN_SYSTEM: Final = frozenset({mi.MSR_EFER, mi.MSR_FS_BASE, mi.MSR_GS_BASE})


def segment_in(seg: Segment) -> KvmSegment:
    """A case's segment register as userspace gives it to KVM; not present means unusable."""
    return KvmSegment(
        seg.sel, seg.base, seg.limit, seg.type, seg.s, seg.dpl, seg.p, seg.avl, seg.l, seg.db, seg.g,
        unusable=1 - seg.p,
    )  # fmt: skip


def segment_out(seg: KvmSegment) -> Segment:
    """A segment register in the form of cases.

    What a null selector leaves is shown without the accessed bit that KVM adds: of the access rights of
    an unusable segment hardware keeps nothing but that it is unusable (SDM Vol. 3C 27.3.2).
    """
    if seg.unusable and not (seg.selector or seg.base or seg.limit):
        return UNUSABLE
    if seg.unusable and vmx_segment_access_rights(seg) == _EMPTIED and not seg.limit:
        return Segment(seg.selector, seg.base)
    return Segment(
        seg.selector, seg.base, seg.limit, seg.type, seg.s, seg.dpl, seg.present, seg.avl,
        seg.l, seg.db, seg.g,
    )  # fmt: skip


def vcpu_of_case(case: Case, hooks: VcpuHooks, implied: Mapping[str, Any] | None = None) -> Vcpu:
    """A vCPU in a case's state, as it is right before KVM_RUN.

    Raises:
        OptionsError: a knob, or what `kvm` says of the guest, is not understood.
        CpuidError: `kvm.cpuid` is malformed.
    """
    kvm: Mapping[str, Any] = (case.extra or {}).get("kvm", {})
    options = options_from_knobs({**(implied or {}), **(kvm.get("knobs") or {})})
    cpuid = guest_cpuid(case.vendor, kvm.get("cpuid"), implied_features(case.system.cr4))
    vcpu = Vcpu(options, cpuid, hooks)
    if options.irqchip:
        vcpu.apic = LocalApic(lint0_reenabled=options.has_quirk("lint0_reenabled"))
    vcpu.guest_mode = guest_mode_of(kvm.get("guest_mode"))
    init_vmcs(vcpu)
    vcpu.smm = bool(kvm.get("smm"))
    vcpu.pkru = kvm.get("pkru", 0)
    load_registers(vcpu, case)
    set_lapic_of(vcpu, kvm.get("lapic"))
    vcpu.vmcs.write(vf.GUEST_INTERRUPTIBILITY_INFO, kvm.get("interruptibility", 0))
    set_guest_debug_of(vcpu, kvm.get("guest_debug"))
    return vcpu


def init_vmcs(vcpu: Vcpu) -> None:
    """Give the vCPU a fresh VMCS, with the controls that its options and CPUID ask for."""
    vcpu.vmcs = Vmcs(_control_fields(vcpu.options, vcpu.cpuid.features))
    set_guest_owned_bits(vcpu)
    vmx_update_exception_bitmap(vcpu)


@lru_cache(maxsize=256)
def _control_fields(options: KvmOptions, features: frozenset[str]) -> dict[int, int]:
    """All VMCS fields, of which only controls are set."""
    config = setup_vmcs_config(options)
    vmcs = Vmcs()
    vmcs.write(vf.PIN_BASED_VM_EXEC_CONTROL, vmx_pin_based_exec_ctrl(options, config))
    vmcs.write(vf.CPU_BASED_VM_EXEC_CONTROL, vmx_exec_control(options, config))
    vmcs.write(vf.SECONDARY_VM_EXEC_CONTROL, vmx_secondary_exec_control(options, config, features))
    vmcs.write(vf.VM_EXIT_CONTROLS, vmx_vmexit_ctrl(config))
    vmcs.write(vf.VM_ENTRY_CONTROLS, vmx_vmentry_ctrl(config))
    vmcs.write(vf.VIRTUAL_PROCESSOR_ID, options.vpid)
    return vmcs.values


def load_registers(vcpu: Vcpu, case: Case) -> None:
    """Everything but events and debugging."""
    system = case.system
    _load_system(vcpu, system)
    for reg, value in enumerate(case.gpr):
        kvm_register_write_raw(vcpu, reg, value)
    kvm_rip_write(vcpu, case.rip)
    kvm_set_rflags(vcpu, case.rflags | X86_EFLAGS_FIXED)
    for index, value in system.msr:
        if index not in _IN_SYSTEM:
            kvm_set_msr(vcpu, index, value, host=True)
            vcpu.msrs_loaded[index] = kvm_get_msr(vcpu, index, host=True)[1]
    vcpu.emulation_required = vmx_emulation_required(vcpu)
    vcpu.requests.clear()


def _load_system(vcpu: Vcpu, system: System) -> None:
    """KVM: __set_sregs_common, in its order; LMA before CR0, so that nothing is switched on the way."""
    vcpu.vmcs.write(vf.GUEST_GDTR_BASE, system.gdtr.base)
    vcpu.vmcs.write(vf.GUEST_GDTR_LIMIT, system.gdtr.limit)
    vcpu.vmcs.write(vf.GUEST_IDTR_BASE, system.idtr.base)
    vcpu.vmcs.write(vf.GUEST_IDTR_LIMIT, system.idtr.limit)
    vcpu.cr2 = system.cr2
    vcpu.cr3 = system.cr3
    kvm_register_mark_dirty(vcpu, VCPU_EXREG_CR3)
    if vcpu.apic is None:
        vcpu.cr8 = system.cr8
    else:
        kvm_set_cr8(vcpu, system.cr8)  # a value that is refused is dropped, as by the ioctl
    vmx_set_cr0(vcpu, system.cr0)
    vmx_set_efer(vcpu, system.efer)
    vmx_set_cr4(vcpu, system.cr4)
    if is_pae_paging(vcpu):
        load_pdptrs(vcpu, system.cr3)
    _load_segments(vcpu, system)
    vcpu.xcr0 = system.xcr0
    vcpu.db = list(system.dr[:4])
    vcpu.eff_db = list(system.dr[:4])
    vcpu.dr6, vcpu.dr7 = system.dr[6], system.dr[7]
    kvm_update_dr7(vcpu)


def _load_segments(vcpu: Vcpu, system: System) -> None:
    """All segment registers; the VMCS fields that they become are kept with `system` for its next case."""
    if vcpu.rmode.vm86_active:
        for seg, value in enumerate(system.seg):
            set_segment_raw(vcpu, segment_in(value), seg)
        return
    key = _stored_key(vcpu)
    stored = system.__dict__.get(key)
    if stored is None:
        for seg, value in enumerate(system.seg):
            set_segment_raw(vcpu, segment_in(value), seg)
        system.__dict__[key] = segment_fields(vcpu)
        return
    vmx_segment_cache_clear(vcpu)
    vcpu.vmcs.values.update(zip(SEGMENT_FIELDS, stored, strict=True))


def _stored_key(vcpu: Vcpu) -> str:
    """Where a System keeps its segments in the form of the VMCS."""
    return "_vmcs_accessed" if is_unrestricted_guest(vcpu) else "_vmcs_segments"


def guest_mode_of(value: Any) -> GuestMode | None:
    """A case's `kvm.guest_mode`: false, true, or the members of GuestMode; OptionsError if malformed."""
    if value is None or value is False:
        return None
    if value is True:
        return GuestMode()
    try:
        mode = msgspec.convert(value, GuestMode)
    except msgspec.ValidationError as error:
        raise OptionsError(f"kvm.guest_mode: {error}") from error
    if unknown := mode.intercepts - L1_CONTROLS:
        names = ", ".join(sorted(L1_CONTROLS))
        raise OptionsError(
            f"kvm.guest_mode.intercepts: {min(unknown)!r} is unknown; expected some of {names}"
        )
    return mode


def set_lapic_of(vcpu: Vcpu, registers: Mapping[int, int] | None) -> None:
    """A case's `kvm.lapic`, byte offset -> value; OptionsError without the knob irqchip."""
    if not registers:
        return
    if vcpu.apic is None:
        raise OptionsError("kvm.lapic: needs the knob irqchip")
    kvm_apic_set_state(vcpu, LocalApic.from_registers({**kvm_apic_get_state(vcpu), **registers}))


def set_guest_debug_of(vcpu: Vcpu, value: Any) -> None:
    """A case's `kvm.guest_debug`: control bits, or {"control", "dr": DR0..DR7}; OptionsError if malformed."""
    if value is None:
        return
    members = value if isinstance(value, Mapping) else {"control": value}
    control, debugreg = members.get("control"), members.get("dr", [0] * 8)
    if members.keys() - {"control", "dr"} or not isinstance(control, int):
        raise OptionsError("kvm.guest_debug: expecting control bits or an object with control and dr")
    if not isinstance(debugreg, list) or len(debugreg) != 8:
        raise OptionsError("kvm.guest_debug.dr: expecting eight values")
    kvm_set_guest_debug(vcpu, control, [_number(item) for item in debugreg])


def _number(value: Any) -> int:
    try:
        return int(value, 0) if isinstance(value, str) else int(value)
    except (TypeError, ValueError) as error:
        raise OptionsError(f"kvm.guest_debug.dr: {value!r} is not a number") from error


def gpr_of(vcpu: Vcpu) -> list[int]:
    """The 16 general-purpose registers."""
    kvm_rsp_read(vcpu)
    return vcpu.regs[:16]


def to_system(vcpu: Vcpu, before: System) -> System:
    """The vCPU's state in the form of cases; `before` itself if nothing differs from it.

    FPU and debug registers 4 and 5 are taken from `before`, as are segments that only lack KVM's
    accessed bit. MSRs are those that `before` lists and those that the guest has written.
    """
    changed = {
        "seg": _segments(vcpu, before),
        "gdtr": TableRegister(*vmx_get_gdt(vcpu)),
        "idtr": TableRegister(*vmx_get_idt(vcpu)),
        "cr0": kvm_read_cr0(vcpu),
        "cr2": vcpu.cr2,
        "cr3": kvm_read_cr3(vcpu),
        "cr4": kvm_read_cr4(vcpu),
        "cr8": kvm_get_cr8(vcpu),
        "efer": vcpu.efer,
        "xcr0": vcpu.xcr0,
        "dr": (*vcpu.db, *before.dr[4:6], vcpu.dr6, vcpu.dr7),
        "msr": _msrs(vcpu, before),
    }
    if all(getattr(before, name) == value for name, value in changed.items()):
        return before
    return msgspec.structs.replace(before, **changed)


def _segments(vcpu: Vcpu, before: System) -> tuple[Segment, ...]:
    if not vcpu.rmode.vm86_active and segment_fields(vcpu) == before.__dict__.get(_stored_key(vcpu)):
        return before.seg
    return tuple(_segment(vmx_get_segment(vcpu, seg), old) for seg, old in enumerate(before.seg))


def _segment(now: KvmSegment, before: Segment) -> Segment:
    """`before` where the segment is that one, but for the accessed bit that KVM adds."""
    loaded = segment_in(before)
    if now.key() == loaded.key():
        return before
    loaded.type |= 1
    return before if now.key() == loaded.key() else segment_out(now)


def _msrs(vcpu: Vcpu, before: System) -> tuple[tuple[int, int], ...]:
    """The case's own value where the vCPU's is as it was: KVM changes some values, or takes none."""
    indices = {index for index, _ in before.msr} | vcpu.msrs_written
    old = dict(before.msr)
    values = []
    for index in sorted(indices - _IN_SYSTEM):
        result, data = kvm_get_msr(vcpu, index, host=True)
        kept = result or (index in vcpu.msrs_loaded and data == vcpu.msrs_loaded[index])
        values.append((index, old.get(index, 0) if kept else data))
    shown = [(index, old[index]) for index in sorted(_IN_SYSTEM & old.keys())]
    return tuple(sorted(values + shown))

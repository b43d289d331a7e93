"""System-management mode: the state-save area, SMI, RSM (SDM Vol. 3C ch. 32; APM Vol. 2 ch. 10)."""

from __future__ import annotations

import pytest
from support.phys import PhysHooks
from support.vcpus import make_vcpu

from emufuzz.arch import cr as crs
from emufuzz.case.build import build_system
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.x86emul import X86EMUL_CONTINUE, X86EMUL_UNHANDLEABLE
from emufuzz.kvm import smram as sm
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.interruptibility import vmx_get_interrupt_shadow
from emufuzz.kvm.msr import kvm_get_msr, kvm_set_msr
from emufuzz.kvm.msr_index import MSR_IA32_SMBASE
from emufuzz.kvm.nmi import vmx_get_nmi_mask
from emufuzz.kvm.regs import kvm_read_cr0, kvm_read_cr3, kvm_read_cr4, kvm_rip_read
from emufuzz.kvm.rflags import kvm_get_rflags
from emufuzz.kvm.segments import vmx_get_gdt, vmx_get_idt, vmx_get_segment
from emufuzz.kvm.smm import emulator_leave_smm, enter_smm
from emufuzz.kvm.state import to_system
from emufuzz.kvm.trace import Trace, format_event
from emufuzz.kvm.vcpu import KvmSegment

SMBASE = 0x30000
AREA = slice(SMBASE + 0xFE00, SMBASE + 0x10000)
NO_LM = {"features": {"lm": False}}
PCID = {"features": {"pcid": True}}
ES, CS, SS, DS, FS, GS, TR, LDTR = range(8)
GPRS = [0x1111_0000_0000_0000 * (reg % 8) + reg for reg in range(16)]
NMI_BLOCKED = 8
MASK32 = 0xFFFFFFFF


def make(mode="prot64", *, cpuid=None, smm=True, **options):
    kvm = {"smm": smm, "cpuid": cpuid, **options.pop("kvm", {})}
    vcpu = make_vcpu(mode, hooks=PhysHooks(), kvm=kvm, **options)
    vcpu.requests.clear()
    return vcpu


def leave(vcpu):
    ctxt = X86EmulateCtxt(None)
    return emulator_leave_smm(ctxt, vcpu, vcpu.hooks.read_phys), ctxt


def image_64(**changes):
    """The area of a guest in 64-bit mode; `changes` maps names of `smram` without _64 to values."""
    smram = sm.Smram()
    values = {
        "CR0": 0x80000011, "CR3": 0x5000, "CR4": crs.X86_CR4_PAE, "EFER": 0xD01, "RIP": 0xFFFF_8000_0000_1234,
        "RFLAGS": 0x246, "DR6": 0xFFFF0FF0, "DR7": 0x400, "SMBASE": 0x38000, **changes,
    }  # fmt: skip
    for name, value in values.items():
        size = {"SMBASE": 4, "INT_SHADOW": 1}.get(name, 8)
        smram.put(getattr(sm, f"{name}_64"), size, value)
    for index in range(16):
        smram.put(sm.GPRS_64 + 8 * index, 8, GPRS[15 - index])
    smram.put_table_64(sm.GDTR_64, 0xFFFF_8000_0000_0000, 0x1FFFF)
    smram.put_table_64(sm.IDTR_64, 0xFFFF_8000_0000_2000, 0xFFF)
    for seg in sm.SEGMENTS_64:
        kind = {TR: 0xB, LDTR: 2, CS: 0xB}.get(seg, 3)
        smram.put_segment_64(
            seg,
            KvmSegment(seg * 8 + 8, seg << 32, 0xFFFF, kind, s=int(seg < TR), present=1, l=int(seg == CS)),
        )
    return smram


# -- layout ------------------------------------------------------------------------------------


def test_an_area_has_512_bytes():
    with pytest.raises(ValueError, match="512 bytes, not 511"):
        sm.Smram(bytes(511))


@pytest.mark.parametrize("width", ["64", "32"])
def test_segments_keep_all_their_fields(width):
    smram = sm.Smram()
    offsets = sm.SEGMENTS_64 if width == "64" else sm.SEGMENTS_32
    for seg in offsets:
        var = KvmSegment(0x1230 + seg, 0x87654320 + seg, 0xFFFFF000 + seg, 5, 1, 2, 1, 1, 0, 1, 1)
        getattr(smram, f"put_segment_{width}")(seg, var)
    for seg in offsets:
        var = getattr(smram, f"segment_{width}")(seg)
        assert var.key() == (
            0x1230 + seg, 0x87654320 + seg, 0xFFFFF000 + seg, 5, 1, 2, 1, 1, 0, 1, 1, 0,
        )  # fmt: skip


def test_documented_offsets():
    smram = sm.Smram()
    smram.put_segment_64(CS, KvmSegment(0x10, 1 << 40, 0xFFFFFFFF, 11, s=1, present=1, l=1, g=1))
    assert bytes(smram.data[0x10:0x20]).hex() == "10009ba0" + "ffffffff" + "0000000000010000"
    smram = sm.Smram()
    smram.put_segment_32(CS, KvmSegment(0x10, 0x1000, 0xFFFFFFFF, 11, s=1, present=1, db=1, g=1))
    assert bytes(smram.data[0x190:0x19C]).hex() == "009bc000" + "ffffffff" + "00100000"
    assert bytes(smram.data[0x1AC:0x1B0]).hex() == "10000000"
    assert smram.segment_32(SS).unusable == 1


# -- SMI ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpuid", [None, NO_LM])
def test_smi(cpuid):
    mode = "prot32" if cpuid else "prot64"
    vcpu = make(mode, cpuid=cpuid, smm=False, rflags=0x202, kvm={"interruptibility": 1})
    vcpu.trace = Trace()
    assert enter_smm(vcpu)
    assert vcpu.smm
    assert format_event(vcpu.trace.events[0]) == "kvm_smm_transition: vcpu 0: entering SMM, smbase 0x30000"
    smram = sm.Smram(bytes(vcpu.hooks.phys[AREA]))
    revision, shadow = (sm.REVISION_32, sm.INT_SHADOW_32) if cpuid else (sm.REVISION_64, sm.INT_SHADOW_64)
    assert smram.get(revision, 4) == (0x20000 if cpuid else 0x20064)
    assert smram.get(shadow, 1) == 2  # KVM's own encoding of STI
    assert (kvm_rip_read(vcpu), kvm_get_rflags(vcpu)) == (0x8000, 2)
    assert not kvm_read_cr0(vcpu) & (crs.X86_CR0_PE | crs.X86_CR0_PG | crs.X86_CR0_TS | crs.X86_CR0_EM)
    assert (kvm_read_cr4(vcpu), vcpu.efer, vcpu.dr7) == (0, 0, 0x400)
    assert vmx_get_idt(vcpu) == (0, 0)
    assert vmx_get_interrupt_shadow(vcpu) == 0
    assert vmx_get_nmi_mask(vcpu)
    code, data = vmx_get_segment(vcpu, CS), vmx_get_segment(vcpu, DS)
    assert (code.selector, code.base, code.limit) == (0x3000, SMBASE, 0xFFFFFFFF)
    assert (data.selector, data.base, data.limit, data.present) == (0, 0, 0xFFFFFFFF, 1)


def test_smi_without_memory_ends_the_machine():
    vcpu = make(smm=False)
    vcpu.smbase = 0x40000000
    assert enter_smm(vcpu) is False


@pytest.mark.parametrize("blocked", [False, True])
def test_nmis_stay_blocked_if_they_were(blocked):
    vcpu = make(smm=False, kvm={"interruptibility": NMI_BLOCKED if blocked else 0})
    assert enter_smm(vcpu)
    assert vcpu.smm_inside_nmi is blocked
    assert leave(vcpu)[0] == X86EMUL_CONTINUE
    assert vmx_get_nmi_mask(vcpu) is blocked
    assert not vcpu.smm_inside_nmi


PAE, PCIDE, PG = crs.X86_CR4_PAE, crs.X86_CR4_PCIDE, crs.X86_CR0_PG

# fmt: off
ROUND_TRIP_CASES = [
    ("real",     None,  {}),
    ("real",     NO_LM, {}),
    ("real",     NO_LM, {"knobs": {"unrestricted_guest": False}}),
    ("vm86",     NO_LM, {}),
    ("prot16",   None,  {}),
    ("prot32",   None,  {}),
    ("prot32",   NO_LM, {}),
    ("prot32",   NO_LM, {"knobs": {"ept": False}}),
    ("prot32",   NO_LM, {"cr4": PAE, "cr0": 0x80000011, "cr3": 0x5000}),
    ("prot32",   None,  {"cpl": 3}),
    ("compat16", None,  {}),
    ("compat32", None,  {"cpl": 3}),
    ("prot64",   None,  {}),
    ("prot64",   None,  {"cpl": 3}),
    ("prot64",   None,  {"knobs": {"unrestricted_guest": False}}),
    ("prot64",   PCID,  {"cr4": PAE | PCIDE, "cr3": 0x5123}),
    ("prot64",   PCID,  {"cr4": PAE | PCIDE, "cr3": 0x5000}),
]
# fmt: on


@pytest.mark.parametrize(("mode", "cpuid", "state"), ROUND_TRIP_CASES)
def test_round_trip(mode, cpuid, state):
    """SMI and RSM at once leave everything as it was."""
    options = {name: value for name, value in state.items() if name in ("knobs", "cpl")}
    system = {name: value for name, value in state.items() if name not in options}
    flags = 0x20202 if mode == "vm86" else 0x202
    vcpu = make(mode, cpuid=cpuid, smm=False, rflags=flags, **options, **system)
    count = 16 if cpuid != NO_LM else 8
    vcpu.regs[:count] = [value & (MASK32 if count == 8 else -1) for value in GPRS[:count]]
    before, rip = to_system(vcpu, build_system(mode, options.get("cpl"), **system)), kvm_rip_read(vcpu)
    assert enter_smm(vcpu)
    result, ctxt = leave(vcpu)
    assert result == X86EMUL_CONTINUE
    assert to_system(vcpu, before) == before
    assert (ctxt.next_eip, ctxt.eflags) == (rip, flags)
    assert ctxt.regs[:count] == vcpu.regs[:count]
    assert ctxt.regs_dirty == (1 << count) - 1
    assert not vcpu.smm
    assert not vcpu.emulation_required or mode == "vm86"


# -- RSM ---------------------------------------------------------------------------------------


def test_rsm_64():
    vcpu = make("real")
    vcpu.trace = Trace()
    vcpu.hooks.phys[AREA] = image_64(INT_SHADOW=2).data
    result, ctxt = leave(vcpu)
    assert result == X86EMUL_CONTINUE
    assert ctxt.regs == GPRS
    assert (ctxt.next_eip, ctxt.eflags, ctxt.interruptibility) == (0xFFFF_8000_0000_1234, 0x246, 2)
    assert (kvm_read_cr0(vcpu), kvm_read_cr3(vcpu), kvm_read_cr4(vcpu)) == (0x80000011, 0x5000, PAE)
    assert vcpu.efer == 0xD01
    assert vmx_get_gdt(vcpu) == (0xFFFF_8000_0000_0000, 0xFFFF)  # 16 bits of limit
    assert vmx_get_idt(vcpu) == (0xFFFF_8000_0000_2000, 0xFFF)
    assert (vmx_get_segment(vcpu, GS).base, vmx_get_segment(vcpu, CS).l) == (5 << 32, 1)
    assert vcpu.smbase == 0x38000
    assert vcpu.requests >= {"EVENT"}
    assert vcpu.hooks.calls["mmu_reset_context"] >= 1
    assert format_event(vcpu.trace.events[0]) == "kvm_smm_transition: vcpu 0: leaving SMM, smbase 0x30000"


@pytest.mark.parametrize(
    ("mode", "cpuid", "state"),
    [("prot64", PCID, {"cr4": PAE | PCIDE, "cr3": 0x7001}), ("compat32", None, {}), ("prot32", None, {})],
)
def test_handler_may_have_enabled_paging(mode, cpuid, state):
    vcpu = make(mode, cpuid=cpuid, **state)
    vcpu.hooks.phys[AREA] = image_64().data
    assert leave(vcpu)[0] == X86EMUL_CONTINUE
    assert (kvm_read_cr0(vcpu), kvm_read_cr3(vcpu), kvm_read_cr4(vcpu)) == (0x80000011, 0x5000, PAE)
    assert vcpu.efer == 0xD01


def test_real_mode_is_left_by_way_of_real_mode_in_32_bits():
    vcpu = make("prot32", cpuid=NO_LM)
    smram = sm.Smram()
    smram.put(sm.CR0_32, 4, 0x10)
    vcpu.hooks.phys[AREA] = smram.data
    assert leave(vcpu)[0] == X86EMUL_CONTINUE
    assert kvm_read_cr0(vcpu) == 0x10


def test_reserved_flag_is_set_and_lma_is_recomputed():
    vcpu = make("real")
    vcpu.hooks.phys[AREA] = image_64(RFLAGS=0, EFER=0x501, CR0=0x11, CR4=0).data
    result, ctxt = leave(vcpu)
    assert (result, ctxt.eflags, vcpu.efer) == (X86EMUL_CONTINUE, 2, 0x101)


# fmt: off
FAILURES_CASES = [
    ({"DR6": 1 << 32},                        "EFER"),  # what is still from SMM
    ({"DR7": 1 << 32},                        "EFER"),
    ({"EFER": 1 << 1},                        "EFER"),
    ({"CR3": 1 << 60},                        "CR4"),
    ({"CR4": PAE | 1 << 31},                  "CR4"),
    ({"CR4": PAE | crs.X86_CR4_LA57},         "CR4"),
    ({"CR4": PAE | 1 << 13},                  "CR4"),   # VMXE without VMX
    ({"CR0": 0x80000010},                     "CR0"),   # PG without PE
    ({"CR0": 0xA0000011},                     "CR0"),   # NW without CD
    ({"CR4": 0},                              "CR0"),   # long mode without PAE
]
# fmt: on


@pytest.mark.parametrize(("changes", "kept"), FAILURES_CASES)
def test_failures(changes, kept):
    vcpu = make("real")
    vcpu.hooks.phys[AREA] = image_64(**changes).data
    result, ctxt = leave(vcpu)
    assert result == X86EMUL_UNHANDLEABLE
    assert not vcpu.smm
    assert ctxt.regs == GPRS  # they came first
    now = {"EFER": vcpu.efer, "CR4": kvm_read_cr4(vcpu) & PAE, "CR0": kvm_read_cr0(vcpu) & PG}
    assert now[kept] == 0


@pytest.mark.parametrize(("changes", "cpuid"), [({"CR4": PAE | PCIDE, "CR3": 0x5001}, PCID)])
def test_pcids_need_long_mode(changes, cpuid):
    vcpu = make("real", cpuid=cpuid)
    vcpu.hooks.phys[AREA] = image_64(**changes, EFER=1).data  # PAE paging
    assert leave(vcpu)[0] == X86EMUL_UNHANDLEABLE
    vcpu = make("real", cpuid=cpuid)
    vcpu.hooks.phys[AREA] = image_64(**changes).data
    assert leave(vcpu)[0] == X86EMUL_CONTINUE
    assert kvm_read_cr3(vcpu) == 0x5001


@pytest.mark.parametrize(("register", "value"), [("CR0", 0x80000010), ("CR4", 1 << 31), ("CR3", None)])
def test_failures_32(register, value):
    vcpu = make("prot32", cpuid={**NO_LM, "maxphyaddr": 32}, smm=False)
    assert enter_smm(vcpu)
    smram = sm.Smram(bytes(vcpu.hooks.phys[AREA]))
    if value is not None:
        smram.put(getattr(sm, f"{register}_32"), 4, value)
        expected = X86EMUL_UNHANDLEABLE
    else:
        smram.put(sm.CR3_32, 4, 0xFFFFF000)
        expected = X86EMUL_CONTINUE
    vcpu.hooks.phys[AREA] = smram.data
    assert leave(vcpu)[0] == expected


def test_debug_registers_of_32_bits_cannot_fail():
    vcpu = make("prot32", cpuid=NO_LM, smm=False)
    assert enter_smm(vcpu)
    smram = sm.Smram(bytes(vcpu.hooks.phys[AREA]))
    smram.put(sm.DR6_32, 4, 0xFFFFFFFF)
    smram.put(sm.SMBASE_32, 4, 0x12345)
    smram.put(sm.INT_SHADOW_32, 1, 3)
    vcpu.hooks.phys[AREA] = smram.data
    result, ctxt = leave(vcpu)
    assert (result, ctxt.interruptibility) == (X86EMUL_CONTINUE, 3)
    assert vcpu.dr6 == 0xFFFFEFFF
    assert vcpu.smbase == 0x12345


def test_unreadable_area_leaves_the_vcpu_in_smm():
    vcpu = make("real", kvm={"interruptibility": NMI_BLOCKED})
    vcpu.smbase = 0x40000000
    assert leave(vcpu)[0] == X86EMUL_UNHANDLEABLE
    assert vcpu.smm
    assert vmx_get_nmi_mask(vcpu)


def test_unaligned_area():
    vcpu = make("real")
    vcpu.smbase = 0x12345
    vcpu.hooks.phys[0x12345 + 0xFE00 : 0x12345 + 0x10000] = image_64().data
    assert leave(vcpu)[0] == X86EMUL_CONTINUE


def test_failure_ends_l2():
    vcpu = make("real", kvm={"guest_mode": {"exception_bitmap": 1 << 3}})
    vcpu.hooks.phys[AREA] = image_64(CR0=0x80000010).data
    assert leave(vcpu)[0] == X86EMUL_UNHANDLEABLE
    assert vcpu.guest_mode is None
    assert not vcpu.vmcs.read(vf.EXCEPTION_BITMAP) & 1 << 3


def test_smbase_is_userspaces():
    vcpu = make()
    assert kvm_get_msr(vcpu, MSR_IA32_SMBASE) == (1, 0)
    assert kvm_get_msr(vcpu, MSR_IA32_SMBASE, host=True) == (0, SMBASE)
    assert kvm_set_msr(vcpu, MSR_IA32_SMBASE, 0x50000) == 1
    assert kvm_set_msr(vcpu, MSR_IA32_SMBASE, 0x50000, host=True) == 0
    assert vcpu.smbase == 0x50000

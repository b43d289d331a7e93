"""The MMU's view of a real vCPU."""

from __future__ import annotations

from support.page_tables import ADDR, ROOT, TARGET, Chain

from emufuzz.emulator.ctxt import X86Exception
from emufuzz.kvm.cpuid import guest_cpuid
from emufuzz.kvm.hooks import IsolatedHooks
from emufuzz.kvm.mmu.hardware import ept_guest_access
from emufuzz.kvm.mmu.mmu import KvmMmu
from emufuzz.kvm.mmu.page_fault import kvm_mmu_page_fault
from emufuzz.kvm.mmu.tdp import ept_violation_error_code
from emufuzz.kvm.mmu.vcpu_state import VcpuMmuState
from emufuzz.kvm.mmu.walker import gva_to_gpa
from emufuzz.kvm.options import KvmOptions
from emufuzz.kvm.vcpu import GuestMode, Vcpu


def _vcpu(chain, **knobs):
    vcpu = Vcpu(KvmOptions(**knobs), guest_cpuid("intel"), IsolatedHooks())
    state = chain.state
    vcpu.cr0, vcpu.cr3, vcpu.cr4, vcpu.efer, vcpu.rflags = state.cr0, state.cr3, state.cr4, state.efer, 2
    vcpu.regs[16] = 0x1234
    return vcpu


def test_the_walker_runs_on_a_vcpu():
    chain = Chain("4-level")
    view = VcpuMmuState(_vcpu(chain))
    assert gva_to_gpa(view, chain.slots, ADDR, 0) == TARGET << 12 | ADDR & 0xFFF


def test_page_faults_run_on_a_vcpu():
    chain = Chain("4-level")
    vcpu = _vcpu(chain)
    mmu = KvmMmu(VcpuMmuState(vcpu), chain.memory, vcpu.options)
    done = ept_guest_access(mmu, ADDR, 0)
    assert done.gpa >> 12 == ROOT
    assert not kvm_mmu_page_fault(mmu, done.gpa, ept_violation_error_code(done.qualification)).emulate
    assert list(mmu.direct_map) == [ROOT]


def test_what_the_view_shows():
    vcpu = _vcpu(Chain("4-level"), enable_apicv=True)
    view = VcpuMmuState(vcpu)
    assert (view.rip, view.smm, view.in_guest_mode, view.apicv_activated) == (0x1234, False, False, True)
    assert not view.event_needs_reinjection()
    vcpu.guest_mode = GuestMode()
    vcpu.smm = True
    vcpu.nmi_injected = True
    assert (view.smm, view.in_guest_mode, view.event_needs_reinjection()) == (True, True, True)


def test_guest_faults_are_queued():
    vcpu = _vcpu(Chain("4-level"))
    fault = X86Exception()
    fault.vector, fault.error_code_valid, fault.error_code, fault.address = 14, True, 7, ADDR
    VcpuMmuState(vcpu).inject_emulated_page_fault(fault)
    assert (vcpu.exception.vector, vcpu.exception.error_code, vcpu.exception.payload) == (14, 7, ADDR)
    assert vcpu.hooks.calls["mmu_invalidate_addr"] == 1

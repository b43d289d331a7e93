"""The register side of the flat callbacks: GPRs, segments, control registers, MSRs, ports."""

from __future__ import annotations

from typing import Final

import msgspec

from emufuzz.arch import cr as crs
from emufuzz.arch.descriptors import DescStruct
from emufuzz.arch.rflags import X86_EFLAGS_VM
from emufuzz.case.model import Case, Fpu, Segment, System, TableRegister
from emufuzz.emulator.ctxt import FpuRegisters, X86EmulateCtxt
from emufuzz.emulator.ops import SegmentState
from emufuzz.emulator.x86emul import (
    X86EMUL_CONTINUE,
    X86EMUL_MODE_PROT16,
    X86EMUL_MODE_PROT32,
    X86EMUL_MODE_PROT64,
    X86EMUL_MODE_REAL,
    X86EMUL_MODE_VM86,
    X86EMUL_PROPAGATE_FAULT,
    X86EMUL_UNHANDLEABLE,
)
from emufuzz.subject.flat import control, cpuid, msr
from emufuzz.subject.flat.memory import FlatMemory

_CS: Final = 1
_SS: Final = 2
_NO_DESC: Final = DescStruct()
#: Machine states whose segments are kept ready.
_MAX_VIEWS: Final = 4096


class SystemView:
    """What the callbacks derive from a System: segment states, mode apart from RFLAGS.VM."""

    __slots__ = ("bases", "mode", "segments", "system")

    def __init__(self, system: System) -> None:
        self.system = system
        self.segments = [segment_state(seg) for seg in system.seg]
        self.bases = [seg.base for seg in system.seg]
        self.mode = _mode(system)


def _mode(system: System) -> int:
    """KVM: init_emulate_ctxt, virtual-8086 mode apart."""
    if not system.cr0 & crs.X86_CR0_PE:
        return X86EMUL_MODE_REAL
    cs = system.seg[_CS]
    if cs.l and system.efer & crs.EFER_LMA:
        return X86EMUL_MODE_PROT64
    return X86EMUL_MODE_PROT32 if cs.db else X86EMUL_MODE_PROT16


def segment_state(seg: Segment) -> SegmentState:
    """get_segment's view of a segment register: an unusable one keeps only its selector."""
    if not seg.p:
        return SegmentState(False, seg.sel, _NO_DESC, 0)
    limit = seg.limit >> 12 if seg.g else seg.limit
    desc = DescStruct(seg.base, limit, seg.type, seg.s, seg.dpl, seg.p, seg.avl, seg.l, seg.db, seg.g)
    return SegmentState(True, seg.sel, desc, seg.base >> 32)


class FlatOps(FlatMemory):
    """All callbacks for one case at a time; `load` starts the next one."""

    __slots__ = ("_views", "case", "cr0", "gpr", "mode", "port_pos", "system", "view")

    def __init__(self) -> None:
        super().__init__()
        self._views: dict[int, SystemView] = {}
        self.gpr: list[int] = [0] * 16
        self.case: Case
        self.system: System
        self.view: SystemView
        self.cr0: int = 0
        self.mode: int = X86EMUL_MODE_REAL
        self.port_pos: int = 0

    def load(self, case: Case) -> None:
        """Take a case's whole state."""
        self.case = case
        self.gpr = list(case.gpr)
        self.port_pos = 0
        self.load_memory(case)
        system = case.system
        view = self._views.get(id(system))
        if view is None or view.system is not system:
            view = self._add_view(system)
        self._use(view)
        self.mode = view.mode
        if case.rflags & X86_EFLAGS_VM and view.mode != X86EMUL_MODE_REAL:
            self.mode = X86EMUL_MODE_VM86
            self.cpl_value = 3

    def _add_view(self, system: System) -> SystemView:
        if len(self._views) >= _MAX_VIEWS:
            self._views.clear()
        view = self._views[id(system)] = SystemView(system)
        return view

    def _use(self, view: SystemView) -> None:
        self.view = view
        self.system = system = view.system
        self.cr0 = system.cr0
        self.cr4 = system.cr4
        self.efer = system.efer
        self.cpl_value = system.seg[_SS].dpl if system.cr0 & crs.X86_CR0_PE else 0

    def _change(self, **fields: object) -> None:
        """Replace members of the machine state."""
        cpl = self.cpl_value
        self._use(SystemView(msgspec.structs.replace(self.system, **fields)))
        if self.mode == X86EMUL_MODE_VM86:
            self.cpl_value = cpl

    # -- general-purpose registers ---------------------------------------------------------

    def read_gpr(self, ctxt: X86EmulateCtxt, reg: int) -> int:
        """X86EmulateOps.read_gpr."""
        return self.gpr[reg]

    def write_gpr(self, ctxt: X86EmulateCtxt, reg: int, val: int) -> None:
        """X86EmulateOps.write_gpr."""
        self.gpr[reg] = val

    # -- segments and descriptor tables ------------------------------------------------------

    def cpl(self, ctxt: X86EmulateCtxt) -> int:
        """X86EmulateOps.cpl."""
        return self.cpl_value

    def get_segment(self, ctxt: X86EmulateCtxt, seg: int) -> SegmentState:
        """X86EmulateOps.get_segment."""
        return self.view.segments[seg]

    def get_cached_segment_base(self, ctxt: X86EmulateCtxt, seg: int) -> int:
        """X86EmulateOps.get_cached_segment_base."""
        return self.view.bases[seg]

    def set_segment(
        self, ctxt: X86EmulateCtxt, selector: int, desc: DescStruct, base3: int, seg: int
    ) -> None:
        """X86EmulateOps.set_segment."""
        if self.log is not None:
            self.log.append(("set_segment", seg, selector))
        new = Segment(
            selector, desc.base | base3 << 32, desc.limit_scaled, desc.type, desc.s, desc.dpl, desc.p,
            desc.avl, desc.l, desc.d, desc.g,
        )  # fmt: skip
        segs = self.system.seg
        self._change(seg=(*segs[:seg], new, *segs[seg + 1 :]))

    def get_gdt(self, ctxt: X86EmulateCtxt) -> tuple[int, int]:
        """X86EmulateOps.get_gdt."""
        return self.system.gdtr.base, self.system.gdtr.limit

    def get_idt(self, ctxt: X86EmulateCtxt) -> tuple[int, int]:
        """X86EmulateOps.get_idt."""
        return self.system.idtr.base, self.system.idtr.limit

    def set_gdt(self, ctxt: X86EmulateCtxt, address: int, limit: int) -> None:
        """X86EmulateOps.set_gdt."""
        self._log("set_gdt", address, limit)
        self._change(gdtr=TableRegister(address, limit))

    def set_idt(self, ctxt: X86EmulateCtxt, address: int, limit: int) -> None:
        """X86EmulateOps.set_idt."""
        self._log("set_idt", address, limit)
        self._change(idtr=TableRegister(address, limit))

    def _log(self, *event: object) -> None:
        if self.log is not None:
            self.log.append(event)

    # -- control, debug and model-specific registers -------------------------------------------

    def get_cr(self, ctxt: X86EmulateCtxt, cr: int) -> int:
        """X86EmulateOps.get_cr."""
        if cr == 0:
            return self.cr0
        if cr == 4:
            return self.cr4
        return {2: self.system.cr2, 3: self.system.cr3, 8: self.system.cr8}.get(cr, 0)

    def set_cr(self, ctxt: X86EmulateCtxt, cr: int, val: int) -> int:
        """X86EmulateOps.set_cr."""
        self._log("set_cr", cr, val)
        change = control.write_cr(self.system, cr, val)
        if change is None:
            return 1
        self._change(**change)
        return 0

    def get_dr(self, ctxt: X86EmulateCtxt, dr: int) -> int:
        """X86EmulateOps.get_dr."""
        return self.system.dr[dr + 2 if dr in (4, 5) else dr]

    def set_dr(self, ctxt: X86EmulateCtxt, dr: int, val: int) -> int:
        """X86EmulateOps.set_dr."""
        self._log("set_dr", dr, val)
        drs = control.write_dr(self.system.dr, dr, val)
        if drs is None:
            return 1
        self._change(dr=drs)
        return 0

    def get_msr(self, ctxt: X86EmulateCtxt, index: int) -> tuple[int, int]:
        """X86EmulateOps.get_msr."""
        return 0, msr.read(self.system, index) or 0

    def get_msr_with_filter(self, ctxt: X86EmulateCtxt, index: int) -> tuple[int, int]:
        """X86EmulateOps.get_msr_with_filter."""
        self._log("get_msr", index)
        value = msr.read(self.system, index)
        if value is None:
            return X86EMUL_PROPAGATE_FAULT, 0
        return X86EMUL_CONTINUE, value

    def set_msr_with_filter(self, ctxt: X86EmulateCtxt, index: int, data: int) -> int:
        """X86EmulateOps.set_msr_with_filter."""
        self._log("set_msr", index, data)
        change = msr.write(self.system, index, data)
        if change is None:
            return X86EMUL_PROPAGATE_FAULT
        self._change(**change)
        return X86EMUL_CONTINUE

    def set_xcr(self, ctxt: X86EmulateCtxt, index: int, val: int) -> int:
        """X86EmulateOps.set_xcr."""
        self._log("set_xcr", index, val)
        if index or not val & 1 or val & ~7 or (val & 4 and not val & 2):
            return 1
        self._change(xcr0=val)
        return 0

    def check_rdpmc_early(self, ctxt: X86EmulateCtxt, pmc: int) -> int:
        """X86EmulateOps.check_rdpmc_early: four programmable counters, three fixed ones."""
        return int(not control.pmc_exists(pmc))

    def read_pmc(self, ctxt: X86EmulateCtxt, pmc: int) -> tuple[int, int]:
        """X86EmulateOps.read_pmc."""
        self._log("rdpmc", pmc)
        return int(not control.pmc_exists(pmc)), control.PMC_VALUE + pmc

    # -- ports -----------------------------------------------------------------------------------

    def pio_in_emulated(self, ctxt: X86EmulateCtxt, size: int, port: int, count: int) -> bytes | None:
        """X86EmulateOps.pio_in_emulated: the case's stream, then all ones."""
        if count == 1:
            self._log("in", port, size)
        else:
            self._log("in", port, size, count)
        length = size * count
        data = self.case.port_in[self.port_pos : self.port_pos + length]
        self.port_pos += length
        return data.ljust(length, b"\xff")

    def pio_out_emulated(self, ctxt: X86EmulateCtxt, size: int, port: int, data: bytes, count: int) -> bool:
        """X86EmulateOps.pio_out_emulated."""
        self._log("out", port, data)
        return True

    # -- everything else -------------------------------------------------------------------------

    def vm_bugged(self, ctxt: X86EmulateCtxt) -> None:
        """X86EmulateOps.vm_bugged: the port contradicts itself, which is a finding."""
        raise AssertionError("KVM_EMULATOR_BUG_ON")

    def invlpg(self, ctxt: X86EmulateCtxt, addr: int) -> None:
        """X86EmulateOps.invlpg."""
        self._log("invlpg", addr)

    def halt(self, ctxt: X86EmulateCtxt) -> None:
        """X86EmulateOps.halt."""
        self._log("halt")

    def wbinvd(self, ctxt: X86EmulateCtxt) -> None:
        """X86EmulateOps.wbinvd."""
        self._log("wbinvd")

    def fix_hypercall(self, ctxt: X86EmulateCtxt) -> int:
        """X86EmulateOps.fix_hypercall: VMCALL or VMMCALL, written at RIP as a linear address."""
        self._log("fix_hypercall", self.case.rip)
        insn = b"\x0f\x01\xc1" if self.case.vendor == "intel" else b"\x0f\x01\xd9"
        return self.write_emulated(ctxt, self.case.rip, insn, ctxt.exception)

    def intercept(self, ctxt: X86EmulateCtxt, stage: int) -> int:
        """X86EmulateOps.intercept: there is no nested hypervisor."""
        return X86EMUL_CONTINUE

    def get_cpuid(
        self, ctxt: X86EmulateCtxt, eax: int, ecx: int, exact_only: bool
    ) -> tuple[bool, int, int, int, int]:
        """X86EmulateOps.get_cpuid."""
        self._log("cpuid", eax, ecx, int(exact_only))
        return cpuid.leaf(self.case.vendor, eax, ecx)

    def guest_has_movbe(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.guest_has_movbe."""
        return True

    def guest_has_fxsr(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.guest_has_fxsr."""
        return True

    def guest_has_rdpid(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.guest_has_rdpid."""
        return True

    def guest_cpuid_is_intel_compatible(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.guest_cpuid_is_intel_compatible."""
        return self.case.vendor == "intel"

    def set_nmi_mask(self, ctxt: X86EmulateCtxt, masked: bool) -> None:
        """X86EmulateOps.set_nmi_mask."""
        self._log("set_nmi_mask", int(masked))

    def is_smm(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.is_smm."""
        return False

    def leave_smm(self, ctxt: X86EmulateCtxt) -> int:
        """X86EmulateOps.leave_smm: never called outside system-management mode."""
        return X86EMUL_UNHANDLEABLE

    def triple_fault(self, ctxt: X86EmulateCtxt) -> None:
        """X86EmulateOps.triple_fault."""
        raise AssertionError("triple fault requested outside system-management mode")

    def get_untagged_addr(self, ctxt: X86EmulateCtxt, addr: int, flags: int) -> int:
        """X86EmulateOps.get_untagged_addr: the machine has no LAM."""
        return addr

    def is_canonical_addr(self, ctxt: X86EmulateCtxt, addr: int, flags: int) -> bool:
        """X86EmulateOps.is_canonical_addr."""
        return control.is_canonical(addr, self.cr4)


def load_fpu(fpu: FpuRegisters, state: Fpu) -> None:
    """Put a case's FPU state into the registers."""
    fpu.fcw, fpu.fsw, fpu.ftw, fpu.mxcsr = state.fcw, state.fsw, state.ftw, state.mxcsr
    fpu.xmm = list(state.xmm)
    fpu.mm = list(state.mm)
    fpu.dirty = False


def read_fpu(fpu: FpuRegisters) -> Fpu:
    """The registers as a state value."""
    return Fpu(fpu.fcw, fpu.fsw, fpu.ftw, fpu.mxcsr, tuple(fpu.xmm), tuple(fpu.mm))

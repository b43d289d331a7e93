"""From an exit to the emulator and back (KVM: x86_emulate_instruction and what it calls).

KVM: init_emulate_ctxt, x86_decode_emulated_instruction, handle_emulation_failure,
kvm_unprotect_and_retry_on_failure, inject_emulated_exception, prepare_emulation_failure_exit,
kvm_emulate_instruction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emufuzz.arch import exceptions as ex
from emufuzz.arch.cr import EFER_LMA
from emufuzz.arch.regs import VCPU_SREG_CS
from emufuzz.arch.rflags import X86_EFLAGS_IF, X86_EFLAGS_RF, X86_EFLAGS_TF, X86_EFLAGS_VM
from emufuzz.emulator.ctxt import X86EmulateCtxt, emulator_invalidate_register_cache
from emufuzz.emulator.decode import init_decode_cache, x86_decode_insn
from emufuzz.emulator.execute import x86_emulate_insn
from emufuzz.emulator.flags import PageTable
from emufuzz.emulator.x86emul import (
    EMULATION_FAILED,
    EMULATION_INTERCEPTED,
    EMULATION_OK,
    EMULATION_RESTART,
    MASK32,
    MASK64,
    X86EMUL_MODE_PROT16,
    X86EMUL_MODE_PROT32,
    X86EMUL_MODE_PROT64,
    X86EMUL_MODE_REAL,
    X86EMUL_MODE_VM86,
)
from emufuzz.kvm import emultype as et
from emufuzz.kvm.debugregs import kvm_vcpu_check_code_breakpoint, kvm_vcpu_do_singlestep
from emufuzz.kvm.exceptions import (
    EXCPT_TRAP,
    exception_type,
    kvm_clear_exception_queue,
    kvm_inject_emulated_page_fault,
    kvm_queue_exception,
    kvm_queue_exception_e,
)
from emufuzz.kvm.exit_info import vmx_get_exit_info
from emufuzz.kvm.interruptibility import toggle_interruptibility, vmx_update_emulated_instruction
from emufuzz.kvm.mmu.page_fault import kvm_mmu_unprotect_gfn_and_retry
from emufuzz.kvm.regs import is_protmode, kvm_rip_read, kvm_rip_write
from emufuzz.kvm.rflags import (
    KVM_GUESTDBG_SINGLESTEP,
    kvm_get_rflags,
    kvm_set_rflags,
    set_rflags_no_event,
)
from emufuzz.kvm.rflags_read import vmx_get_rflags
from emufuzz.kvm.segments import get_segment_base, vmx_get_cpl, vmx_get_cs_db_l_bits
from emufuzz.kvm.vcpu import KVM_REQ_EVENT, CompleteUserspaceIo, Vcpu
from emufuzz.kvm.vmx_check import vmx_check_emulate_instruction
from emufuzz.kvm.x86_completions import complete_emulated_mmio, complete_emulated_pio

if TYPE_CHECKING:
    from emufuzz.kvm.machine import KvmMachine

KVM_EXIT_INTERNAL_ERROR: Final = "INTERNAL_ERROR"
KVM_INTERNAL_ERROR_EMULATION: Final = 1
#: `flags` of the exit: the instruction's bytes are with it.
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: Final = 1

_NOP: Final = b"\x90"
_INSN_BYTES: Final = 15
_PORT_OPCODES: Final = frozenset((*range(0x6C, 0x70), *range(0xE4, 0xE8), *range(0xEC, 0xF0)))
_RDPMC: Final = 0x33


# -- entering the emulator -----------------------------------------------------------------------


def init_emulate_ctxt(machine: KvmMachine) -> None:
    """Give the emulator the vCPU's state."""
    vcpu, ctxt = machine.vcpu, machine.ctxt
    ctxt.gpa_available = False
    ctxt.eflags = kvm_get_rflags(vcpu)
    ctxt.tf = bool(ctxt.eflags & X86_EFLAGS_TF)
    ctxt.eip = kvm_rip_read(vcpu)
    ctxt.mode = _mode(vcpu, ctxt.eflags)
    ctxt.interruptibility = 0
    ctxt.have_exception = False
    ctxt.exception.vector = 0xFF
    ctxt.perm_ok = False
    ctxt.fail_reason = ""
    init_decode_cache(ctxt)
    ctxt.enable_vmware_backdoor = vcpu.options.enable_vmware_backdoor
    machine.regs_need_sync_from_vcpu = False


def _mode(vcpu: Vcpu, eflags: int) -> int:
    if not is_protmode(vcpu):
        return X86EMUL_MODE_REAL
    if eflags & X86_EFLAGS_VM:
        return X86EMUL_MODE_VM86
    db, long = vmx_get_cs_db_l_bits(vcpu)
    if long and vcpu.efer & EFER_LMA:
        return X86EMUL_MODE_PROT64
    return X86EMUL_MODE_PROT32 if db else X86EMUL_MODE_PROT16


def x86_decode_emulated_instruction(machine: KvmMachine, emulation_type: int) -> int:
    """Decode the instruction at RIP: EMULATION_OK or EMULATION_FAILED."""
    ctxt = machine.ctxt
    init_emulate_ctxt(machine)
    ctxt.ud = bool(emulation_type & et.EMULTYPE_TRAP_UD)
    result = x86_decode_insn(ctxt, emulation_type=emulation_type)
    machine.last_decode = result
    _trace_insn(machine, failed=False)
    return result


def _trace_insn(machine: KvmMachine, *, failed: bool) -> None:
    vcpu, ctxt = machine.vcpu, machine.ctxt
    if vcpu.trace is not None:
        base = get_segment_base(vcpu, VCPU_SREG_CS)
        insn = ctxt.fetch_data[: ctxt.fetch_pos]
        vcpu.trace.emit(
            "kvm_emulate_insn", rip=ctxt.eip, csbase=base, insn=insn, mode=ctxt.mode, failed=failed
        )


def x86_emulate_instruction(machine: KvmMachine, cr2_or_gpa: int, emulation_type: int) -> int:
    """Emulate the instruction at RIP.

    Args:
        machine: The VM.
        cr2_or_gpa: The address that faulted, with EMULTYPE_PF: physical if the MMU is direct, else
            linear.
        emulation_type: EMULTYPE_* bits.

    Returns:
        1 to resume the guest, 0 to leave for userspace.
    """
    vcpu, ctxt = machine.vcpu, machine.ctxt
    machine.emulations += 1
    if vcpu.guest_mode is not None or not emulation_type & et.EMULTYPE_PF:
        emulation_type &= ~et.EMULTYPE_ALLOW_RETRY_PF
    if not vmx_check_emulate_instruction(vcpu):
        return 1
    if not emulation_type & et.EMULTYPE_NO_DECODE:
        done = _decode(machine, cr2_or_gpa, emulation_type)
        if done is not None:
            return done
    if emulation_type & et.EMULTYPE_VMWARE_GP and not _is_vmware_backdoor_opcode(ctxt):
        kvm_queue_exception_e(vcpu, ex.GP_VECTOR, 0)
        return 1
    if emulation_type & et.EMULTYPE_SKIP:
        return _skip(machine, emulation_type)
    if (
        emulation_type & et.EMULTYPE_ALLOW_RETRY_PF
        and not ctxt.d & PageTable
        and kvm_mmu_unprotect_gfn_and_retry(machine.mmu, cr2_or_gpa)
    ):
        return 1
    if machine.regs_need_sync_from_vcpu:
        machine.regs_need_sync_from_vcpu = False
        emulator_invalidate_register_cache(ctxt)
    return _emulate(machine, cr2_or_gpa, emulation_type)


def _decode(machine: KvmMachine, cr2_or_gpa: int, emulation_type: int) -> int | None:
    """Breakpoints and decoding; None if there is an instruction to emulate.

    KVM deviation: where #UD made KVM look, a fault of the fetch becomes #UD too (SDM Vol. 3A 6.9).
    """
    vcpu, ctxt = machine.vcpu, machine.ctxt
    kvm_clear_exception_queue(vcpu)
    if not emulation_type & et.EMULTYPES_PAST_BREAKPOINTS:
        stopped = kvm_vcpu_check_code_breakpoint(vcpu)
        if stopped is not None:
            return stopped
    if x86_decode_emulated_instruction(machine, emulation_type) == EMULATION_OK:
        return None
    if emulation_type & (et.EMULTYPE_TRAP_UD | et.EMULTYPE_TRAP_UD_FORCED):
        kvm_queue_exception(vcpu, ex.UD_VECTOR)
        return 1
    if _unprotect_and_retry_on_failure(machine, cr2_or_gpa, emulation_type):
        return 1
    if ctxt.have_exception and not emulation_type & et.EMULTYPE_SKIP:
        _inject_emulated_exception(vcpu, ctxt)
        return 1
    return handle_emulation_failure(machine, emulation_type)


def _is_vmware_backdoor_opcode(ctxt: X86EmulateCtxt) -> bool:
    if ctxt.opcode_len == 1:
        return ctxt.b in _PORT_OPCODES
    return ctxt.opcode_len == 2 and ctxt.b == _RDPMC


def _skip(machine: KvmMachine, emulation_type: int) -> int:
    """Go past the decoded instruction: for a handler that has done it, or after userspace has.

    Without EMULTYPE_COMPLETE_USER_EXIT shadows and single step are the caller's.
    """
    vcpu, ctxt = machine.vcpu, machine.ctxt
    ctxt.eip = ctxt.next_eip if ctxt.mode == X86EMUL_MODE_PROT64 else ctxt.next_eip & MASK32
    if emulation_type & et.EMULTYPE_COMPLETE_USER_EXIT:
        return _writeback(machine, 1)
    kvm_rip_write(vcpu, ctxt.eip)
    if ctxt.eflags & X86_EFLAGS_RF:
        kvm_set_rflags(vcpu, ctxt.eflags & ~X86_EFLAGS_RF)
    return 1


# -- running it ----------------------------------------------------------------------------------


def _emulate(machine: KvmMachine, cr2_or_gpa: int, emulation_type: int) -> int:
    """Run the instruction until it ends, or until userspace has to do something."""
    vcpu, ctxt = machine.vcpu, machine.ctxt
    check_intercepts = vcpu.guest_mode is not None and not emulation_type & et.EMULTYPE_NO_DECODE
    while True:
        if emulation_type & et.EMULTYPE_PF:
            ctxt.exception.address = cr2_or_gpa
            if machine.mmu.direct:
                ctxt.gpa_available = True
                ctxt.gpa_val = cr2_or_gpa
        else:
            ctxt.exception.address = 0
        result = x86_emulate_insn(ctxt, check_intercepts)
        if result == EMULATION_INTERCEPTED:
            return 1
        if result == EMULATION_FAILED:
            if _unprotect_and_retry_on_failure(machine, cr2_or_gpa, emulation_type):
                return 1
            return handle_emulation_failure(machine, emulation_type)
        done = _conclude(machine, result)
        if done is not None:
            return done
        machine.restarts += 1


def _conclude(machine: KvmMachine, result: int) -> int | None:
    """What to do after one run of the emulator; None to run it again (REP)."""
    vcpu, ctxt, pio, mmio = machine.vcpu, machine.ctxt, machine.pio, machine.mmio
    if ctxt.have_exception:
        mmio.needed = False
        _inject_emulated_exception(vcpu, ctxt)
        return _writeback(machine, 1)
    if pio.count:
        if pio.in_:
            return _wait(machine, complete_emulated_pio(machine))
        # KVM deviation: userspace is told, but nothing waits for it (SDM Vol. 1 19.6)
        pio.count = 0
        return _writeback(machine, 0)
    if mmio.needed:
        if not mmio.is_write:
            return _wait(machine, complete_emulated_mmio(machine))
        vcpu.complete_userspace_io = complete_emulated_mmio(machine)
        return _writeback(machine, 0)
    if vcpu.complete_userspace_io is not None:
        machine.regs_need_sync_to_vcpu = True
        return 0
    return None if result == EMULATION_RESTART else _writeback(machine, 1)


def _wait(machine: KvmMachine, completion: CompleteUserspaceIo) -> int:
    """Leave in the middle of the instruction; its registers stay in the emulator's cache."""
    machine.vcpu.complete_userspace_io = completion
    machine.regs_need_sync_to_vcpu = True
    return 0


def _writeback(machine: KvmMachine, r: int) -> int:
    """Hand RIP, RFLAGS and shadow to the vCPU, and step if TF was set.

    KVM deviation: REP counts as one instruction however often it ran, so single step stops once in
    up to 1024 iterations; an instruction that ended without a result (a locked exchange that failed,
    memory that only userspace could give) commits its flags and steps as well (SDM Vol. 3B 17.3.1.4).
    """
    vcpu, ctxt = machine.vcpu, machine.ctxt
    rflags = vmx_get_rflags(vcpu)
    toggle_interruptibility(vcpu, ctxt.interruptibility)
    machine.regs_need_sync_to_vcpu = False
    if not ctxt.have_exception or exception_type(ctxt.exception.vector) == EXCPT_TRAP:
        machine.retired += 1
        kvm_rip_write(vcpu, ctxt.eip & MASK64)
        if r and (ctxt.tf or vcpu.guest_debug & KVM_GUESTDBG_SINGLESTEP):
            r = kvm_vcpu_do_singlestep(vcpu)
        vmx_update_emulated_instruction(vcpu)
        set_rflags_no_event(vcpu, ctxt.eflags)
    if ctxt.eflags & ~rflags & X86_EFLAGS_IF:
        vcpu.make_request(KVM_REQ_EVENT)
    return r


# -- faults and failures -------------------------------------------------------------------------


def _inject_emulated_exception(vcpu: Vcpu, ctxt: X86EmulateCtxt) -> None:
    exception = ctxt.exception
    if exception.vector == ex.PF_VECTOR:
        kvm_inject_emulated_page_fault(vcpu, exception)
    elif exception.error_code_valid:
        kvm_queue_exception_e(vcpu, exception.vector, exception.error_code)
    else:
        kvm_queue_exception(vcpu, exception.vector)


def _unprotect_and_retry_on_failure(machine: KvmMachine, cr2_or_gpa: int, emulation_type: int) -> bool:
    """A write to a shadowed table that cannot be emulated: give up the table, let the CPU do it.

    Not if the instruction uses the table itself: it would fault for ever.
    """
    if not emulation_type & et.EMULTYPE_ALLOW_RETRY_PF or emulation_type & et.EMULTYPE_WRITE_PF_TO_SP:
        return False
    kvm_mmu_unprotect_gfn_and_retry(machine.mmu, cr2_or_gpa, always_retry=True)
    return True


def handle_emulation_failure(machine: KvmMachine, emulation_type: int) -> int:
    """The instruction cannot be emulated: #GP, #UD, or an exit to userspace.

    KVM deviation: at CPL 0 both #UD is queued and userspace is told; if that resumes the guest it
    gets the #UD (SDM Vol. 2B UD: #UD is for opcodes that are undefined).
    """
    vcpu = machine.vcpu
    _trace_insn(machine, failed=True)
    if emulation_type & et.EMULTYPE_VMWARE_GP:
        kvm_queue_exception_e(vcpu, ex.GP_VECTOR, 0)
        return 1
    if vcpu.options.exit_on_emulation_error or emulation_type & et.EMULTYPE_SKIP:
        prepare_emulation_failure_exit(vcpu, machine.ctxt.fetch_data)
        return 0
    kvm_queue_exception(vcpu, ex.UD_VECTOR)
    if vcpu.guest_mode is None and not vmx_get_cpl(vcpu):
        prepare_emulation_failure_exit(vcpu, machine.ctxt.fetch_data)
        return 0
    return 1


def prepare_emulation_failure_exit(vcpu: Vcpu, insn: bytes = b"") -> None:
    """KVM_EXIT_INTERNAL_ERROR with the exit's information, and the instruction if it was fetched.

    `info` are exit reason, qualification, vectoring information, interruption information and error
    code; `insn_bytes` are 15, filled up with NOPs, `insn_size` how many of them count.
    """
    data: dict[str, object] = {
        "suberror": KVM_INTERNAL_ERROR_EMULATION, "flags": 0, "info": list(vmx_get_exit_info(vcpu))
    }  # fmt: skip
    if insn:
        data["flags"] = KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        data["insn_size"] = len(insn)
        data["insn_bytes"] = insn.ljust(_INSN_BYTES, _NOP)
    vcpu.run.leave(KVM_EXIT_INTERNAL_ERROR, **data)

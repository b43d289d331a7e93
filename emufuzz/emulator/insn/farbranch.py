"""Far transfers, real-mode interrupts, fast system calls (SDM Vol. 2, Vol. 3A 5.8, Vol. 3B 21.1.4).

emulate.c: em_jmp_far, em_call_far, em_ret_far, emulate_int, em_iret, em_syscall, em_sysenter,
em_sysexit, em_rsm.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.regs import VCPU_SREG_CS
from emufuzz.arch.rflags import (
    EFLAGS_MASK,
    X86_EFLAGS_AC,
    X86_EFLAGS_DF,
    X86_EFLAGS_FIXED,
    X86_EFLAGS_ID,
    X86_EFLAGS_IF,
    X86_EFLAGS_IOPL,
    X86_EFLAGS_NT,
    X86_EFLAGS_OF,
    X86_EFLAGS_RF,
    X86_EFLAGS_TF,
    X86_EFLAGS_VIF,
    X86_EFLAGS_VIP,
    X86_EFLAGS_VM,
)
from emufuzz.emulator.access import (
    assign_eip_far,
    emulate_pop,
    emulate_push,
    emulator_recalc_and_set_mode,
    linear_read_system,
    rsp_increment,
)
from emufuzz.emulator.ctxt import (
    X86EmulateCtxt,
    emulator_invalidate_register_cache,
    writeback_registers,
)
from emufuzz.emulator.faults import emulate_gp, emulate_ud
from emufuzz.emulator.insn.stack import em_push
from emufuzz.emulator.segments import (
    X86_TRANSFER_CALL_JMP,
    X86_TRANSFER_RET,
    _load_segment_descriptor,
    get_segment_selector,
    load_segment_descriptor,
)
from emufuzz.emulator.x86emul import (
    MASK16,
    MASK64,
    X86EMUL_CONTINUE,
    X86EMUL_MODE_REAL,
    X86EMUL_UNHANDLEABLE,
)

#: Flags that a 32-bit real-mode IRET takes from the stack, and those that it keeps.
_IRET_MASK: Final = (
    EFLAGS_MASK | X86_EFLAGS_TF | X86_EFLAGS_IF | X86_EFLAGS_DF | X86_EFLAGS_IOPL | X86_EFLAGS_NT
    | X86_EFLAGS_RF | X86_EFLAGS_AC | X86_EFLAGS_ID | X86_EFLAGS_FIXED
)  # fmt: skip
_IRET_KEPT: Final = X86_EFLAGS_VM | X86_EFLAGS_VIF | X86_EFLAGS_VIP
#: Bits of RFLAGS that are always zero.
EFLG_RESERVED_ZEROS_MASK: Final = 0xFFC0802A


def _far_pointer_selector(ctxt: X86EmulateCtxt) -> int:
    return ctxt.src.val >> ctxt.op_bytes * 8 & MASK16


def em_jmp_far(ctxt: X86EmulateCtxt) -> int:
    """JMP ptr16:16/32 and m16:16/32/64.

    KVM deviation: a bad target offset is unhandleable, with CS replaced already (SDM Vol. 2A JMP).
    """
    cpl = ctxt.ops.cpl(ctxt)
    rc = _load_segment_descriptor(ctxt, _far_pointer_selector(ctxt), VCPU_SREG_CS, cpl, X86_TRANSFER_CALL_JMP)
    if rc != X86EMUL_CONTINUE:
        return rc
    return _far_target(ctxt, ctxt.src.val)


def _far_target(ctxt: X86EmulateCtxt, target: int) -> int:
    """Branch after CS was loaded; every failure is unhandleable."""
    if assign_eip_far(ctxt, target) == X86EMUL_CONTINUE:
        return X86EMUL_CONTINUE
    ctxt.fail_reason = "far branch to an offset that CS does not allow"
    return X86EMUL_UNHANDLEABLE


def em_call_far(ctxt: X86EmulateCtxt) -> int:
    """CALL ptr16:16/32 and m16:16/32/64.

    KVM deviation: on a fault CS is restored with bits 63:32 of its base cleared, and what was
    pushed stays in memory (SDM Vol. 2A CALL).
    """
    ops = ctxt.ops
    cpl = ops.cpl(ctxt)
    previous_mode = ctxt.mode
    return_eip = ctxt.next_eip
    old = ops.get_segment(ctxt, VCPU_SREG_CS)
    rc = _load_segment_descriptor(ctxt, _far_pointer_selector(ctxt), VCPU_SREG_CS, cpl, X86_TRANSFER_CALL_JMP)
    if rc != X86EMUL_CONTINUE:
        return rc
    rc = assign_eip_far(ctxt, ctxt.src.val)
    for value in (old.selector, return_eip):
        if rc == X86EMUL_CONTINUE:
            ctxt.src.val = value
            rc = em_push(ctxt)
    if rc != X86EMUL_CONTINUE:
        ops.set_segment(ctxt, old.selector, old.desc, 0, VCPU_SREG_CS)
        ctxt.mode = previous_mode
    return rc


def em_ret_far(ctxt: X86EmulateCtxt) -> int:
    """RETF.

    KVM deviation: a return to an outer privilege level and a bad offset are unhandleable, the
    latter with CS replaced already (SDM Vol. 2B RET).
    """
    cpl = ctxt.ops.cpl(ctxt)
    eip = emulate_pop(ctxt, ctxt.op_bytes)
    if eip < 0:
        return -eip
    cs = emulate_pop(ctxt, ctxt.op_bytes)
    if cs < 0:
        return -cs
    rc = _load_segment_descriptor(ctxt, cs & MASK16, VCPU_SREG_CS, cpl, X86_TRANSFER_RET)
    if rc != X86EMUL_CONTINUE:
        return rc
    return _far_target(ctxt, eip)


def em_ret_far_imm(ctxt: X86EmulateCtxt) -> int:
    """RETF imm16."""
    rc = em_ret_far(ctxt)
    if rc == X86EMUL_CONTINUE:
        rsp_increment(ctxt, ctxt.src.val)
    return rc


def _emulate_int_real(ctxt: X86EmulateCtxt, irq: int) -> int:
    """Deliver an interrupt through the real-mode IVT (KVM: __emulate_int_real).

    KVM deviation: the frame has operand size, so 66 makes it 32-bit, and the limit of IDTR is
    not checked (SDM Vol. 3B 21.1.4).
    """
    rc = emulate_push(ctxt, ctxt.eflags, ctxt.op_bytes)
    if rc != X86EMUL_CONTINUE:
        return rc
    ctxt.eflags &= ~(X86_EFLAGS_IF | X86_EFLAGS_TF | X86_EFLAGS_AC)
    for value in (get_segment_selector(ctxt, VCPU_SREG_CS), ctxt.next_eip):
        rc = emulate_push(ctxt, value, ctxt.op_bytes)
        if rc != X86EMUL_CONTINUE:
            return rc
    entry = ctxt.ops.get_idt(ctxt)[0] + (irq << 2)
    rc, cs = linear_read_system(ctxt, entry + 2 & MASK64, 2)
    if rc != X86EMUL_CONTINUE:
        return rc
    rc, eip = linear_read_system(ctxt, entry & MASK64, 2)
    if rc != X86EMUL_CONTINUE:
        return rc
    rc = load_segment_descriptor(ctxt, int.from_bytes(cs, "little"), VCPU_SREG_CS)
    if rc == X86EMUL_CONTINUE:
        ctxt.next_eip = int.from_bytes(eip, "little")
    return rc


def emulate_int_real(ctxt: X86EmulateCtxt, irq: int) -> int:
    """Inject interrupt `irq` (0..255) into a real-mode guest from outside any instruction."""
    emulator_invalidate_register_cache(ctxt)
    rc = _emulate_int_real(ctxt, irq)
    if rc == X86EMUL_CONTINUE:
        writeback_registers(ctxt)
    return rc


def _emulate_int(ctxt: X86EmulateCtxt, irq: int) -> int:
    """KVM deviation: software interrupts outside real mode are unhandleable (SDM Vol. 2A INT n)."""
    if ctxt.mode == X86EMUL_MODE_REAL:
        return _emulate_int_real(ctxt, irq)
    ctxt.fail_reason = "software interrupt outside real mode"
    return X86EMUL_UNHANDLEABLE


def sw_int3(ctxt: X86EmulateCtxt) -> int:
    """INT3."""
    return _emulate_int(ctxt, 3)


def sw_int(ctxt: X86EmulateCtxt) -> int:
    """INT n.

    KVM deviation: the vector is a sign-extended byte, so 80h..FFh index below the IVT
    (SDM Vol. 2A INT n).
    """
    vector = ctxt.src.val & 0xFF
    return _emulate_int(ctxt, vector - 0x100 if vector & 0x80 else vector)


def sw_into(ctxt: X86EmulateCtxt) -> int:
    """INTO: interrupt 4 if RFLAGS.OF."""
    return _emulate_int(ctxt, 4) if ctxt.eflags & X86_EFLAGS_OF else X86EMUL_CONTINUE


def em_iret(ctxt: X86EmulateCtxt) -> int:
    """IRET.

    KVM deviation: outside real mode it is unhandleable (SDM Vol. 2A IRET).
    """
    if ctxt.mode == X86EMUL_MODE_REAL:
        return _emulate_iret_real(ctxt)
    ctxt.fail_reason = "IRET outside real mode"
    return X86EMUL_UNHANDLEABLE


def _emulate_iret_real(ctxt: X86EmulateCtxt) -> int:
    """IRET within real mode (KVM: emulate_iret_real).

    KVM deviation: EIP is checked against FFFF, not against the limit of CS (SDM Vol. 2A IRET).
    """
    size = ctxt.op_bytes
    eip = emulate_pop(ctxt, size)
    if eip < 0:
        return -eip
    if eip & ~0xFFFF:
        return emulate_gp(ctxt, 0)
    cs = emulate_pop(ctxt, size)
    if cs < 0:
        return -cs
    flags = emulate_pop(ctxt, size)
    if flags < 0:
        return -flags
    rc = load_segment_descriptor(ctxt, cs & MASK16, VCPU_SREG_CS)
    if rc != X86EMUL_CONTINUE:
        return rc
    ctxt.next_eip = eip
    if size == 4:
        flags = flags & _IRET_MASK | ctxt.eflags & _IRET_KEPT
    else:
        flags |= ctxt.eflags & ~0xFFFF
    ctxt.eflags = flags & ~EFLG_RESERVED_ZEROS_MASK | X86_EFLAGS_FIXED
    ctxt.ops.set_nmi_mask(ctxt, masked=False)
    return X86EMUL_CONTINUE


def em_rsm(ctxt: X86EmulateCtxt) -> int:
    """RSM: leave system-management mode; an invalid saved state shuts the processor down."""
    if not ctxt.ops.is_smm(ctxt):
        return emulate_ud(ctxt)
    if ctxt.ops.leave_smm(ctxt) != X86EMUL_CONTINUE:
        ctxt.ops.triple_fault(ctxt)
    return emulator_recalc_and_set_mode(ctxt)

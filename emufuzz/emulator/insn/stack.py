"""Stack instructions (SDM Vol. 1 6.2, Vol. 2: PUSH, POP, PUSHA, POPF, ENTER, LEAVE ...).

emulate.c: em_push .. em_popf, em_enter, em_leave, em_push_sreg.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.regs import (
    VCPU_REGS_RAX,
    VCPU_REGS_RBP,
    VCPU_REGS_RDI,
    VCPU_REGS_RSP,
)
from emufuzz.arch.rflags import (
    EFLAGS_MASK,
    X86_EFLAGS_AC,
    X86_EFLAGS_DF,
    X86_EFLAGS_ID,
    X86_EFLAGS_IF,
    X86_EFLAGS_IOPL,
    X86_EFLAGS_IOPL_BIT,
    X86_EFLAGS_NT,
    X86_EFLAGS_TF,
    X86_EFLAGS_VM,
)
from emufuzz.emulator.access import (
    assign_masked,
    emulate_pop,
    emulate_push,
    rsp_increment,
    stack_mask,
    stack_size,
)
from emufuzz.emulator.ctxt import X86EmulateCtxt, assign_register, reg_read, reg_rmw, reg_write
from emufuzz.emulator.execute import REG_EFLAGS
from emufuzz.emulator.faults import emulate_gp
from emufuzz.emulator.x86emul import (
    OPERAND_NONE,
    OPERAND_REG,
    X86EMUL_CONTINUE,
    X86EMUL_MODE_PROT16,
    X86EMUL_MODE_VM86,
    X86EMUL_UNHANDLEABLE,
)

#: Flags that POPF changes at any privilege.
_POPF_ALWAYS: Final = (
    EFLAGS_MASK | X86_EFLAGS_TF | X86_EFLAGS_DF | X86_EFLAGS_NT | X86_EFLAGS_AC | X86_EFLAGS_ID
)


def em_push(ctxt: X86EmulateCtxt) -> int:
    """PUSH of a register, memory operand or immediate."""
    ctxt.dst.type = OPERAND_NONE
    return emulate_push(ctxt, ctxt.src.val, ctxt.op_bytes)


def em_pop(ctxt: X86EmulateCtxt) -> int:
    """POP r/m."""
    value = emulate_pop(ctxt, ctxt.op_bytes)
    if value < 0:
        return -value
    ctxt.dst.val = value
    return X86EMUL_CONTINUE


def em_push_sreg(ctxt: X86EmulateCtxt) -> int:
    """PUSH Sreg: a 32-bit push writes only 16 bits of its slot (SDM Vol. 2B PUSH)."""
    ctxt.src.val = ctxt.ops.get_segment(ctxt, ctxt.src2.val).selector
    if ctxt.op_bytes == 4:
        rsp_increment(ctxt, -2)
        ctxt.op_bytes = 2
    return em_push(ctxt)


def em_pusha(ctxt: X86EmulateCtxt) -> int:
    """PUSHA/PUSHAD: RAX to RDI, with RSP as it was before.

    KVM deviation: what was pushed before a fault stays in memory (SDM Vol. 2B PUSHA).
    """
    old_rsp = reg_read(ctxt, VCPU_REGS_RSP)
    ctxt.dst.type = OPERAND_NONE
    for reg in range(VCPU_REGS_RAX, VCPU_REGS_RDI + 1):
        value = old_rsp if reg == VCPU_REGS_RSP else reg_read(ctxt, reg)
        rc = emulate_push(ctxt, value, ctxt.op_bytes)
        if rc != X86EMUL_CONTINUE:
            return rc
    return X86EMUL_CONTINUE


def em_popa(ctxt: X86EmulateCtxt) -> int:
    """POPA/POPAD: RDI to RAX; the stored RSP is skipped."""
    for reg in range(VCPU_REGS_RDI, VCPU_REGS_RAX - 1, -1):
        if reg == VCPU_REGS_RSP:
            rsp_increment(ctxt, ctxt.op_bytes)
            continue
        value = emulate_pop(ctxt, ctxt.op_bytes)
        if value < 0:
            return -value
        assign_register(ctxt, reg, value, ctxt.op_bytes)
    return X86EMUL_CONTINUE


def em_pushf(ctxt: X86EmulateCtxt) -> int:
    """PUSHF/PUSHFD/PUSHFQ.

    KVM deviation: no #GP in virtual-8086 mode with IOPL < 3 (SDM Vol. 2B PUSHF).
    """
    ctxt.src.val = ctxt.eflags & ~X86_EFLAGS_VM
    return em_push(ctxt)


def em_popf(ctxt: X86EmulateCtxt) -> int:
    """POPF/POPFD/POPFQ (SDM Vol. 2B POPF).

    KVM deviation: in virtual-8086 mode IOPL is looked at only after the stack was read; CR4.VME
    and CR4.PVI with VIF and VIP are not known (SDM Vol. 3B 21.3.3).
    """
    dst = ctxt.dst
    dst.type = OPERAND_REG
    dst.reg = REG_EFLAGS
    dst.shift = 0
    dst.bytes = ctxt.op_bytes
    return emulate_popf(ctxt, ctxt.op_bytes)


def emulate_popf(ctxt: X86EmulateCtxt, size: int) -> int:
    """Pop flags of `size` bytes into ctxt.dst.val, changing only what mode and privilege allow."""
    iopl = (ctxt.eflags & X86_EFLAGS_IOPL) >> X86_EFLAGS_IOPL_BIT
    cpl = ctxt.ops.cpl(ctxt)
    value = emulate_pop(ctxt, size)
    if value < 0:
        return -value
    change = _POPF_ALWAYS
    if ctxt.mode >= X86EMUL_MODE_PROT16:
        if cpl == 0:
            change |= X86_EFLAGS_IOPL
        if cpl <= iopl:
            change |= X86_EFLAGS_IF
    elif ctxt.mode == X86EMUL_MODE_VM86:
        if iopl < 3:
            return emulate_gp(ctxt, 0)
        change |= X86_EFLAGS_IF
    else:
        change |= X86_EFLAGS_IOPL | X86_EFLAGS_IF
    ctxt.dst.val = ctxt.eflags & ~change | value & change
    return X86EMUL_CONTINUE


def em_enter(ctxt: X86EmulateCtxt) -> int:
    """ENTER imm16, imm8 (SDM Vol. 2A ENTER; Vol. 1 6.6).

    KVM deviation: nesting levels above 0 are unhandleable; the push has the stack's address
    size, not the operand size; the new frame is not probed.
    """
    if ctxt.src2.val & 31:
        ctxt.fail_reason = "ENTER with a nesting level"
        return X86EMUL_UNHANDLEABLE
    rc = emulate_push(ctxt, reg_read(ctxt, VCPU_REGS_RBP), stack_size(ctxt))
    if rc != X86EMUL_CONTINUE:
        return rc
    mask = stack_mask(ctxt)
    assign_masked(ctxt, VCPU_REGS_RBP, reg_read(ctxt, VCPU_REGS_RSP), mask)
    assign_masked(ctxt, VCPU_REGS_RSP, reg_read(ctxt, VCPU_REGS_RSP) - ctxt.src.val, mask)
    return X86EMUL_CONTINUE


def em_leave(ctxt: X86EmulateCtxt) -> int:
    """LEAVE: RSP := RBP under the stack mask, then the low bytes of RBP are popped."""
    assign_masked(ctxt, VCPU_REGS_RSP, reg_read(ctxt, VCPU_REGS_RBP), stack_mask(ctxt))
    reg_rmw(ctxt, VCPU_REGS_RBP)
    value = emulate_pop(ctxt, ctxt.op_bytes)
    if value < 0:
        return -value
    mask = (1 << ctxt.op_bytes * 8) - 1
    reg_write(ctxt, VCPU_REGS_RBP, reg_read(ctxt, VCPU_REGS_RBP) & ~mask | value)
    return X86EMUL_CONTINUE

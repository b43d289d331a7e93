"""Near branches (SDM Vol. 2: Jcc, JMP, CALL, RET, LOOPcc, JrCXZ).

emulate.c: em_call, em_ret, em_loop, em_jcxz and rows of the opcode switch. Targets are checked
against CS before anything is pushed.
"""

from __future__ import annotations

from emufuzz.arch.regs import VCPU_REGS_RCX
from emufuzz.arch.rflags import X86_EFLAGS_ZF
from emufuzz.emulator.access import (
    address_mask,
    assign_eip,
    emulate_pop,
    jmp_rel,
    register_address_increment,
    rsp_increment,
)
from emufuzz.emulator.ctxt import X86EmulateCtxt, reg_read
from emufuzz.emulator.eflags import test_cc
from emufuzz.emulator.insn.stack import em_push
from emufuzz.emulator.x86emul import OPERAND_NONE, X86EMUL_CONTINUE


def sw_jcc(ctxt: X86EmulateCtxt) -> int:
    """Jcc rel8 (70..7F) and rel16/32 (0F 80..8F)."""
    if test_cc(ctxt.b, ctxt.eflags):
        return jmp_rel(ctxt, ctxt.src.val)
    return X86EMUL_CONTINUE


def sw_jmp_rel(ctxt: X86EmulateCtxt) -> int:
    """JMP rel8 and rel16/32."""
    ctxt.dst.type = OPERAND_NONE
    return jmp_rel(ctxt, ctxt.src.val)


def em_jmp_abs(ctxt: X86EmulateCtxt) -> int:
    """JMP r/m (FF /4)."""
    return assign_eip(ctxt, ctxt.src.val)


def em_call(ctxt: X86EmulateCtxt) -> int:
    """CALL rel16/32."""
    return_address = ctxt.next_eip
    rc = jmp_rel(ctxt, ctxt.src.val)
    if rc != X86EMUL_CONTINUE:
        return rc
    ctxt.src.val = return_address
    return em_push(ctxt)


def em_call_near_abs(ctxt: X86EmulateCtxt) -> int:
    """CALL r/m (FF /2)."""
    return_address = ctxt.next_eip
    rc = assign_eip(ctxt, ctxt.src.val)
    if rc != X86EMUL_CONTINUE:
        return rc
    ctxt.src.val = return_address
    return em_push(ctxt)


def em_ret(ctxt: X86EmulateCtxt) -> int:
    """RET."""
    eip = emulate_pop(ctxt, ctxt.op_bytes)
    return assign_eip(ctxt, eip) if eip >= 0 else -eip


def em_ret_near_imm(ctxt: X86EmulateCtxt) -> int:
    """RET imm16: the parameters are dropped after the target was checked."""
    rc = em_ret(ctxt)
    if rc == X86EMUL_CONTINUE:
        rsp_increment(ctxt, ctxt.src.val)
    return rc


def em_loop(ctxt: X86EmulateCtxt) -> int:
    """LOOP, LOOPE (E1), LOOPNE (E0); the count has address size."""
    register_address_increment(ctxt, VCPU_REGS_RCX, -1)
    if address_mask(ctxt, reg_read(ctxt, VCPU_REGS_RCX)):
        zf = ctxt.eflags & X86_EFLAGS_ZF
        if ctxt.b == 0xE2 or bool(zf) == (ctxt.b == 0xE1):
            return jmp_rel(ctxt, ctxt.src.val)
    return X86EMUL_CONTINUE


def em_jcxz(ctxt: X86EmulateCtxt) -> int:
    """JCXZ, JECXZ, JRCXZ, by address size."""
    if not address_mask(ctxt, reg_read(ctxt, VCPU_REGS_RCX)):
        return jmp_rel(ctxt, ctxt.src.val)
    return X86EMUL_CONTINUE

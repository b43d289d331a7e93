"""Execution of a decoded instruction: ordered checks, operand reads, handler, writeback, REP.

emulate.c: x86_emulate_insn, writeback, string_insn_completed, string_addr_inc,
string_registers_quirk. SDM Vol. 3A 6.9 "Prioritization of Concurrent Events".
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import X86_CR0_EM, X86_CR0_TS, X86_CR4_OSFXSR
from emufuzz.arch.exceptions import MF_VECTOR, PF_VECTOR, PFERR_WRITE
from emufuzz.arch.rflags import X86_EFLAGS_DF, X86_EFLAGS_RF, X86_EFLAGS_ZF
from emufuzz.emulator.access import (
    ADDRESS_MASK,
    register_address_increment,
    segmented_cmpxchg,
    segmented_read,
    segmented_write,
)
from emufuzz.emulator.ctxt import (
    Operand,
    X86EmulateCtxt,
    reg_read,
    reg_write,
    writeback_registers,
)
from emufuzz.emulator.faults import emulate_exception, emulate_gp, emulate_nm, emulate_ud
from emufuzz.emulator.flags import (
    OP_DI,
    OP_IMPLICIT,
    OP_MEMFADDR,
    OP_SI,
    CheckPerm,
    Intercept,
    Lock,
    Mmx,
    Mov,
    No64,
    NoAccess,
    NoWrite,
    Priv,
    PrivUD,
    Prot,
    SrcWrite,
    Sse,
    String,
    Undefined,
)
from emufuzz.emulator.opcode import Opcode
from emufuzz.emulator.x86emul import (
    EMULATION_FAILED,
    EMULATION_INTERCEPTED,
    EMULATION_OK,
    EMULATION_RESTART,
    MASK32,
    OPERAND_MEM,
    OPERAND_MEM_STR,
    OPERAND_MM,
    OPERAND_REG,
    OPERAND_XMM,
    REPE_PREFIX,
    REPNE_PREFIX,
    SIZE_MASK,
    X86EMUL_CONTINUE,
    X86EMUL_INTERCEPTED,
    X86EMUL_MODE_PROT16,
    X86EMUL_MODE_PROT64,
    X86EMUL_PROPAGATE_FAULT,
    X86EMUL_UNHANDLEABLE,
)

VCPU_REGS_RCX: Final = 1
VCPU_REGS_RSI: Final = 6
VCPU_REGS_RDI: Final = 7
#: Pseudo register number: the operand is EFLAGS (POPF).
REG_EFLAGS: Final = 16

# Stages at which a nested hypervisor is asked (enum x86_intercept_stage).
X86_ICPT_PRE_EXCEPT: Final = 1
X86_ICPT_POST_EXCEPT: Final = 2
X86_ICPT_POST_MEMACCESS: Final = 3

_CHECKED: Final = No64 | Undefined | Sse | Mmx | Intercept | CheckPerm | Priv | Prot | String
#: KVM leaves to the guest after so many iterations of a REP, for interrupts.
_REP_CHUNK: Final = 0x3FF
#: CPUID.00H EBX, EDX, ECX: "GenuineIntel".
_GENUINE_INTEL: Final = (0x756E6547, 0x49656E69, 0x6C65746E)
#: Not an X86EMUL_* result: the instruction is complete, skip to the commit.
_DONE: Final = -2


def x86_emulate_insn(ctxt: X86EmulateCtxt, check_intercepts: bool = False) -> int:
    """Run the decoded instruction once (one iteration of a REP): an EMULATION_* result.

    EMULATION_OK with ctxt.have_exception set means a fault for the guest. GPRs are handed to the
    vcpu on success only; ctxt.eip and ctxt.eflags are the caller's to commit. ctxt.rc keeps the
    X86EMUL_* result.
    """
    opcode = ctxt.opcode
    if opcode is None:
        raise ValueError("x86_emulate_insn needs a decoded instruction")
    ctxt.mem_read_pos = 0
    ctxt.check_intercepts = check_intercepts
    d = ctxt.d
    rc = X86EMUL_CONTINUE
    lock_illegal = ctxt.lock_prefix and not (d & Lock and ctxt.dst.type == OPERAND_MEM)
    if lock_illegal or (opcode.src == OP_MEMFADDR and ctxt.src.type != OPERAND_MEM):
        rc = emulate_ud(ctxt)
    elif d & _CHECKED:
        rc = _check(ctxt, opcode)
        if rc == _DONE:
            return _finish(ctxt, X86EMUL_CONTINUE)
    if rc == X86EMUL_CONTINUE:
        rc = _read_operands(ctxt, opcode)
    if rc == X86EMUL_CONTINUE and check_intercepts and d & Intercept:
        rc = ctxt.ops.intercept(ctxt, X86_ICPT_POST_MEMACCESS)
    if rc != X86EMUL_CONTINUE:
        return _finish(ctxt, rc)
    return _execute(ctxt, opcode)


def _execute(ctxt: X86EmulateCtxt, opcode: Opcode) -> int:
    """Handler, writeback, string registers, and the decision to go on with a REP."""
    d = ctxt.d
    repeated = ctxt.rep_prefix and d & String
    if repeated:
        ctxt.eflags |= X86_EFLAGS_RF
    else:
        ctxt.eflags &= ~X86_EFLAGS_RF
    execute = opcode.execute
    if execute is None:
        # KVM deviation: ENDBR and other NOPs of 0F 19..1E, RDTSCP, MONITOR, MWAIT, INT1 and the
        # SVM instructions pass all checks, then fail (SDM Vol. 2B NOP, RDTSCP; APM Vol. 3 VMRUN).
        ctxt.fail_reason = "decoded, but KVM has no code for it"
        return _finish(ctxt, X86EMUL_UNHANDLEABLE)
    dst = ctxt.dst
    dst_type = dst.type
    rc = execute(ctxt)
    if rc == X86EMUL_CONTINUE and d & SrcWrite:
        rc = writeback(ctxt, ctxt.src)
    if rc == X86EMUL_CONTINUE and not d & NoWrite:
        rc = writeback(ctxt, dst)
    if rc != X86EMUL_CONTINUE:
        return _finish(ctxt, rc)
    dst.type = dst_type  # a string instruction uses the decoded operand again
    if d & String:
        if opcode.src == OP_SI:
            string_addr_inc(ctxt, VCPU_REGS_RSI, ctxt.src)
        if opcode.dst == OP_DI:
            string_addr_inc(ctxt, VCPU_REGS_RDI, dst)
        if repeated:
            count = ctxt.src.count if opcode.src == OP_SI else dst.count
            register_address_increment(ctxt, VCPU_REGS_RCX, -count)
            if not string_insn_completed(ctxt):
                return _next_iteration(ctxt)
            ctxt.eflags &= ~X86_EFLAGS_RF
    ctxt.eip = ctxt.next_eip if ctxt.mode == X86EMUL_MODE_PROT64 else ctxt.next_eip & MASK32
    return _finish(ctxt, X86EMUL_CONTINUE)


def _next_iteration(ctxt: X86EmulateCtxt) -> int:
    """Go on with a REP, or leave so that the guest starts the rest anew at the same RIP.

    Without read-ahead KVM leaves every 1024 iterations; with it, when the buffer is used up.
    """
    read_ahead = len(ctxt.io_read_data)
    if read_ahead:
        again = read_ahead != ctxt.io_read_pos
    else:
        again = reg_read(ctxt, VCPU_REGS_RCX) & _REP_CHUNK != 0
    if again:
        ctxt.mem_read_data = b""
        writeback_registers(ctxt)
        ctxt.rc = X86EMUL_CONTINUE
        return EMULATION_RESTART
    return _finish(ctxt, X86EMUL_CONTINUE)


def _finish(ctxt: X86EmulateCtxt, rc: int) -> int:
    """The end of x86_emulate_insn: turn an X86EMUL_* result into an EMULATION_* one."""
    ctxt.rc = rc
    if rc == X86EMUL_CONTINUE:
        writeback_registers(ctxt)
        return EMULATION_OK
    if rc == X86EMUL_PROPAGATE_FAULT:
        if ctxt.exception.vector > 0x1F:
            ctxt.ops.vm_bugged(ctxt)
            return EMULATION_FAILED
        ctxt.have_exception = True
    if rc == X86EMUL_INTERCEPTED:
        return EMULATION_INTERCEPTED
    return EMULATION_FAILED if rc == X86EMUL_UNHANDLEABLE else EMULATION_OK


def _check(ctxt: X86EmulateCtxt, opcode: Opcode) -> int:
    """The checks that only some instructions have, in KVM's order; _DONE for REP with a zero count."""
    d = ctxt.d
    if d & (No64 | Undefined) and (d & Undefined or ctxt.mode == X86EMUL_MODE_PROT64):
        return emulate_ud(ctxt)
    if d & (Sse | Mmx):
        rc = _check_fpu(ctxt)
        if rc != X86EMUL_CONTINUE:
            return rc
    if ctxt.check_intercepts and opcode.intercept:
        rc = ctxt.ops.intercept(ctxt, X86_ICPT_PRE_EXCEPT)
        if rc != X86EMUL_CONTINUE:
            return rc
    if d & Prot and ctxt.mode < X86EMUL_MODE_PROT16:
        return emulate_ud(ctxt)
    # KVM deviation: privilege comes before the checks of an instruction's own, so an invalid
    # control register at CPL 3 is #GP, not #UD (SDM Vol. 2B MOV CRn).
    if d & Priv and ctxt.ops.cpl(ctxt):
        return emulate_ud(ctxt) if d & PrivUD else emulate_gp(ctxt, 0)
    if d & CheckPerm and opcode.check_perm is not None:
        rc = opcode.check_perm(ctxt)
        if rc != X86EMUL_CONTINUE:
            return rc
    if ctxt.check_intercepts and d & Intercept:
        rc = ctxt.ops.intercept(ctxt, X86_ICPT_POST_EXCEPT)
        if rc != X86EMUL_CONTINUE:
            return rc
    if ctxt.rep_prefix and d & String:
        if not reg_read(ctxt, VCPU_REGS_RCX) & ADDRESS_MASK[ctxt.ad_bytes]:
            string_registers_quirk(ctxt)
            # KVM deviation: outside 64-bit mode EIP is not cut to 32 bits here, and a nested
            # hypervisor is not asked about the memory access (SDM Vol. 2B REP).
            ctxt.eip = ctxt.next_eip
            ctxt.eflags &= ~X86_EFLAGS_RF
            return _DONE
    return X86EMUL_CONTINUE


def _check_fpu(ctxt: X86EmulateCtxt) -> int:
    """CR0.EM, CR4.OSFXSR, CR0.TS and pending x87 faults (SDM Vol. 3A 13.1, Table 13-1)."""
    ops = ctxt.ops
    d = ctxt.d
    cr0 = ops.get_cr(ctxt, 0)
    if cr0 & X86_CR0_EM or (d & Sse and not ops.get_cr(ctxt, 4) & X86_CR4_OSFXSR):
        return emulate_ud(ctxt)
    if cr0 & X86_CR0_TS:
        return emulate_nm(ctxt)
    if d & Mmx:
        if x87_fault_pending(ctxt):
            return emulate_exception(ctxt, MF_VECTOR, 0, valid=False)
        for operand in (ctxt.src, ctxt.src2) if d & Mov else (ctxt.src, ctxt.src2, ctxt.dst):
            if operand.type == OPERAND_MM:
                # KVM deviation: reading a register of a store that then faults has already marked
                # all x87 registers valid (SDM Vol. 3A 6.6).
                operand.val = ctxt.fpu.mm[operand.reg]
                ctxt.fpu.enter_mmx()
    return X86EMUL_CONTINUE


def x87_fault_pending(ctxt: X86EmulateCtxt) -> bool:
    """An unmasked x87 exception waits: FWAIT would raise #MF (SDM Vol. 1 8.1.3.3)."""
    ctxt.fpu.get()
    return bool(ctxt.fpu.fsw & 0x80)


def _read_operands(ctxt: X86EmulateCtxt, opcode: Opcode) -> int:
    """Fetch memory operands: src, src2, then dst unless it is only written."""
    src = ctxt.src
    if src.type == OPERAND_MEM and not ctxt.d & NoAccess:
        value = segmented_read(ctxt, src.seg, src.ea, src.bytes)
        if value < 0:
            return -value
        src.val = src.orig_val = value
    src2 = ctxt.src2
    if src2.type == OPERAND_MEM:
        value = segmented_read(ctxt, src2.seg, src2.ea, src2.bytes)
        if value < 0:
            return -value
        src2.val = value
    if opcode.dst == OP_IMPLICIT:
        return X86EMUL_CONTINUE
    dst = ctxt.dst
    if dst.type == OPERAND_MEM and not ctxt.d & Mov:
        # KVM deviation: a segment that must not be written is found out after the read, whose #PF
        # comes first (SDM Vol. 3A 5.5).
        value = segmented_read(ctxt, dst.seg, dst.ea, dst.bytes)
        if value < 0:
            if (
                not ctxt.d & NoWrite
                and value == -X86EMUL_PROPAGATE_FAULT
                and ctxt.exception.vector == PF_VECTOR
            ):
                ctxt.exception.error_code |= PFERR_WRITE
            return -value
        dst.val = value
    dst.orig_val = dst.val
    return X86EMUL_CONTINUE


def writeback(ctxt: X86EmulateCtxt, op: Operand) -> int:
    """Store an operand's value where it came from (KVM: writeback)."""
    kind = op.type
    if kind == OPERAND_REG:
        _write_register_operand(ctxt, op)
    elif kind == OPERAND_MEM:
        size = op.bytes
        data = (op.val & SIZE_MASK[size]).to_bytes(size, "little")
        if ctxt.lock_prefix:
            return segmented_cmpxchg(ctxt, op.seg, op.ea, op.orig_val.to_bytes(size, "little"), data)
        return segmented_write(ctxt, op.seg, op.ea, data)
    elif kind == OPERAND_MEM_STR:
        return segmented_write(ctxt, op.seg, op.ea, op.data)
    elif kind == OPERAND_XMM:
        ctxt.fpu.xmm[op.reg] = op.val
        ctxt.fpu.dirty = True
    elif kind == OPERAND_MM:
        ctxt.fpu.mm[op.reg] = op.val
        ctxt.fpu.enter_mmx()
    return X86EMUL_CONTINUE


def _write_register_operand(ctxt: X86EmulateCtxt, op: Operand) -> None:
    """8- and 16-bit results merge, 32-bit ones zero-extend (KVM: insn_assign_reg)."""
    size, value, reg = op.bytes, op.val, op.reg
    if size == 4:
        value &= MASK32
    elif size != 8:
        mask = SIZE_MASK[size] << op.shift
        old = ctxt.eflags if reg == REG_EFLAGS else reg_read(ctxt, reg)
        value = old & ~mask | value << op.shift & mask
    if reg == REG_EFLAGS:
        ctxt.eflags = value
    else:
        reg_write(ctxt, reg, value)


def string_addr_inc(ctxt: X86EmulateCtxt, reg: int, op: Operand) -> None:
    """Advance RSI or RDI by the elements done, down if RFLAGS.DF."""
    step = -op.bytes if ctxt.eflags & X86_EFLAGS_DF else op.bytes
    register_address_increment(ctxt, reg, step * op.count)
    op.ea = reg_read(ctxt, reg) & ADDRESS_MASK[ctxt.ad_bytes]


def string_insn_completed(ctxt: X86EmulateCtxt) -> bool:
    """The flag that ends a repeated CMPS or SCAS; the count is looked at when it starts again."""
    if ctxt.b not in (0xA6, 0xA7, 0xAE, 0xAF):
        return False
    zf = ctxt.eflags & X86_EFLAGS_ZF
    return (ctxt.rep_prefix == REPE_PREFIX and not zf) or (ctxt.rep_prefix == REPNE_PREFIX and bool(zf))


def string_registers_quirk(ctxt: X86EmulateCtxt) -> None:
    """KVM deviation: REP with a zero ECX still clears upper halves on Intel (SDM Vol. 2B REP)."""
    if ctxt.ad_bytes != 4:
        return
    _, _, ebx, ecx, edx = ctxt.ops.get_cpuid(ctxt, 0, 0, exact_only=True)
    if (ebx, edx, ecx) != _GENUINE_INTEL:
        return
    reg_write(ctxt, VCPU_REGS_RCX, 0)
    if ctxt.b in (0xA4, 0xA5):
        reg_write(ctxt, VCPU_REGS_RSI, reg_read(ctxt, VCPU_REGS_RSI) & MASK32)
    if ctxt.b in (0xA4, 0xA5, 0xAA, 0xAB):
        reg_write(ctxt, VCPU_REGS_RDI, reg_read(ctxt, VCPU_REGS_RDI) & MASK32)

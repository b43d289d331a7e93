"""Loading segment registers from descriptors (SDM Vol. 3A 3.4.5, 5.4-5.8, 6.13).

emulate.c: get_descriptor_ptr, read_segment_descriptor, __load_segment_descriptor,
load_segment_descriptor, get_segment_selector, set_segment_selector.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import EFER_LMA
from emufuzz.arch.descriptors import DescStruct
from emufuzz.arch.exceptions import GP_VECTOR, NP_VECTOR, SS_VECTOR, TS_VECTOR
from emufuzz.arch.regs import (
    VCPU_SREG_CS,
    VCPU_SREG_GS,
    VCPU_SREG_LDTR,
    VCPU_SREG_SS,
    VCPU_SREG_TR,
)
from emufuzz.emulator.access import MSR_EFER, linear_read_system, linear_write_system
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.faults import emulate_exception, emulate_gp
from emufuzz.emulator.x86emul import (
    MASK16,
    MASK32,
    MASK64,
    X86EMUL_CONTINUE,
    X86EMUL_F_DT_LOAD,
    X86EMUL_MODE_PROT64,
    X86EMUL_MODE_REAL,
    X86EMUL_MODE_VM86,
    X86EMUL_UNHANDLEABLE,
)

# enum x86_transfer_type: why a segment is loaded.
X86_TRANSFER_NONE: Final = 0
X86_TRANSFER_CALL_JMP: Final = 1
X86_TRANSFER_RET: Final = 2
X86_TRANSFER_TASK_SWITCH: Final = 3

#: Verdicts of the descriptor checks that are no X86EMUL_* results.
_LOAD: Final = -1
_REFUSE: Final = -2


def get_segment_selector(ctxt: X86EmulateCtxt, seg: int) -> int:
    """The selector of a segment register."""
    return ctxt.ops.get_segment(ctxt, seg).selector


def set_segment_selector(ctxt: X86EmulateCtxt, selector: int, seg: int) -> None:
    """Replace only the selector of a segment register."""
    state = ctxt.ops.get_segment(ctxt, seg)
    ctxt.ops.set_segment(ctxt, selector, state.desc, state.base3, seg)


def get_descriptor_ptr(ctxt: X86EmulateCtxt, selector: int) -> int:
    """Linear address of a selector's descriptor, or a negative result.

    KVM deviation: a selector beyond the table is #GP(selector) also in a task switch, where the
    SDM has #TS (SDM Vol. 3A 7.3); an LDT limit above 64 KiB is cut to 16 bits.
    """
    base, limit = _descriptor_table(ctxt, selector)
    offset = (selector >> 3) * 8
    if limit < offset + 7:
        return -emulate_gp(ctxt, selector & 0xFFFC)
    addr = base + offset & MASK64
    if addr >> 32 and not ctxt.ops.get_msr(ctxt, MSR_EFER)[1] & EFER_LMA:
        addr &= MASK32
    return addr


def _descriptor_table(ctxt: X86EmulateCtxt, selector: int) -> tuple[int, int]:
    """Base and limit of the GDT or, with the selector's TI bit, of the LDT."""
    if not selector & 4:
        return ctxt.ops.get_gdt(ctxt)
    ldt = ctxt.ops.get_segment(ctxt, VCPU_SREG_LDTR)
    if not ldt.usable:
        return 0, 0
    return ldt.desc.base | ldt.base3 << 32, ldt.desc.limit_scaled & MASK16


def read_segment_descriptor(ctxt: X86EmulateCtxt, selector: int) -> tuple[int, int, DescStruct]:
    """(result, its linear address, descriptor) of a selector."""
    addr = get_descriptor_ptr(ctxt, selector)
    if addr < 0:
        return -addr, 0, DescStruct()
    rc, data = linear_read_system(ctxt, addr, 8)
    if rc != X86EMUL_CONTINUE:
        return rc, addr, DescStruct()
    return rc, addr, DescStruct.unpack(data)


def write_segment_descriptor(ctxt: X86EmulateCtxt, selector: int, desc: DescStruct) -> int:
    """Store a descriptor at its selector's place."""
    addr = get_descriptor_ptr(ctxt, selector)
    if addr < 0:
        return -addr
    return linear_write_system(ctxt, addr, desc.pack())


def load_segment_descriptor(ctxt: X86EmulateCtxt, selector: int, seg: int) -> int:
    """Load a segment register by MOV, POP, LxS, LLDT or LTR at the current privilege."""
    cpl = ctxt.ops.cpl(ctxt)
    if seg == VCPU_SREG_SS and selector == 3 and ctxt.mode == X86EMUL_MODE_PROT64:
        return emulate_gp(ctxt, 0)
    return _load_segment_descriptor(ctxt, selector, seg, cpl, X86_TRANSFER_NONE)


def _load_segment_descriptor(ctxt: X86EmulateCtxt, selector: int, seg: int, cpl: int, transfer: int) -> int:
    """Load `seg` from `selector` at privilege `cpl` (KVM: __load_segment_descriptor)."""
    if ctxt.mode == X86EMUL_MODE_REAL:
        # Limit and attributes stay as they are ("unreal" mode).
        desc = ctxt.ops.get_segment(ctxt, seg).desc.copy()
        desc.base = selector << 4
        return _set(ctxt, selector, desc, 0, seg)
    if ctxt.mode == X86EMUL_MODE_VM86 and seg <= VCPU_SREG_GS:
        desc = DescStruct(selector << 4, 0xFFFF, type=3, s=1, dpl=3, p=1)
        return _set(ctxt, selector, desc, 0, seg)
    if seg == VCPU_SREG_TR and selector & 4:
        return emulate_gp(ctxt, 0)
    if not selector & ~3:
        return _load_null(ctxt, selector, seg, cpl)
    rc, addr, desc = read_segment_descriptor(ctxt, selector)
    if rc != X86EMUL_CONTINUE:
        return rc
    error = selector & 0xFFFC
    vector = TS_VECTOR if transfer == X86_TRANSFER_TASK_SWITCH else GP_VECTOR
    verdict = _check_descriptor(ctxt, desc, selector, seg, cpl, transfer)
    if verdict == _LOAD and not desc.p:
        vector = SS_VECTOR if seg == VCPU_SREG_SS else NP_VECTOR
        verdict = _REFUSE
    if verdict == _REFUSE:
        return emulate_exception(ctxt, vector, error, valid=True)
    if verdict != _LOAD:
        return verdict
    if seg == VCPU_SREG_CS:
        selector = selector & 0xFFFC | cpl
    return _mark_and_set(ctxt, desc, addr, selector, seg, error)


def _set(ctxt: X86EmulateCtxt, selector: int, desc: DescStruct, base3: int, seg: int) -> int:
    ctxt.ops.set_segment(ctxt, selector, desc, base3, seg)
    return X86EMUL_CONTINUE


def _load_null(ctxt: X86EmulateCtxt, selector: int, seg: int, cpl: int) -> int:
    """A null selector: never for CS and TR, for SS in 64-bit mode only."""
    if seg in (VCPU_SREG_CS, VCPU_SREG_TR):
        return emulate_gp(ctxt, 0)
    desc = DescStruct()
    if seg == VCPU_SREG_SS:
        if ctxt.mode != X86EMUL_MODE_PROT64 or selector & 3 != cpl:
            return emulate_gp(ctxt, 0)
        # The CPL lives in SS.DPL, so a usable flat segment stands for the null one.
        desc = DescStruct(type=3, s=1, dpl=cpl, p=1, d=1, g=1)
    return _set(ctxt, selector, desc, 0, seg)


def _check_descriptor(
    ctxt: X86EmulateCtxt, desc: DescStruct, selector: int, seg: int, cpl: int, transfer: int
) -> int:
    """_LOAD, _REFUSE, or an X86EMUL_* result; presence is checked after this."""
    if seg <= VCPU_SREG_GS and not desc.s:
        # KVM deviation: call gates, task gates and TSSs are unhandleable (SDM Vol. 3A 5.8.3).
        return X86EMUL_UNHANDLEABLE if transfer == X86_TRANSFER_CALL_JMP else _REFUSE
    rpl = selector & 3
    dpl, kind = desc.dpl, desc.type
    if seg == VCPU_SREG_SS:
        refused = rpl != cpl or kind & 0xA != 2 or dpl != cpl
    elif seg == VCPU_SREG_CS:
        return _check_code(ctxt, desc, rpl, cpl, transfer)
    elif seg == VCPU_SREG_TR:
        # KVM deviation: a 16-bit TSS is taken in IA-32e mode too (SDM Vol. 3A 7.7).
        refused = bool(desc.s) or kind not in (1, 9)
    elif seg == VCPU_SREG_LDTR:
        # KVM deviation: a selector of the LDT itself is not refused (SDM Vol. 2A LLDT: #GP(selector)).
        refused = bool(desc.s) or kind != 2
    else:
        refused = kind & 0xA == 8 or (kind & 0xC != 0xC and max(rpl, cpl) > dpl)
    return _REFUSE if refused else _LOAD


def _check_code(ctxt: X86EmulateCtxt, desc: DescStruct, rpl: int, cpl: int, transfer: int) -> int:
    """The checks of a CS load (SDM Vol. 3A 5.8.1, 5.8.6)."""
    if transfer == X86_TRANSFER_NONE or not desc.type & 8:
        return _REFUSE
    if transfer == X86_TRANSFER_RET and rpl != cpl:
        # KVM deviation: a return to an outer level is unhandleable (SDM Vol. 3A 5.8.6).
        return _REFUSE if rpl < cpl else X86EMUL_UNHANDLEABLE
    conforming = desc.type & 4
    if transfer == X86_TRANSFER_CALL_JMP:
        refused = desc.dpl > cpl if conforming else rpl > cpl or desc.dpl != cpl
    else:
        refused = desc.dpl > rpl if conforming else desc.dpl != rpl
    if refused:
        return _REFUSE
    if desc.d and desc.l and ctxt.ops.get_msr(ctxt, MSR_EFER)[1] & EFER_LMA:
        return _REFUSE
    return _LOAD


def _mark_and_set(
    ctxt: X86EmulateCtxt, desc: DescStruct, addr: int, selector: int, seg: int, error: int
) -> int:
    """Set the accessed or busy bit in memory, then load the register.

    KVM deviation: the accessed bit is written with a plain 8-byte store (SDM Vol. 3A 9.1.2.2),
    and of a 16-byte system descriptor neither the limit nor the upper type is checked.
    """
    base3 = 0
    if desc.s:
        if not desc.type & 1:
            desc.type |= 1
            rc = write_segment_descriptor(ctxt, selector, desc)
            if rc != X86EMUL_CONTINUE:
                return rc
    elif ctxt.mode == X86EMUL_MODE_PROT64:
        rc, data = linear_read_system(ctxt, addr + 8 & MASK64, 4)
        if rc != X86EMUL_CONTINUE:
            return rc
        base3 = int.from_bytes(data, "little")
        if not ctxt.ops.is_canonical_addr(ctxt, desc.base | base3 << 32, X86EMUL_F_DT_LOAD):
            return emulate_gp(ctxt, error)
    if seg == VCPU_SREG_TR:
        old = desc.pack()
        desc.type |= 2
        rc = ctxt.ops.cmpxchg_emulated(ctxt, addr, old, desc.pack(), ctxt.exception)
        if rc != X86EMUL_CONTINUE:
            return rc
    return _set(ctxt, selector, desc, base3, seg)

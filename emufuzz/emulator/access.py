"""Guest memory as instructions see it: linearize, operand reads and writes, the stack, branch targets.

emulate.c: __linearize, linearize, assign_eip, segmented_read and its kin, stack_mask,
rsp_increment. SDM Vol. 1 3.3.7 (canonical addresses), Vol. 3A 5.3 (limits),
5.4 (types).

Functions that yield a value return it as an int of zero or more, and a failure as the negative
X86EMUL_* result: `if value < 0: return -value`.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import EFER_LMA, X86_CR0_PE, X86_CR4_LA57
from emufuzz.arch.rflags import X86_EFLAGS_VM
from emufuzz.emulator.ctxt import X86EmulateCtxt, reg_read, reg_write
from emufuzz.emulator.faults import emulate_gp, emulate_ss
from emufuzz.emulator.flags import Aligned16, Unaligned
from emufuzz.emulator.x86emul import (
    MASK16,
    MASK32,
    MASK64,
    READ_CACHE_SIZE,
    X86EMUL_CONTINUE,
    X86EMUL_F_FETCH,
    X86EMUL_F_WRITE,
    X86EMUL_MODE_PROT16,
    X86EMUL_MODE_PROT32,
    X86EMUL_MODE_PROT64,
    X86EMUL_MODE_REAL,
    X86EMUL_MODE_VM86,
    X86EMUL_UNHANDLEABLE,
)

VCPU_SREG_CS: Final = 1
VCPU_SREG_SS: Final = 2
VCPU_SREG_FS: Final = 4
VCPU_REGS_RSP: Final = 4
MSR_EFER: Final = 0xC0000080

#: Address or stack size in bytes -> mask of an address of that size.
ADDRESS_MASK: Final = {2: MASK16, 4: MASK32, 8: MASK64}


def address_mask(ctxt: X86EmulateCtxt, address: int) -> int:
    """Truncate to the instruction's address size (KVM: address_mask)."""
    return address & ADDRESS_MASK[ctxt.ad_bytes]


def assign_masked(ctxt: X86EmulateCtxt, reg: int, value: int, mask: int) -> None:
    """Replace the bits of GPR `reg` under `mask`."""
    reg_write(ctxt, reg, reg_read(ctxt, reg) & ~mask & MASK64 | value & mask)


def register_address_increment(ctxt: X86EmulateCtxt, reg: int, inc: int) -> None:
    """Add to GPR `reg` at address size; the 32-bit form zero-extends (KVM: masked_increment)."""
    value = reg_read(ctxt, reg) + inc
    if ctxt.ad_bytes == 2:
        assign_masked(ctxt, reg, value, MASK16)
    else:
        reg_write(ctxt, reg, value & ADDRESS_MASK[ctxt.ad_bytes])


def stack_mask(ctxt: X86EmulateCtxt) -> int:
    """The part of RSP that addresses the stack: all of it in 64-bit mode, else by SS.B."""
    if ctxt.mode == X86EMUL_MODE_PROT64:
        return MASK64
    return MASK32 if ctxt.ops.get_segment(ctxt, VCPU_SREG_SS).desc.d else MASK16


def stack_size(ctxt: X86EmulateCtxt) -> int:
    """Stack address size in bytes: 2, 4 or 8."""
    return {MASK16: 2, MASK32: 4, MASK64: 8}[stack_mask(ctxt)]


def rsp_increment(ctxt: X86EmulateCtxt, inc: int) -> None:
    """Add to RSP under the stack mask, leaving the bits above as they are."""
    mask = stack_mask(ctxt)
    rsp = reg_read(ctxt, VCPU_REGS_RSP)
    reg_write(ctxt, VCPU_REGS_RSP, rsp & ~mask & MASK64 | rsp + inc & mask)


def linearize(ctxt: X86EmulateCtxt, seg: int, ea: int, size: int, flags: int) -> int:
    """Linear address of `size` bytes at seg:ea after all segment checks, or a negative result.

    `flags` are X86EMUL_F_*. Leaves in ctxt.max_size how many bytes from there on may be accessed.
    Faults are #SS(0) for the stack segment, else #GP(0); misalignment is #GP(0).
    """
    if ctxt.mode == X86EMUL_MODE_PROT64:
        la = ea
        if seg >= VCPU_SREG_FS:
            la = ctxt.ops.get_cached_segment_base(ctxt, seg) + ea & MASK64
        if la >> 47:
            la = _linearize_high(ctxt, seg, la, size, flags)
            if la < 0:
                return la
        else:
            ctxt.max_size = MASK32
    else:
        usable, _, desc, _ = ctxt.ops.get_segment(ctxt, seg)
        la = desc.base + ea & MASK32
        kind = desc.type
        limit = desc.limit_scaled
        if not usable or ((flags or kind & 12) and not _type_allows(ctxt, kind, flags)):
            return _segment_fault(ctxt, seg)
        if kind & 12 == 4:
            # Expand-down: valid offsets lie above the limit (SDM Vol. 3A 3.4.5.1).
            if ea <= limit:
                return _segment_fault(ctxt, seg)
            limit = MASK32 if desc.d else MASK16
        if ea > limit:
            return _segment_fault(ctxt, seg)
        # KVM deviation: a 4 GiB segment has no end, so an access may wrap (SDM Vol. 3A 5.3).
        if limit == MASK32:
            ctxt.max_size = MASK32
        else:
            room = limit + 1 - ea
            ctxt.max_size = room
            if size > room:
                return _segment_fault(ctxt, seg)
    if size >= 16 and la & (insn_alignment(ctxt, size) - 1):
        return -emulate_gp(ctxt, 0)
    return la


def _linearize_high(ctxt: X86EmulateCtxt, seg: int, la: int, size: int, flags: int) -> int:
    """64-bit mode, above the lowest 2^47 bytes: address tags and canonicality.

    KVM deviation: only the first byte is tested, and the room reaches to 2^va_bits, so an access
    that straddles the end of the low canonical half does not fault (SDM Vol. 1 3.3.7.1).
    """
    la = ctxt.ops.get_untagged_addr(ctxt, la, flags)
    va_bits = 57 if ctxt.ops.get_cr(ctxt, 4) & X86_CR4_LA57 else 48
    upper = la >> (va_bits - 1)
    if upper and upper != (1 << (65 - va_bits)) - 1:
        return _segment_fault(ctxt, seg)
    # The subtraction is unsigned in C: for the upper half it wraps to a huge room.
    room = min(MASK32, (1 << va_bits) - la & MASK64)
    ctxt.max_size = room
    return la if size <= room else _segment_fault(ctxt, seg)


def _type_allows(ctxt: X86EmulateCtxt, kind: int, flags: int) -> bool:
    """Whether the segment type permits the access.

    KVM deviation: a fetch is not refused from a data segment (SDM Vol. 3A 5.4.1).
    """
    if flags & X86EMUL_F_WRITE and (not kind & 2 or (kind & 8 and ctxt.mode != X86EMUL_MODE_REAL)):
        return False
    return bool(flags & X86EMUL_F_FETCH) or kind & 10 != 8


def _segment_fault(ctxt: X86EmulateCtxt, seg: int) -> int:
    return -(emulate_ss(ctxt, 0) if seg == VCPU_SREG_SS else emulate_gp(ctxt, 0))


def insn_alignment(ctxt: X86EmulateCtxt, size: int) -> int:
    """Alignment in bytes that an operand of 16 bytes or more must have.

    KVM deviation: smaller operands are never checked, so there is no #AC (SDM Vol. 3A 6.15).
    """
    if ctxt.d & Unaligned:
        return 1
    return 16 if ctxt.d & Aligned16 else size


def assign_eip(ctxt: X86EmulateCtxt, target: int) -> int:
    """Check a branch target at operand size against CS, then branch (assign_eip, assign_eip_near)."""
    ea = target & (MASK64 if ctxt.op_bytes == 8 else (1 << (ctxt.op_bytes << 3)) - 1)
    la = linearize(ctxt, VCPU_SREG_CS, ea, 1, X86EMUL_F_FETCH)
    if la < 0:
        return -la
    ctxt.next_eip = ea
    return X86EMUL_CONTINUE


def emulator_recalc_and_set_mode(ctxt: X86EmulateCtxt) -> int:
    """Derive the mode anew from CR0.PE, RFLAGS.VM, EFER.LMA and CS after one of them changed."""
    ops = ctxt.ops
    lma = ops.get_msr(ctxt, MSR_EFER)[1] & EFER_LMA
    if not ops.get_cr(ctxt, 0) & X86_CR0_PE:
        if lma:
            return X86EMUL_UNHANDLEABLE
        ctxt.mode = X86EMUL_MODE_REAL
        return X86EMUL_CONTINUE
    if ctxt.eflags & X86_EFLAGS_VM:
        if lma:
            return X86EMUL_UNHANDLEABLE
        ctxt.mode = X86EMUL_MODE_VM86
        return X86EMUL_CONTINUE
    cs = ops.get_segment(ctxt, VCPU_SREG_CS)
    if not cs.usable:
        return X86EMUL_UNHANDLEABLE
    if lma and cs.desc.l:
        ctxt.mode = X86EMUL_MODE_PROT64
    else:
        ctxt.mode = X86EMUL_MODE_PROT32 if cs.desc.d else X86EMUL_MODE_PROT16
    return X86EMUL_CONTINUE


def assign_eip_far(ctxt: X86EmulateCtxt, target: int) -> int:
    """assign_eip after CS was loaded, in the mode that it selects."""
    rc = emulator_recalc_and_set_mode(ctxt)
    return rc if rc != X86EMUL_CONTINUE else assign_eip(ctxt, target)


def jmp_rel(ctxt: X86EmulateCtxt, rel: int) -> int:
    """Branch by a displacement from the next instruction; only its low 32 bits count, signed."""
    rel &= MASK32
    if rel & 0x80000000:
        rel -= 1 << 32
    return assign_eip(ctxt, ctxt.next_eip + rel)


def read_emulated(ctxt: X86EmulateCtxt, addr: int, size: int) -> int:
    """The unsigned value of `size` bytes at linear `addr`, through the read cache.

    The cache replays, in order, what was read before userspace had to complete a read.
    """
    pos = ctxt.mem_read_pos
    end = len(ctxt.mem_read_data)
    if pos >= end:
        if end + size >= READ_CACHE_SIZE:
            ctxt.ops.vm_bugged(ctxt)
            return -X86EMUL_UNHANDLEABLE
        rc, data = ctxt.ops.read_emulated(ctxt, addr, size, ctxt.exception)
        if rc != X86EMUL_CONTINUE:
            return -rc
        ctxt.mem_read_data += data
        ctxt.mem_read_pos = pos + size
        return int.from_bytes(data, "little")
    ctxt.mem_read_pos = pos + size
    return int.from_bytes(ctxt.mem_read_data[pos : pos + size], "little")


def segmented_read(ctxt: X86EmulateCtxt, seg: int, ea: int, size: int) -> int:
    """The unsigned value of `size` bytes at seg:ea, or a negative result."""
    la = linearize(ctxt, seg, ea, size, 0)
    return read_emulated(ctxt, la, size) if la >= 0 else la


def segmented_write(ctxt: X86EmulateCtxt, seg: int, ea: int, data: bytes) -> int:
    """Write bytes at seg:ea; an X86EMUL_* result."""
    la = linearize(ctxt, seg, ea, len(data), X86EMUL_F_WRITE)
    if la < 0:
        return -la
    return ctxt.ops.write_emulated(ctxt, la, data, ctxt.exception)


def segmented_cmpxchg(ctxt: X86EmulateCtxt, seg: int, ea: int, old: bytes, new: bytes) -> int:
    """Replace `old` by `new` at seg:ea atomically; an X86EMUL_* result."""
    la = linearize(ctxt, seg, ea, len(new), X86EMUL_F_WRITE)
    if la < 0:
        return -la
    return ctxt.ops.cmpxchg_emulated(ctxt, la, old, new, ctxt.exception)


def segmented_read_std(ctxt: X86EmulateCtxt, seg: int, ea: int, size: int) -> tuple[int, bytes]:
    """Read RAM at seg:ea at the current CPL."""
    la = linearize(ctxt, seg, ea, size, 0)
    if la < 0:
        return -la, b""
    return ctxt.ops.read_std(ctxt, la, size, ctxt.exception, system=False)


def segmented_write_std(ctxt: X86EmulateCtxt, seg: int, ea: int, data: bytes) -> int:
    """Write RAM at seg:ea at the current CPL."""
    la = linearize(ctxt, seg, ea, len(data), X86EMUL_F_WRITE)
    if la < 0:
        return -la
    return ctxt.ops.write_std(ctxt, la, data, ctxt.exception, system=False)


def linear_read_system(ctxt: X86EmulateCtxt, addr: int, size: int) -> tuple[int, bytes]:
    """Read a system structure at CPL 0."""
    return ctxt.ops.read_std(ctxt, addr, size, ctxt.exception, system=True)


def linear_write_system(ctxt: X86EmulateCtxt, addr: int, data: bytes) -> int:
    """Write a system structure at CPL 0."""
    return ctxt.ops.write_std(ctxt, addr, data, ctxt.exception, system=True)


def emulate_push(ctxt: X86EmulateCtxt, value: int, size: int) -> int:
    """Push the low `size` bytes of `value`. RSP moves before the write may fault, uncommitted."""
    rsp_increment(ctxt, -size)
    ea = reg_read(ctxt, VCPU_REGS_RSP) & stack_mask(ctxt)
    data = (value & (1 << size * 8) - 1).to_bytes(size, "little")
    return segmented_write(ctxt, VCPU_SREG_SS, ea, data)


def emulate_pop(ctxt: X86EmulateCtxt, size: int) -> int:
    """Pop `size` bytes: the unsigned value, or a negative result.

    KVM deviation: when a later read needs userspace, RSP keeps this increment in the register
    cache, and the run that completes the instruction adds it again (SDM Vol. 2B POPA).
    """
    ea = reg_read(ctxt, VCPU_REGS_RSP) & stack_mask(ctxt)
    value = segmented_read(ctxt, VCPU_SREG_SS, ea, size)
    if value >= 0:
        rsp_increment(ctxt, size)
    return value

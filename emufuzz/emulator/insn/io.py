"""Port I/O (SDM Vol. 1 19 "Input/Output"; Vol. 2: IN, OUT, INS, OUTS).

emulate.c: emulator_io_permitted, emulator_io_port_access_allowed, pio_in_emulated, em_in, em_out.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_REGS_RDI, VCPU_SREG_TR
from emufuzz.arch.rflags import X86_EFLAGS_DF
from emufuzz.emulator.access import address_mask
from emufuzz.emulator.ctxt import X86EmulateCtxt, reg_read
from emufuzz.emulator.faults import emulate_gp
from emufuzz.emulator.flags import String
from emufuzz.emulator.insn.alu import emulator_bad_iopl
from emufuzz.emulator.x86emul import (
    MASK16,
    MASK64,
    OPERAND_MEM_STR,
    OPERAND_NONE,
    READ_CACHE_SIZE,
    SIZE_MASK,
    X86EMUL_CONTINUE,
    X86EMUL_IO_NEEDED,
)

VMWARE_PORT_VMPORT: Final = 0x5658
VMWARE_PORT_VMRPC: Final = 0x5659

_TSS_IO_MAP_BASE: Final = 102
_TSS_MIN_LIMIT: Final = 103
_PAGE_SIZE: Final = 4096


def _read_word(ctxt: X86EmulateCtxt, addr: int) -> int:
    """16 bits at CPL 0 without a fault for the guest; -1 if they cannot be read."""
    rc, data = ctxt.ops.read_std(ctxt, addr & MASK64, 2, None, system=True)
    return int.from_bytes(data, "little") if rc == X86EMUL_CONTINUE else -1


def emulator_io_port_access_allowed(ctxt: X86EmulateCtxt, port: int, length: int) -> bool:
    """The I/O permission bitmap of the TSS allows `length` (1, 2, 4) ports from `port` on.

    KVM deviation: the byte after the one that holds the port's bit may lie beyond the limit of
    the TSS, an unreadable bitmap denies instead of faulting, and so does any TSS that ends before
    offset 103, a 16-bit one for instance (SDM Vol. 1 19.5.2).
    """
    if ctxt.enable_vmware_backdoor and port in (VMWARE_PORT_VMPORT, VMWARE_PORT_VMRPC):
        return True
    tr = ctxt.ops.get_segment(ctxt, VCPU_SREG_TR)
    limit = tr.desc.limit_scaled
    if not tr.desc.p or limit < _TSS_MIN_LIMIT:
        return False
    base = tr.desc.base | tr.base3 << 32
    bitmap = _read_word(ctxt, base + _TSS_IO_MAP_BASE)
    if bitmap < 0 or bitmap + port // 8 > limit:
        return False
    bits = _read_word(ctxt, base + bitmap + port // 8)
    return bits >= 0 and not bits >> (port & 7) & (1 << length) - 1


def emulator_io_permitted(ctxt: X86EmulateCtxt, port: int, length: int) -> bool:
    """IOPL or else the bitmap allows the access; asked once per instruction, not per iteration."""
    if ctxt.perm_ok:
        return True
    if emulator_bad_iopl(ctxt) and not emulator_io_port_access_allowed(ctxt, port, length):
        return False
    ctxt.perm_ok = True
    return True


def check_perm_in(ctxt: X86EmulateCtxt) -> int:
    """IN and INS: at most 4 bytes, #GP(0) without permission."""
    ctxt.dst.bytes = min(ctxt.dst.bytes, 4)
    if emulator_io_permitted(ctxt, ctxt.src.val & MASK16, ctxt.dst.bytes):
        return X86EMUL_CONTINUE
    return emulate_gp(ctxt, 0)


def check_perm_out(ctxt: X86EmulateCtxt) -> int:
    """OUT and OUTS: at most 4 bytes, #GP(0) without permission."""
    ctxt.src.bytes = min(ctxt.src.bytes, 4)
    if emulator_io_permitted(ctxt, ctxt.dst.val & MASK16, ctxt.src.bytes):
        return X86EMUL_CONTINUE
    return emulate_gp(ctxt, 0)


def _read_ahead_count(ctxt: X86EmulateCtxt, size: int) -> int:
    """How many elements to ask a port for at once: to the end of RDI's page, at most 1024 bytes.

    KVM deviation: a REP prefix makes a plain IN read ahead too, of which one element is used.
    The room in the page is in bytes, but it is compared with elements (SDM Vol. 2A IN).
    """
    count = 1
    if ctxt.rep_prefix:
        count = address_mask(ctxt, reg_read(ctxt, VCPU_REGS_RCX)) & 0xFFFFFFFF
    room = reg_read(ctxt, VCPU_REGS_RDI) % _PAGE_SIZE
    if not ctxt.eflags & X86_EFLAGS_DF:
        room = _PAGE_SIZE - room
    return max(1, min(room, READ_CACHE_SIZE // size, count))


def em_in(ctxt: X86EmulateCtxt) -> int:
    """IN and INS, through the read-ahead buffer (KVM: em_in, pio_in_emulated).

    KVM deviation: the port is read before the destination of INS is checked (SDM Vol. 2A INS).
    """
    dst = ctxt.dst
    size = dst.bytes
    if ctxt.io_read_pos == len(ctxt.io_read_data):
        count = _read_ahead_count(ctxt, size)
        ctxt.io_read_pos = 0
        ctxt.io_read_data = b""
        data = ctxt.ops.pio_in_emulated(ctxt, size, ctxt.src.val & MASK16, count)
        if data is None:
            return X86EMUL_IO_NEEDED
        ctxt.io_read_data = data
    pos = ctxt.io_read_pos
    if ctxt.rep_prefix and ctxt.d & String and not ctxt.eflags & X86_EFLAGS_DF:
        dst.data = ctxt.io_read_data[pos:]
        dst.type = OPERAND_MEM_STR
        dst.count = len(dst.data) // size
        ctxt.io_read_pos = len(ctxt.io_read_data)
    else:
        dst.val = int.from_bytes(ctxt.io_read_data[pos : pos + size], "little")
        ctxt.io_read_pos = pos + size
    return X86EMUL_CONTINUE


def em_out(ctxt: X86EmulateCtxt) -> int:
    """OUT and OUTS, one element.

    KVM deviation: what the callback answers is ignored; the instruction is complete before
    userspace sees it (SDM Vol. 2B OUT).
    """
    size = ctxt.src.bytes
    data = (ctxt.src.val & SIZE_MASK[size]).to_bytes(size, "little")
    ctxt.ops.pio_out_emulated(ctxt, size, ctxt.dst.val & MASK16, data, 1)
    ctxt.dst.type = OPERAND_NONE
    return X86EMUL_CONTINUE

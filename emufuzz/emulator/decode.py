"""Instruction decoding: prefixes, opcode, groups, sizes, operands (emulate.c: x86_decode_insn).

SDM Vol. 2A 2.1 "Instruction Format", 2.2.1 "REX Prefixes".
"""

from __future__ import annotations

from typing import Final

from emufuzz.emulator.access import ADDRESS_MASK
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.fetch import do_insn_fetch_bytes, insn_fetch
from emufuzz.emulator.flags import (
    CheckPerm,
    EmulateOnUD,
    Intercept,
    IsBranch,
    MemAbs,
    Mmx,
    ModRM,
    NearBranch,
    No16,
    NotImpl,
    Op3264,
    PageTable,
    Sse,
    Stack,
    String,
    TwoMemOp,
)
from emufuzz.emulator.modrm import decode_abs, decode_modrm
from emufuzz.emulator.opcode import (
    KIND_DUAL,
    KIND_ESCAPE,
    KIND_GROUP,
    KIND_LEAF,
    KIND_MODE,
    KIND_PREFIX,
    KIND_RMEXT,
    Opcode,
)
from emufuzz.emulator.tables import ONE_BYTE, THREE_BYTE, TWO_BYTE
from emufuzz.emulator.x86emul import (
    EMULATION_FAILED,
    EMULATION_OK,
    EMULTYPE_TRAP_UD,
    MASK64,
    OPERAND_NONE,
    X86EMUL_CONTINUE,
    X86EMUL_MODE_PROT16,
    X86EMUL_MODE_PROT32,
    X86EMUL_MODE_PROT64,
    X86EMUL_PROPAGATE_FAULT,
)

VCPU_SREG_CS: Final = 1
VCPU_SREG_DS: Final = 3

#: Leaves that need a size fix-up or end decoding at once.
_SPECIAL: Final = NotImpl | Stack | Op3264 | Sse | Mmx | Intercept | CheckPerm | NearBranch | No16

#: Segment override prefix -> segment register.
_SEGMENT_PREFIX: Final = {0x26: 0, 0x2E: 1, 0x36: 2, 0x3E: 3, 0x64: 4, 0x65: 5}
_LEGACY_PREFIXES: Final = frozenset(_SEGMENT_PREFIX) | {0x66, 0x67, 0xF0, 0xF2, 0xF3}
#: First byte -> it is a prefix: outside 64-bit mode, in 64-bit mode.
_IS_PREFIX: Final = tuple(byte in _LEGACY_PREFIXES for byte in range(256))
_IS_PREFIX_64: Final = tuple(byte in _LEGACY_PREFIXES or byte >> 4 == 4 for byte in range(256))

_NO_OVERRIDE: Final = -1


def init_decode_cache(ctxt: X86EmulateCtxt) -> None:
    """Clear what decoding sets only sometimes; the register cache is dropped with it."""
    ctxt.rip_relative = False
    ctxt.rex_prefix = 0
    ctxt.lock_prefix = False
    ctxt.rep_prefix = 0
    ctxt.regs_valid = 0
    ctxt.regs_dirty = 0
    ctxt.io_read_data = b""
    ctxt.io_read_pos = 0
    ctxt.mem_read_data = b""


def x86_decode_insn(ctxt: X86EmulateCtxt, insn: bytes = b"", emulation_type: int = 0) -> int:
    """Decode the instruction at CS:EIP: EMULATION_OK or EMULATION_FAILED.

    `insn` are up to 15 instruction bytes that the CPU supplied; without them they are fetched.
    After a failure ctxt.have_exception tells whether fetching raised a fault for the guest.
    """
    rc = _decode(ctxt, insn, emulation_type)
    if rc == X86EMUL_CONTINUE:
        return EMULATION_OK
    if rc == X86EMUL_PROPAGATE_FAULT:
        ctxt.have_exception = True
    return EMULATION_FAILED


def _decode(ctxt: X86EmulateCtxt, insn: bytes, emulation_type: int) -> int:
    """The whole of decoding; an X86EMUL_* result or EMULATION_FAILED."""
    ctxt.memop.type = OPERAND_NONE
    ctxt.memopp = None
    ctxt.opcode = None
    ctxt.fetch_data = insn
    ctxt.fetch_pos = 0
    ctxt.opcode_len = 1
    if not insn:
        rc = do_insn_fetch_bytes(ctxt, 1)
        if rc != X86EMUL_CONTINUE:
            return rc
    override, op_prefix = _decode_prefixes(ctxt)
    if ctxt.rc != X86EMUL_CONTINUE:
        return ctxt.rc
    opcode = _decode_opcode(ctxt, op_prefix)
    if opcode is None:
        return ctxt.rc
    ctxt.opcode = opcode
    ctxt.d = d = opcode.d
    ctxt.is_branch = d & IsBranch != 0
    if emulation_type & EMULTYPE_TRAP_UD and not d & EmulateOnUD:
        ctxt.fail_reason = "not an instruction that is emulated on #UD"
        return EMULATION_FAILED
    if d & _SPECIAL:
        if d & NotImpl:
            # KVM deviation: DAA, BOUND, ARPL, LAR, SYSRET, POPCNT, XSAVE and others are unknown
            # (SDM Vol. 2A 1.1); leaves that are known do not ask CPUID (SDM Vol. 2A CPUID).
            ctxt.fail_reason = "not implemented by KVM"
            return EMULATION_FAILED
        _fix_operand_size(ctxt, d)
    return _decode_operands(ctxt, opcode, override)


def _decode_prefixes(ctxt: X86EmulateCtxt) -> tuple[int, bool]:
    """Set default sizes, eat prefixes, leave the opcode's first byte in ctxt.b.

    Gives the segment override (or _NO_OVERRIDE) and whether 66 was seen. A failed fetch is in
    ctxt.rc.
    """
    mode = ctxt.mode
    if mode == X86EMUL_MODE_PROT64:
        op_bytes, ad_bytes, is_prefix = 4, 8, _IS_PREFIX_64
    else:
        is_prefix = _IS_PREFIX
        if mode == X86EMUL_MODE_PROT32:
            op_bytes = ad_bytes = 4
        elif mode == X86EMUL_MODE_PROT16:
            op_bytes = ad_bytes = 2
        else:
            # KVM deviation: a cached CS.D makes real-mode code 32-bit (SDM Vol. 3B 21.1.1).
            op_bytes = ad_bytes = 4 if ctxt.ops.get_segment(ctxt, VCPU_SREG_CS).desc.d else 2
    ctxt.op_bytes = op_bytes
    ctxt.ad_bytes = ad_bytes
    ctxt.rc = X86EMUL_CONTINUE
    b = insn_fetch(ctxt, 1)
    override, op_prefix = _NO_OVERRIDE, False
    if is_prefix[b]:
        while is_prefix[b]:
            if b >> 4 == 4:
                ctxt.rex_prefix = b
            else:
                ctxt.rex_prefix = 0  # a legacy prefix after REX makes it void
                if b == 0x66:
                    op_prefix = True
                    ctxt.op_bytes = op_bytes ^ 6
                elif b == 0x67:
                    ctxt.ad_bytes = ad_bytes ^ (12 if ad_bytes == 8 else 6)
                elif b == 0xF0:
                    ctxt.lock_prefix = True
                elif b >= 0xF2:
                    ctxt.rep_prefix = b
                else:
                    # KVM deviation: in 64-bit mode ES, CS, SS and DS prefixes count too, and so
                    # cancel an earlier FS or GS (SDM Vol. 1 3.3.7.1).
                    override = _SEGMENT_PREFIX[b]
            b = insn_fetch(ctxt, 1)
            if ctxt.rc != X86EMUL_CONTINUE:
                return override, op_prefix
        if ctxt.rex_prefix & 8:
            ctxt.op_bytes = 8
    ctxt.b = b
    return override, op_prefix


def _decode_opcode(ctxt: X86EmulateCtxt, op_prefix: bool) -> Opcode | None:
    """Find the leaf; None with ctxt.rc set when there is none or a fetch failed."""
    b = ctxt.b
    if b != 0x0F:
        opcode = ONE_BYTE[b]
    else:
        ctxt.opcode_len = 2
        ctxt.b = b = insn_fetch(ctxt, 1)
        opcode = TWO_BYTE[b]
        if b == 0x38 and ctxt.rc == X86EMUL_CONTINUE:
            ctxt.opcode_len = 3
            ctxt.b = insn_fetch(ctxt, 1)
            opcode = THREE_BYTE[ctxt.b]
        if ctxt.rc != X86EMUL_CONTINUE:
            return None
    if opcode.has_modrm:
        ctxt.modrm = insn_fetch(ctxt, 1)
        if ctxt.rc != X86EMUL_CONTINUE:
            return None
    while opcode.kind != KIND_LEAF:
        child = _select(ctxt, opcode, op_prefix)
        if child < 0:
            ctxt.rc = EMULATION_FAILED
            ctxt.fail_reason = "66 together with F2 or F3 on a prefix-selected opcode"
            return None
        opcode = opcode.children[child]
    return opcode


def _select(ctxt: X86EmulateCtxt, opcode: Opcode, op_prefix: bool) -> int:
    """Which child of an inner node the instruction means; -1 if none.

    KVM deviation: where no node asks for 66, F2 or F3, as with MOVNTI, FXSAVE and VMCALL, they are
    accepted (SDM Vol. 2A 3.1.1.1, NP).
    """
    kind = opcode.kind
    modrm = ctxt.modrm
    if kind == KIND_GROUP:
        return modrm >> 3 & 7
    if kind == KIND_DUAL:
        return int(modrm >= 0xC0)
    if kind == KIND_RMEXT:
        return modrm & 7
    if kind == KIND_PREFIX:
        # KVM deviation: 66 with F2 or F3 is refused, where F2 or F3 wins (SDM Vol. 2A 2.1.2).
        if ctxt.rep_prefix:
            return -1 if op_prefix else ctxt.rep_prefix - 0xF0
        return int(op_prefix)
    if kind == KIND_ESCAPE:
        return modrm - 0xC0 + 8 if modrm >= 0xC0 else modrm >> 3 & 7
    if kind == KIND_MODE:
        return int(ctxt.mode == X86EMUL_MODE_PROT64)
    return int(ctxt.mode == X86EMUL_MODE_PROT64 or modrm >= 0xC0)  # KIND_VEX


def _fix_operand_size(ctxt: X86EmulateCtxt, d: int) -> None:
    """Operand sizes that the opcode decides, in KVM's order."""
    if ctxt.mode == X86EMUL_MODE_PROT64:
        if (ctxt.op_bytes == 4 and d & Stack) or d & NearBranch:
            ctxt.op_bytes = 8
    if d & Op3264:
        ctxt.op_bytes = 8 if ctxt.mode == X86EMUL_MODE_PROT64 else 4
    if d & No16 and ctxt.op_bytes == 2:
        ctxt.op_bytes = 4
    if d & Sse:
        ctxt.op_bytes = 16
    elif d & Mmx:
        ctxt.op_bytes = 8


def _decode_operands(ctxt: X86EmulateCtxt, opcode: Opcode, override: int) -> int:
    """ModRM, segment, then src, src2 and dst, which is the order of their immediates."""
    d = ctxt.d
    if d & ModRM:
        rc = decode_modrm(ctxt)
        if rc != X86EMUL_CONTINUE:
            return rc
        seg = ctxt.modrm_seg if override < 0 else override
    else:
        if d & MemAbs:
            rc = decode_abs(ctxt)
            if rc != X86EMUL_CONTINUE:
                return rc
        seg = VCPU_SREG_DS if override < 0 else override
    ctxt.seg_override = seg
    ctxt.memop.seg = seg
    if opcode.decode_src is None:
        ctxt.src.type = OPERAND_NONE
    else:
        rc = opcode.decode_src(ctxt, ctxt.src)
        if rc != X86EMUL_CONTINUE:
            return rc
    if opcode.decode_src2 is None:
        ctxt.src2.type = OPERAND_NONE
    else:
        rc = opcode.decode_src2(ctxt, ctxt.src2)
        if rc != X86EMUL_CONTINUE:
            return rc
    if opcode.decode_dst is None:
        ctxt.dst.type = OPERAND_NONE
    else:
        rc = opcode.decode_dst(ctxt, ctxt.dst)
    ctxt.next_eip = ctxt.eip + ctxt.fetch_pos & MASK64
    if ctxt.rip_relative and ctxt.memopp is not None:
        ctxt.memopp.ea = ctxt.memopp.ea + ctxt.next_eip & ADDRESS_MASK[ctxt.ad_bytes]
    return rc if opcode.decode_dst is not None else X86EMUL_CONTINUE


def x86_page_table_writing_insn(ctxt: X86EmulateCtxt) -> bool:
    """The decoded instruction is of a kind that guests write page tables with."""
    return ctxt.d & PageTable != 0


def emulator_can_use_gpa(ctxt: X86EmulateCtxt) -> bool:
    """The exit's guest-physical address is the address of the instruction's memory operand."""
    return not (ctxt.rep_prefix and ctxt.d & String) and not ctxt.d & TwoMemOp

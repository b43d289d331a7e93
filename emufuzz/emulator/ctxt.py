"""The emulator's context and operands: struct x86_emulate_ctxt, operand, x86_exception."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emufuzz.emulator.x86emul import OPERAND_NONE, X86EMUL_CONTINUE, X86EMUL_MODE_PROT64

if TYPE_CHECKING:
    from emufuzz.emulator.opcode import Opcode
    from emufuzz.emulator.ops import X86EmulateOps


_X87_EXCEPTIONS = 0x3F
_FCW_DEFINED = 0x1F7F
_FCW_FIXED = 0x40
_FSW_ES_B = 0x8080
_FSW_TOP = 0x3800


class X86Exception:
    """An exception to be queued for the guest (struct x86_exception).

    `address` is the faulting linear address of a #PF. `error_code` counts when
    `error_code_valid`.
    """

    __slots__ = (
        "address",
        "error_code",
        "error_code_valid",
        "exit_qualification",
        "nested_page_fault",
        "vector",
    )

    def __init__(self) -> None:
        self.vector: int = 0xFF
        self.error_code_valid: bool = False
        self.error_code: int = 0
        self.nested_page_fault: bool = False
        self.address: int = 0
        self.exit_qualification: int = 0


class Operand:
    """A decoded operand (struct operand).

    `type` is an OPERAND_* value, `bytes` its size, `count` the elements of a string store.
    `val` and `orig_val` hold the value as an unsigned int of up to 16 bytes (SSE included).
    A register operand is named by `reg` (0..15; XMM and MMX likewise) and `shift` (8 for
    AH, CH, DH and BH, else 0); a memory operand by segment `seg` and effective address `ea`.
    `data` is the block that a multi-element string store writes.
    """

    __slots__ = ("bytes", "count", "data", "ea", "orig_val", "reg", "seg", "shift", "type", "val")

    def __init__(self) -> None:
        self.type: int = OPERAND_NONE
        self.bytes: int = 0
        self.count: int = 0
        self.val: int = 0
        self.orig_val: int = 0
        self.reg: int = 0
        self.shift: int = 0
        self.ea: int = 0
        self.seg: int = 0
        self.data: bytes = b""


class FpuRegisters:
    """The vcpu's x87, MMX and SSE registers while they are loaded on the CPU.

    `xmm` holds sixteen 128-bit values, `mm` the low 64 bits of the eight x87 registers; `ftw` is
    the abridged tag byte, one bit a register, 1 = not empty (SDM Vol. 1 10.5.1.1). Whoever
    writes a register sets `dirty`.
    """

    __slots__ = ("dirty", "fcw", "fsw", "ftw", "mm", "mxcsr", "xmm")

    def __init__(self) -> None:
        self.fcw: int = 0x37F
        self.fsw: int = 0
        self.ftw: int = 0
        self.mxcsr: int = 0x1F80
        self.dirty: bool = False
        self.xmm: list[int] = [0] * 16
        self.mm: list[int] = [0] * 8

    def get(self) -> None:
        """Load the registers on the CPU, as kvm_fpu_get does before any use.

        The CPU recomputes FSW.ES and its copy FSW.B, an unmasked exception is pending
        (SDM Vol. 1 8.1.3.3), and FCW keeps no reserved bits but bit 6, which is set.
        """
        pending = self.fsw & ~self.fcw & _X87_EXCEPTIONS
        fsw = self.fsw & ~_FSW_ES_B | (_FSW_ES_B if pending else 0)
        fcw = self.fcw & _FCW_DEFINED | _FCW_FIXED
        if fsw != self.fsw or fcw != self.fcw:
            self.fsw = fsw
            self.fcw = fcw
            self.dirty = True

    def enter_mmx(self) -> None:
        """An MMX instruction marks all registers valid and resets FSW.TOP (SDM Vol. 1 9.5.2)."""
        self.ftw = 0xFF
        self.fsw &= ~_FSW_TOP
        self.dirty = True


class X86EmulateCtxt:
    """One emulation (struct x86_emulate_ctxt).

    C's `_eip` is `next_eip` here, `_regs` is `regs`. `opcode` is the resolved table entry, whose
    flag word, merged along its groups, is `d`. `regs_valid` and `regs_dirty` are bitmaps of the
    GPRs that were read from and must be written to the vcpu. `fail_reason` says for reports why
    an instruction is unhandleable; it decides nothing. `rc` keeps the X86EMUL_* result that ended
    the last run; `max_size` how far linearize found the segment to reach. `fpu` stands for the
    registers that KVM reaches directly on the host CPU (kvm_read_sse_reg ...).
    """

    __slots__ = (
        "ad_bytes", "b", "check_intercepts", "d", "dst", "eflags", "eip",
        "enable_vmware_backdoor", "exception",
        "fail_reason", "fetch_data", "fetch_pos", "fpu", "gpa_available", "gpa_val",
        "have_exception", "interruptibility", "io_read_data", "io_read_pos", "is_branch",
        "lock_prefix", "max_size", "mem_read_data", "mem_read_pos", "memop", "memopp", "mode",
        "modrm", "modrm_mod", "modrm_reg", "modrm_rm", "modrm_seg", "next_eip", "op_bytes",
        "opcode", "opcode_len", "ops", "perm_ok", "rc", "regs", "regs_dirty", "regs_valid",
        "rep_prefix", "rex_prefix", "rip_relative", "seg_override", "src", "src2", "tf", "ud",
    )  # fmt: skip

    def __init__(self, ops: X86EmulateOps) -> None:
        self.ops: X86EmulateOps = ops
        self.fpu: FpuRegisters = FpuRegisters()
        # Set by the caller before decoding (init_emulate_ctxt).
        self.mode: int = X86EMUL_MODE_PROT64
        self.eflags: int = 0
        self.eip: int = 0
        self.ud: bool = False
        self.tf: bool = False
        self.check_intercepts: bool = False
        self.enable_vmware_backdoor: bool = False
        self.gpa_available: bool = False
        self.gpa_val: int = 0
        # Results.
        self.interruptibility: int = 0
        self.have_exception: bool = False
        self.exception: X86Exception = X86Exception()
        self.fail_reason: str = ""
        self.rc: int = X86EMUL_CONTINUE
        self.max_size: int = 0
        self.perm_ok: bool = False
        # Decode cache.
        self.opcode: Opcode | None = None
        self.opcode_len: int = 0
        self.b: int = 0
        self.d: int = 0
        self.op_bytes: int = 0
        self.ad_bytes: int = 0
        self.rip_relative: bool = False
        self.rex_prefix: int = 0
        self.lock_prefix: bool = False
        self.rep_prefix: int = 0
        self.seg_override: int = 0
        self.modrm: int = 0
        self.modrm_mod: int = 0
        self.modrm_reg: int = 0
        self.modrm_rm: int = 0
        self.modrm_seg: int = 0
        self.next_eip: int = 0
        self.is_branch: bool = False
        self.src: Operand = Operand()
        self.src2: Operand = Operand()
        self.dst: Operand = Operand()
        self.memop: Operand = Operand()
        self.memopp: Operand | None = None
        # Register cache, fetch window (fetch_data, from eip on) and read caches.
        self.regs: list[int] = [0] * 16
        self.regs_valid: int = 0
        self.regs_dirty: int = 0
        self.fetch_data: bytes = b""
        self.fetch_pos: int = 0
        self.io_read_data: bytes = b""
        self.io_read_pos: int = 0
        self.mem_read_data: bytes = b""
        self.mem_read_pos: int = 0


def reg_read(ctxt: X86EmulateCtxt, nr: int) -> int:
    """The 64-bit value of GPR `nr` (0..15), read from the vcpu at its first use (KVM: reg_read)."""
    bit = 1 << nr
    if not ctxt.regs_valid & bit:
        ctxt.regs_valid |= bit
        ctxt.regs[nr] = ctxt.ops.read_gpr(ctxt, nr)
    return ctxt.regs[nr]


def reg_write(ctxt: X86EmulateCtxt, nr: int, value: int) -> None:
    """Replace all 64 bits of GPR `nr` in the cache (KVM: reg_write)."""
    bit = 1 << nr
    ctxt.regs_valid |= bit
    ctxt.regs_dirty |= bit
    ctxt.regs[nr] = value & 0xFFFFFFFFFFFFFFFF


def reg_rmw(ctxt: X86EmulateCtxt, nr: int) -> int:
    """Value of GPR `nr`, which is marked as written at once (KVM: reg_rmw)."""
    value = reg_read(ctxt, nr)
    ctxt.regs_dirty |= 1 << nr
    return value


def assign_register(ctxt: X86EmulateCtxt, nr: int, value: int, size: int) -> None:
    """Write the low `size` bytes (1, 2, 4, 8) of GPR `nr`; 4 bytes zero-extend (SDM Vol. 1 3.4.1.1)."""
    if size == 4:
        value &= 0xFFFFFFFF
    elif size == 2:
        value = reg_read(ctxt, nr) & ~0xFFFF | value & 0xFFFF
    elif size == 1:
        value = reg_read(ctxt, nr) & ~0xFF | value & 0xFF
    reg_write(ctxt, nr, value)


def writeback_registers(ctxt: X86EmulateCtxt) -> None:
    """Hand the written GPRs to the vcpu (KVM: writeback_registers)."""
    dirty = ctxt.regs_dirty
    nr = 0
    while dirty:
        if dirty & 1:
            ctxt.ops.write_gpr(ctxt, nr, ctxt.regs[nr])
        dirty >>= 1
        nr += 1


def emulator_invalidate_register_cache(ctxt: X86EmulateCtxt) -> None:
    """Forget the cached GPRs (KVM: invalidate_registers)."""
    ctxt.regs_dirty = 0
    ctxt.regs_valid = 0

"""The machine code of the runner: its signal handler and the start of its process.

The handler is where every case ends: the trap behind its instruction, or the exception that it
raised, is a signal. It copies the case's end state into the case's record, puts memory back,
loads the next case's state into the signal frame and returns to it with rt_sigreturn. After the
last record it tells the parent and waits. It makes no other system call than read, write, exit and
rt_sigreturn, which are those that seccomp's strict mode leaves.

The frame is that of x86-64 Linux (struct ucontext, arch/x86/include/uapi/asm/sigcontext.h), also
for code in 16- and 32-bit segments.
"""

from __future__ import annotations

from typing import Final

from iced_x86 import Code, Instruction, Register

from emufuzz.arch.rflags import X86_EFLAGS_ID, X86_EFLAGS_NT
from emufuzz.case.model import PAGE_SHIFT, PAGE_SIZE
from emufuzz.oracle.native import layout as at_layout
from emufuzz.oracle.native.assembler import Assembler, Reg, at
from emufuzz.oracle.native.layout import Arena

_R = Register
_SYS_READ: Final = 0
_SYS_WRITE: Final = 1
_SYS_RT_SIGRETURN: Final = 15
_SYS_EXIT: Final = 60

#: File descriptors of the child.
WAKE_FD: Final = 0
DONE_FD: Final = 1

#: Where the frame has the GPRs, in VCPU_REGS_* order, and the rest; offsets from struct ucontext.
_FRAME_GPRS: Final = tuple(40 + 8 * place for place in (13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7))
_FRAME_RIP: Final = 40 + 8 * 16
_FRAME_RFLAGS: Final = 40 + 8 * 17
_FRAME_CS: Final = 40 + 8 * 18
_FRAME_SS: Final = _FRAME_CS + 6
_FRAME_ERROR: Final = 40 + 8 * 19
_FRAME_TRAP: Final = 40 + 8 * 20
_FRAME_CR2: Final = 40 + 8 * 22
_FRAME_FPU: Final = 224
#: Behind the 512 bytes of FXSAVE: which components of the XSAVE area count, and which start afresh.
_XSTATE_BV: Final = 512
_X87_AND_SSE: Final = 3

# Registers with a fixed meaning in the handler.
_FRAME: Final = _R.R8
_CONTROL: Final = _R.R9
_OUT: Final = _R.R10
_IN: Final = _R.R11
_COMMON: Final = _R.R12
_CURRENT: Final = _R.RBX
_BASE: Final = _R.R15
#: With which pages are compared, 64 bytes at a time.
_XMM: Final = (_R.XMM0, _R.XMM1, _R.XMM2, _R.XMM3)

#: Selectors as COMMON and OUT have them, behind CS and SS, which the frame has.
_DATA_SREGS: Final = ((_R.DS, 4), (_R.ES, 6), (_R.FS, 8), (_R.GS, 10))
#: Place of the selector -> where COMMON has the base, and what loads it.
_BASES: Final = {
    8: (at_layout.COMMON_FS_BASE, Code.WRFSBASE_R64),
    10: (at_layout.COMMON_GS_BASE, Code.WRGSBASE_R64),
}


def handler_code(arena: Arena, table: int) -> bytes:
    """Machine code of the signal handler, to be loaded into the first page of the runtime.

    Args:
        arena: layout of the shared memory.
        table: offset from the start of the runtime of the addresses of the cases' pages.
    """
    asm = Assembler()
    _enter(asm, arena)
    _save_registers(asm)
    _save_code(asm)
    _save_pages(asm, arena, table)
    _advance(asm, arena)
    _load_registers(asm)
    _load_segments(asm)
    return asm.bytes()


def start_code(calls: int, count: int, stack: int) -> bytes:
    """The entry point: makes the system calls of a table, then traps into the handler.

    A call that fails ends the child with its number and its errno on DONE_FD.

    Args:
        calls: offset of the table from the entry point; 7 quadwords a call: number and 6 arguments.
        count: calls in the table; the first one maps the stack, the others may take the kernel's away.
        stack: offset of the top of the stack from the entry point.
    """
    asm = Assembler()
    asm.label("entry")
    asm.address(_R.R12, "entry")
    asm.lea(_R.R13, at(_R.R12, stack))
    asm.immediate(Code.ADD_RM64_IMM32, _R.R12, calls)
    asm.zero(_R.RBX)
    asm.label("call")
    for place, register in enumerate((_R.RAX, _R.RDI, _R.RSI, _R.RDX, _R.R10, _R.R8, _R.R9)):
        asm.load(register, at(_R.R12, 8 * place))
    asm.op(Code.SYSCALL)
    asm.immediate(Code.CMP_RM32_IMM32, _R.EAX, -PAGE_SIZE)
    asm.jump(Code.JA_REL32_64, "failed")
    asm.immediate(Code.ADD_RM64_IMM32, _R.R12, 7 * 8)
    asm.immediate(Code.ADD_RM64_IMM32, _R.RBX, 1)
    asm.immediate(Code.CMP_RM64_IMM32, _R.RBX, count)
    asm.jump(Code.JB_REL32_64, "call")
    asm.op(Code.INT3)
    asm.label("failed")
    asm.op(Code.TEST_RM64_R64, _R.RBX, _R.RBX)
    asm.op(Code.CMOVNE_R64_RM64, _R.RSP, _R.R13)
    asm.op(Code.PUSH_R64, _R.RAX)
    asm.op(Code.PUSH_R64, _R.RBX)
    _system_call(asm, _SYS_WRITE, DONE_FD, _R.RSP, 16)
    _exit(asm)
    return asm.bytes()


def _system_call(asm: Assembler, number: int, fd: int, buffer: Reg, size: int) -> None:
    asm.move(_R.RSI, buffer)
    asm.constant(_R.RAX, number)
    asm.constant(_R.RDI, fd)
    asm.constant(_R.RDX, size)
    asm.op(Code.SYSCALL)


def _exit(asm: Assembler) -> None:
    asm.constant(_R.RAX, _SYS_EXIT)
    asm.zero(_R.RDI)
    asm.op(Code.SYSCALL)


def _clear_flags(asm: Assembler) -> None:
    """A case's AC would fault here, and its NT is not wanted."""
    asm.emit(Instruction.create_i32(Code.PUSHQ_IMM32, 2))
    asm.op(Code.POPFQ)


def _enter(asm: Assembler, arena: Arena) -> None:
    asm.label("base")
    _clear_flags(asm)
    asm.address(_BASE, "base")
    asm.immediate(Code.AND_RM64_IMM32, _BASE, -PAGE_SIZE)
    asm.move(_FRAME, _R.RDX)
    asm.lea(_CONTROL, at(_BASE, at_layout.CODE_SIZE + arena.control))
    asm.lea(_COMMON, at(_BASE, at_layout.CODE_SIZE + arena.common))
    asm.load(_CURRENT, at(_CONTROL, at_layout.CONTROL_CURRENT))
    _record(asm, _IN, arena.records_in, at_layout.IN_SIZE)
    _record(asm, _OUT, arena.records_out, at_layout.OUT_SIZE)


def _record(asm: Assembler, register: Reg, first: int, size: int) -> None:
    """Register := address of the current record."""
    asm.emit(Instruction.create_reg_reg_i32(Code.IMUL_R64_RM64_IMM32, register, _CURRENT, size))
    asm.op(Code.ADD_R64_RM64, register, _BASE)
    asm.immediate(Code.ADD_RM64_IMM32, register, at_layout.CODE_SIZE + first)


def _save_registers(asm: Assembler) -> None:
    places = [(frame, 8 * number) for number, frame in enumerate(_FRAME_GPRS)]
    places += [
        (_FRAME_RIP, at_layout.OUT_RIP),
        (_FRAME_RFLAGS, at_layout.OUT_RFLAGS),
        (_FRAME_ERROR, at_layout.OUT_ERROR),
        (_FRAME_TRAP, at_layout.OUT_TRAP),
        (_FRAME_CR2, at_layout.OUT_CR2),
    ]
    for frame, out in places:
        asm.load(_R.RAX, at(_FRAME, frame))
        asm.store(at(_OUT, out), _R.RAX)
    for frame, place in ((_FRAME_CS, 0), (_FRAME_SS, 2)):
        asm.load(_R.EAX, at(_FRAME, frame), Code.MOVZX_R32_RM16)
        asm.store(at(_OUT, at_layout.OUT_SELECTORS + place), _R.AX, Code.MOV_RM16_R16)
    for register, place in _DATA_SREGS:
        asm.store(at(_OUT, at_layout.OUT_SELECTORS + place), register, Code.MOV_RM16_SREG)
    for code, place in (
        (Code.RDFSBASE_R64, at_layout.OUT_FS_BASE),
        (Code.RDGSBASE_R64, at_layout.OUT_GS_BASE),
    ):
        asm.op(code, _R.RAX)
        asm.store(at(_OUT, place), _R.RAX)
    asm.load(_R.RSI, at(_FRAME, _FRAME_FPU))
    asm.lea(_R.RDI, at(_OUT, at_layout.OUT_FPU))
    asm.copy_quadwords(at_layout.FPU_SIZE // 8)


def _save_code(asm: Assembler) -> None:
    """Keep what the code bytes have become, and put back what lies under them."""
    asm.load(_R.RSI, at(_IN, at_layout.IN_CODE_ADDRESS))
    asm.lea(_R.RDI, at(_OUT, at_layout.OUT_CODE))
    asm.load(_R.RCX, at(_IN, at_layout.IN_CODE_LENGTH))
    asm.emit(Instruction.create_rep_movsb(64))
    asm.lea(_R.RSI, at(_IN, at_layout.IN_UNDER))
    asm.load(_R.RDI, at(_IN, at_layout.IN_CODE_ADDRESS))
    asm.load(_R.RCX, at(_IN, at_layout.IN_CODE_LENGTH))
    asm.emit(Instruction.create_rep_movsb(64))


def _save_pages(asm: Assembler, arena: Arena, table: int) -> None:
    """Copy each page that changed into POOL, and put it back."""
    asm.zero(_R.RBP)
    asm.load(_R.R13, at(_CONTROL, at_layout.CONTROL_POOL))
    asm.load(_R.RDX, at(_IN, at_layout.IN_PAGES))
    asm.label("page")
    asm.op(Code.BSF_R64_RM64, _R.RCX, _R.RDX)
    asm.jump(Code.JE_REL32_64, "pages-done")
    asm.op(Code.BTR_RM64_R64, _R.RDX, _R.RCX)
    asm.load(_R.RSI, at(_BASE, table, _R.RCX, 8))
    asm.move(_R.RDI, _R.RCX)
    asm.immediate(Code.SHL_RM64_IMM8, _R.RDI, PAGE_SHIFT)
    asm.op(Code.ADD_R64_RM64, _R.RDI, _BASE)
    asm.immediate(Code.ADD_RM64_IMM32, _R.RDI, at_layout.CODE_SIZE + arena.pristine)
    asm.zero(_R.RAX)
    asm.label("compare")
    for part, register in enumerate(_XMM):
        asm.load(register, at(_R.RSI, 16 * part, _R.RAX), Code.MOVDQA_XMM_XMMM128)
        asm.load(register, at(_R.RDI, 16 * part, _R.RAX), Code.PCMPEQB_XMM_XMMM128)
    for register in _XMM[1:]:
        asm.op(Code.PAND_XMM_XMMM128, _XMM[0], register)
    asm.op(Code.PMOVMSKB_R32_XMM, _R.R14D, _R.XMM0)
    asm.immediate(Code.CMP_RM32_IMM32, _R.R14D, 0xFFFF)
    asm.jump(Code.JNE_REL32_64, "changed")
    asm.immediate(Code.ADD_RM64_IMM32, _R.RAX, 64)
    asm.immediate(Code.CMP_RM64_IMM32, _R.RAX, PAGE_SIZE)
    asm.jump(Code.JB_REL32_64, "compare")
    asm.jump(Code.JMP_REL32_64, "page")
    asm.label("changed")
    asm.op(Code.BTS_RM64_R64, _R.RBP, _R.RCX)
    asm.move(_R.R14, _R.RDI)
    asm.move(_R.RAX, _R.RSI)
    asm.move(_R.RDI, _R.R13)
    asm.copy_quadwords(PAGE_SIZE // 8)
    asm.move(_R.R13, _R.RDI)
    asm.move(_R.RSI, _R.R14)
    asm.move(_R.RDI, _R.RAX)
    asm.copy_quadwords(PAGE_SIZE // 8)
    asm.jump(Code.JMP_REL32_64, "page")
    asm.label("pages-done")
    asm.store(at(_CONTROL, at_layout.CONTROL_POOL), _R.R13)
    asm.store(at(_OUT, at_layout.OUT_PAGES), _R.RBP)
    asm.load(_R.RAX, at(_COMMON, at_layout.COMMON_STAMP))
    asm.store(at(_OUT, at_layout.OUT_STAMP), _R.RAX)


def _advance(asm: Assembler, arena: Arena) -> None:
    """On to the next record; behind the last one, wait for more. The parent has set COUNT by then."""
    asm.immediate(Code.ADD_RM64_IMM32, _CURRENT, 1)
    asm.load(_R.RAX, at(_CONTROL, at_layout.CONTROL_COUNT))
    asm.op(Code.CMP_R64_RM64, _CURRENT, _R.RAX)
    asm.jump(Code.JB_REL32_64, "next")
    asm.store(at(_CONTROL, at_layout.CONTROL_CURRENT), _CURRENT)
    asm.move(_R.R13, _FRAME)  # R8 to R11 do not survive a system call
    asm.move(_R.R14, _CONTROL)
    asm.lea(_R.RSI, at(_R.R14, at_layout.CONTROL_WAKE))
    _system_call(asm, _SYS_WRITE, DONE_FD, _R.RSI, 1)
    asm.lea(_R.RSI, at(_R.R14, at_layout.CONTROL_WAKE))
    _system_call(asm, _SYS_READ, WAKE_FD, _R.RSI, 1)
    asm.move(_FRAME, _R.R13)
    asm.move(_CONTROL, _R.R14)
    asm.immediate(Code.CMP_RM64_IMM32, _R.RAX, 1)
    asm.jump(Code.JE_REL32_64, "woken")
    _exit(asm)
    asm.label("woken")
    asm.zero(_CURRENT)
    asm.lea(_R.RAX, at(_BASE, at_layout.CODE_SIZE + arena.pool))
    asm.store(at(_CONTROL, at_layout.CONTROL_POOL), _R.RAX)
    asm.label("next")
    asm.store(at(_CONTROL, at_layout.CONTROL_CURRENT), _CURRENT)
    _record(asm, _IN, arena.records_in, at_layout.IN_SIZE)


def _load_registers(asm: Assembler) -> None:
    """The next case's registers, FPU and code. The rest of the XSAVE area starts afresh."""
    places = [(8 * number, frame) for number, frame in enumerate(_FRAME_GPRS)]
    places += [(at_layout.IN_RIP, _FRAME_RIP), (at_layout.IN_RFLAGS, _FRAME_RFLAGS)]
    for record, frame in places:
        asm.load(_R.RAX, at(_IN, record))
        asm.store(at(_FRAME, frame), _R.RAX)
    asm.load(_R.RDX, at(_FRAME, _FRAME_FPU))
    asm.move(_R.RDI, _R.RDX)
    asm.lea(_R.RSI, at(_COMMON, at_layout.COMMON_FPU))
    asm.copy_quadwords(at_layout.FPU_SIZE // 8)
    asm.constant(_R.RAX, _X87_AND_SSE)
    asm.store(at(_R.RDX, _XSTATE_BV), _R.RAX)
    asm.lea(_R.RSI, at(_IN, at_layout.IN_CODE))
    asm.load(_R.RDI, at(_IN, at_layout.IN_CODE_ADDRESS))
    asm.load(_R.RCX, at(_IN, at_layout.IN_CODE_LENGTH))
    asm.emit(Instruction.create_rep_movsb(64))


def _load_base(asm: Assembler, place: int) -> None:
    """The base of FS or GS, if the selector in EAX is null; else it comes from the descriptor."""
    base, code = _BASES[place]
    skip = f"selector-{place}"
    asm.op(Code.TEST_RM32_R32, _R.EAX, _R.EAX)
    asm.jump(Code.JNE_REL32_64, skip)
    asm.load(_R.RAX, at(_COMMON, base))
    asm.op(code, _R.RAX)
    asm.label(skip)


def _load_segments(asm: Assembler) -> None:
    """Selectors, FS and GS bases where the selector is null, flags that the frame cannot change; then go."""
    for place, frame in ((0, _FRAME_CS), (2, _FRAME_SS)):
        asm.load(_R.EAX, at(_COMMON, at_layout.COMMON_SELECTORS + place), Code.MOVZX_R32_RM16)
        asm.store(at(_FRAME, frame), _R.AX, Code.MOV_RM16_R16)
    for register, place in _DATA_SREGS:
        asm.load(_R.EAX, at(_COMMON, at_layout.COMMON_SELECTORS + place), Code.MOVZX_R32_RM16)
        asm.op(Code.MOV_SREG_R32M16, register, _R.EAX)
        if place in _BASES:
            _load_base(asm, place)
    asm.load(_R.RAX, at(_IN, at_layout.IN_RFLAGS))
    asm.immediate(Code.AND_RM64_IMM32, _R.RAX, X86_EFLAGS_NT | X86_EFLAGS_ID)
    asm.op(Code.PUSH_R64, _R.RAX)
    asm.op(Code.POPFQ)
    asm.lea(_R.RSP, at(_R.RSP, 8))  # the handler's return address; LEA leaves the flags alone
    asm.constant(_R.RAX, _SYS_RT_SIGRETURN)
    asm.op(Code.SYSCALL)

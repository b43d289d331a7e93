"""General-purpose and segment register numbers, in KVM's order (VCPU_REGS_*, VCPU_SREG_*)."""

from __future__ import annotations

from typing import Final

VCPU_REGS_RAX: Final = 0
VCPU_REGS_RCX: Final = 1
VCPU_REGS_RDX: Final = 2
VCPU_REGS_RBX: Final = 3
VCPU_REGS_RSP: Final = 4
VCPU_REGS_RBP: Final = 5
VCPU_REGS_RSI: Final = 6
VCPU_REGS_RDI: Final = 7
VCPU_REGS_R8: Final = 8
VCPU_REGS_R9: Final = 9
VCPU_REGS_R10: Final = 10
VCPU_REGS_R11: Final = 11
VCPU_REGS_R12: Final = 12
VCPU_REGS_R13: Final = 13
VCPU_REGS_R14: Final = 14
VCPU_REGS_R15: Final = 15

GPR_NAMES: Final = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip

VCPU_SREG_ES: Final = 0
VCPU_SREG_CS: Final = 1
VCPU_SREG_SS: Final = 2
VCPU_SREG_DS: Final = 3
VCPU_SREG_FS: Final = 4
VCPU_SREG_GS: Final = 5
VCPU_SREG_TR: Final = 6
VCPU_SREG_LDTR: Final = 7

SREG_NAMES: Final = ("es", "cs", "ss", "ds", "fs", "gs", "tr", "ldtr")

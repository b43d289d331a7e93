"""Result codes, access flags and small constants of the emulator interface (kvm_emulate.h)."""

from __future__ import annotations

from typing import Final

# Results of callbacks and instruction handlers.
X86EMUL_CONTINUE: Final = 0
X86EMUL_UNHANDLEABLE: Final = 1
X86EMUL_PROPAGATE_FAULT: Final = 2
X86EMUL_RETRY_INSTR: Final = 3
X86EMUL_CMPXCHG_FAILED: Final = 4
X86EMUL_IO_NEEDED: Final = 5
X86EMUL_INTERCEPTED: Final = 6

X86EMUL_NAMES: Final = (
    "continue", "unhandleable", "propagate_fault", "retry_instr", "cmpxchg_failed", "io_needed",
    "intercepted",
)  # fmt: skip

# Results of decoding and of emulating one instruction.
EMULATION_FAILED: Final = -1
EMULATION_OK: Final = 0
EMULATION_RESTART: Final = 1
EMULATION_INTERCEPTED: Final = 2

# Access flags given to linearize, get_untagged_addr and is_canonical_addr.
X86EMUL_F_WRITE: Final = 1 << 0
X86EMUL_F_FETCH: Final = 1 << 1
X86EMUL_F_IMPLICIT: Final = 1 << 2
X86EMUL_F_INVLPG: Final = 1 << 3
X86EMUL_F_MSR: Final = 1 << 4
X86EMUL_F_DT_LOAD: Final = 1 << 5

# EMULTYPE_* bits that reach the decoder.
EMULTYPE_NO_DECODE: Final = 1 << 0
EMULTYPE_TRAP_UD: Final = 1 << 1
EMULTYPE_SKIP: Final = 1 << 2
EMULTYPE_TRAP_UD_FORCED: Final = 1 << 4

# enum x86emul_mode
X86EMUL_MODE_REAL: Final = 0
X86EMUL_MODE_VM86: Final = 1
X86EMUL_MODE_PROT16: Final = 2
X86EMUL_MODE_PROT32: Final = 3
X86EMUL_MODE_PROT64: Final = 4

# Repeat prefixes.
REPE_PREFIX: Final = 0xF3
REPNE_PREFIX: Final = 0xF2

# Interrupt shadows (GUEST_INTERRUPTIBILITY_INFO).
KVM_X86_SHADOW_INT_MOV_SS: Final = 1
KVM_X86_SHADOW_INT_STI: Final = 2

# Types of a decoded operand (struct operand.type). These are not the opcode's operand kinds.
OPERAND_NONE: Final = 0
OPERAND_REG: Final = 1
OPERAND_MEM: Final = 2
OPERAND_MEM_STR: Final = 3
OPERAND_IMM: Final = 4
OPERAND_XMM: Final = 5
OPERAND_MM: Final = 6

#: Operand size in bytes -> all-ones mask and sign bit of that size.
SIZE_MASK: Final = {
    1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF, 8: 0xFFFFFFFFFFFFFFFF, 16: (1 << 128) - 1,
}  # fmt: skip
SIZE_SIGN: Final = {1: 0x80, 2: 0x8000, 4: 0x80000000, 8: 1 << 63}

MASK16: Final = 0xFFFF
MASK32: Final = 0xFFFFFFFF
MASK64: Final = 0xFFFFFFFFFFFFFFFF

#: Bytes held by the fetch window and the two read caches (struct fetch_cache, read_cache).
MAX_INSN_LENGTH: Final = 15
READ_CACHE_SIZE: Final = 1024

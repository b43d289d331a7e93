"""RFLAGS bits (SDM Vol. 1 3.4.3 "EFLAGS Register")."""

from __future__ import annotations

from typing import Final

X86_EFLAGS_CF: Final = 1 << 0
X86_EFLAGS_FIXED: Final = 1 << 1
X86_EFLAGS_PF: Final = 1 << 2
X86_EFLAGS_AF: Final = 1 << 4
X86_EFLAGS_ZF: Final = 1 << 6
X86_EFLAGS_SF: Final = 1 << 7
X86_EFLAGS_TF: Final = 1 << 8
X86_EFLAGS_IF: Final = 1 << 9
X86_EFLAGS_DF: Final = 1 << 10
X86_EFLAGS_OF: Final = 1 << 11
X86_EFLAGS_IOPL_BIT: Final = 12
X86_EFLAGS_IOPL: Final = 3 << 12
X86_EFLAGS_NT: Final = 1 << 14
X86_EFLAGS_RF: Final = 1 << 16
X86_EFLAGS_VM: Final = 1 << 17
X86_EFLAGS_AC: Final = 1 << 18
X86_EFLAGS_VIF: Final = 1 << 19
X86_EFLAGS_VIP: Final = 1 << 20
X86_EFLAGS_ID: Final = 1 << 21

#: The six status flags that arithmetic instructions read and write (KVM: EFLAGS_MASK).
EFLAGS_MASK: Final = (
    X86_EFLAGS_OF | X86_EFLAGS_SF | X86_EFLAGS_ZF | X86_EFLAGS_AF | X86_EFLAGS_PF | X86_EFLAGS_CF
)

FLAG_NAMES: Final = {
    X86_EFLAGS_CF: "CF",
    X86_EFLAGS_PF: "PF",
    X86_EFLAGS_AF: "AF",
    X86_EFLAGS_ZF: "ZF",
    X86_EFLAGS_SF: "SF",
    X86_EFLAGS_TF: "TF",
    X86_EFLAGS_IF: "IF",
    X86_EFLAGS_DF: "DF",
    X86_EFLAGS_OF: "OF",
    X86_EFLAGS_IOPL: "IOPL",
    X86_EFLAGS_NT: "NT",
    X86_EFLAGS_RF: "RF",
    X86_EFLAGS_VM: "VM",
    X86_EFLAGS_AC: "AC",
    X86_EFLAGS_VIF: "VIF",
    X86_EFLAGS_VIP: "VIP",
    X86_EFLAGS_ID: "ID",
}


def flag_names(flags: int) -> list[str]:
    """Names of the flags in which any bit of `flags` is set, lowest bit first."""
    return [name for bits, name in FLAG_NAMES.items() if flags & bits]

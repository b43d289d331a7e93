"""Exits that a case describes (`kvm.exit_reason`): whether they are those of the instruction at RIP.

SDM Vol. 3C 25.1 "Instructions That Cause VM Exits", Appendix C; Tables 27-3, 27-4 for qualifications.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_CR_ACCESS: Final = 28
_DR_ACCESS: Final = 29

# fmt: off
#: Exit reason -> how the code of an instruction that makes it begins, behind its prefixes.
_CODES: Final[dict[int, tuple[bytes, ...]]] = {
    10: (b"\x0f\xa2",),                        # CPUID
    12: (b"\xf4",),                            # HLT
    13: (b"\x0f\x08",),                        # INVD
    14: (b"\x0f\x01\x3b", b"\x0f\x01\x3f"),    # INVLPG [rBX or BP+DI], [rDI or BX]
    _CR_ACCESS: (b"\x0f\x20", b"\x0f\x22"),    # MOV from and to a control register
    _DR_ACCESS: (b"\x0f\x21", b"\x0f\x23"),    # MOV from and to a debug register
    18: (b"\x0f\x01\xc1",),                    # VMCALL
    31: (b"\x0f\x32",),                        # RDMSR
    32: (b"\x0f\x30",),                        # WRMSR
    40: (b"\x90",),                            # PAUSE
    54: (b"\x0f\x09",),                        # WBINVD
    55: (b"\x0f\x01\xd1",),                    # XSETBV
}
# fmt: on


def is_own_exit(kvm: Mapping[str, Any], prefixes: bytes, opcodes: bytes) -> bool:
    """Whether the described exit says the same as hardware would of this instruction.

    Args:
        kvm: The case's `kvm`, with `exit_reason`.
        prefixes: What is in front of the opcode, REX last.
        opcodes: The rest of the code.
    """
    reason = kvm["exit_reason"]
    if "instruction_info" in kvm or not opcodes.startswith(_CODES.get(reason, ())):
        return False
    if reason in {_CR_ACCESS, _DR_ACCESS}:
        return bool(kvm.get("exit_qualification") == _qualification(prefixes, opcodes))
    return "exit_qualification" not in kvm


def _qualification(prefixes: bytes, opcodes: bytes) -> int:
    """Number of the special register, direction in bit 4, general register from bit 8 on."""
    rex = prefixes[-1] if prefixes and prefixes[-1] & 0xF0 == 0x40 else 0
    modrm = opcodes[2] if len(opcodes) > 2 else 0
    number, register = modrm >> 3 & 7 | (rex & 4) << 1, modrm & 7 | (rex & 1) << 3
    return number | (opcodes[1] in {0x20, 0x21}) << 4 | register << 8

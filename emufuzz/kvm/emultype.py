"""EMULTYPE_* bits of x86_emulate_instruction, as kvm_host.h numbers them, but for that of SVM alone."""

from __future__ import annotations

from typing import Final

from emufuzz.emulator.x86emul import (
    EMULTYPE_NO_DECODE,
    EMULTYPE_SKIP,
    EMULTYPE_TRAP_UD,
    EMULTYPE_TRAP_UD_FORCED,
)
from emufuzz.kvm.mmu.pferr import EMULTYPE_ALLOW_RETRY_PF, EMULTYPE_PF, EMULTYPE_WRITE_PF_TO_SP

EMULTYPE_VMWARE_GP: Final = 1 << 5
EMULTYPE_COMPLETE_USER_EXIT: Final = 1 << 7

#: Where no check for breakpoints on code is made: hardware has made it.
EMULTYPES_PAST_BREAKPOINTS: Final = (
    EMULTYPE_NO_DECODE | EMULTYPE_SKIP | EMULTYPE_TRAP_UD | EMULTYPE_VMWARE_GP | EMULTYPE_PF
)

__all__ = [
    "EMULTYPES_PAST_BREAKPOINTS",
    "EMULTYPE_ALLOW_RETRY_PF",
    "EMULTYPE_COMPLETE_USER_EXIT",
    "EMULTYPE_NO_DECODE",
    "EMULTYPE_PF",
    "EMULTYPE_SKIP",
    "EMULTYPE_TRAP_UD",
    "EMULTYPE_TRAP_UD_FORCED",
    "EMULTYPE_VMWARE_GP",
    "EMULTYPE_WRITE_PF_TO_SP",
]

"""The ledger of Unicorn 2.1.4 for loads of segment registers in virtual-8086 mode: an entry per register.

Shows only from states that hardware never has: in virtual-8086 mode all segments are alike. The entries
have proof tests in tests/unit/oracle/test_unicorn_vm86_gaps.py.
"""

from __future__ import annotations

from typing import Final

from iced_x86 import Mnemonic, OpKind, Register

from emufuzz.arch.regs import SREG_NAMES
from emufuzz.case.model import Outcome, Segment
from emufuzz.oracle.gaps import Condition, Gap
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.unicorn.engine import UNICORN_VERSION

_REGISTERS: Final = (Register.ES, Register.CS, Register.SS, Register.DS, Register.FS, Register.GS)
#: The second operand of these goes to the segment register that they are named after.
_FAR_POINTERS: Final = {
    Mnemonic.LES: Register.ES, Mnemonic.LSS: Register.SS, Mnemonic.LDS: Register.DS,
    Mnemonic.LFS: Register.FS, Mnemonic.LGS: Register.GS,
}  # fmt: skip
_RETURNS: Final = frozenset((Mnemonic.RETF, Mnemonic.IRET, Mnemonic.IRETD))
_BRANCHES: Final = frozenset((Mnemonic.JMP, Mnemonic.CALL))
_LIMIT: Final = 0xFFFF
_TYPE: Final = 3
_DPL: Final = 3


def _loaded(instruction: CaseInstruction) -> int:
    """The register that an instruction loads, Register.NONE if it is none."""
    decoded = instruction.decode(lax=True)
    if decoded.mnemonic in _FAR_POINTERS:
        return _FAR_POINTERS[decoded.mnemonic]
    far = decoded.op0_kind in {OpKind.FAR_BRANCH16, OpKind.FAR_BRANCH32} or decoded.is_jmp_far_indirect
    if decoded.mnemonic in _RETURNS or (
        decoded.mnemonic in _BRANCHES and (far or decoded.is_call_far_indirect)
    ):
        return Register.CS
    moves = decoded.mnemonic in {Mnemonic.MOV, Mnemonic.POP} and decoded.op0_kind == OpKind.REGISTER
    return int(decoded.op0_register) if moves and decoded.op0_register in _REGISTERS else Register.NONE


def _alike(segment: Segment) -> bool:
    """The hidden part is that of virtual-8086 mode (SDM Vol. 3B 20.2.1)."""
    return (segment.limit, segment.type, segment.s, segment.dpl, segment.p, segment.db, segment.g) == (
        _LIMIT, _TYPE, 1, _DPL, 1, 0, 0,
    )  # fmt: skip


def _stale(number: int) -> Condition:
    def applies(instruction: CaseInstruction, outcome: Outcome) -> bool:
        loads = instruction.case.mode == "vm86" and _loaded(instruction) == _REGISTERS[number]
        return loads and not _alike(outcome.system.seg[number])

    return applies


VM86_GAPS: Final[tuple[Gap, ...]] = tuple(
    Gap(
        f"unicorn-vm86-{name}",
        "unicorn",
        UNICORN_VERSION,
        (f"seg.{name}",),
        f"loading {name.upper()} in virtual-8086 mode leaves limit and attributes as they were",
        "SDM Vol. 3B 20.2.1",
        _stale(number),
    )
    for number, name in enumerate(SREG_NAMES[: len(_REGISTERS)])
)

"""How an instruction is run so that it alone runs, decided from its bytes.

Most instructions have a HLT behind them, as generated cases do: it raises #GP at CPL 3, with the
state that the instruction left. What branches, and what has other code behind it, runs with the
trap flag, which is four times as slow. REP string instructions trap after every iteration and
PUSHF shows the flag, so they get a HLT in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from iced_x86 import Decoder, FlowControl

from emufuzz.arch.exceptions import BP_VECTOR, DB_VECTOR, OF_VECTOR
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.oracle.native.layout import MAX_CODE
from emufuzz.oracle.unicorn.prefixes import RepString, rep_string, split_prefixes

_MAX_INSTRUCTION: Final = 15
_HLT: Final = 0xF4
#: Opcode -> the vector of the trap that it is, with RIP behind it.
_TRAPS: Final = {b"\xcc": BP_VECTOR, b"\xce": OF_VECTOR, b"\xf1": DB_VECTOR}
#: INT n through gates of Linux's IDT that are open to CPL 3, but for that of system calls.
_GATES: Final = {b"\xcd\x03": BP_VECTOR, b"\xcd\x04": OF_VECTOR}
_SHOWS_FLAGS: Final = frozenset((b"\x9c",))
_LOADS_FLAGS: Final = frozenset((b"\x9d", b"\xcf"))
#: SYSCALL, SYSENTER, INT 0x80; VMCALL, VMMCALL, VMFUNC.
_SYSCALLS: Final = frozenset((b"\x0f\x05", b"\x0f\x34", b"\xcd\x80"))
_HYPERCALLS: Final = frozenset((b"\x0f\x01\xc1", b"\x0f\x01\xd9", b"\x0f\x01\xd4"))


@dataclass(frozen=True, slots=True)
class Plan:
    """How to run an instruction.

    Attributes:
        laid: The bytes to put at RIP.
        record: They as a record has them, with zeros up to MAX_CODE bytes.
        step: Run it with the trap flag.
        trap: Vector of an exception that the instruction raises as a trap; -1 if it is none of them.
        loads_flags: POPF or IRET, which replace TF, AC and NT.
        rep: What it repeats, if it is a REP string instruction.
        repeat_prefix: Its REP prefix, 0xf2 or 0xf3; 0 if it is none.
        system_call: It calls the kernel or a hypervisor, and must not run.
    """

    laid: bytes
    record: bytes
    step: bool
    trap: int
    loads_flags: bool
    rep: RepString | None
    repeat_prefix: int
    system_call: bool


@lru_cache(maxsize=1 << 14)
def plan_of(code: bytes, mode: str, bits: int) -> Plan:
    """The plan for the instruction at the start of `code`, in code of 16, 32 or 64 bits.

    Raises:
        UnsupportedCaseError: there is no code, or too much.
    """
    if not 0 < len(code) < MAX_CODE:
        raise UnsupportedCaseError(f"code: native takes 1 to {MAX_CODE - 1} bytes, got {len(code)}")
    prefixes, opcode = split_prefixes(code, mode)
    rep = rep_string(code, mode, int(bits == 32))
    instruction = _decode(code, bits)
    length = instruction.len if instruction.code else 0
    step, laid = True, code
    if length and (rep is not None or opcode[:1] in _SHOWS_FLAGS):
        laid, step = code[:length] + bytes((_HLT,)) + code[length + 1 :], False
    elif length and instruction.flow_control == FlowControl.NEXT and code[length : length + 1] == b"\xf4":
        step = False
    return Plan(
        laid=laid,
        record=laid.ljust(MAX_CODE, b"\0"),
        step=step,
        trap=_TRAPS.get(opcode[:1], _GATES.get(opcode[:2], -1)),
        loads_flags=opcode[:1] in _LOADS_FLAGS,
        rep=rep,
        repeat_prefix=0 if rep is None else next(b for b in reversed(prefixes) if b in {0xF2, 0xF3}),
        system_call=opcode[:2] in _SYSCALLS or opcode[:3] in _HYPERCALLS,
    )


def _decode(code: bytes, bits: int) -> Any:
    return Decoder(bits, code[:_MAX_INSTRUCTION]).decode()

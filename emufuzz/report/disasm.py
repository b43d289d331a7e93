"""Disassembly of a case's code, in the bitness its mode gives it."""

from __future__ import annotations

from typing import Final

import capstone

from emufuzz.case.model import Case

#: Mode -> operand size of CS in bits (SDM Vol. 3A 3.4.5, CS.D and CS.L).
BITS: Final = {
    "real": 16,
    "vm86": 16,
    "prot16": 16,
    "prot32": 32,
    "compat16": 16,
    "compat32": 32,
    "prot64": 64,
}
_CAPSTONE: Final = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
_engines: dict[int, capstone.Cs] = {}


def _engine(bits: int) -> capstone.Cs:
    if bits not in _engines:
        _engines[bits] = capstone.Cs(capstone.CS_ARCH_X86, _CAPSTONE[bits])
    return _engines[bits]


def disassemble(case: Case) -> list[str]:
    """The first `case.count` instructions as "offset  bytes  text" lines, and what follows them.

    The offset is RIP-relative to the code segment. Bytes that are no instruction to the
    disassembler are shown as such: KVM may well decode them.
    """
    lines, done = [], 0
    for insn in _engine(BITS[case.mode]).disasm(case.code, case.rip, max(case.count, 1)):
        lines.append(_line(insn.address, bytes(insn.bytes), f"{insn.mnemonic} {insn.op_str}".rstrip()))
        done += insn.size
    if done < len(case.code):
        text = "(bytes after it)" if lines else "(not an instruction to the disassembler)"
        lines.append(_line(case.rip + done, case.code[done:], text))
    return lines


def mnemonic(case: Case) -> str:
    """The first instruction in one line, or its bytes when it cannot be disassembled."""
    for insn in _engine(BITS[case.mode]).disasm(case.code, case.rip, 1):
        return f"{insn.mnemonic} {insn.op_str}".rstrip()
    return f"db {case.code[:15].hex(' ')}" if case.code else "(no code)"


def _line(rip: int, data: bytes, text: str) -> str:
    shown = data[:15].hex(" ") + (" ..." if len(data) > 15 else "")
    return f"{rip:#x}  {shown}  {text}"

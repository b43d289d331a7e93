"""Which accesses an instruction may make on its way: callbacks of an emulator, accesses to devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from iced_x86 import Mnemonic

from emufuzz.arch.exceptions import PF_VECTOR
from emufuzz.case.devices import MMIO, trace_from_obj
from emufuzz.case.model import Event, Outcome, code_address
from emufuzz.oracle.rules.control import far_jump
from emufuzz.oracle.rules.decoded import MAX_INSTRUCTION, Decoded
from emufuzz.oracle.rules.memory import opaque
from emufuzz.oracle.rules.privilege import PORTS, port_of, port_size
from emufuzz.oracle.rules.rule import EVENTS, Check, Encoding, Found, Rule
from emufuzz.oracle.rules.segments import loaded_segment
from emufuzz.oracle.rules.view import MASK32, MASK64, Access, View

_SYSTEM_READERS: Final = frozenset(
    (Mnemonic.LLDT, Mnemonic.LTR, Mnemonic.LAR, Mnemonic.LSL, Mnemonic.VERR, Mnemonic.VERW, Mnemonic.RETF,
     Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ, Mnemonic.INT, Mnemonic.INT3, Mnemonic.INTO, Mnemonic.INT1,
     Mnemonic.RSM)
)  # fmt: skip
_DATA: Final = frozenset(("read", "write", "cmpxchg"))
_PORT: Final = frozenset(("in", "out"))
#: Callback -> what may call it: mnemonics, or the second opcode bytes of MOV.
_SYSTEM_WRITES: Final = {
    "set_gdt": frozenset((Mnemonic.LGDT, Mnemonic.RSM)),
    "set_idt": frozenset((Mnemonic.LIDT, Mnemonic.RSM)),
    "set_cr": frozenset((Mnemonic.MOV, Mnemonic.CLTS, Mnemonic.LMSW, Mnemonic.RSM)),
    "set_dr": frozenset((Mnemonic.MOV, Mnemonic.RSM)),
    "set_xcr": frozenset((Mnemonic.XSETBV,)),
    "set_msr": frozenset((Mnemonic.WRMSR, Mnemonic.RSM)),
    "invlpg": frozenset((Mnemonic.INVLPG,)),
    "halt": frozenset((Mnemonic.HLT,)),
    "wbinvd": frozenset((Mnemonic.WBINVD, Mnemonic.INVD, Mnemonic.WBNOINVD)),
    "rdpmc": frozenset((Mnemonic.RDPMC,)),
}
#: Second opcode byte of the MOV that may; reading a debug register sets DR6.BD if DR7.GD is set.
_MOVES: Final = {"set_cr": frozenset((0x22,)), "set_dr": frozenset((0x21, 0x23))}
_PRIVILEGED: Final = frozenset(("set_gdt", "set_idt", "set_cr", "set_dr", "set_xcr", "set_msr", "halt"))


def _operands(outcome: Outcome) -> Iterator[tuple[str, int, int]]:
    """(read, write or cmpxchg; linear address; size) of accesses with the guest's own rights."""
    for event in outcome.events:
        if event[0] in _DATA and event[-1] != "sys":
            size = event[2] if event[0] == "read" else len(event[2])
            yield event[0], event[1], size


def _shown(event: Event | tuple[Any, ...]) -> str:
    parts = (part.hex() if isinstance(part, bytes) else hex(part) if isinstance(part, int) else str(part)
             for part in event)  # fmt: skip
    return " ".join(parts)


def _read_once(view: View, outcome: Outcome) -> Found | None:
    """As often as the instruction has operands there: CMPS may compare a place with itself."""
    seen: list[tuple[int, int]] = []
    for kind, address, size in _operands(outcome):
        if kind != "read":
            continue
        again = sum(address < start + length and start < address + size for start, length in seen)
        if again and again >= sum(a.reference.read for a in view.accesses if _touches(a, address, size)):
            return Found("device_trace", f"{size} bytes at {address:#x} are read again")
        seen.append((address, size))
    return None


def _touches(access: Access, address: int, size: int) -> bool:
    return address < access.linear + access.size and access.linear < address + size


def _inside(view: View, address: int, size: int, *, write: bool) -> bool:
    mask = MASK64 if view.long else MASK32
    for access in view.accesses:
        allowed = access.reference.write if write else access.reference.read
        if allowed and (address - access.linear & mask) + size <= max(access.size, 1):
            return True
    return False


def _reads_inside(view: View, outcome: Outcome) -> Found | None:
    for kind, address, size in _operands(outcome):
        if kind == "read" and not _inside(view, address, size, write=False):
            return Found("device_trace", f"{size} bytes at {address:#x} are read")
    return None


def _writes_inside(view: View, outcome: Outcome) -> Found | None:
    for kind, address, size in _operands(outcome):
        if kind != "read" and not _inside(view, address, size, write=True):
            return Found("device_trace", f"{size} bytes at {address:#x} are written")
    return None


def _supervisor(_view: View, outcome: Outcome) -> Found | None:
    for event in outcome.events:
        if event[0] in {"read", "write"} and event[-1] == "sys":
            return Found("device_trace", _shown(event))
    return None


def _no_access(_view: View, outcome: Outcome) -> Found | None:
    """An exception that comes before any operand is looked at: #UD and #NM."""
    if outcome.exception is None or outcome.exception[0] not in {6, 7}:
        return None
    for event in outcome.events:
        if event[0] in _DATA | _PORT:
            return Found("device_trace", _shown(event))
    return None


def _write_last(_view: View, outcome: Outcome) -> Found | None:
    """Of what faults only the write that itself is the #PF has been tried."""
    fault = outcome.exception
    if fault is None:
        return None
    for kind, address, size in _operands(outcome):
        own = fault[0] == PF_VECTOR and fault[2] is not None and address <= fault[2] < address + size
        if kind != "read" and not own:
            return Found("mem", f"{size} bytes at {address:#x} are written before the fault")
    return None


def _fetched(view: View, outcome: Outcome) -> Found | None:
    start, mask = code_address(view.case), MASK64 if view.long else MASK32
    for event in outcome.events:
        if event[0] == "fetch" and (event[1] - start & mask) + event[2] > MAX_INSTRUCTION:
            return Found("device_trace", _shown(event))
    return None


def _no_ports(_view: View, outcome: Outcome) -> Found | None:
    found = next((event for event in outcome.events if event[0] in _PORT), None)
    return None if found is None else Found("device_trace", _shown(found))


def _port_event(view: View, outcome: Outcome) -> Found | None:
    """The port and size of the instruction; without INS, OUTS only one element."""
    for event in outcome.events:
        if event[0] not in _PORT:
            continue
        count = event[3] if len(event) > 3 else 1
        size = event[2] if event[0] == "in" else len(event[2])
        wanted = port_size(view.insn)
        if event[1] != port_of(view) or size != wanted or (count != 1 and not view.insn.repeats):
            return Found("device_trace", _shown(event), f"{wanted} bytes at port {port_of(view):#x}, once")
    return None


def _locked(_view: View, outcome: Outcome) -> Found | None:
    """The write is part of a read-modify-write, unless that was tried and given up."""
    tried = any(event[0] == "cmpxchg" for event in outcome.events)
    write = next((event for event in outcome.events if event[0] == "write"), None)
    return None if tried or write is None else Found("device_trace", _shown(write))


def _system_write(view: View, outcome: Outcome) -> Found | None:
    for event in outcome.events:
        callers = _SYSTEM_WRITES.get(event[0])
        if callers is None:
            continue
        moves = view.insn.mnemonic == Mnemonic.MOV and not _moves(view.insn, event[0])
        if view.insn.mnemonic not in callers or moves or (event[0] in _PRIVILEGED and view.cpl > 0):
            return Found("system", _shown(event))
    return None


def _moves(insn: Decoded, callback: str) -> bool:
    return insn.opcode[0] == 0x0F and insn.opcode[1] in _MOVES.get(callback, ())


def _trace(outcome: Outcome) -> list[Any]:
    return trace_from_obj((outcome.extra or {}).get("device_trace") or [])


def _device_read_once(view: View, outcome: Outcome) -> Found | None:
    """CMPS may compare a device with itself."""
    seen: list[int] = []
    operands = max(sum(access.reference.read for access in view.accesses), 1)
    for access in _trace(outcome):
        if access.kind == MMIO and not access.write:
            if seen.count(access.addr) >= operands:
                return Found("device_trace", f"{access.size} bytes at {access.addr:#x} are read again")
            seen.append(access.addr)
    return None


def _device_before_fault(_view: View, outcome: Outcome) -> Found | None:
    if outcome.exception is None or outcome.exception[0] not in {6, 7}:
        return None
    found = next(iter(_trace(outcome)), None)
    return (
        None
        if found is None
        else Found("device_trace", f"{'write' if found.write else 'read'} at {found.addr:#x}")
    )


def _device_port(view: View, outcome: Outcome) -> Found | None:
    for access in _trace(outcome):
        if access.kind != MMIO and (access.addr, access.size) != (port_of(view), port_size(view.insn)):
            wanted = f"{port_size(view.insn)} bytes at port {port_of(view):#x}"
            return Found("device_trace", f"{access.size} bytes at port {access.addr:#x}", wanted)
    return None


def _simple(insn: Decoded) -> bool:
    """All accesses are operands that iced names, and happen at most once."""
    if not insn.valid or opaque(insn) or insn.repeats or insn.mnemonic in _SYSTEM_READERS:
        return False
    return loaded_segment(insn) is None and not far_jump(insn)


def _single(insn: Decoded) -> bool:
    """One write at most, and that is the last thing to happen."""
    several = insn.mnemonic in {Mnemonic.PUSHA, Mnemonic.PUSHAD, Mnemonic.FXSAVE, Mnemonic.FXSAVE64}
    return _simple(insn) and not several


def _reads_no_tables(insn: Decoded) -> bool:
    loads = loaded_segment(insn) is not None or far_jump(insn) or insn.mnemonic in _SYSTEM_READERS
    return insn.known and not loads and insn.mnemonic not in PORTS


def _atomic(insn: Decoded) -> bool:
    exchange = insn.mnemonic == Mnemonic.XCHG and insn.mod != 3 and insn.opcode[0] in {0x86, 0x87}
    return insn.valid and (insn.lock or exchange)


def _is_port(insn: Decoded) -> bool:
    return insn.mnemonic in PORTS and insn.valid


def _rule(name: str, citation: str, demand: str, encoding: Encoding | None, finds: Check) -> Rule:
    return Rule(name, EVENTS, citation, demand, None, encoding, finds=finds)


# fmt: off
RULES: Final = (
    _rule("event-read-once", "SDM Vol. 3A 8.2.5", "nothing is read twice", _simple, _read_once),
    _rule("event-read-operand", "SDM Vol. 2A 3.1.1.9", "only what the instruction reads is read",
          _simple, _reads_inside),
    _rule("event-write-operand", "SDM Vol. 2A 3.1.1.9", "only what the instruction writes is written",
          _simple, _writes_inside),
    _rule("event-supervisor", "SDM Vol. 3A 4.6.1", "operands are accessed with the rights of the CPL",
          _reads_no_tables, _supervisor),
    _rule("event-before-decode-fault", "SDM Vol. 3A 6.9", "#UD and #NM come before any access",
          None, _no_access),
    _rule("event-write-before-fault", "SDM Vol. 3A 6.6", "a fault comes before the write", _single,
          _write_last),
    _rule("event-fetch-window", "SDM Vol. 2A 2.3.11", "not more than 15 bytes are fetched", None, _fetched),
    _rule("event-no-port", "SDM Vol. 1 19.3", "other instructions access no ports",
          lambda insn: insn.mnemonic not in PORTS, _no_ports),
    _rule("event-port", "SDM Vol. 1 19.3", "the port and size are those of the instruction", _is_port,
          _port_event),
    _rule("event-locked", "SDM Vol. 3A 8.1.2", "a locked read-modify-write is one operation", _atomic,
          _locked),
    _rule("event-system-write", "SDM Vol. 3A 2.8",
          "system registers are loaded by their instructions at CPL 0",
          lambda insn: insn.known, _system_write),
    _rule("device-read-once", "SDM Vol. 3A 8.2.5", "a device is not read twice", _simple, _device_read_once),
    _rule("device-before-decode-fault", "SDM Vol. 3A 6.9", "#UD and #NM come before any access to a device",
          None, _device_before_fault),
    _rule("device-port", "SDM Vol. 1 19.3", "the port and size are those of the instruction", _is_port,
          _device_port),
)
# fmt: on

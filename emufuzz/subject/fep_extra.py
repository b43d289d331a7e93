"""What the forced-emulation path adds to the state of a recorded vector: exits, devices, queued exceptions.

The recording has callbacks instead: an access to a port there is an exit to userspace here.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from emufuzz.arch.exceptions import DB_VECTOR, PF_VECTOR
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, Case, Outcome, case_pages, code_address
from emufuzz.subject.fep_rules import Prediction, Vector

#: Reason, qualification, vectoring and exit information, error code of the #UD that made KVM look.
_UD_EXIT_INFO: Final = (0, 0, 0, 0x80000306, 0)


class _Access(NamedTuple):
    """An access of the emulator to a port: elements of `size` bytes, with their data."""

    direction: str
    port: int
    size: int
    data: bytes


def predicted_extra(vector: Vector, prediction: Prediction) -> dict[str, Any]:
    """What a prediction adds to the outcome's state, as Outcome.extra has it; see `without_rest`."""
    accesses = _accesses(prediction.outcome, vector.case.port_in)
    exits = [_io_exit(access) for access in accesses]
    if prediction.left == "failure":
        exits.append(_failure_exit(_instruction(vector.seen, prediction.outcome.length or 0)))
    return {
        "exits": exits,
        "device_trace": [entry for access in accesses for entry in _device_trace(access)],
        "injected": _injected(prediction),
        "interrupt_shadow": prediction.outcome.interruptibility,
    }


def without_rest(entry: dict[str, Any], length: int) -> dict[str, Any]:
    """An exit without the bytes that were fetched beyond an instruction of `length` bytes."""
    if "insn_bytes" not in entry:
        return entry
    return entry | {
        "insn_bytes": entry["insn_bytes"][: 2 * length], "insn_size": min(entry["insn_size"], length)
    }  # fmt: skip


def _accesses(outcome: Outcome, stream: bytes) -> list[_Access]:
    """The accesses to ports that the emulator made, in order; an OUT ends it for userspace."""
    found: list[_Access] = []
    for event in outcome.events:
        if event[0] == "in":
            length = event[2] * (event[3] if len(event) > 3 else 1)
            found.append(_Access("in", event[1], event[2], stream[:length].ljust(length, b"\xff")))
            stream = stream[length:]
        elif event[0] == "out":
            found.append(_Access("out", event[1], len(event[2]), event[2]))
            break
    return found


def _io_exit(access: _Access) -> dict[str, Any]:
    """KVM_EXIT_IO as emulator_pio_in_out fills it: what IN gets is not there yet."""
    direction, port, size, data = access
    shown = data if direction == "out" else bytes(len(data))
    return {
        "reason": "IO", "direction": direction, "size": size, "port": port, "count": len(data) // size,
        "data": shown.hex(),
    }  # fmt: skip


def _device_trace(access: _Access) -> list[dict[str, Any]]:
    direction = "read" if access.direction == "in" else "write"
    return [
        {
            "kind": "pio", "port": access.port, "size": access.size, "direction": direction,
            "data": access.data[i : i + access.size].hex(),
        }
        for i in range(0, len(access.data), access.size)
    ]  # fmt: skip


def _instruction(case: Case, length: int) -> bytes:
    """The instruction's bytes; an operand may lie beyond `code`."""
    address, pages = code_address(case), case_pages(case)
    return bytes(pages[address + i >> PAGE_SHIFT][address + i & PAGE_MASK] for i in range(length))


def _failure_exit(code: bytes) -> dict[str, Any]:
    """KVM_EXIT_INTERNAL_ERROR as prepare_emulation_failure_exit fills it."""
    return {
        "reason": "INTERNAL_ERROR", "suberror": 1, "flags": 1, "info": list(_UD_EXIT_INFO),
        "insn_size": len(code), "insn_bytes": code.hex(),
    }  # fmt: skip


def _injected(prediction: Prediction) -> list[dict[str, Any]]:
    """The queued exception: #PF carries CR2, #DB the bits for DR6."""
    if prediction.outcome.exception is None:
        return []
    vector, error_code, address = prediction.outcome.exception
    entry: dict[str, Any] = {"vector": vector}
    if error_code is not None:
        entry["error_code"] = error_code
    if vector == PF_VECTOR:
        entry["payload"] = hex(address or 0)
    elif vector == DB_VECTOR and prediction.payload:
        entry["payload"] = hex(prediction.payload)
    return [entry]

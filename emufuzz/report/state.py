"""The state before an instruction, compactly: what differs from the defaults, wrapped to the width."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Final

from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES
from emufuzz.case.model import DEFAULT_FPU, Case, Segment, System
from emufuzz.report.fields import CONTROL, FPU_WORDS, show_flags

SHOWN_BYTES: Final = 16  # of one memory entry
GLUE: Final = "\0"  # a space at which a line is not broken


def state_lines(case: Case, width: int) -> list[str]:
    """The case's state as lines of at most `width` columns where its values allow that."""
    lines: list[str] = []
    for title, words in _groups(case):
        if words:
            lines += _wrap(title, words, width)
    return lines


def _wrap(title: str, words: list[str], width: int) -> list[str]:
    text = f"{title:<8}" + "  ".join(word.replace(" ", GLUE) for word in words)
    wrapped = textwrap.wrap(
        text,
        width=max(width, 40),
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(GLUE, " ") for line in wrapped]


def _groups(case: Case) -> Iterator[tuple[str, list[str]]]:
    yield "gpr", [f"{n}={v:#x}" for n, v in zip(GPR_NAMES, case.gpr, strict=True) if v]
    yield "rip", [f"{case.rip:#x}", f"rflags={show_flags(case.rflags)}"]
    for name, segment in zip(SREG_NAMES, case.system.seg, strict=True):
        yield name, _segment(segment)
    yield "control", _control(case.system)
    yield "msr", [f"{index:#x}={value:#x}" for index, value in case.system.msr]
    yield "fpu", _fpu(case.system)
    yield "memory", [_entry(addr, data) for addr, data in case.mem.entries]
    yield "phys", [_entry(_number(e["addr"]), bytes.fromhex(e.get("data", ""))) for e in _extra(case, "phys")]
    yield "devices", [_device(device) for device in _extra(case, "devices")]
    yield "kvm", _kvm((case.extra or {}).get("kvm", {}))
    yield "script", [_text(call) for call in _extra(case, "callbacks")]
    yield "other", _other(case)


def _extra(case: Case, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (case.extra or {}).get(name, [])
    return found


def _number(value: int | str) -> int:
    return int(value, 0) if isinstance(value, str) else value


def _device(device: Mapping[str, Any]) -> str:
    start = f"port {device['port']:#x}" if "port" in device else f"{_number(device['addr']):#x}"
    reads = bytes.fromhex(device.get("reads", ""))
    words = [f"{start}+{device['size']:#x}", device.get("behaviour", "stream")]
    return " ".join(words + ([f"reads={_head(reads)}"] if reads else []))


def _kvm(kvm: Mapping[str, Any]) -> list[str]:
    """The machine around the emulator: members of members by themselves, slots as address+size."""
    words = []
    for name, value in kvm.items():
        if name == "memslots":
            words += [_slot(slot) for slot in value]
        elif isinstance(value, Mapping):
            words += [f"{name}.{_text(member)}={_text(inner)}" for member, inner in value.items()] or [name]
        else:
            words.append(f"{name}={_text(value)}")
    return words


def _slot(slot: Mapping[str, Any]) -> str:
    """1 = log dirty pages, 2 = read-only."""
    flags = _number(slot.get("flags", 0))
    names = [name for bit, name in ((1, "log"), (2, "ro")) if flags & bit]
    return " ".join([f"slot {_number(slot['base']):#x}+{_number(slot['size']):#x}", *names])


def _text(value: Any) -> str:
    """A member of a document, without quotation marks; numbers above 9 in hexadecimal."""
    if isinstance(value, Mapping):
        return "{" + " ".join(f"{_text(name)}={_text(member)}" for name, member in value.items()) + "}"
    if isinstance(value, list):
        return "[" + " ".join(map(_text, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:#x}" if value > 9 else str(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _segment(segment: Segment) -> list[str]:
    if segment == Segment():
        return []
    bits = "".join(f" {n}" for n in ("s", "p", "avl", "l", "db", "g") if getattr(segment, n))
    return [
        f"{segment.sel:04x}",
        f"base={segment.base:#x}",
        f"limit={segment.limit:#x}",
        f"type={segment.type}",
        f"dpl={segment.dpl}" + bits,
    ]


def _control(system: System) -> list[str]:
    words = [f"{name}={getattr(system, name):#x}" for name in CONTROL if getattr(system, name)]
    words += [f"dr{i}={value:#x}" for i, value in enumerate(system.dr) if value]
    for name, table in (("gdtr", system.gdtr), ("idtr", system.idtr)):
        if table.base or table.limit:
            words.append(f"{name}={table.base:#x}/{table.limit:#x}")
    return words


def _fpu(system: System) -> list[str]:
    fpu = system.fpu
    words = [
        f"{name}={getattr(fpu, name):#x}"
        for name in FPU_WORDS
        if getattr(fpu, name) != getattr(DEFAULT_FPU, name)
    ]
    words += [f"xmm{i}={value:#x}" for i, value in enumerate(fpu.xmm) if value]
    words += [f"mm{i}={value:#x}" for i, value in enumerate(fpu.mm) if value]
    return words


def _entry(addr: int, data: bytes) -> str:
    """One memory entry: its address, then its first bytes or, for a page of zeros, nothing."""
    body = data.rstrip(b"\0")
    return f"[{addr:#x}]={_head(body)}" if body else f"[{addr:#x}]"


def _head(data: bytes) -> str:
    """The first bytes, with a mark if there are more."""
    return data[:SHOWN_BYTES].hex() + ("..." if len(data) > SHOWN_BYTES else "")


def _other(case: Case) -> list[str]:
    words = []
    if case.vendor != "intel":
        words.append(f"vendor={case.vendor}")
    if case.count != 1:
        words.append(f"count={case.count}")
    if case.port_in:
        words.append(f"port_in={case.port_in[:SHOWN_BYTES].hex()}")
    if case.emul_type:
        words.append(f"emul_type={case.emul_type:#x}")
    if case.single:
        words.append("single")
    if case.path is not None:
        words.append(f"path={case.path}")
    return words

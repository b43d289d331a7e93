"""What a case with a path adds to its explanation: exits to userspace, device accesses, injected events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from emufuzz.arch.exceptions import exception_name
from emufuzz.case.model import Outcome

SHOWN: Final = 32  # of one list

_SHADOWS: Final = {1: "MOV SS", 2: "STI", 3: "MOV SS and STI"}


def exit_lines(outcome: Outcome) -> list[str]:
    """The lines, headed by an empty one; none for an outcome that has nothing of this."""
    extra = outcome.extra or {}
    lines: list[str] = []
    for title, items in (
        ("left to userspace:", [_exit(item) for item in extra.get("exits", ())]),
        ("devices:", [_access(item) for item in extra.get("device_trace", ())]),
        ("for the guest:", list(_guest(extra))),
    ):
        if items:
            lines += ["", title, *("  " + item for item in items[:SHOWN])]
            if len(items) > SHOWN:
                lines.append(f"  ... and {len(items) - SHOWN} more")
    return lines


def _exit(item: Mapping[str, Any]) -> str:
    """`MMIO phys_addr=0x9000 len=4 is_write=0`; members that are empty are left out."""
    members = [f"{name}={_value(value)}" for name, value in item.items() if name != "reason" and value != ""]
    return " ".join([f"KVM_EXIT_{item['reason']}", *members])


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int):
        return hex(value) if value > 9 else str(value)
    if isinstance(value, list):
        return "[" + " ".join(_value(item) for item in value) + "]"
    return str(value)


def _access(item: Mapping[str, Any]) -> str:
    """`mmio write 0x9000 01020304`."""
    place = item.get("addr", item.get("port", 0))
    at = place if isinstance(place, str) else hex(place)
    return f"{item['kind']} {item['direction']} {at} {item['data']}"


def _guest(extra: Mapping[str, Any]) -> Iterator[str]:
    for item in extra.get("injected", ()):
        code, payload = item.get("error_code"), item.get("payload")
        text = exception_name(item["vector"]) + ("" if code is None else f"({code:#x})")
        yield text if payload is None else f"{text} payload {payload}"
    if shadow := extra.get("interrupt_shadow", 0):
        yield f"interrupts blocked by {_SHADOWS[shadow]}"
    if extra.get("livelock"):
        yield "resumed at the same instruction for ever"

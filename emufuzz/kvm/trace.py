"""What KVM would have traced: events in the shape of its tracepoints, printed as trace-cmd does.

A `Trace` collects events; whoever runs a vCPU with one (`vcpu.trace`) prints them afterwards. Names
and fields are those of `tracepoints.TRACEPOINTS`, which follow Linux 6.12.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from emufuzz.kvm.tracepoints import TRACEPOINTS

_STEPS_PER_SECOND: Final = 1_000_000
_NAME_WIDTH: Final = 21  # longer names push the text to the right


class TraceEvent(NamedTuple):
    """One hit of the tracepoint `name`; `fields` are raw, as the table declares them."""

    name: str
    fields: dict[str, Any]


class Trace:
    """The events of a run, oldest first."""

    __slots__ = ("events",)

    def __init__(self) -> None:
        self.events: list[TraceEvent] = []

    def emit(self, name: str, /, **fields: Any) -> None:
        """Add an event.

        Raises:
            KeyError: there is no tracepoint `name`, or its fields are not exactly `fields`.
        """
        tracepoint = TRACEPOINTS.get(name)
        if tracepoint is None:
            raise KeyError(f"{name}: not a tracepoint")
        if fields.keys() != tracepoint.fields.keys():
            raise KeyError(f"{name}: fields {', '.join(fields)}; declared {', '.join(tracepoint.fields)}")
        self.events.append(TraceEvent(name, fields))


def format_event(event: TraceEvent, vcpu_id: int = 0) -> str:
    """`name: text`, with the text that the kernel's format of that tracepoint gives."""
    return f"{event.name}: {event_text(event, vcpu_id)}"


def event_text(event: TraceEvent, vcpu_id: int = 0) -> str:
    """The text of an event without its name; `vcpu_id` is the vCPU that hit the tracepoint."""
    return TRACEPOINTS[event.name].format(event.fields, vcpu_id)


def format_trace(
    events: Iterable[TraceEvent], vcpu_id: int = 0, pid: int = 0, task: str = "emufuzz"
) -> list[str]:
    """The lines of `trace-cmd report`: task-pid, [cpu], time, event, text.

    The model has no time. Events are numbered from 1 and the number stands for microseconds, so the
    same run always prints the same lines. The CPU has the number of the vCPU.
    """
    head = f"{task:>16}-{pid:<5} [{vcpu_id:03d}]"
    lines = []
    for step, event in enumerate(events, start=1):
        name = f"{event.name}:".ljust(_NAME_WIDTH)
        lines.append(f"{head} {_timestamp(step)}: {name} {event_text(event, vcpu_id)}".rstrip())
    return lines


def _timestamp(step: int) -> str:
    seconds, microseconds = divmod(step, _STEPS_PER_SECOND)
    return f"{seconds:5d}.{microseconds:06d}"

"""The child process: batches of cases come in on one pipe, outcomes go out on another.

Every message is its length, 4 bytes, and a pickle. First the child says how it is: an empty string,
or why the oracle is not available. Then for each batch, a list of cases, it sends one outcome per
case, each as soon as it is there, so that the parent knows which case ended a child that died.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import struct
import sys
from typing import BinaryIO, Final

from emufuzz.case.model import Case, Outcome, System
from emufuzz.oracle.base import OracleUnavailableError

LENGTH: Final = struct.Struct("<I")
_SET_DEATH_SIGNAL: Final = 1

#: An outcome, and its System if that is not the case's own.
Answer = tuple[Outcome, System | None]


def write_message(stream: BinaryIO, message: object) -> None:
    """Send a message."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    stream.write(LENGTH.pack(len(data)) + data)
    stream.flush()


def read_message(stream: BinaryIO) -> list[Case] | None:
    """The next batch; None at the end."""
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    data = stream.read(LENGTH.unpack(header)[0])
    batch: list[Case] = pickle.loads(data)  # noqa: S301 - from the parent process
    return batch


def _without_system(case: Case, outcome: Outcome) -> Answer:
    """What is sent: the case's own System stays where it is."""
    changed = None if outcome.system is case.system else outcome.system
    outcome.system = System()
    return outcome, changed


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer batches until the pipe is closed."""
    try:
        from emufuzz.oracle.bochs.runner import Runner  # noqa: PLC0415 - whatever it raises is the answer

        runner = Runner()
    except OracleUnavailableError as error:
        write_message(sink, str(error))
        return
    write_message(sink, "")
    while (batch := read_message(source)) is not None:
        runner.forget()
        for case in batch:
            write_message(sink, _without_system(case, runner.run(case)))


def main() -> None:
    """Serve the parent; what Bochs prints does not get between the messages."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()

"""The process that runs libFuzzer: executions as the driver allows them, accounts back.

It is started as a program of its own, as libFuzzer ends its process, and as nothing of the emulator may be
loaded before it is instrumented. It ends when the driver hangs up.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from emufuzz.fuzz.libfuzzer.instrument import InstrumentationError, instrument, load_atheris
from emufuzz.fuzz.libfuzzer.mark import LONGEST, Mark

#: Bytes of the longest input that is made.
MAX_LEN: Final = 8192
#: libFuzzer's own handling of signals, time and memory is left to the driver.
_FLAGS: Final = (
    "-handle_abrt=0", "-handle_bus=0", "-handle_fpe=0", "-handle_ill=0", "-handle_int=0", "-handle_segv=0",
    "-handle_term=0", "-handle_usr1=0", "-handle_usr2=0", "-handle_xfsz=0", "-timeout=1000000",
    "-rss_limit_mb=0", "-malloc_limit_mb=0", "-detect_leaks=0", f"-max_len={MAX_LEN}", "-len_control=0",
    "-reload=1", "-print_final_stats=0", "-use_value_profile=0",
)  # fmt: skip


def main(connection_fd: int, mark_fd: int, driver: int) -> None:
    """Body of the process.

    Args:
        connection_fd: Descriptor of a socket to the driver.
        mark_fd: Descriptor of the memory of a Mark.
        driver: Process id of the driver.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's affair
    connection, mark = Connection(connection_fd), Mark(mark_fd)
    try:
        count = instrument()
    except (InstrumentationError, ImportError) as error:
        connection.send(("unavailable", f"atheris: {error}"))
        return
    from emufuzz.fuzz.libfuzzer.work import Work  # noqa: PLC0415 - loads what was just instrumented

    try:
        setup, directory, seed = connection.recv()
    except (EOFError, OSError):
        return
    work = Work.start(connection, mark, setup, driver)
    if work is None:
        return
    connection.send(("ready", count))
    _fuzz(work, Path(directory), seed, connection)


def _fuzz(work: Any, directory: Path, seed: int, connection: Connection) -> None:
    """Hand the process over to libFuzzer, which does not give it back."""
    atheris = load_atheris()
    mutators = work.mutators(
        lambda data, longest: bytes(atheris.Mutate(data, longest))
    )  # Fuzz() puts it there
    arguments = ["emufuzz", str(directory), *_FLAGS, f"-seed={seed}", f"-artifact_prefix={directory}/."]

    def one(data: bytes) -> None:
        try:
            work.execute(data[:LONGEST])
        except (EOFError, OSError):
            os._exit(0)  # the driver is gone
        except BaseException:  # noqa: BLE001 - the driver shall hear of it, libFuzzer would only end
            connection.send(("error", traceback.format_exc()))
            os._exit(1)

    atheris.Setup(
        arguments, one, internal_libfuzzer=True,
        custom_mutator=mutators.mutate, custom_crossover=mutators.crossover,
    )  # fmt: skip
    atheris.Fuzz()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))

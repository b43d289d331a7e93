"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file: a reader, also one after a crash, sees the old one or the whole new one.

    Raises:
        OSError: It could not be written; nothing is left behind, and the old file is as it was. Directories,
            devices, pipes and sockets are never replaced, nor what leads to one.
    """
    refuse_special(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # made by us, so that no link is written through
            file.write(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def refuse_special(path: Path) -> None:
    """Raise OSError if a path is there and is no file that another one can take the place of."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def reason_of(error: OSError) -> str:
    """Why the system refused, in a few words."""
    return (error.strerror or str(error)).lower()

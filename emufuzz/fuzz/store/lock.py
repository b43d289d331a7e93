"""One driver per campaign directory; the lock ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Final

from emufuzz.fuzz.files import reason_of
from emufuzz.fuzz.store.errors import StoreError

LOCK: Final = "campaign.lock"
#: Seconds before each attempt to take the lock.
_PAUSES: Final = (0.0, 0.02, 0.05)


class DirectoryLock:
    """The lock of a campaign directory, held until `release` or the end of the process."""

    def __init__(self, directory: Path) -> None:
        """Take the lock.

        Raises:
            StoreError: Another campaign runs here, or the file cannot be made.
        """
        self._path = directory / LOCK
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(f"{self._path}: {reason_of(error)}") from error
        if not _taken(self._file):
            holder = _holder(self._file)
            os.close(self._file)
            who = f" (process {holder})" if holder else ""
            raise StoreError(f"{directory}: another campaign runs here{who}")
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock up; a second time does nothing."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def driver_of(directory: Path) -> int | None:
    """The process that holds a directory's lock now, 0 if it does not say which; None if nobody does.

    Raises:
        StoreError: The lock cannot be read.
    """
    path = directory / LOCK
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path}: {reason_of(error)}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(file)
    finally:
        os.close(file)
    return None


def _taken(file: int) -> bool:
    """Take a lock, also if somebody looks at it for a moment (`driver_of`)."""
    for pause in _PAUSES:
        time.sleep(pause)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return True
    return False


def _holder(file: int) -> int:
    """The process id that a lock's file names, 0 if it names none."""
    text = os.pread(file, 32, 0).decode("ascii", "replace").strip()
    return int(text) if text.isascii() and text.isdigit() else 0

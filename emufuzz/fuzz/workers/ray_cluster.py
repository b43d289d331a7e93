"""The Ray cluster that workers run on: one of this machine alone, or one that is there already.

A cluster of our own listens on the loopback interface only, has no dashboard, sends no statistics and
leaves no files behind.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import ray
from ray._private import ray_constants, services

from emufuzz.fuzz.workers.local import WorkerUnavailableError

#: An address: `auto`, or host and port.
_ADDRESS: Final = re.compile(r"auto|(?P<host>[A-Za-z0-9._-]{1,253}|\[[0-9a-fA-F:.]+\]):(?P<port>[0-9]{1,5})")
_PREFIX: Final = "emufuzz-ray-"
LOOPBACK: Final = "127.0.0.1"
#: Bytes of shared memory for results on their way; one takes some ten thousand.
_OBJECTS: Final = 128 << 20
#: Seconds to wait for somebody to listen at an address.
_PATIENCE: Final = 10.0
#: Seconds to wait for each of Ray's own processes; Ray gives them 30, which are not enough on a busy machine.
_START: Final = 120.0
_PAUSE: Final = 0.2  # between two looks
_STARTS: Final = 3  # how often to try
_RAYLET: Final = "raylet/raylet"  # part of the name of its program
#: Ray looks at these when it starts.
_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",             # no telemetry
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # no warning about a setting of graphics cards
    "RAY_memory_monitor_refresh_ms": "0",       # our own limit is per worker, and knows the case
    "RAY_gcs_server_port_wait_time_s": str(int(_START)),
}  # fmt: skip
#: Some functions of Ray have no types.
_RAY: Final[Any] = ray
_QUIET: Final[dict[str, Any]] = {"log_to_driver": False, "logging_level": logging.ERROR}


class Directory:
    """Where a cluster of our own has its sockets and logs: locked while that lives, removed with it."""

    def __init__(self) -> None:
        _remove_abandoned()
        self.path = tempfile.mkdtemp(prefix=_PREFIX)
        self._lock = _lock(self.path)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)  # Ray's last processes may still write there
        if self._lock is not None:
            os.close(self._lock)


def _lock(directory: str) -> int | None:
    """Lock a directory for this process; None if another one has it."""
    descriptor = os.open(Path(directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned() -> None:
    """Remove what drivers left that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
            lock = _lock(str(path))
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


class Cluster:
    """A connection to a cluster; there is one per process at a time."""

    def __init__(self, cpus: int, directory: Directory | None = None) -> None:
        self.cpus = cpus
        self._directory = directory

    def close(self) -> None:
        """End a cluster of our own with all that runs there, or leave the other one."""
        ray.shutdown()
        if self._directory is not None:
            self._directory.remove()


def is_address(text: str) -> bool:
    """Whether a text may be the address of a cluster."""
    found = _ADDRESS.fullmatch(text)
    return found is not None and (text == "auto" or 0 < int(found["port"]) < 1 << 16)


def start_cluster(cpus: int) -> Cluster:
    """A cluster of this machine alone.

    On a busy machine Ray's processes wait too short a time for each other, some without a setting for it;
    once they have run, the next ones start faster.

    Raises:
        WorkerUnavailableError: Ray does not start, several times in a row.
    """
    os.environ.update(_ENVIRONMENT)
    for _ in range(_STARTS - 1):
        with suppress(WorkerUnavailableError):
            return _start(cpus)
    return _start(cpus)


def _start(cpus: int) -> Cluster:
    directory = Directory()
    cluster = Cluster(cpus, directory)
    try:
        with on_loopback(), patient(directory.path), _errors("Ray does not start"):
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=0,
                include_dashboard=False,
                object_store_memory=_OBJECTS,
                _temp_dir=directory.path,
                **_QUIET,
            )
            _check_loopback()
    except BaseException:
        for process in _processes_of(directory.path):  # Ray leaves them until this process ends
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        cluster.close()
        raise
    return cluster


def _processes_of(directory: str, name: str = "") -> list[int]:
    """Processes whose command lines have the directory of a cluster of our own, and this name."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes()
        except OSError:  # it has ended
            continue
        if directory.encode() in line and name.encode() in line and int(file.parent.name) != os.getpid():
            found.append(int(file.parent.name))
    return found


def connect(address: str) -> Cluster:
    """A cluster that is there already; this machine has to be part of it.

    Args:
        address: What `is_address` takes.

    Raises:
        WorkerUnavailableError: It cannot be reached, has no processors, or another Ray or Python.
    """
    os.environ.update(_ENVIRONMENT)
    _check_listening(address)
    with _errors(f"no connection to {address}"):
        ray.init(address=address, **_QUIET)
    cluster = Cluster(int(_RAY.cluster_resources().get("CPU", 0)))
    if cluster.cpus < 1:
        cluster.close()
        raise WorkerUnavailableError(f"ray: the cluster at {address} has no processors")
    return cluster


@contextmanager
def on_loopback() -> Iterator[None]:
    """Have Ray take this machine's address to be that of the loopback interface, as on other systems."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def patient(directory: str) -> Iterator[None]:
    """Have Ray wait up to _START seconds for its raylet, as long as that lives; this is no setting of Ray."""
    before: Any = services.get_node

    def get_node(*args: Any, **kwargs: Any) -> Any:
        end = time.monotonic() + _START
        while True:
            try:
                return before(*args, **kwargs)
            except RuntimeError:  # not registered yet
                if time.monotonic() >= end or not _processes_of(directory, _RAYLET):
                    raise
            time.sleep(_PAUSE)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = before


def _check_loopback() -> None:
    address = _RAY.util.get_node_ip_address()
    if address != LOOPBACK:
        raise RuntimeError(f"it listens on {address} instead of {LOOPBACK}")


def _check_listening(address: str) -> None:
    """Ray itself would try for minutes, and end the process after that."""
    found = _ADDRESS.fullmatch(address)
    if found is None or address == "auto":
        return
    try:
        socket.create_connection((found["host"].strip("[]"), int(found["port"])), _PATIENCE).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise WorkerUnavailableError(f"ray: no connection to {address}: {reason}") from error


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """What Ray raises, as one line."""
    try:
        yield
    except Exception as error:  # Ray raises all kinds, at a slow start a plain Exception
        raise WorkerUnavailableError(f"ray: {what}: {' '.join(str(error).split())}") from error
    except SystemExit as error:  # how Ray gives up
        raise WorkerUnavailableError(f"ray: {what}") from error

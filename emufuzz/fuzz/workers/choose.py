"""Workers by name: `local`, `local:N`, `ray`, `ray:N`, `ray:ADDRESS`, `ray:ADDRESS,N`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, Final

from emufuzz.fuzz.tasks import Pool, Setup
from emufuzz.fuzz.workers.local import LocalPool, WorkerUnavailableError

MAX_WORKERS: Final = 256


class WorkersError(ValueError):
    """Workers that cannot be; the message says why."""


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def make_pool(text: str, setup: Setup) -> Pool:
    """The workers that a text names; they are not started yet, but a Ray cluster is there.

    Raises:
        WorkersError: There are no such workers.
        WorkerUnavailableError: The cluster cannot be reached, or the library for it is missing.
    """
    kind, _, rest = text.partition(":")
    if kind == "local" or (kind.isdecimal() and not rest):
        return LocalPool(setup, _count(rest if kind == "local" else kind))
    if kind == "ray":
        return _ray_pool(setup, rest)
    raise WorkersError(f"expected local[:N], ray[:N] or ray:ADDRESS[,N], got {text!r}")


def make_fuzzer_pool(text: str, setup: Setup, corpus: Path) -> Pool:
    """So many processes that run libFuzzer over a directory of encoded cases; they are not started yet.

    Raises:
        WorkersError: They are not processes of this machine.
        WorkerUnavailableError: atheris is missing.
    """
    kind, _, rest = text.partition(":")
    if kind != "local" and not (kind.isdecimal() and not rest):
        raise WorkersError(f"libFuzzer runs on this machine only: expected local[:N], got {text!r}")
    if importlib.util.find_spec("atheris") is None:
        raise WorkerUnavailableError("atheris: the package is missing; install emufuzz[atheris]")
    pools = importlib.import_module("emufuzz.fuzz.libfuzzer.pool")
    pool: Pool = pools.FuzzerPool(setup, _count(rest if kind == "local" else kind), corpus)
    return pool


def _ray_pool(setup: Setup, text: str) -> Pool:
    """Workers on a cluster of our own if there is no address, on all processors if there is no number."""
    address, comma, number = text.rpartition(",")
    if not comma and not text.isdecimal():
        address, number = text, ""
    wanted = _number(number) if comma or number else None
    clusters, pools = (_extra(f"emufuzz.fuzz.workers.{name}") for name in ("ray_cluster", "ray_pool"))
    if not address and not comma:
        cluster = clusters.start_cluster(wanted or _count(""))
    elif clusters.is_address(address):
        cluster = clusters.connect(address)
    else:
        raise WorkersError(f"expected an address as HOST:PORT or auto, got {address!r}")
    pool: Pool = pools.RayPool(setup, cluster, min(wanted or cluster.cpus, cluster.cpus, MAX_WORKERS))
    return pool


def _extra(name: str) -> Any:
    """A module that needs Ray."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise WorkerUnavailableError("ray: the package is missing; install emufuzz[ray]") from None


def _count(text: str) -> int:
    return _number(text) if text else min(cores(), MAX_WORKERS)


def _number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:9]) <= MAX_WORKERS:
        raise WorkersError(f"must be 1 to {MAX_WORKERS}, got {text!r}")
    return int(text)

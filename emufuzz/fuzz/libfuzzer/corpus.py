"""Directories of encoded cases, one per file, named by their SHA-1 as libFuzzer names them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from emufuzz.case.codec import decode_case, encode_case
from emufuzz.case.model import Case
from emufuzz.fuzz.files import write_atomically
from emufuzz.fuzz.kvm.generate import generator_of
from emufuzz.fuzz.tasks import Setup

#: Bytes of a file above which it is no encoded case of a corpus.
MAX_FILE: Final = 1 << 20
#: Generated cases that an empty corpus begins with.
_SEEDS: Final = 512


def write_cases(directory: Path, cases: Iterable[Case]) -> int:
    """Add cases, without their ids, to a directory, which is made if it is not there; how many were new.

    Raises:
        OSError: It cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    new = 0
    for case in cases:
        data = encode_case(msgspec.structs.replace(case, id=""))
        path = directory / hashlib.sha1(data, usedforsecurity=False).hexdigest()
        if not path.exists():
            write_atomically(path, data)
            new += 1
    return new


def read_cases(directory: Path) -> Iterator[Case]:
    """The cases of a directory, in the order of their files' names; each has its file's name as id.

    Hidden files, directories, links and files that are too long are passed over: a corpus is what a
    fuzzer left, and any bytes are a case.

    Raises:
        OSError: It cannot be read.
    """
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries if _is_case(entry))
    for name in names:
        case = decode_case((directory / name).read_bytes())
        yield msgspec.structs.replace(case, id=name[:256] if name.isprintable() else "")


def _is_case(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith(".") or not entry.is_file(follow_symlinks=False):
        return False
    return entry.stat(follow_symlinks=False).st_size <= MAX_FILE


def seed_corpus(directory: Path, setup: Setup) -> int:
    """Give a corpus that has no cases some generated ones; how many it was given.

    Raises:
        OSError: The directory cannot be read or written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with os.scandir(directory) as entries:
        if any(_is_case(entry) for entry in entries):
            return 0
    return write_cases(directory, generator_of(setup.seed, 0, setup.options).cases(_SEEDS))

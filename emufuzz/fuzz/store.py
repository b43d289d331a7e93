"""Campaign directories: `campaign.json`, `summary.json` and `findings/<bucket>.json`.

A finding's file depends on seed and budget only: no times, no paths, keys in a fixed order. Files
appear whole or not at all. A finding that a directory already has is known, not new, and its file
stays as it is: delete it to have it reported again.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any, Final

import msgspec

from emufuzz import __version__
from emufuzz.case.json import case_to_obj, outcome_to_obj
from emufuzz.fuzz.loop import Finding
from emufuzz.oracle.compare import Difference

MARKER: Final = "campaign.json"
SUMMARY: Final = "summary.json"
FINDINGS: Final = "findings"
FORMAT: Final = "emufuzz-campaign-1"
FINDING_FORMAT: Final = "emufuzz-finding-1"

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.=-]+")


class StoreError(Exception):
    """A campaign directory that cannot be used; the message names it and the reason."""


def bucket_name(bucket: tuple[str, str, str]) -> str:
    """File name of a bucket, without suffix: leaf, mode and kind of difference."""
    leaf, mode, kind = bucket
    return f"{_UNSAFE.sub('_', leaf.replace('!', 'not')) or 'undecoded'}-{mode}-{kind}"


def _encode(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def _write(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"{path}: {(error.strerror or str(error)).lower()}") from error


class Store:
    """A campaign directory."""

    def __init__(self, directory: Path, versions: dict[str, str]) -> None:
        """Open or make the directory.

        Raises:
            StoreError: It cannot be written, or holds something else than a campaign.
        """
        self.directory = directory
        self.findings = directory / FINDINGS
        self._versions = versions
        self._open()

    def _open(self) -> None:
        directory = self.directory
        try:
            if directory.exists():
                if not directory.is_dir():
                    raise StoreError(f"{directory}: not a directory")
                if any(directory.iterdir()) and not (directory / MARKER).exists():
                    raise StoreError(
                        f"{directory}: not empty and not a campaign directory (no {MARKER} in it)"
                    )
            self.findings.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{directory}: {(error.strerror or str(error)).lower()}") from error

    def begin(self, options: dict[str, Any]) -> None:
        """Record what the campaign was started with."""
        _write(
            self.directory / MARKER,
            _encode({"format": FORMAT, "options": options, "versions": self._versions}),
        )

    def path_of(self, bucket: tuple[str, str, str]) -> Path:
        """Where a bucket's finding is kept."""
        return self.findings / f"{bucket_name(bucket)}.json"

    def save(self, finding: Finding) -> bool:
        """Save a finding unless its bucket is known; True if it is new."""
        path = self.path_of(finding.bucket)
        if path.exists():
            return False
        _write(path, _encode(finding_to_obj(finding, self._versions)))
        return True

    def finish(self, summary: dict[str, Any]) -> None:
        """Record the accounting of the campaign."""
        _write(self.directory / SUMMARY, _encode(summary))


def versions(fingerprints: tuple[dict[str, str], ...]) -> dict[str, str]:
    """What ran: this package, Python, and what subject and oracle say of themselves."""
    merged = {"emufuzz": __version__, "python": platform.python_version()}
    for fingerprint in fingerprints:
        merged.update(fingerprint)
    return merged


def finding_to_obj(finding: Finding, ran: dict[str, str]) -> dict[str, Any]:
    """A finding as JSON values; `outcomes` is keyed by the name of who produced each."""
    case = finding.case
    outcomes = {}
    for name, outcome in (
        (ran.get("subject", "subject"), finding.subject),
        (ran.get("oracle", "oracle"), finding.oracle),
    ):
        if outcome is not None:
            outcomes[name] = outcome_to_obj(case, outcome, events=False)
    return {
        "format": FINDING_FORMAT,
        "bucket": bucket_name(finding.bucket),
        "leaf": finding.leaf,
        "mode": finding.mode,
        "kind": finding.kind,
        "verdict": finding.verdict,
        "case": case_to_obj(case),
        "outcomes": outcomes,
        "differences": [_difference_to_obj(d) for d in finding.differences],
        "versions": ran,
    }


def _difference_to_obj(difference: Difference) -> dict[str, Any]:
    obj = difference._asdict()
    at = obj.pop("at")
    return obj if at is None else obj | {"at": hex(at)}

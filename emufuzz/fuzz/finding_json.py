"""Findings as JSON: what a campaign keeps, exports, and reads again.

A finding's JSON depends on the cases only: no times, no paths, keys in a fixed order. `versions` is
the only part that says with what it was found; `digest` leaves that out.
"""

from __future__ import annotations

import hashlib
import platform
from typing import Any, Final

import msgspec

from emufuzz import __version__
from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_from_obj, case_to_obj, outcome_to_obj
from emufuzz.fuzz.finding import ALONE, FAILED, SPLIT, Finding
from emufuzz.oracle.compare import KINDS, Difference

FINDING_FORMAT: Final = "emufuzz-finding-2"
_VERSIONS: Final = "versions"


def versions(fingerprints: tuple[dict[str, str], ...]) -> dict[str, str]:
    """What ran: this package, Python, and what subject and oracle say of themselves."""
    merged = {"emufuzz": __version__, "python": platform.python_version()}
    for fingerprint in fingerprints:
        merged.update(fingerprint)
    return merged


def encode(value: Any) -> bytes:
    """JSON as files have it: indented, with a newline at its end."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


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
        "bucket": finding.bucket.name,
        "leaf": finding.leaf,
        "mode": case.mode,
        "kind": finding.kind,
        "verdict": finding.verdict,
        "sentence": finding.sentence,
        "batch": finding.batch,
        "index": finding.index,
        "case": case_to_obj(case),
        "outcomes": outcomes,
        "differences": [_difference_to_obj(d) for d in finding.differences],
        _VERSIONS: ran,
    }


def digest(obj: dict[str, Any]) -> str:
    """SHA-256 of a finding's JSON without the versions it was made with."""
    return hashlib.sha256(encode({k: v for k, v in obj.items() if k != _VERSIONS})).hexdigest()


def _difference_to_obj(difference: Difference) -> dict[str, Any]:
    obj = difference._asdict()
    at = obj.pop("at")
    return obj if at is None else obj | {"at": hex(at)}


def finding_from_obj(value: dict[str, Any]) -> Finding:
    """A finding from JSON values, without the outcomes.

    Raises:
        CaseError: Something in it cannot be; the message names the field.
    """
    case = _part("case", case_from_obj, value.get("case"))
    differences = _part("differences", differences_from_obj, value.get("differences"))
    verdict = _chosen(value, "verdict", (ALONE, SPLIT, FAILED))
    kind = _chosen(value, "kind", KINDS)
    leaf, sentence = (_string(value, name) for name in ("leaf", "sentence"))
    batch, index = (_number(value, name) for name in ("batch", "index"))
    return Finding(leaf, kind, verdict, batch, index, case, differences, sentence=sentence)


def _part(name: str, read: Any, value: Any) -> Any:
    """Read a part of a document; errors name the part before the field in it."""
    try:
        return read(value)
    except CaseError as error:
        separator = "." if ":" in str(error) else ": "
        raise CaseError(f"{name}{separator}{error}") from None


def _chosen(value: dict[str, Any], name: str, known: Any) -> str:
    text = _string(value, name)
    if text not in known:
        raise CaseError(f"{name}: unknown {name} {text!r}, known are {', '.join(known)}")
    return text


def _string(value: dict[str, Any], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str):
        raise CaseError(f"{name}: expected a string")
    return text


def _number(value: dict[str, Any], name: str) -> int:
    number = value.get(name)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise CaseError(f"{name}: expected a number, 0 or more")
    return number


def differences_from_obj(value: Any) -> tuple[Difference, ...]:
    """The differences of a finding's JSON.

    Raises:
        CaseError: They are none.
    """
    if not isinstance(value, list):
        raise CaseError("expected an array, as in a finding" if value is not None else "missing")
    return tuple(_recorded_difference(item) for item in value)


def _recorded_difference(item: Any) -> Difference:
    if not isinstance(item, dict):
        raise CaseError("expected objects")
    at = item.get("at")
    try:
        field, kind, subject, oracle = (_text(item[name]) for name in ("field", "kind", "subject", "oracle"))
        return Difference(field, kind, subject, oracle, None if at is None else int(at, 0))
    except (TypeError, ValueError, KeyError):
        raise CaseError("expected field, kind, subject and oracle as strings, and at as an address") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value

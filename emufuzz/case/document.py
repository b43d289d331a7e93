"""One JSON document to plain values, strictly: bounded size, an object at the top, no key twice."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from emufuzz.case.errors import CaseError
from emufuzz.case.fields import MAX_DOCUMENT
from emufuzz.case.spec import FieldError, json_type, shown

_decoder: Final = msgspec.json.Decoder()


def decode_object(data: bytes | str) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        CaseError: not JSON, not an object, a key given twice, or longer than MAX_DOCUMENT.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    if len(data) > MAX_DOCUMENT:
        raise CaseError(f"{len(data)} bytes are too many (max {MAX_DOCUMENT >> 20} MiB)")
    try:
        value = _decoder.decode(data)
    except RecursionError:
        raise CaseError("not valid: nested too deep") from None
    except (UnicodeDecodeError, msgspec.DecodeError) as error:  # which one for bad UTF-8 depends on msgspec
        raise CaseError(f"not valid JSON: {error}" if _is_text(data) else "not UTF-8 text") from None
    if type(value) is not dict:
        raise CaseError(f"expected an object, got {json_type(value)}")
    # Every key has its colon, so equal numbers leave no room for a key that was given twice.
    # A colon in a string makes the numbers differ too: then look closely.
    if data.count(b":") != _key_count(value):
        json.loads(data, object_pairs_hook=_unique)
    return value


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _key_count(value: dict[str, Any]) -> int:
    count = len(value)
    for item in value.values():
        kind = type(item)
        if kind is dict:
            count += _key_count(item)
        elif kind is list:
            count += _key_count_in_list(item)
    return count


def _key_count_in_list(items: list[Any]) -> int:
    count = 0
    for item in items:
        kind = type(item)
        if kind is dict:
            count += _key_count(item)
        elif kind is list:
            count += _key_count_in_list(item)
    return count


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise FieldError("given twice", shown(double).strip("'"))
    return fields

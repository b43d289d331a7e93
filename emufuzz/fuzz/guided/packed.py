"""Cases of the corpus as bytes: the exchange format, with large pieces of memory kept apart.

Many cases share their memory, so each piece is kept once, under its hash. What is read may come from
anybody, and goes through the strict reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

import msgspec

from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_from_obj, case_to_obj
from emufuzz.case.model import Case

#: Hexadecimal digits from which on a piece of memory is kept apart.
_LARGE: Final = 256
#: Bytes of a packed case, or of a piece; more are refused.
MOST_BYTES: Final = 4 << 20
_MARK: Final = "#"
_FIELDS: Final = ("mem", "phys")
_encode: Final = msgspec.json.Encoder().encode


class Packed(msgspec.Struct, frozen=True):
    """A case: its JSON, in which `#HASH` stands for a piece of memory, and those pieces."""

    data: bytes
    pieces: dict[str, bytes] = {}


def pack(case: Case) -> Packed:
    """The case without its id, which is another one wherever it is used."""
    obj, pieces = case_to_obj(case), dict[str, bytes]()
    del obj["id"]
    for name in _FIELDS:
        if name in obj:
            obj[name] = [_without_data(entry, pieces) for entry in obj[name]]
    return Packed(_encode(obj), pieces)


def _without_data(entry: dict[str, Any], pieces: dict[str, bytes]) -> dict[str, Any]:
    text = entry.get("data", "")
    if len(text) < _LARGE:
        return entry
    data = bytes.fromhex(text)
    name = sha256(data).hexdigest()[:24]
    pieces[name] = data
    return {**entry, "data": _MARK + name}


def unpack(data: bytes, pieces: Mapping[str, bytes]) -> Case:
    """The case of packed data.

    Raises:
        CaseError: It is none, or a piece is missing.
    """
    try:
        obj = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise CaseError(f"no case of a corpus: {error}") from error
    for name in _FIELDS:
        if isinstance(obj, dict) and isinstance(obj.get(name), list):
            obj[name] = [_with_data(entry, pieces) for entry in obj[name]]
    return case_from_obj(obj)


def _with_data(entry: Any, pieces: Mapping[str, bytes]) -> Any:
    text = entry.get("data") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text.startswith(_MARK):
        return entry
    piece = pieces.get(text[1:])
    if piece is None:
        raise CaseError(f"the corpus lacks a piece of memory, {text[1:25]}")
    return {**entry, "data": piece.hex()}

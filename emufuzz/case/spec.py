"""Declarations of JSON values, and the error that a value makes which its declaration forbids.

A field is declared once (emufuzz/case/fields.py) as `Number`, `Hex`, `Text`, `Flag`, `ListOf`,
`MapOf` or `Object`. From the same declaration emufuzz/case/read.py makes a function from decoded JSON
to plain Python values, write.py the way back, and schema.py JSON Schema.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from emufuzz.case.errors import CaseError

Reader: TypeAlias = Callable[[Any], Any]

#: Longest piece of a bad value that a message repeats.
_SHOWN: Final = 40


@dataclass(frozen=True, slots=True)
class Number:
    """An integer from `min` to `max`; `hex`: written as "0x..", else as a JSON integer. Both are read."""

    max: int
    min: int = 0
    hex: bool = True


@dataclass(frozen=True, slots=True)
class Hex:
    """Bytes as hexadecimal digits in memory order, at most `max_bytes` of them."""

    max_bytes: int


@dataclass(frozen=True, slots=True)
class Text:
    """A string: one of `choices`, or if there are none, printable and at most `max_length` long."""

    choices: tuple[str, ...] = ()
    max_length: int = 256
    multiline: bool = False


@dataclass(frozen=True, slots=True)
class Flag:
    """true or false; 0 and 1 are read too."""


@dataclass(frozen=True, slots=True)
class Nullable:
    """null or `item`."""

    item: Spec


@dataclass(frozen=True, slots=True)
class ListOf:
    """An array of at most `max_items`."""

    item: Spec
    max_items: int


@dataclass(frozen=True, slots=True)
class MapOf:
    """An object whose keys are numbers up to `max_key`, written in hex if `hex`, else in decimal."""

    item: Spec
    max_key: int
    hex: bool = True


@dataclass(frozen=True, slots=True)
class Object:
    """An object with these fields and no others, unless `others` declares what those hold."""

    fields: dict[str, Spec]
    required: tuple[str, ...] = ()
    others: Spec | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A value that one of several declarations describes; the type of the JSON value decides which."""

    options: dict[type, Spec]


@dataclass(frozen=True, slots=True)
class Named:
    """An object with names of its own choice, at most `max_items` of them."""

    item: Spec
    max_items: int = 4096


@dataclass(frozen=True, slots=True)
class Anything:
    """Any JSON without fractions, nested at most `max_depth` deep."""

    max_depth: int = 16


@dataclass(frozen=True, slots=True)
class Custom:
    """A value with a reader and a JSON Schema of its own."""

    read: Reader
    schema: dict[str, Any] = field(hash=False)


Spec: TypeAlias = (
    Number | Hex | Text | Flag | Nullable | ListOf | MapOf | Object | Choice | Named | Anything | Custom
)


class FieldError(CaseError):
    """A value that its declaration forbids; str() is one line, `path: reason`."""

    def __init__(self, why: str, path: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.path = path

    def under(self, outer: str) -> FieldError:
        """The same error, seen from the value that holds the field at `outer`."""
        joint = "" if not self.path or self.path[0] == "[" else "."
        return FieldError(self.why, f"{outer}{joint}{self.path}")

    def __str__(self) -> str:
        return f"{self.path}: {self.why}" if self.path else self.why


def shown(value: Any) -> str:
    """A bad value for a message: one line, cut short."""
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def json_type(value: Any) -> str:
    """The JSON name of a decoded value's type."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", float: "a fraction"}
    return "null" if value is None else names.get(type(value), "a number")

"""Strict readers of JSON values, made from their declarations (emufuzz/case/spec.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from emufuzz.case.spec import (
    Anything,
    Choice,
    Custom,
    FieldError,
    Flag,
    Hex,
    ListOf,
    MapOf,
    Named,
    Nullable,
    Number,
    Object,
    Reader,
    Spec,
    Text,
    json_type,
    shown,
)

_MAX_NAME: Final = 64  # characters of a field's name, where any may be given


def reader(spec: Spec) -> Reader:
    """The function that reads what `spec` declares.

    It returns int, bytes, str, bool, None, list or dict (of read values), and raises FieldError.
    """
    return _MAKERS[type(spec)](spec)


def _number_reader(spec: Number) -> Reader:
    low, high = spec.min, spec.max

    def read(value: Any) -> int:
        number = value if type(value) is int else parse_number(value)
        if low <= number <= high:
            return number
        limit = f"max {high:#x}" if number > high else f"min {low}"
        raise FieldError(f"{shown(value).strip(chr(39))} is out of range ({limit})")

    return read


def parse_number(value: Any) -> int:
    """The number that a string "0x.." stands for."""
    if type(value) is not str:
        raise FieldError(f'expected a number or "0x..", got {json_type(value)}')
    # isalnum: int() would take signs, spaces and underscores too
    if value[:2] == "0x" and value.isalnum() and value.isascii():
        try:
            return int(value, 16)
        except ValueError:
            pass  # the message below says it
    raise FieldError(f'{shown(value)} is not a number; write "0x" and hexadecimal digits')


def _hex_reader(spec: Hex) -> Reader:
    max_bytes = spec.max_bytes

    def read(value: Any) -> bytes:
        if type(value) is not str:
            raise FieldError(f"expected hexadecimal digits in a string, got {json_type(value)}")
        if len(value) > 2 * max_bytes:
            raise FieldError(f"{(len(value) + 1) // 2} bytes are too many (max {max_bytes})")
        try:
            data = bytes.fromhex(value)
        except ValueError:
            data = None
        if data is None or 2 * len(data) != len(value):  # fromhex() skips white space
            reason = "odd number of digits" if len(value) % 2 else "not hexadecimal digits"
            raise FieldError(f"{shown(value)}: {reason}")
        return data

    return read


def _text_reader(spec: Text) -> Reader:
    choices, max_length, multiline = spec.choices, spec.max_length, spec.multiline

    def read(value: Any) -> str:
        if type(value) is not str:
            raise FieldError(f"expected a string, got {json_type(value)}")
        if choices:
            if value not in choices:
                raise FieldError(f"{shown(value)} is unknown; expected one of {', '.join(choices)}")
        elif len(value) > max_length:
            raise FieldError(f"{len(value)} characters are too many (max {max_length})")
        elif not multiline and not value.isprintable():
            raise FieldError(f"{shown(value)} holds characters that cannot be printed")
        return value

    return read


def _flag_reader(_: Flag) -> Reader:
    def read(value: Any) -> bool:
        if type(value) is bool or (type(value) is int and value in {0, 1}):
            return bool(value)
        raise FieldError(f"expected true or false, got {shown(value)}")

    return read


def _nullable_reader(spec: Nullable) -> Reader:
    read_item = reader(spec.item)

    def read(value: Any) -> Any:
        return None if value is None else read_item(value)

    return read


def _list_reader(spec: ListOf) -> Reader:
    read_item, max_items = reader(spec.item), spec.max_items

    def read(value: Any) -> list[Any]:
        if type(value) is not list:
            raise FieldError(f"expected an array, got {json_type(value)}")
        if len(value) > max_items:
            raise FieldError(f"{len(value)} items are too many (max {max_items})")
        items: list[Any] = []
        try:
            for item in value:
                items.append(read_item(item))  # noqa: PERF401 - the length tells which item failed
        except FieldError as error:
            raise error.under(f"[{len(items)}]") from None
        return items

    return read


def _map_reader(spec: MapOf) -> Reader:
    read_item, read_key = reader(spec.item), reader(Number(spec.max_key))

    def read(value: Any) -> dict[int, Any]:
        if type(value) is not dict:
            raise FieldError(f"expected an object, got {json_type(value)}")
        items: dict[int, Any] = {}
        for text, item in value.items():
            try:
                key = read_key(int(text) if text.isdecimal() and text.isascii() and len(text) < 20 else text)
                items[key] = read_item(item)
            except FieldError as error:
                raise error.under(shown(text).strip("'")) from None
        if len(items) != len(value):
            raise FieldError("the same key twice, written differently")
        return items

    return read


class _OpenReaders(dict[str, Reader]):
    """Readers by field name; `others` reads the fields that have none of their own."""

    __slots__ = ("others",)

    def __init__(self, named: dict[str, Reader], others: Reader) -> None:
        super().__init__(named)
        self.others = others

    def __missing__(self, name: str) -> Reader:
        if len(name) > _MAX_NAME or not name.isprintable():
            raise KeyError(name)
        return self.others


def _object_reader(spec: Object) -> Reader:
    readers = {name: reader(item) for name, item in spec.fields.items()}
    if spec.others is not None:
        readers = _OpenReaders(readers, reader(spec.others))
    required = spec.required

    def read(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise FieldError(f"expected an object, got {json_type(value)}")
        items: dict[str, Any] = {}
        name = ""
        try:
            for name, item in value.items():
                items[name] = readers[name](item)
        except FieldError as error:
            raise error.under(name) from None
        except KeyError:
            raise FieldError("unknown field", shown(name).strip("'")) from None
        for name in required:
            if name not in items:
                raise FieldError("missing", name)
        return items

    return read


def _choice_reader(spec: Choice) -> Reader:
    readers = {kind: reader(option) for kind, option in spec.options.items()}

    def read(value: Any) -> Any:
        chosen = readers.get(type(value))
        if chosen is None:
            raise FieldError(f"{json_type(value)} is not expected here")
        return chosen(value)

    return read


def _named_reader(spec: Named) -> Reader:
    read_name, read_item, max_items = reader(Text(max_length=_MAX_NAME)), reader(spec.item), spec.max_items

    def read(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise FieldError(f"expected an object, got {json_type(value)}")
        if len(value) > max_items:
            raise FieldError(f"{len(value)} fields are too many (max {max_items})")
        items: dict[str, Any] = {}
        for name, item in value.items():
            try:
                items[read_name(name)] = read_item(item)
            except FieldError as error:
                raise error.under(shown(name).strip("'")) from None
        return items

    return read


def _anything_reader(spec: Anything) -> Reader:
    def check(value: Any, depth: int) -> None:
        if depth == 0:
            raise FieldError(f"nested deeper than {spec.max_depth}")
        if type(value) is float:
            raise FieldError(f"{shown(value)} is a fraction")
        if type(value) is dict:
            value = list(value.values())
        if type(value) is list:
            for item in value:
                check(item, depth - 1)

    def read(value: Any) -> Any:
        check(value, spec.max_depth)
        return value

    return read


def _custom_reader(spec: Custom) -> Reader:
    return spec.read


_MAKERS: Final[dict[type, Callable[[Any], Reader]]] = {
    Number: _number_reader,
    Hex: _hex_reader,
    Text: _text_reader,
    Flag: _flag_reader,
    Nullable: _nullable_reader,
    ListOf: _list_reader,
    MapOf: _map_reader,
    Object: _object_reader,
    Choice: _choice_reader,
    Named: _named_reader,
    Anything: _anything_reader,
    Custom: _custom_reader,
}

"""Binary form of values that emufuzz.case.spec declares, made from their declarations.

`coder(spec)` gives a writer for what `read.reader(spec)` returned, and a reader that makes a value which
the declaration allows of any bytes. Where any text may stand, the words of emufuzz.case.codec.words that
belong to the field are numbers, so that a fuzzer exchanges one word for another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from emufuzz.case.codec.stream import Source, mask, number
from emufuzz.case.codec.words import WORDS
from emufuzz.case.spec import Choice, Flag, Hex, ListOf, MapOf, Named, Nullable, Number, Object, Spec, Text


class Coder(NamedTuple):
    """How a value is appended to bytes, and read from them."""

    write: Callable[[bytearray, Any], None]
    read: Callable[[Source], Any]


def coder(spec: Spec, field: str = "") -> Coder:
    """The coder of what `spec` declares; `field` is its name, which tells what words may stand there."""
    return _MAKERS[type(spec)](spec, field)


def _number_coder(spec: Number, _: str) -> Coder:
    low, span = spec.min, spec.max - spec.min + 1
    bits = max((span - 1).bit_length(), 1)
    if bits > 64:
        raise ValueError("numbers have 64 bits at most")

    def write(out: bytearray, value: int) -> None:
        out += number(value - low, bits)

    def read(source: Source) -> int:
        return low + source.number(bits) % span

    return Coder(write, read)


def _hex_coder(spec: Hex, _: str) -> Coder:
    limit = spec.max_bytes + 1

    def write(out: bytearray, value: bytes) -> None:
        out += number(len(value)) + value

    def read(source: Source) -> bytes:
        return source.take(source.below(limit))

    return Coder(write, read)


def _text_coder(spec: Text, field: str) -> Coder:
    """A choice by its number; free text as the number of a word, or 0 and its UTF-8."""
    words = spec.choices or ("", *WORDS.get(field, ()))
    places = {word: i for i, word in enumerate(words)}
    free, longest = not spec.choices, spec.max_length

    def write(out: bytearray, value: str) -> None:
        if free and (value not in places or not value):
            data = value.encode()
            out += number(0) + number(len(data)) + data
        else:
            out += number(places[value])

    def read(source: Source) -> str:
        place = source.below(len(words))
        if not free or place:
            return words[place]
        return printable(source.take(source.below(4 * longest + 1)), longest)

    return Coder(write, read)


def printable(data: bytes, longest: int) -> str:
    """The printable characters of UTF-8, up to `longest` of them."""
    text = data.decode(errors="ignore")
    if not text.isprintable():
        text = "".join(character for character in text if character.isprintable())
    return text[:longest]


def _flag_coder(_: Flag, __: str) -> Coder:
    def write(out: bytearray, value: bool) -> None:
        out.append(value)

    def read(source: Source) -> bool:
        return bool(source.byte() & 1)

    return Coder(write, read)


def _nullable_coder(spec: Nullable, field: str) -> Coder:
    item = coder(spec.item, field)

    def write(out: bytearray, value: Any) -> None:
        out.append(value is not None)
        if value is not None:
            item.write(out, value)

    def read(source: Source) -> Any:
        return item.read(source) if source.byte() & 1 else None

    return Coder(write, read)


def _list_coder(spec: ListOf, field: str) -> Coder:
    """A list ends with the data, however long it says that it is."""
    item, limit = coder(spec.item, field), spec.max_items + 1

    def write(out: bytearray, value: list[Any]) -> None:
        out += number(len(value))
        for one in value:
            item.write(out, one)

    def read(source: Source) -> list[Any]:
        items: list[Any] = []
        for _ in range(source.below(limit)):
            if source.ended:
                break
            items.append(item.read(source))
        return items

    return Coder(write, read)


def _map_coder(spec: MapOf, field: str) -> Coder:
    key, item = _number_coder(Number(spec.max_key), ""), coder(spec.item, field)

    def write(out: bytearray, value: dict[int, Any]) -> None:
        out += number(len(value))
        for index, one in value.items():
            key.write(out, index)
            item.write(out, one)

    def read(source: Source) -> dict[int, Any]:
        items: dict[int, Any] = {}
        for _ in range(source.number()):
            if source.ended:
                break
            index = key.read(source)
            items[index] = item.read(source)
        return items

    return Coder(write, read)


def _named_coder(spec: Named, field: str) -> Coder:
    name, item = _text_coder(Text(max_length=64), field), coder(spec.item, field)

    def write(out: bytearray, value: dict[str, Any]) -> None:
        out += number(len(value))
        for key, one in value.items():
            name.write(out, key)
            item.write(out, one)

    def read(source: Source) -> dict[str, Any]:
        items: dict[str, Any] = {}
        for _ in range(source.below(spec.max_items + 1)):
            if source.ended:
                break
            key = name.read(source)
            items[key] = item.read(source)
        return items

    return Coder(write, read)


def _object_coder(spec: Object, _: str) -> Coder:
    """Which of the fields that need not be there are, then all that are."""
    optional = [name for name in spec.fields if name not in spec.required]
    size = (len(optional) + 7) // 8
    bits = {name: 1 << i for i, name in enumerate(optional)}
    fields = [(name, bits.get(name, 0), coder(item, name)) for name, item in spec.fields.items()]

    def write(out: bytearray, value: dict[str, Any]) -> None:
        out += mask([name in value for name in optional])
        for name, _, item in fields:
            if name in value:
                item.write(out, value[name])

    def read(source: Source) -> dict[str, Any]:
        given = source.fixed(size)
        return {name: item.read(source) for name, bit, item in fields if not bit or given & bit}

    return Coder(write, read)


def _choice_coder(spec: Choice, field: str) -> Coder:
    kinds = list(spec.options)
    coders = [coder(option, field) for option in spec.options.values()]

    def write(out: bytearray, value: Any) -> None:
        kind = kinds.index(type(value))
        out.append(kind)
        coders[kind].write(out, value)

    def read(source: Source) -> Any:
        return coders[source.byte() % len(coders)].read(source)

    return Coder(write, read)


_MAKERS: Final[dict[type, Callable[[Any, str], Coder]]] = {
    Number: _number_coder,
    Hex: _hex_coder,
    Text: _text_coder,
    Flag: _flag_coder,
    Nullable: _nullable_coder,
    ListOf: _list_coder,
    MapOf: _map_coder,
    Named: _named_coder,
    Object: _object_coder,
    Choice: _choice_coder,
}

"""JSON Schema (draft 2020-12) of Case and Outcome, derived from the declarations the readers use.

The schema says what JSON can say about one field at a time. The readers check more: that `mode`
fits the state, the total size of memory, the items of each kind of event, that devices and memslots
do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from emufuzz.case.fields import CASE, DELTA, OUTCOME
from emufuzz.case.spec import (
    Anything,
    Choice,
    Custom,
    Flag,
    Hex,
    ListOf,
    MapOf,
    Named,
    Nullable,
    Number,
    Object,
    Spec,
    Text,
)

_DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"
_HEX_DIGITS: Final = "0123456789abcdef"
_ANY_DIGIT: Final = "[0-9a-fA-F]"


def case_schema() -> dict[str, Any]:
    """JSON Schema of a Case."""
    return _document("Case", "One machine state before an instruction.", CASE)


def outcome_schema() -> dict[str, Any]:
    """JSON Schema of an Outcome."""
    return _document("Outcome", "One machine state after an instruction.", OUTCOME)


def delta_schema() -> dict[str, Any]:
    """JSON Schema of a vector's `expect`."""
    return _document("Delta", "What an instruction changed.", DELTA)


def _document(title: str, description: str, spec: Spec) -> dict[str, Any]:
    return {"$schema": _DRAFT, "title": title, "description": description, **schema_of(spec)}


def schema_of(spec: Spec) -> dict[str, Any]:
    """JSON Schema of one declaration."""
    return _MAKERS[type(spec)](spec)


def _number(spec: Number) -> dict[str, Any]:
    integer = {"type": "integer", "minimum": spec.min, "maximum": spec.max}
    return {"anyOf": [integer, {"type": "string", "pattern": f"^{_text_pattern(spec)}$"}]}


def _text_pattern(spec: Number) -> str:
    """A regular expression for a number as text."""
    if spec.min > 1:  # few numbers: the bits of an address
        return f"0x0*({'|'.join(_digits(f'{number:x}') for number in range(spec.min, spec.max + 1))})"
    return ("(?!0x0+$)" if spec.min else "") + _hex_pattern(spec.max)


def _digits(text: str) -> str:
    """A regular expression for hexadecimal digits, small or capital."""
    return "".join(f"[{digit}{digit.upper()}]" if digit.isalpha() else digit for digit in text)


def _hex_pattern(maximum: int) -> str:
    """A regular expression for "0x.." up to `maximum`."""
    text = f"{maximum:x}"
    if text[1:].strip("f"):
        # as many digits as the maximum has, the first ones alike and then a smaller one; or fewer
        choices = [_digits(text), f"{_ANY_DIGIT}{{1,{len(text) - 1}}}"]
        for i, digit in enumerate(text):
            smaller = _HEX_DIGITS[0 if i else 1 : int(digit, 16)]
            if smaller:
                choices.append(f"{_digits(text[:i])}{_class(smaller)}{_ANY_DIGIT}{{{len(text) - i - 1}}}")
        return f"0x0*({'|'.join(choices)})"
    first = _class(_HEX_DIGITS[: int(text[0], 16) + 1])
    if len(text) == 1:
        return f"0x0*{first}"
    return f"0x0*({first}{_ANY_DIGIT}{{{len(text) - 1}}}|{_ANY_DIGIT}{{1,{len(text) - 1}}})"


def _class(digits: str) -> str:
    """A regular expression for one of these digits, small or capital."""
    return f"[{digits}{''.join(digit.upper() for digit in digits if digit.isalpha())}]"


def _hex(spec: Hex) -> dict[str, Any]:
    return {"type": "string", "pattern": "^([0-9a-fA-F]{2})*$", "maxLength": 2 * spec.max_bytes}


def _text(spec: Text) -> dict[str, Any]:
    if spec.choices:
        return {"enum": list(spec.choices)}
    return {"type": "string", "maxLength": spec.max_length}


def _flag(_: Flag) -> dict[str, Any]:
    return {"enum": [True, False, 0, 1]}


def _nullable(spec: Nullable) -> dict[str, Any]:
    return {"anyOf": [{"type": "null"}, schema_of(spec.item)]}


def _list(spec: ListOf) -> dict[str, Any]:
    return {"type": "array", "items": schema_of(spec.item), "maxItems": spec.max_items}


def _map(spec: MapOf) -> dict[str, Any]:
    keys = {"pattern": f"^({_hex_pattern(spec.max_key)}|[0-9]+)$"}
    return {"type": "object", "propertyNames": keys, "additionalProperties": schema_of(spec.item)}


def _object(spec: Object) -> dict[str, Any]:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: schema_of(item) for name, item in spec.fields.items()},
        "additionalProperties": False if spec.others is None else schema_of(spec.others),
    }
    if spec.required:
        schema["required"] = list(spec.required)
    return schema


def _choice(spec: Choice) -> dict[str, Any]:
    return {"anyOf": [schema_of(option) for option in spec.options.values()]}


def _named(spec: Named) -> dict[str, Any]:
    return {
        "type": "object",
        "maxProperties": spec.max_items,
        "propertyNames": {"maxLength": 64},
        "additionalProperties": schema_of(spec.item),
    }


def _anything(_: Anything) -> dict[str, Any]:
    return {}


def _custom(spec: Custom) -> dict[str, Any]:
    return spec.schema


_MAKERS: Final[dict[type, Callable[[Any], dict[str, Any]]]] = {
    Number: _number,
    Hex: _hex,
    Text: _text,
    Flag: _flag,
    Nullable: _nullable,
    ListOf: _list,
    MapOf: _map,
    Object: _object,
    Choice: _choice,
    Named: _named,
    Anything: _anything,
    Custom: _custom,
}

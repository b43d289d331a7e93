"""JSON Schema (draft 2020-12) of Case and Outcome, derived from the declarations the readers use.

The schema says what JSON can say about one field at a time. The readers check more: that `mode`
fits the state, the total size of memory, the items of each kind of event.
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
    return {"anyOf": [integer, {"type": "string", "pattern": f"^{_hex_pattern(spec.max)}$"}]}


def _hex_pattern(maximum: int) -> str:
    """A regular expression for "0x.." up to a maximum of the form 2^n - 1."""
    digits = (maximum.bit_length() + 3) // 4
    first = _HEX_DIGITS[: (maximum >> 4 * (digits - 1)) + 1]
    both_cases = first + first[10:].upper()
    any_digit = "[0-9a-fA-F]"
    if digits == 1:
        return f"0x0*[{both_cases}]"
    return f"0x0*([{both_cases}]{any_digit}{{{digits - 1}}}|{any_digit}{{1,{digits - 1}}})"


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
        "additionalProperties": False,
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

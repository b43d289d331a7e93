"""Values back into the JSON form that their declaration gives them: the reverse of `read.reader`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from emufuzz.case.spec import Choice, Hex, ListOf, MapOf, Named, Nullable, Number, Object, Spec


def to_json(spec: Spec, value: Any) -> Any:
    """The JSON value of what `reader(spec)` returned.

    Values that are JSON already, such as "0x10" for a number, and members that `spec` does not know stay
    as they are, so that a case made by hand is written as it was made.
    """
    maker = _MAKERS.get(type(spec))
    return value if maker is None else maker(spec, value)


def _number(spec: Number, value: Any) -> Any:
    return hex(value) if spec.hex and type(value) is int else value


def _hex(_: Hex, value: Any) -> Any:
    return value.hex() if type(value) is bytes else value


def _nullable(spec: Nullable, value: Any) -> Any:
    return None if value is None else to_json(spec.item, value)


def _list(spec: ListOf, value: Any) -> Any:
    return [to_json(spec.item, item) for item in value] if type(value) is list else value


def _map(spec: MapOf, value: Any) -> Any:
    if type(value) is not dict:
        return value
    key = Number(spec.max_key, hex=spec.hex)
    return {str(_number(key, index)): to_json(spec.item, item) for index, item in value.items()}


def _object(spec: Object, value: Any) -> Any:
    if type(value) is not dict:
        return value
    fields = spec.fields
    return {name: to_json(fields[name], item) if name in fields else item for name, item in value.items()}


def _choice(spec: Choice, value: Any) -> Any:
    option = spec.options.get(type(value))
    return value if option is None else to_json(option, value)


def _named(spec: Named, value: Any) -> Any:
    if type(value) is not dict:
        return value
    return {name: to_json(spec.item, item) for name, item in value.items()}


#: Declarations that change a value's form; the others leave it as it is.
_MAKERS: Final[dict[type, Callable[[Any, Any], Any]]] = {
    Number: _number,
    Hex: _hex,
    Nullable: _nullable,
    ListOf: _list,
    MapOf: _map,
    Object: _object,
    Choice: _choice,
    Named: _named,
}

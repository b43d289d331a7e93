"""Passes over the machine around the emulator: shorter device scripts, less in `kvm`, fewer callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from emufuzz.case.model import Case
from emufuzz.fuzz.shrink.bits import smaller
from emufuzz.fuzz.shrink.fields import Key, parts_of, with_parts
from emufuzz.fuzz.shrink.probe import Probe
from emufuzz.fuzz.shrink.reduce import reduced

Works = Callable[[Any], bool]

#: Members of a device without which it would be another one.
_PLACE: Final = ("kind", "addr", "port")


def shorter_scripts(case: Case, probe: Probe) -> Case:
    """Devices that answer with less, are smaller and behave simply; fewer bytes from ports."""
    port_in = shorter_bytes(case.port_in, lambda data: probe.keeps(_replaced(case, data)))
    case = _replaced(case, port_in)
    for key in _keys(case, "devices"):
        case = _with_simpler(case, key, probe, _simpler_device)
    return case


def _replaced(case: Case, port_in: bytes) -> Case:
    return msgspec.structs.replace(case, port_in=port_in)


def less_machine(case: Case, probe: Probe) -> Case:
    """Fewer members in what is left of `kvm` and `callbacks`, and smaller numbers."""
    for key in _keys(case, "kvm", "callbacks"):
        case = _with_simpler(case, key, probe, simpler_json)
    return case


def _keys(case: Case, *names: str) -> list[Key]:
    return [key for key in parts_of(case) if key[0] in names]


def _with_simpler(case: Case, key: Key, probe: Probe, simpler: Callable[[Any, Works], Any]) -> Case:
    value = simpler(parts_of(case)[key], lambda other: probe.keeps(with_parts(case, {key: other})))
    return with_parts(case, {key: value})


def shorter_bytes(data: bytes, works: Works) -> bytes:
    """As few bytes as possible, cut off at the end, and as many zeros among them."""
    size = len(data)
    while size:
        if size <= len(data) and works(data[: len(data) - size]):
            data = data[: len(data) - size]
        else:
            size //= 2
    places = [i for i, byte in enumerate(data) if byte]

    def only(kept: list[int]) -> bytes:
        chosen = frozenset(kept)
        return bytes(byte if i in chosen else 0 for i, byte in enumerate(data))

    return only(reduced(places, lambda kept: len(kept) < len(places) and works(only(kept))))


def _simpler_device(device: dict[str, Any], works: Works) -> dict[str, Any]:
    """A device with fewer members, fewer bytes to read and a smaller size."""
    optional = [name for name in device if name not in (*_PLACE, "size")]

    def only(kept: list[str]) -> dict[str, Any]:
        return {name: value for name, value in device.items() if name in kept or name not in optional}

    device = only(reduced(optional, lambda kept: len(kept) < len(optional) and works(only(kept))))
    if device.get("reads"):
        reads = shorter_bytes(
            bytes.fromhex(device["reads"]), lambda data: works({**device, "reads": data.hex()})
        )
        device = {**device, "reads": reads.hex()}
    size = _number(device["size"])
    size = smaller(size, 1, lambda other: 0 < other < size and works({**device, "size": other}))
    return {**device, "size": size} if size != _number(device["size"]) else device


def simpler_json(value: Any, works: Works) -> Any:
    """A decoded JSON value of fewer members and smaller numbers; text stays as it is."""
    if isinstance(value, bool):
        return False if value and works(False) else value
    if isinstance(value, int):
        return smaller(value, 0, works)
    if isinstance(value, dict):
        return _simpler_dict(value, works)
    if isinstance(value, list):
        items = reduced(value, lambda kept: len(kept) < len(value) and works(kept))
        for i, item in enumerate(items):
            items[i] = simpler_json(item, _within(items, i, works))
        return items
    return value


def _simpler_dict(value: dict[Any, Any], works: Works) -> dict[Any, Any]:
    def only(kept: list[Any]) -> dict[Any, Any]:
        return {name: value[name] for name in kept}

    result = only(reduced(list(value), lambda kept: len(kept) < len(value) and works(only(kept))))
    for name in result:
        result[name] = simpler_json(result[name], _within(result, name, works))
    return result


def _within(whole: Any, place: Any, works: Works) -> Works:
    """Whether the whole, a list or dict, works with another value at a place of it."""

    def works_there(value: Any) -> bool:
        other = whole.copy()
        other[place] = value
        return works(other)

    return works_there


def _number(value: Any) -> int:
    """A number of the exchange format in either of its forms."""
    return int(value, 16) if isinstance(value, str) else int(value)

"""`phys`, `devices`, `kvm` and `callbacks` of a case.

They are kept as they were given, and JSON has several forms of a number. Those in the usual form are
encoded by their declarations; others as their JSON, compressed. What is read is a machine that there can
be: where parts contradict each other, the fewest that have to go are dropped.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any, Final

from emufuzz.case.codec.memory import read_memory, write_memory
from emufuzz.case.codec.stream import Source, mask, number
from emufuzz.case.codec.values import coder
from emufuzz.case.devices import MMIO
from emufuzz.case.document import decode_object
from emufuzz.case.errors import CaseError
from emufuzz.case.fields import EXTRA, MAX_DOCUMENT
from emufuzz.case.machine import extra_of, extra_to_obj
from emufuzz.case.memory import PHYSICAL_BITS
from emufuzz.case.model import PAGE_MASK
from emufuzz.case.read import reader
from emufuzz.case.write import to_json

#: The order of the bits; the last one stands for what is encoded as JSON.
_NAMES: Final = ("phys", "devices", "kvm", "callbacks")
_JSON: Final = len(_NAMES)
_CODERS: Final = {name: coder(EXTRA[name], name) for name in _NAMES}
_READERS: Final = {name: reader(EXTRA[name]) for name in _NAMES}
_PAGE_UP: Final = (1 << PHYSICAL_BITS) - 1 & ~PAGE_MASK
#: Events of which only one can be; the ones that go first.
_EVENTS: Final = ("interrupt", "pending")


def write_extra(out: bytearray, mode: str, usual: str, extra: dict[str, Any]) -> None:
    """Append the extra fields of a case; `usual` is the memory that is likely in `phys`."""
    values = {name: _value_of(name, extra[name]) for name in _NAMES if name in extra}
    plain = {name: value for name, value in values.items() if value is not None}
    rest = {name: value for name, value in extra.items() if name not in plain}
    out += mask([*(name in plain for name in _NAMES), bool(rest)])
    for name, value in plain.items():
        if name == "phys":
            write_memory(out, mode, usual, value, PHYSICAL_BITS)
        else:
            _CODERS[name].write(out, value)
    if rest:
        data = zlib.compress(json.dumps(extra_to_obj(rest), separators=(",", ":")).encode(), 9)
        out += number(len(data)) + data


def _value_of(name: str, given: Any) -> Any:
    """What a field says, if it is in the usual form: the one that `_form_of` gives."""
    if name == "kvm":
        return given if _READERS["kvm"](to_json(EXTRA["kvm"], given)) == given else None
    try:
        value = _READERS[name](given)
    except CaseError:
        return None
    if _form_of(name, value) != given:
        return None
    if name == "phys":
        return tuple([(entry["addr"], entry.get("data", b"")) for entry in value])
    return value


def _form_of(name: str, value: Any) -> Any:
    """The usual JSON form of what was read: ports are integers, and empty memory has no data."""
    if name == "phys":
        return _memory_form((entry["addr"], entry.get("data", b"")) for entry in value)
    form = to_json(EXTRA[name], value)
    if name == "devices":
        form = [device | {"port": int(device["port"], 16)} if "port" in device else device for device in form]
    return form


def _memory_form(entries: Any) -> list[dict[str, str]]:
    return [
        {"addr": hex(addr), "data": data.hex()} if data else {"addr": hex(addr)} for addr, data in entries
    ]


# -- reading -------------------------------------------------------------------------------------


def read_extra(source: Source, mode: str) -> dict[str, Any] | None:
    """The extra fields that the source tells of, without what contradicts itself or the rest."""
    given = source.byte()
    extra: dict[str, Any] = {}
    if given & 1:
        extra["phys"] = _memory_form(read_memory(source, mode, PHYSICAL_BITS))
    for i, name in enumerate(_NAMES[1:], 1):
        if given >> i & 1:
            value = _MENDERS[name](_CODERS[name].read(source))
            extra[name] = value if name == "kvm" else _form_of(name, value)
    if given >> _JSON & 1:
        extra = _from_json(source.take(source.below(MAX_DOCUMENT))) | extra
    return {name: extra[name] for name in EXTRA if name in extra} or None


def _from_json(data: bytes) -> dict[str, Any]:
    """Fields in JSON of which nothing is wrong."""
    try:
        text = zlib.decompressobj().decompress(data, MAX_DOCUMENT)
        obj = decode_object(text)
        fields = {name: _READERS[name](value) for name, value in obj.items() if name in _READERS}
        return extra_of(obj, fields) or {}
    except (zlib.error, CaseError):
        return {}


def _sound(name: str, value: Any) -> bool:
    """Whether a field that was read does not contradict itself."""
    try:
        extra_of({name: value}, {name: value})
    except CaseError:
        return False
    return True


def _mend_devices(devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Devices within their address spaces that do not overlap; later ones give way."""
    devices = [_mend_device(device) for device in devices]
    if _sound("devices", devices):
        return devices
    kept: list[dict[str, Any]] = []
    for device in devices[:_TRIED]:
        if _sound("devices", [*kept, device]):
            kept.append(device)
    return kept


def _mend_device(device: dict[str, Any]) -> dict[str, Any]:
    """Only the address that its kind has, and no more to read than it holds."""
    first, other = ("addr", "port") if device["kind"] == MMIO else ("port", "addr")
    mended = {name: value for name, value in device.items() if name != other}
    mended.setdefault(first, 0)
    end = 1 << (64 if first == "addr" else 16)
    mended["size"] = min(device["size"], end - mended[first])
    if mended.get("behaviour") == "ram" and "reads" in mended:
        mended["reads"] = mended["reads"][: mended["size"]]
    return mended


def _mend_kvm(kvm: dict[str, Any]) -> dict[str, Any]:
    """Addresses on the boundaries where they have to be; what still contradicts itself is dropped."""
    if "lapic" in kvm:
        kvm["lapic"] = {offset & 0xFF0: value for offset, value in kvm["lapic"].items()}
    if "memslots" in kvm:
        kvm["memslots"] = _mend_slots(kvm["memslots"])
    if _sound("kvm", kvm):
        return kvm
    kvm = {name: value for name, value in kvm.items() if name in _EVENTS or _sound("kvm", {name: value})}
    for name in _EVENTS:
        if not _sound("kvm", kvm):
            kvm.pop(name, None)
    return kvm


def _mend_slots(slots: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        slot | {"base": slot["base"] & _PAGE_UP, "size": slot["size"] & _PAGE_UP or PAGE_MASK + 1}
        for slot in slots
    ]


def _as_it_is(value: Any) -> Any:
    return value


#: Devices that are tried one by one.
_TRIED: Final = 32
_MENDERS: Final[dict[str, Callable[[Any], Any]]] = {
    "devices": _mend_devices,
    "kvm": _mend_kvm,
    "callbacks": _as_it_is,
}

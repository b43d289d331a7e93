"""Callback events: the tuple ("write", 0x9000, bytes) is the JSON array `["write","0x9000","02"]`.

One row per kind of event: what its items are. Segment registers are VCPU_SREG_*
numbers in the tuple and names in JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from emufuzz.arch.regs import SREG_NAMES
from emufuzz.case.model import Event
from emufuzz.case.read import reader
from emufuzz.case.spec import Custom, FieldError, Hex, Number, Reader, Spec, Text, json_type, shown

_U64: Final = Number(2**64 - 1)  # an address or a value
_U32: Final = Number(2**32 - 1)  # an MSR index, a CPUID leaf
_SEL: Final = Number(0xFFFF)
_LIMIT: Final = Number(0xFFFF, hex=False)
_PORT: Final = Number(0xFFFF, hex=False)
_SIZE: Final = Number(0xFFFF, hex=False)
_COUNT: Final = Number(2**32 - 1, hex=False)
_REG: Final = Number(15, hex=False)  # number of a control or debug register
_XCR: Final = Number(2**32 - 1, hex=False)
_BIT: Final = Number(1, hex=False)
_DATA: Final = Hex(4096)


def _read_segment(value: Any) -> int:
    if type(value) is not str or value not in SREG_NAMES:
        raise FieldError(f"{shown(value)} is unknown; expected one of {', '.join(SREG_NAMES)}")
    return SREG_NAMES.index(value)


_SEG: Final = Custom(_read_segment, {"enum": list(SREG_NAMES)})
_VIA: Final = Text(("std", "sys"))  # none = the *_emulated callbacks

#: Kind -> (items, how many of them may be absent at the end).
# fmt: off
EVENT_FORMS: Final[dict[str, tuple[tuple[Spec, ...], int]]] = {
    "fetch":         ((_U64, _SIZE),          0),
    "read":          ((_U64, _SIZE, _VIA),    1),
    "write":         ((_U64, _DATA, _VIA),    1),
    "cmpxchg":       ((_U64, _DATA, _DATA),   0),
    "in":            ((_PORT, _SIZE, _COUNT), 1),
    "out":           ((_PORT, _DATA),         0),
    "halt":          ((),                     0),
    "wbinvd":        ((),                     0),
    "invlpg":        ((_U64,),                0),
    "set_cr":        ((_REG, _U64),           0),
    "set_dr":        ((_REG, _U64),           0),
    "get_msr":       ((_U32,),                0),
    "set_msr":       ((_U32, _U64),           0),
    "set_segment":   ((_SEG, _SEL),           0),
    "set_gdt":       ((_U64, _LIMIT),         0),
    "set_idt":       ((_U64, _LIMIT),         0),
    "set_xcr":       ((_XCR, _U64),           0),
    "fix_hypercall": ((_U64,),                0),
    "set_nmi_mask":  ((_BIT,),                0),
    "cpuid":         ((_U32, _U32, _BIT),     0),
    "rdpmc":         ((_U32,),                0),
}
# fmt: on


def _readers_by_length() -> dict[str, dict[int, tuple[Reader, ...]]]:
    return {
        kind: {
            1 + length: tuple(reader(item) for item in items[:length])
            for length in range(len(items) - optional, len(items) + 1)
        }
        for kind, (items, optional) in EVENT_FORMS.items()
    }


_READERS: Final = _readers_by_length()


def read_event(value: Any) -> Event:
    """One event from its JSON array."""
    if type(value) is not list or not value:
        raise FieldError(f"expected an array that starts with the kind of event, got {json_type(value)}")
    kind = value[0]
    forms = _READERS.get(kind) if type(kind) is str else None
    if forms is None:
        raise FieldError(f"{shown(kind)} is not a kind of event", "[0]")
    readers = forms.get(len(value))
    if readers is None:
        lengths = " or ".join(str(length) for length in sorted(forms))
        raise FieldError(f"a {kind} event has {lengths} items, not {len(value)}")
    items: list[Any] = [kind]
    try:
        for read, item in zip(readers, value[1:], strict=True):
            items.append(read(item))
    except FieldError as error:
        raise error.under(f"[{len(items)}]") from None
    return tuple(items)


#: A %-format for an event's JSON, and which items need a conversion before, by which function.
_Template: TypeAlias = tuple[str, tuple[tuple[int, Callable[[Any], str]], ...]]


def _template(kind: str, items: tuple[Spec, ...]) -> _Template:
    forms = [f'"{kind}"']
    for item in items:
        if isinstance(item, Number):
            forms.append('"0x%x"' if item.hex else "%d")
        else:
            forms.append('"%s"')
    conversions = tuple(
        (i + 1, bytes.hex if isinstance(item, Hex) else SREG_NAMES.__getitem__)
        for i, item in enumerate(items)
        if isinstance(item, Hex | Custom)
    )
    return f"[{','.join(forms)}]", conversions


_TEMPLATES: Final = {
    (kind, 1 + length): _template(kind, items[:length])
    for kind, (items, optional) in EVENT_FORMS.items()
    for length in range(len(items) - optional, len(items) + 1)
}


def event_to_json(event: Event) -> str:
    """The JSON array of one event."""
    template, conversions = _TEMPLATES[event[0], len(event)]
    if not conversions:
        return template % event[1:]
    values = list(event)
    for index, convert in conversions:
        values[index] = convert(values[index])
    return template % tuple(values[1:])


def events_to_json(events: Iterable[Event]) -> str:
    """The JSON array of a list of events."""
    return f"[{','.join([event_to_json(event) for event in events])}]"


def event_schema() -> dict[str, Any]:
    """JSON Schema of the outer form; the items of each kind are checked by the reader."""
    return {"type": "array", "minItems": 1, "prefixItems": [{"enum": list(EVENT_FORMS)}]}


EVENT: Final = Custom(read_event, event_schema())

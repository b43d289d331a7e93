"""Samples of the rules about events, device traces, and how exceptions are reported."""

from __future__ import annotations

from typing import Any

from emufuzz.case.build import DATA_BASE
from tests.unit.oracle.rules.samples import GP0, UD, Sample, case_of, effect

_PF = (14, 2, 0xB000)
_LOAD = case_of("prot32", "8b03", rbx=DATA_BASE)
_STORE = case_of("prot32", "8903", rbx=DATA_BASE)
_ABSENT = case_of("prot32", "8903", rbx=0xB000)
_ADD = case_of("prot32", "f00103", rbx=DATA_BASE)
_UD2 = case_of("prot32", "0f0b")
_IN = case_of("prot32", "e460")
_READ = ("read", DATA_BASE, 4)
_WRITE = ("write", DATA_BASE, b"\0\0\0\0")
_DEVICE = {"path": "ept-misconfig", "extra": {"devices": [{"kind": "mmio", "addr": "0x20000", "size": 8}]}}
_DEVICE_LOAD = case_of("prot32", "8b03", rbx=0x20000, **_DEVICE)
_DEVICE_UD = case_of("prot32", "0f0b", rbx=0x20000, **_DEVICE)
_FAR = {"kind": "mmio", "addr": "0x20000", "size": 4, "direction": "read", "data": "00000000"}


def _events(*events: tuple[Any, ...], **changes: Any) -> dict[str, Any]:
    return {"events": list(events), **changes}


def _trace(*accesses: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"extra": {"device_trace": list(accesses)}, **changes}


def _port(number: int) -> dict[str, Any]:
    return {"kind": "pio", "port": number, "size": 1, "direction": "read", "data": "ff"}


def _injected(vector: int, code: int | None, **changes: Any) -> dict[str, Any]:
    event = {"vector": vector} if code is None else {"vector": vector, "error_code": code}
    return {"extra": {"injected": [event]}, **changes}


# fmt: off
DELIVERY = (
    effect("error-code-form", _UD2, {"exception": UD}, {"exception": (6, 0, None)}),
    effect("address-form", _ABSENT, {"exception": _PF}, {"exception": (14, 2, None)}),
    effect("selector-code-form", case_of("prot32", "8ed8", rax=0x1F8), {"exception": (13, 0x1F8, None)},
           {"exception": (13, 0x101F8, None)}),
    effect("zero-code-form",
           case_of("prot32", "8b03", rbx=DATA_BASE + 1, cpl=3, cr0=0x80050033, flags=1 << 18),
           {"exception": (17, 0, None)}, {"exception": (17, 1, None)}),
    effect("page-code-form", _ABSENT, {"exception": _PF}, {"exception": (14, 6, 0xB000)}),
    effect("injected-code-form", case_of("prot32", "f4", cpl=3, path="invalid-guest-state"),
           _injected(13, 0, exception=GP0), _injected(13, None, exception=GP0)),
    effect("single-step", case_of("prot32", "90", flags=0x100, path="invalid-guest-state"),
           _injected(1, None),
           {"extra": {"injected": []}}),
)

EVENTS = (
    effect("event-read-once", _LOAD, _events(_READ), _events(_READ, _READ)),
    effect("event-read-operand", _STORE, _events(_WRITE), _events(_READ, _WRITE)),
    effect("event-write-operand", _LOAD, _events(_READ), _events(_READ, _WRITE)),
    effect("event-supervisor", _LOAD, _events((*_READ, "std")), _events((*_READ, "sys"))),
    effect("event-before-decode-fault", _UD2, _events(("fetch", 0x6000, 2), exception=UD),
           _events(_READ, exception=UD)),
    effect("event-write-before-fault", case_of("prot32", "010d00b00000"),
           _events(("read", 0xB000, 4), exception=_PF),
           _events(("write", DATA_BASE, b"\0\0\0\0"), exception=_PF)),
    effect("event-fetch-window", _UD2, _events(("fetch", 0x6000, 15), exception=UD),
           _events(("fetch", 0x6000, 16), exception=UD)),
    effect("event-no-port", _LOAD, _events(_READ), _events(("in", 0x60, 1))),
    effect("event-port", _IN, _events(("in", 0x60, 1)), _events(("in", 0x60, 1, 2))),
    effect("event-locked", _ADD, _events(_READ, ("cmpxchg", DATA_BASE, b"\0\0\0\0", b"\0\0\0\0")),
           _events(_READ, _WRITE)),
    effect("event-system-write", case_of("prot32", "89d8"), _events(("fetch", 0x6000, 2)),
           _events(("set_cr", 0, 0x11))),
    effect("device-read-once", _DEVICE_LOAD, _trace(_FAR), _trace(_FAR, _FAR)),
    effect("device-before-decode-fault", _DEVICE_UD, _trace(exception=UD), _trace(_FAR, exception=UD)),
    effect("device-port", case_of("prot32", "e460", path="io-completion", extra={}), _trace(_port(0x60)),
           _trace(_port(0x61))),
)
# fmt: on

SAMPLES: tuple[Sample, ...] = (*DELIVERY, *EVENTS)

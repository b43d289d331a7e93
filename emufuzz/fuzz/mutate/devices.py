"""Devices: what they answer, how they behave, how large they are, where they lie."""

from __future__ import annotations

from random import Random
from typing import Any, Final

import msgspec

from emufuzz.arch.regs import VCPU_REGS_RDX
from emufuzz.case.model import Case
from emufuzz.fuzz.kvm.scenes import BEHAVIOURS
from emufuzz.fuzz.mutate.base import with_extra, with_register
from emufuzz.fuzz.values import boundary_bytes

_MOST_BYTES: Final = 64


def other_stream(case: Case, rng: Random) -> Case:
    """What the ports without a device answer."""
    return msgspec.structs.replace(case, port_in=_other_answer(rng, case.port_in))


def _other_answer(rng: Random, old: bytes) -> bytes:
    kind = rng.randrange(4)
    if kind == 0 or not old:
        return boundary_bytes(rng, rng.choice((1, 2, 4, 8, 16)))
    if kind == 1:
        return old[: rng.randrange(len(old))]
    if kind == 2:
        return (old + boundary_bytes(rng, 8))[:_MOST_BYTES]
    at = rng.randrange(len(old))
    return (
        old[:at]
        + bytes((rng.choice((0, 1, 0x7F, 0x80, 0xFF, old[at] ^ 1 << rng.randrange(8))),))
        + old[at + 1 :]
    )


def other_device(case: Case, rng: Random) -> Case | None:
    """One device answers something else, behaves otherwise, ends elsewhere, moves, or goes away."""
    devices = list((case.extra or {}).get("devices", ()))
    if not devices:
        return None
    place = rng.randrange(len(devices))
    old = devices[place]
    kind = rng.randrange(6)
    if kind < 2:
        answer = _other_answer(rng, bytes.fromhex(old.get("reads", "")))
        devices[place] = {**old, "reads": answer[: old["size"]].hex()}
    elif kind == 2:
        devices[place] = {**old, "behaviour": rng.choice(BEHAVIOURS)}
    elif kind == 3:
        devices[place] = _resized(rng, old)
    elif kind == 4:
        devices[place] = _shifted(rng, old)
    else:
        del devices[place]
    return with_extra(case, "devices", devices)


def _resized(rng: Random, old: dict[str, Any]) -> dict[str, Any]:
    size = max(1, old["size"] + rng.choice((-8, -1, 1, 2, 8)))
    return {**old, "size": size, "reads": old.get("reads", "")[: 2 * size]}


def _shifted(rng: Random, old: dict[str, Any]) -> dict[str, Any]:
    change = rng.choice((-8, -4, -1, 1, 4, 8))
    if old["kind"] == "pio":
        return {**old, "port": max(0, min(0xFFFF, old["port"] + change))}
    addr = old["addr"] if isinstance(old["addr"], int) else int(old["addr"], 16)
    return {**old, "addr": hex(max(0, addr + change))}


def other_port(case: Case, rng: Random) -> Case | None:
    """DX at a port of a device, or next to it."""
    ports = [d for d in (case.extra or {}).get("devices", ()) if d["kind"] == "pio"]
    if not ports:
        return None
    device = rng.choice(ports)
    port = device["port"] + rng.choice((0, 0, device["size"] - 1, device["size"], -1)) & 0xFFFF
    return with_register(case, VCPU_REGS_RDX, case.gpr[VCPU_REGS_RDX] & ~0xFFFF | port)

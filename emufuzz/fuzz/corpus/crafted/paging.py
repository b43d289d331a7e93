"""KVM's MMU: guests that map their own page tables, holes and read-only memory.

Shadow paging acts upon the order in which an instruction reaches tables, pages that hold tables, and
devices. Which orders matter is not written down here: pages become one thing or another by chance, from
a fixed seed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from random import Random
from typing import Any, Final

import msgspec

from emufuzz.arch import cr
from emufuzz.case.build import CODE_BASE, CODE_BITS, build_case, build_system
from emufuzz.case.model import PAGE_MASK, PAGE_SIZE, Case, Memory, System, TableRegister
from emufuzz.case.segments import descriptor_bytes, segment_code
from emufuzz.fuzz.corpus.crafted.machine import exiting
from emufuzz.fuzz.corpus.crafted.tables import KINDS, OWN, READ_ONLY, ROOT, Kind, Tables

_LAST: Final = (1 << 64) - 1
_LTR: Final = b"\x0f\x00\x18"
_LOAD: Final = b"\x8a\x00"  # mov al, [rax]
_SEED: Final = 7
_COUNT: Final = 6000
#: Linear pages: code, two of a stack on the border of two tables, descriptors, operands.
_CODE, _HIGH, _LOW, _GDT, _ONE, _TWO = 0x801000, 0x400000, 0x3FF000, 0x802000, 0x803000, 0xA00000
_LINEAR: Final = (_CODE, _CODE + 0x1000, _HIGH, _LOW, _GDT, _ONE, _ONE + 0x1000, _TWO, _TWO + 0x1000)
#: Where the descriptor of a far call lies in its page: behind the entries that are in use.
_DESCRIPTOR: Final = 0xF08
#: Instructions that touch several pages, the stack, RBX, RSI and RDI pointing to them.
_CODES: Final = (
    b"\xff\x1b", b"\xff\x1b",  # call far [rbx]
    b"\xff\x33", b"\x8f\x03", b"\x66\xff\x33",  # push, pop [rbx]
    b"\xa5", b"\xf3\xa5", b"\xa7",  # movs, cmps
    b"\x01\x03", b"\xf0\xff\x03", b"\x87\x03", b"\xf0\x0f\xb1\x03", b"\x0f\xb3\x03", b"\x0f\xc7\x0b",
    b"\xc8\x08\x00\x00", b"\x0f\xae\x03", b"\x8e\x1b", b"\x0f\x01\x03", b"\xcb",
)  # fmt: skip
_CODES_32: Final = (
    b"\x60",
    b"\x60",
    b"\x61",
    b"\x9a\x00\x60\x00\x00\x08\x00",
    b"\x9a\x00\x60\x00\x00\x08\x00",
)
_OFFSETS: Final = (0, 0x18, 0x7F8, 0x800, 0xFF8, 0xFFC, 0xFFE, 0xFFF)
_PATHS: Final = (*["shadow-pf"] * 6, "io-completion", "ept-violation", "ept-misconfig", "fep")
_EVENTS: Final[tuple[dict[str, Any], ...]] = (
    {}, {}, {}, {"interrupt": {"vector": 0x31}}, {"vectoring_info": "0x80000031"}, {"guest_mode": True},
    {"pending": {"vector": 13, "error_code": 0, "injected": True}}, {"pkru": 0x55555554},
)  # fmt: skip


def paging_cases() -> Iterator[Case]:
    """All of them."""
    yield from _last_byte()
    rng = Random(_SEED)
    for _ in range(_COUNT):
        yield _mapped(rng)


def _last_byte() -> Iterator[Case]:
    """Flat memory whose last page exists: its last byte is no address to KVM (INVALID_GPA)."""
    memory = Memory(((CODE_BASE, b""), (_LAST - PAGE_SIZE + 1, b"")))
    yield exiting(_LOAD, path="fep", mem=memory, rax=_LAST - 1)
    device = {"kind": "mmio", "addr": "0x0", "size": 2}
    case = exiting(_LTR, path="ept-misconfig", mem=memory, rax=_LAST)
    yield msgspec.structs.replace(case, extra={"devices": [device]})


def _mapped(rng: Random) -> Case:
    """A guest with strange tables, and an instruction in it."""
    kind = rng.choice(KINDS)
    tables = Tables(kind, _LINEAR, rng)
    tables.fill(rng, (_CODE, _CODE + PAGE_SIZE))
    own = tables.bend(rng) if rng.random() < 0.6 else None
    frames = dict(tables.frames) | {READ_ONLY: bytearray(PAGE_SIZE)}
    frames |= {OWN + PAGE_SIZE * i: bytearray(PAGE_SIZE) for i in range(len(_LINEAR))}
    target = segment_code(8, bits=CODE_BITS[kind.mode])
    fresh = msgspec.structs.replace(target, type=target.type & ~1)  # the call will set the accessed bit
    _lay(frames, tables.frame_of(_GDT) + _DESCRIPTOR, descriptor_bytes(fresh))
    one = _ONE + rng.choice((*_OFFSETS, 4 * rng.getrandbits(10)))
    if own is not None and rng.random() < 0.3:
        one = own
    _lay(frames, tables.frame_of(_ONE) + (one & PAGE_MASK), struct.pack("<IH", 0x6000, 8))
    stack = _HIGH + rng.choice((2, 4, 6, 8, 0x10, 0x18, 0x800))
    if own is not None and rng.random() < 0.4:
        stack = (own & ~PAGE_MASK) + rng.choice((4, 0x10, 0x800))
    path = rng.choice(_PATHS)
    prefix = b"\x0f\x0bkvm" if path == "fep" else b""
    code = rng.choice(_CODES if kind.mode == "prot64" else (*_CODES, *_CODES_32))
    two = _TWO + rng.choice((*_OFFSETS, 4 * rng.getrandbits(10))) if own is None else own
    case = build_case(
        kind.mode, prefix + code + b"\xf4", system=_system(rng, kind), mem=Memory(), flags=_flags(rng),
        rip=_CODE + rng.choice((0, 0, 0xFFE)), rsp=stack,
        rbp=two, rsi=one, rdi=two, rbx=one, rax=rng.getrandbits(31), rcx=3,
    )  # fmt: skip
    phys = [{"addr": hex(frame), "data": data.hex().rstrip("0")} for frame, data in sorted(frames.items())]
    return msgspec.structs.replace(
        case, path=path, extra={"phys": _even(phys), **_machine(rng, path, frames)}
    )


def _lay(frames: dict[int, bytearray], address: int, data: bytes) -> None:
    """Bytes of one page, where there is memory."""
    frame, offset = address & ~PAGE_MASK, address & PAGE_MASK
    if frame in frames:
        part = data[: PAGE_SIZE - offset]
        frames[frame][offset : offset + len(part)] = part


def _even(phys: list[dict[str, str]]) -> list[dict[str, str]]:
    """Whole bytes, and no data where there are only zeros."""
    return [
        {"addr": entry["addr"], **({"data": data + "0" * (len(data) % 2)} if (data := entry["data"]) else {})}
        for entry in phys
    ]


def _system(rng: Random, kind: Kind) -> System:
    more = rng.choice((0, 0, cr.X86_CR4_SMEP, cr.X86_CR4_SMAP, 1 << 22 if kind.mode == "prot64" else 0))
    system = build_system(
        kind.mode, 0, cr3=ROOT, gdtr=TableRegister(_GDT + _DESCRIPTOR - 8, 0x27), cr4=0x600 | kind.cr4 | more
    )
    if rng.random() < 0.4:
        system = msgspec.structs.replace(system, cr0=system.cr0 & ~cr.X86_CR0_WP)
    return system


def _flags(rng: Random) -> int:
    return rng.choice((0, 0, 0x40000, 0x100, 0x200))


def _machine(rng: Random, path: str, frames: dict[int, bytearray]) -> dict[str, Any]:
    """Knobs, events, and slots of which one is read-only; devices in the hole."""
    knobs: dict[str, Any] = {}
    if path == "io-completion" and rng.getrandbits(1):
        knobs = {"ept": False, "unrestricted_guest": False, "host_maxphyaddr": 46}
    if rng.random() < 0.3:
        knobs["irqchip"] = True
    if rng.random() < 0.1:
        knobs["mmio_caching"] = False
    kvm: dict[str, Any] = {**rng.choice(_EVENTS), "knobs": knobs}
    if rng.random() < 0.5:
        log = rng.getrandbits(1)
        kvm["memslots"] = [
            {"base": frame, "size": PAGE_SIZE, "flags": 2 if frame == READ_ONLY else log} for frame in frames
        ]
    devices = [{"kind": "mmio", "addr": "0xb0000", "size": 4096}] if path == "io-completion" else []
    return {"kvm": kvm, **({"devices": devices} if devices else {})}

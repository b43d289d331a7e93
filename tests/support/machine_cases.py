"""Cases with devices, ports and physical memory, and what oracles make of them."""

from __future__ import annotations

import msgspec

from emufuzz.arch.cr import X86_CR4_PAE
from emufuzz.case.build import build_case, build_system
from emufuzz.case.devices import MMIO, DeviceAccess
from emufuzz.case.model import case_memory
from emufuzz.case.translate import walk

STREAM = {"kind": "mmio", "addr": "0xb000", "size": 4096, "reads": bytes(range(64)).hex()}
PORT = {"kind": "pio", "port": 0x60, "size": 2, "reads": "0102030405060708"}

P, RW, US, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
TARGET = 0x9000  # linear page whose entry the tests change
SYSTEMS = {
    "2-level": build_system("prot32", 0),
    "pae": build_system("prot32", 0, cr4=0x600 | X86_CR4_PAE),
    "4-level": build_system("prot64", 0),
}
USER = {
    "2-level": build_system("prot32", 3),
    "pae": build_system("prot32", 3, cr4=0x600 | X86_CR4_PAE),
    "4-level": build_system("prot64", 3),
}


def case_of(mode, code, *devices, path=None, kvm=None, port_in="", **options):
    case = build_case(mode, bytes.fromhex(code), **options)
    extra = {**(case.extra or {})}
    if devices:
        extra["devices"] = list(devices)
    if kvm is not None:
        extra["kvm"] = kvm
    return msgspec.structs.replace(case, path=path, extra=extra or None, port_in=bytes.fromhex(port_in))


def run(oracle, case):
    oracle.check(case)
    (outcome,) = oracle.run([case])
    return outcome


def trace(outcome):
    """(r or w, address or port, data) of each access."""
    accesses = outcome.extra["device_trace"]
    return [(a["direction"][0], a["addr"] if a["kind"] == "mmio" else a["port"], a["data"]) for a in accesses]


def entry_places(case, linear):
    """Physical addresses of the entries that translate a linear address, from the root down; their size."""
    system, pages = case.system, case_memory(case).pages
    values = walk(pages, system.cr0, system.cr3, system.cr4, system.efer, linear)[0]
    size = 8 if system.cr4 & X86_CR4_PAE else 4
    bits = 9 if size == 8 else 10
    tables = [system.cr3 & ~0xFFF, *(value & 0x000FFFFFFFFFF000 for value in values[:-1])]
    levels = range(len(values), 0, -1)
    return [
        table + (linear >> 12 + bits * (level - 1) & (1 << bits) - 1) * size
        for table, level in zip(tables, levels, strict=True)
    ], size


def physical(kind, code, changes=(), user=False, extra=None, **options):
    """A case with identity tables; `changes` are (level from the page up, entry) of TARGET."""
    system = options.pop("system", None) or (USER if user else SYSTEMS)[kind]
    mode = "prot64" if kind == "4-level" else "prot32"
    case = build_case(mode, bytes.fromhex(code), system=system, physical=True, **options)
    places, size = entry_places(case, TARGET)
    entries = [
        {"addr": hex(places[-1 - level]), "data": value.to_bytes(size, "little").hex()}
        for level, value in changes
    ]
    return msgspec.structs.replace(case, extra={"phys": [*case.extra["phys"], *entries], **(extra or {})})


def entry(outcome, case, level=0):
    """An entry of TARGET after the run."""
    places, size = entry_places(case, TARGET)
    at = places[-1 - level]
    page = outcome.pages.get(at >> 12) or case_memory(case).pages[at >> 12]
    return int.from_bytes(page[at & 0xFFF : (at & 0xFFF) + size], "little")


def read(addr, data, kind=MMIO):
    data = bytes.fromhex(data)
    return DeviceAccess(kind, addr, len(data), write=False, data=data)


def write(addr, data, kind=MMIO):
    return read(addr, data, kind)._replace(write=True)

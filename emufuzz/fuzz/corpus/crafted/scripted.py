"""The emulator alone with callbacks that fail: each call of instructions that make several, in every way."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Final

import msgspec

from emufuzz.case.build import DATA_BASE, build_case, build_system
from emufuzz.case.model import Case, TableRegister
from emufuzz.case.segments import segment_code, segment_data

#: Mode, CPL, code, registers: instructions that read and write system structures.
_INSTRUCTIONS: Final[tuple[tuple[str, int | None, bytes, dict[str, Any]], ...]] = (
    ("prot32", 0, b"\x8e\xd8", {"rax": 0x80}),  # mov ds, ax
    ("prot64", 0, b"\x8e\xd8", {"rax": 0x80}),
    ("prot32", 0, b"\x0f\x00\xd0", {"rax": 0x70}),  # lldt
    ("prot64", 0, b"\x0f\x00\xd0", {"rax": 0x70}),
    ("prot32", 0, b"\x0f\x00\xd8", {"rax": 0x90}),  # ltr
    ("prot64", 0, b"\x0f\x00\xd8", {"rax": 0x90}),
    ("prot32", 0, b"\x0f\x01\x13", {"rbx": DATA_BASE}),  # lgdt
    ("real", None, b"\xcd\x21", {}),  # int
    ("real", None, b"\xcf", {}),  # iret
    ("real", None, b"\x66\xcf", {}),
    ("prot32", 0, b"\xcb", {}),  # retf
    ("prot32", 0, b"\x9a\x00\x60\x00\x00\x08\x00", {}),  # call far
    ("prot32", 3, b"\xe4\x60", {}),  # in al, 60h: the bitmap of the TSS
    ("prot64", 3, b"\xec", {"rdx": 0x60}),
    ("prot32", 0, b"\x61", {}),  # popa
    ("prot32", 0, b"\x60", {}),  # pusha
    ("prot64", 0, b"\xc8\x08\x00\x00", {}),  # enter
    ("prot32", 0, b"\x0f\xc7\x0b", {"rbx": DATA_BASE}),  # cmpxchg8b
    ("prot32", 0, b"\x0f\xae\x0b", {"rbx": DATA_BASE}),  # fxrstor
)
_CALLS: Final = (
    *(("read_std", nth) for nth in range(1, 6)), *(("write_std", nth) for nth in range(1, 4)),
    ("read_emulated", 1), ("read_emulated", 2), ("read_emulated", 3),
    ("write_emulated", 1), ("write_emulated", 2),
    ("cmpxchg_emulated", 1),
)  # fmt: skip
#: Instructions that L1 may intercept.
_INTERCEPTED: Final = (
    b"\xf4", b"\x0f\x32", b"\x0f\x22\xc0", b"\x0f\xa2", b"\xe4\x60", b"\x0f\x01\x03", b"\x6c",
    b"\x0f\x21\xc0", b"\x90",
)  # fmt: skip


def scripted_cases() -> Iterator[Case]:
    """All of them."""
    results = ("propagate_fault", "unhandleable", "io_needed")
    for (mode, cpl, code, registers), (op, nth) in product(_INSTRUCTIONS, _CALLS):
        for result in results:
            yield _scripted(mode, cpl, code, registers, {"op": op, "nth": nth, "result": result})
    for code, nth, result in product(
        _INTERCEPTED, (1, 2, 3), ("intercepted", "unhandleable", "propagate_fault")
    ):
        yield _scripted("prot32", 0, code, {}, {"op": "intercept", "nth": nth, "result": result})
    yield from _features()
    yield from _edges()


def _scripted(
    mode: str, cpl: int | None, code: bytes, registers: dict[str, Any], call: dict[str, Any]
) -> Case:
    system = build_system(mode, cpl, **_tables(mode))
    case = build_case(mode, code + b"\xf4", system=system, data=_DATA, **registers)
    return msgspec.structs.replace(case, extra={"callbacks": [call]})


#: A descriptor that was never accessed at 80h, an available TSS at 90h; a far pointer on the stack.
_DATA: Final = {
    0x1080: bytes.fromhex("ffff000000 92cf00".replace(" ", "")),
    0x1090: bytes.fromhex("670000400089000000000000" + "00000000"),
    0xC800: (0x6000).to_bytes(4, "little") + (0x08).to_bytes(4, "little") + bytes(8),
}


def _tables(mode: str) -> dict[str, Any]:
    if mode == "real":
        return {"idtr": TableRegister(0x8000, 0x3FF)}
    return {"gdtr": TableRegister(0x1000, 0xFF)}


def _features() -> Iterator[Case]:
    """Instructions that CPUID denies."""
    questions = (
        (b"\x0f\x38\xf0\x03", "guest_has_movbe"),
        (b"\xf3\x0f\xc7\xf8", "guest_has_rdpid"),
        (b"\x0f\xae\x03", "guest_has_fxsr"),
        (b"\x0f\x34", "guest_cpuid_is_intel_compatible"),
    )
    for code, op in questions:
        for answer in (0, 1):
            yield _scripted("prot32", 0, code, {"rbx": DATA_BASE}, {"op": op, "result": answer})
    for answer, mode in product((0, 1), ("prot32", "prot64")):
        yield _scripted(mode, 0, b"\x0f\xaa", {}, {"op": "is_smm", "result": answer})


def _edges() -> Iterator[Case]:
    """Tables at the end of the address space, selectors that are special, modes that end."""
    high = TableRegister(0xFFFFFFF0, 0xFF)
    for mode in ("prot32", "prot64"):
        yield build_case(mode, b"\x8e\xd8\xf4", rax=0x10, system=build_system(mode, gdtr=high))
        for cpl in (0, 3):
            yield build_case(mode, b"\x8e\xd0\xf4", cpl=cpl, rax=3)
    idt = TableRegister(0x7FFE - 4 * 0x21, 0x3FF)
    yield build_case("real", b"\xcd\x21\xf4", system=build_system("real", idtr=idt))
    for mode, value in product(("prot64", "compat32", "prot32"), (0x10, 0x11, 0x80000010)):
        yield build_case(mode, b"\x0f\x22\xc0\xf4", rax=value)
    for code, base in product((b"\x0f\x01\x13\xf4", b"\x0f\x01\x1b\xf4"), (1 << 47, 1 << 56, 1 << 63)):
        table = {DATA_BASE: (base << 16 | 0x7F).to_bytes(10, "little")}
        yield build_case("prot64", code, rbx=DATA_BASE, data=table)  # lgdt, lidt [rbx]
    unreadable = segment_code(0x80, readable=False)
    expand = segment_data(0x80, limit=0xFFF, expand_down=True)
    for segment in (unreadable, expand):
        yield build_case("prot32", b"\x8b\x03\xf4", rbx=DATA_BASE, system=build_system("prot32", ds=segment))

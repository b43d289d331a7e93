"""Memory operands from the VM-exit instruction-information field (SDM Vol. 3C Table 27-9)."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.exits import GP, UD, Exited

from emufuzz.case.segments import segment_data
from emufuzz.kvm.mem_operand import get_vmx_mem_address

SS: Any = (12, 0, None)
ES_, CS_, SS_, DS_, FS_, GS_ = (seg << 15 for seg in range(6))
ADDRESS16, ADDRESS32, ADDRESS64 = (size << 7 for size in range(3))
NO_INDEX, NO_BASE = 1 << 22, 1 << 27
BASE_RBX, INDEX_RCX = 3 << 23, 1 << 18
PLAIN = NO_INDEX | BASE_RBX | ADDRESS64 | DS_


def address(
    vm: Exited, info: int, displacement: int = 0, size: int = 16, *, write: bool = False
) -> int | None:
    return get_vmx_mem_address(vm.vcpu, displacement, info, size, write=write)


@pytest.mark.parametrize(
    ("info", "displacement", "expected"),
    [
        (PLAIN, 0, 0x334455667788),
        (PLAIN, 8, 0x334455667790),
        (PLAIN, (1 << 64) - 8, 0x334455667780),
        (PLAIN | NO_BASE, 0x1234, 0x1234),
        (PLAIN & ~NO_INDEX | INDEX_RCX, 0, 0x334455667789),
        (PLAIN & ~NO_INDEX | INDEX_RCX | 3, 0, 0x334455667790),
        (PLAIN & ~ADDRESS64 | ADDRESS32, 0, 0x55667788),
        (PLAIN & ~ADDRESS64 | ADDRESS16, 0, 0x7788),
        (NO_BASE | NO_INDEX | ADDRESS32 | DS_, (1 << 64) - 4, 0xFFFFFFFC),
    ],
)
def test_base_index_scale_displacement(info: int, displacement: int, expected: int) -> None:
    vm = Exited(rbx=0x334455667788, rcx=1)
    assert address(vm, info, displacement) == expected


def test_rsp_is_a_base() -> None:
    vm = Exited(rsp=0xC000)
    assert address(vm, NO_INDEX | ADDRESS64 | 4 << 23 | SS_) == 0xC000


def test_outside_64_bit_mode_registers_have_32_bits() -> None:
    vm = Exited("prot32", rbx=1 << 40 | 0x8000)
    assert address(vm, NO_INDEX | BASE_RBX | ADDRESS32 | DS_) == 0x8000


def test_a_register_operand_is_ud() -> None:
    vm = Exited()
    assert address(vm, PLAIN | 1 << 10) is None
    assert vm.pending == UD


@pytest.mark.parametrize(("seg", "fault"), [(DS_, GP), (SS_, SS), (ES_, GP)])
def test_a_non_canonical_address_in_64_bit_mode(seg: int, fault: Any) -> None:
    vm = Exited(rbx=1 << 63)
    assert address(vm, NO_INDEX | BASE_RBX | ADDRESS64 | seg) is None
    assert vm.pending == fault


@pytest.mark.parametrize(("seg", "expected"), [(FS_, 0x9000), (GS_, 0x9000), (DS_, 0x8000), (ES_, 0x8000)])
@pytest.mark.parametrize("mode", ["prot64", "compat32"])
def test_in_long_mode_only_fs_and_gs_have_a_base(seg: int, expected: int, mode: str) -> None:
    """In compatibility mode, too: no base of DS, no limits, no rights."""
    based = msgspec.structs.replace(segment_data(0x28, bits=32, dpl=0), base=0x1000)
    segments = dict.fromkeys(("ds", "es", "fs", "gs"), based)
    vm = Exited(mode, rbx=0x8000, **segments)
    assert address(vm, NO_INDEX | BASE_RBX | ADDRESS32 | seg) == expected


def protected(**changes: int) -> Exited:
    """32-bit protected mode with DS, SS and ES as told."""
    segment = msgspec.structs.replace(segment_data(0x28, bits=32, dpl=0), **changes)
    return Exited("prot32", rbx=0x8000, ds=segment, es=segment, ss=segment)


PLAIN32 = NO_INDEX | BASE_RBX | ADDRESS32


@pytest.mark.parametrize(
    ("changes", "write", "fault"),
    [
        ({"type": 3}, False, None),
        ({"type": 3}, True, None),
        ({"type": 1}, True, GP),  # read-only data
        ({"type": 1}, False, None),
        ({"type": 9}, False, GP),  # code that cannot be read
        ({"type": 11}, False, None),
        ({"type": 11}, True, GP),
        ({"p": 0}, False, GP),
        ({"limit": 0x800F, "g": 0}, False, None),
        ({"limit": 0x800E, "g": 0}, False, GP),
        ({"base": 0x1000}, False, None),  # no longer flat, but within the limit
        ({"type": 7, "limit": 0xFFFFFFFF}, False, None),  # expand-down, checked as if it grew upwards
        ({"type": 7, "limit": 0x1000, "g": 0}, False, GP),
    ],
)
@pytest.mark.parametrize("seg", [DS_, SS_])
def test_segments_of_protected_mode(changes: dict[str, int], write: bool, fault: Any, seg: int) -> None:
    vm = protected(**changes)
    result = address(vm, PLAIN32 | seg, write=write)
    if fault is None:
        assert (result, vm.pending) == (0x8000 + changes.get("base", 0), None)
    else:
        # rights are always #GP; the stack segment has #SS for its limit and for being unusable
        limit = "limit" in changes or "p" in changes
        assert (result, vm.pending) == (None, SS if seg == SS_ and limit else GP)


def test_linear_addresses_wrap_at_4_gib() -> None:
    vm = protected(base=0xFFFFF000)
    assert address(vm, PLAIN32 | DS_) == 0x7000

"""Eventfds that take an instruction: where its access exits tells."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.case.build import build_case
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.oracle.native_view import check_judged, eventfd_takes

DEVICE = {"kind": "mmio", "addr": "0x9000", "size": "0x10"}


def case(address, fd=0x9000, length=None, code="8903"):
    """MOV to memory, a device in the page behind that of the data, and an eventfd."""
    built = build_case("prot32", bytes.fromhex(code), rbx=address, data={0x8000: b""})
    fds = [{"addr": fd} | ({} if length is None else {"len": length})]
    memory = msgspec.structs.replace(
        built.mem, entries=tuple(e for e in built.mem.entries if e[0] >> 12 != 9)
    )
    return msgspec.structs.replace(
        built, mem=memory, path="ept-misconfig", extra={"devices": [DEVICE], "kvm": {"ioeventfds": fds}}
    )


@pytest.mark.parametrize(("address", "fd", "length", "takes"), [
    (0x9000, 0x9000, None, True),
    (0x9000, 0x9000, 4,    False),
    (0x9000, 0x9004, None, False),
    (0x9004, 0x9004, None, True),
    (0x8FFD, 0x9000, None, True),     # the end of it exits where the device's page begins
    (0x8FFC, 0x9000, None, False),    # does not reach it
    (0x8FFD, 0x9001, None, False),
    (0x8000, 0x9000, None, False),
])  # fmt: skip
def test_an_access_is_taken_where_it_exits(address, fd, length, takes):
    assert eventfd_takes(case(address, fd, length)) is takes


def test_what_is_taken_is_not_judged_by_what_the_instruction_does():
    with pytest.raises(UnsupportedCaseError, match="ioeventfds: one may take the write"):
        check_judged(case(0x8FFD))
    check_judged(case(0x8FFC))

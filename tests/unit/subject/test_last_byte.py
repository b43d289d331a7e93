"""The last byte of the address space, whose linear address as a physical one is KVM's INVALID_GPA."""

from __future__ import annotations

from emufuzz.case.build import build_case
from emufuzz.case.json import case_from_obj, case_to_obj
from emufuzz.case.model import Memory
from emufuzz.subject.kvm import KvmSubject

LAST = (1 << 64) - 1


def test_an_access_to_it_is_no_exit_even_if_its_page_exists():
    memory = Memory(((0x6000, b""), (LAST - 4095, b"")))
    made = build_case("prot64", b"\x0f\x00\x18", rax=LAST, mem=memory)  # LTR: two bytes, from there on
    device = {"kind": "mmio", "addr": "0x0", "size": 2}
    case = case_from_obj({**case_to_obj(made), "path": "ept-misconfig", "devices": [device]})
    (outcome,) = KvmSubject().run([case])
    assert (outcome.crash, outcome.rc) == ("", "unhandleable")
    assert outcome.reason == "no exit: the last byte of the address space has no physical address in KVM"

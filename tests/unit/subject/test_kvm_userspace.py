"""Userspace answers exits from the case's devices, as often as it is asked."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.machines import accesses, enter, exits, mmio, path_case, reg, run_path

from emufuzz.case.build import build_segments
from emufuzz.kvm.vcpu import KvmRun
from emufuzz.subject.kvm import KvmSubject
from emufuzz.subject.kvm import userspace as userspace_module
from emufuzz.subject.kvm.userspace import exit_to_obj

HOLE = 0xB000
GP = (13, 0, None)


def exit_list(outcome: Any) -> list[dict[str, Any]]:
    return list(outcome.extra["exits"])


# -- MMIO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "size", "value"),
    [("8a00", 1, 0x01), ("668b00", 2, 0x0201), ("8b00", 4, 0x04030201), ("488b00", 8, 0x0807060504030201)],
)
def test_a_read_is_answered(code: str, size: int, value: int) -> None:
    device = mmio(HOLE, reads="0102030405060708")
    outcome = run_path("ept-misconfig", "prot64", code, rax=HOLE, devices=[device])
    mask = (1 << size * 8) - 1
    assert reg(outcome, "rax") & mask == value
    [item] = exit_list(outcome)
    assert (item["phys_addr"], item["len"], item["is_write"]) == (HOLE, size, False)
    assert accesses(outcome) == [("read", HOLE, value.to_bytes(size, "little").hex())]


def test_a_write_reaches_the_device_once() -> None:
    outcome = run_path("ept-misconfig", "prot64", "8908", rax=HOLE, rcx=0x11223344, devices=[mmio(HOLE)])
    assert accesses(outcome) == [("write", HOLE, "44332211")]
    assert (outcome.rip, exit_list(outcome)[0]["data"]) == (0x6002, "44332211")


def test_what_is_modified_is_read_and_then_written() -> None:
    outcome = run_path("ept-misconfig", "prot64", "ff00", rax=HOLE, devices=[mmio(HOLE, reads="ff00")])
    assert accesses(outcome) == [("read", HOLE, "ff000000"), ("write", HOLE, "00010000")]
    assert exits(outcome) == ["MMIO", "MMIO"]


def test_a_large_operand_comes_in_pieces() -> None:
    reads = bytes(range(16)).hex()
    outcome = run_path("ept-misconfig", "prot64", "0f1000", rax=HOLE, devices=[mmio(HOLE, reads=reads)])
    assert accesses(outcome) == [("read", HOLE, reads[:16]), ("read", HOLE + 8, reads[16:])]
    assert outcome.system.fpu.xmm[0] == int.from_bytes(bytes(range(16)), "little")


def test_an_operand_in_memory_and_a_device() -> None:
    outcome = run_path(
        "ept-misconfig",
        "prot64",
        "8b00",
        rax=0xAFFE,
        data={0xAFFE: b"\xaa\xbb"},
        devices=[mmio(HOLE, reads="0102")],
    )
    assert (reg(outcome, "rax"), accesses(outcome)) == (0x0201BBAA, [("read", HOLE, "0102")])


def test_addresses_without_a_device_float() -> None:
    outcome = run_path("ept-misconfig", "prot64", "8b00", rax=HOLE + 0x10, devices=[mmio(HOLE, size=0x10)])
    assert reg(outcome, "rax") == 0xFFFFFFFF


# -- ports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "code", "left"), [("exit", "e460", 0xAB), ("fep", "e460", 0xAB), ("exit", "ec", 0xAB)]
)
def test_in_gets_bytes_of_the_stream(path: str, code: str, left: int) -> None:
    outcome = run_path(path, "prot64", code, rdx=0x60, rax=0x1100, port_in=b"\xab")
    assert (reg(outcome, "rax"), accesses(outcome)) == (0x1100 | left, [("read", 0x60, "ab")])


def test_rep_insb_leaves_for_many_at_a_time() -> None:
    data = bytes(range(200))
    outcome = run_path("io-string", "prot64", "f36c", rcx=200, rdx=0x60, rdi=0x8000, port_in=data)
    assert outcome.pages[8][:200] == data
    # the buffer and the count end together: hardware finds RCX = 0 and goes on
    assert (reg(outcome, "rcx"), outcome.rip) == (0, 0x6000)
    assert [item["reason"] for item in exit_list(outcome)] == ["IO"]
    assert len(accesses(outcome)) == 200


def test_out_reaches_the_device() -> None:
    device = {"kind": "pio", "port": 0x60, "size": 1}
    outcome = run_path("exit", "prot64", "e660", rax=0x42, devices=[device])
    assert accesses(outcome) == [("write", 0x60, "42")]
    assert outcome.rip == 0x6002


# -- MSRs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["msr-completion", "exit"])
@pytest.mark.parametrize(("known", "exception"), [(True, None), (False, GP)])
@pytest.mark.parametrize("code", ["0f32", "0f30"])
def test_userspace_knows_the_msrs_of_the_case(path: str, known: bool, exception: Any, code: str) -> None:
    msr = ((0x12345, 0x1122334455667788),) if known else ()
    outcome = run_path(
        path, "prot64", code, rcx=0x12345, rax=1, rdx=2, msr=msr, knobs={"user_space_msr_mask": 7}
    )
    writing = code == "0f30"
    assert exits(outcome) == ["X86_WRMSR" if writing else "X86_RDMSR"]
    assert outcome.exception == exception
    loaded = (0x55667788, 0x11223344) if known and not writing else (1, 2)
    assert (reg(outcome, "rax"), reg(outcome, "rdx")) == loaded


# -- hypercalls and ends ---------------------------------------------------------------------------


def test_a_hypercall_for_userspace_is_answered_with_success() -> None:
    knobs = {"hypercall_exits": True}
    outcome = run_path("exit", "prot64", "0f01c1", rax=12, rbx=0x8000, rcx=1, rdx=0, knobs=knobs)
    assert (exits(outcome), reg(outcome, "rax"), outcome.rip) == (["HYPERCALL"], 0, 0x6003)
    assert exit_list(outcome)[0]["args"] == [0x8000, 1, 0]


@pytest.mark.parametrize(
    ("code", "kvm", "reason"),
    [
        ("f4", {}, "HLT"),
        ("90", {"exit_reason": 2}, "SHUTDOWN"),
        ("90", {"exit_reason": 11}, "INTERNAL_ERROR"),
    ],
)
def test_other_exits_are_the_end(code: str, kvm: dict[str, Any], reason: str) -> None:
    assert exits(run_path("exit", "prot64", code, kvm=kvm)) == [reason]


def test_a_guest_that_leaves_for_ever_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userspace_module, "_MAX_EXITS", 1)
    case = path_case("ept-misconfig", "prot64", "ff00", rax=HOLE, devices=[mmio(HOLE)])
    [outcome] = KvmSubject().run([case])
    assert "the guest left 1 times for one instruction" in outcome.crash


def many_outs(count: int) -> Any:
    """REP OUTSB without end in a state that hardware does not enter, so that KVM emulates on and on."""
    big = msgspec.structs.replace(build_segments("real", 0)["es"], limit=0xFFFFFFFF, g=1)
    return run_path("invalid-guest-state", "real", "f36e", es=big, rsi=0x8000, rcx=0xFFFF, count=count)


def test_every_instruction_of_a_count_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userspace_module, "_MAX_EXITS", 4)
    assert exits(many_outs(6)) == ["IO"] * 6 + ["INTR"]


def test_userspace_ends_a_count_that_leaves_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userspace_module, "PATIENCE", 5)
    assert exits(many_outs(65535)) == ["IO"] * 5 + ["INTR"]


def test_the_answer_of_a_port_goes_through_the_shared_page() -> None:
    vm = enter("exit", "prot64", "ec", rdx=0x60)
    assert vm.left
    vm.run(pio=b"\x77")
    assert (vm.reg("rax"), vm.rip) == (0x77, 0x6001)


# -- the form of an exit ---------------------------------------------------------------------------


def test_an_exit_in_the_form_of_an_outcome() -> None:
    run = KvmRun()
    run.leave("X", data=b"\1\xff", small=5, large=1 << 40, flag=True, several=[1, b"\2", 1 << 33], text="t")
    assert exit_to_obj(run) == {
        "reason": "X", "data": "01ff", "small": 5, "large": hex(1 << 40), "flag": True,
        "several": [1, "02", hex(1 << 33)], "text": "t",
    }  # fmt: skip

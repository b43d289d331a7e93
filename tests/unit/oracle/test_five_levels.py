"""Accesses over the end of the canonical addresses: what KVM does there is what wider addresses would do."""

from __future__ import annotations

import msgspec
import pytest
from support.machine_cases import RW, US, A, D, P, entry_places, physical

from emufuzz.arch.cr import X86_CR4_LA57
from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_REGS_RSI
from emufuzz.case.build import build_case
from emufuzz.oracle.compare import FINDING, SKIPPED, judge
from emufuzz.oracle.five_levels import END, wider_addresses
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.kvm import KvmSubject

QUIRK = "kvm-quirk-01-beyond-canonical"
DEVICE = {"kind": "mmio", "addr": hex(END - 0x100), "size": 0x200, "behaviour": "ram", "reads": "11" * 64}


@pytest.fixture(scope="module")
def oracle():
    oracle = UnicornOracle()
    yield oracle
    oracle.close()


def on_device(code, rsi=END - 4, **options):
    """A device on both sides of the end, in flat memory."""
    case = build_case("prot64", bytes.fromhex(code), rsi=rsi, rdi=0x8000, **options)
    return msgspec.structs.replace(case, path="io-completion", extra={"devices": [DEVICE]})


def in_tables(code, rsi=END - 4, **options):
    """Page tables lead to a device in front of the end and to memory behind it."""
    case = physical("4-level", code, rsi=rsi, rdi=0x8000, **options)
    root = case.system.cr3
    chain = {root + 255 * 8: 0x181000, 0x181000 + 511 * 8: 0x182000, 0x182000 + 511 * 8: 0x183000,
             0x183000 + 511 * 8: 0xD0000000,
             root + 256 * 8: 0x184000, 0x184000: 0x185000, 0x185000: 0x186000, 0x186000: 0x9000}  # fmt: skip
    entries = {at: (to | P | RW | US | A | D).to_bytes(8, "little") for at, to in chain.items()}
    phys = [{"addr": hex(at), "data": data.hex()} for at, data in entries.items()]
    extra = {**case.extra, "phys": [*case.extra["phys"], *phys]}
    extra["devices"] = [{"kind": "mmio", "addr": "0xd0000000", "size": 4096, "behaviour": "float"}]
    return msgspec.structs.replace(case, path="ept-misconfig", extra=extra)


CASES = {
    "a read": on_device("4833 06".replace(" ", "")),
    "a read and a write": on_device("48f716"),
    "movs that goes on": on_device("f348a5", rcx=4),
    "lods up to a first byte behind": on_device("f3ad", rsi=END - 6, rcx=4),
    "through tables": in_tables("488b06"),
    "a write through tables": in_tables("488906", rax=0x1122334455667788),
    "lods through tables": in_tables("f3ad", rsi=END - 6, rcx=4),
}


def flip_register(outcome):
    return {"gpr": (*outcome.gpr[:3], outcome.gpr[3] ^ 1, *outcome.gpr[4:])}


def flip_flag(outcome):
    return {"rflags": outcome.rflags ^ 0x200000}


def move_on(outcome):
    return {"rip": outcome.rip + 1}


def other_fault(_outcome):
    return {"rc": "propagate_fault", "exception": (0, None, None)}


def write_elsewhere(outcome):
    return {"pages": {**outcome.pages, 8: b"\x55" * 4096}}


def ask_elsewhere(outcome):
    trace = outcome.extra["device_trace"]
    moved = [*trace[:-1], {**trace[-1], "addr": hex(int(trace[-1]["addr"], 16) ^ 1)}]
    return {"extra": {**outcome.extra, "device_trace": moved}}


DAMAGES = (flip_register, flip_flag, move_on, other_fault, write_elsewhere, ask_elsewhere)


@pytest.mark.parametrize("name", CASES)
def test_what_kvm_does_behind_the_end_is_known(oracle, name):
    case = CASES[name]
    (ours,), (theirs,) = KvmSubject().run([case]), oracle.run([case])
    assert theirs.exception == (13, 0, None)
    assert ours.exception is None or ours.gpr != theirs.gpr
    assert judge(case, ours, theirs, oracle)[:2] == (SKIPPED, QUIRK)
    for damage in DAMAGES:
        damaged = msgspec.structs.replace(ours, **damage(ours))
        assert judge(case, damaged, theirs, oracle).kind == FINDING, damage.__name__


def test_an_operand_in_front_of_the_end_is_judged_as_ever(oracle):
    case = on_device("488b06", rsi=END - 8)
    (ours,) = KvmSubject().run([case])
    assert not list(wider_addresses(case, ours))
    wide = msgspec.structs.replace(case.system, cr4=case.system.cr4 | X86_CR4_LA57)
    case = msgspec.structs.replace(on_device("488b06"), system=wide)
    assert not list(wider_addresses(case, ours))


def test_an_iteration_too_few_is_a_finding(oracle):
    """REP LODSD that stops although its next element begins in front of the end."""
    case = on_device("f3ad", rsi=END - 10, rcx=4)
    (ours,), (theirs,) = KvmSubject().run([case]), oracle.run([case])
    assert judge(case, ours, theirs, oracle).reason == QUIRK
    gpr = list(ours.gpr)
    gpr[VCPU_REGS_RCX] += 2
    gpr[VCPU_REGS_RSI] -= 8
    early = msgspec.structs.replace(ours, gpr=tuple(gpr))
    assert judge(case, early, theirs, oracle).kind == FINDING


def test_the_tables_of_the_case_stay_reachable(oracle):
    """The code is found through the new table on top, too."""
    case = CASES["through tables"]
    (ours,) = KvmSubject().run([case])
    ((other, _),) = wider_addresses(case, ours)
    assert len(entry_places(other, 0x9000)[0]) == 5
    assert other.system.cr3 != case.system.cr3

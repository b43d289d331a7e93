"""KVM forgets the single-step trap behind a write that userspace is told of, also if it leaves once more."""

from __future__ import annotations

import msgspec

from emufuzz.arch.cr import X86_CR4_UMIP
from emufuzz.arch.regs import VCPU_SREG_SS
from emufuzz.arch.rflags import X86_EFLAGS_TF
from emufuzz.case.build import build_case
from emufuzz.case.json import case_from_obj, case_to_obj
from emufuzz.oracle.compare import FINDING, Difference, judge
from emufuzz.oracle.device_trace import DEVICE_TRACE
from emufuzz.oracle.exit_rules import lost_single_step
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.kvm import KvmSubject

TRAP = (Difference("exception", "fault-missing", "none", "vector 1"),)


def out_with_trap():
    """OUT in a guest that hardware cannot enter, as the RPL of SS is another one than that of CS."""
    case = build_case("prot32", b"\xef", flags=X86_EFLAGS_TF)
    seg = list(case.system.seg)
    seg[VCPU_SREG_SS] = msgspec.structs.replace(seg[VCPU_SREG_SS], sel=seg[VCPU_SREG_SS].sel | 1)
    system = msgspec.structs.replace(case.system, seg=tuple(seg))
    return msgspec.structs.replace(case, path="invalid-guest-state", system=system)


def test_an_exit_for_events_behind_the_write_does_not_hide_it():
    case = out_with_trap()
    (ours,) = KvmSubject().run([case])
    assert [left["reason"] for left in ours.extra["exits"]] == ["IO", "INTR"]
    theirs = msgspec.structs.replace(ours, exception=(1, None, None), rc="propagate_fault")
    assert lost_single_step(case, ours, theirs, TRAP)


def test_without_a_write_the_trap_must_not_be_lost():
    case = out_with_trap()
    (ours,) = KvmSubject().run([case])
    theirs = msgspec.structs.replace(ours, exception=(1, None, None), rc="propagate_fault")
    only_events = msgspec.structs.replace(ours, extra={**ours.extra, "exits": [{"reason": "INTR"}]})
    assert not lost_single_step(case, only_events, theirs, TRAP)
    assert not lost_single_step(msgspec.structs.replace(case, rflags=2), ours, theirs, TRAP)


def stepped_str():
    """STR to a device, which KVM reads first, in a stepped guest on path `desc`."""
    made = build_case("compat16", b"\x0f\x00\x0e\x00\xe0", flags=X86_EFLAGS_TF)
    system = msgspec.structs.replace(made.system, cr4=made.system.cr4 | X86_CR4_UMIP)
    obj = case_to_obj(msgspec.structs.replace(made, system=system))
    return case_from_obj({**obj, "path": "desc", "devices": [{"kind": "mmio", "addr": "0xe000", "size": 2}]})


def test_another_quirk_beside_the_lost_trap_keeps_its_own_rule():
    case, oracle = stepped_str(), UnicornOracle()
    (ours,), (theirs,) = KvmSubject().run([case]), oracle.run([case])
    assert [access["direction"] for access in ours.extra[DEVICE_TRACE]] == ["read", "write"]
    assert judge(case, ours, theirs, oracle).reason == "kvm-lost-single-step"
    longer = msgspec.structs.replace(
        ours, extra={**ours.extra, DEVICE_TRACE: [*ours.extra[DEVICE_TRACE], ours.extra[DEVICE_TRACE][0]]}
    )
    assert judge(case, longer, theirs, oracle).kind == FINDING


def backdoor():
    """OUT to VMware's port, for which no permission is needed, of a stepped guest at CPL 3."""
    case = build_case("prot32", b"\xee", cpl=3, flags=X86_EFLAGS_TF, rdx=0x5658)
    return msgspec.structs.replace(case, path="vmware-gp", extra={"kvm": {}})


def test_the_permission_for_the_backdoor_does_not_show_beside_it():
    """Hardware is asked as if IOPL allowed the port."""
    case, oracle = backdoor(), UnicornOracle()
    (ours,), (theirs,) = KvmSubject().run([case]), oracle.run([case])
    assert [left["reason"] for left in ours.extra["exits"]] == ["IO"]
    assert judge(case, ours, theirs, oracle).reason == "kvm-lost-single-step"
    for change in ({"rflags": ours.rflags ^ 1}, {"gpr": (1, *ours.gpr[1:])}, {"rip": ours.rip + 1}):
        assert judge(case, msgspec.structs.replace(ours, **change), theirs, oracle).kind == FINDING


def locked_neg():
    """LOCK NEG of a device, whose flags Unicorn takes from a later read."""
    case = build_case("prot32", b"\xf0\xf7\x1e", flags=X86_EFLAGS_TF, rsi=0xB000)
    device = {"kind": "mmio", "addr": "0xb000", "size": 4, "behaviour": "stream", "reads": "27000000"}
    return msgspec.structs.replace(case, path="ept-misconfig", extra={"devices": [device]})


def test_gaps_beside_the_lost_trap_count_as_they_would_without_it():
    case, oracle = locked_neg(), UnicornOracle()
    (ours,), (theirs,) = KvmSubject().run([case]), oracle.run([case])
    assert (ours.exception, theirs.exception) == (None, (1, None, None))
    assert ours.rflags != theirs.rflags
    assert judge(case, ours, theirs, oracle).reason == "kvm-lost-single-step+unicorn-lock-neg-flags"
    other = msgspec.structs.replace(ours, gpr=(1, *ours.gpr[1:]))
    assert judge(case, other, theirs, oracle).kind == FINDING

"""What hardware would execute of a case that enters through an exit path."""

from __future__ import annotations

import msgspec
import pytest
from support.machine_cases import A, entry_places

from emufuzz.arch.rflags import X86_EFLAGS_IOPL
from emufuzz.case.build import build_case
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import case_pages
from emufuzz.case.paths import PATHS
from emufuzz.oracle.native_view import (
    FORCED_PREFIX,
    UNJUDGED_PATHS,
    check_judged,
    forced_prefix,
    is_backdoor,
    judge_case,
    kvm_of,
    native_outcome,
    without_harness,
)
from emufuzz.subject.flat import FlatSubject

DEVICE = {"kind": "mmio", "addr": "0xb000", "size": 16}


def on_path(path, code=b"\x90", mode="prot64", physical=False, rip=0x6000, **kvm):
    case = build_case(mode, code, rip=rip, physical=physical)
    extra = {**(case.extra or {}), "devices": [DEVICE], "kvm": kvm}
    return msgspec.structs.replace(case, path=path, extra=extra)


def test_a_plain_case_is_its_own_view():
    case = build_case("prot64", b"\x90")
    assert judge_case(case) is case
    assert without_harness(case) is case


#: Paths that are about certain instructions: ports, and the page of the local APIC.
CERTAIN = {"vmware-gp", "apic-access"}


@pytest.mark.parametrize("path", [path for path in PATHS if path not in CERTAIN | UNJUDGED_PATHS.keys()])
def test_paths_lose_their_harness_and_keep_what_an_instruction_sees(path):
    case = on_path(path, knobs={"ept": 1})
    check_judged(case)
    view = judge_case(case)
    assert (view.path, view.extra, view.code, view.rip) == (None, {"devices": [DEVICE]}, b"\x90", 0x6000)
    assert (view.system, view.mem, view.gpr, view.id) == (case.system, case.mem, case.gpr, case.id)


def test_nothing_visible_leaves_no_extra():
    case = msgspec.structs.replace(build_case("real", b"\x90"), path="ud", extra={"kvm": {}})
    assert judge_case(case).extra is None


@pytest.mark.parametrize(("mode", "physical"), [("prot64", False), ("prot32", True), ("real", True)])
def test_the_forced_prefix_is_stepped_over_but_stays_in_memory(mode, physical):
    case = on_path("fep", FORCED_PREFIX + b"\x01\xd8", mode, physical)
    assert forced_prefix(case) == FORCED_PREFIX
    view = judge_case(case)
    assert (view.code, view.rip) == (b"\x01\xd8", 0x6005)
    assert case_pages(view) == case_pages(case)
    assert without_harness(case).code == b"\x01\xd8"


def test_a_prefix_over_two_pages_stays_in_both():
    case = on_path("fep", FORCED_PREFIX + b"\x90", physical=True, rip=0x6FFD)
    view = judge_case(case)
    assert view.rip == 0x7002
    assert case_pages(view) == case_pages(case)


def test_without_the_prefix_the_path_changes_nothing():
    case = on_path("fep", b"\x0f\x0b")
    assert (judge_case(case).code, judge_case(case).rip) == (b"\x0f\x0b", 0x6000)
    assert not forced_prefix(on_path("ud", FORCED_PREFIX))


def test_rip_wraps_at_the_width_of_the_mode():
    case = on_path("fep", FORCED_PREFIX, "prot32", rip=0xFFFFFFFD)
    assert without_harness(case).rip == 2


@pytest.mark.parametrize("path", UNJUDGED_PATHS)
def test_paths_that_no_instruction_explains_are_refused(path):
    with pytest.raises(UnsupportedCaseError, match=f"^path: {path} "):
        check_judged(on_path(path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pending", {"vector": 13}),
        ("cpuid", {"features": {"movbe": False}}),
        ("vectoring_info", 0x80000B0E),
    ],
)
def test_machines_that_do_more_than_the_instruction_are_refused(field, value):
    with pytest.raises(UnsupportedCaseError, match=rf"^kvm\.{field}: "):
        check_judged(on_path("ept-violation", **{field: value}))


def test_a_machine_at_rest_is_not_refused():
    """Events and debugging userspace change nothing as long as KVM runs the instruction (departures.py)."""
    case = on_path(
        "ept-violation",
        guest_mode={"exit_on_nmi": True},
        interrupt={"vector": 32},
        nmi=1,
        smm=True,
        guest_debug=1,
        vectoring_info=0xB0E,
        interruptibility=1,
    )
    check_judged(case)
    assert kvm_of(case)["vectoring_info"] == 0xB0E
    assert kvm_of(build_case("real", b"")) == {}


@pytest.mark.parametrize(("code", "address"), [("8803", 0xB000), ("a5", None)])
def test_an_eventfd_that_takes_the_write_or_may_is_refused(code, address):
    """MOV [rBX] to where an eventfd without length is; MOVS, of which it is open what exits first."""
    fd = {"addr": address or 0xB004}
    case = on_path("ept-violation", bytes.fromhex(code), ioeventfds=[fd])
    case = msgspec.structs.replace(case, gpr=(*case.gpr[:3], 0xB000, *case.gpr[4:]))
    with pytest.raises(UnsupportedCaseError, match=r"^kvm\.ioeventfds: "):
        check_judged(case)


def test_other_eventfds_only_take_data_away():
    case = on_path("ept-violation", b"\x90", ioeventfds=[{"addr": 0xB000}, {"addr": 0, "len": 4}])
    check_judged(case)


BACKDOOR = {"rdx": 0x5658}


@pytest.mark.parametrize(
    ("code", "gpr", "opened"),
    [("ed", BACKDOOR, True), ("6c", {"rdx": 0x5659}, True), ("66ef", BACKDOOR, True),
     ("e458", BACKDOOR, False), ("ed", {"rdx": 0x60}, False)],
)  # fmt: skip
def test_ports_of_the_backdoor_need_no_permission(code, gpr, opened):
    """Only DX can name them; the permission is IOPL, which a subject's outcome does not show."""
    case = msgspec.structs.replace(build_case("prot32", bytes.fromhex(code), cpl=3, **gpr), path="vmware-gp")
    check_judged(case)
    assert bool(judge_case(case).rflags & X86_EFLAGS_IOPL) == opened == is_backdoor(case)
    (ours,) = FlatSubject(events=False).run([msgspec.structs.replace(case, path=None)])
    assert (native_outcome(case, ours) is ours) == (not opened)
    assert native_outcome(case, ours).rflags & X86_EFLAGS_IOPL == judge_case(case).rflags & X86_EFLAGS_IOPL


@pytest.mark.parametrize(("mode", "code"), [("prot32", "90"), ("prot32", "0f33"), ("vm86", "ed")])
def test_no_oracle_runs_other_cases_of_the_backdoor(mode, code):
    case = build_case(mode, bytes.fromhex(code), cpl=3, **BACKDOOR)
    with pytest.raises(UnsupportedCaseError, match=r"^path: vmware-gp "):
        check_judged(msgspec.structs.replace(case, path="vmware-gp"))


LAPIC = {"0x80": "0x20", "0xf0": "0x1ff"}


@pytest.mark.parametrize(
    ("code", "rsi", "defined"),
    [("8b06", 0xFEE00080, True), ("8906", 0xFEE000B0, True), ("668b06", 0xFEE00080, False),
     ("8b06", 0xFEE00084, False), ("8a06", 0xFEE00080, False), ("8b06", 0x8000, True)],
)  # fmt: skip
def test_the_local_apic_is_a_device_of_32_bit_registers(code, rsi, defined):
    case = build_case("prot32", bytes.fromhex(code), rsi=rsi)
    case = msgspec.structs.replace(case, path="apic-access", extra={"kvm": {"lapic": LAPIC}})
    if not defined:
        with pytest.raises(UnsupportedCaseError, match=r"^path: apic-access is not one of 32 bits"):
            check_judged(case)
        return
    check_judged(case)
    (device,) = judge_case(case).extra["devices"]
    assert device["addr"] == "0xfee00000"
    assert bytes.fromhex(device["reads"])[0x80:0x84] == b"\x20\0\0\0"


def test_callbacks_are_refused():
    case = msgspec.structs.replace(build_case("real", b""), extra={"callbacks": []})
    with pytest.raises(UnsupportedCaseError, match=r"^callbacks: "):
        check_judged(case)


def untouched(case, *pages):
    """The case with other accessed bits: none in the entries of linear pages."""
    places = [entry_places(case, page)[0][-1] for page in pages]
    phys = [{"addr": hex(place), "data": bytes((case_pages(case)[place >> 12][place & 0xFFF] & ~A,)).hex()}
            for place in places]  # fmt: skip
    return msgspec.structs.replace(case, extra={**case.extra, "phys": [*case.extra["phys"], *phys]}), places


def test_the_forced_prefix_is_fetched_from_its_page():
    """Its page is marked as accessed, though no instruction of hardware's is there; one behind it is not."""
    case = build_case("prot64", FORCED_PREFIX + b"\x90", rip=0x6FFB, physical=True)
    case, (front, behind) = untouched(msgspec.structs.replace(case, path="fep"), 0x6000, 0x8000)
    before, after = case_pages(case), case_pages(judge_case(case))
    assert not before[front >> 12][front & 0xFFF] & A
    assert after[front >> 12][front & 0xFFF] == before[front >> 12][front & 0xFFF] | A
    assert after[behind >> 12][behind & 0xFFF] == before[behind >> 12][behind & 0xFFF]
    plain = msgspec.structs.replace(case, path="shadow-pf")
    view = case_pages(judge_case(plain))
    assert view[front >> 12][front & 0xFFF] == before[front >> 12][front & 0xFFF]


def test_with_slots_tables_may_be_where_nothing_is_written():
    case = build_case("prot64", FORCED_PREFIX + b"\x90", rip=0x6FFB, physical=True)
    case, (front, _) = untouched(msgspec.structs.replace(case, path="fep"), 0x6000, 0x8000)
    slots = [{"base": 0, "size": 0x200000, "flags": 2}]
    case = msgspec.structs.replace(case, extra={**case.extra, "kvm": {"memslots": slots}})
    assert not case_pages(judge_case(case))[front >> 12][front & 0xFFF] & A


@pytest.mark.parametrize("osxsave", [0, 1 << 18])
def test_xsetbv_without_osxsave_makes_no_exit(osxsave):
    case = build_case("prot64", b"\x0f\x01\xd1", cpl=0, rax=1)
    system = msgspec.structs.replace(case.system, cr4=case.system.cr4 & ~(1 << 18) | osxsave)
    case = msgspec.structs.replace(case, path="exit", system=system, extra={"kvm": {"exit_reason": 55}})
    if osxsave:
        check_judged(case)
        return
    with pytest.raises(UnsupportedCaseError, match=r"^kvm.exit_reason: the exit is not"):
        check_judged(case)


@pytest.mark.parametrize(("smm", "code", "judged"), [
    (True, "0faa", False), (True, "670faa", False), (False, "0faa", True), (True, "90", True),
])  # fmt: skip
def test_rsm_leaves_for_a_state_that_nobody_knows(smm, code, judged):
    case = msgspec.structs.replace(
        build_case("prot32", bytes.fromhex(code)), path="ud", extra={"kvm": {"smm": smm}}
    )
    if judged:
        check_judged(case)
        return
    with pytest.raises(UnsupportedCaseError, match=r"^kvm.smm: RSM"):
        check_judged(case)

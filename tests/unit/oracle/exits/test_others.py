"""MSRs that userspace answers for, writes that an eventfd takes, the backdoor, breakpoints, reserved bits."""

from __future__ import annotations

import msgspec
import pytest
from support.machine_cases import entry_places

from emufuzz.case.build import build_case, build_system
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import case_memory
from emufuzz.case.translate import walk
from emufuzz.fuzz.engines import SUBJECTS
from emufuzz.oracle.compare import AGREE, FINDING, SKIPPED, judge
from emufuzz.oracle.exits import ExitsOracle
from emufuzz.oracle.exits.before import breaks
from emufuzz.oracle.exits.run import NoExitError, UndefinedError
from emufuzz.oracle.native_view import FORCED_PREFIX
from emufuzz.oracle.unicorn import UnicornOracle

GP0 = (13, 0, None)
DB = (1, None, None)
MSR, OTHER = 0xC0000101, 0xC0000102
RF, TF = 0x10000, 0x100


@pytest.fixture(scope="module")
def exits():
    return ExitsOracle()


@pytest.fixture(scope="module")
def subject():
    return SUBJECTS["kvm"]()


MACHINE = ("knobs", "ioeventfds", "pending", "lapic", "cpuid")


def on_path(path, code, mode="prot64", *, cpl=0, extra=None, system=None, changes=None, **options):
    kvm = {name: options.pop(name) for name in MACHINE if name in options}
    built = build_system(mode, cpl if mode != "real" else None)
    built = msgspec.structs.replace(built, **(system or {}))
    case = build_case(mode, code, system=built, **options)
    extra = {**(case.extra or {}), **(extra or {})} | ({"kvm": kvm} if kvm else {})
    return msgspec.structs.replace(case, path=path, extra=extra or None, **(changes or {}))


def run(exits, case):
    exits.check(case)
    (outcome,) = exits.run([case])
    return outcome


def agreed(exits, subject, case):
    """The oracle's outcome, with which the subject agrees, and no longer if its RIP were another one."""
    outcome = run(exits, case)
    (ours,) = subject.run([case])
    found = judge(case, ours, outcome, exits)
    assert found.kind == AGREE, found.differences
    ours.rip ^= 1
    assert judge(case, ours, outcome, exits).kind == FINDING
    return outcome


# MSRs


def msr_case(code, *, known=True, mask=7, cpl=0, rcx=MSR, **options):
    knobs = {"msr_denied": f"{MSR:#x}", "user_space_msr_mask": mask}
    system = {"msr": ((MSR, 0x12345678_9ABCDEF0),) if known else ()}
    return on_path(
        "msr-completion", FORCED_PREFIX + code, cpl=cpl, knobs=knobs, system=system, rcx=rcx, **options
    )


def test_userspace_answers_rdmsr(exits, subject):
    case = msr_case(b"\x0f\x32", rax=1 << 40)
    outcome = agreed(exits, subject, case)
    assert (outcome.gpr[0], outcome.gpr[2]) == (0x9ABCDEF0, 0x12345678)
    assert outcome.rip == case.rip + 7


def test_userspace_takes_wrmsr(exits, subject):
    case = msr_case(b"\x0f\x30")
    assert agreed(exits, subject, case).rip == case.rip + 7


@pytest.mark.parametrize("case", [
    msr_case(b"\x0f\x32", known=False), msr_case(b"\x0f\x32", mask=1), msr_case(b"\x0f\x30", known=False),
    msr_case(b"\x0f\x32", cpl=3),
], ids=["unknown", "not asked", "unknown, written", "cpl 3"])  # fmt: skip
def test_else_there_is_a_general_protection_exception(exits, subject, case):
    outcome = agreed(exits, subject, case)
    assert (outcome.exception, outcome.gpr, outcome.rip) == (GP0, case.gpr, case.rip + 5)


def test_of_other_msrs_userspace_is_not_asked(exits):
    with pytest.raises(UnsupportedCaseError, match="userspace is not asked"):
        exits.check(msr_case(b"\x0f\x32", rcx=OTHER))


# Eventfds without length

DEVICE = {"devices": [{"kind": "mmio", "addr": "0xb000", "size": 64}]}


def test_an_eventfd_takes_the_write_and_the_instruction(exits, subject):
    case = on_path("skip", b"\x89\x03", "prot32", extra=DEVICE, ioeventfds=[{"addr": 0xB000}], rbx=0xB000)
    assert agreed(exits, subject, case).rip == case.rip + 2


@pytest.mark.parametrize("fd", [{"addr": 0xB004}, {"addr": 0xB000, "len": 4}])
def test_else_the_instruction_tells(exits, fd):
    with pytest.raises(UnsupportedCaseError, match=r"^kvm\.ioeventfds: "):
        exits.check(on_path("skip", b"\x89\x03", "prot32", extra=DEVICE, ioeventfds=[fd], rbx=0xB000))


# VMware's backdoor


def test_what_is_no_access_to_a_port_has_its_own_exception(exits, subject):
    case = on_path("vmware-gp", b"\x0f\x06", "prot32", cpl=3)  # CLTS
    assert agreed(exits, subject, case).exception == GP0


def test_ports_and_counters_of_the_backdoor_are_for_others(exits):
    for code, rcx in ((b"\xed", 0), (b"\x0f\x33", 0x10000)):
        with pytest.raises(UnsupportedCaseError, match=r"^code: "):
            exits.check(on_path("vmware-gp", code, "prot32", cpl=3, rcx=rcx))


def test_an_event_comes_first(exits):
    for path in ("vmware-gp", "skip", "msr-completion"):
        with pytest.raises(UnsupportedCaseError, match=r"^kvm\.pending: "):
            exits.check(on_path(path, b"\x0f\x06", "prot32", pending={"vector": 13, "error_code": 0}))


# Breakpoints


def armed(path, code, address, flags=0, dr7=0x402):
    dr = (address, 0, 0, 0, 0, 0, 0xFFFF0FF0, dr7)
    return on_path(path, code, "prot32", system={"dr": dr}, rip=0x6000, flags=flags)


def test_a_breakpoint_behind_the_forced_prefix_comes_before_the_instruction(exits, subject):
    case = armed("fep", FORCED_PREFIX + b"\x90", 0x6005)
    outcome = agreed(exits, subject, case)
    assert (outcome.exception, outcome.rip) == (DB, 0x6005)


def test_hardware_meets_a_breakpoint_before_it_exits(exits):
    with pytest.raises(NoExitError, match=r"^dr: "):
        exits.check(armed("ept-violation", b"\x90", 0x6000))


@pytest.mark.parametrize(
    "case", [armed("fep", FORCED_PREFIX + b"\x90", 0x6005, RF), armed("fep", FORCED_PREFIX + b"\x90", 0x6006),
             armed("fep", FORCED_PREFIX + b"\x90", 0x6005, 0, 0x400),
             armed("fep", FORCED_PREFIX + b"\x90", 0x6005, 0, 0x10402)]
)  # fmt: skip
def test_rf_lets_it_pass_and_others_are_elsewhere_off_or_on_data(exits, case):
    with pytest.raises(UnsupportedCaseError, match=r"^path: the instruction"):
        exits.check(case)


@pytest.fixture(scope="module")
def unicorn():
    oracle = UnicornOracle()
    yield oracle
    oracle.close()


def test_kvm_meets_a_breakpoint_again_where_the_exit_loses_rf(unicorn, subject):
    """SGDT with CR4.UMIP exits; with RF set the processor has passed the breakpoint."""
    system = build_system("prot32", 0)
    case = armed("desc", b"\x0f\x01\x06", 0x6000, RF)
    changed = msgspec.structs.replace(case.system, cr4=system.cr4 | 0x800)
    case = msgspec.structs.replace(case, system=changed, gpr=(*case.gpr[:6], 0x8000, *case.gpr[7:]))
    (ours,), (theirs,) = subject.run([case]), unicorn.run([case])
    assert ours.exception == DB
    assert theirs.exception is None
    found = judge(case, ours, theirs, unicorn)
    assert (found.kind, found.reason) == (SKIPPED, "kvm-breakpoint-again")
    ours.gpr = (1, *ours.gpr[1:])
    assert judge(case, ours, theirs, unicorn).kind == FINDING


@pytest.mark.parametrize("code", ["f00f33", "f0f4"])
def test_what_is_undefined_makes_no_exit_of_the_backdoor(exits, code):
    with pytest.raises(NoExitError, match=r"^code: an undefined instruction is #UD"):
        exits.check(on_path("vmware-gp", bytes.fromhex(code), rcx=7))
    assert run(exits, on_path("vmware-gp", bytes.fromhex("0f33"), rcx=7)).exception == GP0


def test_an_instruction_that_the_end_of_memory_cuts_makes_no_exit_of_the_backdoor(exits):
    with pytest.raises(NoExitError, match=r"^code: without a whole instruction"):
        exits.check(on_path("vmware-gp", bytes.fromhex("f06766"), "prot32", rip=0x6FFD))


# Address bits beyond the guest's MAXPHYADDR


def far_case(code, *, cpl=0, bit=40, **options):
    """The page table entry of 8000H has an address bit of 2 ** `bit`; MAXPHYADDR is 36."""
    case = on_path(
        "ept-violation-maxphyaddr",
        code,
        cpl=cpl,
        rsi=0x8000,
        physical=True,
        cpuid={"maxphyaddr": 36},
        **options,
    )
    pages = dict(case_memory(case).pages)
    system = case.system
    old = walk(pages, system.cr0, system.cr3, system.cr4, system.efer, 0x8000)[0][-1].to_bytes(8, "little")
    new = (int.from_bytes(old, "little") | 1 << bit).to_bytes(8, "little")
    phys = [
        {**entry, "data": entry["data"].replace(old.hex(), new.hex())} if "data" in entry else entry
        for entry in case.extra["phys"]
    ]
    return msgspec.structs.replace(case, extra={**case.extra, "phys": phys})


@pytest.mark.parametrize(
    ("code", "cpl", "error"), [("8b06", 0, 9), ("8906", 0, 11), ("8b06", 3, 13), ("0106", 3, 15)]
)
def test_a_reserved_bit_is_a_page_fault(exits, subject, code, cpl, error):
    case = far_case(bytes.fromhex(code), cpl=cpl)
    assert agreed(exits, subject, case).exception == (14, error, 0x8000)


def test_the_fetch_before_it_marks_the_codes_page(exits, subject):
    """The entry of the code's page, 6000H, has not been used yet."""
    case = far_case(b"\x8b\x06")
    place = entry_places(case, 0x6000)[0][-1]
    entry = case_memory(case).pages[place >> 12][place & 0xFFF]
    clear = {"addr": hex(place), "data": bytes((entry & ~0x20,)).hex()}
    case = msgspec.structs.replace(case, extra={**case.extra, "phys": [*case.extra["phys"], clear]})
    outcome = agreed(exits, subject, case)
    assert outcome.pages[place >> 12][place & 0xFFF] == entry | 0x20
    (ours,) = subject.run([case])
    page = bytearray(ours.pages[place >> 12])
    page[place & 0xFFF] ^= 0x40
    ours.pages = {place >> 12: bytes(page)}
    assert judge(case, ours, outcome, exits).kind == FINDING


@pytest.mark.parametrize(
    "case", [far_case(b"\x8b\x06", bit=20), far_case(b"\x90"), far_case(b"\xf0\x8b\x06")],
    ids=["not reserved", "none", "undefined before"],
)  # fmt: skip
def test_other_operands_are_for_others(exits, case):
    with pytest.raises(UnsupportedCaseError, match=r"^(code|phys): "):
        exits.check(case)


# The local APIC


def apic_case(code, **options):
    registers = {0x80: 0x20, 0xF0: 0x1FF}
    return on_path("apic-access", bytes.fromhex(code), "prot32", lapic=registers, **options)


def test_odd_accesses_to_the_apic_are_undefined(exits):
    with pytest.raises(UndefinedError, match=r"^path: apic-access with other than 32 bits"):
        exits.check(apic_case("8a06", rsi=0xFEE00080))
    with pytest.raises(UnsupportedCaseError, match=r"^path: the instruction at RIP"):
        exits.check(apic_case("8b06", rsi=0xFEE00080))


def test_unicorn_runs_accesses_to_the_apic(unicorn, subject):
    """The task priority is read and written, and is CR8; of the version nobody knows."""
    case = apic_case("8b06", rsi=0xFEE00080, changes=None, system={"cr8": 2})
    (ours,), (theirs,) = subject.run([case]), unicorn.run([case])
    assert theirs.gpr[0] == 0x20
    assert not unicorn.unchecked(case, theirs)
    assert judge(case, ours, theirs, unicorn).kind == AGREE
    case = apic_case("8906", rsi=0xFEE00080, rax=0x50, system={"cr8": 2})
    (ours,), (theirs,) = subject.run([case]), unicorn.run([case])
    assert theirs.system.cr8 == 5
    assert judge(case, ours, theirs, unicorn).kind == AGREE
    ours.system = case.system
    assert judge(case, ours, theirs, unicorn).kind == FINDING
    case = apic_case("8b06", rsi=0xFEE00030, system={"cr8": 2})
    (theirs,) = unicorn.run([case])
    assert ("gpr", "unicorn-local-apic") in unicorn.unchecked(case, theirs)
    assert "rip" not in {field for field, _ in unicorn.unchecked(case, theirs)}


def test_of_a_branch_through_an_unknown_register_nothing_is_known(unicorn):
    case = apic_case("ff16", rsi=0xFEE00030)
    (theirs,) = unicorn.run([case])
    assert ("all", "unicorn-local-apic") in unicorn.unchecked(case, theirs)
    case = apic_case("f3a7", rsi=0xFEE00030, rdi=0x8000, rcx=1)
    (theirs,) = unicorn.run([case])
    assert ("all", "unicorn-local-apic") in unicorn.unchecked(case, theirs)
    case = apic_case("ff16", rsi=0xFEE00080)
    (theirs,) = unicorn.run([case])
    assert (theirs.rip, unicorn.unchecked(case, theirs)) == (0x20, ())


# Hypercalls

# fmt: off
#: Mode, CPL, RAX, and the RAX afterwards.
HYPERCALLS = {
    "nothing to do": ("prot64", 0, 1,             0),
    "unknown":       ("prot64", 0, 2,             2**64 - 1000),
    "unknown, wide": ("prot64", 0, 0x1_0000_0001, 2**64 - 1000),
    "32 bits":       ("prot32", 0, 2,             2**32 - 1000),
    "cpl 3":         ("prot32", 3, 1,             2**32 - 1),
    "real mode":     ("real",   0, 2,             2**32 - 1000),
}
# fmt: on


@pytest.mark.parametrize("name", HYPERCALLS)
def test_the_monitor_answers_vmcall(exits, subject, name):
    mode, cpl, before, after = HYPERCALLS[name]
    case = on_path("exit", b"\x0f\x01\xc1", mode, cpl=cpl, rax=before)
    outcome = agreed(exits, subject, case)
    assert outcome.gpr[0] == after
    assert outcome.rip == case.rip + 3


@pytest.mark.parametrize(
    "case",
    [on_path("exit", b"\x0f\x01\xc1", rax=12), on_path("exit", b"\x0f\x01\xc1", knobs={"hyperv": True}),
     on_path("ud", b"\x0f\x01\xc1")],
    ids=["a feature's", "hyper-v", "patched"],
)  # fmt: skip
def test_other_hypercalls_are_not_worked_out(exits, case):
    with pytest.raises(UnsupportedCaseError, match=r"^(code|kvm\.knobs\.hyperv|path): "):
        exits.check(case)


# The oracle


def test_it_takes_nothing_else(exits):
    for case in (build_case("prot32", b"\x90"), on_path("ept-violation", b"\x90", "prot32")):
        with pytest.raises(UnsupportedCaseError, match=r"^path: the instruction at RIP"):
            exits.check(case)
    two = msgspec.structs.replace(on_path("task-switch", b"\x90", "prot32"), count=2)
    with pytest.raises(UnsupportedCaseError, match=r"^count: "):
        exits.check(two)


def test_a_stepped_guest_has_its_trap_behind_what_userspace_did(exits):
    assert run(exits, msr_case(b"\x0f\x32", flags=TF)).exception == DB


def test_it_says_who_it_is(exits):
    assert exits.fingerprint() == {"oracle": "exits", "models": "7"}
    assert exits.capabilities.paths
    assert exits.ledger == ()
    exits.close()


@pytest.mark.parametrize(("shadow", "comes"), [(0, True), (1, True), (2, False), (3, False)])
def test_mov_ss_holds_a_breakpoint_back_and_sti_does_not(shadow, comes):
    case = on_path("desc", b"\x90", system={"dr": (0x6000, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x402)})
    case = msgspec.structs.replace(case, extra={"kvm": {"interruptibility": shadow}})
    assert breaks(case) == comes


@pytest.mark.parametrize(
    ("code", "error"), [("ac", 9), ("f3ad", 9), ("ff36", 9), ("8f06", 11), ("a4", 9), ("48a7", 9)],
)  # fmt: skip
def test_so_it_is_with_other_operands_that_are_in_memory(exits, subject, code, error):
    """LODS, PUSH, POP, MOVS, CMPS: the stack, or the destination, is where everybody may go."""
    case = far_case(bytes.fromhex(code), rcx=2, rdi=0x9000)
    outcome = run(exits, open_to_all(case, 0x9000, 0xC000))
    assert outcome.exception == (14, error, 0x8000)
    assert agreed(exits, subject, open_to_all(case, 0x9000, 0xC000)).exception == outcome.exception


def open_to_all(case, *pages):
    """Entries with P, RW, US, A and D on the way to pages."""
    phys = []
    for linear in (*pages, *(page - 8 for page in pages)):
        for place in entry_places(case, linear)[0]:
            byte = case_memory(case).pages[place >> 12][place & 0xFFF] | 0x67
            phys.append({"addr": hex(place), "data": bytes((byte,)).hex()})
    return msgspec.structs.replace(case, extra={**case.extra, "phys": [*case.extra["phys"], *phys]})


def test_where_two_operands_meet_one_or_a_device_is_in_front_nobody_knows(exits):
    both = far_case(b"\xa4", rcx=1, rdi=0x8800)
    refused = far_case(b"\xa4", rcx=1, rdi=0x700000)
    nothing = far_case(b"\xf3\xac", rcx=0)
    port = far_case(b"\x6e", rcx=1)
    for case in (both, refused, nothing, port):
        with pytest.raises(UnsupportedCaseError, match=r"^(code|phys): "):
            exits.check(case)


def test_an_access_to_an_msr_beyond_the_limit_of_cs_is_none(exits):
    options = {"rcx": MSR, "knobs": {"msr_denied": hex(MSR), "user_space_msr_mask": 4}}
    exits.check(on_path("msr-completion", FORCED_PREFIX + b"\x0f\x32", "real", rip=0xFFF0, **options))
    with pytest.raises(NoExitError, match=r"^code: it lies beyond the limit of CS"):
        exits.check(on_path("msr-completion", FORCED_PREFIX + b"\x0f\x32", "real", rip=0xFFFC, **options))

"""Each gap exists: Bochs does what the ledger says, and the ledger recognises it, but not its neighbour."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.machine_cases import entry_places

from emufuzz.arch.regs import VCPU_SREG_DS, VCPU_SREG_SS
from emufuzz.case.build import build_case, build_system
from emufuzz.oracle.bochs.gaps import ATTACHED, BOCHS_GAPS

DATA = bytes(range(256)) * 16
END = 0x9000 + 0x2000  # no page there


def make(mode: str, code: str, **options: Any):
    changes = options.pop("case", {})
    system = options.pop("system", {})
    cpl = options.pop("cpl", None)
    built = msgspec.structs.replace(build_system(mode, cpl), **system)
    case = build_case(mode, bytes.fromhex(code) + b"\xf4", system=built, data={0x8000: DATA}, **options)
    return msgspec.structs.replace(case, **changes)


def fault(*wanted: Any):
    return lambda _case, outcome: outcome.exception == wanted


def completes(_case, outcome):
    return outcome.exception is None


def pushed(size):
    return lambda case, outcome: case.gpr[4] - outcome.gpr[4] == size


BREAKPOINT = (0x8000, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x30402)  # writes of a byte at 0x8000
TF = 0x100

SYSTEM64 = build_system("prot64", 0)
ES_BASE = (msgspec.structs.replace(SYSTEM64.seg[0], base=0x1000), *SYSTEM64.seg[1:])
AT_END = tuple(
    msgspec.structs.replace(seg, sel=END >> 4, base=END) if number == VCPU_SREG_DS else seg
    for number, seg in enumerate(build_system("vm86").seg)
)

SHORT_STACK = tuple(
    msgspec.structs.replace(seg, limit=0x8FF8, g=0) if number == VCPU_SREG_SS else seg
    for number, seg in enumerate(build_system("prot32").seg)
)


def returns(code):
    """IRET with a frame that sets RF and CF."""
    frame = bytes.fromhex("006000000000000003000100") if code[:2] == "66" else bytes.fromhex("006000000300")
    return build_case("real", bytes.fromhex(code) + b"\xf4", rsp=0xC800, data={0xC800: frame})


def far_page(bit, width=36):
    """MOV from 8000H, whose entry has that address bit; the guest has MAXPHYADDR, and memory is there."""
    case = build_case("prot64", b"\x8b\x06\xf4", rsi=0x8000, physical=True)
    place = entry_places(case, 0x8000)[0][-1]
    entry = {"addr": hex(place), "data": (1 << bit | 0x8067).to_bytes(8, "little").hex()}
    page = {"addr": hex(1 << bit | 0x8000), "data": "11" * 8}
    extra = {"phys": [*case.extra["phys"], entry, page], "kvm": {"cpuid": {"maxphyaddr": width}}}
    return msgspec.structs.replace(case, path="ept-violation-maxphyaddr", extra=extra)


REAL = build_system("real").seg
WIDE_STACK = (*REAL[:2], msgspec.structs.replace(REAL[2], db=1), *REAL[3:])

# fmt: off
#: gap -> a case that has it, what Bochs makes of it, and a neighbour that does not have it.
PROOFS = {
    "bochs-features": (
        make("prot64", "0f38c9c1"), completes, make("prot64", "0fefc1")),
    "bochs-identity": (
        make("prot64", "0fa2"), lambda _, o: o.gpr[3] != 0, make("prot64", "0f06", cpl=0)),
    "bochs-undefined-flags": (
        make("prot32", "37", rax=9, flags=0x8D5), lambda _, o: not o.rflags & 0x800,
        make("prot32", "d40a", rax=9)),
    "bochs-real-error-code": (
        make("real", "678807", rdi=END), fault(14, 0, END), make("prot32", "8807", rdi=END)),
    "bochs-single-step": (
        make("prot64", "90", flags=TF), lambda c, o: o.exception is None and o.system is c.system,
        make("prot64", "90")),
    "bochs-breakpoints": (
        make("prot64", "8807", rdi=0x8000, system={"dr": BREAKPOINT}), completes,
        make("prot64", "8807", rdi=0x8000)),
    "bochs-msr": (
        make("prot64", "0f32", cpl=0, rcx=0x2FF), completes,
        make("prot64", "0f32", cpl=0, rcx=0xC0000080)),
    "bochs-monitor": (
        make("prot32", "0f01c1"), fault(6, None, None), make("prot32", "0f0b")),
    "bochs-enter-66": (
        make("prot64", "66c8100000"), pushed(8 + 16), make("prot64", "c8100000")),
    "bochs-rex-r-segment": (
        make("prot64", "448cc0"), fault(6, None, None), make("prot64", "418cc0")),
    "bochs-far-pointer-order": (
        make("prot32", "c417", rdi=END), fault(14, 0, END + 4), make("prot32", "8b17", rdi=END)),
    "bochs-far-pointer-limit": (
        make("vm86", "660fb500", rbx=0xFFFE, system={"seg": AT_END}), fault(14, 4, END + 2),
        make("vm86", "668b00", rbx=0xFFFE, system={"seg": AT_END})),
    "bochs-table-register-order": (
        make("prot64", "0f0117", cpl=0, rdi=END), fault(14, 0, END + 2),
        make("prot32", "0f0117", cpl=0, rdi=END)),
    "bochs-table-store-order": (
        make("real", "660f010f", rbx=0xFFFD), fault(14, 0, 0xFFFD), make("real", "660f010f", rbx=0xFFFA)),
    "bochs-real-code-segment": (
        make("prot32", "0f22c0", cpl=0, rax=0x32), lambda c, o: o.system.seg[1].type == 3,
        make("prot32", "0f22c0", cpl=0, rax=0x33)),
    "bochs-guest-width": (far_page(38), completes, far_page(20)),
    "bochs-physical-width": (far_page(40, 52), fault(14, 9, 0x8000), far_page(39, 52)),
    "bochs-alignment-first": (
        make("prot32", "660f7f4500", rbp=0x8FF1, system={"seg": SHORT_STACK}), fault(13, 0, None),
        make("prot32", "660f7f4500", rbp=0x8FF0, system={"seg": SHORT_STACK})),
    "bochs-iret-rf": (
        returns("66cf"), lambda _, o: o.exception is None and o.rflags & 0x10001 == 1, returns("cf")),
    "bochs-ret-imm-signed": (
        make("real", "ca0080", rsp=0x8000, system={"seg": WIDE_STACK}), lambda _, o: o.gpr[4] == 4,
        make("real", "66ca0080", rsp=0x8000, system={"seg": WIDE_STACK})),
    "bochs-rep-upper": (
        make("prot64", "67f3ac", rsi=1 << 40), lambda _, o: o.gpr[6] == 0,
        make("prot64", "f3ac", rsi=1 << 40)),
    "bochs-movsxd-66": (
        make("prot64", "66631f", rdi=END - 2), completes, make("prot64", "631f", rdi=END - 2)),
    "bochs-call-order": (
        make("real", "66ffd0", rax=1 << 20), lambda _, o: o.pages.keys() == {0xC}, make("real", "ffe0")),
    "bochs-undefined-early": (
        make("prot32", "", rip=0xDFFE - 0x1000, case={"code": b"\xc7\xdf"}), fault(6, None, None),
        make("prot32", "c7df00000000")),
    "bochs-compare-order": (
        make("prot64", "a6", rsi=END, rdi=END + 0x1000), fault(14, 0, END),
        make("prot64", "a6", rsi=0x8000, rdi=0x8000)),
    "bochs-fpu-image": (
        make("prot64", "0fae0f", rdi=0x9F00 + 0x1000), lambda c, o: o.system.fpu != c.system.fpu,
        make("prot64", "0fae07", rdi=0x8000)),
    "bochs-fpu-store-partial": (
        make("prot32", "dd37", rdi=END - 4), lambda _, o: o.exception is not None and o.pages.keys() == {0xA},
        make("prot32", "dd27", rdi=END - 4)),
    "bochs-fstp80-flags": (
        make("prot32", "db3f", rdi=END), lambda _, o: o.exception is not None and o.system.fpu.fsw == 0x41,
        make("prot32", "dd1f", rdi=END)),
    "bochs-frstor-partial": (
        make("prot32", "dd27", rdi=END - 40), lambda c, o: o.exception and o.system.fpu != c.system.fpu,
        make("prot32", "dd27", rdi=0x8000)),
    "bochs-fpu-environment-order": (
        make("prot32", "dd27", rdi=END), fault(14, 0, END + 24), make("prot32", "dd37", rdi=END)),
    "bochs-fbld-order": (
        make("prot32", "df27", rdi=END), fault(14, 0, END + 8), make("prot32", "df37", rdi=END)),
    "bochs-ins-base": (
        make("prot64", "67666d", cpl=0, rdi=END, system={"seg": ES_BASE}), completes,  # a page further on
        make("prot64", "676d", cpl=0, rdi=END, system={"seg": ES_BASE})),
    "bochs-arpl-write": (
        make("prot32", "6307", rdi=END), fault(14, 2, END), make("prot32", "6307", rdi=0x8000)),
    "bochs-popf-order": (
        make("vm86", "9d", rsp=END), fault(14, 4, END), make("vm86", "9c", rsp=END)),
    "bochs-ip-wrap": (
        make("real", "", rip=0xFFFF, case={"code": b"\x90"}), lambda _, o: o.rip == 0x10000,
        make("real", "ebfe")),
    "bochs-wrap-4g": (
        make("compat32", "8b07", rdi=0xFFFFFFFD), fault(14, 0, 0xFFFFFFFD),
        make("compat32", "8b07", rdi=0xFFFFFFE0)),
    "bochs-code-overwritten": (
        make("prot64", "f3aa", rcx=0x20, rdi=0x6000, rax=0xCC), fault(13, 3 * 8 + 2, None),
        make("prot64", "f3aa", rcx=0x20, rdi=0x6002, rax=0xCC)),
    "bochs-approximation": (
        make("prot64", "0f53c0"), completes, make("prot64", "0f51c0")),
    "bochs-vendor": (
        make("compat32", "0f05", case={"vendor": "amd"}), fault(6, None, None), make("compat32", "0f05")),
}
# fmt: on

#: Another case in which a gap shows, and what Bochs makes of it.
MORE = {
    "bochs-alignment-first": (make("prot64", "660f7f4500", rbp=(1 << 48) + 1), fault(13, 0, None)),
}


@pytest.mark.parametrize("name", MORE)
def test_the_gap_shows_here_too(bochs, name):
    case, happens = MORE[name]
    (outcome,) = bochs.run([case])
    assert happens(case, outcome), outcome.exception
    assert name in {gap for _, gap in bochs.unchecked(case, outcome)}


@pytest.mark.parametrize("name", PROOFS)
def test_the_gap_exists_and_is_recognised(bochs, name):
    case, happens, _ = PROOFS[name]
    (outcome,) = bochs.run([case])
    assert happens(case, outcome), (outcome.exception, outcome.gpr, hex(outcome.rflags))
    assert name in {gap for _, gap in bochs.unchecked(case, outcome)}


@pytest.mark.parametrize("name", PROOFS)
def test_the_gap_is_narrow(bochs, name):
    case = PROOFS[name][2]
    (outcome,) = bochs.run([case])
    assert name not in {gap for _, gap in bochs.unchecked(case, outcome)}


def test_every_entry_has_a_proof():
    assert {gap.id for gap in BOCHS_GAPS} == PROOFS.keys()
    assert ATTACHED.keys() == {"bochs-no-memory", "bochs-hidden-rights"}


def test_levels_that_do_not_fit_are_refused_by_hidden_tables(bochs):
    """SS is of CPL 0, which decides; Bochs takes the CPL from CS."""
    system = build_system("prot32", 0)
    seg = list(system.seg)
    seg[1] = msgspec.structs.replace(seg[1], sel=seg[1].sel | 3, dpl=3)
    case = make("prot32", "8b07", rdi=0x8000, system={"seg": tuple(seg)})
    (outcome,) = bochs.run([case])
    assert outcome.exception[:2] == (14, 5)
    assert outcome.unchecked == (("all", "bochs-hidden-rights"),)


def test_physical_memory_that_is_not_there(bochs):
    case = make("prot32", "8b07", rdi=END, physical=True, system={"cr0": 0x11, "cr4": 0x600})
    (outcome,) = bochs.run([case])
    assert outcome.unchecked == (("all", "bochs-no-memory"),)


def test_page_directory_pointers_that_are_not_there(bochs):
    case = make("prot32", "8b07", rdi=0x8000, physical=True, system={"cr4": 0x620, "cr3": 0x500000})
    gone = [entry for entry in case.extra["phys"] if int(entry["addr"], 16) < 0x100000]
    (outcome,) = bochs.run([msgspec.structs.replace(case, extra={"phys": gone})])
    assert outcome.unchecked == (("all", "bochs-no-memory"),)

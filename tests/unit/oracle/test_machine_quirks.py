"""What KVM does to devices, tables and paths on purpose is recognised, and nothing beside it."""

from __future__ import annotations

import msgspec
import pytest
from support.machine_cases import RW, SYSTEMS, A, D, P, entry_places, physical, read, write

from emufuzz.arch.cr import EFER_NX, X86_CR4_PSE, X86_CR4_SMEP
from emufuzz.arch.regs import (
    VCPU_REGS_RCX,
    VCPU_REGS_RDI,
    VCPU_REGS_RSI,
    VCPU_SREG_DS,
    VCPU_SREG_FS,
    VCPU_SREG_LDTR,
)
from emufuzz.arch.rflags import X86_EFLAGS_RF as RF
from emufuzz.case.build import build_case
from emufuzz.case.devices import PIO, trace_to_obj
from emufuzz.case.model import Outcome, case_pages, code_address
from emufuzz.oracle.compare import AGREE, FINDING, SKIPPED, judge
from emufuzz.oracle.device_trace import trace_of
from emufuzz.oracle.quirks import MACHINE_QUIRKS, QUIRKS, explaining_quirk
from emufuzz.oracle.rules import RulesOracle
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.kvm import KvmSubject


class Silent:
    ledger = ()

    def unchecked(self, case, outcome):
        return ()


def outcome_of(case, leaf="", trace=(), fault=None, **changes):
    made = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system, leaf=leaf, **changes)
    made.extra = {"device_trace": trace_to_obj(trace)}
    if fault is not None:
        made.exception, made.rc = fault, "propagate_fault"
    return made


def sides(case, leaf, ours, theirs, **both):
    return case, outcome_of(case, leaf, ours, **both), outcome_of(case, "", theirs, **both)


def faults(case, leaf, ours, theirs, **changes):
    return case, outcome_of(case, leaf, fault=ours, **changes), outcome_of(case, "", fault=theirs)


def plain(code, mode="prot64", path=None):
    case = build_case(mode, bytes.fromhex(code), rsi=0xB000)
    return msgspec.structs.replace(case, path=path)


def accessed():
    """Unicorn has set the accessed bit in a directory entry, KVM has not."""
    case = physical("4-level", "8b06", [(0, 0), (1, 0x103000 | P | RW)], rsi=0x9000)
    _, ours, theirs = faults(case, "8b", (14, 0, 0x9000), (14, 0, 0x9000))
    table = next(
        n for n, page in case_pages(case).items() if page[:8] == (0x103000 | P | RW).to_bytes(8, "little")
    )
    page = case_pages(case)[table]
    theirs.pages = {table: bytes((page[0] | A,)) + page[1:]}
    return case, ours, theirs


def beyond_width():
    """A store through an entry that the guest's MAXPHYADDR reserves: the walk has set its dirty bit."""
    entry = 1 << 38 | P | RW | A
    width = {"kvm": {"cpuid": {"maxphyaddr": 36}}}
    case = physical("4-level", "8906", [(0, entry)], rsi=0x9000, extra=width)
    case = msgspec.structs.replace(case, path="ept-violation-maxphyaddr")
    _, ours, theirs = faults(case, "89", (14, 0xB, 0x9000), (14, 0xB, 0x9000))
    at = entry_places(case, 0x9000)[0][-1]
    page = bytearray(case_pages(case)[at >> 12])
    page[at & 0xFFF] |= D
    ours.pages = {at >> 12: bytes(page)}
    return case, ours, theirs


def unwalked():
    """Unicorn has set the dirty bit of a page in which a device was read and written."""
    case = physical("4-level", "0106", [(0, 0xFEB00000 | P | RW | A)], rsi=0x9000)
    trace = [read(0xFEB00000, "00000000"), write(0xFEB00000, "00000000")]
    _, ours, theirs = sides(case, "01", trace, trace)
    at = entry_places(case, 0x9000)[0][-1]
    page = bytearray(case_pages(case)[at >> 12])
    page[at & 0xFFF] |= D
    theirs.pages = {at >> 12: bytes(page)}
    return case, ours, theirs


def fetched():
    system = msgspec.structs.replace(SYSTEMS["2-level"], efer=EFER_NX)
    case = physical("2-level", "90", system=system, rip=0xB000)
    return faults(case, "90", (14, 16, 0xB000), (14, 0, 0xB000))


def wide_page():
    system = msgspec.structs.replace(SYSTEMS["2-level"], cr4=SYSTEMS["2-level"].cr4 | X86_CR4_PSE)
    case = physical("2-level", "8b06", [(1, 0x87 | 1 << 17)], system=system, rsi=0x9000)
    return faults(case, "8b", (14, 9, 0x9000), None)


TWICE = (read(0x60, "01", PIO), read(0x60, "02", PIO))


def split_port():
    """INSD whose destination begins on the last byte of memory."""
    case = plain("6d", path="io-string")
    last = max(case_pages(case))
    fault = (14, 2, (last + 1) << 12)
    _, ours, theirs = sides(case, "6d", [read(0x60, "01020304", PIO)], [], fault=fault)
    theirs.extra = {"device_trace": []}
    ours.pages = {last: case_pages(case)[last][:-1] + b"\x01"}
    return case, ours, theirs


def unchecked():
    """ADD to a device behind a page that is read-only."""
    case, *_ = accessed()
    case = msgspec.structs.replace(case, path="ept-violation")
    _, ours, theirs = sides(case, "01", [read(0xB010, "01"), write(0xB010, "02")], [read(0xB010, "01")])
    theirs.rc, theirs.exception = "propagate_fault", (14, 3, 0x9010)
    return case, ours, theirs


def unfetched():
    """REP MOVSB over the page tables of its own code."""
    case, *_ = accessed()
    case = msgspec.structs.replace(case, path="shadow-pf", code=bytes.fromhex("f3a4"))
    _, ours, theirs = sides(case, "a4", [], [])
    ours.pages = {0x100: bytes(4096)}
    theirs.rc, theirs.exception = "propagate_fault", (14, 0, code_address(case))
    return case, ours, theirs


def rewalked():
    """REP MOVSB downwards over the table entry of its destination, which KVM alone looks at again."""
    case = physical("4-level", "f3a4", rsi=0x8000, rdi=0x9004, rcx=8, flags=1 << 10)
    case = msgspec.structs.replace(case, path="shadow-pf")
    at = entry_places(case, 0x9004)[0][-1]
    page = bytearray(case_pages(case)[at >> 12])
    page[at & 0xFFF : (at & 0xFFF) + 8] = bytes(8)
    _, ours, theirs = faults(case, "a4", (14, 2, 0x9002), (14, 2, 0x8FFF))
    ours.pages, theirs.pages = {at >> 12: bytes(page)}, {at >> 12: bytes(page), 9: b"\1" * 5 + bytes(4091)}
    ours.gpr, theirs.gpr = iterated(case, 2), iterated(case, 5)
    return case, ours, theirs


def handed_over():
    """MOV DR7, RAX: KVM has only switched the exit off."""
    case, ours, theirs = sides(plain("0f23f8", path="exit"), "", [], [])
    theirs.rip += 3
    theirs.system = msgspec.structs.replace(case.system, dr=(*case.system.dr[:7], 0x402))
    return case, ours, theirs


def unknown_feature():
    """MOV CR4, RAX with SMEP."""
    case, ours, theirs = faults(plain("0f22e0", path="exit"), "", (13, 0, None), None)
    theirs.system = msgspec.structs.replace(case.system, cr4=case.system.cr4 | X86_CR4_SMEP)
    return case, ours, theirs


def based():
    """WRMSR of FS.base in real mode."""
    case = build_case("real", bytes.fromhex("0f30"), rcx=0xC0000100, rax=0xD01)
    case, ours, theirs = sides(msgspec.structs.replace(case, path="rmode-exception"), "0f30", [], [])
    seg = list(case.system.seg)
    seg[VCPU_SREG_FS] = msgspec.structs.replace(seg[VCPU_SREG_FS], base=0xD01)
    theirs.system = msgspec.structs.replace(case.system, seg=tuple(seg))
    return case, ours, theirs


def went_on():
    """LMSW, and the next instruction."""
    case = build_case("real", bytes.fromhex("0f01f0f4"), rax=1)
    case, ours, theirs = sides(msgspec.structs.replace(case, path="rmode-exception"), "f4", [], [])
    ours.rip, theirs.rip = case.rip + 4, case.rip + 3
    ours.system = theirs.system = msgspec.structs.replace(case.system, cr0=case.system.cr0 | 1)
    return case, ours, theirs


def went_elsewhere():
    """What follows is no HLT."""
    case, ours, theirs = went_on()
    return msgspec.structs.replace(case, code=case.code[:3] + b"\x90"), ours, theirs


def test_rules_know_where_emulation_goes_on():
    """LMSW with a selector in DS whose RPL no segment of protected mode could have."""
    case = build_case("real", bytes.fromhex("0f01f0f4"), rax=0xF3)
    seg = list(case.system.seg)
    seg[VCPU_SREG_DS] = msgspec.structs.replace(seg[VCPU_SREG_DS], sel=0x803, base=0x8030)
    system = msgspec.structs.replace(case.system, seg=tuple(seg))
    case = msgspec.structs.replace(case, path="rmode-exception", system=system)
    (ours,), rules = KvmSubject().run([case]), RulesOracle()
    found = rules.differences(case, ours)
    assert [difference.field for difference in found] == ["rip"]
    assert explaining_quirk(case, ours, rules.demanded(case, ours), found) == "kvm-emulates-on"
    case, ours, _ = went_elsewhere()
    found = rules.differences(case, ours)
    assert found
    assert explaining_quirk(case, ours, rules.demanded(case, ours), found) is None


def iterated(case, times):
    """The registers after so many iterations downwards."""
    steps = {VCPU_REGS_RCX, VCPU_REGS_RSI, VCPU_REGS_RDI}
    return tuple(value - times * (nr in steps) for nr, value in enumerate(case.gpr))


def stored_selector():
    """SLDT with REX.W over the end of page A: behind it is a hole."""
    case = build_case("prot64", bytes.fromhex("480f0006"), rsi=0xAFFC)
    case = msgspec.structs.replace(case, path="desc")
    page = case_pages(case)[0xA]
    selector = case.system.seg[VCPU_SREG_LDTR].sel.to_bytes(4, "little")
    ours = [read(0xB000, "ffffffff"), write(0xB000, "00000000")]
    case, ours, theirs = sides(case, "0f00/0", ours, [])
    ours.pages, theirs.pages = {0xA: page[:-4] + selector}, {0xA: page[:-4] + selector[:2] + page[-2:]}
    return case, ours, theirs


def stored_batch():
    """REP INSD with 32-bit addresses from FFFFFFFAH on, where devices are; a single element faults at 0."""
    case = plain("67f36d", path="io-string")
    case = msgspec.structs.replace(case, gpr=(*case.gpr[:1], 3, *case.gpr[2:7], 0xFFFFFFFA, *case.gpr[8:]))
    ports = [read(0, "ffffffff", PIO)] * 3
    trace = [*ports, write(0xFFFFFFFA, "ff" * 6), write(0x100000000, "ff" * 6)]
    case, ours, theirs = sides(case, "6d", trace, ports[:1])
    ours.gpr, ours.rip = (*case.gpr[:1], 0, *case.gpr[2:7], 6, *case.gpr[8:]), case.rip + 3
    theirs.rc, theirs.exception = "propagate_fault", (14, 2, 2)
    return case, ours, theirs


def short_table():
    """LGDT with prefix 66: the last byte that does not count is in a hole."""
    case = build_case("prot32", bytes.fromhex("660f0116"), rsi=0xAFFB)
    return sides(case, "0f01/2.mem", [], [read(0xB000, "ff")])


def holed():
    """The page table of 9000H is where no memory is."""
    case = physical("4-level", "8b06", [(1, 0x700000 | P | RW)], rsi=0x9000)
    case = msgspec.structs.replace(case, path="ept-violation")
    return faults(case, "8b", (14, 0, 0x9000), (14, 9, 0x9000))


def front():
    """ADD over the end of a page; both pages are read-only, and KVM has read the device in the first."""
    case = physical("4-level", "0106", rsi=0x8FFE)
    trace = [read(0x8FFE, "0102")]
    case, ours, theirs = sides(case, "01", trace, trace)
    for outcome, address in ((ours, 0x9000), (theirs, 0x8FFE)):
        outcome.rc, outcome.exception = "propagate_fault", (14, 3, address)
    return case, ours, theirs


def called():
    """CALL through a device whose address has the page offset of the stack."""
    case = build_case("prot32", bytes.fromhex("ff16"), rsi=0xB504, rsp=0xC508)
    case = msgspec.structs.replace(case, path="io-completion")
    asked = [read(0xB504, "00010000")]
    pushed = (case.rip + 2).to_bytes(4, "little")
    case, ours, theirs = sides(case, "ff/2", [*asked, write(0xB504, pushed.hex())], asked)
    gpr = list(case.gpr)
    gpr[4] -= 4
    for outcome in (ours, theirs):
        outcome.rip, outcome.gpr = 0x100, tuple(gpr)
    page = case_pages(case)[0xC]
    theirs.pages = {0xC: page[:0x504] + pushed + page[0x508:]}
    return case, ours, theirs


UD = (6, None, None)
END = 1 << 47  # of the canonical addresses
# fmt: off
CASES = {
    "kvm-quirk-14-15-segment-store":  sides(plain("0f0006"), "0f00/0",
                                            [read(0xB000, "0102"), write(0xB000, "7000")],
                                            [write(0xB000, "7000")]),
    "kvm-quirk-14-15-selector-in-pages": stored_selector(),
    "kvm-quirk-48-batch-over-4g":     stored_batch(),
    "kvm-quirk-43-last-byte":         short_table(),
    "kvm-table-in-hole":              holed(),
    "kvm-quirk-55-pushed-to-operand": called(),
    "kvm-quirk-55-unchecked-front":   front(),
    "kvm-quirk-36-flush-reads":       sides(plain("0fae3e"), "0fae/7.mem.pfx_no", [read(0xB000, "01")], []),
    "kvm-quirk-46-repeated-in":       sides(plain("f3ec"), "ec", TWICE,
                                            [read(0x60, "01", PIO)]),
    "kvm-quirk-48-port-read-ahead":   sides(plain("f36c"), "6c", TWICE,
                                            [], fault=(14, 2, 0xD000)),
    "kvm-quirk-48-port-batch":        sides(plain("f36c"), "6c",
                                            [*TWICE, write(0xB000, "0102")],
                                            [read(0x60, "01", PIO), write(0xB000, "01"),
                                             read(0x60, "02", PIO), write(0xB001, "02")]),
    "kvm-quirk-16-20-source-read":    sides(plain("8e3e"), "8e", [read(0xB000, "0102")], [], fault=UD),
    "kvm-quirk-53-last-mmio-write":   sides(plain("ff1e"), "ff/3",
                                            [read(0xB000, "010203040800"), write(0xBFF0, "0760")],
                                            [read(0xB000, "010203040800"), write(0xBFF8, "0800"),
                                             write(0xBFF0, "0760")]),
    "kvm-quirk-54-mmio-pops":         sides(plain("61", "prot32"), "61",
                                            [read(0xB000, "01"), read(0xB002, "02")],
                                            [read(0xB000, "01"), read(0xB001, "02")]),
    "kvm-quirk-55-unwalked-write":    unwalked(),
    "kvm-walked-before-width":        beyond_width(),
    "kvm-accessed-before-fault":      accessed(),
    "kvm-fetch-bit-without-pae":      fetched(),
    "kvm-pse36-width":                wide_page(),
    "kvm-trap-ud":                    faults(plain("01d8", path="ud"), "01", UD, None),
    "kvm-quirk-62-undefined-fetch":   faults(plain("0f0b6b766d", path="fep"), "", UD, (14, 0, 0x7000),
                                             decode_rc="failed"),
    "kvm-quirk-48-port-read-split":   split_port(),
    "kvm-quirk-01-straddle-device":   sides(plain("ff1e"), "ff/3",
                                            [read(END - 4, "00000000"), read(END, "0000")], [],
                                            fault=(13, 0, None)),
    "kvm-quirk-55-unchecked-write":   unchecked(),
    "kvm-repeat-without-fetch":       unfetched(),
    "kvm-repeat-fresh-walk":          rewalked(),
    "kvm-debug-registers-later":      handed_over(),
    "kvm-cpuid-features":             unknown_feature(),
    "kvm-real-mode-base":             based(),
    "kvm-emulates-on":                went_on(),
}
# fmt: on


def test_every_quirk_has_a_case():
    """Those that only an oracle can tell are in test_table_operand and test_five_levels."""
    assert set(CASES) == {quirk.id for quirk in MACHINE_QUIRKS if quirk.explains is not None}
    assert not {quirk.id for quirk in QUIRKS} & set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_the_quirk_is_recognised(name):
    case, ours, theirs = CASES[name]
    verdict = judge(case, ours, theirs, Silent())
    assert (verdict.kind, verdict.reason) == (SKIPPED, name), verdict.differences


#: Quirks whose other consequences are not looked at: a fault, or registers popped from elsewhere.
FAULT_ONLY = {
    "kvm-quirk-54-mmio-pops", "kvm-pse36-width", "kvm-trap-ud", "kvm-quirk-62-undefined-fetch",
    "kvm-quirk-55-unchecked-write", "kvm-repeat-without-fetch", "kvm-cpuid-features",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CASES.keys() - FAULT_ONLY))
def test_a_wrong_register_beside_it_is_a_finding(name):
    case, ours, theirs = CASES[name]
    damaged = msgspec.structs.replace(ours, gpr=(ours.gpr[0] ^ 1, *ours.gpr[1:]))
    assert judge(case, damaged, theirs, Silent()).kind == FINDING


@pytest.mark.parametrize("name", CASES)
def test_another_fault_is_a_finding(name):
    case, ours, theirs = CASES[name]
    damaged = msgspec.structs.replace(ours, exception=(17, 0, None), rc="propagate_fault")
    assert judge(case, damaged, theirs, Silent()).kind == FINDING


def stopped():
    """RDMSR does not start over."""
    case, ours, theirs = sides(plain("0f32", path="exit"), "", [], [])
    theirs.rip += 2
    return case, ours, theirs


# fmt: off
NEAR = {
    "store reads elsewhere":   sides(plain("0f0006"), "0f00/0", [read(0xB004, "0102"), write(0xB000, "7000")],
                                     [write(0xB000, "7000")]),
    "store writes twice":      sides(plain("0f0006"), "0f00/0", [write(0xB000, "7000")] * 2,
                                     [write(0xB000, "7000")]),
    "store of 8 bytes":        sides(plain("8c1e"), "8c", [write(0xB000, "2800" + "00" * 6)],
                                     [write(0xB000, "2800")]),
    "store of other bytes":    sides(plain("488c1e"), "8c", [write(0xB000, "2800" + "01" * 6)],
                                     [write(0xB000, "2800")]),
    "mov reads first":         sides(plain("488c1e"), "8c", [read(0xB000, "0102"), write(0xB000, "2800")],
                                     [write(0xB000, "2800")]),
    "pops from elsewhere":     sides(plain("61", "prot32"), "61", [read(0xB004, "01"), read(0xB006, "02")],
                                     [read(0xB000, "01"), read(0xB001, "02")]),
    "pops in order":           sides(plain("61", "prot32"), "61", [read(0xB000, "01"), read(0xB001, "03")],
                                     [read(0xB000, "01"), read(0xB001, "02")]),
    "flush reads a word":      sides(plain("0fae3e"), "0fae/7.mem.pfx_no", [read(0xB000, "0102")], []),
    "in without rep":          sides(plain("ec"), "ec", TWICE,
                                     [read(0x60, "01", PIO)]),
    "in from another port":    sides(plain("f3ec"), "ec", [read(0x60, "01", PIO), read(0x61, "02", PIO)],
                                     [read(0x60, "01", PIO)]),
    "ins without fault":       sides(plain("6c"), "6c", TWICE,
                                     [read(0x60, "01", PIO)]),
    "ins stores other bytes":  sides(plain("f36c"), "6c",
                                     [*TWICE, write(0xB000, "0202")],
                                     [read(0x60, "01", PIO), write(0xB000, "01"),
                                      read(0x60, "02", PIO), write(0xB001, "02")]),
    "the first write only":    sides(plain("ff1e"), "ff/3", [write(0xBFF8, "0800")],
                                     [write(0xBFF8, "0800"), write(0xBFF0, "0760")]),
    "one write is lost":       sides(plain("8906"), "89", [], [write(0xB000, "0800")]),
    "ud on another path":      faults(plain("01d8", path="ept-violation"), "01", UD, None),
    "ud of what is emulated":  faults(plain("0f05", path="ud"), "0f05", UD, None),
    "decoded, then ud":        faults(plain("0f0b6b766d", path="fep"), "01", UD, (14, 0, 0x7000)),
    "a fetch bit with PAE":    faults(physical("pae", "90", rip=0xB000), "90",
                                      (14, 16, 0xB000), (14, 0, 0xB000)),
    "no feature":              faults(plain("0f22e0", path="exit"), "", (13, 0, None), None),
    "reads below the end":     sides(plain("ff1e"), "ff/3", [read(END - 8, "00000000"), read(END - 4, "00")],
                                     [], fault=(13, 0, None)),
    "another exit":            stopped(),
    "another instruction":     went_elsewhere(),
    "a small page":            faults(physical("2-level", "8b06", [(0, 0)], rsi=0x9000), "8b",
                                      (14, 9, 0x9000), None),
}
# fmt: on


@pytest.mark.parametrize("name", NEAR)
def test_what_is_only_alike_is_a_finding(name):
    case, ours, theirs = NEAR[name]
    assert judge(case, ours, theirs, Silent()).kind == FINDING


def with_trace(outcome, accesses):
    return msgspec.structs.replace(outcome, extra={"device_trace": trace_to_obj(accesses)})


def test_a_selector_in_pages_is_stored_as_it_should_be():
    """Other bytes in memory or in the device, another order, or no REX.W."""
    case, ours, theirs = stored_selector()
    reads, written = trace_of(ours)
    for accesses in ([written], [written, reads], [reads, written._replace(data=b"\0\0\0\1")], [reads]):
        assert judge(case, with_trace(ours, accesses), theirs, Silent()).kind == FINDING
    page = ours.pages[0xA]
    spoilt = msgspec.structs.replace(ours, pages={0xA: page[:-1] + bytes((page[-1] ^ 1,))})
    assert judge(case, spoilt, theirs, Silent()).kind == FINDING
    short = msgspec.structs.replace(case, code=b"\x0f\x00\x06")
    assert judge(short, ours, theirs, Silent()).kind == FINDING


@pytest.mark.parametrize("change", [
    lambda trace: trace[1:],                                                     # an element less
    lambda trace: [*trace[:3], trace[3]],                                        # not stored above 4 GiB
    lambda trace: [*trace[:3], trace[4], trace[3]],
    lambda trace: [*trace[:4], trace[4]._replace(addr=0)],
])  # fmt: skip
def test_a_batch_is_stored_as_it_should_be(change):
    case, ours, theirs = stored_batch()
    assert judge(case, with_trace(ours, change(trace_of(ours))), theirs, Silent()).kind == FINDING
    wide = msgspec.structs.replace(case, code=case.code[1:])  # 64-bit addresses do not end there
    assert judge(wide, ours, theirs, Silent()).kind == FINDING


def test_what_a_call_pushes_is_its_return_address():
    """Another value, another address, both places, or a stack with another page offset."""
    case, ours, theirs = called()
    asked, written = trace_of(ours)
    for other in (
        [asked],
        [asked, written._replace(data=b"\0\0\0\0")],
        [asked, written._replace(addr=0xB500)],
    ):
        assert judge(case, with_trace(ours, other), theirs, Silent()).kind == FINDING
    both = msgspec.structs.replace(ours, pages=theirs.pages)
    assert judge(case, both, theirs, Silent()).kind == FINDING
    elsewhere = build_case("prot32", bytes.fromhex("ff16"), rsi=0xB504, rsp=0xC518)
    elsewhere = msgspec.structs.replace(elsewhere, path="io-completion")
    assert judge(elsewhere, ours, theirs, Silent()).kind == FINDING


def test_rules_know_where_the_stack_pointer_should_be():
    """POPA from a device, which starts over after each value."""
    device = {"kind": "mmio", "addr": "0xb000", "size": 4096, "behaviour": "float"}
    case = build_case("prot16", b"\x61", rsp=0xB036)
    case = msgspec.structs.replace(case, path="io-completion", extra={"devices": [device]})
    (ours,), rules = KvmSubject().run([case]), RulesOracle()
    found = rules.differences(case, ours)
    assert [difference.field for difference in found] == ["rsp"]
    assert explaining_quirk(case, ours, rules.demanded(case, ours), found) == "kvm-quirk-54-mmio-pops"
    (straight,) = UnicornOracle().run([case])
    trace = straight.extra["device_trace"]
    other = msgspec.structs.replace(ours, extra={**ours.extra, "device_trace": trace})
    assert explaining_quirk(case, other, rules.demanded(case, other), found) is None


def test_the_byte_that_does_not_count_is_the_sixth():
    case, ours, theirs = short_table()
    assert judge(case, ours, with_trace(theirs, [read(0xAFFF, "ff")]), Silent()).kind == FINDING
    wide = msgspec.structs.replace(case, code=case.code[1:])
    assert judge(wide, ours, theirs, Silent()).kind == FINDING


def test_a_page_table_in_memory_is_not_in_a_hole():
    case, ours, theirs = holed()
    there = physical("4-level", "8b06", [(0, P | RW | 1 << 51)], rsi=0x9000)
    there = msgspec.structs.replace(there, path="ept-violation")
    assert judge(there, ours, theirs, Silent()).kind == FINDING
    slots = [{"base": 0, "size": 0x800000, "flags": 0}]
    there = msgspec.structs.replace(case, extra={**case.extra, "kvm": {"memslots": slots}})
    assert judge(there, ours, theirs, Silent()).kind == FINDING
    other = msgspec.structs.replace(ours, exception=(14, 2, 0x9000))
    assert judge(case, other, theirs, Silent()).kind == FINDING


def test_a_table_that_ins_itself_moves_into_a_hole():
    """REP INSD: the port was read once more than memory could take."""
    case, ours, theirs = holed()
    case = msgspec.structs.replace(case, code=b"\xf3\x6d")
    ours, theirs = with_trace(ours, TWICE), with_trace(theirs, TWICE[:1])
    ours.leaf = "6d"
    assert judge(case, ours, theirs, Silent()).reason == "kvm-table-in-hole"
    assert judge(case, with_trace(ours, [write(0x60, "01", PIO)]), theirs, Silent()).kind == FINDING


def test_the_front_of_an_operand_was_read_from_a_device():
    case, ours, theirs = front()
    for accesses in ([], [read(0x8FF0, "0102")]):
        assert judge(case, *(with_trace(side, accesses) for side in (ours, theirs)), Silent()).kind == FINDING
    inside = physical("4-level", "0106", rsi=0x8FF0)
    assert judge(inside, ours, theirs, Silent()).kind == FINDING
    other = msgspec.structs.replace(ours, exception=(14, 3, 0x9008))
    assert judge(case, other, theirs, Silent()).kind == FINDING


def test_a_wide_store_is_recognised_in_a_trace():
    case, ours, theirs = sides(
        plain("488c1e"), "8c", [write(0xB000, "2800" + "00" * 6)], [write(0xB000, "2800")]
    )
    assert judge(case, ours, theirs, Silent()).reason == "kvm-quirk-14-15-segment-store"


def test_iterations_of_ins_that_a_fault_takes_back():
    """KVM writes what two port reads brought as one operand, of which the second half faults."""
    case, ours, theirs = sides(
        plain("f36c"),
        "6c",
        TWICE,
        [TWICE[0], write(0xCFFF, "01"), TWICE[1]],
        fault=(14, 2, 0xD000),
    )
    theirs.gpr = (ours.gpr[0], ours.gpr[1] - 1, *ours.gpr[2:7], ours.gpr[7] + 1, *ours.gpr[8:])
    assert judge(case, ours, theirs, Silent()).reason == "kvm-quirk-48-port-batch"
    theirs.gpr = (ours.gpr[0] ^ 1, *theirs.gpr[1:])
    assert judge(case, ours, theirs, Silent()).kind == FINDING


DEVICE = 0xD0000000


def moved_device(size):
    """REP MOVS of FFs from a device over the table entry that leads to the device."""
    code, times = {1: ("f3a4", 5), 8: ("f348a5", 2)}[size]
    tables = physical("4-level", code)
    at, window = (entry_places(tables, linear)[0][-1] for linear in (0x9000, 0xA000))
    case = physical(
        "4-level", code, [(0, DEVICE | P | RW | A)], rsi=0x90F0, rdi=0xA000 | at & 0xFFF, rcx=times
    )
    mapped = {"addr": hex(window), "data": (at & ~0xFFF | P | RW).to_bytes(8, "little").hex()}
    case = msgspec.structs.replace(case, extra={"phys": [*case.extra["phys"], mapped]}, path="ept-misconfig")
    page = bytearray(case_pages(case)[at >> 12])
    page[at & 0xFFF : (at & 0xFFF) + size * times] = b"\xff" * size * times
    frames = {
        1: (DEVICE, DEVICE, DEVICE | 0xF000, DEVICE | 0xFFF000, 0xFFFFF000),
        8: (DEVICE, (1 << 52) - 4096),
    }
    steps = [(frame | 0xF0 + i * size, "ff" * size) for i, frame in enumerate(frames[size])]
    ours = [read(*step) for step in steps]
    theirs = [read(DEVICE | 0xF0 + i * size, data) for i, (_, data) in enumerate(steps)]
    case, ours, theirs = sides(case, "a4" if size == 1 else "a5", ours, theirs, pages={at >> 12: bytes(page)})
    gpr = list(case.gpr)
    for number, step in (
        (VCPU_REGS_RCX, -times),
        (VCPU_REGS_RSI, times * size),
        (VCPU_REGS_RDI, times * size),
    ):
        gpr[number] += step
    ours.gpr = theirs.gpr = tuple(gpr)
    return case, ours, theirs


@pytest.mark.parametrize("size", [1, 8])
def test_a_device_that_moves_under_a_repeated_copy(size):
    case, ours, theirs = moved_device(size)
    assert judge(case, ours, theirs, Silent()).reason == "kvm-repeat-fresh-walk"


def moved_store(code, leaf):
    """REP MOVSD or STOSD of ones over the entry of its own destination, which is in no memory then."""
    case = physical("4-level", code, rsi=0x8000, rax=(1 << 64) - 1, rcx=3)
    at, window = (entry_places(case, linear)[0][-1] for linear in (0x9000, 0xA000))
    start = 0x9000 | at & 0xFFF
    case = physical("4-level", code, rsi=0x8000, rax=(1 << 64) - 1, rcx=3, rdi=start)
    entries = {window: at & ~0xFFF | P | RW, entry_places(case, 0x9000)[0][-1]: at & ~0xFFF | P | RW}
    phys = [
        {"addr": hex(place), "data": value.to_bytes(8, "little").hex()} for place, value in entries.items()
    ]
    phys += [{"addr": "0x8000", "data": "ff" * 16}]
    case = msgspec.structs.replace(case, extra={"phys": [*case.extra["phys"], *phys]}, path="shadow-pf")
    page = bytearray(case_pages(case)[at >> 12])
    page[at & 0xFFF : (at & 0xFFF) + 4] = b"\xff" * 4
    frame = int.from_bytes(page[at & 0xFFF : (at & 0xFFF) + 8], "little") & 0x000FFFFFFFFFF000
    ours, theirs = outcome_of(case, leaf, [write(frame | (at & 0xFFF) + 4, "ffffffff")]), outcome_of(case, "")
    ours.pages = {at >> 12: bytes(page)}
    page[(at & 0xFFF) + 4 : (at & 0xFFF) + 8] = b"\xff" * 4
    theirs.pages = {at >> 12: bytes(page)}
    ours.gpr = theirs.gpr = iterated_up(case, 2, 4 if leaf == "a5" else 0)
    return case, ours, theirs


def iterated_up(case, times, step):
    steps = {VCPU_REGS_RCX: -times, VCPU_REGS_RSI: times * step, VCPU_REGS_RDI: times * 4}
    return tuple(value + steps.get(nr, 0) for nr, value in enumerate(case.gpr))


@pytest.mark.parametrize(("code", "leaf"), [("f3a5", "a5"), ("f3ab", "ab")])
def test_a_store_that_moves_its_own_destination(code, leaf):
    case, ours, theirs = moved_store(code, leaf)
    assert judge(case, ours, theirs, Silent()).reason == "kvm-repeat-fresh-walk"
    (access,) = trace_of(ours)
    for other in ([], [access._replace(addr=access.addr ^ 0x1000)], [access, access]):
        assert judge(case, with_trace(ours, other), theirs, Silent()).kind == FINDING
    assert judge(case, msgspec.structs.replace(ours, pages={}), theirs, Silent()).kind == FINDING


@pytest.mark.parametrize("size", [1, 8])
def test_a_device_that_moves_elsewhere_is_a_finding(size):
    """Another address than the tables say, other data, or an iteration too few."""
    case, ours, theirs = moved_device(size)
    trace = trace_of(ours)
    wrong = (
        [*trace[:-1], trace[-1]._replace(addr=trace[-1].addr ^ 0x1000)],
        [*trace[:-1], trace[-1]._replace(data=b"\1" * size)],
        trace[:-1],
    )
    for accesses in wrong:
        damaged = msgspec.structs.replace(ours, extra={"device_trace": trace_to_obj(accesses)})
        assert judge(case, damaged, theirs, Silent()).kind == FINDING
    for damaged in (
        msgspec.structs.replace(ours, leaf="ac"),
        msgspec.structs.replace(ours, gpr=(1, *ours.gpr[1:])),
        msgspec.structs.replace(ours, pages={}),
    ):
        assert judge(case, damaged, theirs, Silent()).kind == FINDING


def test_a_store_of_a_selector_reads_a_device_behind_it():
    case, ours, theirs = sides(plain("0f0006"), "0f00/0", [read(0xB000, "ffff")], [])
    assert judge(case, ours, theirs, Silent()).reason == "kvm-quirk-14-15-segment-store"
    case, ours, theirs = sides(plain("8c06"), "8c", [read(0xB000, "ffff")], [])
    assert judge(case, ours, theirs, Silent()).kind == FINDING


def test_a_far_pointer_over_the_canonical_addresses():
    """The offset is read before the selector is refused, by processors too."""
    ours = [read(END - 4, "000000000000")]
    case, ours, theirs = sides(plain("ff1e"), "ff/3", ours, [read(END - 4, "00000000")], fault=(13, 0, None))
    assert judge(case, ours, theirs, Silent()).reason == "kvm-quirk-01-straddle-device"


def test_an_oracle_that_stops_before_the_iteration_that_faults():
    """KVM has read 256 elements ahead; the oracle stops where KVM would look for events."""
    case, ours, theirs = sides(plain("f36d"), "6d", TWICE, TWICE[:1])
    ours.exception, ours.rc = (14, 2, 0xD000), "propagate_fault"
    assert judge(case, ours, theirs, Silent()).reason == "kvm-quirk-48-port-batch"
    theirs.rip += 2
    assert judge(case, ours, theirs, Silent()).kind == FINDING


def test_more_than_accessed_bits_is_a_finding():
    case, ours, theirs = accessed()
    (table,) = theirs.pages
    page = theirs.pages[table]
    theirs.pages = {table: bytes((page[0] | 0x40,)) + page[1:]}
    assert judge(case, ours, theirs, Silent()).kind == FINDING


def test_bits_of_walks_may_have_a_quirk_of_their_own():
    case, ours, theirs = unwalked()
    moved = {"device_trace": trace_to_obj([read(0xFEB00000, "00"), write(0xFEB00000, "7000")])}
    sldt = msgspec.structs.replace(ours, leaf="0f00/0", extra=moved)
    stored = msgspec.structs.replace(
        theirs, extra={"device_trace": trace_to_obj([write(0xFEB00000, "7000")])}
    )
    verdict = judge(case, sldt, stored, Silent())
    assert verdict.reason == "kvm-quirk-14-15-segment-store+kvm-quirk-55-unwalked-write"
    wrong = msgspec.structs.replace(sldt, rip=sldt.rip + 1)
    assert judge(case, wrong, stored, Silent()).kind == FINDING


def test_a_quirk_and_a_gap_together_account_for_differences():
    class Gap:
        ledger = ()

        def unchecked(self, case, outcome):
            return (("rflags", "g"),)

    case, ours, theirs = CASES["kvm-quirk-36-flush-reads"]
    both = msgspec.structs.replace(ours, rflags=ours.rflags ^ 1)
    assert judge(case, both, theirs, Gap()).reason == "kvm-quirk-36-flush-reads+g"
    assert judge(case, both, theirs, Silent()).kind == FINDING


def test_cr2_of_a_fault_that_is_not_delivered_yet():
    """KVM loads CR2 with the exception's payload when it injects it."""
    case = physical("4-level", "8b06", [(0, 0)], rsi=0x9000)
    _, ours, theirs = faults(case, "8b", (14, 0, 0x9000), (14, 0, 0x9000))
    theirs.system = msgspec.structs.replace(theirs.system, cr2=0x9000)
    assert judge(case, ours, theirs, Silent()).kind == AGREE
    ours.system = msgspec.structs.replace(ours.system, cr2=0x8000)
    assert judge(case, ours, theirs, Silent()).kind == FINDING


def test_rf_of_a_fault_that_is_not_delivered_yet():
    """Hardware saved RF as 0 at the exit of VMREAD; KVM sets it when it injects the #UD."""
    case = msgspec.structs.replace(plain("0f78c3", path="exit"), rflags=RF | 2)
    case, ours, theirs = faults(case, "", UD, UD)
    ours.rflags = 2
    assert judge(case, ours, theirs, Silent()).kind == AGREE
    ours.rflags = 3
    assert judge(case, ours, theirs, Silent()).kind == FINDING
    trap = (1, None, None)
    case, ours, theirs = faults(case, "", trap, trap)
    ours.rflags = 2
    assert judge(case, ours, theirs, Silent()).kind == FINDING


def unchanged_tables():
    case, ours, theirs = rewalked()
    ours.pages = theirs.pages = {}
    return case, ours, theirs


def fewer_iterations():
    case, ours, theirs = rewalked()
    theirs.gpr = iterated(case, 1)
    return case, ours, theirs


def a_jump():
    case, ours, theirs = rewalked()
    theirs.gpr = (
        *theirs.gpr[:VCPU_REGS_RDI],
        theirs.gpr[VCPU_REGS_RDI] - 1,
        *theirs.gpr[VCPU_REGS_RDI + 1 :],
    )
    return case, ours, theirs


@pytest.mark.parametrize("alike", [unchanged_tables, fewer_iterations, a_jump])
def test_iterations_without_a_reason_are_a_finding(alike):
    case, ours, theirs = alike()
    assert judge(case, ours, theirs, Silent()).kind == FINDING


@pytest.mark.parametrize(("bit", "known"), [(1 << 13, True), (1 << 3, False)])
def test_vmx_is_a_feature_that_a_guest_may_lack(bit, known):
    case, ours, theirs = unknown_feature()
    theirs.system = msgspec.structs.replace(case.system, cr4=case.system.cr4 | bit)
    assert (judge(case, ours, theirs, Silent()).reason == "kvm-cpuid-features") == known
    theirs.exception = (1, None, None)  # of a single step
    assert (judge(case, ours, theirs, Silent()).reason == "kvm-cpuid-features") == known


def test_a_refused_sti_is_followed_by_no_trap():
    case = build_case("vm86", b"\xfb", flags=0x3100)
    _, ours, theirs = faults(case, "fb", (13, 0, None), (1, None, None))
    assert judge(case, ours, theirs, Silent()).reason == "kvm-quirk-19-vm86-cli-sti"
    theirs.exception = (6, None, None)
    assert judge(case, ours, theirs, Silent()).kind == FINDING


def test_ins_downwards_over_the_entry_of_its_destination():
    """Two elements were read ahead; the second one is stored where the first has pointed the tables to."""
    case, _, _ = moved_store("f3ab", "ab")
    case = msgspec.structs.replace(case, code=b"\xf3\x6d", rflags=1 << 10 | 2)
    case = msgspec.structs.replace(case, gpr=(*case.gpr[:7], case.gpr[7] + 4, *case.gpr[8:]))
    data = [read(0, "ffffffff", PIO)] * 3
    at = entry_places(case, 0x9000)[0][-1]
    page = bytearray(case_pages(case)[at >> 12])
    page[(at & 0xFFF) + 4 : (at & 0xFFF) + 8] = b"\xff" * 4
    frame = int.from_bytes(page[at & 0xFFF : (at & 0xFFF) + 8], "little") & 0x000FFFFFFFFFF000
    ours = outcome_of(case, "6d", [*data, write(frame | at & 0xFFF, "ffffffff")])
    theirs = outcome_of(case, "", data)
    ours.pages = {at >> 12: bytes(page)}
    page[at & 0xFFF : (at & 0xFFF) + 4] = b"\xff" * 4
    theirs.pages = {at >> 12: bytes(page)}
    gpr = list(case.gpr)
    gpr[VCPU_REGS_RCX], gpr[VCPU_REGS_RDI] = 1, gpr[VCPU_REGS_RDI] - 8
    ours.gpr = theirs.gpr = tuple(gpr)
    assert judge(case, ours, theirs, Silent()).reason == "kvm-repeat-fresh-walk"
    elsewhere = with_trace(ours, [*data, write(frame + 0x1000 | at & 0xFFF, "ffffffff")])
    assert judge(case, elsewhere, theirs, Silent()).kind == FINDING

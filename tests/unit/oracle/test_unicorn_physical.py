"""Physical memory in Unicorn: the case's own page tables, with real faults, CR2 and accessed bits."""

from __future__ import annotations

import msgspec
import pytest
from support.machine_cases import NX, PS, RW, SYSTEMS, TARGET, US, A, D, P, entry, entry_places, physical, run

from emufuzz.arch.cr import X86_CR4_LA57, X86_CR4_PSE
from emufuzz.case.build import PAGE_TABLES, build_case, build_system
from emufuzz.case.model import case_memory
from emufuzz.case.translate import walk

KINDS = tuple(SYSTEMS)
WRITE = "8906"  # mov [esi], eax
READ = "8b06"


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_elsewhere(oracle, kind):
    case = physical(kind, WRITE, [(0, 0x8000 | P | RW | A | D)], rsi=TARGET + 0x10, rax=0x11223344)
    outcome = run(oracle, case)
    assert (outcome.exception, outcome.system is case.system) == (None, True)
    assert list(outcome.pages) == [8]
    assert outcome.pages[8][0x10:0x14] == bytes.fromhex("44332211")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("code", "bits"), [(READ, A), (WRITE, A | D)])
def test_accessed_and_dirty_bits(oracle, kind, code, bits):
    upper = case_entry(physical(kind, code), 1) & ~A
    changes = [(0, TARGET | P | RW)] + ([(1, upper)] if kind != "pae" else [])
    case = physical(kind, code, changes, rsi=TARGET)
    outcome = run(oracle, case)
    assert outcome.exception is None
    assert entry(outcome, case) == TARGET | P | RW | bits
    if kind != "pae":
        assert entry(outcome, case, 1) == upper | A


def case_entry(case, level):
    system = case.system
    pages = case_memory(case).pages
    return walk(pages, system.cr0, system.cr3, system.cr4, system.efer, TARGET)[0][-1 - level]


# fmt: off
FAULTS = {
    "absent, read":              (READ,  False, TARGET,                     0, 0),
    "absent, write":             (WRITE, False, TARGET,                     2, 0),
    "absent, user":              (READ,  True,  TARGET,                     4, 0),
    "read-only":                 (WRITE, False, TARGET | P | A,             3, 0),
    "read-only, user":           (WRITE, True,  TARGET | P | US | A,        7, 0),
    "supervisor page, user":     (READ,  True,  TARGET | P | RW | A,        5, 0),
}
# fmt: on


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAULTS)
def test_faults_have_error_code_and_cr2(oracle, kind, name):
    code, user, leaf, error, _ = FAULTS[name]
    case = physical(kind, code, [(0, leaf)], user=user, rsi=TARGET + 4)
    outcome = run(oracle, case)
    assert outcome.exception == (14, error, TARGET + 4)
    assert outcome.rc == "propagate_fault"
    assert outcome.system == msgspec.structs.replace(case.system, cr2=TARGET + 4)
    assert (outcome.rip, outcome.gpr, outcome.rflags) == (case.rip, case.gpr, case.rflags)
    assert entry(outcome, case) == leaf


def test_a_reserved_bit(oracle):
    system = msgspec.structs.replace(SYSTEMS["4-level"], efer=0x500)  # NX is a reserved bit
    case = physical("4-level", READ, [(0, TARGET | P | RW | NX)], system=system, rsi=TARGET)
    outcome = run(oracle, case)
    assert (outcome.exception, oracle.unchecked(case, outcome)) == ((14, 9, TARGET), ())


def test_write_protection_can_be_off(oracle):
    system = msgspec.structs.replace(SYSTEMS["4-level"], cr0=SYSTEMS["4-level"].cr0 & ~0x10000)
    case = physical("4-level", WRITE, [(0, TARGET | P | A)], system=system, rsi=TARGET, rax=1)
    outcome = run(oracle, case)
    assert (outcome.exception, outcome.pages[9][0]) == (None, 1)


def test_smap_and_smep(oracle):
    system = msgspec.structs.replace(SYSTEMS["4-level"], cr4=SYSTEMS["4-level"].cr4 | 0x300000)
    tables = [(0, TARGET | P | RW | US | A)]
    kernel_code = [
        {"addr": hex(entry_places(physical("4-level", READ), 0x6000)[0][-1]), "data": "6360000000000000"}
    ]
    case = physical("4-level", READ, tables, system=system, rsi=TARGET)
    smep = run(oracle, case)
    assert smep.exception == (14, 0x11, 0x6000)  # the code itself lies in a user page
    case = msgspec.structs.replace(case, extra={"phys": [*case.extra["phys"], *kernel_code]})
    assert run(oracle, case).exception == (14, 1, TARGET)
    allowed = msgspec.structs.replace(case, rflags=case.rflags | 1 << 18)
    assert run(oracle, allowed).exception is None


@pytest.mark.parametrize("kind", KINDS)
def test_fetch_faults(oracle, kind):
    case = physical(kind, "90", rip=0xB000)
    outcome = run(oracle, case)
    fetch = 0x10 if kind == "4-level" else 0  # NX is on
    assert (outcome.exception, outcome.system.cr2) == ((14, fetch, 0xB000), 0xB000)


def test_no_execute(oracle):
    case = physical("4-level", "90", [(0, TARGET | P | RW | A | NX)], rip=TARGET)
    outcome = run(oracle, case)
    assert outcome.exception == (14, 0x11, TARGET)


def test_large_pages(oracle):
    pse = msgspec.structs.replace(SYSTEMS["2-level"], cr4=SYSTEMS["2-level"].cr4 | X86_CR4_PSE)
    case = physical("2-level", WRITE, [(1, P | RW | PS | A)], system=pse, rsi=TARGET, rax=7)
    outcome = run(oracle, case)
    assert (outcome.exception, outcome.pages[9][0]) == (None, 7)
    assert outcome.pages[PAGE_TABLES >> 12][0] == P | RW | PS | A | D


def test_five_levels(oracle):
    system = msgspec.structs.replace(
        SYSTEMS["4-level"], cr4=SYSTEMS["4-level"].cr4 | X86_CR4_LA57, cr3=0x200000
    )
    case = build_case("prot64", bytes.fromhex(READ), physical=True, rsi=0x8000, data={0x8000: b"\x2a"})
    top = {"addr": "0x200000", "data": (PAGE_TABLES | 7).to_bytes(8, "little").hex()}
    case = msgspec.structs.replace(case, system=system, extra={"phys": [*case.extra["phys"], top]})
    assert run(oracle, case).gpr[0] == 0x2A


@pytest.mark.parametrize("mode", ["real", "prot32"])
def test_without_paging_linear_is_physical(oracle, mode):
    system = build_system(mode, 0)
    system = msgspec.structs.replace(system, cr0=system.cr0 & ~0x80000000)
    code = "8b04" if mode == "real" else READ
    case = build_case(
        mode, bytes.fromhex(code), system=system, physical=True, rsi=0x8000, data={0x8000: b"\x2a"}
    )
    outcome = run(oracle, case)
    assert (outcome.gpr[0], outcome.pages) == (0x2A, {})


@pytest.mark.parametrize("mode", ["vm86", "compat32", "prot16"])
def test_other_modes(oracle, mode):
    code = READ if mode == "compat32" else "8b04"
    case = build_case(mode, bytes.fromhex(code), physical=True, rsi=0x8000, data={0x8000: b"\x2a"})
    assert run(oracle, case).gpr[0] == 0x2A


def test_memory_above_the_buffer(oracle):
    """Tables, data and code beyond what the engine has memory for."""
    high = 0x12_3456_7000
    extra = {"addr": hex(high), "data": "2a000000"}
    case = physical("4-level", WRITE, [(0, high | P | RW)], rsi=TARGET + 8, rax=5)
    case = msgspec.structs.replace(case, extra={"phys": [*case.extra["phys"], extra]})
    outcome = run(oracle, case)
    assert outcome.pages[high >> 12][:12] == bytes.fromhex("2a0000000000000005000000")
    assert run(oracle, case).pages == outcome.pages


@pytest.mark.parametrize("frame", [0x20_0000, 0x30_0000, 0xFEB0_0000])
def test_what_is_not_memory_floats(oracle, frame):
    read = physical("4-level", READ, [(0, frame | P | RW)], rsi=TARGET + 4)
    outcome = run(oracle, read)
    assert outcome.gpr[0] == 0xFFFFFFFF
    assert outcome.extra["device_trace"] == [
        {"kind": "mmio", "addr": hex(frame + 4), "size": 4, "direction": "read", "data": "ffffffff"}
    ]
    written = run(oracle, physical("4-level", WRITE, [(0, frame | P | RW | A | D)], rsi=TARGET))
    assert written.pages == {}
    again = run(oracle, physical("4-level", READ, [(0, frame | P | RW | A)], rsi=TARGET + 4))
    assert again.gpr[0] == 0xFFFFFFFF


DEVICE = {"devices": [{"kind": "mmio", "addr": "0xfeb00000", "size": 8192, "reads": bytes(range(32)).hex()}]}


@pytest.mark.parametrize("kind", KINDS)
def test_devices_lie_at_physical_addresses(oracle, kind):
    case = physical(kind, READ, [(0, 0xFEB00000 | P | RW)], extra=DEVICE, rsi=TARGET + 3)
    outcome = run(oracle, case)
    assert outcome.gpr[0] == 0x03020100
    assert [a["addr"] for a in outcome.extra["device_trace"]] == ["0xfeb00003"]
    assert entry(outcome, case) == 0xFEB00000 | P | RW | A


@pytest.mark.parametrize(("code", "mark"), [("488b06", "read"), ("488906", "write"), ("f348a5", "read")])
def test_an_access_over_a_page_end_goes_on_where_the_tables_say(oracle, code, mark):
    """From the device's second page into memory: linear neighbours, not physical ones."""
    case = physical(
        "4-level",
        code,
        [(0, 0xFEB01000 | P | RW | A | D)],
        extra=DEVICE,
        rsi=TARGET + 0xFFD,
        rdi=0x8000,
        rcx=1,
        rax=0x1122334455667788,
        data={0xA000: b"\xaa\xbb\xcc\xdd\xee"},
    )
    outcome = run(oracle, case)
    (access,) = outcome.extra["device_trace"]
    assert (access["addr"], access["size"], access["direction"]) == ("0xfeb01ffd", 3, mark)
    if mark == "read":
        value = bytes.fromhex("000102aabbccddee")
        assert (outcome.gpr[0].to_bytes(8, "little") if code == "488b06" else outcome.pages[8][:8]) == value
    else:
        assert outcome.pages[10][:5] == bytes.fromhex("5544332211")


def test_an_access_into_a_device_over_a_page_end(oracle):
    case = physical("4-level", "488b06", [(0, 0xFEB00000 | P | RW | A)], extra=DEVICE, rsi=TARGET - 5)
    outcome = run(oracle, case)
    (access,) = outcome.extra["device_trace"]
    assert (access["addr"], access["data"]) == ("0xfeb00000", "000102")
    assert outcome.gpr[0].to_bytes(8, "little") == bytes(5) + b"\0\1\2"


def test_an_implicit_access_over_the_end_of_a_device_page_is_not_judged(oracle):
    """A descriptor that begins in a device: no operand tells where it goes on."""
    system = msgspec.structs.replace(
        SYSTEMS["4-level"], gdtr=msgspec.structs.replace(SYSTEMS["4-level"].gdtr, base=TARGET + 0xFF6)
    )
    case = physical("4-level", "8ed8", [(0, 0xFEB00000 | P | RW | A)], extra=DEVICE, system=system, rax=8)
    outcome = run(oracle, case)
    assert outcome.unchecked == (("all", "unicorn-device-page-split"),)


@pytest.mark.parametrize("code", ["e9fb2f0000", "ebfe", "c3"])
def test_the_next_instruction_leaves_no_trace(oracle, code):
    """Neither accessed bits nor CR2: a branch to a page that nothing maps, or not accessed yet."""
    for leaf in (0, TARGET | P | RW):
        case = physical("4-level", code, [(0, leaf)], data={0xC800: TARGET.to_bytes(8, "little")})
        outcome = run(oracle, case)
        assert (outcome.exception, outcome.system.cr2, entry(outcome, case)) == (None, 0, leaf)


def test_code_in_two_frames(oracle):
    """An instruction across a page end whose second page lies elsewhere."""
    case = build_case("prot64", bytes.fromhex("b811223344"), rip=TARGET - 2, physical=True)
    places, _ = entry_places(case, TARGET)
    move = {"addr": hex(places[-1]), "data": (0xA000 | 0x67).to_bytes(8, "little").hex()}
    case = msgspec.structs.replace(case, extra={"phys": [*case.extra["phys"], move]})
    outcome = run(oracle, case)
    assert (outcome.gpr[0], outcome.rip) == (0x44332211, TARGET + 3)


def test_a_write_to_the_code_is_not_judged(oracle):
    outcome = run(oracle, physical("4-level", WRITE, rsi=0x6800))
    assert outcome.unchecked == (("all", "unicorn-code-page-write"),)
    alias = physical("4-level", WRITE, [(0, 0x6000 | P | RW)], rsi=TARGET)
    assert run(oracle, alias).unchecked == (("all", "unicorn-code-page-write"),)


def test_protection_keys_are_not_judged(oracle):
    """PKRU denies key 0, which the pages have; what it says of key 1 is nothing to them."""
    system = msgspec.structs.replace(SYSTEMS["4-level"], cr4=SYSTEMS["4-level"].cr4 | 1 << 22)
    case = physical("4-level", READ, system=system, rsi=0x8000, extra={"kvm": {"pkru": 1}})
    assert run(oracle, case).unchecked == (("all", "unicorn-pkru"),)
    for pkru in (0, 4):
        none = physical("4-level", READ, system=system, rsi=0x8000, extra={"kvm": {"pkru": pkru}})
        assert run(oracle, none).unchecked == ()


@pytest.mark.parametrize("kind", KINDS)
def test_cases_leave_nothing_behind(oracle, kind):
    store = physical(kind, WRITE, rsi=TARGET, rax=0x55)
    load = physical(kind, READ, rsi=TARGET)
    absent = physical(kind, READ, [(0, 0)], rsi=TARGET)
    stored, loaded, faulted, again = oracle.run([store, load, absent, load])
    assert stored.pages[9][0] == 0x55
    assert (loaded.gpr[0], again.gpr[0], loaded.pages) == (0, 0, {})
    assert faulted.exception == (14, 0, TARGET)

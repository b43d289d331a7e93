"""Devices, ports and exit paths in Unicorn: what a guest asks of devices, and what it gets."""

from __future__ import annotations

import pytest
from support.machine_cases import PORT, STREAM, case_of, run, trace

from emufuzz.arch.regs import VCPU_SREG_TR
from emufuzz.case.build import build_system
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.oracle.native_view import FORCED_PREFIX
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.oracle.unicorn.bus import CaseBus

RAM = {**STREAM, "behaviour": "ram"}
FLOAT = {"kind": "mmio", "addr": "0xb000", "size": 4096, "behaviour": "float"}
IOPL3 = 0x3000


# fmt: off
ACCESSES = {
    "load 1":         ("8a06",       0xB100, [("r", "0xb100", "00")]),
    "load 2":         ("668b06",     0xB101, [("r", "0xb101", "0001")]),
    "load 4":         ("8b06",       0xB103, [("r", "0xb103", "00010203")]),
    "load 8":         ("488b06",     0xB105, [("r", "0xb105", "0001020304050607")]),
    "load 16":        ("0f1006",     0xB103, [("r", "0xb103", "0001020304050607"),
                                              ("r", "0xb10b", "08090a0b0c0d0e0f")]),
    "store 8":        ("488906",     0xB103, [("w", "0xb103", "8877665544332211")]),
    "store 2":        ("668906",     0xB100, [("w", "0xb100", "8877")]),
    "store 16":       ("0f1106",     0xB100, [("w", "0xb100", "00" * 8), ("w", "0xb108", "00" * 8)]),
    "add":            ("0006",       0xB100, [("r", "0xb100", "00"), ("w", "0xb100", "88")]),
    "lock add 8":     ("f0480106",   0xB103, [("r", "0xb103", "0001020304050607"),
                                              ("w", "0xb103", "8878685848382818")]),
    "xchg":           ("8706",       0xB100, [("r", "0xb100", "00010203"), ("w", "0xb100", "88776655")]),
    "failed cmpxchg": ("660fb10e",   0xB100, [("r", "0xb100", "0001"), ("w", "0xb100", "0001")]),
    "push m":         ("ff36",       0xB100, [("r", "0xb100", "0001020304050607")]),
    "pop m":          ("8f06",       0xB100, [("w", "0xb100", "00" * 8)]),
    "into the page":  ("8b06",       0xAFFE, [("r", "0xb000", "0001")]),
    "out of the page": ("48890e",    0xBFFD, [("w", "0xbffd", "000000")]),
    "movs":           ("48a5",       0xB100, [("r", "0xb100", "0001020304050607")]),
    "sgdt":           ("0f0106",     0xB100, [("w", "0xb100", "7f00"), ("w", "0xb102", "0010000000000000")]),
    "clflush":        ("0fae3e",     0xB100, []),
    "prefetch":       ("0f1806",     0xB100, []),
}
# fmt: on


@pytest.mark.parametrize("name", ACCESSES)
def test_accesses_are_those_of_the_instruction(oracle, name):
    """Unaligned or not, in one piece per 8 bytes and page, each once and in order."""
    code, address, wanted = ACCESSES[name]
    registers = {"rsi": address, "rax": 0x1122334455667788, "rdi": 0x9000}
    outcome = run(oracle, case_of("prot64", code, STREAM, data={0xC000: b""}, **registers))
    assert outcome.exception is None
    assert trace(outcome) == wanted
    known = oracle.unchecked(case_of("prot64", code, STREAM, **registers), outcome)
    assert not known or name == "clflush"  # which shares its opcode with FXSAVE


@pytest.mark.parametrize("mode", ["real", "vm86", "prot16", "prot32", "compat16", "compat32", "prot64"])
def test_every_mode_reaches_devices(oracle, mode):
    code = "8b04" if mode in {"real", "vm86", "prot16", "compat16"} else "8b06"
    outcome = run(oracle, case_of(mode, code, STREAM, rsi=0xB010))
    size = 2 if code == "8b04" else 4
    assert trace(outcome) == [("r", "0xb010", bytes(range(size)).hex())]
    assert outcome.gpr[0] == int.from_bytes(bytes(range(size)), "little")


@pytest.mark.parametrize(("device", "after"), [(STREAM, "01020304"), (RAM, "aa020304"), (FLOAT, "ffffffff")])
def test_behaviours(oracle, device, after):
    """CMPXCHG8B reads and writes back; the RMW of a byte shows what a device keeps."""
    case = case_of("prot64", "f3a4", device, rsi=0xB000, rdi=0xB000, rcx=2)
    outcome = run(oracle, case)
    reads = [access[2] for access in trace(outcome) if access[0] == "r"]
    writes = [access[2] for access in trace(outcome) if access[0] == "w"]
    assert reads == writes == (["ff", "ff"] if device is FLOAT else ["00", "01"])
    written = case_of("prot64", "f3a5", device, rsi=0xB000, rdi=0xB002, rcx=2)
    second = [access[2] for access in trace(run(oracle, written)) if access[0] == "r"][1]
    assert second == {"01020304": "04050607", "aa020304": "02030607", "ffffffff": "ffffffff"}[after]


def test_pages_around_a_device_are_as_ever(oracle):
    outcome = run(oracle, case_of("prot64", "8906", STREAM, rsi=0xAFFC, rax=0x11223344))
    assert trace(outcome) == []
    assert outcome.pages[10][-4:] == bytes.fromhex("44332211")
    faulted = run(oracle, case_of("prot64", "8906", STREAM, rsi=0xD000))
    assert (faulted.exception, faulted.system.cr2) == ((14, 2, 0xD000), 0)


def test_nothing_is_asked_when_the_second_page_is_absent(oracle):
    device = {"kind": "mmio", "addr": "0xd000", "size": 4096}
    outcome = run(oracle, case_of("prot64", "8b06", device, rsi=0xDFFE))
    assert (outcome.exception, trace(outcome)) == ((14, 0, 0xE000), [])


def test_an_access_from_memory_into_a_device_writes_both(oracle):
    outcome = run(oracle, case_of("prot64", "488906", STREAM, rsi=0xAFFB, rax=0x8877665544332211))
    assert outcome.pages[10][-5:] == bytes.fromhex("1122334455")
    assert trace(outcome) == [("w", "0xb000", "667788")]


def test_memory_is_memory_although_a_device_is_there(oracle):
    device = {"kind": "mmio", "addr": "0x8000", "size": 8}
    outcome = run(oracle, case_of("prot64", "8b06", device, rsi=0x8000, data={0x8000: b"\x2a"}))
    assert (outcome.gpr[0], trace(outcome)) == (0x2A, [])


def test_fresh_devices_for_every_case(oracle):
    case = case_of("prot64", "8b06", STREAM, rsi=0xB000)
    assert [o.gpr[0] for o in oracle.run([case, case])] == [0x03020100] * 2


def test_code_in_a_device_is_not_judged(oracle):
    outcome = run(oracle, case_of("prot64", "90", {"kind": "mmio", "addr": 0x7000, "size": 16}, rip=0xB000))
    assert outcome.rip == 0xB001  # laid over an absent page, the code makes it memory
    slots = {"memslots": [{"base": 0, "size": 0x6000, "flags": 0}]}
    outcome = run(oracle, case_of("prot64", "90", path="ud", kvm=slots))
    assert outcome.unchecked == (("all", "unicorn-code-in-device"),)


def test_a_write_to_the_code_is_not_judged(oracle):
    outcome = run(oracle, case_of("prot64", "8906", STREAM, rsi=0x6100))
    assert outcome.unchecked == (("all", "unicorn-code-page-write"),)


SLOTS = {"memslots": [{"base": 0, "size": 0x9000, "flags": 0}, {"base": 0x9000, "size": 0x1000, "flags": 2}]}


def test_memslots_decide_what_is_memory(oracle):
    read = case_of("prot64", "8b06", path="ept-violation", kvm=SLOTS, rsi=0x9000, data={0x9000: b"\x11"})
    write = case_of("prot64", "8906", path="ept-violation", kvm=SLOTS, rsi=0x9000, rax=0x55)
    hole = case_of("prot64", "8b06", path="ept-violation", kvm=SLOTS, rsi=0xA000, data={0xA000: b"\x11"})
    assert run(oracle, read).gpr[0] == 0x11
    written = run(oracle, write)
    assert (written.pages, trace(written)) == ({}, [("w", "0x9000", "55000000")])
    floating = run(oracle, hole)
    assert (floating.gpr[0], trace(floating)) == (0xFFFFFFFF, [("r", "0xa000", "ffffffff")])


def test_a_slot_is_memory_even_where_the_case_has_none(oracle):
    """KVM's slots are what exists of the machine; what the case does not fill is zeros."""
    case = case_of("prot64", "8b06", path="ept-violation", kvm=SLOTS, rsi=0x2000, rax=0x55)
    outcome = run(oracle, case)
    assert (outcome.exception, outcome.gpr[0], outcome.extra) == (None, 0, None)
    huge = {"memslots": [{"base": 0, "size": 1 << 40, "flags": 0}]}
    with pytest.raises(UnsupportedCaseError, match="more than 2048 pages"):
        oracle.check(case_of("prot64", "8b06", path="ept-violation", kvm=huge, rsi=0x2000))


AT_4_GIB = {"kind": "mmio", "addr": 0xFFFFF000, "size": 4096}


@pytest.mark.parametrize("code", ["6d", "f36d"])
def test_a_write_over_4_gib_goes_on_at_0(oracle, code):
    """Outside 64-bit mode: two bytes for the device, two for the memory at 0."""
    state = {"rdi": 0xFFFFFFFE, "rdx": 0x60, "rcx": 1, "flags": IOPL3, "data": {0: b"\x11" * 4}}
    outcome = run(oracle, case_of("prot32", code, AT_4_GIB, PORT, **state))
    assert (outcome.exception, outcome.pages[0][:4].hex()) == (None, "ffff1111")
    assert trace(outcome) == [("r", 0x60, "0102ffff"), ("w", "0xfffffffe", "0102")]


def test_a_device_over_4_gib_ends_there(oracle):
    """Outside 64-bit mode nobody reaches what lies beyond, which Unicorn would."""
    device = {"kind": "mmio", "addr": 0xFFFFFFF0, "size": 64, "behaviour": "float"}
    case = case_of("prot32", "6d", device, PORT, rdi=0xFFFFFFFE, rdx=0x60, flags=IOPL3, data={0: b"\x11" * 4})
    outcome = run(oracle, case)
    assert (outcome.exception, outcome.pages[0][:4].hex()) == (None, "ffff1111")
    assert trace(outcome)[1:] == [("w", "0xfffffffe", "0102")]


def test_a_read_over_4_gib_goes_on_at_0(oracle):
    device = {**AT_4_GIB, "reads": "0102"}
    outcome = run(oracle, case_of("prot32", "8b06", device, rsi=0xFFFFFFFE, data={0: b"\x11" * 4}))
    assert (outcome.exception, outcome.gpr[0] >> 16, trace(outcome)[0][:2]) == (
        None,
        0x1111,
        ("r", "0xfffffffe"),
    )


# fmt: off
PORTS = {
    "in al, imm8":   ("e460",   {},                                {"rax": 0x01}, [("r", 0x60, "01")]),
    "in eax, dx":    ("ed",     {"rdx": 0x60, "rax": 1 << 40},     {"rax": 0xFFFF0201},
                      [("r", 0x60, "0102ffff")]),
    "in ax, imm8":   ("66e560", {"rax": 0xAAAA0000},               {"rax": 0xAAAA0201},
                      [("r", 0x60, "0102")]),
    "out imm8, eax": ("e760",   {"rax": 0x11223344},               {"rax": 0x11223344},
                      [("w", 0x60, "44332211")]),
    "out dx, al":    ("ee",     {"rdx": 0x61, "rax": 0x55},        {"rax": 0x55}, [("w", 0x61, "55")]),
    "insb":          ("6c",     {"rdx": 0x60, "rdi": 0x8000},      {"rdi": 0x8001}, [("r", 0x60, "01")]),
    "rep insb":      ("f36c",   {"rdx": 0x60, "rdi": 0x8000, "rcx": 3}, {"rdi": 0x8003, "rcx": 0},
                      [("r", 0x60, "01"), ("r", 0x60, "02"), ("r", 0x60, "03")]),
    "rep outsw":     ("66f36f", {"rdx": 0x60, "rsi": 0x8000, "rcx": 2}, {"rsi": 0x8004, "rcx": 0},
                      [("w", 0x60, "abcd"), ("w", 0x60, "ef01")]),
}
# fmt: on


@pytest.mark.parametrize("name", PORTS)
def test_ports_are_answered_by_their_device(oracle, name):
    code, registers, after, wanted = PORTS[name]
    case = case_of("prot64", code, PORT, data={0x8000: bytes.fromhex("abcdef01")}, **registers)
    outcome = run(oracle, case)
    assert trace(outcome) == wanted
    numbers = {"rax": 0, "rcx": 1, "rsi": 6, "rdi": 7}
    assert {name: outcome.gpr[numbers[name]] for name in after} == after
    assert "unicorn-iopl" not in {gap for _, gap in oracle.unchecked(case, outcome)}
    if "ins" in name:
        assert outcome.pages[8][:4] == {"insb": b"\1\xcd\xef\1", "rep insb": b"\1\2\3\1"}[name]


def test_ins_into_a_device_writes_once(oracle):
    """Unicorn's probe of the destination is no access."""
    outcome = run(oracle, case_of("prot64", "f36c", PORT, STREAM, rdx=0x60, rdi=0xB000, rcx=2))
    assert trace(outcome) == [
        ("r", 0x60, "01"),
        ("w", "0xb000", "01"),
        ("r", 0x60, "02"),
        ("w", "0xb001", "02"),
    ]


def test_port_in_is_what_other_ports_answer(oracle):
    case = case_of("real", "e570", port_in="1234")
    outcome = run(oracle, case)
    assert (outcome.gpr[0], trace(outcome)) == (0x3412, [("r", 0x70, "1234")])
    exhausted = run(oracle, case_of("real", "e570", path="io-string", port_in="12"))
    assert (exhausted.gpr[0], trace(exhausted)) == (0xFF12, [("r", 0x70, "12ff")])


def test_ports_of_plain_cases_float_without_a_trace(oracle):
    case = case_of("real", "e570")
    outcome = run(oracle, case)
    assert (outcome.gpr[0], outcome.extra) == (0xFFFF, None)
    assert oracle.unchecked(case, outcome) == ()


@pytest.mark.parametrize(
    ("mode", "cpl", "flags", "checked"),
    [("prot32", 3, 0, True), ("prot32", 3, IOPL3, False), ("prot32", 0, 0, False), ("vm86", 3, IOPL3, True)],
)
def test_ports_are_vouched_for_where_no_permission_is_missing(oracle, mode, cpl, flags, checked):
    task = build_system(mode, None if mode == "vm86" else cpl).seg[VCPU_SREG_TR]
    closed = {task.base + 0x68: b"\xff" * 0x20}
    case = case_of(mode, "e460", PORT, cpl=cpl, flags=flags, data=closed)
    outcome = run(oracle, case)
    assert (("all", "unicorn-iopl") in oracle.unchecked(case, outcome)) is checked


@pytest.mark.parametrize("path", ["ud", "ept-violation", "rmode-exception", "invalid-guest-state", "exit"])
def test_a_path_ends_as_native_execution(oracle, path):
    case = case_of("prot64", "01d8", path=path, kvm={"instruction_length": 2}, rax=1, rbx=2)
    outcome = run(oracle, case)
    assert (outcome.gpr[0], outcome.rip, outcome.extra) == (3, 0x6002, None)


def test_forced_emulation_runs_what_is_behind_the_prefix(oracle):
    prefix = FORCED_PREFIX.hex()
    outcomes = oracle.run(
        [
            case_of("prot64", prefix + "01d8", path="fep", rax=1, rbx=2),
            case_of("prot64", prefix + "8b05f5ffffff", path="fep"),  # mov eax, [rip - 11]: the prefix
            case_of("prot64", prefix + "8b06", path="fep", rsi=0x20000),
            case_of("prot64", prefix + "8b06", STREAM, path="fep", rsi=0xB000),
        ]
    )
    added, own, faulted, device = outcomes
    assert (added.gpr[0], added.rip) == (3, 0x6007)
    assert own.gpr[0].to_bytes(4, "little") == FORCED_PREFIX[:4]
    assert (faulted.exception, faulted.rip) == ((14, 0, 0x20000), 0x6005)
    assert (device.gpr[0], device.rip) == (0x03020100, 0x6007)


@pytest.mark.parametrize("flag", [0, 0x100])
@pytest.mark.parametrize(
    ("code", "pushed"), [("9c", True), ("90", False), ("f4", False), ("fb", False), ("8ed0", False)]
)
def test_the_trap_flag_that_ends_runs_is_never_seen(oracle, code, pushed, flag):
    case = case_of("prot32", code, STREAM, flags=flag, rax=0x28)
    outcome = run(oracle, case)
    assert outcome.exception is None
    assert outcome.rflags & 0x100 == flag
    assert outcome.rip == 0x6000 + len(code) // 2
    assert outcome.system.dr == case.system.dr
    if pushed:
        assert outcome.pages[12][0x7FC:0x7FE] == (2 | flag).to_bytes(2, "little")


@pytest.mark.parametrize("flags", [2, 0x102])
def test_popf_loads_the_trap_flag_of_the_stack(oracle, flags):
    case = case_of("prot32", "9d", STREAM, data={0xC800: flags.to_bytes(4, "little")})
    outcome = run(oracle, case)
    assert (outcome.rflags, outcome.gpr[4], outcome.rip) == (flags, 0xC804, 0x6001)


def test_interrupt_shadows_and_loops(oracle):
    sti, mov_ss, loop = (run(oracle, case_of("prot32", c, STREAM, rax=0x28)) for c in ("fb", "8ed0", "ebfe"))
    assert (sti.interruptibility, mov_ss.interruptibility) == (2, 1)
    assert (loop.exception, loop.rip) == (None, 0x6000)


def test_what_a_hook_raises_is_raised_by_run(case, monkeypatch):
    opened = UnicornOracle()

    def fail(*_arguments, **_keywords):
        raise RuntimeError("a bug")

    monkeypatch.setattr(CaseBus, "_access", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        opened.run([case_of("prot64", "8b06", STREAM, rsi=0xB000)])
    monkeypatch.undo()
    assert opened.run([case_of("prot64", "8b06", STREAM, rsi=0xB000)])[0].gpr[0] == 0x03020100
    opened.close()


def test_plain_cases_and_cases_with_devices_do_not_disturb_each_other(oracle, case):
    plain = case("prot64", "8b06f4", {6: 0x8000})
    device = case_of("prot64", "8b06", STREAM, rsi=0xB000)
    physical = case_of("prot64", "8b06", STREAM, rsi=0x8000, physical=True, data={0x8000: b"\x09"})
    values = [o.gpr[0] for o in oracle.run([plain, device, plain, physical, device, plain])]
    assert values == [0x03020100, 0x03020100, 0x03020100, 9, 0x03020100, 0x03020100]


# The order of CMPS

SOURCE, DESTINATION = 0xB100, 0xD200


def compared(code, behaviour="ram", to=DESTINATION, rcx=1, **options):
    """CMPS between two devices."""
    places = {SOURCE >> 12, to >> 12}
    devices = [{"kind": "mmio", "addr": hex(place << 12), "size": 4096, "behaviour": behaviour,
                "reads": bytes(range(place, place + 64)).hex()} for place in sorted(places)]  # fmt: skip
    return case_of("prot32", code, *devices, rsi=SOURCE, rdi=to, rcx=rcx, path="io-completion", **options)


def addresses(outcome):
    return [int(address, 16) for _, address, _ in trace(outcome)]


@pytest.mark.parametrize("behaviour", ["ram", "float", "stream"])
def test_cmps_asks_for_its_source_first(oracle, behaviour):
    """Two devices do not depend on each other."""
    case = compared("a7", behaviour)
    outcome = run(oracle, case)
    assert addresses(outcome) == [SOURCE, DESTINATION]
    assert not oracle.unchecked(case, outcome)


def test_iterations_stay_apart(oracle):
    case = compared("f3a6", "float", rcx=3)
    outcome = run(oracle, case)
    assert addresses(outcome) == [at + i for i in range(3) for at in (SOURCE, DESTINATION)]
    assert not oracle.unchecked(case, outcome)


def test_downwards_and_over_the_end_of_a_page(oracle):
    outcome = run(oracle, compared("f3a7", "float", rcx=2, flags=0x400))
    assert addresses(outcome) == [SOURCE, DESTINATION, SOURCE - 4, DESTINATION - 4]
    case = compared("a7", "float", to=0xBFFE)
    assert addresses(run(oracle, case)) == [SOURCE, 0xBFFE]


def test_one_stream_for_both_operands_is_a_gap(oracle):
    case = compared("a7", "stream", to=SOURCE + 0x10)
    outcome = run(oracle, case)
    assert addresses(outcome) == [SOURCE, SOURCE + 0x10]
    assert ("all", "unicorn-device-operand-order") in oracle.unchecked(case, outcome)


def test_a_repeated_compare_with_memory_is_vouched_for(oracle):
    case = compared("f3a6", "stream", rcx=2, to=0x9000)
    case = case_of("prot32", "f3a6", {**STREAM, "reads": "00" * 8}, rsi=SOURCE, rdi=0x9000, rcx=2)
    outcome = run(oracle, case)
    assert addresses(outcome) == [SOURCE, SOURCE + 1]
    assert not oracle.unchecked(case, outcome)


@pytest.mark.parametrize(("bits", "gap"), [("0000", False), ("ffff", True)])
def test_a_bitmap_that_allows_the_port_leaves_nothing_unchecked(oracle, bits, gap):
    """Unicorn never looks at the bitmap; where it allows what IOPL does not, that is right."""
    base = build_system("prot32", 3).seg[VCPU_SREG_TR].base
    task = {base + 0x66: bytes.fromhex("6800"), base + 0x68: bytes.fromhex(bits * 0x20)}
    case = case_of("prot32", "e460", PORT, cpl=3, path="io-completion", data=task)
    outcome = run(oracle, case)
    assert outcome.exception is None
    assert (("all", "unicorn-iopl") in oracle.unchecked(case, outcome)) is gap


def test_a_bitmap_behind_page_tables_may_be_out_of_reach(oracle):
    base = build_system("prot32", 3).seg[VCPU_SREG_TR].base
    task = {base + 0x66: bytes.fromhex("6800"), base + 0x68: bytes(0x20)}
    case = case_of("prot32", "e460", PORT, cpl=3, path="io-completion", data=task, physical=True)
    assert ("all", "unicorn-iopl") in oracle.unchecked(case, run(oracle, case))

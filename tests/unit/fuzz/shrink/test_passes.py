"""What each pass takes away, and what it leaves: the condition of a test is all that a finding is."""

from __future__ import annotations

import msgspec
import pytest
from support.shrinking import probe_of

from emufuzz.arch import cr
from emufuzz.case.build import build_case, build_system
from emufuzz.case.model import Memory, is_physical
from emufuzz.fuzz.shrink import non_default_fields
from emufuzz.fuzz.shrink.code import fewer_instructions, fewer_prefixes, simpler_operands, without_rest
from emufuzz.fuzz.shrink.defaults import cpl_of
from emufuzz.fuzz.shrink.layout import effective_address, layout_of
from emufuzz.fuzz.shrink.machine import less_machine, shorter_scripts, simpler_json
from emufuzz.fuzz.shrink.memory import less_memory, without_paging
from emufuzz.fuzz.shrink.segments import to_flat_segments
from emufuzz.fuzz.shrink.state import simpler_values, to_defaults, to_lower_privilege

NOP = b"\x90"


def shrunk(simplify, case, holds):
    """What a pass makes of a case."""
    simple = simplify(case, probe_of(case, holds))
    assert holds(simple)
    return simple


def always(_case):
    return True


def segments(mode, **changes):
    """A system with other segments: `ds=dict(base=..)`."""
    names = ("es", "cs", "ss", "ds", "fs", "gs", "tr", "ldtr")
    system = build_system(mode, 0)
    seg = tuple(
        msgspec.structs.replace(seg, **changes.get(name, {}))
        for name, seg in zip(names, system.seg, strict=True)
    )
    return msgspec.structs.replace(system, seg=seg)


# --- instructions ---------------------------------------------------------------------------------


def test_one_instruction_suffices_wherever_it_is():
    case = msgspec.structs.replace(build_case("prot32", bytes.fromhex("90 4b 11d8 43")), count=4)
    simple = shrunk(fewer_instructions, case, lambda c: b"\x11\xd8" in c.code)
    assert (simple.code, simple.count, simple.rip) == (b"\x11\xd8", 1, case.rip + 2)


def test_instructions_that_are_needed_stay_in_order():
    case = msgspec.structs.replace(build_case("prot32", bytes.fromhex("90 f9 90 11d8 90")), count=5)

    def holds(c):
        return 0 <= c.code.find(b"\xf9") < c.code.find(b"\x11\xd8") and c.count >= 2

    simple = shrunk(fewer_instructions, case, holds)
    assert (simple.code, simple.count) == (bytes.fromhex("f911d8"), 2)


def test_bytes_behind_the_instruction_go():
    case = build_case("prot32", bytes.fromhex("11d8 909090f4"))
    assert shrunk(without_rest, case, always).code == b"\x11\xd8"


def test_prefixes_go_one_by_one_but_for_those_that_matter():
    case = build_case("prot64", bytes.fromhex("64 66 f2 4f 11d8"))
    simple = shrunk(fewer_prefixes, case, lambda c: b"\x66" in c.code and c.code[-2:] == b"\x11\xd8")
    assert simple.code == bytes.fromhex("66 11d8")


def test_bits_of_a_rex_prefix_go_as_well():
    case = build_case("prot64", bytes.fromhex("4f11d8"))
    simple = shrunk(fewer_prefixes, case, lambda c: len(c.code) == 3 and c.code[0] & 0x48 == 0x48)
    assert simple.code == bytes.fromhex("4811d8")


# --- operands -------------------------------------------------------------------------------------


def test_a_memory_operand_becomes_a_register():
    case = build_case("prot32", bytes.fromhex("118c9310000000"), rbx=0x8000)
    assert shrunk(simpler_operands, case, lambda c: c.code[0] == 0x11).code == b"\x11\xc0"


@pytest.mark.parametrize(("mode", "code"), [
    ("prot32", "118c9310000000"),
    ("prot64", "11542410"),
    ("real",   "118c3412"),
    ("real",   "67118c9310000000"),
])  # fmt: skip
def test_where_memory_matters_the_address_stays(mode, code):
    case = build_case(mode, bytes.fromhex(code), rbx=0x8000, rdx=0x20, rsi=0x200, rsp=0x9000)
    address = effective_address(case, layout_of(case))

    def holds(c):
        layout = layout_of(c)
        return layout is not None and layout.is_memory(c.code) and effective_address(c, layout) == address

    simple = shrunk(simpler_operands, case, holds)
    layout = layout_of(simple)
    assert layout.sib < 0 or simple.code[layout.modrm :][1] == 0x25
    assert simple.code[layout.modrm] >> 6 == 0


def test_registers_are_the_first_ones_and_constants_have_few_bits():
    case = build_case("prot32", bytes.fromhex("81f7 78563412"))
    simple = shrunk(
        simpler_operands, case, lambda c: c.code[0] == 0x81 and c.code[-2] & 0x10 and c.code[1] & 0x30
    )
    assert simple.code[1] & 7 == 0
    assert simple.code[2:] == bytes.fromhex("00001000")


# --- state ----------------------------------------------------------------------------------------


def test_what_does_not_matter_has_its_default_again():
    case = build_case("prot64", NOP, rax=5, rbx=6, flags=0x8D5)
    simple = shrunk(to_defaults, case, lambda c: c.gpr[3] == 6)
    assert non_default_fields(simple) == ("gpr.rbx",)


def test_operands_stay_where_something_odd_could():
    case = build_case("prot32", NOP, rax=5, system=segments("prot32", gs={"limit": 0xFFF}))
    simple = shrunk(to_defaults, case, lambda c: c.gpr[0] == 5 or c.system.seg[5].limit == 0xFFF)
    assert non_default_fields(simple) == ("gpr.rax",)


def test_of_a_segment_only_the_member_that_matters_stays():
    case = build_case("prot32", NOP, system=segments("prot32", ds={"limit": 0xFFF, "type": 1, "avl": 1}))
    simple = shrunk(to_defaults, case, lambda c: c.system.seg[3].limit == 0xFFF)
    default = build_system("prot32", 0).seg[3]
    assert simple.system.seg[3] == msgspec.structs.replace(default, limit=0xFFF)


@pytest.mark.parametrize(("cpl", "wanted", "becomes"), [
    (3, {0, 1, 2, 3}, 0), (2, {2, 3}, 3), (1, {1}, 1), (3, {3}, 3), (0, {0, 3}, 0),
])  # fmt: skip
def test_the_privilege_level_is_0_or_3_if_it_can_be(cpl, wanted, becomes):
    case = build_case("prot64", NOP, cpl=cpl)
    assert cpl_of(shrunk(to_lower_privilege, case, lambda c: cpl_of(c) in wanted)) == becomes


def test_values_have_few_bits():
    case = build_case("prot64", NOP, rax=0xDEADBEEF, rsp=0)
    simple = shrunk(simpler_values, case, lambda c: c.gpr[0] & 0x80)
    assert simple.gpr[0] == 0x80


def test_segments_are_flat_and_mean_the_same_memory():
    case = build_case(
        "prot32", bytes.fromhex("8b03"), system=segments("prot32", ds={"base": 0x1000}), rbx=0x7000
    )

    def linear(c):
        layout = layout_of(c)
        return c.system.seg[3].base + effective_address(c, layout)

    simple = shrunk(to_flat_segments, case, lambda c: linear(c) == 0x8000)
    assert simple.system.seg[3] == build_system("prot32", 0).seg[3]


def test_implicit_operands_move_with_their_segment():
    case = build_case(
        "prot32", b"\xa4", system=segments("prot32", es={"base": 0x1000}), rdi=0x7000, rsi=0x9000
    )
    simple = shrunk(to_flat_segments, case, lambda c: c.system.seg[0].base + c.gpr[7] == 0x8000)
    assert simple.gpr[7] == 0x8000
    assert simple.system.seg[0].base == 0


# --- memory ---------------------------------------------------------------------------------------


def test_only_bytes_that_matter_remain():
    data = bytes(range(1, 201))
    case = build_case("prot32", bytes.fromhex("8b03"), data={0x8000: data}, rbx=0x8010)
    simple = shrunk(less_memory, case, lambda c: c.mem.pages.get(8, bytes(4096))[0x12] == data[0x12])
    entries = dict(simple.mem.entries)
    assert [len(entry) for addr, entry in entries.items() if addr >> 12 == 8] == [1]
    assert entries[0x8012] == data[0x12:0x13]


def test_a_page_of_which_nothing_but_its_being_there_matters_is_empty():
    case = build_case("prot32", NOP, data={0x8000: b"\1" * 64})
    simple = shrunk(less_memory, case, lambda c: 8 in c.mem.pages)
    assert (0x8000, b"") in simple.mem.entries


def test_long_data_keeps_the_bytes_that_matter_between_zeros():
    data = bytes([7]) * 64
    case = build_case("prot32", NOP, mem=Memory(((0x6000, NOP), (0x8000, data))))

    def holds(c):
        page = c.mem.pages.get(8)
        return page is not None and page[0] == page[63] == 7

    simple = shrunk(less_memory, case, holds)
    assert dict(simple.mem.entries)[0x8000] == b"\7" + bytes(62) + b"\7"


def test_page_tables_go_if_flat_memory_will_do():
    case = build_case("prot32", NOP, physical=True)
    assert is_physical(case)
    assert not is_physical(shrunk(without_paging, case, always))


def test_paging_is_turned_off_where_memory_has_to_be_physical():
    case = build_case("prot32", NOP, physical=True)
    assert case.system.cr0 & cr.X86_CR0_PG
    simple = shrunk(without_paging, case, is_physical)
    assert not simple.system.cr0 & cr.X86_CR0_PG


# --- the machine around it ------------------------------------------------------------------------

DEVICE = {"kind": "mmio", "addr": "0x9000", "size": "0x1000", "reads": "0102030405", "then": "repeat"}


def with_extra(**extra):
    case = build_case("prot32", NOP)
    return msgspec.structs.replace(case, extra=extra)


def device(case):
    return (case.extra or {}).get("devices", [{}])[0]


def test_devices_answer_with_as_little_as_matters():
    case = with_extra(devices=[DEVICE])
    simple = shrunk(shorter_scripts, case, lambda c: device(c).get("reads", "")[4:6] == "03")
    assert device(simple)["reads"] == "000003"
    assert "then" not in device(simple)
    assert int(str(device(simple)["size"]), 0) == 1
    assert device(simple)["addr"] == "0x9000"


def test_fewer_bytes_from_ports():
    case = msgspec.structs.replace(build_case("prot32", NOP), port_in=bytes(range(1, 33)))
    assert shrunk(shorter_scripts, case, lambda c: c.port_in[3:4] == b"\4").port_in == b"\0\0\0\4"


def test_less_of_the_machine_around():
    slots = [{"base": i << 16, "size": 0x1000, "flags": 0} for i in range(4)]
    case = with_extra(kvm={"memslots": slots, "knobs": {"force_emulation_prefix": 1, "ept": False}})

    def holds(c):
        return any(slot.get("base") == 2 << 16 for slot in (c.extra or {}).get("kvm", {}).get("memslots", []))

    simple = less_machine(case, probe_of(case, holds))
    assert holds(simple)


@pytest.mark.parametrize(("value", "works", "simplest"), [
    (True,                       lambda v: True,                    False),
    (0xFF,                       lambda v: v & 4,                   4),
    ([1, 2, 3],                  lambda v: 2 in v,                  [2]),
    ({"a": 7, "b": [1, 2]},      lambda v: v.get("b", [0])[-1:] == [2], {"b": [2]}),
    ("text",                     lambda v: True,                    "text"),
    ({"a": {"b": {"c": 9}}},     lambda v: v["a"]["b"]["c"] & 8 if "c" in v.get("a", {}).get("b", {}) else 0,
                                                                    {"a": {"b": {"c": 8}}}),
])  # fmt: skip
def test_simpler_json(value, works, simplest):
    assert simpler_json(value, works) == simplest

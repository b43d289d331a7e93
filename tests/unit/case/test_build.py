from __future__ import annotations

import msgspec
import pytest

from emufuzz.arch import cr
from emufuzz.arch.descriptors import DescStruct
from emufuzz.arch.modes import MODES, mode_of
from emufuzz.arch.regs import SREG_NAMES, VCPU_REGS_RSP
from emufuzz.case.build import (
    CODE_PAGES,
    DATA_PAGES,
    PAGE_TABLES,
    STACK_PAGES,
    STACK_TOP,
    TSS_BASE,
    build_case,
    build_memory,
    build_system,
    cpls_of,
)
from emufuzz.case.catalogue import catalogue, entries
from emufuzz.case.check import check_descriptors, check_system
from emufuzz.case.json import case_from_json, case_to_json
from emufuzz.case.model import UNUSABLE, Segment, TableRegister
from emufuzz.case.paging import identity_tables
from emufuzz.case.segments import (
    descriptor_bytes,
    gdt_bytes,
    segment_code,
    segment_data,
    segment_paragraph,
    tss_bytes,
)

LEVELS = [(mode, cpl) for mode in MODES for cpl in cpls_of(mode)]


@pytest.mark.parametrize(("mode", "cpl"), LEVELS)
def test_default_states_are_consistent(mode, cpl):
    case = build_case(mode, b"\x90", cpl=cpl)
    system = case.system
    assert mode_of(system.cr0, system.efer, case.rflags, system.seg[1].l, system.seg[1].db) == mode
    assert system.seg[2].dpl == cpl
    assert check_system(system, case.rflags) == []
    assert check_descriptors(system, case.rflags, case.mem) == []
    assert set(CODE_PAGES + DATA_PAGES + STACK_PAGES) <= {pfn << 12 for pfn in case.mem.pages}
    assert case_from_json(case_to_json(case)) == case


def test_modes_without_a_level():
    for mode, cpl in (("real", 3), ("vm86", 0), ("prot32", 4), ("prot8", 0)):
        with pytest.raises(ValueError, match=r"has no CPL|is not one of"):
            build_system(mode, cpl)


VARIANTS = {
    "based":       {"ds": segment_data(0x80, base=0x8000)},
    "small-limit": {"ds": segment_data(0x80, limit=0xFF)},
    "expand-down": {"ds": segment_data(0x80, limit=0x83FF, expand_down=True)},
    "read-only":   {"ds": segment_data(0x80, writable=False)},
    "stack16":     {"ss": segment_data(0x80, bits=16, limit=0xFFFF)},
    "conforming":  {"cs": segment_code(0x80, conforming=True)},
    "execute":     {"cs": segment_code(0x80, readable=False)},
    "null data":   {"ds": UNUSABLE, "es": UNUSABLE},
    "two":         {"fs": segment_data(0x80, base=16), "gs": segment_data(0x88, base=32)},
}  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variants_are_consistent(changes):
    case = build_case("prot32", b"\x90", system=build_system("prot32", **changes))
    assert check_system(case.system, case.rflags) == []
    assert check_descriptors(case.system, case.rflags, case.mem) == []


def test_case_defaults_and_registers():
    case = build_case("prot32", b"\x90", rax=5)
    assert (case.gpr[0], case.gpr[VCPU_REGS_RSP], case.rflags) == (5, STACK_TOP, 2)
    assert build_case("vm86", b"\x90").rflags == 0x20002
    with pytest.raises(ValueError, match="eax is not a general-purpose register"):
        build_case("prot32", b"\x90", eax=5)


def test_data_lies_over_the_default_pages():
    memory = build_memory("prot64", build_system("prot64"), {0x8004: b"ab", 0x20000: b""})
    assert memory.pages[8][:8] == b"\0\0\0\0ab\0\0"
    assert memory.pages[0x20] == bytes(4096)


@pytest.mark.parametrize("mode", ["prot32", "prot64"])
def test_physical_cases_map_every_page_to_itself(mode):
    case = build_case(mode, b"\x90", physical=True)
    assert case.mem.entries == ()
    memory = {int(entry["addr"], 16): bytes.fromhex(entry.get("data", "")) for entry in case.extra["phys"]}
    widths, size = ((9, 9, 9, 9), 8) if mode == "prot64" else ((10, 10), 4)
    for page in CODE_PAGES + DATA_PAGES + STACK_PAGES + (TSS_BASE,):
        assert walk(memory, PAGE_TABLES, page, widths, size) == page
    assert walk(memory, PAGE_TABLES, 0xB000, widths, size) is None
    assert case_from_json(case_to_json(case)) == case


def test_physical_real_mode_has_no_tables():
    assert all(
        int(e["addr"], 16) < PAGE_TABLES for e in build_case("real", b"\x90", physical=True).extra["phys"]
    )


def walk(memory, table, page, widths, size):
    """The physical address of a page by page tables in a dict, or None if it is not present."""
    shift = 12 + sum(widths)
    for width in widths:
        shift -= width
        offset = (page >> shift & (1 << width) - 1) * size
        entry = int.from_bytes(memory[table][offset : offset + size], "little")
        if not entry & 1:
            return None
        table = entry & ~0xFFF
    return table


@pytest.mark.parametrize(
    ("kind", "widths", "size", "pages"),
    [
        ("2-level", (10, 10), 4, (0, 0x3FF000, 0x400000, 0xFFFFF000)),
        ("pae", (2, 9, 9), 8, (0, 0x200000, 0x40000000, 0xFFFFF000)),
        ("4-level", (9, 9, 9, 9), 8, (0, 0x200000, 0x7FFFFFFFF000)),
    ],
)
def test_identity_tables(kind, widths, size, pages):
    tables = dict(identity_tables(kind, 0x1000, pages))
    assert next(iter(tables)) == 0x1000
    for page in pages:
        assert walk(tables, 0x1000, page, widths, size) == page
    assert walk(tables, 0x1000, 0x123000, widths, size) is None


def test_identity_tables_refuse_nonsense():
    with pytest.raises(ValueError, match="is not one of"):
        identity_tables("5-level", 0, ())
    with pytest.raises(ValueError, match="not page-aligned"):
        identity_tables("pae", 1, ())


def test_descriptors():
    # the SDM's flat 4 GiB descriptors, as every operating system has them
    assert descriptor_bytes(segment_code(8)).hex() == "ffff0000009bcf00"
    assert descriptor_bytes(segment_data(16, dpl=3)).hex() == "ffff000000f3cf00"
    assert descriptor_bytes(segment_code(8, bits=64)).hex() == "ffff0000009baf00"
    wide = Segment(0x40, 0x123456789A, 0x67, 11, p=1)
    assert descriptor_bytes(wide, wide=True) == DescStruct(
        0x3456789A, 0x67, 11, p=1
    ).pack() + b"\x12" + bytes(7)


def test_limits_that_no_descriptor_can_hold():
    for limit in (0x100000, 0x1000FFFFF):
        with pytest.raises(ValueError, match="needs G=1"):
            segment_data(8, limit=limit)


def test_gdt_puts_descriptors_where_selectors_point():
    data = segment_data(0x1B, dpl=3)
    table = gdt_bytes([data, segment_data(0x2C), segment_data(0), UNUSABLE])
    assert table == bytes(24) + descriptor_bytes(data)


def test_tss():
    assert tss_bytes(bits=16, sp0=0x1234, ss0=0x10)[:6].hex() == "000034121000"
    assert tss_bytes(bits=32, sp0=0x12345678, ss0=0x10)[4:10].hex() == "785634121000"
    assert tss_bytes(bits=64, sp0=2**63)[4:12].hex() == "0000000000000080"
    assert tss_bytes()[0x66:0x6A].hex() == "68000000"
    assert tss_bytes(io_allowed=False)[0x68] == 0xFF


FLAT = {mode: build_system(mode) for mode in MODES}


def with_seg(mode, name, **changes):
    seg = list(FLAT[mode].seg)
    i = SREG_NAMES.index(name)
    seg[i] = msgspec.structs.replace(seg[i], **changes)
    return msgspec.structs.replace(FLAT[mode], seg=tuple(seg))


def with_fields(mode, **changes):
    return msgspec.structs.replace(FLAT[mode], **changes)


#: One broken state per rule: (system, RFLAGS, field the message names).
BROKEN = {
    "PG without PE":        (with_fields("real", cr0=cr.X86_CR0_PG), 2, "cr0: PG"),
    "NW without CD":        (with_fields("real", cr0=cr.X86_CR0_NW), 2, "cr0: NW"),
    "LMA without LME":      (with_fields("prot64", efer=cr.EFER_LMA), 2, "efer: LMA"),
    "LMA without PAE":      (with_fields("prot64", cr4=0), 2, "cr4: LMA"),
    "PCIDE":                (with_fields("prot32", cr4=cr.X86_CR4_PCIDE), 2, "cr4: PCIDE"),
    "CR8":                  (with_fields("prot64", cr8=16), 2, "cr8"),
    "RFLAGS bit 1":         (FLAT["prot32"], 0, "rflags: bit 1"),
    "RFLAGS reserved":      (FLAT["prot32"], 0xA, "rflags: a reserved bit"),
    "VM in long mode":      (FLAT["prot64"], 0x20002, "rflags: VM"),
    "GDTR":                 (with_fields("prot64", gdtr=TableRegister(1 << 47, 0)), 2, "gdtr.base"),
    "vm86 base":            (with_seg("vm86", "ds", base=1), 0x20002, "seg.ds.base"),
    "vm86 rights":          (with_seg("vm86", "fs", dpl=0), 0x20002, "seg.fs"),
    "CS absent":            (with_seg("prot32", "cs", p=0), 2, "seg.cs: not a present"),
    "CS data":              (with_seg("prot32", "cs", type=3), 2, "seg.cs.type: a data"),
    "CS not accessed":      (with_seg("prot32", "cs", type=10), 2, "seg.cs.type: not"),
    "CS dpl":               (with_seg("prot32", "cs", dpl=1), 2, "seg.cs.dpl: is not"),
    "CS conforming":        (with_seg("prot32", "cs", type=15, dpl=1), 2, "seg.cs.dpl: conforming"),
    "CS L and D":           (with_seg("prot64", "cs", db=1), 2, "seg.cs.db"),
    "SS dpl":               (with_seg("prot32", "ss", dpl=1), 2, "seg.ss.dpl"),
    "SS rpl":               (with_seg("prot32", "ss", sel=0x29), 2, "seg.ss.sel"),
    "SS read-only":         (with_seg("prot32", "ss", type=1), 2, "seg.ss.type"),
    "SS unusable":          (with_seg("prot32", "ss", p=0), 2, "seg.ss: unusable"),
    "SS dpl in real mode":  (with_seg("real", "ss", dpl=3), 2, "seg.ss.dpl: not 0"),
    "DS not accessed":      (with_seg("prot32", "ds", type=2), 2, "seg.ds.type: not"),
    "DS execute-only":      (with_seg("prot32", "ds", type=9), 2, "seg.ds.type: code"),
    "DS rpl":               (with_seg("prot32", "ds", sel=0x2B), 2, "seg.ds.dpl"),
    "G with a byte limit":  (with_seg("prot32", "es", limit=0x1000), 2, "seg.es.limit: does not"),
    "byte limit too large": (with_seg("prot32", "es", g=0), 2, "seg.es.limit: above"),
    "high base":            (with_seg("prot64", "es", base=1 << 32), 2, "seg.es.base: above"),
    "non-canonical base":   (with_seg("prot64", "gs", base=1 << 47), 2, "seg.gs.base: not canonical"),
    "TR not busy":          (with_seg("prot32", "tr", type=9), 2, "seg.tr: not"),
    "TR 16-bit":            (with_seg("prot64", "tr", type=3), 2, "seg.tr: not"),
    "TR in the LDT":        (with_seg("prot32", "tr", sel=0x54), 2, "seg.tr.sel"),
    "LDTR type":            (with_seg("prot32", "ldtr", type=3), 2, "seg.ldtr.type"),
    "LDTR in the LDT":      (with_seg("prot32", "ldtr", sel=0x74), 2, "seg.ldtr.sel"),
}  # fmt: skip


@pytest.mark.parametrize(("system", "rflags", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_states_are_noticed(system, rflags, message):
    assert any(problem.startswith(message) for problem in check_system(system, rflags))


def test_descriptors_that_disagree_are_noticed():
    case = build_case("prot32", b"\x90")
    changed = with_seg("prot32", "ds", base=16)
    assert check_descriptors(changed, 2, case.mem) == ["seg.ds: differs from its descriptor in the GDT"]
    beyond = with_seg("prot32", "ds", sel=0x1000)
    assert check_descriptors(beyond, 2, case.mem) == ["seg.ds.sel: beyond the limit of the GDT"]


def test_paragraph_segments():
    assert segment_paragraph(0xF000).base == 0xF0000
    assert (segment_paragraph(1, vm86=True, code=True).type, segment_paragraph(1, code=True).type) == (3, 11)


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_catalogue_states_are_consistent(entry):
    case = entry.case
    assert check_system(case.system, case.rflags) == []
    assert check_descriptors(case.system, case.rflags, case.mem) == []
    assert case.id == entry.name
    assert entry.reason
    assert "\n" not in entry.reason


def test_catalogue_has_all_modes_and_no_name_twice():
    assert len(catalogue()) == len(entries()) >= 30
    assert {case.mode for case in catalogue().values()} == set(MODES)

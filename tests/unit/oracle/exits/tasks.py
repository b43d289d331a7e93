"""A protected-mode machine with tasks to switch to; TSSs as SDM Vol. 3A Figures 7-2 and 7-10 have them."""

from __future__ import annotations

import struct

import msgspec

from emufuzz.arch.descriptors import DescStruct
from emufuzz.case.build import build_case, build_system
from emufuzz.case.model import Segment, TableRegister, case_pages
from emufuzz.case.segments import descriptor_bytes, segment_code, segment_data

GDT, OLD, NEW32, NEW16, LDT = 0x8000, 0x9000, 0x9100, 0x9200, 0x9300
CODE, STACK, BUSY32, FREE32, FREE16, TABLE, OLD_TR, CODE3, ABSENT = range(0x10, 0x58, 8)
CALL, IRET, JMP, GATE = (n << 30 for n in range(4))
RIP, FLAGS, CR3 = 0x6100, 0x202, 0x1234000
REGS = (0xA0A0A0A0, 0xB1B1B1B1, 0xC2C2C2C2, 0xD3D3D3D3, 0xC700, 0xF5F5F5F5, 0x66666666, 0x77777777)


def system_segment(kind, base, limit, *, present=1):
    return DescStruct(base, limit, kind, 0, 0, present).pack()


def gdt(old_type):
    rows = {
        CODE: descriptor_bytes(segment_code(CODE)),
        STACK: descriptor_bytes(segment_data(STACK)),
        BUSY32: system_segment(11, NEW32, 0x67),
        FREE32: system_segment(9, NEW32, 0x67),
        FREE16: system_segment(1, NEW16, 0x2B),
        TABLE: system_segment(2, LDT, 0x7F),
        OLD_TR: system_segment(old_type, OLD, 0x67),
        CODE3: descriptor_bytes(segment_code(CODE3 | 3, dpl=3)),
        ABSENT: descriptor_bytes(msgspec.structs.replace(segment_data(ABSENT), p=0)),
    }
    table = bytearray(0x100)
    for selector, row in rows.items():
        table[selector : selector + 8] = row
    return bytes(table)


def tss32(selectors, ldt=0, flags=FLAGS, trap=0):
    """Back link, three stacks, CR3, EIP, EFLAGS, registers, ES CS SS DS FS GS, LDT, T."""
    return struct.pack("<26I", 0x99, *(0,) * 6, CR3, RIP, flags, *REGS, *selectors, ldt, trap)


def tss16(selectors, ldt=0, flags=FLAGS):
    low = [value & 0xFFFF for value in (RIP, flags, *REGS)]
    return struct.pack("<22H", 0x99, *(0,) * 6, *low, *selectors, ldt)


GOOD = (STACK, CODE, STACK, STACK, 0, 0)


def task_case(qualification, *, selectors=GOOD, ldt=0, flags=FLAGS, trap=0, old_type=11, rflags=0, **kvm):
    """A task switch from a NOP at 6000H in protected mode, of 32 bits, without paging."""
    tr = Segment(OLD_TR, OLD, 0x67, old_type, p=1)
    system = msgspec.structs.replace(
        build_system("prot32", 0, tr=tr), gdtr=TableRegister(GDT, 0xFF), cr0=0x11, cr4=0, cr3=0
    )
    page = {GDT: gdt(old_type), OLD: bytes(0x100)}
    page[OLD] = bytes(0x100) + tss32(selectors, ldt, flags, trap).ljust(0x100, b"\0")
    page[OLD] += tss16(selectors[:4], ldt, flags)
    case = build_case("prot32", b"\x90", system=system, data=page, flags=rflags, rax=0x11, rdi=0x77)
    exit_of = {"exit_qualification": qualification, "instruction_length": 2, **kvm}
    return msgspec.structs.replace(case, path="task-switch", extra={"kvm": exit_of})


def memory(case, outcome, address, size):
    """A number in memory afterwards."""
    page = outcome.pages.get(address >> 12) or case_pages(case)[address >> 12]
    return int.from_bytes(page[address & 0xFFF : (address & 0xFFF) + size], "little")

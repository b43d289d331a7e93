"""A case as the rules see it: privilege, the instruction's accesses, operands, descriptors.

Everything is worked out when first asked for, from the case and from iced's decoding alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple

from iced_x86 import OpKind, RegisterExt

from emufuzz.arch.cr import EFER_LMA, X86_CR0_AM, X86_CR0_PG
from emufuzz.arch.descriptors import DESC_CODE, DESC_EXPAND_DOWN, DESC_READABLE, DESC_WRITABLE
from emufuzz.arch.linear import is_canonical, linear_bits
from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_SREG_CS, VCPU_SREG_DS, VCPU_SREG_LDTR, VCPU_SREG_SS
from emufuzz.arch.rflags import X86_EFLAGS_AC, X86_EFLAGS_IOPL
from emufuzz.case.devices import devices_of
from emufuzz.case.model import (
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    Case,
    Segment,
    case_pages,
    code_address,
    is_physical,
)
from emufuzz.case.translate import translate
from emufuzz.oracle.instruction import outside_limit
from emufuzz.oracle.page_tables import READ_ONLY
from emufuzz.oracle.rules.decoded import MAX_INSTRUCTION, Decoded, Reference, decoded

MASK32: Final = 0xFFFFFFFF
MASK64: Final = (1 << 64) - 1
_LIMIT_4G: Final = 0xFFFFFFFF


class Access(NamedTuple):
    """One memory access of a case; `linear` is the address of its first byte."""

    reference: Reference
    offset: int
    linear: int
    size: int


class View:
    """A case with its instruction.

    Attributes:
        case, system: The case.
        long, real, vm86: 64-bit, real and virtual-8086 mode; `protected` is neither of the latter.
        cpl: 0 in real mode, 3 in virtual-8086 mode, else SS.DPL.
        flat: Memory is linear, and a page that the case does not have is #PF.
        bits: How CS makes the processor decode: 16, 32 or 64.
        insn: The encoding.
        slots: The memory slots that KVM has got, None if all of the case's pages are memory.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.system = system = case.system
        self.long = case.mode == "prot64"
        self.real = case.mode == "real"
        self.vm86 = case.mode == "vm86"
        self.protected = not (self.real or self.vm86)
        self.cpl = 0 if self.real else 3 if self.vm86 else system.seg[VCPU_SREG_SS].dpl
        self.flat = case.extra is None or not is_physical(case)
        self._device_pages: frozenset[int] = (
            devices_of(case).page_numbers() if case.extra is not None else frozenset()
        )
        self._accesses: tuple[Access, ...] | None = None
        self.cs: Segment = system.seg[VCPU_SREG_CS]
        self.bits = 64 if self.long else 32 if self.cs.db else 16
        self.slots: Sequence[Mapping[str, Any]] | None = None
        self.insn: Decoded = decoded(case.code[:MAX_INSTRUCTION], self.bits)
        if self.insn.truncated:
            self.insn = decoded(self._fetched(), self.bits)

    # What surrounds the instruction

    @property
    def iopl(self) -> int:
        """RFLAGS.IOPL."""
        return (self.case.rflags & X86_EFLAGS_IOPL) >> 12

    @property
    def ia32e(self) -> bool:
        """IA-32e mode, in either of its submodes."""
        return bool(self.system.efer & EFER_LMA)

    @property
    def paged(self) -> bool:
        """The guest's own page tables decide which accesses fault."""
        return is_physical(self.case) and bool(self.system.cr0 & X86_CR0_PG)

    def canonical(self, address: int) -> bool:
        """SDM Vol. 1 3.3.7.1, 48 bits or 57 with CR4.LA57."""
        return is_canonical(address, linear_bits(self.system.cr4))

    # Memory

    @cached_property
    def pages(self) -> dict[int, bytes]:
        """The case's pages, linear or physical."""
        return case_pages(self.case)

    def absent(self, linear: int) -> bool:
        """Flat memory: nothing is at this address, so that an access is #PF."""
        number = linear >> PAGE_SHIFT
        known = number in self._page_numbers or number in self._device_pages
        return self.flat and not known and self._slot(linear) is None

    @cached_property
    def _page_numbers(self) -> Any:
        """Pages of flat memory, without laying the code over them."""
        case = self.case
        first = code_address(case) >> PAGE_SHIFT
        last = code_address(case) + max(len(case.code), 1) - 1 >> PAGE_SHIFT
        pages = case.mem.pages
        if first in pages and last in pages:
            return pages
        return pages.keys() | set(range(first, last + 1))

    def keeps(self, place: int) -> bool:
        """What is written to a physical address is in memory then, and not on its way to userspace."""
        if self.slots is None:
            return True
        slot = self._slot(place)
        return slot is not None and not slot.get("flags", 0) & READ_ONLY

    def _slot(self, place: int) -> Mapping[str, Any] | None:
        """The memory slot at a physical address, which may have more pages than the case shows."""
        return next((s for s in self.slots or () if s["base"] <= place < s["base"] + s["size"]), None)

    def read(self, linear: int, size: int) -> bytes | None:
        """Bytes of memory; None if any of them cannot be read, or belongs to a device."""
        data = b""
        mask = MASK64 if self.long else MASK32
        while size > 0:
            place: int | None = linear
            if not self.flat:
                system = self.system
                place = translate(self.pages, system.cr0, system.cr3, system.cr4, system.efer, linear)
            page = None if place is None else self.pages.get(place >> PAGE_SHIFT)
            if page is None or place is None or (place >> PAGE_SHIFT) in self._device_pages:
                return None
            part = min(size, PAGE_SIZE - (place & PAGE_MASK))
            data += page[place & PAGE_MASK : (place & PAGE_MASK) + part]
            linear, size = linear + part & mask, size - part
        return data

    def number(self, linear: int, size: int) -> int | None:
        """`read` as an unsigned number."""
        data = self.read(linear, size)
        return None if data is None else int.from_bytes(data, "little")

    def _fetched(self) -> bytes:
        """Up to 15 bytes from RIP on, as far as there is memory."""
        at, data = code_address(self.case), b""
        for place in range(MAX_INSTRUCTION):
            byte = self.read(at + place & (MASK64 if self.long else MASK32), 1)
            if byte is None:
                break
            data += byte
        return data

    # Accesses

    @property
    def accesses(self) -> tuple[Access, ...]:
        """Every data access that the encoding names; of a REP instruction that of the first iteration."""
        if self._accesses is None:  # a cached_property costs more than this
            insn = self.insn
            none = not insn.references or (insn.repeats and not self.count)
            self._accesses = () if none else tuple(self._access(each) for each in insn.references)
        return self._accesses

    def _access(self, reference: Reference) -> Access:
        gpr = self.case.gpr
        offset = reference.displacement
        for number, mask, scale in reference.parts:
            offset += (gpr[number] & mask) * scale
        if reference.relative:
            offset += self.case.rip
        if reference.explicit and self.insn.bit_string:
            offset += self._bit_offset()
        offset &= (1 << (reference.bits or self.stack_bits)) - 1
        if not self.long and self._unsure(self.system.seg[reference.segment]):
            reference = reference._replace(certain=False)
        linear = self.base(reference.segment) + offset & (MASK64 if self.long else MASK32)
        return Access(reference, offset, linear, reference.size)

    def _unsure(self, seg: Segment) -> bool:
        """A segment of which the SDM does not say what it allows, as one that real mode cannot have."""
        return impossible(seg) or not (self.protected or (seg.p and seg.type & 0xE in {2, 10}))

    def _bit_offset(self) -> int:
        """How far BT, BTS, BTR or BTC reaches from its memory operand (SDM Vol. 2A BT)."""
        register = self.insn.lax.op1_register
        bits = RegisterExt.size(register) * 8
        value = self.register(register)
        value -= (value >> bits - 1) << bits
        return value // bits * (bits // 8)

    @cached_property
    def stack_bits(self) -> int:
        """Width of the stack pointer."""
        return 64 if self.long else 32 if self.system.seg[VCPU_SREG_SS].db else 16

    def base(self, segment: int) -> int:
        """Segment base as linear addresses count it."""
        return 0 if self.long and segment <= VCPU_SREG_DS else self.system.seg[segment].base

    @property
    def address_bits(self) -> int:
        """Address size of the instruction: 16, 32 or 64."""
        small = 0x67 in self.insn.prefixes
        if self.long:
            return 32 if small else 64
        return 32 if (self.bits == 32) != small else 16

    @property
    def count(self) -> int:
        """RCX, ECX or CX, as the address size says."""
        return self.case.gpr[VCPU_REGS_RCX] & (1 << self.address_bits) - 1

    def outside(self, access: Access) -> bool:
        """The segment's limit forbids the access; one that a 4 GiB segment cannot hold may or may not."""
        seg = self.system.seg[access.reference.segment]
        return outside_limit(seg, access.offset, access.size) and not self.wraps(access)

    def wraps(self, access: Access) -> bool:
        """The access runs over the end of 4 GiB, where the SDM leaves open what happens (Vol. 3A 5.3)."""
        if self.long:
            return False
        seg = self.system.seg[access.reference.segment]
        return seg.limit == _LIMIT_4G and access.offset + max(access.size, 1) > 1 << 32

    def wrong_type(self, access: Access) -> bool:
        """The segment's type forbids the access."""
        seg, reference = self.system.seg[access.reference.segment], access.reference
        if reference.write and (seg.type & DESC_CODE or not seg.type & DESC_WRITABLE):
            return True
        return bool(reference.read and seg.type & DESC_CODE and not seg.type & DESC_READABLE)

    def segment_allows(self, access: Access) -> bool:
        """Neither presence, type, limit nor canonical form forbids the access."""
        if self.long:
            last = access.linear + max(access.size, 1) - 1 & MASK64
            return self.canonical(access.linear) and self.canonical(last)
        seg = self.system.seg[access.reference.segment]
        if impossible(seg) or (self.protected and (not seg.p or self.wrong_type(access))):
            return False
        return not outside_limit(seg, access.offset, access.size)

    # Operands

    @property
    def smooth(self) -> bool:
        """Every access may happen, for all that segments, alignment and pages say."""
        for access in self.accesses:
            linear, size = access.linear, access.size
            if size > 1 and linear & (size & -size) - 1 and (size >= 16 or self._checks_alignment):
                return False
            if not self.segment_allows(access) or self.absent(linear):
                return False
            if (linear & PAGE_MASK) + size > PAGE_SIZE:
                return False
        return True

    @property
    def _checks_alignment(self) -> bool:
        case = self.case
        return bool(self.cpl == 3 and self.system.cr0 & X86_CR0_AM and case.rflags & X86_EFLAGS_AC)

    def register(self, register: Any) -> int:
        """Value of a general-purpose register of any width."""
        full = self.case.gpr[RegisterExt.number(RegisterExt.full_register(register))]
        size = RegisterExt.size(register)
        high = size == 1 and 5 <= register <= 8  # AH, CH, DH, BH in iced's numbering
        return (full >> 8 if high else full) & (1 << size * 8) - 1

    def operand(self, place: int, size: int | None = None) -> int | None:
        """Value of an operand; None if it is in memory that cannot be read, or of another kind."""
        lax = self.insn.lax
        kind = lax.op_kind(place)
        if kind == OpKind.REGISTER:
            register = lax.op_register(place)
            return self.register(register) if RegisterExt.is_gpr(register) else None
        if kind == OpKind.MEMORY:
            access = self.explicit
            if access is None or not self.segment_allows(access):
                return None
            return self.number(access.linear, size or access.size)
        return int(lax.immediate(place)) if kind in _IMMEDIATES else None

    @cached_property
    def explicit(self) -> Access | None:
        """The access that ModRM names."""
        return next((access for access in self.accesses if access.reference.explicit), None)

    def stack_slot(self, number: int, size: int) -> int | None:
        """The `number`-th value of `size` bytes from the top of the stack; None if it cannot be read."""
        offset = self.case.gpr[4] + number * size & (1 << self.stack_bits) - 1
        stack = self.system.seg[VCPU_SREG_SS]
        if not self.long and (impossible(stack) or outside_limit(stack, offset, size)):
            return None
        linear = self.base(VCPU_SREG_SS) + offset & (MASK64 if self.long else MASK32)
        return self.number(linear, size)

    # Descriptors

    def table(self, selector: int) -> tuple[int, int] | None:
        """Base and limit of the table that a selector is for; None without an LDT."""
        if not selector & 4:
            return self.system.gdtr.base, self.system.gdtr.limit
        ldt = self.system.seg[VCPU_SREG_LDTR]
        return (ldt.base, ldt.limit) if ldt.p else None

    def inside_table(self, selector: int, size: int = 8) -> bool:
        """The descriptor lies within the limit of its table."""
        table = self.table(selector)
        return table is not None and (selector & 0xFFF8) + size - 1 <= table[1]

    def descriptor(self, selector: int, size: int = 8) -> bytes | None:
        """The bytes of a descriptor; None if it is outside of its table or cannot be read."""
        table = self.table(selector)
        if table is None or not self.inside_table(selector, size):
            return None
        mask = MASK64 if self.ia32e else MASK32
        return self.read(table[0] + (selector & 0xFFF8) & mask, size)


def impossible(seg: Segment) -> bool:
    """A limit that no descriptor has: above 1 MiB, and not the last byte of a page."""
    return bool(seg.limit >> 20) and seg.limit & PAGE_MASK != PAGE_MASK


_IMMEDIATES: Final = frozenset(
    (
        OpKind.IMMEDIATE8,
        OpKind.IMMEDIATE16,
        OpKind.IMMEDIATE32,
        OpKind.IMMEDIATE64,
        OpKind.IMMEDIATE8TO16,
        OpKind.IMMEDIATE8TO32,
        OpKind.IMMEDIATE8TO64,
        OpKind.IMMEDIATE32TO64,
    )
)

__all__ = ["DESC_EXPAND_DOWN", "Access", "View"]

"""The state-save area of system-management mode: where each register lies in its 512 bytes.

KVM: struct kvm_smram_state_64, kvm_smram_state_32. Offsets are those from SMBASE. The 64-bit image is
AMD's (APM Vol. 2 Table 10-1) whatever the vendor, the 32-bit one Intel's of the P6 (SDM Vol. 3C
Table 32-1 has its documented part); `int_shadow` is KVM's own addition.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.regs import (
    VCPU_SREG_CS,
    VCPU_SREG_DS,
    VCPU_SREG_ES,
    VCPU_SREG_FS,
    VCPU_SREG_GS,
    VCPU_SREG_LDTR,
    VCPU_SREG_SS,
    VCPU_SREG_TR,
)
from emufuzz.kvm.vcpu import KvmSegment

SMRAM_OFFSET: Final = 0xFE00
SMRAM_SIZE: Final = 512

# fmt: off
#: Segments of the 64-bit image: selector (16 bits), attributes (16), limit (32), base (64).
SEGMENTS_64: Final = {
    VCPU_SREG_ES: 0xFE00, VCPU_SREG_CS: 0xFE10, VCPU_SREG_SS: 0xFE20, VCPU_SREG_DS: 0xFE30,
    VCPU_SREG_FS: 0xFE40, VCPU_SREG_GS: 0xFE50, VCPU_SREG_LDTR: 0xFE70, VCPU_SREG_TR: 0xFE90,
}
GDTR_64:       Final = 0xFE60
IDTR_64:       Final = 0xFE80
INT_SHADOW_64: Final = 0xFECB
EFER_64:       Final = 0xFED0
REVISION_64:   Final = 0xFEFC
SMBASE_64:     Final = 0xFF00
CR4_64:        Final = 0xFF48
CR3_64:        Final = 0xFF50
CR0_64:        Final = 0xFF58
DR7_64:        Final = 0xFF60
DR6_64:        Final = 0xFF68
RFLAGS_64:     Final = 0xFF70
RIP_64:        Final = 0xFF78
GPRS_64:       Final = 0xFF80  # R15 first

#: Segments of the 32-bit image: (selector; attributes, limit, base), all of 32 bits.
SEGMENTS_32: Final = {
    VCPU_SREG_ES: (0xFFA8, 0xFF84), VCPU_SREG_CS:   (0xFFAC, 0xFF90), VCPU_SREG_SS: (0xFFB0, 0xFF9C),
    VCPU_SREG_DS: (0xFFB4, 0xFF2C), VCPU_SREG_FS:   (0xFFB8, 0xFF38), VCPU_SREG_GS: (0xFFBC, 0xFF44),
    VCPU_SREG_TR: (0xFFC4, 0xFF5C), VCPU_SREG_LDTR: (0xFFC0, 0xFF78),
}
IDTR_32:       Final = 0xFF50
GDTR_32:       Final = 0xFF6C
SMBASE_32:     Final = 0xFEF8
REVISION_32:   Final = 0xFEFC
CR4_32:        Final = 0xFF14
INT_SHADOW_32: Final = 0xFF1A
DR7_32:        Final = 0xFFC8
DR6_32:        Final = 0xFFCC
GPRS_32:       Final = 0xFFD0  # EAX first
EIP_32:        Final = 0xFFF0
EFLAGS_32:     Final = 0xFFF4
CR3_32:        Final = 0xFFF8
CR0_32:        Final = 0xFFFC
# fmt: on

# Within a segment or table register, of both images
_LIMIT: Final = 4
_BASE: Final = 8


class Smram:
    """A state-save area; offsets are those from SMBASE."""

    __slots__ = ("data",)

    def __init__(self, data: bytes = bytes(SMRAM_SIZE)) -> None:
        """ValueError unless `data` has SMRAM_SIZE bytes."""
        if len(data) != SMRAM_SIZE:
            raise ValueError(f"a state-save area has {SMRAM_SIZE} bytes, not {len(data)}")
        self.data = bytearray(data)

    def get(self, offset: int, size: int) -> int:
        """An unsigned number of `size` bytes."""
        start = offset - SMRAM_OFFSET
        return int.from_bytes(self.data[start : start + size], "little")

    def put(self, offset: int, size: int, value: int) -> None:
        """Store the low `size` bytes of a number."""
        start = offset - SMRAM_OFFSET
        self.data[start : start + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def table_64(self, offset: int) -> tuple[int, int]:
        """(base, limit) of GDTR or IDTR."""
        return self.get(offset + _BASE, 8), self.get(offset + _LIMIT, 4)

    def table_32(self, offset: int) -> tuple[int, int]:
        """(base, limit) of GDTR or IDTR."""
        return self.get(offset + _BASE, 4), self.get(offset + _LIMIT, 4)

    def put_table_64(self, offset: int, base: int, limit: int) -> None:
        """Save GDTR or IDTR."""
        self.put(offset + _LIMIT, 4, limit)
        self.put(offset + _BASE, 8, base)

    def put_table_32(self, offset: int, base: int, limit: int) -> None:
        """Save GDTR or IDTR."""
        self.put(offset + _LIMIT, 4, limit)
        self.put(offset + _BASE, 4, base)

    def segment_64(self, seg: int) -> KvmSegment:
        """A segment register; its limit is in bytes."""
        offset = SEGMENTS_64[seg]
        flags = self.get(offset + 2, 2) << 8
        limit, base = self.get(offset + _LIMIT, 4), self.get(offset + _BASE, 8)
        return _segment(self.get(offset, 2), flags, limit, base)

    def segment_32(self, seg: int) -> KvmSegment:
        """A segment register; 16 bits of its selector count."""
        selector, offset = SEGMENTS_32[seg]
        limit, base = self.get(offset + _LIMIT, 4), self.get(offset + _BASE, 4)
        return _segment(self.get(selector, 2), self.get(offset, 4), limit, base)

    def put_segment_64(self, seg: int, var: KvmSegment) -> None:
        """Save a segment register."""
        offset = SEGMENTS_64[seg]
        self.put(offset, 2, var.selector)
        self.put(offset + 2, 2, segment_flags(var) >> 8)
        self.put(offset + _LIMIT, 4, var.limit)
        self.put(offset + _BASE, 8, var.base)

    def put_segment_32(self, seg: int, var: KvmSegment) -> None:
        """Save a segment register."""
        selector, offset = SEGMENTS_32[seg]
        self.put(selector, 4, var.selector)
        self.put(offset, 4, segment_flags(var))
        self.put(offset + _LIMIT, 4, var.limit)
        self.put(offset + _BASE, 4, var.base)


def segment_flags(var: KvmSegment) -> int:
    """Attributes as in the high word of a descriptor (KVM: enter_smm_get_segment_flags)."""
    return (
        var.g << 23
        | var.db << 22
        | var.l << 21
        | var.avl << 20
        | var.present << 15
        | var.dpl << 13
        | var.s << 12
        | var.type << 8
    )


def _segment(selector: int, flags: int, limit: int, base: int) -> KvmSegment:
    """KVM: rsm_set_desc_flags; what is not present is unusable."""
    present = flags >> 15 & 1
    return KvmSegment(
        selector=selector,
        base=base,
        limit=limit,
        type=flags >> 8 & 15,
        s=flags >> 12 & 1,
        dpl=flags >> 13 & 3,
        present=present,
        avl=flags >> 20 & 1,
        l=flags >> 21 & 1,
        db=flags >> 22 & 1,
        g=flags >> 23 & 1,
        unusable=1 - present,
    )

"""CPUX86State images of a System, and back.

Paging is always on in an image (see `memory`): CR0, CR3, CR4 and EFER of the image serve the
hidden page tables, and only what an instruction changed in them is carried over to the System that
the outcome shows. Not so with physical memory: its images have the registers of the case.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec

from emufuzz.arch.cr import (
    EFER_LMA,
    EFER_NX,
    X86_CR0_EM,
    X86_CR0_MP,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR0_TS,
    X86_CR0_WP,
    X86_CR4_LA57,
    X86_CR4_OSFXSR,
    X86_CR4_PAE,
    X86_CR4_PCIDE,
    X86_CR4_SMAP,
    X86_CR4_SMEP,
)
from emufuzz.arch.regs import VCPU_SREG_CS, VCPU_SREG_DS, VCPU_SREG_ES, VCPU_SREG_SS
from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_VM
from emufuzz.case.model import Fpu, Segment, System, TableRegister
from emufuzz.oracle.unicorn.layout import HF_CS32, HF_CS64, HF_LMA, HF_PE, HF_SS32, Layout
from emufuzz.oracle.unicorn.memory import AddressSpace

HF_INHIBIT_IRQ: Final = 1 << 3
_HF_SOFTMMU: Final = 1 << 2
_HF_ADDSEG: Final = 1 << 6
_HF_MP_SHIFT: Final = 8  # CR0.MP, EM, TS (bits 1 to 3) are hflags 9 to 11
_HF_OSFXSR: Final = 1 << 22
_HF_SMAP: Final = 1 << 23

_SEGMENT: Final = struct.Struct("<I4xQII")
_SEGMENT_SIZE: Final = 24
#: Offset of CS.base from the first segment register.
CS_BASE_OFFSET: Final = _SEGMENT_SIZE + 8
# Where CPUX86State keeps the registers es cs ss ds fs gs tr ldtr: LDTR comes before TR.
_SLOT: Final = (0, 1, 2, 3, 4, 5, 7, 6)

HIDDEN_CR0: Final = X86_CR0_PG | X86_CR0_WP
HIDDEN_CR4: Final = X86_CR4_PAE | X86_CR4_LA57 | X86_CR4_PCIDE | X86_CR4_SMEP | X86_CR4_SMAP


class Template:
    """What a System looks like to Unicorn in one mode.

    Attributes:
        image: All of CPUX86State but the GPRs, RIP, RFLAGS and CR3.
        masked_flags: RFLAGS bits that the guest does not get to see.
        code_base: Added to RIP for the linear address of the code.
        address_mask: Width of linear addresses.
        user: CPL is 3.
        physical: Memory is physical, and the case's own registers decide on paging.
        joined: The last root of page tables that `join` was asked for, and what it gave.
    """

    __slots__ = (
        "_paging", "address_mask", "code_base", "image", "joined", "masked_flags", "mode", "physical",
        "system", "user",
    )  # fmt: skip

    def __init__(
        self, layout: Layout, pristine: bytes, system: System, mode: str, *, physical: bool = False
    ) -> None:
        self.system = system
        self.mode = mode
        self.physical = physical
        self.masked_flags = X86_EFLAGS_RF if mode == "vm86" else X86_EFLAGS_RF | X86_EFLAGS_VM
        long_mode = mode == "prot64"
        self.code_base = 0 if long_mode else system.seg[VCPU_SREG_CS].base
        self.address_mask = (1 << 64) - 1 if long_mode else 0xFFFFFFFF
        self.user = cpl_of(system, mode) == 3
        lma = bool(system.efer & EFER_LMA) and mode not in {"real", "vm86"}
        self._paging = "pae" if not lma else "la57" if system.cr4 & X86_CR4_LA57 else "long"
        self.image = _build(layout, pristine, system, mode, lma)
        if physical:
            self.image = _with_own_paging(self.image, layout, system)
        self.joined: tuple[int, bytes, bytes, bytes] = (-1, b"", b"", b"")

    def cr3(self, space: AddressSpace) -> int:
        """The root of the page tables for this mode."""
        if self.physical:
            return self.system.cr3
        if self._paging == "pae":
            return space.cr3_pae
        return space.cr3_long if self._paging == "long" else space.cr3_la57()

    def join(self, layout: Layout, cr3: int) -> tuple[int, bytes, bytes, bytes]:
        """CR3, the image with it, and its parts from hflags to the FPU and from there to error_code."""
        if self.joined[0] != cr3:
            place = layout.cr + 24
            image = self.image[:place] + cr3.to_bytes(8, "little") + self.image[place + 8 :]
            fpu = image[layout.fpstt : layout.error_code]
            self.joined = (cr3, image, image[layout.hflags : layout.fpstt], fpu)
        return self.joined


def cpl_of(system: System, mode: str) -> int:
    """The privilege level, as docs/case-format.md has it: 0 in real mode, 3 in vm86, else SS.DPL."""
    if mode == "real":
        return 0
    return 3 if mode == "vm86" else system.seg[VCPU_SREG_SS].dpl


def _attributes(seg: Segment) -> int:
    """The second word of a descriptor, without base and limit."""
    return (
        seg.type << 8
        | seg.s << 12
        | seg.dpl << 13
        | seg.p << 15
        | seg.avl << 20
        | seg.l << 21
        | seg.db << 22
        | seg.g << 23
    )


def _segment(state: memoryview | bytes, offset: int) -> Segment:
    sel, base, limit, attributes = _SEGMENT.unpack_from(state, offset)
    return Segment(
        sel=sel,
        base=base,
        limit=limit,
        type=attributes >> 8 & 15,
        s=attributes >> 12 & 1,
        dpl=attributes >> 13 & 3,
        p=attributes >> 15 & 1,
        avl=attributes >> 20 & 1,
        l=attributes >> 21 & 1,
        db=attributes >> 22 & 1,
        g=attributes >> 23 & 1,
    )


def _hflags(system: System, mode: str, lma: bool) -> int:
    """The summary of the mode that the translator goes by."""
    cs, ss = system.seg[VCPU_SREG_CS], system.seg[VCPU_SREG_SS]
    hflags = _HF_SOFTMMU | cpl_of(system, mode)
    hflags |= (system.cr0 & (X86_CR0_MP | X86_CR0_EM | X86_CR0_TS)) << _HF_MP_SHIFT
    hflags |= _HF_OSFXSR if system.cr4 & X86_CR4_OSFXSR else 0
    hflags |= HF_PE if system.cr0 & X86_CR0_PE else 0
    hflags |= HF_LMA if lma else 0
    if mode == "prot64":
        return hflags | HF_CS32 | HF_SS32 | HF_CS64
    hflags |= (HF_CS32 if cs.db else 0) | (HF_SS32 if ss.db else 0)
    bases = ss.base | system.seg[VCPU_SREG_DS].base | system.seg[VCPU_SREG_ES].base
    flat = mode not in {"real", "vm86"} and cs.db and not bases
    return hflags if flat else hflags | _HF_ADDSEG


def _build(layout: Layout, pristine: bytes, system: System, mode: str, lma: bool) -> bytes:
    image = bytearray(pristine)
    for number, seg in enumerate(system.seg):
        offset = layout.segs + _SLOT[number] * _SEGMENT_SIZE
        base = 0 if mode == "prot64" and number == VCPU_SREG_CS else seg.base
        _SEGMENT.pack_into(image, offset, seg.sel, base, seg.limit, _attributes(seg))
    for offset, table in ((layout.gdtr, system.gdtr), (layout.idtr, system.idtr)):
        _SEGMENT.pack_into(image, offset, 0, table.base, table.limit, 0)
    struct.pack_into("<I", image, layout.hflags, _hflags(system, mode, lma))
    cr4 = system.cr4 & ~HIDDEN_CR4 | X86_CR4_PAE
    if lma:
        cr4 |= system.cr4 & X86_CR4_LA57
    cr0 = system.cr0 | HIDDEN_CR0
    struct.pack_into("<5Q", image, layout.cr, cr0, 0, system.cr2, 0, cr4)
    struct.pack_into("<Q", image, layout.efer, system.efer | EFER_NX)
    struct.pack_into("<8Q", image, layout.dr, *system.dr)
    struct.pack_into("<Q", image, layout.xcr0, system.xcr0)
    for index, value in system.msr:
        if index in layout.msr:
            offset, size = layout.msr[index]
            image[offset : offset + size] = (value & (1 << size * 8) - 1).to_bytes(size, "little")
    struct.pack_into("<2i", image, layout.error_code, 0, 0)
    _put_fpu(image, layout, system.fpu)
    return bytes(image)


def _with_own_paging(image: bytes, layout: Layout, system: System) -> bytes:
    """The image with the paging registers of the case instead of those for hidden page tables."""
    own = bytearray(image)
    struct.pack_into("<5Q", own, layout.cr, system.cr0, 0, system.cr2, system.cr3, system.cr4)
    struct.pack_into("<Q", own, layout.efer, system.efer)
    (hflags,) = struct.unpack_from("<I", own, layout.hflags)
    hflags |= _HF_SMAP if system.cr4 & X86_CR4_SMAP else 0
    struct.pack_into("<I", own, layout.hflags, hflags)
    return bytes(own)


def _put_fpu(image: bytearray, layout: Layout, fpu: Fpu) -> None:
    top = fpu.fsw >> 11 & 7
    struct.pack_into("<I", image, layout.fpstt, top)
    struct.pack_into("<HH", image, layout.fpus, fpu.fsw & ~0x3800, fpu.fcw)
    struct.pack_into("<8B", image, layout.fptags, *(not fpu.ftw >> i & 1 for i in range(8)))
    for slot, value in enumerate(fpu.mm):
        # FXSAVE slots are relative to the top of the stack (SDM Vol. 1 10.5.1).
        struct.pack_into("<QH", image, layout.fpregs + (top + slot & 7) * 16, value, 0xFFFF)
    struct.pack_into("<I", image, layout.mxcsr, fpu.mxcsr)
    for number, value in enumerate(fpu.xmm):
        struct.pack_into("<QQ", image, layout.xmm + number * 64, value & 0xFFFFFFFFFFFFFFFF, value >> 64)


def _get_fpu(state: memoryview, layout: Layout) -> Fpu:
    (top,) = struct.unpack_from("<I", state, layout.fpstt)
    fpus, fpuc = struct.unpack_from("<HH", state, layout.fpus)
    tags = state[layout.fptags : layout.fptags + 8]
    quads = [struct.unpack_from("<QQ", state, layout.xmm + n * 64) for n in range(16)]
    return Fpu(
        fcw=fpuc,
        fsw=fpus & ~0x3800 | (top & 7) << 11,
        ftw=sum(1 << i for i in range(8) if not tags[i]),
        mxcsr=struct.unpack_from("<I", state, layout.mxcsr)[0],
        xmm=tuple(low | high << 64 for low, high in quads),
        mm=tuple(
            struct.unpack_from("<Q", state, layout.fpregs + (top + slot & 7) * 16)[0] for slot in range(8)
        ),
    )


def read_system(state: memoryview, layout: Layout, template: Template) -> System:
    """The System after a run: the case's own object if nothing visible changed."""
    before, image = template.system, template.image
    changes: dict[str, Any] = {}
    if _differs(state, image, layout.segs, 8 * _SEGMENT_SIZE):
        segs = tuple(_changed_segment(state, image, layout, n, seg) for n, seg in enumerate(before.seg))
        changes["seg"] = segs
    if _differs(state, image, layout.gdtr, _SEGMENT_SIZE):
        changes["gdtr"] = _table_register(state, layout.gdtr)
    if _differs(state, image, layout.idtr, _SEGMENT_SIZE):
        changes["idtr"] = _table_register(state, layout.idtr)
    for name, offset in (("cr0", layout.cr), ("cr4", layout.cr + 32), ("efer", layout.efer)):
        if _differs(state, image, offset, 8):
            changes[name] = getattr(before, name) ^ _difference(state, image, offset)
    if template.physical:
        changes["cr2"], changes["cr3"] = struct.unpack_from("<2Q", state, layout.cr + 16)
    if _differs(state, image, layout.dr, 64):
        changes["dr"] = struct.unpack_from("<8Q", state, layout.dr)
    if _differs(state, image, layout.xcr0, 8):
        (changes["xcr0"],) = struct.unpack_from("<Q", state, layout.xcr0)
    if before.msr:
        changes["msr"] = tuple((index, _msr(state, image, layout, index, old)) for index, old in before.msr)
    if _differs(state, image, layout.fpstt, layout.xmm + 16 * 64 - layout.fpstt):
        changes["fpu"] = _get_fpu(state, layout)
    if not changes:
        return before
    after = msgspec.structs.replace(before, **changes)
    return before if after == before else after


def paging_differs(state: memoryview, layout: Layout, image: bytes) -> bool:
    """Whether a run changed a register that decides how addresses are translated."""
    return _differs(state, image, layout.cr, 40) or _differs(state, image, layout.efer, 8)


def _differs(state: memoryview, image: bytes, offset: int, size: int) -> bool:
    return bytes(state[offset : offset + size]) != image[offset : offset + size]


def _changed_segment(
    state: memoryview, image: bytes, layout: Layout, number: int, before: Segment
) -> Segment:
    offset = layout.segs + _SLOT[number] * _SEGMENT_SIZE
    if bytes(state[offset : offset + _SEGMENT_SIZE]) == image[offset : offset + _SEGMENT_SIZE]:
        return before
    return _segment(state, offset)


def _msr(state: memoryview, image: bytes, layout: Layout, index: int, before: int) -> int:
    offset, size = layout.msr.get(index, (0, 0))
    if not size or not _differs(state, image, offset, size):
        return before
    return int.from_bytes(state[offset : offset + size], "little")


def _table_register(state: memoryview, offset: int) -> TableRegister:
    _, base, limit, _ = _SEGMENT.unpack_from(state, offset)
    return TableRegister(base, limit)


def _difference(state: memoryview, image: bytes, offset: int) -> int:
    (after,) = struct.unpack_from("<Q", state, offset)
    (before,) = struct.unpack_from("<Q", image, offset)
    return int(after ^ before)

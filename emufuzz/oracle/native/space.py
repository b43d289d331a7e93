"""What a case's System and Memory mean to the runner: selectors, LDT, pages, and what is refused."""

from __future__ import annotations

import struct
from typing import Final

from emufuzz.arch.cr import EFER_NX, X86_CR0_AM, X86_CR4_SMEP
from emufuzz.arch.descriptors import DESC_CODE, DESC_CONFORMING, DESC_READABLE, DESC_WRITABLE
from emufuzz.arch.exceptions import PFERR_FETCH, PFERR_PRESENT
from emufuzz.arch.regs import (
    SREG_NAMES,
    VCPU_SREG_CS,
    VCPU_SREG_DS,
    VCPU_SREG_ES,
    VCPU_SREG_FS,
    VCPU_SREG_GS,
    VCPU_SREG_SS,
)
from emufuzz.arch.rflags import X86_EFLAGS_AC
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import PAGE_SHIFT, Fpu, Memory, Segment, System
from emufuzz.oracle.native.host import lowest_page
from emufuzz.oracle.native.layout import FPU_SIZE, MAX_PAGES, USER_END

#: Modes whose code at CPL 3 runs in a 64-bit process.
MODES: Final = frozenset(("prot64", "compat32", "compat16", "prot32", "prot16"))
#: Selectors of 64-bit user code and of its stack on Linux.
_USER_CS, _USER_SS = 0x33, 0x2B
_IN_LDT_RPL3: Final = 7
_ORDER: Final = (VCPU_SREG_CS, VCPU_SREG_SS, VCPU_SREG_DS, VCPU_SREG_ES, VCPU_SREG_FS, VCPU_SREG_GS)
_SELECTORS: Final = struct.Struct("<6H")
_BYTES_LIMIT: Final = 0xFFFFF
_CANONICAL: Final = 1 << 47
_MXCSR_BITS: Final = 0xFFFF


class Setup:
    """A System in one mode, as the runner sets it up.

    Attributes:
        system: The System.
        ldt: Entries of the LDT, by segment register; empty in 64-bit mode.
        selectors: CS SS DS ES FS GS as COMMON has them.
        bases: FS and GS bases, for null selectors.
        fpu: The FXSAVE image.
        code_bits: 16, 32 or 64.
        code_base: Added to RIP for the linear address of the code.
        narrow_stack: SS is a 16-bit segment: the kernel spoils RSP above 32 bits.
        hidden_flags: RFLAGS bits that must not be set while the case runs.
        fault_mask: Bits of a #PF's error code that the case's own paging would give.
    """

    def __init__(self, system: System, mode: str) -> None:
        """Take a System apart.

        Raises:
            UnsupportedCaseError: code in ring 3 cannot have it.
        """
        _check(system, mode)
        self.system = system
        self.ldt: tuple[Segment | None, ...] = ()
        self.bases = (0, 0)
        if mode == "prot64":
            self.selectors = _SELECTORS.pack(_USER_CS, _USER_SS, 0, 0, 0, 0)
            self.bases = (_base(system, VCPU_SREG_FS), _base(system, VCPU_SREG_GS))
        else:
            self.ldt = tuple(_entry(system.seg[number], number) for number in range(6))
            self.selectors = _SELECTORS.pack(*(_selector(self.ldt, number) for number in _ORDER))
        long = mode == "prot64"
        self.fpu = fpu_image(system.fpu)
        self.code_bits = 64 if long else 32 if system.seg[VCPU_SREG_CS].db else 16
        self.code_base = 0 if long else system.seg[VCPU_SREG_CS].base
        self.narrow_stack = not long and not system.seg[VCPU_SREG_SS].db
        self.hidden_flags = 0 if system.cr0 & X86_CR0_AM else X86_EFLAGS_AC
        shows_fetch = system.efer & EFER_NX or system.cr4 & X86_CR4_SMEP
        self.fault_mask = ~PFERR_PRESENT if shows_fetch else ~(PFERR_PRESENT | PFERR_FETCH)


class Pages:
    """The pages of a Memory that a process can have.

    Attributes:
        lowest: Number of the lowest page that it can have.
        mapped: Numbers of those that it has.
        missing: Numbers of those that only a kernel can have: an access to them faults.
    """

    def __init__(self, memory: Memory) -> None:
        self.lowest, high = lowest_page(), USER_END >> PAGE_SHIFT
        self.mapped = frozenset(page for page in memory.pages if self.lowest <= page < high)
        self.missing = frozenset(memory.pages) - self.mapped
        if len(self.mapped) > MAX_PAGES - 2:
            raise UnsupportedCaseError(f"mem: native has room for {MAX_PAGES - 2} pages")


def fpu_image(fpu: Fpu) -> bytes:
    """The start of an FXSAVE image (SDM Vol. 1 Table 10-2), as processors store it."""
    head = struct.pack("<HHBBHQQII", fpu.fcw, fpu.fsw, fpu.ftw, 0, 0, 0, 0, fpu.mxcsr, 0)
    stack = b"".join(struct.pack("<QHHI", value, 0xFFFF, 0, 0) for value in fpu.mm)
    return (head + stack + b"".join(value.to_bytes(16, "little") for value in fpu.xmm)).ljust(FPU_SIZE, b"\0")


def read_fpu(image: bytes) -> Fpu:
    """The reverse of `fpu_image`."""
    fcw, fsw, ftw = struct.unpack_from("<HHB", image)
    (mxcsr,) = struct.unpack_from("<I", image, 24)
    quads = struct.unpack_from("<32Q", image, 160)
    return Fpu(
        fcw=fcw,
        fsw=fsw,
        ftw=ftw,
        mxcsr=mxcsr,
        xmm=tuple(quads[2 * n] | quads[2 * n + 1] << 64 for n in range(16)),
        mm=tuple(struct.unpack_from("<Q", image, 32 + 16 * n)[0] for n in range(8)),
    )


def _check(system: System, mode: str) -> None:
    if mode not in MODES:
        raise UnsupportedCaseError(f"mode: {mode} is not for user code under a 64-bit kernel")
    cpl = system.seg[VCPU_SREG_SS].dpl
    if cpl != 3:
        raise UnsupportedCaseError(f"seg.ss.dpl: native runs at CPL 3, got {cpl}")
    if system.fpu.mxcsr & ~_MXCSR_BITS:
        raise UnsupportedCaseError(f"fpu.mxcsr: {system.fpu.mxcsr:#x} has reserved bits")


def _base(system: System, number: int) -> int:
    base = system.seg[number].base
    if _CANONICAL <= base < (1 << 64) - _CANONICAL:
        raise UnsupportedCaseError(f"seg.{SREG_NAMES[number]}.base: {base:#x} is not canonical")
    return base


def _selector(ldt: tuple[Segment | None, ...], number: int) -> int:
    return 0 if ldt[number] is None else number << 3 | _IN_LDT_RPL3


def _entry(segment: Segment, number: int) -> Segment | None:
    """The segment if modify_ldt can make it; None for one that a null selector serves as well."""
    name = f"seg.{SREG_NAMES[number]}"
    must_be = number in {VCPU_SREG_CS, VCPU_SREG_SS}
    if not segment.p or not segment.s:
        if must_be or segment.p:
            raise UnsupportedCaseError(f"{name}: no code or data segment")
        return None
    if segment.limit > _BYTES_LIMIT and segment.limit & 0xFFF != 0xFFF:
        raise UnsupportedCaseError(f"{name}.limit: {segment.limit:#x} fits no descriptor")
    code = bool(segment.type & DESC_CODE)
    if code and segment.type & DESC_CONFORMING:
        raise UnsupportedCaseError(f"{name}.type: the kernel makes no conforming segments")
    if number == VCPU_SREG_CS and (not code or segment.l):
        raise UnsupportedCaseError(f"{name}: no code segment of 16 or 32 bits")
    if number == VCPU_SREG_SS and (code or not segment.type & DESC_WRITABLE):
        raise UnsupportedCaseError(f"{name}.type: no stack segment")
    if number != VCPU_SREG_CS and code and not segment.type & DESC_READABLE:
        raise UnsupportedCaseError(f"{name}.type: code that cannot be read is not loaded")
    return segment

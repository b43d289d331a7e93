"""Where CPUX86State keeps its fields, found by writing markers through the public register API.

The layout is private to Unicorn and changes between its versions. Each offset is located anew at
start: two different markers are written to a register, and exactly one place of the saved state
must follow both. Fields that no API reaches (hidden flags, the pending exception) are found from
what running an instruction leaves behind.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from unicorn import x86_const as uc_x86

from emufuzz.arch.cr import X86_CR4_OSXSAVE, X86_CR4_PAE
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.unicorn.engine import NO_VECTOR, UC_ERR_OK, Engine

_MARKERS: Final = (0x1122334455667788, 0x0E0D0C0B0A090807)
#: MSRs that are part of the saved state: index -> size in bytes. Others outlive a case, or are made up.
_KEPT_MSRS: Final = {
    0x174: 4,  # IA32_SYSENTER_CS
    0x175: 8,  # IA32_SYSENTER_ESP
    0x176: 8,  # IA32_SYSENTER_EIP
    0x277: 8,  # IA32_PAT
    0xC0000081: 8,  # IA32_STAR
    0xC0000082: 8,  # IA32_LSTAR
    0xC0000083: 8,  # IA32_CSTAR
    0xC0000084: 8,  # IA32_FMASK
    0xC0000102: 8,  # IA32_KERNEL_GS_BASE
    0xC0000103: 8,  # IA32_TSC_AUX
}
_SEGMENT_SIZE: Final = 24  # selector, base, limit, attributes of struct SegmentCache

# hflags: QEMU's summary of the mode, which the translator trusts.
HF_CS32: Final = 1 << 4
HF_SS32: Final = 1 << 5
HF_PE: Final = 1 << 7
HF_LMA: Final = 1 << 14
HF_CS64: Final = 1 << 15
_HF_64BIT: Final = HF_CS32 | HF_SS32 | HF_PE | HF_LMA | HF_CS64


@dataclass(frozen=True)
class Layout:
    """Offsets in bytes from the start of CPUX86State."""

    regs: int  # 16 GPRs in VCPU_REGS_* order, then rip and rflags, 8 bytes each
    hflags: int
    segs: int  # es cs ss ds fs gs ldtr tr, 24 bytes each
    gdtr: int
    idtr: int
    cr: int  # cr0 to cr4
    efer: int
    fpstt: int  # top of the x87 stack
    fpus: int
    fpuc: int
    fptags: int  # 8 bytes, 1 = empty
    fpregs: int  # 8 registers of 16 bytes
    mxcsr: int
    xmm: int  # 64 bytes each
    error_code: int
    exception_is_int: int
    dr: int
    xcr0: int
    msr: dict[int, tuple[int, int]]  # index -> offset, and size in bytes


def probe(engine: Engine) -> Layout:
    """Find every offset.

    Raises:
        OracleUnavailableError: A field is not where one marker after another says it is.
    """
    prober = _Prober(engine)
    regs = prober.quad(uc_x86.UC_X86_REG_RAX)
    prober.expect("r15", prober.quad(uc_x86.UC_X86_REG_R15), regs + 15 * 8)
    prober.expect("rip", prober.quad(uc_x86.UC_X86_REG_RIP), regs + 16 * 8)
    segs = prober.selector(uc_x86.UC_X86_REG_ES)
    prober.check_segments(segs)
    cr = prober.quad(uc_x86.UC_X86_REG_CR0)
    prober.expect("cr4", prober.quad(uc_x86.UC_X86_REG_CR4), cr + 4 * 8)
    xmm = prober.xmm(uc_x86.UC_X86_REG_XMM0)
    prober.expect("xmm15", prober.xmm(uc_x86.UC_X86_REG_XMM15), xmm + 15 * 64)
    dr = prober.quad(uc_x86.UC_X86_REG_DR0)
    prober.expect("dr7", prober.quad(uc_x86.UC_X86_REG_DR7), dr + 7 * 8)
    layout = Layout(
        regs=regs,
        hflags=prober.hflags(),
        segs=segs,
        gdtr=prober.table(uc_x86.UC_X86_REG_GDTR),
        idtr=prober.table(uc_x86.UC_X86_REG_IDTR),
        cr=cr,
        efer=prober.efer(),
        fpstt=prober.small("fpstt", uc_x86.UC_X86_REG_FPSW, ((0x3800, 7, 4), (0x2800, 5, 4))),
        fpus=prober.small("fpus", uc_x86.UC_X86_REG_FPSW, ((0x45A7, 0x45A7, 2), (0x4166, 0x4166, 2))),
        fpuc=prober.small("fpuc", uc_x86.UC_X86_REG_FPCW, ((0x5A7F, 0x5A7F, 2), (0x3B7F, 0x3B7F, 2))),
        fptags=prober.fptags(),
        fpregs=prober.fpregs(),
        mxcsr=prober.small("mxcsr", uc_x86.UC_X86_REG_MXCSR, ((0x5A80, 0x5A80, 4), (0x3B80, 0x3B80, 4))),
        xmm=xmm,
        dr=dr,
        xcr0=prober.xcr0(),
        msr={index: (prober.msr(index, size), size) for index, size in _KEPT_MSRS.items()},
        error_code=0,
        exception_is_int=0,
    )
    prober.flags(regs + 17 * 8)
    return prober.exception(layout)


class _Prober:
    """Writes markers through the register API and looks for them in saved states."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.uc = engine.uc
        engine.save()
        self.pristine = bytes(engine.state)

    def locate(self, name: str, cases: Iterable[tuple[Callable[[], Any], bytes]]) -> int:
        """The one offset where each write leaves its bytes; the state is restored afterwards."""
        found: set[int] | None = None
        for write, wanted in cases:
            write()
            self.engine.save()
            places = set(_occurrences(bytes(self.engine.state), wanted))
            found = places if found is None else found & places
            self.reset()
        if found is None or len(found) != 1:
            raise OracleUnavailableError(
                f"unicorn's state layout is unknown: {name} found at {sorted(found or ())}"
            )
        return found.pop()

    def reset(self) -> None:
        """Put the engine back into its first state."""
        self.engine.state[:] = self.pristine
        self.engine.restore()

    @staticmethod
    def expect(name: str, found: int, wanted: int) -> None:
        """Fail closed when two fields are not side by side."""
        if found != wanted:
            raise OracleUnavailableError(
                f"unicorn's state layout is unknown: {name} at {found}, not at {wanted}"
            )

    def _writer(self, register: int, value: Any) -> Callable[[], Any]:
        return lambda: self.uc.reg_write(register, value)

    def quad(self, register: int) -> int:
        """A 64-bit register."""
        return self.locate(
            f"register {register}",
            [(self._writer(register, v), struct.pack("<Q", v)) for v in _MARKERS],
        )

    def selector(self, register: int) -> int:
        """The selector of a segment register, followed by three zero fields."""
        return self.locate(
            f"segment register {register}",
            [(self._writer(register, v), struct.pack("<I", v)) for v in (0x5A5A, 0x6B6B)],
        )

    def check_segments(self, segs: int) -> None:
        """The segment registers, LDTR and TR follow one another."""
        for index, register in ((1, uc_x86.UC_X86_REG_CS), (2, uc_x86.UC_X86_REG_SS)):
            self.expect("a segment", self.selector(register), segs + index * _SEGMENT_SIZE)
        for index, register in ((4, uc_x86.UC_X86_REG_FS_BASE), (5, uc_x86.UC_X86_REG_GS_BASE)):
            self.expect("a segment base", self.quad(register), segs + index * _SEGMENT_SIZE + 8)
        for index, register in ((6, uc_x86.UC_X86_REG_LDTR), (7, uc_x86.UC_X86_REG_TR)):
            self.expect("a system segment", self.table(register), segs + index * _SEGMENT_SIZE)

    def table(self, register: int) -> int:
        """A table register: selector, base, limit, attributes; all but the selector are marked."""
        return self.locate(
            f"table register {register}",
            [
                (self._writer(register, (0, v, 0x5678, 0x8B00)), struct.pack("<IIQI", 0, 0, v, 0x5678))
                for v in _MARKERS
            ],
        )

    def xmm(self, register: int) -> int:
        """A 128-bit register."""
        low, high = _MARKERS
        return self.locate(
            f"register {register}",
            [
                (self._writer(register, high << 64 | low), struct.pack("<QQ", low, high)),
                (self._writer(register, low << 64 | high), struct.pack("<QQ", high, low)),
            ],
        )

    def small(self, name: str, register: int, cases: Iterable[tuple[int, int, int]]) -> int:
        """A narrow field: (value written, value stored, size in bytes) for each probe."""
        return self.locate(
            name, [(self._writer(register, v), stored.to_bytes(n, "little")) for v, stored, n in cases]
        )

    def efer(self) -> int:
        """EFER, by way of its MSR."""
        return self.locate(
            "efer",
            [
                (lambda v=v: self.uc.msr_write(0xC0000080, v), struct.pack("<Q", v))  # type: ignore[misc]  # bound in the loop
                for v in (0xD01, 0x501)
            ],
        )

    def msr(self, index: int, size: int) -> int:
        """An MSR of 4 or 8 bytes; of the narrow one, IA32_SYSENTER_CS, 16 bits are kept."""
        kept = 0xFFFF if size == 4 else (1 << 64) - 1
        return self.locate(
            f"MSR {index:#x}",
            [
                (lambda v=v: self.uc.msr_write(index, v), (v & kept).to_bytes(size, "little"))  # type: ignore[misc]  # bound in the loop
                for v in _MARKERS
            ],
        )

    def xcr0(self) -> int:
        """XCR0, which no register API reaches, by way of XSETBV."""
        engine = self.engine
        engine.buffer[0x1000:0x1004] = b"\x0f\x01\xd1\xf4"
        found = self.locate("xcr0", [(self._xsetbv(value), struct.pack("<Q", value)) for value in (7, 3)])
        engine.flush_translations()
        engine.buffer[0x1000:0x1004] = bytes(4)
        return found

    def _xsetbv(self, value: int) -> Callable[[], None]:
        run = self._runner(0x1000, value, 0x7777 << 48)

        def write() -> None:
            self.uc.reg_write(uc_x86.UC_X86_REG_CR4, X86_CR4_PAE | X86_CR4_OSXSAVE)
            run()

        return write

    def fptags(self) -> int:
        """The x87 tags, a byte per register."""
        register = uc_x86.UC_X86_REG_FPTAG
        return self.locate(
            "fptags",
            [
                (self._writer(register, 0xC3C3), bytes((1, 0, 0, 1, 1, 0, 0, 1))),
                (self._writer(register, 0x3333), bytes((1, 0, 1, 0, 1, 0, 1, 0))),
            ],
        )

    def fpregs(self) -> int:
        """The first x87 register: mantissa and exponent."""
        register = uc_x86.UC_X86_REG_FP0
        return self.locate(
            "fpregs",
            [
                (self._writer(register, (m, e)), struct.pack("<QH", m, e))
                for m, e in zip(_MARKERS, (0x4001, 0x4002), strict=True)
            ],
        )

    def hflags(self) -> int:
        """The summary of the mode: the one word of a fresh 64-bit engine that says 64-bit."""
        words = struct.unpack_from(f"<{len(self.pristine) // 4}I", self.pristine)
        found = [i * 4 for i, word in enumerate(words) if word & _HF_64BIT == _HF_64BIT and word < 1 << 28]
        if len(found) != 1:
            raise OracleUnavailableError(f"unicorn's state layout is unknown: hflags found at {found}")
        return found[0]

    def flags(self, offset: int) -> None:
        """RFLAGS follows RIP."""
        for value in (0x8D7, 0x246):
            self.uc.reg_write(uc_x86.UC_X86_REG_EFLAGS, value)
            self.engine.save()
            (seen,) = struct.unpack_from("<Q", self.engine.state, offset)
            self.reset()
            self.expect("rflags", seen, value)

    def exception(self, layout: Layout) -> Layout:
        """Where an exception leaves its error code and whether INT n made it.

        Loading DS with a selector beyond the GDT leaves the selector as the error code; INT n
        leaves its mark right behind.
        """
        engine = self.engine
        engine.buffer[0x1000:0x1004] = b"\x8e\xd8\xf4\xf4"
        engine.buffer[0x1010:0x1014] = b"\xcd\x55\xf4\xf4"
        error_code = self.locate(
            "error_code",
            [(self._runner(0x1000, v), struct.pack("<ii", v, 0)) for v in (0x5678, 0x3A98)],
        )
        self._runner(0x1010, 0)()
        engine.save()
        (is_int,) = struct.unpack_from("<i", engine.state, error_code + 4)
        self.expect("exception_is_int", is_int, 1)
        self.reset()
        engine.flush_translations()
        engine.buffer[0x1000:0x1014] = bytes(0x14)
        return Layout(**{**vars(layout), "error_code": error_code, "exception_is_int": error_code + 4})

    def _runner(self, address: int, rax: int, marker: int = 0x77770000) -> Callable[[], None]:
        def run() -> None:
            # The value stays out of every register but the one that is loaded from.
            self.uc.reg_write(uc_x86.UC_X86_REG_RAX, rax | marker)
            error = self.engine.start(address, 1)
            self.engine.vector = NO_VECTOR
            if error != UC_ERR_OK:
                raise OracleUnavailableError(f"unicorn cannot run a probe: error {error}")

        return run


def _occurrences(data: bytes, wanted: bytes) -> Iterable[int]:
    place = data.find(wanted)
    while place >= 0:
        yield place
        place = data.find(wanted, place + 1)

"""Tricky states by name: where emulators go wrong, one minimal case each, shared by all tests.

Each entry has a reason in one line. The states are built by emufuzz.case.build, in its layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

from emufuzz.arch.rflags import X86_EFLAGS_AF, X86_EFLAGS_CF, X86_EFLAGS_DF, X86_EFLAGS_IF
from emufuzz.case.build import (
    CODE_PAGES,
    DATA_BASE,
    STACK_BASE,
    build_case,
    build_system,
)
from emufuzz.case.model import UNUSABLE, Case
from emufuzz.case.segments import segment_code, segment_data, segment_paragraph

_DATA: Final = 0x123456789ABCDEF0.to_bytes(8, "little")
_IOPL3: Final = 3 << 12
_FREE_SEL: Final = 0x80  # first slot of the GDT that the default layout leaves free
_PAGE_END: Final = DATA_BASE + 0xFFF
_LAST_DATA: Final = 0xAFFF  # last byte before an absent page


@dataclass(frozen=True, slots=True)
class Entry:
    """One tricky state."""

    name: str
    reason: str
    case: Case


def _entry(name: str, reason: str, mode: str, code: str, **keywords: object) -> Entry:
    build: Callable[..., Case] = build_case
    return Entry(name, reason, build(mode, bytes.fromhex(code), id=name, **keywords))


@cache
def entries() -> tuple[Entry, ...]:
    """All entries, with their reasons."""
    return (
        *_segment_limits(),
        *_stacks(),
        *_addresses(),
        *_code_fetch(),
        *_privilege(),
        *_strings(),
        *_arithmetic(),
        *_encodings(),
    )


def catalogue() -> dict[str, Case]:
    """Name -> case; the name is the case's id too."""
    return {entry.name: entry.case for entry in entries()}


# fmt: off
def _segment_limits() -> Iterator[Entry]:
    yield _entry("real-word-at-ffff", "a word at offset 0xffff crosses the limit: #GP, no wrap",
                 "real", "a1ffff")
    yield _entry("real-byte-at-ffff", "the last byte of a segment is inside",
                 "real", "a0ffff", data={0xF000: b""})
    yield _entry("real-ea-wraps", "a 16-bit effective address wraps at 64 KiB before the limit check",
                 "real", "8b4010", rbx=0xFFF8, rsi=DATA_BASE, data={DATA_BASE: _DATA * 3})
    small = segment_data(_FREE_SEL, base=DATA_BASE, limit=0xFF)
    for at, word in (("last-dword", 0xFC), ("past-limit", 0xFD)):
        yield _entry(f"limit-{at}", "a dword that ends exactly at, and one byte past, a small limit",
                     "prot32", "8b03", rbx=word, system=build_system("prot32", ds=small),
                     data={DATA_BASE: _DATA * 40})
    down = segment_data(_FREE_SEL, limit=0x83FF, expand_down=True)
    for at, offset in (("below", 0x83FF), ("above", 0x8400)):
        yield _entry(f"expand-down-{at}", "an expand-down segment is valid above its limit only",
                     "prot32", "8a03", rbx=offset, system=build_system("prot32", ds=down),
                     data={DATA_BASE + 0x3F8: _DATA * 2})
    down16 = segment_data(_FREE_SEL, bits=16, limit=0x83FF, expand_down=True)
    yield _entry("expand-down-16-top", "with B=0 an expand-down segment ends at 0xffff",
                 "prot32", "8b03", rbx=0xFFFE, system=build_system("prot32", ds=down16),
                 data={0xF000: b"", 0x10000: b""})
    read_only = segment_data(_FREE_SEL, writable=False)
    yield _entry("write-read-only", "a write to a read-only data segment: #GP",
                 "prot32", "8903", rbx=DATA_BASE, system=build_system("prot32", ds=read_only))
    execute_only = segment_code(_FREE_SEL, readable=False)
    yield _entry("read-execute-only-cs", "a CS override reads from a code segment without R: #GP",
                 "prot32", "2e8b03", rbx=DATA_BASE, system=build_system("prot32", cs=execute_only))
    yield _entry("null-ds", "a null DS is unusable: #GP on access",
                 "prot32", "8b03", rbx=DATA_BASE, system=build_system("prot32", ds=UNUSABLE))
    yield _entry("null-ds-64", "64-bit mode ignores an unusable DS",
                 "prot64", "8b03", rbx=DATA_BASE, system=build_system("prot64", ds=UNUSABLE))
    high = segment_data(_FREE_SEL, base=0xFFFFF000)
    yield _entry("base-wraps-4g", "base + offset wraps at 4 GiB outside 64-bit mode",
                 "prot32", "8b03", rbx=DATA_BASE + 0x1000, system=build_system("prot32", ds=high),
                 data={DATA_BASE: _DATA})


def _stacks() -> Iterator[Entry]:
    ss16 = segment_data(_FREE_SEL, bits=16, limit=0xFFFF)
    ss32 = segment_data(_FREE_SEL, bits=32)
    yield _entry("stack16-in-code32", "CS.D=1, SS.B=0: PUSH changes SP only, the high half of ESP stays",
                 "prot32", "50", rsp=0x1234C800, rax=0x11223344, system=build_system("prot32", ss=ss16))
    yield _entry("stack32-in-code16", "CS.D=0, SS.B=1: a 16-bit PUSH uses all of ESP",
                 "prot16", "50", rsp=0x1C800, rax=0x1122, system=build_system("prot16", ss=ss32),
                 data={0x1C000: b""})
    yield _entry("stack16-sp-wraps", "SP=0 wraps to the top of a 64 KiB stack",
                 "prot32", "50", rsp=0x55550000, rax=1, system=build_system("prot32", ss=ss16),
                 data={0xF000: b""})
    yield _entry("real-push-at-sp-1", "a word pushed at SP=1 straddles 0xffff: #SS",
                 "real", "50", rsp=1, rax=0xABCD)
    yield _entry("stack-page-edge", "PUSH at the first byte of the stack page reaches an absent page",
                 "prot64", "50", rsp=STACK_BASE, rax=1)
    yield _entry("stack-crosses-page", "PUSH half in an absent page: #PF address is the lower page",
                 "prot64", "50", rsp=STACK_BASE + 4, rax=1)
    yield _entry("pop-rsp-memory", "POP [RSP+8]: the address uses RSP after the increment",
                 "prot64", "8f442408", data={0xC800: _DATA})
    yield _entry("push-rsp", "PUSH RSP stores the value from before the decrement", "prot64", "54")
    yield _entry("leave-16-bit-stack", "LEAVE with SS.B=0 copies BP to SP only",
                 "prot32", "c9", rsp=0x12340000, rbp=0x5678C800, system=build_system("prot32", ss=ss16))
    yield _entry("stack-noncanonical", "a stack access at a non-canonical address is #SS, not #GP",
                 "prot64", "50", rsp=0x800000000010)


def _addresses() -> Iterator[Entry]:
    yield _entry("data-crosses-page", "a qword over two present pages",
                 "prot64", "488b03", rbx=_PAGE_END - 3, data={_PAGE_END - 7: _DATA * 2})
    yield _entry("write-crosses-into-absent", "a write whose second page is absent leaves memory unchanged",
                 "prot64", "488903", rbx=_LAST_DATA - 3, rax=0x1122334455667788)
    yield _entry("noncanonical-read", "the first non-canonical address: #GP(0), not #PF",
                 "prot64", "488b03", rbx=0x800000000000)
    yield _entry("crosses-canonical-edge", "a qword that starts canonical and ends beyond",
                 "prot64", "488b03", rbx=0x7FFFFFFFFFFC, data={0x7FFFFFFFF000: b""})
    yield _entry("rip-relative-address32", "0x67 truncates a RIP-relative address to 32 bits",
                 "prot64", "678b05f01f0000", data={DATA_BASE: _DATA})
    yield _entry("address32-in-64", "a 32-bit address ignores the high half of the base register",
                 "prot64", "678b03", rbx=0xFFFFFFFF00000000 | DATA_BASE, data={DATA_BASE: _DATA})
    fs = segment_data(0, base=0xFFFFFFFFFFFFF000)
    yield _entry("fs-base-negative", "FS.base plus address wraps at 2^64",
                 "prot64", "64488b03", rbx=DATA_BASE + 0x1000, system=build_system("prot64", fs=fs),
                 data={DATA_BASE: _DATA})
    yield _entry("es-base-ignored-64", "64-bit mode takes the bases of ES, CS, SS, DS as 0",
                 "prot64", "26488b03", rbx=DATA_BASE, data={DATA_BASE: _DATA},
                 system=build_system("prot64", es=segment_data(_FREE_SEL, base=0x1000)))


def _code_fetch() -> Iterator[Entry]:
    yield _entry("code-at-page-end", "the last instruction before an absent page; no fetch beyond it",
                 "prot64", "90", rip=_LAST_DATA)
    yield _entry("code-into-absent-page", "the immediate lies in an absent page: #PF on fetch",
                 "prot64", "b8", rip=_LAST_DATA)
    yield _entry("code-crosses-pages", "an instruction over two present code pages",
                 "prot32", "b878563412", rip=CODE_PAGES[1] - 2)
    yield _entry("length-15", "14 prefixes and an opcode: the longest instruction there is",
                 "prot32", "66" * 14 + "90")
    yield _entry("length-16", "one prefix too many: #GP", "prot32", "66" * 15 + "90")
    yield _entry("real-ip-wraps", "the instruction runs past offset 0xffff of CS",
                 "real", "b81234", rip=0xFFFE, data={0xF000: b"", 0x10000: b""})
    unreal = segment_code(0, limit=0xFFFFFFFF)
    yield _entry("unreal-code32", "real mode with CS.D=1: 32-bit operands and addresses by default",
                 "real", "8b03", rbx=DATA_BASE, data={DATA_BASE: _DATA},
                 system=build_system("real", cs=unreal))
    yield _entry("unreal-big-ds", "real mode with a 4 GiB DS: an offset above 64 KiB is valid",
                 "real", "678b03", rbx=0x12000, data={0x12000: _DATA},
                 system=build_system("real", ds=segment_data(0)))
    limited = segment_code(_FREE_SEL, limit=0x6FFF)
    yield _entry("jump-past-cs-limit", "a branch target beyond CS.limit: #GP, RIP unchanged",
                 "prot32", "e9fb0f0000", system=build_system("prot32", cs=limited))


def _privilege() -> Iterator[Entry]:
    yield _entry("vm86-cli-iopl0", "CLI in vm86 with IOPL < 3: #GP", "vm86", "fa", flags=X86_EFLAGS_IF)
    yield _entry("vm86-cli-iopl3", "CLI in vm86 with IOPL = 3 works",
                 "vm86", "fa", flags=X86_EFLAGS_IF | _IOPL3)
    yield _entry("vm86-pushf-iopl0", "PUSHF in vm86 with IOPL < 3: #GP on hardware", "vm86", "9c")
    yield _entry("cpl3-cli", "CLI at CPL 3 with IOPL 0: #GP", "prot64", "fa", cpl=3, flags=X86_EFLAGS_IF)
    yield _entry("cpl3-hlt", "a privileged instruction at CPL 3: #GP", "prot32", "f4", cpl=3)
    yield _entry("cpl3-popf-iopl", "POPF at CPL 3 leaves IOPL and IF as they are, without a fault",
                 "prot64", "9d", cpl=3, data={0xC800: (0x3202).to_bytes(8, "little")})
    yield _entry("cpl1-popf-if", "POPF at CPL 1 with IOPL 1 may change IF, not IOPL",
                 "prot32", "9d", cpl=1, flags=1 << 12, data={0xC800: (0x3202).to_bytes(4, "little")})
    yield _entry("cpl3-in-open-port", "IN at CPL 3 with IOPL 0: the TSS's bitmap opens the port",
                 "prot32", "e460", cpl=3)
    yield _entry("cpl3-in-beyond-bitmap", "a port beyond the TSS's limit is closed: #GP",
                 "prot32", "66ed", cpl=3, rdx=0x8000)


def _strings() -> Iterator[Entry]:
    ends = {"rsi": DATA_BASE, "rdi": DATA_BASE + 0x100}
    source = {DATA_BASE: _DATA * 8}
    yield _entry("rep-rcx-zero", "REP with RCX=0 does nothing, and flags and pointers stay",
                 "prot64", "f348a5", rcx=0, **ends)
    yield _entry("rep-address32-in-64", "0x67: ECX counts, and the pointers are zero-extended",
                 "prot64", "67f3a4", rcx=0xFFFFFFFF00000002, data=source,
                 rsi=0xFFFFFFFF00000000 | DATA_BASE, rdi=DATA_BASE + 0x100)
    yield _entry("rep-address32-ecx-zero", "0x67 with ECX=0: KVM and hardware differ on RCX's high half",
                 "prot64", "67f3a4", rcx=0xFFFFFFFF00000000, **ends)
    yield _entry("direction-flag", "DF=1: pointers go down", "prot32", "f3a5", flags=X86_EFLAGS_DF,
                 rcx=2, rsi=DATA_BASE + 4, rdi=DATA_BASE + 0x104, data=source)
    yield _entry("rep-fault-midway", "an iteration faults: the finished ones stay, RIP does not move",
                 "prot32", "f3aa", rcx=8, rdi=_LAST_DATA - 3, rax=0x5A)
    yield _entry("string-di-wraps", "16-bit DI wraps from 0xffff to 0",
                 "real", "aa", rdi=0xFFFF, rax=0x77, data={0xF000: b""})
    yield _entry("repne-scas-match", "REPNE SCAS ends at the match with ZF=1",
                 "prot64", "f2ae", rcx=8, rax=0x9A, rdi=DATA_BASE, data=source)
    yield _entry("movs-es-not-overridable", "a segment override moves the source only, ES stays",
                 "prot32", "64a4", **ends, data=source,
                 system=build_system("prot32", fs=segment_data(_FREE_SEL, base=0x10)))


def _arithmetic() -> Iterator[Entry]:
    yield _entry("div-by-zero", "DIV by 0: #DE", "prot64", "48f7f3", rax=1)
    yield _entry("div-overflow", "a quotient that does not fit: #DE, registers unchanged",
                 "prot64", "48f7f3", rdx=1, rbx=1)
    yield _entry("idiv-min-by-minus-1", "the most negative number / -1 overflows: #DE",
                 "prot32", "f7fb", rax=0x80000000, rdx=0xFFFFFFFF, rbx=0xFFFFFFFF)
    yield _entry("shift-count-0", "a shift by 0 leaves all flags",
                 "prot32", "d3e0", rax=0x80000001, rcx=0x20, flags=X86_EFLAGS_CF | X86_EFLAGS_AF)
    yield _entry("shift-count-over-size", "the count is masked by 31: a byte shifted by more than 8",
                 "prot32", "d2e0", rax=0xFF, rcx=9)
    yield _entry("rcl-count-9-byte", "RCL of a byte by 9 is the identity, CF too",
                 "prot32", "d2d0", rax=0x81, rcx=9, flags=X86_EFLAGS_CF)
    yield _entry("shld-count-over-size", "a 16-bit SHLD by more than 16: undefined result",
                 "prot32", "660fa5d8", rax=0x1234, rbx=0x5678, rcx=0x11)
    yield _entry("bt-negative-index", "BT m, r addresses memory below the operand for a negative index",
                 "prot64", "480fa303", rbx=DATA_BASE + 0x1000, rax=0xFFFFFFFFFFFFFFFF,
                 data={DATA_BASE + 0xFF8: _DATA})
    yield _entry("bsf-zero", "BSF of 0: ZF=1, and the destination keeps its value on real CPUs",
                 "prot64", "0fbcc3", rax=0xFFFFFFFFFFFFFFFF)
    yield _entry("aam-0", "AAM with immediate 0: #DE", "prot32", "d400", rax=0x1234)


def _encodings() -> Iterator[Entry]:
    yield _entry("lock-on-register", "LOCK with a register destination: #UD", "prot32", "f001c0")
    yield _entry("lock-on-mov", "LOCK on an instruction that does not allow it: #UD", "prot32", "f08903",
                 rbx=DATA_BASE)
    yield _entry("rex-before-prefix", "a REX prefix that another prefix follows is ignored",
                 "prot64", "4866b83412", rax=0xFFFFFFFFFFFFFFFF)
    yield _entry("mov32-clears-high", "a 32-bit destination clears bits 63:32",
                 "prot64", "89c0", rax=0xFFFFFFFFFFFFFFFF)
    yield _entry("cmov-false-clears-high", "a 32-bit CMOV clears bits 63:32 even if the condition is false",
                 "prot64", "0f44c3", rax=0xFFFFFFFFFFFFFFFF)
    yield _entry("rex-byte-registers", "with REX encoding 4 is SPL, not AH", "prot64", "4088e0",
                 rsp=0xC8AA, rax=0x1100)
    yield _entry("cmpxchg-mismatch-write", "CMPXCHG that does not match still writes its operand back",
                 "prot32", "0fb10b", rax=1, rcx=2, rbx=DATA_BASE, data={DATA_BASE: _DATA})
    yield _entry("cmpxchg-mismatch-read-only", "and so faults on a read-only segment",
                 "prot32", "0fb10b", rax=1, rcx=2, rbx=DATA_BASE,
                 system=build_system("prot32", ds=segment_data(_FREE_SEL, writable=False)))
    yield _entry("operand16-near-jump-64", "0x66 on a near JMP in 64-bit mode: Intel ignores it",
                 "prot64", "66e90000000090")
    yield _entry("compat32-40-is-inc", "0x40 to 0x4f are INC and DEC, not REX, outside 64-bit mode",
                 "compat32", "40", rax=0xFFFFFFFF)
    yield _entry("compat16-dword-push", "0x66 in a 16-bit compatibility segment: a dword is pushed",
                 "compat16", "6650", rax=0x11223344)
    yield _entry("vm86-based-segments", "vm86 addresses are selector * 16 + offset",
                 "vm86", "8b07", rbx=0x10, data={DATA_BASE: _DATA * 4},
                 system=build_system("vm86", ds=segment_paragraph(DATA_BASE >> 4, vm86=True)))
# fmt: on

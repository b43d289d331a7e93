"""Self-test of the traps that would make every result of a campaign worthless without a sign.

It runs when an oracle is opened and takes well under a millisecond. Each trap is a short sequence
of cases with known outcomes, which come out wrong when a precaution of the oracle is missing.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import EFER_LMA, EFER_LME, X86_CR0_ET, X86_CR0_PE, X86_CR0_PG, X86_CR4_PAE
from emufuzz.arch.exceptions import DE_VECTOR, PF_VECTOR, PFERR_WRITE
from emufuzz.case.model import PAGE_SIZE, Case, Memory, Segment, System
from emufuzz.oracle.base import Oracle, OracleUnavailableError

#: A write to a code page: Unicorn would start the instruction over and never finish it.
GAP_CODE_PAGE_WRITE: Final = "unicorn-code-page-write"

_CODE: Final = Segment(sel=8, limit=0xFFFFFFFF, type=11, s=1, p=1, l=1, g=1)
_DATA: Final = Segment(sel=16, limit=0xFFFFFFFF, type=3, s=1, p=1, db=1, g=1)
SELF_TEST_SYSTEM: Final = System(
    seg=(_DATA, _CODE, _DATA, _DATA, _DATA, _DATA, Segment(), Segment()),
    cr0=X86_CR0_PG | X86_CR0_ET | X86_CR0_PE,
    cr4=X86_CR4_PAE,
    efer=EFER_LME | EFER_LMA,
)
_RIP: Final = 0x7FF0_0000
_ADDRESS: Final = 0x7FE0_0000
_INC_EAX: Final = bytes.fromhex("ffc0f4")
_DEC_EAX: Final = bytes.fromhex("ffc8f4")
_DIV_ECX: Final = bytes.fromhex("f7f1f4")
_LOAD_EAX: Final = bytes.fromhex("8b06f4")  # mov eax, [rsi]
_STORE_EAX: Final = bytes.fromhex("8906f4")  # mov [rsi], eax


def self_test_case(code: bytes, rsi: int = _ADDRESS, rip: int = _RIP, memory: bytes = b"") -> Case:
    """A 64-bit case at CPL 0: RSI as given, other registers 0, one page of `memory` if there is any."""
    gpr = (0,) * 6 + (rsi,) + (0,) * 9
    mem = Memory(((_ADDRESS, memory),)) if memory else Memory()
    return Case("self-test", "prot64", code, gpr, rip, 2, SELF_TEST_SYSTEM, mem)


def stale_code(oracle: Oracle) -> bool:
    """Other code at the same address must not run as what was there before."""
    first, second = oracle.run([self_test_case(_INC_EAX), self_test_case(_DEC_EAX)])
    return first.gpr[0] == 1 and second.gpr[0] == 0xFFFFFFFF


def old_exception(oracle: Oracle) -> bool:
    """An exception must not turn the next one into a double fault, nor stick."""
    cases = [self_test_case(_DIV_ECX, rip=_RIP + 64)] * 3 + [self_test_case(_INC_EAX, rip=_RIP + 96)]
    exceptions = [outcome.exception for outcome in oracle.run(cases)]
    return exceptions == [(DE_VECTOR, None, None)] * 3 + [None]


def stale_tlb(oracle: Oracle) -> bool:
    """The same linear address in another Memory is another page, or none."""
    cases = [
        self_test_case(_LOAD_EAX, rip=_RIP + 128, memory=b"\x01"),
        self_test_case(_LOAD_EAX, rip=_RIP + 128, memory=b"\x02"),
        self_test_case(_LOAD_EAX, rip=_RIP + 128),
    ]
    first, second, third = oracle.run(cases)
    absent = (PF_VECTOR, 0, _ADDRESS)
    return (first.gpr[0], second.gpr[0], third.exception) == (1, 2, absent)


def code_page_write(oracle: Oracle) -> bool:
    """A write to the case's own code page is disclaimed, one to another case's page faults."""
    own = self_test_case(_STORE_EAX, rsi=_RIP + PAGE_SIZE + 256, rip=_RIP + PAGE_SIZE)
    other = self_test_case(_STORE_EAX, rsi=_RIP + 256, rip=_RIP + PAGE_SIZE + 32)
    disclaimed, faulted = oracle.run([own, other])
    return disclaimed.unchecked == (("all", GAP_CODE_PAGE_WRITE),) and faulted.exception == (
        PF_VECTOR,
        PFERR_WRITE,
        _RIP + 256,
    )


def self_test(oracle: Oracle) -> None:
    """Run all of it.

    Raises:
        OracleUnavailableError: A trap is open; the message names it.
    """
    for trap in (stale_code, old_exception, stale_tlb, code_page_write):
        if not trap(oracle):
            raise OracleUnavailableError(f"unicorn fails its self-test: {trap.__name__.replace('_', ' ')}")

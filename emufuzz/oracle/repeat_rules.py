"""The rules about repeated string instructions that change the page tables which they themselves use.

Whether a processor notices is up to what it has cached (SDM Vol. 3A 4.10.2.3); KVM walks the tables of
the operands at each iteration, and fetches the instruction once (KVM: x86_emulate_instruction).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from emufuzz.arch.exceptions import PF_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RCX, VCPU_REGS_RDI, VCPU_REGS_RDX, VCPU_REGS_RSI
from emufuzz.arch.rflags import X86_EFLAGS_DF
from emufuzz.case.devices import PIO
from emufuzz.case.model import Case, Outcome, case_pages, code_address, is_physical
from emufuzz.case.translate import walk
from emufuzz.oracle.device_trace import DEVICE_TRACE, trace_of
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.machine_rules import is_walk
from emufuzz.oracle.native_view import judge_case
from emufuzz.oracle.operands import at_iteration, operand_size, prefix_facts
from emufuzz.oracle.places import Places

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

_WALK_BITS: Final = 0x60  # accessed and dirty
#: What more iterations of a string instruction change, and how they end.
_ITERATION_FIELDS: Final = frozenset(
    ("rcx", "rsi", "rdi", "rip", "rflags", "mem", DEVICE_TRACE,
     "exception", "exception.address", "exception.error_code")
)  # fmt: skip
_MOVED_SIZES: Final = (0, 1, 2, 4, 8)
_MOVS: Final = frozenset(("a4", "a5"))
_PORT_READS: Final = frozenset(("6c", "6d"))
_STORES: Final = _MOVS | _PORT_READS | frozenset(("aa", "ab"))
_ACCESSED_FIELDS: Final = frozenset(("mem", DEVICE_TRACE))
#: Iterations after which KVM looks for events.
_MOST: Final = 1024


def repeated_without_fetch(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """REP that destroys the tables of its own code: KVM does not fetch it again, a processor may."""
    fault = oracle.exception
    if not is_physical(case) or not prefix_facts(case).rep or fault is None or fault[0] != PF_VECTOR:
        return False
    if subject.exception is not None and subject.exception[0] != PF_VECTOR:
        return False
    return fault[2] == code_address(case) and oracle.rip == case.rip and bool(subject.pages)


def repeated_fresh_walk(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """REP that changes the page tables of its own operands: KVM walks them again, a processor may not.

    KVM stops at the first iteration whose operand its new tables refuse. With translations from before
    (SDM Vol. 3A 4.10.2.3) a processor does more of them, which changes more of the same registers.
    """
    if not is_physical(case) or not prefix_facts(case).rep:
        return False
    ours = subject.exception
    if ours is None:
        return _walks_again(case, subject, differences)
    if ours[0] != PF_VECTOR or not {difference.field for difference in differences} <= _ITERATION_FIELDS:
        return False
    more = subject.gpr[VCPU_REGS_RCX] - oracle.gpr[VCPU_REGS_RCX]
    moved = [abs(subject.gpr[reg] - oracle.gpr[reg]) for reg in (VCPU_REGS_RSI, VCPU_REGS_RDI)]
    if more <= 0 or any(way not in {more * size for size in _MOVED_SIZES} for way in moved):
        return False
    return _table_entries(case, subject.pages, ours[2] or 0) != _table_entries(case, {}, ours[2] or 0)


def _table_entries(case: Case, changed: Mapping[int, bytes], linear: int) -> list[int]:
    """The entries that translate an address once pages have changed, without accessed and dirty bits."""
    system, pages = case.system, {**case_pages(case), **changed}
    entries, _physical = walk(pages, system.cr0, system.cr3, system.cr4, system.efer, linear)
    return [entry & ~_WALK_BITS for entry in entries]


def _walks_again(case: Case, subject: Outcome, differences: Sequence[Difference]) -> bool:
    """MOVS, STOS over the tables that lead to their operands: each iteration goes where they point by then.

    A processor may go on with the translations from before. Bits that the walks set may be either's.
    """
    from emufuzz.oracle.compare import compare  # noqa: PLC0415 - which looks for quirks

    done = case.gpr[VCPU_REGS_RCX] - subject.gpr[VCPU_REGS_RCX]
    if (
        not {difference.field for difference in differences} <= _ACCESSED_FIELDS
        or subject.leaf not in _STORES
    ):
        return False
    if not 0 < done <= _MOST:
        return False
    view, places, moved = judge_case(case), Places(case, fresh_walks=True), False
    before, size = Places(case), operand_size(view, subject.leaf)
    ports = subject.leaf in _PORT_READS
    if ports and not view.rflags & X86_EFLAGS_DF:
        return False  # upwards all is stored as one operand
    ahead = sum(access.kind == PIO for access in trace_of(subject) or ()) if ports else 0
    data = places.read_port(view.gpr[VCPU_REGS_RDX] & 0xFFFF, size, ahead)
    try:
        for number in range(done):
            source, destination, size = _iteration(view, subject.leaf, number)
            for linear in (source, destination):
                moved = moved or list(places.parts(linear, size)) != list(before.parts(linear, size))
            stored = places.read(source, size) if subject.leaf in _MOVS else _accumulator(view, size)
            places.write(destination, data[number * size : (number + 1) * size] if ports else stored)
    except KeyError:
        return False
    return moved and all(is_walk(view, d) for d in compare(case, subject, places.seen(subject)))


def _accumulator(view: Case, size: int) -> bytes:
    return (view.gpr[VCPU_REGS_RAX] & (1 << size * 8) - 1).to_bytes(size, "little")


def _iteration(case: Case, leaf: str, number: int) -> tuple[int, int, int]:
    """Linear source, linear destination and size of an iteration of MOVS; the first one is 0.

    STOS has its destination twice.
    """
    size = operand_size(case, leaf)
    accesses = CaseInstruction(at_iteration(case, number, size)).accesses
    (destination,) = (access.linear for access in accesses if access.write)
    source = next((access.linear for access in accesses if access.read), destination)
    return source, destination, size

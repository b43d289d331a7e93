"""The rules behind the quirks that show with devices, paging and exit paths.

What KVM does there is in x86.c, kvm_cache_regs.h and mmu/paging_tmpl.h rather than in emulate.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from emufuzz.arch.cr import EFER_LMA, EFER_NX, X86_CR4_PAE, X86_CR4_PSE, X86_CR4_SMEP
from emufuzz.arch.exceptions import (
    GP_VECTOR,
    NP_VECTOR,
    PF_VECTOR,
    PFERR_FETCH,
    PFERR_RSVD,
    SS_VECTOR,
    UD_VECTOR,
)
from emufuzz.arch.leaves import LEAVES
from emufuzz.arch.linear import linear_bits
from emufuzz.arch.regs import VCPU_REGS_RSP
from emufuzz.case.devices import MMIO, PIO, DeviceAccess
from emufuzz.case.model import Case, Fault, Outcome, case_memory, is_physical
from emufuzz.case.translate import walk
from emufuzz.oracle.device_trace import DEVICE_TRACE, has_pieces, joined, trace_of
from emufuzz.oracle.gaps import vouches_for_nothing
from emufuzz.oracle.guest_width import guest_width
from emufuzz.oracle.operands import prefix_facts

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

_PS: Final = 1 << 7
#: Address bits 39:36 in the entry of a 4 MiB page.
_ABOVE_36_BITS: Final = 0xF << 17
#: What shows how many iterations of INS were finished.
_LOST: Final = frozenset(("rcx", "rdi", "mem"))
#: Bytes that IRET pops more than it should, at most.
_POPPED: Final = 8 * (4 + 3 + 2 + 1)
#: Faults of what is popped from elsewhere, or of the stack there.
_POPPED_FAULTS: Final = frozenset((NP_VECTOR, SS_VECTOR, GP_VECTOR, PF_VECTOR))
_ACCESSED: Final = 1 << 5
_DIRTY: Final = 1 << 6
_FETCH_FAULTS: Final = frozenset((PF_VECTOR, GP_VECTOR, SS_VECTOR))


def _traces(case: Case, subject: Outcome, oracle: Outcome) -> tuple[list[DeviceAccess], list[DeviceAccess]]:
    """What both sides asked of the devices, as far as it is comparable."""
    pieces = has_pieces(case)
    return joined(trace_of(subject) or (), pieces=pieces), joined(trace_of(oracle) or (), pieces=pieces)


def _only_trace(differences: Sequence[Difference]) -> bool:
    return {difference.field for difference in differences} == {DEVICE_TRACE}


def undefined_under_trap(_case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """After a #UD only what is marked for it is emulated: everything else is another #UD."""
    row = LEAVES.get(subject.leaf)
    marked = row is not None and "EmulateOnUD" in row.flags
    return (
        not marked and subject.exception == (UD_VECTOR, None, None) and oracle.exception != subject.exception
    )


def undefined_fetch(_case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """A fault while the instruction is fetched becomes #UD."""
    theirs = oracle.exception
    return (
        subject.decode_rc == "failed"
        and subject.exception == (UD_VECTOR, None, None)
        and theirs is not None
        and theirs[0] in _FETCH_FAULTS
    )


def segment_store(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """SLDT, STR read their destination before they write to it; with REX.W, as MOV, they write 8 bytes."""
    ours, theirs = _traces(case, subject, oracle)
    if not _only_trace(differences) or len(theirs) > 1 or not ours:
        return False
    if not theirs:  # the two bytes that count lie in memory in front of the device
        wide = prefix_facts(case).rex & 8  # of which the device gets a part
        return subject.leaf != "8c" and not wide and len(ours) == 1 and not ours[0].write
    *reads, written = ours
    wanted = theirs[0]
    if reads and (subject.leaf == "8c" or len(reads) > 1 or reads[0].write or reads[0].addr != wanted.addr):
        return False
    more = written.data[wanted.size :]
    wide = not more or (prefix_facts(case).rex & 8 and written.size == 8 and not any(more))
    return bool(wide) and written._replace(size=wanted.size, data=written.data[: wanted.size]) == wanted


def flush_reads(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """CLFLUSH, CLFLUSHOPT: a byte is read."""
    ours, theirs = _traces(case, subject, oracle)
    return (
        _only_trace(differences) and not theirs and len(ours) == 1 and not ours[0].write and ours[0].size == 1
    )


def repeated_port_read(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """IN with a REP prefix reads its port as often as INS would, and takes the first value."""
    ours, theirs = _traces(case, subject, oracle)
    if not _only_trace(differences) or not prefix_facts(case).rep or len(theirs) != 1:
        return False
    place = (PIO, theirs[0].addr, theirs[0].size, False)
    return ours[:1] == theirs and all(access[:4] == place for access in ours)


def port_read_ahead(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """INS reads its port, with REP many times at once, before it finds out that the destination faults."""
    ours, theirs = _traces(case, subject, oracle)
    more = ours[len(theirs) :]
    return (
        _only_trace(differences)
        and subject.exception is not None
        and ours[: len(theirs)] == theirs
        and all(access.kind == PIO and not access.write for access in more)
    )


def ports_before_memory(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """REP INS reads its port many times ahead, then writes upwards all of it to memory as one operand.

    If that operand faults, iterations are lost that a processor would have finished.
    """
    lost = subject.exception is not None and subject.exception[0] == PF_VECTOR
    fields = {difference.field for difference in differences} - {DEVICE_TRACE}
    stopped = oracle.exception is None and oracle.rip == case.rip  # iterations before the one that faults
    affected = _LOST | {"exception"} if stopped else _LOST
    if not prefix_facts(case).rep or (fields and not (lost and fields <= affected)):
        return False
    (ports, stores), (wanted, wanted_stores) = (
        ([a for a in side if a.kind == PIO], joined([a for a in side if a.kind == MMIO], pieces=True))
        for side in (trace_of(subject) or [], trace_of(oracle) or [])
    )
    ahead = ports[: len(wanted)] == wanted and not any(access.write for access in ports)
    return ahead and (stores == wanted_stores or lost)


def source_before_check(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """MOV to a bad segment register, POPF in virtual-8086 mode: the source is read before the fault."""
    if subject.exception is None:
        return False
    if all(is_walk(case, d) and d.field == "mem" for d in differences):
        swapped = (d._replace(subject=d.oracle, oracle=d.subject) for d in differences)
        return all(_adds_only(d, _ACCESSED) for d in swapped)
    ours, theirs = _traces(case, subject, oracle)
    return _only_trace(differences) and len(ours) == 1 and not ours[0].write and not theirs


def last_write_only(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """Several writes to MMIO by one instruction: each one replaces the fragments of the one before."""
    ours, theirs = _traces(case, subject, oracle)
    writes = [access for access in theirs if access.kind == MMIO and access.write]
    others = [access for access in theirs if access not in writes]
    return _only_trace(differences) and len(writes) > 1 and ours == [*others, writes[-1]]


def repeated_pops(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """POPA, RETF, IRET from MMIO: after each value userspace brings, all starts over, but for RSP."""
    ours, theirs = _traces(case, subject, oracle)
    read = [access for access in theirs if access.kind == MMIO and not access.write]
    skipped = [b.addr > a.addr + a.size for a, b in pairwise(ours)]
    popped = subject.gpr[VCPU_REGS_RSP] - oracle.gpr[VCPU_REGS_RSP] & 0xFFFF
    again = any(skipped) or 0 < popped <= _POPPED
    fault = subject.exception
    if fault is not None and fault[0] not in _POPPED_FAULTS:
        return False
    if vouches_for_nothing(oracle):  # rules, which know where the stack pointer should be
        steps = [b.addr - a.addr for a, b in pairwise(ours)]
        further = bool(steps) and steps == sorted(steps) and steps[-1] > ours[-1].size
        fields = {difference.field for difference in differences}
        return fields == {"rsp"} and further and not any(a.write for a in ours)
    return len(read) > 1 and ours[:1] == theirs[:1] and again and not any(a.write for a in ours)


def accessed_before_fault(
    case: Case, subject: Outcome, _oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """A walk that ends in a fault: a processor may have set A in the entries above, KVM has not."""
    if not is_physical(case) or subject.exception is None or subject.exception[0] != PF_VECTOR:
        return False
    return all(d.field == "mem" and _adds_only(d, _ACCESSED) for d in differences)


def walked_before_width(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """A MAXPHYADDR that only KVM knows: the processor's walk, which exits, has set A and D before the #PF.

    KVM: handle_ept_violation, with the module's parameter allow_smaller_maxphyaddr.
    """
    fault = subject.exception
    reserved = fault is not None and fault[0] == PF_VECTOR and (fault[1] or 0) & PFERR_RSVD
    if not reserved or fault != oracle.exception or guest_width(case) is None:
        return False
    swapped = (d._replace(subject=d.oracle, oracle=d.subject) for d in differences)
    return all(d.field == "mem" and _adds_only(d, _ACCESSED | _DIRTY) for d in swapped)


def _adds_only(difference: Difference, bits: int) -> bool:
    """The oracle's bytes are the subject's, some of them with one of `bits` set."""
    ours, theirs = bytes.fromhex(difference.subject), bytes.fromhex(difference.oracle)
    return all(not (a ^ b) & ~bits and b & a == a for a, b in zip(ours, theirs, strict=True))


def is_walk(case: Case, difference: Difference) -> bool:
    """Only accessed and dirty bits differ, which walks of page tables set."""
    if not is_physical(case) or difference.field != "mem":
        return False
    both = (difference, difference._replace(subject=difference.oracle, oracle=difference.subject))
    return any(_adds_only(side, _ACCESSED | _DIRTY) for side in both)


def straddling_device(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """An access over the end of the canonical addresses, with a device there: both parts reach it.

    KVM looks at the first byte's address only; a processor raises the fault before it reads anything.
    """
    end = 1 << linear_bits(case.system.cr4) - 1
    ours, theirs = _traces(case, subject, oracle)
    return (
        _only_trace(differences)
        and case.mode == "prot64"
        and not is_physical(case)
        and oracle.exception in ((GP_VECTOR, 0, None), (SS_VECTOR, 0, None))
        and _bytes(ours)[: len(_bytes(theirs))] == _bytes(theirs)
        and any(access.addr <= end <= access.addr + access.size for access in ours)
    )


def _bytes(trace: Sequence[DeviceAccess]) -> list[tuple[int, bool, int]]:
    """What was read or written where, byte by byte."""
    return [(access.addr + i, access.write, byte) for access in trace for i, byte in enumerate(access.data)]


def unwalked_write(case: Case, subject: Outcome, _oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """A write to MMIO whose physical address KVM knows from the read before: it sets no dirty bit."""
    written = any(access.kind == MMIO and access.write for access in trace_of(subject) or ())
    return (
        is_physical(case) and written and all(d.field == "mem" and _adds_only(d, _DIRTY) for d in differences)
    )


def fetch_bit_without_pae(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """32-bit paging with EFER.NXE: KVM sets I/D in the error code of a fetch, the processor does not."""
    ours, theirs = subject.exception, oracle.exception
    system = case.system
    without = not system.cr4 & (X86_CR4_PAE | X86_CR4_SMEP) and not system.efer & EFER_LMA
    return (
        is_physical(case)
        and bool(system.efer & EFER_NX)
        and without
        and {d.field for d in differences} == {"exception.error_code"}
        and ours is not None
        and theirs is not None
        and ours[1] == (theirs[1] or 0) | PFERR_FETCH
    )


def wide_large_page(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """32-bit paging: KVM has 36 bits of physical addresses in 4 MiB pages, and reserves what is above."""
    ours, theirs = subject.exception, oracle.exception
    system = case.system
    if not is_physical(case) or system.cr4 & X86_CR4_PAE or not system.cr4 & X86_CR4_PSE:
        return False
    if not _reserved(ours) or _reserved(theirs):
        return False
    address = (ours or (0, 0, 0))[2] or 0
    entries, _physical = walk(
        case_memory(case).pages, system.cr0, system.cr3, system.cr4, system.efer, address
    )
    return bool(entries and entries[0] & _PS and entries[0] & _ABOVE_36_BITS)


def _reserved(fault: Fault | None) -> bool:
    """A #PF because of a reserved bit."""
    return fault is not None and fault[0] == PF_VECTOR and bool((fault[1] or 0) & PFERR_RSVD)

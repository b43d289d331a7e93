"""The rules behind the quirks that only cases of exit paths show: what KVM does around the emulator.

KVM: handle_dr, emulator_read_write_onepage, x86_emulate_instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from emufuzz.arch import cr
from emufuzz.arch.exceptions import DB_VECTOR, GP_VECTOR, PF_VECTOR, PFERR_PRESENT, PFERR_WRITE
from emufuzz.arch.regs import GPR_NAMES, VCPU_REGS_RCX, VCPU_REGS_RSP
from emufuzz.case.devices import MMIO, DeviceAccess, trace_to_obj
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Case, Outcome, case_pages, is_physical
from emufuzz.oracle.device_trace import DEVICE_TRACE, trace_of
from emufuzz.oracle.gaps import vouches_for_nothing
from emufuzz.oracle.instruction import Access, CaseInstruction
from emufuzz.oracle.machine_rules import is_walk, port_read_ahead
from emufuzz.oracle.operands import modrm, place_of, prefix_facts
from emufuzz.oracle.quirk_rules import split_write
from emufuzz.oracle.rules.decoded import MAX_INSTRUCTION

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

_REFUSED_WRITE: Final = PFERR_PRESENT | PFERR_WRITE
_MOV_DR: Final = frozenset((b"\x0f\x21", b"\x0f\x23"))
_MOV_TO_CR: Final = b"\x0f\x22"
_WRMSR: Final = b"\x0f\x30"
_HLT: Final = b"\xf4"
_REGISTER: Final = 3  # mod of ModRM
#: What another instruction behind the case's may change.
_OF_ANOTHER: Final = frozenset(("rip", "rflags", "mem", *GPR_NAMES))
_BASE_MSRS: Final = {0xC0000100: "seg.fs", 0xC0000101: "seg.gs"}
_VMXE: Final = 1 << 13
#: Bits of CR4 that CPUID announces (SDM Vol. 3A 2.5) and the default guest may not have.
_FEATURES_OF_CR4: Final = (
    cr.X86_CR4_UMIP | cr.X86_CR4_LA57 | cr.X86_CR4_FSGSBASE | cr.X86_CR4_PCIDE | cr.X86_CR4_OSXSAVE
    | cr.X86_CR4_SMEP | cr.X86_CR4_SMAP | cr.X86_CR4_PKE | _VMXE
)  # fmt: skip


def debug_registers_later(case: Case, subject: Outcome, _oracle: Outcome, _: Sequence[Difference]) -> bool:
    """MOV DR exits once: its handler only lets the guest have the registers, and does nothing else."""
    done_nothing = (subject.gpr, subject.rip, subject.system) == (case.gpr, case.rip, case.system)
    return _opcode(case) in _MOV_DR and done_nothing and subject.exception is None and not subject.pages


def emulates_on(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """Real mode as virtual-8086 mode: once CR0.PE is set hardware cannot enter, and KVM goes on emulating.

    What it comes to is the HLT behind the instruction, which changes nothing but RIP; or, where the bytes of
    a displacement follow that MOV to CR0 does not have, an instruction that they make.
    """
    length = int(CaseInstruction(case).decode(lax=True).len)
    ends = (case.rip + length, subject.system.cr0 & cr.X86_CR0_PE)
    fields, further = {difference.field for difference in differences}, subject.rip - ends[0]
    if case.code[length : length + 1] == _HLT:
        goes_on = fields == {"rip"} and further == len(_HLT)
    else:
        goes_on = _has_displacement(case) and fields <= _OF_ANOTHER and 0 < further <= MAX_INSTRUCTION
    return (
        goes_on
        and case.mode == "real"
        and bool(subject.system.cr0 & cr.X86_CR0_PE)
        and (vouches_for_nothing(oracle) or (oracle.rip, oracle.system.cr0 & cr.X86_CR0_PE) == ends)
    )


def _has_displacement(case: Case) -> bool:
    """MOV to a control register whose ModRM asks for a displacement, which it does not have (SDM Vol. 2B)."""
    return _opcode(case) == _MOV_TO_CR and modrm(case)[0] != _REGISTER


def missing_feature(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """MOV to CR4 of a bit whose feature the guest's CPUID lacks, but the oracle's processor has."""
    completed = oracle.exception in {None, (DB_VECTOR, None, None)}
    refused = completed and subject.exception == (GP_VECTOR, 0, None)
    added = oracle.system.cr4 & ~case.system.cr4
    return refused and _opcode(case) == _MOV_TO_CR and bool(added & _FEATURES_OF_CR4)


def hidden_base(case: Case, subject: Outcome, _oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """WRMSR to FS.base or GS.base while virtual-8086 mode stands in for real mode.

    KVM writes the base that hardware uses (vmx_set_msr); the guest's own one, which it shows
    (vmx_get_segment), stays.
    """
    written = case.gpr[VCPU_REGS_RCX] & 0xFFFFFFFF
    return (
        case.mode == "real"
        and _opcode(case) == _WRMSR
        and {difference.field for difference in differences} == {_BASE_MSRS.get(written)}
        and subject.system.seg == case.system.seg
    )


def _opcode(case: Case) -> bytes:
    """Two bytes behind the prefixes."""
    start = prefix_facts(case).length
    return case.code[start : start + 2]


def unchecked_write(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """What reads MMIO and then writes to it uses the known address: the page may be read-only."""
    fault = oracle.exception
    if not is_physical(case) or subject.exception is not None or fault is None or fault[0] != PF_VECTOR:
        return False
    if (fault[1] or 0) & _REFUSED_WRITE != _REFUSED_WRITE:
        return False
    offset = (fault[2] or 0) & PAGE_MASK
    accesses = [access for access in trace_of(subject) or () if access.kind == MMIO]
    reads = {access.addr for access in accesses if not access.write}
    return any(
        access.write and access.addr in reads and access.addr & PAGE_MASK == offset for access in accesses
    )


def port_read_before_split(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """INS over the end of a page: the port is read, and the first page written, before the second faults."""
    memory = [difference for difference in differences if difference.field == "mem"]
    trace = [difference for difference in differences if difference.field == DEVICE_TRACE]
    if not memory or not trace or len(memory) + len(trace) != len(differences):
        return False
    written = split_write(case, subject, oracle, memory)
    return written and port_read_ahead(case, subject, oracle, trace)


def _pushed_for_fault(case: Case, subject: Outcome, oracle: Outcome, stack: Access) -> bool:
    """The same where the stack's page is absent: the push that should fault went to the device."""
    fault, trace = oracle.exception, trace_of(subject) or ()
    if subject.exception is not None or fault is None or fault[0] != PF_VECTOR or fault[2] != stack.linear:
        return False
    if len(trace) < 2 or trace[-2].write or trace[-2].addr != trace[-1].addr:
        return False
    back = case.rip + int(CaseInstruction(case).decode(lax=True).len) & (1 << 8 * stack.size) - 1
    pushed = DeviceAccess(
        MMIO, trace[-1].addr, stack.size, write=True, data=back.to_bytes(stack.size, "little")
    )
    gpr, top = list(subject.gpr), case.gpr[VCPU_REGS_RSP]
    moved = top - gpr[VCPU_REGS_RSP] & 0xFFFF == stack.size
    gpr[VCPU_REGS_RSP] = top
    called = tuple(gpr) == case.gpr and subject.rip == int.from_bytes(trace[-2].data, "little")
    same_place = not (pushed.addr ^ stack.linear) & PAGE_MASK
    return trace[-1] == pushed and same_place and moved and called and not subject.pages


def _pushed_from_hole(subject: Outcome, oracle: Outcome) -> bool:
    """The same where the stack is a device, too: what it should get is written to the one that was read."""
    ours, theirs = trace_of(subject) or [], trace_of(oracle) or []
    if len(theirs) < 2 or theirs[-2].write or not theirs[-1].write:
        return False
    read, pushed = theirs[-2:]
    moved = pushed._replace(addr=read.addr)
    return not (read.addr ^ pushed.addr) & PAGE_MASK and ours == [*theirs[:-1], moved]


def pushed_to_operand(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """CALL through MMIO whose address has the page offset of the stack's top: it gets the return address.

    KVM takes the address of the exit for that of any access with its offset into a page.
    """
    from emufuzz.oracle.compare import compare  # noqa: PLC0415 - which looks for quirks

    fields = {difference.field for difference in differences}
    stack = next((a for a in CaseInstruction(case).accesses if a.write), None)
    if fields == {"exception"} and stack is not None:
        return _pushed_for_fault(case, subject, oracle, stack)
    if fields == {DEVICE_TRACE} and _pushed_from_hole(subject, oracle):
        return True
    if not fields <= {"mem", DEVICE_TRACE}:
        return False
    (target,) = (trace_of(oracle) or ())[-1:] or (None,)
    if stack is None or target is None or target.write or (target.addr ^ stack.linear) & PAGE_MASK:
        return False
    place = place_of(case, stack.linear)
    page = None if place is None else oracle.pages.get(place >> PAGE_SHIFT)
    if place is None or page is None or (place & PAGE_MASK) + stack.size > PAGE_SIZE:
        return False
    start = place & PAGE_MASK
    before = case_pages(case)[place >> PAGE_SHIFT]
    pushed = page[start : start + stack.size]
    restored = page[:start] + before[start : start + stack.size] + page[start + stack.size :]
    written = DeviceAccess(MMIO, target.addr, stack.size, write=True, data=pushed)
    trace = trace_to_obj((*(trace_of(oracle) or ()), written))
    expected = msgspec.structs.replace(
        oracle,
        pages={**oracle.pages, place >> PAGE_SHIFT: restored},
        extra={**(oracle.extra or {}), DEVICE_TRACE: trace},
    )
    return all(is_walk(case, difference) for difference in compare(case, subject, expected))

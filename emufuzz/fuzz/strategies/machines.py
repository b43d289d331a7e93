"""What exit paths need beyond an instruction: devices, prefixes, events, tasks, states that are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from emufuzz.arch import cr
from emufuzz.arch.descriptors import DescStruct
from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_REGS_RDX, VCPU_SREG_DS, VCPU_SREG_ES, VCPU_SREG_SS
from emufuzz.arch.rflags import X86_EFLAGS_IOPL
from emufuzz.case.build import CODE_BASE, DATA_PAGES, GDT_BASE, PAGE_TABLES, STACK_TOP, TSS_BASE
from emufuzz.case.model import PAGE_SIZE, Case, Memory, Segment, TableRegister
from emufuzz.fuzz.kvm.recipes import FORCED

Draw: TypeAlias = Callable[[SearchStrategy[Any]], Any]

#: The page that is a device on paths which have one: the last of the data pages; one that only 37 bits
#: reach; the local APIC's.
DEVICE: Final = DATA_PAGES[-1]
HIGH_DEVICE: Final = 1 << 36
APIC: Final = 0xFEE00000
_PORTS: Final = (0x60, 0x80, 0x3F8)
_BACKDOOR: Final = 0x5658  # VMware's
_MSRS: Final = (0x10, 0x174, 0x12345)
#: A task of its own: selector, place and size of its TSS; selectors of flat code and data of CPL 0.
_TASK, _TASK_STATE, _TASK_LIMIT, _CODE, _DATA = 0x88, TSS_BASE + 0x800, 0x67, 0x08, 0x28
_AVAILABLE, _BUSY, _IRET = 9, 11, 1


def _with_extra(case: Case, **members: Any) -> Case:
    return msgspec.structs.replace(case, extra={**(case.extra or {}), **members})


def _with_system(case: Case, **fields: Any) -> Case:
    return msgspec.structs.replace(case, system=msgspec.structs.replace(case.system, **fields))


def _with_registers(case: Case, values: Mapping[int, int]) -> Case:
    gpr = [values.get(i, old) for i, old in enumerate(case.gpr)]
    return msgspec.structs.replace(case, gpr=tuple(gpr))


def _with_memory(case: Case, *entries: tuple[int, bytes]) -> Case:
    return msgspec.structs.replace(case, mem=Memory((*case.mem.entries, *entries)))


# -- devices -------------------------------------------------------------------------------------


def device(draw: Draw, case: Case) -> Case:
    """The last data page is a device."""
    entries = tuple(
        (at, data)
        for at, data in case.mem.entries
        if not DEVICE <= at + max(len(data), 1) - 1 < DEVICE + PAGE_SIZE
    )
    return _with_extra(msgspec.structs.replace(case, mem=Memory(entries)), devices=[_mmio(draw, DEVICE)])


def high_device(draw: Draw, case: Case) -> Case:
    """A device beyond the addresses that the guest believes in."""
    return _with_extra(case, devices=[_mmio(draw, HIGH_DEVICE)], kvm={"cpuid": {"maxphyaddr": 36}})


def _mmio(draw: Draw, address: int) -> dict[str, Any]:
    reads = draw(st.binary(max_size=8)).hex()
    return {"kind": "mmio", "addr": hex(address), "size": PAGE_SIZE, "reads": reads}


def local_apic(draw: Draw, case: Case) -> Case:
    """An APIC in the kernel that is on, with nothing in service."""
    registers = {0xF0: 0x1FF, 0x320: draw(st.sampled_from((0x10000, 0x20030, 0x31)))}
    return _with_extra(case, kvm={"knobs": {"irqchip": True}, "lapic": registers})


def notified(_: Draw, case: Case) -> Case:
    """An eventfd that any write to the device's first byte tells."""
    return _with_extra(case, kvm={"ioeventfds": [{"addr": hex(DEVICE)}]})


def unpaged(_: Draw, case: Case) -> Case:
    """No paging, as shadow paging has no hidden tables."""
    return _with_system(case, cr0=case.system.cr0 & ~(cr.X86_CR0_PG | cr.X86_CR0_WP))


# -- instructions --------------------------------------------------------------------------------


def forced(_: Draw, case: Case) -> Case:
    """KVM's prefix before the instruction."""
    return msgspec.structs.replace(case, code=FORCED + case.code, rip=case.rip - len(FORCED))


def ports(draw: Draw, case: Case) -> Case:
    """A port in DX, one element at least, and I/O allowed."""
    case = _with_registers(
        case, {VCPU_REGS_RDX: draw(st.sampled_from(_PORTS)), VCPU_REGS_RCX: draw(st.integers(1, 4))}
    )
    return msgspec.structs.replace(
        case, rflags=case.rflags | X86_EFLAGS_IOPL, port_in=draw(st.binary(max_size=8))
    )


def backdoor(draw: Draw, case: Case) -> Case:
    """VMware's port in DX, or another one; I/O is not allowed above CPL 0."""
    case = _with_registers(case, {VCPU_REGS_RDX: draw(st.sampled_from((_BACKDOOR, *_PORTS)))})
    return msgspec.structs.replace(case, rflags=case.rflags & ~X86_EFLAGS_IOPL)


def umip(_: Draw, case: Case) -> Case:
    """CR4.UMIP."""
    return _with_system(case, cr4=case.system.cr4 | cr.X86_CR4_UMIP)


def denied_msr(draw: Draw, case: Case) -> Case:
    """An MSR that userspace answers for; it has a value for it, or not."""
    index = draw(st.sampled_from(_MSRS))
    case = _with_extra(
        _with_registers(case, {VCPU_REGS_RCX: index}), kvm={"knobs": {"msr_denied": hex(index)}}
    )
    if draw(st.booleans()):
        return case
    return _with_system(case, msr=((index, draw(st.integers(0, (1 << 40) - 1))),))


# -- events and states ---------------------------------------------------------------------------


def event(draw: Draw, case: Case) -> Case:
    """An exception, an interrupt or an NMI for real mode, and a table of vectors."""
    vector = draw(st.sampled_from((0x21, 8, 0xFF)))
    events: tuple[dict[str, Any], ...] = (
        {"nmi": 1}, {"interrupt": {"vector": vector}}, {"interrupt": {"vector": vector, "soft": True}},
        {"pending": {"vector": draw(st.sampled_from((0, 6, 13)))}},
    )  # fmt: skip
    kvm = {**draw(st.sampled_from(events)), "instruction_length": draw(st.integers(0, 3))}
    table = struct.pack("<HH", CODE_BASE, 0) * 256
    return _with_extra(_with_memory(case, (case.system.idtr.base, table)), kvm=kvm)


def refused_segment(draw: Draw, case: Case) -> Case:
    """A segment register that VM entry refuses (SDM Vol. 3C 26.3.1.2)."""
    nr = draw(st.sampled_from((VCPU_SREG_DS, VCPU_SREG_ES)))
    old = case.system.seg
    if case.mode in ("real", "vm86"):
        choices: tuple[tuple[int, Segment], ...] = (
            (nr, msgspec.structs.replace(old[nr], limit=0xFFFFFFFF, g=1)),
            (nr, msgspec.structs.replace(old[nr], limit=0xFFF)),
            (nr, msgspec.structs.replace(old[nr], sel=old[nr].sel ^ 1)),
        )
    else:
        stack = old[VCPU_SREG_SS]
        choices = (
            (VCPU_SREG_SS, msgspec.structs.replace(stack, sel=stack.sel ^ 1)),
            (VCPU_SREG_SS, msgspec.structs.replace(stack, type=1)),
            (nr, msgspec.structs.replace(stack, dpl=0, sel=_DATA | 3)),
        )
    place, segment = draw(st.sampled_from(choices))
    return _with_system(case, seg=(*old[:place], segment, *old[place + 1 :]))


def task(draw: Draw, case: Case) -> Case:
    """CALL, IRET or JMP to a 32-bit task."""
    reason = draw(st.sampled_from((2, 0, _IRET)))
    kind = _BUSY if reason == _IRET else _AVAILABLE
    row = DescStruct(_TASK_STATE, _TASK_LIMIT, kind, 0, 3, 1).pack()
    registers = [draw(st.integers(0, 0xFFFF)) for _ in range(3)]
    words = [0, *(STACK_TOP, _DATA) * 3, PAGE_TABLES, CODE_BASE, 2, *registers, 0, STACK_TOP, 0, 0, 0]
    words += [_DATA, _CODE, _DATA, _DATA, 0, 0, 0, 0]
    state = struct.pack("<26I", *words)
    table = TableRegister(case.system.gdtr.base, max(case.system.gdtr.limit, _TASK + 7))
    case = _with_memory(_with_system(case, gdtr=table), (GDT_BASE + _TASK, row), (_TASK_STATE, state))
    return _with_extra(case, kvm={"exit_qualification": _TASK | reason << 30, "instruction_length": 2})

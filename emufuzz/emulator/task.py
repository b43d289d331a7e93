"""Hardware task switches, 16- and 32-bit (SDM Vol. 3A 7.3 "Task Switching").

emulate.c: emulator_task_switch, emulator_do_task_switch, task_switch_16, task_switch_32 and their
save and load functions. Called for task-switch exits, not for a decoded instruction.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from emufuzz.arch.cr import X86_CR0_TS
from emufuzz.arch.descriptors import DescStruct
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
from emufuzz.arch.rflags import X86_EFLAGS_NT, X86_EFLAGS_VM
from emufuzz.emulator.access import emulate_push, linear_read_system, linear_write_system
from emufuzz.emulator.ctxt import (
    X86EmulateCtxt,
    emulator_invalidate_register_cache,
    reg_read,
    reg_write,
    writeback_registers,
)
from emufuzz.emulator.faults import emulate_gp, emulate_ts
from emufuzz.emulator.segments import (
    X86_TRANSFER_TASK_SWITCH,
    _load_segment_descriptor,
    get_segment_selector,
    read_segment_descriptor,
    set_segment_selector,
    write_segment_descriptor,
)
from emufuzz.emulator.x86emul import (
    EMULATION_FAILED,
    EMULATION_OK,
    MASK16,
    MASK32,
    MASK64,
    OPERAND_NONE,
    X86EMUL_CONTINUE,
    X86EMUL_MODE_PROT32,
    X86EMUL_MODE_VM86,
    X86EMUL_UNHANDLEABLE,
)

# Reasons of a task switch (VM-exit qualification bits 31:30; SDM Vol. 3C Table 28-2).
TASK_SWITCH_CALL: Final = 0
TASK_SWITCH_IRET: Final = 1
TASK_SWITCH_JMP: Final = 2
TASK_SWITCH_GATE: Final = 3

#: Back link, three stacks, then IP, FLAGS, eight registers, ES CS SS DS, LDT.
_TSS16: Final = Struct("<22H")
#: Back link, three stacks, CR3, then EIP, EFLAGS, eight registers, six selectors, LDT, T and I/O map.
_TSS32: Final = Struct("<26I")
_TSS32_EIP: Final = 8  # index of EIP among the 32-bit words
_TSS32_LDT: Final = 24
_TSS16_IP: Final = 7
_NO_LINK: Final = 0xFFFF
_DR7_LOCAL: Final = 0x55 | 0x100

_SREGS16: Final = (VCPU_SREG_ES, VCPU_SREG_CS, VCPU_SREG_SS, VCPU_SREG_DS)
_SREGS32: Final = (*_SREGS16, VCPU_SREG_FS, VCPU_SREG_GS)


def emulator_task_switch(
    ctxt: X86EmulateCtxt,
    tss_selector: int,
    idt_index: int,
    reason: int,
    error_code: int | None,
) -> int:
    """Switch to the task of `tss_selector`: EMULATION_OK or EMULATION_FAILED.

    `idt_index` is the vector (0..255) of a software interrupt through a task gate, else -1;
    `reason` a TASK_SWITCH_* value; `error_code` is pushed on the new task's stack unless None.

    KVM deviation: a fault does not set ctxt.have_exception, so nothing is injected, and what was
    changed until then stays (SDM Vol. 3A 7.3); the T bit and the type of the new TSS are not
    looked at.
    """
    emulator_invalidate_register_cache(ctxt)
    ctxt.next_eip = ctxt.eip
    ctxt.dst.type = OPERAND_NONE
    rc = _do_task_switch(ctxt, tss_selector, idt_index, reason, error_code)
    ctxt.rc = rc
    if rc == X86EMUL_CONTINUE:
        ctxt.eip = ctxt.next_eip
        writeback_registers(ctxt)
    return EMULATION_FAILED if rc == X86EMUL_UNHANDLEABLE else EMULATION_OK


def _do_task_switch(
    ctxt: X86EmulateCtxt, selector: int, idt_index: int, reason: int, error_code: int | None
) -> int:
    """The steps of emulator_do_task_switch, in KVM's order."""
    ops = ctxt.ops
    old_selector = get_segment_selector(ctxt, VCPU_SREG_TR)
    old_base = ops.get_cached_segment_base(ctxt, VCPU_SREG_TR)
    rc, _, new = read_segment_descriptor(ctxt, selector)
    if rc != X86EMUL_CONTINUE:
        return rc
    rc, _, old = read_segment_descriptor(ctxt, old_selector)
    if rc != X86EMUL_CONTINUE:
        return rc
    rc = _check(ctxt, selector, new, idt_index, reason)
    if rc != X86EMUL_CONTINUE:
        return rc
    if reason in (TASK_SWITCH_IRET, TASK_SWITCH_JMP):
        old.type &= ~2
        # KVM deviation: a fault of this write is ignored (SDM Vol. 3A 7.3).
        write_segment_descriptor(ctxt, old_selector, old)
    if reason == TASK_SWITCH_IRET:
        ctxt.eflags &= ~X86_EFLAGS_NT
    nested = reason in (TASK_SWITCH_CALL, TASK_SWITCH_GATE)
    link = old_selector if nested else _NO_LINK
    switch = _task_switch_32 if new.type & 8 else _task_switch_16
    rc = switch(ctxt, link, old_base, new.base)
    if rc != X86EMUL_CONTINUE:
        return rc
    if nested:
        ctxt.eflags |= X86_EFLAGS_NT
    if reason != TASK_SWITCH_IRET:
        new.type |= 2
        write_segment_descriptor(ctxt, selector, new)
    ops.set_cr(ctxt, 0, ops.get_cr(ctxt, 0) | X86_CR0_TS)
    ops.set_segment(ctxt, selector, new, 0, VCPU_SREG_TR)
    if error_code is not None:
        ctxt.op_bytes = ctxt.ad_bytes = 4 if new.type & 8 else 2
        ctxt.lock_prefix = False
        rc = emulate_push(ctxt, error_code, ctxt.op_bytes)
    ops.set_dr(ctxt, 7, ops.get_dr(ctxt, 7) & ~_DR7_LOCAL)
    return rc


def _check(ctxt: X86EmulateCtxt, selector: int, new: DescStruct, idt_index: int, reason: int) -> int:
    """Privilege of a task gate, presence and limit of the new TSS."""
    if reason == TASK_SWITCH_GATE and idt_index != -1:
        rc, gate = _read_interrupt_descriptor(ctxt, idt_index)
        if rc != X86EMUL_CONTINUE:
            return rc
        if max(selector & 3, ctxt.ops.cpl(ctxt)) > gate.dpl:
            return emulate_gp(ctxt, idt_index << 3 | 2)
    limit = new.limit_scaled
    if not new.p or (limit < 0x67 and new.type & 8) or limit < 0x2B:
        return emulate_ts(ctxt, selector & 0xFFFC)
    return X86EMUL_CONTINUE


def _read_interrupt_descriptor(ctxt: X86EmulateCtxt, index: int) -> tuple[int, DescStruct]:
    base, limit = ctxt.ops.get_idt(ctxt)
    if limit < index * 8 + 7:
        return emulate_gp(ctxt, index << 3 | 2), DescStruct()
    rc, data = linear_read_system(ctxt, base + index * 8 & MASK64, 8)
    return rc, DescStruct.unpack(data) if rc == X86EMUL_CONTINUE else DescStruct()


def _task_switch_16(ctxt: X86EmulateCtxt, link: int, old_base: int, new_base: int) -> int:
    """Save into the whole old TSS, then load from the new one.

    KVM deviation: the mode is not derived anew (SDM Vol. 3A 7.6).
    """
    rc, data = linear_read_system(ctxt, old_base, _TSS16.size)
    if rc != X86EMUL_CONTINUE:
        return rc
    words = list(_TSS16.unpack(data))
    words[_TSS16_IP] = ctxt.next_eip & MASK16
    words[_TSS16_IP + 1] = ctxt.eflags & MASK16
    for reg in range(8):
        words[_TSS16_IP + 2 + reg] = reg_read(ctxt, reg) & MASK16
    for i, seg in enumerate((*_SREGS16, VCPU_SREG_LDTR)):
        words[_TSS16_IP + 10 + i] = get_segment_selector(ctxt, seg)
    rc = linear_write_system(ctxt, old_base, _TSS16.pack(*words))
    if rc == X86EMUL_CONTINUE:
        rc, data = linear_read_system(ctxt, new_base, _TSS16.size)
    if rc == X86EMUL_CONTINUE and link != _NO_LINK:
        rc = linear_write_system(ctxt, new_base, link.to_bytes(2, "little"))
    if rc != X86EMUL_CONTINUE:
        return rc
    words = list(_TSS16.unpack(data))
    ctxt.next_eip = words[_TSS16_IP]
    ctxt.eflags = words[_TSS16_IP + 1] | 2
    for reg in range(8):
        reg_write(ctxt, reg, words[_TSS16_IP + 2 + reg])
    selectors = words[_TSS16_IP + 10 : _TSS16_IP + 14]
    return _load_selectors(ctxt, _SREGS16, selectors, words[_TSS16_IP + 14], selectors[1] & 3)


def _task_switch_32(ctxt: X86EmulateCtxt, link: int, old_base: int, new_base: int) -> int:
    """Save EIP to GS, not CR3 and the LDT selector; then load from the new TSS."""
    rc, data = linear_read_system(ctxt, old_base, _TSS32.size)
    if rc != X86EMUL_CONTINUE:
        return rc
    words = list(_TSS32.unpack(data))
    words[_TSS32_EIP] = ctxt.next_eip & MASK32
    words[_TSS32_EIP + 1] = ctxt.eflags & MASK32
    for reg in range(8):
        words[_TSS32_EIP + 2 + reg] = reg_read(ctxt, reg) & MASK32
    for i, seg in enumerate(_SREGS32):
        words[_TSS32_EIP + 10 + i] = get_segment_selector(ctxt, seg)
    start, end = _TSS32_EIP * 4, _TSS32_LDT * 4
    rc = linear_write_system(ctxt, old_base + start & MASK64, _TSS32.pack(*words)[start:end])
    if rc == X86EMUL_CONTINUE:
        rc, data = linear_read_system(ctxt, new_base, _TSS32.size)
    if rc == X86EMUL_CONTINUE and link != _NO_LINK:
        # KVM deviation: the back link is stored as four bytes (SDM Vol. 3A 7.2.1: 16 bits).
        rc = linear_write_system(ctxt, new_base, link.to_bytes(4, "little"))
    if rc != X86EMUL_CONTINUE:
        return rc
    return _load_tss32(ctxt, _TSS32.unpack(data))


def _load_tss32(ctxt: X86EmulateCtxt, words: tuple[int, ...]) -> int:
    """Take over a 32-bit task's state; VM in its EFLAGS decides how its selectors are read."""
    if ctxt.ops.set_cr(ctxt, 3, words[_TSS32_EIP - 1]):
        return emulate_gp(ctxt, 0)
    ctxt.next_eip = words[_TSS32_EIP]
    ctxt.eflags = words[_TSS32_EIP + 1] | 2
    for reg in range(8):
        reg_write(ctxt, reg, words[_TSS32_EIP + 2 + reg])
    selectors = [word & MASK16 for word in words[_TSS32_EIP + 10 : _TSS32_EIP + 16]]
    return _load_selectors(ctxt, _SREGS32, selectors, words[_TSS32_LDT] & MASK16, None)


def _load_selectors(
    ctxt: X86EmulateCtxt,
    segs: tuple[int, ...],
    selectors: list[int],
    ldt: int,
    cpl: int | None,
) -> int:
    """All selectors first, since CPL comes from CS; then the descriptors, LDTR first.

    `cpl` None: from the mode that the new EFLAGS select (32-bit TSS).
    """
    pairs = list(zip((VCPU_SREG_LDTR, *segs), (ldt, *selectors), strict=True))
    for seg, selector in pairs:
        set_segment_selector(ctxt, selector, seg)
    if cpl is None:
        vm86 = ctxt.eflags & X86_EFLAGS_VM
        ctxt.mode = X86EMUL_MODE_VM86 if vm86 else X86EMUL_MODE_PROT32
        cpl = 3 if vm86 else selectors[1] & 3
    for seg, selector in pairs:
        rc = _load_segment_descriptor(ctxt, selector, seg, cpl, X86_TRANSFER_TASK_SWITCH)
        if rc != X86EMUL_CONTINUE:
            return rc
    return X86EMUL_CONTINUE

"""Operand accesses of the emulator: memory, in-kernel devices, and what userspace must do (MMIO).

KVM: emulator_read_write, emulator_read_write_onepage, emulator_write_phys,
emulator_cmpxchg_emulated, complete_emulated_mmio (its walk through the fragments).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emufuzz.arch.exceptions import PFERR_WRITE
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from emufuzz.emulator.ctxt import X86EmulateCtxt, X86Exception
from emufuzz.emulator.flags import String, TwoMemOp
from emufuzz.emulator.x86emul import (
    MASK32,
    MASK64,
    X86EMUL_CMPXCHG_FAILED,
    X86EMUL_CONTINUE,
    X86EMUL_IO_NEEDED,
    X86EMUL_MODE_PROT64,
    X86EMUL_PROPAGATE_FAULT,
)
from emufuzz.kvm.guest_virt import user_access
from emufuzz.kvm.io_bus import (
    KVM_TRACE_MMIO_READ,
    KVM_TRACE_MMIO_READ_UNSATISFIED,
    KVM_TRACE_MMIO_WRITE,
    vcpu_mmio_read,
    vcpu_mmio_write,
)
from emufuzz.kvm.mmu.mmio import (
    APIC_DEFAULT_PHYS_BASE,
    cached_mmio_gpa,
    vcpu_is_mmio_gpa,
    vcpu_mmio_gva_to_gpa,
)
from emufuzz.kvm.mmu.pferr import INVALID_GPA
from emufuzz.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    from emufuzz.kvm.machine import KvmMachine

KVM_EXIT_MMIO: Final = "MMIO"
KVM_MAX_MMIO_FRAGMENTS: Final = 2

_PAGE: Final = MASK64 - PAGE_MASK
_PIECE: Final = 8  # bytes that one KVM_EXIT_MMIO transfers
_ATOMIC_SIZES: Final = (1, 2, 4, 8)
_CACHE_LINE: Final = 64


class MmioFragment:
    """struct kvm_mmio_fragment: a run of bytes that userspace has to read or write, at most 8 an exit."""

    __slots__ = ("data", "done", "gpa", "size")

    def __init__(self, gpa: int, size: int, data: bytes) -> None:
        self.gpa = gpa
        self.size = size
        self.data = data  # what is written, or what was read so far
        self.done = 0

    @property
    def last_piece(self) -> int:
        """Where the last exit for it reads or writes: what is left as its address at the end."""
        return self.gpa + (self.size - 1) // _PIECE * _PIECE


class MmioState:
    """vcpu->mmio_*: the access that userspace has to do. `read` is what came back, `head` what RAM gave."""

    __slots__ = ("cur_fragment", "fragments", "is_write", "needed", "parts", "read_completed")

    def __init__(self) -> None:
        self.needed = False
        self.read_completed = False
        self.is_write = False
        self.cur_fragment = 0
        self.fragments: list[MmioFragment] = []
        #: Of a read: bytes that are known, and fragments, in the order of the operand.
        self.parts: list[bytes | MmioFragment] = []


def _trace(vcpu: Vcpu, kind: str, size: int, gpa: int, value: int) -> None:
    if vcpu.trace is not None:
        vcpu.trace.emit("kvm_mmio", type=kind, len=size, gpa=gpa, val=value)


def _may_use_gpa(ctxt: X86EmulateCtxt) -> bool:
    """KVM: emulator_can_use_gpa, one operand in memory and no repetition."""
    if ctxt.rep_prefix and ctxt.d & String:
        return False
    return not ctxt.d & TwoMemOp


def _translate(machine: KvmMachine, addr: int, exception: X86Exception, write: bool) -> tuple[int, int]:
    """(1 = MMIO, 0 = memory or nothing, -1 = #PF; gpa).

    KVM deviation: the address that the exit reported is taken for any access with the same offset
    into its page, so the push of CALL [mem] may go where the operand was; rights are not asked
    (SDM Vol. 3A 4.6).
    """
    ctxt, mmu = machine.ctxt, machine.mmu
    if ctxt.gpa_available and _may_use_gpa(ctxt) and addr & PAGE_MASK == ctxt.gpa_val & PAGE_MASK:
        gpa = ctxt.gpa_val
        mmio = int(vcpu_is_mmio_gpa(mmu, gpa))
        cached = None
    else:
        cached = cached_mmio_gpa(mmu, addr, write) if machine.vcpu.trace is not None else None
        mmio, gpa = vcpu_mmio_gva_to_gpa(mmu, addr, exception, write)
    if mmio > 0:
        _trace_match(machine.vcpu, addr, gpa, write, gpa_match=cached is None)
    return mmio, gpa


def _trace_match(vcpu: Vcpu, gva: int, gpa: int, write: bool, *, gpa_match: bool) -> None:
    """The last MMIO access was to this address; that the APIC's page is a device needs no match."""
    if vcpu.trace is not None and not (gpa_match and gpa & _PAGE == APIC_DEFAULT_PHYS_BASE):
        vcpu.trace.emit("vcpu_match_mmio", gva=gva, gpa=gpa, write=write, gpa_match=gpa_match)


def emulator_write_phys(machine: KvmMachine, gpa: int, data: bytes) -> bool:
    """Write to memory and tell the shadow MMU; False where there is none or it is read-only."""
    if machine.mmu.slots.write_guest(gpa, data) < 0:
        return False
    machine.mmu.shadow.track_write(gpa, len(data))
    return True


def _read_onepage(machine: KvmMachine, addr: int, size: int, exception: X86Exception) -> int:
    state, vcpu = machine.mmio, machine.vcpu
    mmio, gpa = _translate(machine, addr, exception, False)
    if mmio < 0:
        return X86EMUL_PROPAGATE_FAULT
    if not mmio:
        data = machine.mmu.slots.read_guest(gpa, size)
        if data is not None:
            state.parts.append(data)
            return X86EMUL_CONTINUE
    data = vcpu_mmio_read(vcpu, gpa, size)
    if data:
        state.parts.append(data)
    if len(data) < size:
        fragment = MmioFragment(gpa + len(data), size - len(data), b"")
        state.fragments.append(fragment)
        state.parts.append(fragment)
    return X86EMUL_CONTINUE


def _write_onepage(machine: KvmMachine, addr: int, data: bytes, exception: X86Exception) -> int:
    vcpu = machine.vcpu
    mmio, gpa = _translate(machine, addr, exception, True)
    if mmio < 0:
        return X86EMUL_PROPAGATE_FAULT
    if not mmio and emulator_write_phys(machine, gpa, data):
        return X86EMUL_CONTINUE
    _trace(vcpu, KVM_TRACE_MMIO_WRITE, len(data), gpa, int.from_bytes(data[:_PIECE], "little"))
    handled = vcpu_mmio_write(vcpu, machine.buses, gpa, data)
    if handled < len(data):
        rest = data[handled:]
        machine.mmio.fragments.append(MmioFragment(gpa + handled, len(rest), rest))
    return X86EMUL_CONTINUE


def _split(ctxt: X86EmulateCtxt, addr: int, size: int) -> list[tuple[int, int]]:
    """(address, size) of the parts of an access; outside 64-bit mode the second page is below 4 GiB."""
    now = PAGE_SIZE - (addr & PAGE_MASK)
    if now >= size:
        return [(addr, size)]
    mask = MASK64 if ctxt.mode == X86EMUL_MODE_PROT64 else MASK32
    return [(addr, now), (addr + now & mask, size - now)]


def emulator_read_emulated(
    machine: KvmMachine, ctxt: X86EmulateCtxt, addr: int, size: int, exception: X86Exception
) -> tuple[int, bytes]:
    """X86EmulateOps.read_emulated; X86EMUL_IO_NEEDED until userspace has answered."""
    state, vcpu = machine.mmio, machine.vcpu
    if state.read_completed:
        state.read_completed = False
        data = _answer(state)[:size].ljust(size, b"\0")
        gpa = state.fragments[0].last_piece
        _trace(vcpu, KVM_TRACE_MMIO_READ, size, gpa, int.from_bytes(data[:_PIECE], "little"))
        return X86EMUL_CONTINUE, data
    state.fragments = []
    state.parts = []
    parts = _split(ctxt, addr, size)
    for part, length in parts:
        rc = _read_onepage(machine, part, length, exception)
        if rc != X86EMUL_CONTINUE:
            return rc, b""
    if not state.fragments:
        return X86EMUL_CONTINUE, b"".join([part for part in state.parts if isinstance(part, bytes)])
    first = state.fragments[0]
    _ask(machine, write=False)
    _trace(vcpu, KVM_TRACE_MMIO_READ_UNSATISFIED, parts[-1][1], first.gpa, 0)
    return X86EMUL_IO_NEEDED, b""


def _answer(state: MmioState) -> bytes:
    """The operand of the read that is complete."""
    return b"".join([part.data if isinstance(part, MmioFragment) else part for part in state.parts])


def emulator_write_emulated(
    machine: KvmMachine, ctxt: X86EmulateCtxt, addr: int, data: bytes, exception: X86Exception
) -> int:
    """X86EmulateOps.write_emulated; what userspace must write counts as done.

    KVM deviation: an instruction that writes to devices more than once tells userspace of the last
    access only (SDM Vol. 2B PUSHA).
    """
    state = machine.mmio
    state.fragments = []
    done = 0
    for part, length in _split(ctxt, addr, len(data)):
        rc = _write_onepage(machine, part, data[done : done + length], exception)
        if rc != X86EMUL_CONTINUE:
            return rc
        done += length
    if state.fragments:
        _ask(machine, write=True)
    return X86EMUL_CONTINUE


def _ask(machine: KvmMachine, *, write: bool) -> None:
    state = machine.mmio
    state.needed = True
    state.is_write = write
    state.cur_fragment = 0
    _fill_run(machine)


def _fill_run(machine: KvmMachine) -> None:
    """Put the next piece of the current fragment into kvm_run."""
    state = machine.mmio
    fragment = state.fragments[state.cur_fragment]
    size = min(fragment.size - fragment.done, _PIECE)
    data = fragment.data[fragment.done : fragment.done + size] if state.is_write else b""
    machine.vcpu.run.leave(
        KVM_EXIT_MMIO, phys_addr=fragment.gpa + fragment.done, data=data, len=size, is_write=state.is_write
    )


def advance_mmio(machine: KvmMachine) -> bool:
    """Userspace has done a piece: take what it read; True if all is done, else the next one is asked for.

    If the instruction went on to memory after the write, its fragments are forgotten, and the piece
    that userspace was told of is all. KVM: complete_emulated_mmio up to its return into the emulator.
    """
    state = machine.mmio
    if not state.fragments:
        state.needed = False
        return True
    fragment = state.fragments[state.cur_fragment]
    size = min(fragment.size - fragment.done, _PIECE)
    if not state.is_write:
        fragment.data += machine.vcpu.run.data["data"][:size]
    fragment.done += size
    if fragment.done == fragment.size:
        state.cur_fragment += 1
    if state.cur_fragment < len(state.fragments):
        _fill_run(machine)
        return False
    state.needed = False
    return True


def emulator_cmpxchg_emulated(
    machine: KvmMachine, ctxt: X86EmulateCtxt, addr: int, old: bytes, new: bytes, exception: X86Exception
) -> int:
    """X86EmulateOps.cmpxchg_emulated.

    KVM deviation: what cannot be exchanged atomically (devices, the APIC page, two pages or cache
    lines, more than 8 bytes) is simply written (SDM Vol. 3A 8.1.2).
    """
    mmu, size = machine.mmu, len(new)
    if size in _ATOMIC_SIZES:
        gpa = mmu.gva_to_gpa(addr, PFERR_WRITE | user_access(mmu))
        if gpa != INVALID_GPA and gpa & _PAGE != APIC_DEFAULT_PHYS_BASE:
            line = _CACHE_LINE if machine.vcpu.options.host_split_lock_detect else PAGE_SIZE
            if gpa % line + size <= line:
                result = _exchange(machine, gpa, old, new)
                if result is not None:
                    return result
    return emulator_write_emulated(machine, ctxt, addr, new, exception)


def _exchange(machine: KvmMachine, gpa: int, old: bytes, new: bytes) -> int | None:
    """An X86EMUL_* result, None where there is no writable memory. A mismatch dirties the page too."""
    slots = machine.mmu.slots
    slot = slots.writable_slot(gpa >> PAGE_SHIFT)
    if slot is None:
        return None
    exchanged = slots.cmpxchg(slot, gpa, old, new)
    slots.mark_page_dirty(gpa >> PAGE_SHIFT)
    if not exchanged:
        return X86EMUL_CMPXCHG_FAILED
    machine.mmu.shadow.track_write(gpa, len(new))
    return X86EMUL_CONTINUE

"""Differences of the other instructions: HLT, hypercalls, ports, INVLPG, MSRs, MONITOR.

As in `emufuzz.fuzz.handlers.rules_registers`, each function predicts the emulator's result exactly.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import X86_CR4_LA57
from emufuzz.arch.exceptions import GP_VECTOR, UD_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_REGS_RDI
from emufuzz.arch.rflags import X86_EFLAGS_DF
from emufuzz.case.devices import devices_of, trace_to_obj
from emufuzz.fuzz.handlers.operand_segment import address_size, operand_refused, rep_prefix
from emufuzz.fuzz.handlers.pair import END_FIELDS, STEP_TRAP, Pair, entered
from emufuzz.fuzz.handlers.patch import predict_patch
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm.address import canonical_address
from emufuzz.kvm.lapic_regs import APIC_IRR
from emufuzz.kvm.msr_index import MSR_IA32_TSC_DEADLINE
from emufuzz.kvm.rflags import KVM_GUESTDBG_SINGLESTEP
from emufuzz.kvm.vcpu import MP_STATE_HALTED, MP_STATE_RUNNABLE

_IO_SIZE: Final = 7
_IO_IN: Final = 8
_PORT_7E: Final = 0x7E
_READ_AHEAD: Final = 1024
_PAGE: Final = 4096
_INSN_BYTES: Final = 15
_NOP: Final = "90"
#: What a hypercall may change: its result, memory, interrupts that it sends, MSRs of its own.
_HYPERCALL_FIELDS: Final = (
    *END_FIELDS,
    "rax",
    "rdx",
    "memory",
    "lapic",
    "flushes",
    "completion",
    "mp_state",
)
#: Exits that userspace answers later than at the next KVM_RUN.
_HYPERCALL_EXITS: Final = frozenset({"HYPERV"})


def hlt_request(pair: Pair) -> bool:
    """HLT: the handler puts the vCPU to sleep or asks userspace to; the emulator leaves a request."""
    if pair.reason != er.EXIT_REASON_HLT or not _slept(pair):
        return False
    fields = pair.predicted
    fields["halt_request"] = True
    fields["mp_state"] = MP_STATE_RUNNABLE
    entered(fields)
    if pair.guest_debug & KVM_GUESTDBG_SINGLESTEP:
        pair.predict_step()
    return True


def _slept(pair: Pair) -> bool:
    """What the handler did with HLT, by whether there is an APIC, a debugger, and something to wake it."""
    fields = pair.handler.fields
    stepping = bool(pair.guest_debug & KVM_GUESTDBG_SINGLESTEP)
    if fields["lapic"] is None:
        return bool(fields["exits"] == [{"reason": "HLT"}] and fields["mp_state"] == MP_STATE_RUNNABLE)
    if fields["exits"] != ([pair.debug_exit(fields["rip"])] if stepping else []):
        return False
    wakes = STEP_TRAP in fields["injected"] or any(fields["lapic"][APIC_IRR + 16 * i] for i in range(8))
    return fields["mp_state"] == MP_STATE_HALTED or (wakes and fields["mp_state"] == MP_STATE_RUNNABLE)


def hypercall_privilege(pair: Pair) -> bool:
    """VMCALL above CPL 0 is #GP in the emulator; the handler refuses the hypercall, or Hyper-V raises #UD."""
    if pair.reason != er.EXIT_REASON_VMCALL or not pair.cpl or not _answered(pair):
        return False
    pair.predict_fault(GP_VECTOR, 0)
    return True


def hypercall_patch(pair: Pair) -> bool:
    """VMCALL at CPL 0: the emulator writes the host's own hypercall instruction over it."""
    if pair.reason != er.EXIT_REASON_VMCALL or pair.cpl or not _answered(pair):
        return False
    if not pair.options.has_quirk("fix_hypercall_insn"):
        pair.predict_fault(UD_VECTOR)
        return True
    predict_patch(pair)
    return True


def _answered(pair: Pair) -> bool:
    """The handler did what hypercalls do: a result and the next instruction, or #UD, or an exit."""
    if not pair.handler_did_nothing_but(*_HYPERCALL_FIELDS):
        return False
    fields = pair.handler.fields
    waits = bool(fields["exits"]) and fields["exits"][-1]["reason"] in _HYPERCALL_EXITS
    stays = waits or pair.handler_queued(UD_VECTOR)
    return bool(fields["rip"] == (pair.case.rip if stays else pair.next_rip))


def monitor_unknown(pair: Pair) -> bool:
    """MONITOR and MWAIT: the emulator decodes them and has no code for them."""
    if pair.reason not in (er.EXIT_REASON_MONITOR_INSTRUCTION, er.EXIT_REASON_MWAIT_INSTRUCTION):
        return False
    if not pair.handler_faulted(UD_VECTOR) and not pair.handler_did_nothing_but(*END_FIELDS):
        return False
    if pair.options.exit_on_emulation_error:
        pair.predicted = pair.before()
    else:
        pair.predict_fault(UD_VECTOR)
    pair.concluded = False
    exits = pair.emulator.fields["exits"]
    if len(exits) == 1 and _is_failure(pair, exits[0]):
        pair.predicted["exits"] = exits
        pair.predicted["ended"] = 0
    return True


def _is_failure(pair: Pair, left: dict[str, object]) -> bool:
    """KVM_INTERNAL_ERROR_EMULATION with the instruction's bytes, after an exit for #UD."""
    size = left.get("insn_size")
    if not isinstance(size, int) or not len(pair.case.code) <= size <= _INSN_BYTES:
        return False
    insn = str(left.get("insn_bytes"))
    expected = {"reason": "INTERNAL_ERROR", "suberror": 1, "flags": 1}
    info = left.get("info")
    return (
        all(left.get(name) == value for name, value in expected.items())
        and insn.startswith(pair.case.code.hex())
        and insn[2 * size :] == _NOP * (_INSN_BYTES - size)
        and isinstance(info, list)
        and info[0] == er.EXIT_REASON_EXCEPTION_NMI
        and info[3] & 0xFF == UD_VECTOR
    )


# -- memory and MSRs -----------------------------------------------------------------------------


def invlpg_segment(pair: Pair) -> bool:
    """INVLPG whose segment refuses the operand: hardware exits with the address all the same."""
    if pair.reason != er.EXIT_REASON_INVLPG or pair.case.mode == "prot64" or not operand_refused(pair):
        return False
    return _not_invalidated(pair)


def invlpg_width(pair: Pair) -> bool:
    """INVLPG of an address that is canonical for the host's linear-address width, not for the guest's."""
    if pair.reason != er.EXIT_REASON_INVLPG or pair.case.mode != "prot64" or not pair.options.host_la57:
        return False
    bits = 57 if pair.case.system.cr4 & X86_CR4_LA57 else 48
    if canonical_address(pair.qualification, bits) == pair.qualification:
        return False
    return _not_invalidated(pair)


def _not_invalidated(pair: Pair) -> bool:
    flushes = dict(pair.predicted["flushes"])
    if not flushes.get("tlb_gva"):
        return False
    flushes["tlb_gva"] -= 1
    pair.predicted["flushes"] = {name: n for name, n in flushes.items() if n}
    return True


def fastpath_filter(pair: Pair) -> bool:
    """WRMSR to IA32_TSC_DEADLINE: the fastpath does not ask userspace's filter."""
    if not filter_passed_over(pair) or not pair.handler_did_nothing_but("lapic", "msr", *END_FIELDS):
        return False
    pair.predicted = pair.rerun(fastpath=False)
    return True


def filter_passed_over(pair: Pair) -> bool:
    """The fastpath does a write that the filter would refuse."""
    if pair.reason != er.EXIT_REASON_MSR_WRITE or pair.options.mwait_in_guest:
        return False
    index = pair.case.gpr[VCPU_REGS_RCX] & 0xFFFFFFFF
    return index == MSR_IA32_TSC_DEADLINE and index in pair.options.msr_denied


# -- ports ---------------------------------------------------------------------------------------


def in_read_ahead(pair: Pair) -> bool:
    """IN with a REP prefix: the emulator reads ahead as for INS, and uses one element."""
    qualification = pair.qualification
    if pair.reason != er.EXIT_REASON_IO_INSTRUCTION or not qualification & _IO_IN or not rep_prefix(pair):
        return False
    size, port = (qualification & _IO_SIZE) + 1, qualification >> 16
    count = _read_ahead_count(pair, size)
    asked = {"reason": "IO", "direction": "in", "size": size, "port": port, "count": 1, "data": "00" * size}
    if count == 1 or pair.handler.fields["exits"][:1] != [asked]:
        return False
    devices = devices_of(pair.case)
    devices.pio_in(port, size, count)
    fields = pair.predicted
    fields["exits"] = [{**asked, "count": count, "data": "00" * size * count}, *fields["exits"][1:]]
    fields["device_trace"] = trace_to_obj(devices.trace)
    return True


def _read_ahead_count(pair: Pair, size: int) -> int:
    """KVM: pio_in_emulated; the room in the page counts as elements."""
    rcx, rdi = pair.case.gpr[VCPU_REGS_RCX], pair.case.gpr[VCPU_REGS_RDI]
    count = rcx & (1 << 8 * address_size(pair)) - 1 & 0xFFFFFFFF
    room = rdi % _PAGE if pair.case.rflags & X86_EFLAGS_DF else _PAGE - rdi % _PAGE
    return max(1, min(room, _READ_AHEAD // size, count))


def out_7e_step(pair: Pair) -> bool:
    """OUT to port 0x7e under a debugger that steps: the exit of the step overwrites that of the access."""
    fields = pair.predicted
    if pair.reason != er.EXIT_REASON_IO_INSTRUCTION or pair.qualification >> 16 != _PORT_7E:
        return False
    if pair.qualification & _IO_IN or not pair.guest_debug & KVM_GUESTDBG_SINGLESTEP:
        return False
    if fields["exits"] != [pair.debug_exit(fields["rip"])] or not fields["pio"] or not fields["completion"]:
        return False
    _predict_out(pair)
    return True


def _predict_out(pair: Pair) -> None:
    """The access reaches userspace, and nothing else does."""
    size, port = (pair.qualification & _IO_SIZE) + 1, pair.qualification >> 16
    data = (pair.case.gpr[0] & (1 << 8 * size) - 1).to_bytes(size, "little")
    devices = devices_of(pair.case)
    devices.pio_out(port, size, data)
    fields = pair.predicted
    entered(fields)
    fields["exits"] = [_io_out(size, port, data)]
    fields.update(device_trace=trace_to_obj(devices.trace), completion=False, pio=0)


def _io_out(size: int, port: int, data: bytes) -> dict[str, object]:
    return {"reason": "IO", "direction": "out", "size": size, "port": port, "count": 1, "data": data.hex()}


def out_step(pair: Pair) -> bool:
    """OUT that userspace does: the emulator does not single-step it."""
    fields = pair.predicted
    if pair.reason != er.EXIT_REASON_IO_INSTRUCTION or pair.qualification & _IO_IN or pair.faulted:
        return False
    if not any(left["reason"] == "IO" for left in fields["exits"]):
        return False
    stepping = pair.guest_debug & KVM_GUESTDBG_SINGLESTEP
    if stepping and fields["exits"][1:] == [pair.debug_exit(fields["rip"])]:
        exits = fields["exits"][:1]
        entered(fields)
        fields["exits"] = exits
        return True
    if fields["injected"] != [STEP_TRAP]:
        return False
    fields["injected"] = []
    fields["requests"] = frozenset()
    return True

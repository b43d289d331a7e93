"""A case of KVM's exit paths as hardware would execute it natively: what an oracle judges.

KVM ends in the state that the instruction at RIP would have led to without KVM. So the way into
KVM is taken away: the path, the machine's knobs, and the prefix of forced emulation, over which KVM
moves RIP (handle_ud). What of the machine an instruction does see, memory and devices, stays.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any, Final

import msgspec

from emufuzz.arch.cr import X86_CR4_OSXSAVE
from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_REGS_RDX
from emufuzz.arch.rflags import X86_EFLAGS_IOPL, X86_EFLAGS_RF
from emufuzz.case.devices import devices_of
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import PAGE_SHIFT, Case, Memory, Outcome, code_address, code_parts, is_physical
from emufuzz.case.paths import EXIT_PATH
from emufuzz.oracle.described import is_own_exit
from emufuzz.oracle.instruction import Access, CaseInstruction
from emufuzz.oracle.local_apic import APIC_PATH, apic_device, apic_of, is_defined
from emufuzz.oracle.page_tables import walked

#: UD2 and "kvm" in front of an instruction that is to be emulated.
FORCED_PREFIX: Final = b"\x0f\x0bkvm"

_FEP: Final = "fep"
_FORCED_PATHS: Final = (_FEP, "msr-completion")
_RSM: Final = b"\x0f\xaa"
_XSETBV: Final = b"\x0f\x01\xd1"
_MSR_ACCESSES: Final = (b"\x0f\x30", b"\x0f\x32")
_X2APIC: Final = range(0x800, 0x900)  # which userspace cannot filter
_FEP_CLEAR_RF: Final = 2

# fmt: off
#: Path -> why no oracle can say how a case of it ends.
UNJUDGED_PATHS: Final = {
    "task-switch":    "switches tasks, which is no instruction at RIP",
    "rmode-inject":   "delivers an event and runs no instruction",
}

#: Field of `kvm` -> why the instruction at RIP is not all that happens.
_UNJUDGED_STATE: Final = {
    "pending":     "an exception is delivered first",
}
# fmt: on

#: Fields of `kvm` that say what an exit reports, whatever the instruction is.
_DESCRIBED: Final = frozenset(("exit_reason", "exit_qualification", "instruction_info"))

#: INS, OUTS, IN and OUT of port DX; IN and OUT of an immediate port.
_DX_OPCODES: Final = frozenset((*range(0x6C, 0x70), *range(0xEC, 0xF0)))
_PORT_OPCODES: Final = _DX_OPCODES | frozenset(range(0xE4, 0xE8))
_BACKDOOR: Final = "vmware-gp"
#: VMware's ports, which need no permission (KVM: emulator_io_port_access_allowed).
_BACKDOOR_PORTS: Final = (0x5658, 0x5659)
_PREFIXES: Final = b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3"
_REX: Final = 0x40
#: KVM_GUESTDBG_ENABLE and _SINGLESTEP.
_STEPPED: Final = 3
_VECTORING_VALID: Final = 1 << 31
#: Member of `kvm.cpuid` that page tables show alone.
_WIDTH: Final = "maxphyaddr"
#: Fields of `Case.extra` that an instruction sees.
_VISIBLE: Final = ("phys", "devices")


def kvm_of(case: Case) -> Mapping[str, Any]:
    """The machine around the emulator, empty if the case does not describe it."""
    fields: Mapping[str, Any] = (case.extra or {}).get("kvm") or {}
    return fields


def check_judged(case: Case) -> None:
    """Raise UnsupportedCaseError if executing the instruction at RIP does not tell how a case ends."""
    if case.path in UNJUDGED_PATHS:
        raise UnsupportedCaseError(f"path: {case.path} {UNJUDGED_PATHS[case.path]}")
    if case.path == _BACKDOOR and not is_port_access(case):
        raise UnsupportedCaseError("path: vmware-gp has the #GP of something that is no access to a port")
    if case.path == APIC_PATH and not (apic_of(case) and is_defined(case, judge_case(case))):
        raise UnsupportedCaseError("path: apic-access is not one of 32 bits at the start of a register")
    if case.mode == "vm86" and is_backdoor(case):
        raise UnsupportedCaseError("path: vmware-gp opens a port that the TSS denies")
    kvm = kvm_of(case)
    if case.path == EXIT_PATH and not _own_exit(case):
        raise UnsupportedCaseError("kvm.exit_reason: the exit is not the instruction's own")
    for field, reason in _UNJUDGED_STATE.items():
        if kvm.get(field):
            raise UnsupportedCaseError(f"kvm.{field}: {reason}")
    if kvm.get("cpuid", {}).keys() - {_WIDTH}:
        raise UnsupportedCaseError("kvm.cpuid: the processor is another one")
    if asks_for_msr(case):
        raise UnsupportedCaseError("kvm.knobs.msr_denied: userspace is asked for the MSR")
    if kvm.get("vectoring_info", 0) & _VECTORING_VALID:
        raise UnsupportedCaseError("kvm.vectoring_info: an event is delivered again")
    if kvm.get("smm") and _opcodes(case).startswith(_RSM):
        raise UnsupportedCaseError("kvm.smm: RSM leaves it, for a state that no oracle knows")
    if "callbacks" in (case.extra or {}):
        raise UnsupportedCaseError("callbacks: only an emulator has them")
    if kvm.get("ioeventfds") and eventfd_takes(case) is not False:
        raise UnsupportedCaseError("kvm.ioeventfds: one may take the write, and with it the instruction")


def eventfd_takes(case: Case) -> bool | None:
    """Whether an eventfd without length takes the instruction's access; None if that is hard to tell.

    If the access to a device that exits is exactly where such an eventfd is KVM skips the instruction,
    whatever it is; one that only its end takes to a device exits where the device's page begins. Of several
    accesses it is open which one exits first.
    """
    anywhere = {fd["addr"] for fd in kvm_of(case).get("ioeventfds") or () if not fd.get("len")}
    if not anywhere or kvm_of(case).get("guest_mode"):  # whose exits do not look for them
        return False
    if is_physical(case):
        return None
    numbers = devices_of(case).page_numbers()
    instruction = CaseInstruction(judge_case(case))
    exits = [_exits_at(access, numbers) for access in instruction.accesses]
    found = [place for place in exits if place is not None]
    hits = [place in anywhere for place in found]
    if instruction.string_opcode or len(found) > 1:
        return None
    return any(hits)


def _exits_at(access: Access, devices: Container[int]) -> int | None:
    """Where an access exits, given the page numbers of devices; None if it reaches none of them."""
    last = (access.linear + access.size - 1) >> PAGE_SHIFT << PAGE_SHIFT
    return next((place for place in (access.linear, last) if place >> PAGE_SHIFT in devices), None)


def _own_exit(case: Case) -> bool:
    kvm = kvm_of(case)
    if not kvm.keys() & _DESCRIBED:
        return True
    opcodes = _opcodes(case)
    prefixes = case.code.removeprefix(forced_prefix(case)).removesuffix(opcodes)
    if opcodes.startswith(_XSETBV) and not case.system.cr4 & X86_CR4_OSXSAVE:
        return False  # it is #UD, which comes before the exit (SDM Vol. 3C 25.1.1)
    return "exit_reason" in kvm and is_own_exit(kvm, prefixes, opcodes)


def asks_for_msr(case: Case) -> bool:
    """RDMSR or WRMSR of an MSR that userspace has denied, be it to answer itself or to have #GP(0).

    Of several instructions any may be one.
    """
    denied = kvm_of(case).get("knobs", {}).get("msr_denied")
    if not denied:
        return False
    if case.count != 1:
        return True
    if not _opcodes(case).startswith(_MSR_ACCESSES):
        return False
    index = case.gpr[VCPU_REGS_RCX] & 0xFFFFFFFF
    listed = {int(each, 0) for each in denied.replace(" ", "").split(",") if each}
    return index in listed - set(_X2APIC)


def is_port_access(case: Case) -> bool:
    """IN, OUT, INS or OUTS."""
    return _opcode(case) in _PORT_OPCODES


def is_backdoor(case: Case) -> bool:
    """An access to one of VMware's ports, for which no permission is needed on the path `vmware-gp`."""
    port = case.gpr[VCPU_REGS_RDX] & 0xFFFF
    return case.path == _BACKDOOR and port in _BACKDOOR_PORTS and _opcode(case) in _DX_OPCODES


def _opcode(case: Case) -> int:
    """The first byte behind the prefixes, -1 if there is none."""
    rest = _opcodes(case)
    return rest[0] if rest else -1


def _opcodes(case: Case) -> bytes:
    """The code behind all prefixes."""
    rest = case.code.removeprefix(forced_prefix(case)).lstrip(_PREFIXES)
    if case.mode == "prot64":
        while rest[:1] and (rest[0] in _PREFIXES or rest[0] & 0xF0 == _REX):
            rest = rest[1:]
    return rest


def guest_debug(case: Case) -> int:
    """The flags with which userspace debugs the guest (KVM_SET_GUEST_DEBUG), 0 if it does not."""
    debug = kvm_of(case).get("guest_debug") or 0
    return int(debug["control"] if isinstance(debug, Mapping) else debug)


def is_stepped(case: Case) -> bool:
    """Userspace single-steps the guest."""
    return guest_debug(case) & _STEPPED == _STEPPED


def forced_prefix(case: Case) -> bytes:
    """The prefix of forced emulation if the case has it, else nothing."""
    return FORCED_PREFIX if case.path in _FORCED_PATHS and case.code.startswith(FORCED_PREFIX) else b""


def without_harness(case: Case) -> Case:
    """The case without path, knobs and forced-emulation prefix; the prefix's bytes are not in memory.

    The case itself if it has none of them.
    """
    if case.path is None and kvm_of(case).keys() <= {"cpuid"}:
        return case
    skipped = len(forced_prefix(case))
    visible = {name: value for name, value in (case.extra or {}).items() if name in _VISIBLE}
    if apic := apic_of(case):
        visible["devices"] = [*visible.get("devices", ()), apic_device(apic)]
    if _WIDTH in kvm_of(case).get("cpuid", {}) and is_physical(case):
        visible["kvm"] = {"cpuid": {_WIDTH: kvm_of(case)["cpuid"][_WIDTH]}}
    mask = (1 << 64) - 1 if case.mode == "prot64" else 0xFFFFFFFF
    rflags = case.rflags & ~X86_EFLAGS_RF if skipped and _clears_rf(case) else case.rflags
    return msgspec.structs.replace(
        case,
        code=case.code[skipped:],
        rip=case.rip + skipped & mask,
        rflags=rflags | X86_EFLAGS_IOPL if is_backdoor(case) else rflags,
        path=None,
        extra=visible or None,
    )


def _clears_rf(case: Case) -> bool:
    """Forced emulation also clears RFLAGS.RF (KVM: force_emulation_prefix, bit 1)."""
    return bool(kvm_of(case).get("knobs", {}).get("force_emulation_prefix", 0) & _FEP_CLEAR_RF)


def native_outcome(case: Case, outcome: Outcome) -> Outcome:
    """A subject's outcome beside `judge_case`, in which the backdoor is a matter of IOPL."""
    if not is_backdoor(case):
        return outcome
    return msgspec.structs.replace(outcome, rflags=outcome.rflags | X86_EFLAGS_IOPL)


def judge_case(case: Case) -> Case:
    """The case as hardware executes it natively: `without_harness`, with all of its memory."""
    view = without_harness(case)
    prefix = forced_prefix(case)
    if not prefix:
        return view
    laid, left = [], len(prefix)
    for address, part in code_parts(case):
        laid.append((address, part[:left]))
        left -= len(part)
        if left <= 0:
            break
    if not is_physical(case):
        return msgspec.structs.replace(view, mem=Memory((*case.mem.entries, *laid)))
    phys = [*(view.extra or {})["phys"], *({"addr": hex(at), "data": part.hex()} for at, part in laid)]
    phys += [{"addr": hex(at), "data": data.hex()} for at, data in _fetched(case, len(prefix))]
    return msgspec.structs.replace(view, extra={**(view.extra or {}), "phys": phys})


def _fetched(case: Case, length: int) -> Iterator[tuple[int, bytes]]:
    """Where the fetch of a prefix sets accessed bits."""
    if kvm_of(case).get("memslots") is None:  # else tables may be where nothing can be written
        first = code_address(case)
        yield from walked(case, {first, first + length - 1})

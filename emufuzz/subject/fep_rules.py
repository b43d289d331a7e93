"""What KVM makes of an instruction where it does not just do what its emulator says.

Each rule turns an outcome of the emulator alone into the one that the forced-emulation path must
give, from the case and that outcome only: it never sees what the KVM model did, so that it cannot
hide a wrong result. `predict` applies them all; docs/kvm-vectors.md explains each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

from emufuzz.arch import exceptions as ex
from emufuzz.arch.cr import EFER_LMA, EFER_LME, EFER_NX, EFER_SCE, X86_CR0_PE, X86_CR0_PG
from emufuzz.arch.regs import (
    VCPU_REGS_RAX,
    VCPU_REGS_RBX,
    VCPU_REGS_RCX,
    VCPU_REGS_RDX,
    VCPU_SREG_LDTR,
    VCPU_SREG_SS,
)
from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_TF, X86_EFLAGS_VM
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, UNUSABLE, Case, Event, Outcome, Segment, code_address
from emufuzz.case.recorded import recorded_differences
from emufuzz.kvm import msr_index as mi
from emufuzz.kvm.address import canonical_address
from emufuzz.kvm.cpuid import FEATURES, implied_features
from emufuzz.kvm.exceptions import DR6_BS
from emufuzz.subject.flat import FlatSubject

_UD: Final = (ex.UD_VECTOR, None, None)
_DB: Final = (ex.DB_VECTOR, None, None)
_GP0: Final = (ex.GP_VECTOR, 0, None)
_MASK32: Final = 0xFFFFFFFF
_OUTS: Final = frozenset({"6e", "6f"})
_MEMORY_EVENTS: Final = frozenset({"fetch", "read", "write", "cmpxchg"})
_VIRT_ADDR_BITS: Final = 48
_EFER_INTEL: Final = EFER_SCE | EFER_LME | EFER_LMA | EFER_NX
_CPUID_GPR: Final = (VCPU_REGS_RAX, VCPU_REGS_RBX, VCPU_REGS_RCX, VCPU_REGS_RDX)  # EAX .. EDX
_CR4_MIRRORS: Final = {"xsave": "osxsave", "pku": "ospke"}
_INDEXED_LEAF: Final = 7
_PAT_TYPES: Final = frozenset({0, 1, 4, 5, 6, 7})
_VMCALL: Final = b"\x0f\x01\xc1"
_VMWARE_PMCS: Final = range(0x10000, 0x10003)
_DR7_ENABLED: Final = 0xFF

_flat: Final = FlatSubject(events=True)


class Vector(NamedTuple):
    """A recorded vector on its way through KVM.

    Attributes:
        case: The recorded case.
        seen: The case with the prefix in its memory, as the guest sees it.
        prefix: Linear addresses of the prefix's bytes; empty on path `ud`.
        new_pages: Numbers of the pages that exist only because the prefix is there.
    """

    case: Case
    seen: Case
    prefix: tuple[int, ...] = ()
    new_pages: tuple[int, ...] = ()


class Prediction(NamedTuple):
    """What the path must give; `before` is the case that the outcome's memory refers to.

    `payload` goes with #DB. `left` is the reason for which the emulator ended for userspace, if it
    did: "out" or "failure".
    """

    before: Case
    outcome: Outcome
    payload: int = 0
    left: str = ""


Rule = Callable[[Vector, Prediction], Prediction | None]


def _with(now: Prediction, **fields: Any) -> Prediction:
    return now._replace(outcome=msgspec.structs.replace(now.outcome, **fields))


def _system(now: Prediction, **fields: Any) -> Prediction:
    return _with(now, system=msgspec.structs.replace(now.outcome.system, **fields))


def _fault(vector: Vector, now: Prediction, exception: tuple[int, int | None, int | None]) -> Prediction:
    """The instruction does nothing but fault."""
    case = vector.case
    return _with(
        now, rc="propagate_fault", exception=exception, gpr=case.gpr, rip=case.rip, rflags=case.rflags,
        system=case.system, interruptibility=0,
    )  # fmt: skip


def _events(now: Prediction, name: str) -> list[Event]:
    return [event for event in now.outcome.events if event[0] == name]


def _written_msr(now: Prediction) -> tuple[int, int] | None:
    """Index and value of a WRMSR."""
    events = _events(now, "set_msr")
    return (events[0][1], events[0][2]) if events else None


# -- the instruction is not the one that was recorded ------------------------------------------------


def code_breakpoint(vector: Vector, now: Prediction) -> Prediction | None:
    """kvm_vcpu_check_code_breakpoint: hardware saw the prefix, so KVM looks for breakpoints itself."""
    case = vector.case
    dr = case.system.dr
    if not vector.prefix or not dr[7] & _DR7_ENABLED or case.rflags & X86_EFLAGS_RF:
        return None
    address = code_address(case)
    hit = sum(
        1 << i for i in range(4) if dr[7] >> 2 * i & 3 and not dr[7] >> 16 + 4 * i & 15 and dr[i] == address
    )
    if not hit:
        return None
    stopped = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system, exception=_DB)
    return now._replace(outcome=stopped, payload=hit, before=case)


def prefix_seen(vector: Vector, now: Prediction) -> Prediction | None:
    """The prefix is memory, and makes a page where there was none: an instruction may see it."""
    if not any(_touches(event, vector) for event in now.outcome.events):
        return None
    (seen,) = _flat.run([vector.seen])
    if not recorded_differences(vector.seen, seen, now.outcome):
        return None
    return now._replace(before=vector.seen, outcome=seen)


def _touches(event: Event, vector: Vector) -> bool:
    if event[0] not in _MEMORY_EVENTS:
        return False
    size = event[2] if isinstance(event[2], int) else len(event[2])
    first, last = event[1], event[1] + size - 1
    return any(first <= address <= last for address in vector.prefix) or any(
        first >> PAGE_SHIFT <= pfn <= last >> PAGE_SHIFT for pfn in vector.new_pages
    )


def outs_once(vector: Vector, now: Prediction) -> Prediction | None:
    """emulator_pio_out: userspace gets one element, and the guest goes on at the OUTS by itself."""
    del vector
    if now.outcome.leaf not in _OUTS or not now.outcome.restarts:
        return None
    (once,) = _flat.run([msgspec.structs.replace(now.before, single=1)])
    return now._replace(outcome=msgspec.structs.replace(once, restarts=0))


# -- faults and failures -----------------------------------------------------------------------------


def decode_fault(vector: Vector, now: Prediction) -> Prediction | None:
    """x86_emulate_instruction: for EMULTYPE_TRAP_UD and _FORCED every failed decode is #UD."""
    del vector
    if now.outcome.decode_rc == "ok" or now.outcome.exception == _UD:
        return None
    return _with(now, exception=_UD)


def failure(vector: Vector, now: Prediction) -> Prediction | None:
    """handle_emulation_failure: #UD, and at CPL 0 KVM_EXIT_INTERNAL_ERROR as well."""
    if now.outcome.rc != "unhandleable" or now.outcome.decode_rc != "ok":
        return None
    left = "" if _cpl(vector.case) else "failure"
    return _with(now, exception=_UD)._replace(left=left)


def _cpl(case: Case) -> int:
    """KVM: vmx_get_cpl."""
    if not case.system.cr0 & X86_CR0_PE:
        return 0
    return 3 if case.rflags & X86_EFLAGS_VM else case.system.seg[VCPU_SREG_SS].dpl


# -- model-specific and control registers --------------------------------------------------------------


def sysenter_msr(vector: Vector, now: Prediction) -> Prediction | None:
    """vmx_set_msr keeps 32 bits of SYSENTER_CS; __kvm_set_msr makes SYSENTER_ESP and _EIP canonical."""
    del vector
    written = _written_msr(now)
    if written is None or now.outcome.rc != "continue":
        return None
    index, value = written
    if index == mi.MSR_IA32_SYSENTER_CS:
        kept = value & _MASK32
    elif index in (mi.MSR_IA32_SYSENTER_ESP, mi.MSR_IA32_SYSENTER_EIP):
        kept = canonical_address(value, _VIRT_ADDR_BITS)
    else:
        return None
    return _set_msr(now, index, kept) if kept != value else None


def _set_msr(now: Prediction, index: int, value: int) -> Prediction:
    return _system(now, msr=tuple((i, value if i == index else v) for i, v in now.outcome.system.msr))


def tsc_aux(vector: Vector, now: Prediction) -> Prediction | None:
    """__kvm_set_msr: guests that are not Intel's may give TSC_AUX 64 bits, of which 32 stay."""
    written = _written_msr(now)
    if written is None or vector.case.vendor == "intel" or now.outcome.exception != _GP0:
        return None
    index, value = written
    if index != mi.MSR_TSC_AUX or not value >> 32:
        return None
    return _set_msr(_completed(vector, now), index, value & _MASK32)


def _completed(vector: Vector, now: Prediction) -> Prediction:
    """An instruction that only faulted, done after all: RIP moves on, RF is cleared."""
    case = vector.case
    return _with(
        now, rc="continue", exception=None, rip=case.rip + (now.outcome.length or 0),
        rflags=case.rflags & ~X86_EFLAGS_RF,
    )  # fmt: skip


def msr_refused(vector: Vector, now: Prediction) -> Prediction | None:
    """kvm_pat_valid and efer_reserved_bits: memory types 2 and 3, and AMD's EFER bits, are #GP."""
    written = _written_msr(now)
    if written is None or now.outcome.rc != "continue":
        return None
    index, value = written
    if index == mi.MSR_IA32_CR_PAT:
        refused = not _PAT_TYPES.issuperset(value.to_bytes(8, "little"))
    else:
        refused = index == mi.MSR_EFER and bool(value & ~_EFER_INTEL)
    return _fault(vector, now, _GP0) if refused else None


def msr_exists(vector: Vector, now: Prediction) -> Prediction | None:
    """kvm_get_msr_common: the machine-check addresses of the Pentium read as zero."""
    read = _events(now, "get_msr")
    if not read or now.outcome.exception != _GP0:
        return None
    if read[0][1] not in (mi.MSR_IA32_P5_MC_ADDR, mi.MSR_IA32_P5_MC_TYPE):
        return None
    return _read_value(_completed(vector, now), 0)


def vmware_pmc(vector: Vector, now: Prediction) -> Prediction | None:
    """is_vmware_backdoor_pmc: RDPMC of 0x10000 .. 0x10002 reads clocks, with the backdoor off as well."""
    case = vector.case
    if now.outcome.leaf != "0f33" or now.outcome.exception != _GP0 or _cpl(case):
        return None
    if case.gpr[VCPU_REGS_RCX] & _MASK32 not in _VMWARE_PMCS:
        return None
    return _read_value(_completed(vector, now), dict(case.system.msr).get(mi.MSR_IA32_TSC, 0))


def _read_value(now: Prediction, value: int) -> Prediction:
    gpr = list(now.outcome.gpr)
    gpr[VCPU_REGS_RAX], gpr[VCPU_REGS_RDX] = value & _MASK32, value >> 32
    return _with(now, gpr=tuple(gpr))


def lma_follows_pg(vector: Vector, now: Prediction) -> Prediction | None:
    """vmx_set_cr0: EFER.LMA changes when CR0.PG does, and not with every load of CR0."""
    before, after = vector.case.system, now.outcome.system
    if not _events(now, "set_cr") or (before.cr0 ^ after.cr0) & X86_CR0_PG or before.efer == after.efer:
        return None
    return _system(now, efer=after.efer & ~EFER_LMA | before.efer & EFER_LMA)


def cpuid_bits(vector: Vector, now: Prediction) -> Prediction | None:
    """kvm_update_cpuid_runtime: OSXSAVE and OSPKE follow CR4; a CR4 bit that is set has its feature."""
    if now.outcome.leaf != "0fa2" or now.outcome.rc != "continue":
        return None
    _, function, index, _ = _events(now, "cpuid")[-1]
    names = set(implied_features(vector.case.system.cr4))
    names |= {mirror for name, mirror in _CR4_MIRRORS.items() if name in names}
    gpr = list(now.outcome.gpr)
    for feature in (FEATURES[name] for name in names):
        if feature.function == function and (function != _INDEXED_LEAF or feature.subleaf == index):
            gpr[_CPUID_GPR[feature.register]] |= 1 << feature.bit
    return None if tuple(gpr) == now.outcome.gpr else _with(now, gpr=tuple(gpr))


# -- memory, segments, single step -----------------------------------------------------------------------


def hypercall_bytes(vector: Vector, now: Prediction) -> Prediction | None:
    """vmx_patch_hypercall: VMCALL for AMD's guests too, as this is what the host understands."""
    del vector
    patched = [event for event in _events(now, "write") if event[2] != _VMCALL]
    if not _events(now, "fix_hypercall") or not patched or now.outcome.exception is not None:
        return None
    address, pages = patched[0][1], dict(now.outcome.pages)
    for i, byte in enumerate(_VMCALL):
        pfn, offset = address + i >> PAGE_SHIFT, address + i & PAGE_MASK
        pages[pfn] = pages[pfn][:offset] + bytes([byte]) + pages[pfn][offset + 1 :]
    return _with(now, pages=pages)


def accessed_bit(vector: Vector, now: Prediction) -> Prediction | None:
    """__vmx_set_segment: with unrestricted guest every segment but LDTR is stored as accessed."""
    if now.outcome.system is vector.case.system:
        return None
    seg = tuple(
        new if nr == VCPU_SREG_LDTR else _stored(old, new)
        for nr, (old, new) in enumerate(zip(vector.case.system.seg, now.outcome.system.seg, strict=True))
    )
    return None if seg == now.outcome.system.seg else _system(now, seg=seg)


def _stored(old: Segment, new: Segment) -> Segment:
    """As the subject reports it: the case's if nothing else differs, and all zeros if it is unusable."""
    if not (new.p or new.sel or new.base or new.limit):
        return UNUSABLE
    if new == Segment(new.sel, new.base):
        return new  # a null selector's
    accessed = msgspec.structs.replace(new, type=new.type | 1)
    return old if accessed == msgspec.structs.replace(old, type=old.type | 1) else accessed


def out_leaves(vector: Vector, now: Prediction) -> Prediction | None:
    """x86_emulate_instruction: an instruction that leaves for userspace is not stepped."""
    del vector
    return now._replace(left="out") if _events(now, "out") and not now.left else None


def single_step(vector: Vector, now: Prediction) -> Prediction | None:
    """kvm_vcpu_do_singlestep: #DB with DR6.BS after an instruction that began with TF."""
    if not vector.case.rflags & X86_EFLAGS_TF or now.outcome.rc != "continue" or now.left:
        return None
    if now.outcome.exception is not None:
        return None
    return _with(now, exception=_DB)._replace(payload=DR6_BS)


#: Name -> rule, in the order in which they apply: later ones see what earlier ones made of an outcome.
RULES: Final[dict[str, Rule]] = {
    "code-breakpoint": code_breakpoint,
    "prefix-seen": prefix_seen,
    "outs-once": outs_once,
    "decode-fault": decode_fault,
    "emulation-failure": failure,
    "sysenter-msr": sysenter_msr,
    "tsc-aux": tsc_aux,
    "msr-refused": msr_refused,
    "msr-exists": msr_exists,
    "vmware-pmc": vmware_pmc,
    "lma-follows-pg": lma_follows_pg,
    "cpuid-bits": cpuid_bits,
    "hypercall-bytes": hypercall_bytes,
    "accessed-bit": accessed_bit,
    "single-step": single_step,
}


def predict(vector: Vector, recorded: Outcome) -> tuple[Prediction, list[str]]:
    """What KVM must make of a vector, and the names of the rules that changed the recording."""
    now = Prediction(vector.case, recorded)
    names = []
    for name, rule in RULES.items():
        if name == "single-step":
            now = out_leaves(vector, now) or now
        changed = rule(vector, now)
        if changed is not None:
            names.append(name)
            now = changed
    return now, names

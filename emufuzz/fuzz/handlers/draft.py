"""The machine around a generated instruction: modes, segments, knobs, debuggers, shadows.

Memory is the default layout of `emufuzz.case.build`, in flat linear form or, where hardware's own walks
matter (shadow paging, PDPTEs), as physical memory with identity page tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any, Final

import msgspec

from emufuzz.arch import cr
from emufuzz.arch import rflags as fl
from emufuzz.arch.regs import VCPU_REGS_RSP, VCPU_SREG_CS
from emufuzz.case.build import CODE_BASE, STACK_TOP, build_case, build_memory, build_system
from emufuzz.case.model import NO_MEMORY, Case, Memory, System
from emufuzz.case.values import boundary
from emufuzz.fuzz.handlers.observe import PREFIX

#: Linear address of the instruction; the prefix lies before it in every case.
CODE_ADDRESS: Final = CODE_BASE + 0x10
#: Base of CS in a third of the cases outside 64-bit mode.
CODE_SEGMENT_BASE: Final = 0x2000

_MODES: Final = (
    *("prot64",) * 6, *("prot32",) * 3, "prot16", "compat32", "compat16", *("real",) * 2, "vm86",
)  # fmt: skip
#: Where the instruction may end: what comes next lies beyond the segment, or needs one bit more.
_EDGES: Final = {"real": 1 << 16, "prot32": 1 << 32, "compat32": 1 << 32, "prot64": 1 << 32}
_PROTECTED: Final = ("prot16", "prot32")
_LONG: Final = ("prot64", "compat16", "compat32")

KVM_GUESTDBG_ENABLE: Final = 1
KVM_GUESTDBG_SINGLESTEP: Final = 2
KVM_GUESTDBG_USE_HW_BP: Final = 1 << 17
_DEBUG_CONTROLS: Final = (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_HW_BP,
)
_SHADOW_PAGING: Final = {"ept": False, "unrestricted_guest": False, "host_maxphyaddr": 46}


@dataclass(slots=True)
class Draft:
    """A case under construction; what an instruction needs beyond chance it sets here."""

    rng: Random
    mode: str
    cpl: int
    gpr: list[int]
    flags: int
    system: System
    pae: bool = False
    physical: bool = False
    code: bytes = b"\x90"
    changes: dict[str, Any] = field(default_factory=dict)
    knobs: dict[str, Any] = field(default_factory=dict)
    kvm: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    port_in: bytes = b""
    vendor: str = "intel"
    at_edge: bool = False

    @property
    def long(self) -> bool:
        """In 64-bit mode."""
        return self.mode == "prot64"

    def finish(self, name: str) -> Case:
        """The case, with path `exit`."""
        system = msgspec.structs.replace(self.system, **self.changes) if self.changes else self.system
        kvm = {**self.kvm, **({"knobs": self.knobs} if self.knobs else {})}
        extra = {**self.extra, **({"kvm": kvm} if kvm else {})}
        base = 0 if self.long else system.seg[VCPU_SREG_CS].base
        address = CODE_ADDRESS
        if self.physical:
            extra["phys"] = _physical(self.mode, self.pae)
        elif self.at_edge:
            address = _EDGES[self.mode] + base - len(self.code)
        return Case(
            id=name,
            mode=self.mode,
            code=self.code,
            gpr=tuple(self.gpr),
            rip=address - base,
            rflags=self.flags,
            system=system,
            mem=NO_MEMORY if self.physical else _memory(self.mode, address),
            port_in=self.port_in,
            vendor=self.vendor,
            path="exit",
            extra=extra or None,
        )


def new_draft(rng: Random, *, privileged: bool, modes: tuple[str, ...] = _MODES) -> Draft:
    """A state in one of the modes; `privileged`: mostly at CPL 0, as else nothing exits."""
    mode = rng.choice(modes)
    cpl = _cpl(rng, mode, privileged=privileged)
    gpr = [boundary(rng, 64) if rng.getrandbits(1) else boundary(rng, 32) for _ in range(16)]
    gpr[VCPU_REGS_RSP] = STACK_TOP
    pae = mode in _PROTECTED and rng.random() < 0.3
    draft = Draft(rng, mode, cpl, gpr, _flags(rng, mode), _system(mode, cpl, pae), pae)
    draft.at_edge = mode in _EDGES and rng.random() < 0.05
    draft.vendor = "amd" if rng.random() < 0.1 else "intel"
    if mode != "prot64" and not draft.at_edge and rng.random() < 0.3:
        _move_code_segment(draft)
    if rng.random() < 0.25:
        draft.kvm["interruptibility"] = rng.choice((1, 2))
    if rng.random() < 0.2:
        draft.kvm["guest_debug"] = _guest_debug(rng)
    if rng.random() < 0.1:
        draft.knobs["force_emulation_prefix"] = 3
    return draft


def _cpl(rng: Random, mode: str, *, privileged: bool) -> int:
    if mode == "real":
        return 0
    if mode == "vm86":
        return 3
    return 0 if rng.random() < (0.95 if privileged else 0.5) else rng.randrange(1, 4)


def _flags(rng: Random, mode: str) -> int:
    flags = rng.getrandbits(12) & fl.EFLAGS_MASK | fl.X86_EFLAGS_FIXED
    for bit, chance in ((fl.X86_EFLAGS_IF, 0.6), (fl.X86_EFLAGS_TF, 0.2), (fl.X86_EFLAGS_RF, 0.2)):
        flags |= bit if rng.random() < chance else 0
    flags |= rng.choice((0, 0, 3)) << fl.X86_EFLAGS_IOPL_BIT
    return flags | (fl.X86_EFLAGS_VM if mode == "vm86" else 0)


def _guest_debug(rng: Random) -> Any:
    control = rng.choice(_DEBUG_CONTROLS)
    if not control & KVM_GUESTDBG_USE_HW_BP:
        return control
    dr7 = rng.choice((0x400, 0x2400, 0x401, 0x2402))
    addresses = [rng.choice((0x8000, 0x6000, CODE_ADDRESS)) for _ in range(4)]
    return {"control": control, "dr": [*addresses, 0, 0, 0, dr7]}


def _move_code_segment(draft: Draft) -> None:
    """CS with a base; in real and virtual-8086 mode the selector says it."""
    seg = list(draft.system.seg)
    selector = CODE_SEGMENT_BASE >> 4 if draft.mode in ("real", "vm86") else seg[VCPU_SREG_CS].sel
    seg[VCPU_SREG_CS] = msgspec.structs.replace(seg[VCPU_SREG_CS], sel=selector, base=CODE_SEGMENT_BASE)
    draft.changes["seg"] = tuple(seg)


def use_shadow_paging(draft: Draft) -> None:
    """Without EPT: CR3 and INVLPG exit."""
    draft.knobs.update(_SHADOW_PAGING)
    draft.physical = True


def use_physical(draft: Draft) -> None:
    """Page tables in guest memory: PDPTEs can be loaded."""
    draft.physical = True


@lru_cache(maxsize=64)
def _system(mode: str, cpl: int, pae: bool) -> System:
    system = build_system(mode, cpl)
    return msgspec.structs.replace(system, cr4=system.cr4 | cr.X86_CR4_PAE) if pae else system


@lru_cache(maxsize=64)
def _memory(mode: str, address: int) -> Memory:
    """The default layout with the prefix before the instruction at `address`."""
    data = {address - len(PREFIX): PREFIX, 0x8000: bytes(range(256)) * 2}
    return build_memory(mode, build_system(mode), data)


@lru_cache(maxsize=16)
def _physical(mode: str, pae: bool) -> list[dict[str, str]]:
    case = build_case(
        mode,
        b"\x90",
        system=_system(mode, 3 if mode == "vm86" else 0, pae),
        mem=_memory(mode, CODE_ADDRESS),
        physical=True,
    )
    entries: list[dict[str, str]] = (case.extra or {})["phys"]
    return entries

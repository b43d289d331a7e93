"""What crafted cases have in common: an instruction of CPL 0, through its exit or behind KVM's prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from emufuzz.case.build import CODE_BASE, build_case, build_system
from emufuzz.case.model import Case
from emufuzz.fuzz.kvm.recipes import FORCED

RDMSR: Final = b"\x0f\x32"
WRMSR: Final = b"\x0f\x30"
VMCALL: Final = b"\x0f\x01\xc1"
_MASK32: Final = 0xFFFFFFFF

Kvm = Mapping[str, Any]


def exiting(
    code: bytes,
    kvm: Kvm | None = None,
    *,
    mode: str = "prot64",
    path: str = "exit",
    msr: Mapping[int, int] | None = None,
    system: Mapping[str, Any] | None = None,
    **state: Any,
) -> Case:
    """A case that enters KVM.

    Args:
        code: The instruction.
        kvm: The case's `kvm`.
        mode: One of MODES.
        path: The exit path; `fep` gets the prefix.
        msr: MSRs that are there.
        system: Fields of System.
        state: What `build_case` takes: registers by name, `data`, `flags`, `cpl`, `physical`.
    """
    cpl = state.pop("cpl", None)
    fields = dict(system or {})
    if msr:
        fields["msr"] = tuple(sorted(msr.items()))
    prefix = FORCED if path == "fep" else b""
    case = build_case(
        mode, prefix + code + b"\xf4", system=build_system(mode, cpl, **fields),
        rip=CODE_BASE, **state,
    )  # fmt: skip
    extra = {**(case.extra or {}), **({"kvm": dict(kvm)} if kvm else {})}
    return Case(
        "", mode, case.code, case.gpr, case.rip, case.rflags, case.system, case.mem, path=path,
        extra=extra or None,
    )  # fmt: skip


def msr_registers(index: int, value: int = 0) -> dict[str, Any]:
    """ECX, EDX:EAX."""
    return {"rcx": index, "rax": value & _MASK32, "rdx": value >> 32 & _MASK32}

"""vCPUs in a mode's valid state, and guest memory for the little that registers read of it."""

from __future__ import annotations

from typing import Any

import msgspec

from emufuzz.case.build import build_case, build_system
from emufuzz.kvm.hooks import IsolatedHooks
from emufuzz.kvm.state import vcpu_of_case
from emufuzz.kvm.vcpu import Vcpu


class Hooks(IsolatedHooks):
    """Guest memory from a dict of address -> bytes; real-mode injection as told; skips recorded."""

    def __init__(self, memory: dict[int, bytes] | None = None, *, delivers: bool = True) -> None:
        super().__init__()
        self.memory = memory or {}
        self.delivers = delivers
        self.delivered: list[tuple[int, int]] = []
        self.skips = 0

    def read_pdptes(self, gpa: int) -> bytes | None:
        data = self.memory.get(gpa)
        return None if data is None else data[:32].ljust(32, b"\0")

    def emulate_int_real(self, irq: int, inc_eip: int) -> bool:
        self.delivered.append((irq, inc_eip))
        return self.delivers

    def emulate_skip(self) -> int:
        self.skips += 1
        return 1


def make_vcpu(
    mode: str = "prot64",
    cpl: int | None = None,
    *,
    knobs: dict[str, Any] | None = None,
    kvm: dict[str, Any] | None = None,
    hooks: Hooks | None = None,
    rflags: int = 2,
    vendor: str = "intel",
    **system: Any,
) -> Vcpu:
    """A vCPU in a valid state of a mode; `system` replaces members of that state."""
    case = build_case(mode, b"\x90", system=build_system(mode, cpl, **system), flags=rflags)
    extra = {"kvm": {**(kvm or {}), "knobs": knobs or {}}}
    case = msgspec.structs.replace(case, extra=extra, vendor=vendor)
    return vcpu_of_case(case, hooks or Hooks())

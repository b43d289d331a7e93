"""Cases of instructions that exit, by hand; and one that each rule of the handlers' differential explains."""

from __future__ import annotations

from typing import Any

import msgspec

from emufuzz.arch.cr import X86_CR4_DE
from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.case.build import build_case, build_system
from emufuzz.case.model import Case
from emufuzz.case.segments import segment_data
from emufuzz.fuzz.handlers.observe import PREFIX

RIP = 0x6010
SHADOW_PAGING = {"ept": False, "unrestricted_guest": False, "host_maxphyaddr": 46}
DR6, GD, DR7 = 0xFFFF0FF0, 0x2400, 0x400
STI = 1
STEPPING = 3  # KVM_GUESTDBG_ENABLE | _SINGLESTEP
DEBUGGER_GD = {"control": 0x20001, "dr": [0] * 7 + [GD]}  # KVM_GUESTDBG_ENABLE | _USE_HW_BP


def exit_case(
    code: str,
    mode: str = "prot64",
    *,
    cpl: int | None = None,
    flags: int = 0,
    kvm: dict[str, Any] | None = None,
    knobs: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    system: dict[str, Any] | None = None,
    physical: bool = False,
    **gpr: int,
) -> Case:
    """Path `exit` at RIP, with the forced-emulation prefix before it."""
    state = build_system(mode, cpl, **(system or {}))
    case = build_case(
        mode, bytes.fromhex(code), rip=RIP, flags=flags, system=state, data={RIP - len(PREFIX): PREFIX},
        physical=physical, **gpr,
    )  # fmt: skip
    machine = {**(kvm or {}), **({"knobs": knobs} if knobs else {})}
    return msgspec.structs.replace(
        case, path="exit", extra={**(case.extra or {}), **(extra or {}), "kvm": machine}
    )


def debug_registers(dr7: int, *addresses: int) -> dict[str, Any]:
    padded = (*addresses, 0, 0, 0, 0)[:4]
    return {"dr": (*padded, 0, 0, DR6, dr7)}


# fmt: off
#: Rule -> a case that it explains.
EXAMPLES: dict[str, Case] = {
    "code-breakpoint":     exit_case("0fa2", flags=X86_EFLAGS_RF, knobs={"force_emulation_prefix": 3},
                                     system=debug_registers(DR7 | 1, RIP)),
    "cr-high-bits":        exit_case("0f22c0", rax=1 << 40 | 0x80000033),
    "cr8-byte":            exit_case("440f22c0", rax=0x105),
    "cr8-set-tpr":         exit_case("440f22c0", rax=3, system={"cr8": 9}),
    "dr-priority":         exit_case("0f21e0", cpl=3, system={"cr4": 0x620 | X86_CR4_DE}),
    "dr-gp-before-gd":     exit_case("0f23f0", rax=1 << 32, system=debug_registers(GD)),
    "dr-gd-payload":       exit_case("0f21c0", system=debug_registers(GD)),
    "dr-gd-debugger":      exit_case("0f21c0", kvm={"guest_debug": DEBUGGER_GD}),
    "dr-native":           exit_case("0f21c8", system=debug_registers(DR7, 1, 2)),
    "dr45-high-bits":      exit_case("0f23e0", rax=1 << 32),
    "hlt-request":         exit_case("f4"),
    "hypercall-privilege": exit_case("0f01c1", cpl=3),
    "hypercall-patch":     exit_case("0f01c1", rax=1),
    "monitor-unknown":     exit_case("0f01c8"),
    "invlpg-segment":      exit_case("0f013d00900000", "prot32", knobs=SHADOW_PAGING, physical=True,
                                     system={"ds": segment_data(0x28, bits=32, limit=0x7FFF)}),
    "invlpg-width":        exit_case("0f013b", rbx=1 << 50, knobs={**SHADOW_PAGING, "host_la57": True},
                                     physical=True),
    "fastpath-filter":     exit_case("0f30", rcx=0x6E0, knobs={"msr_denied": "0x6e0"}),
    "in-read-ahead":       exit_case("f3e460", rcx=4),
    "out-7e-step":         exit_case("e67e", rax=0x55, kvm={"guest_debug": STEPPING}),
    "out-step":            exit_case("e660", flags=X86_EFLAGS_TF),
    "shadow-after-fault":  exit_case("0f30", rcx=0x12345, kvm={"interruptibility": STI}),
    "shadow-event":        exit_case("0fa2", kvm={"interruptibility": STI}),
    "prefix-event":        exit_case("0fa2", knobs={"force_emulation_prefix": 3}),
    "rf-after-fault":      exit_case("0f30", rcx=0x12345, flags=X86_EFLAGS_RF),
    "debugger-tf":         exit_case("0fa2", kvm={"guest_debug": STEPPING}),
}
# fmt: on

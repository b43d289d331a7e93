"""Samples of the rules about what completed and faulting instructions leave behind."""

from __future__ import annotations

import msgspec

from emufuzz.case.build import DATA_BASE, LDT_BASE, STACK_TOP
from emufuzz.case.model import Fpu, Outcome, Segment, TableRegister
from tests.unit.oracle.rules.samples import (
    GP0,
    SS0,
    UD,
    Sample,
    case_of,
    descriptor,
    effect,
    outcome_of,
)

_PF = (14, 2, 0xB000)
_NULL = Segment(sel=0)
_FAR = {"kind": "mmio", "addr": "0xb000", "size": 4, "direction": "read", "data": "00000000"}
_LOCAL = 0x0C
_CR0 = 0x80010033
_ABSENT = case_of("prot32", "8903", rbx=0xB000)  # a store that is #PF
_MOV = case_of("prot64", "89d8", rbx=0x11223344, rax=0xFFFFFFFFFFFFFFFF)
_CODE = case_of("prot32", "ea006000000c00", data={LDT_BASE + 8: descriptor(11)})
_CS = Segment(_LOCAL, 0, 0xFFFFFFFF, 11, 1, 0, 1, 0, 0, 1, 1)
_DS = Segment(_LOCAL, 0, 0xFFFFFFFF, 3, 1, 0, 1, 0, 0, 1, 1)


def _with_gpr(**gpr: int) -> Outcome:
    """MOV EAX, EBX with its result, and other registers changed."""
    return outcome_of(_MOV, rax=0x11223344, **gpr)


# fmt: off
CONTROL = (
    effect("near-branch-target", case_of("prot64", "7402", flags=0x40), {"rip": 0x6004}, {"rip": 0x6002}),
    effect("far-jump-target", _CODE, {"rip": 0x6000, "cs": _CS},
           {"rip": 0x6000, "cs": msgspec.structs.replace(_CS, sel=_LOCAL | 3)}),
)

STATE = (
    effect("next-instruction", case_of("prot64", "90"), {}, {"rip": 0x6002}),
    effect("rip-upper-half", case_of("prot32", "eb02", rip=0x6000), {"rip": 0x6004},
           {"rip": 1 << 32 | 0x6004}),
    effect("flags-unmodified", case_of("prot64", "89d8"), {}, {"rflags": 0x42}),
    effect("resume-flag", case_of("prot64", "90", flags=1 << 16), {"rflags": 2}, {}),
    Sample("registers-unwritten", _MOV, _with_gpr(), _with_gpr(rcx=1)),
    Sample("zero-extension", _MOV, _with_gpr(), outcome_of(_MOV, rax=0xFFFFFFFF11223344)),
    effect("narrow-result", case_of("prot64", "6689d8", rbx=1, rax=0xFFFFFFFF), {"rax": 0xFFFF0001},
           {"rax": 1}),
    effect("stack-pointer", case_of("prot64", "50"), {"rsp": STACK_TOP - 8}, {"rsp": STACK_TOP - 4}),
    effect("memory-read-only", case_of("prot64", "8b03", rbx=DATA_BASE), {}, {"mem": {DATA_BASE: b"\x01"}}),
    effect("memory-elsewhere", case_of("prot64", "8903", rbx=DATA_BASE, rax=1), {"mem": {DATA_BASE: b"\x01"}},
           {"mem": {DATA_BASE: b"\x01\0\0\0\x01"}}),
    effect("system-unchanged", case_of("prot64", "90"), {}, {"cr4": 0x6A0}),
    effect("fpu-unchanged", case_of("prot64", "90"), {}, {"fpu": Fpu(mxcsr=0)}),
    effect("rflags-reserved", case_of("prot64", "90"), {}, {"rflags": 0}),
    effect("fault-registers", _ABSENT, {"exception": _PF}, {"exception": _PF, "rax": 1}),
    effect("fault-rip", _ABSENT, {"exception": _PF}, {"exception": _PF, "rip": 0x6002}),
    effect("fault-flags", _ABSENT, {"exception": _PF}, {"exception": _PF, "rflags": 0x42}),
    effect("fault-memory", _ABSENT, {"exception": _PF}, {"exception": _PF, "mem": {DATA_BASE: b"\x01"}}),
    effect("fault-system", _ABSENT, {"exception": _PF}, {"exception": _PF, "ds": _NULL}),
    effect("fault-fpu", _ABSENT, {"exception": _PF}, {"exception": _PF, "fpu": Fpu(ftw=0xFF)}),
    effect("fault-devices", case_of("prot32", "f08b06"), {"exception": UD},
           {"exception": UD, "extra": {"device_trace": [_FAR]}}),
    effect("fault-shadow", case_of("prot32", "8ed0"), {"exception": GP0},
           {"exception": GP0, "interruptibility": 1}),
)

EFFECTS = (
    effect("mov-from-cr", case_of("prot64", "0f20d0", cr2=0x1234), {"rax": 0x1234}, {"rax": 0}),
    effect("mov-to-cr", case_of("prot64", "0f22d0", rax=0x1234), {"cr2": 0x1234}, {}),
    effect("mov-from-dr", case_of("prot64", "0f21f8"), {"rax": 0x400}, {"rax": 0x401}),
    effect("mov-to-dr", case_of("prot64", "0f23c0", rax=0x1234),
           {"dr": (0x1234, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400)}, {}),
    effect("clts", case_of("prot32", "0f06", cr0=_CR0 | 8), {"cr0": _CR0}, {}),
    effect("lmsw", case_of("prot32", "0f01f0", rax=8), {"cr0": _CR0 & ~2 | 8}, {"cr0": _CR0 & ~3 | 8}),
    effect("smsw", case_of("real", "0f01e0"), {"rax": 0x32}, {"rax": 0x33}),
    effect("store-selector", case_of("prot32", "8cd8"), {"rax": 0x28}, {"rax": 0x30}),
    effect("store-table", case_of("prot32", "0f010b", rbx=DATA_BASE),
           {"mem": {DATA_BASE: bytes.fromhex("ff0f00300000")}},
           {"mem": {DATA_BASE: bytes.fromhex("ff0f00400000")}}),
    effect("load-table", case_of("prot32", "0f011b", rbx=DATA_BASE, data={DATA_BASE: b"\xff\0\0\x30\0\x10"}),
           {"idtr": TableRegister(0x10003000, 0xFF)}, {"idtr": TableRegister(0x3000, 0xFF)}),
    effect("rdmsr", case_of("prot64", "0f32", rcx=0xC0000080, rdx=-1 & (1 << 64) - 1),
           {"rax": 0xD01, "rdx": 0}, {"rax": 0xD01}),
    effect("wrmsr", case_of("prot64", "0f30", rcx=0xC0000102, rax=5, msr=((0xC0000102, 0),)),
           {"msr": ((0xC0000102, 5),)}, {}),
    effect("xsetbv", case_of("prot64", "0f01d1", cr4=0x40620, rax=1), {"xcr0": 1}, {}),
    effect("interrupt-flag", case_of("prot64", "fa", flags=0x200), {"rflags": 2}, {}),
    effect("popf-protected", case_of("prot32", "9d", cpl=3, data={STACK_TOP: b"\x02\x32"}),
           {"rsp": STACK_TOP + 4}, {"rsp": STACK_TOP + 4, "rflags": 0x3202}),
    effect("load-segment-real", case_of("real", "8ed8", rax=0x800),
           {"ds": Segment(0x800, 0x8000, 0xFFFF, 3, 1, 0, 1)}, {"ds": Segment(0x800, 0, 0xFFFF, 3, 1, 0, 1)}),
    effect("load-segment-null", case_of("prot32", "8ed8", rax=3), {"ds": Segment(sel=3)}, {}),
    effect("load-segment", case_of("prot32", "8ed8", rax=_LOCAL, data={LDT_BASE + 8: descriptor(2)}),
           {"ds": _DS},
           {"ds": msgspec.structs.replace(_DS, type=2)}),
    effect("shadow-mov-ss", case_of("real", "8ed0"), {"interruptibility": 1}, {}),
    effect("shadow-sti", case_of("real", "fb"), {"interruptibility": 2, "rflags": 0x202}, {"rflags": 0x202}),
    effect("shadow-none", case_of("real", "8ed8"), {}, {"interruptibility": 1}),
)

CAUSES = (
    effect("ud-cause", case_of("real", "90"), {}, {"exception": UD}),
    effect("gp-cause", case_of("prot32", "8b03", rbx=DATA_BASE), {}, {"exception": SS0}),
    effect("pf-cause", case_of("prot32", "8903", rbx=DATA_BASE), {}, {"exception": (14, 2, DATA_BASE)}),
    effect("pf-place", case_of("prot32", "8b03", rbx=DATA_BASE), {}, {"exception": (14, 0, 0xB000)}),
    effect("ac-cause", case_of("prot32", "8b03", rbx=DATA_BASE + 1), {}, {"exception": (17, 0, None)}),
    effect("de-cause", case_of("prot32", "f7f3", rbx=1), {}, {"exception": (0, None, None)}),
    effect("nm-cause", case_of("prot32", "d9c0"), {}, {"exception": (7, None, None)}),
    effect("np-cause", case_of("prot32", "89d8"), {}, {"exception": (11, 8, None)}),
)
# fmt: on

SAMPLES: tuple[Sample, ...] = (*CONTROL, *STATE, *EFFECTS, *CAUSES)

"""Each corner gap exists: Unicorn does what the ledger says, and the ledger recognises it."""

from __future__ import annotations

import struct

import msgspec
import pytest

from emufuzz.arch.cr import X86_CR0_EM, X86_CR0_TS
from emufuzz.arch.exceptions import GP_VECTOR, NM_VECTOR, PF_VECTOR, UD_VECTOR
from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_VM
from emufuzz.case.arena import ARENA_BASE
from emufuzz.case.model import Memory
from emufuzz.fuzz.environments import environments
from emufuzz.fuzz.generate import generate_batch
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.oracle.unicorn import native as native_module
from emufuzz.oracle.unicorn import prefixes as prefixes_module
from emufuzz.oracle.unicorn import refusals as refusals_module
from emufuzz.oracle.unicorn import runner as runner_module
from emufuzz.oracle.unicorn import selftest as selftest_module
from emufuzz.oracle.unicorn import several as several_module
from emufuzz.oracle.unicorn.gaps_corner import CORNER_GAPS
from emufuzz.oracle.unicorn.ledger import ATTACHED, REASONS

PAGE = 0x8000
END = 0x9000  # no page there in the memories of this test
#: Displacement of PAGE from the end of an 8-byte instruction in the first code slot.
RELATIVE = (PAGE - (ARENA_BASE + 8) & 0xFFFFFFFF).to_bytes(4, "little").hex()
NONCANONICAL = (1 << 63).to_bytes(8, "little")
#: A GDT with a code descriptor of which L and D are set, and a far pointer to it.
LONG_AND_WIDE = bytes(8) + bytes.fromhex("ffff0000009bef00000000000800")
#: What IRETD pops: EIP, CS, EFLAGS with VM, ESP, SS, ES, DS, FS and GS.
VM86_FRAME = struct.pack("<9I", 0x10, 0x20, X86_EFLAGS_VM | 2, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80)


@pytest.fixture(scope="module")
def oracle():
    return UnicornOracle()


def with_cr0(case, bits):
    system = msgspec.structs.replace(case.system, cr0=case.system.cr0 | bits)
    return msgspec.structs.replace(case, system=system)


def case_of(name, code, data=b"", at=PAGE, flags=2, **gpr):
    mode = name.partition("-")[0]
    env = next(e for e in environments(1, mode) if e.name == name)
    registers = [0] * 16
    for register, value in gpr.items():
        registers[("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi").index(register)] = value
    template = generate_batch(1, 0, 1)[0]
    return msgspec.structs.replace(
        template,
        mode=mode,
        code=bytes.fromhex(code) + b"\xf4",
        rip=env.first_rip,
        rflags=flags | (0x20000 if mode == "vm86" else 0),
        gpr=tuple(registers),
        system=env.system,
        mem=Memory(((PAGE, b""), (at, data))),
    )


def completes(outcome, _case):
    return outcome.exception is None


def vm86(outcome, _case):
    return outcome.exception is None and outcome.rflags & X86_EFLAGS_VM


def undefined(outcome, _case):
    return outcome.exception == (UD_VECTOR, None, None)


# fmt: off
PROOFS = {
    "segment-base64": (case_of("prot64-cpl0-based", "3e8a00", rax=PAGE),
                       lambda o, c: o.exception[2] == PAGE + c.system.seg[3].base
                       if o.exception else c.system.seg[3].base < 0x1000),
    "segment-base64, IRET": (case_of("prot64-cpl0-based", "cf", rsp=PAGE),
                             lambda o, c: o.exception[2] == PAGE + c.system.seg[2].base),
    "rex-lahf-sahf": (case_of("prot64-cpl0-flat", "409f"),
                      lambda o, _: o.gpr[0] == 0 and o.gpr[4] & 0xFF == 2),
    "rex-r-c6-c7": (case_of("prot64-cpl0-flat", "44c6c01f"), undefined),
    "push-segment-width": (case_of("prot32-cpl0-flat", "0e", b"\xff" * 8, PAGE + 0xFC, rsp=PAGE + 0x100),
                           lambda o, _: o.pages[PAGE >> 12][0xFE:0x100] == b"\0\0"),
    "popa-partial": (case_of("prot32-cpl0-flat", "61", b"\x55" * 8, END - 8, rsp=END - 8),
                     lambda o, _: o.exception[0] == PF_VECTOR and o.gpr[7] == 0x55555555),
    "vector-load-partial": (case_of("prot64-cpl0-flat", "0f1000", b"\x55" * 8, END - 8, rax=END - 8),
                            lambda o, _: o.exception[0] == PF_VECTOR and o.system.fpu.xmm[0] != 0),
    "mmx-fault-tags": (case_of("prot64-cpl0-flat", "0f6f00", rax=END), lambda o, _: o.system.fpu.ftw == 0xFF),
    "control-group": (case_of("prot64-cpl3-flat", "660f01c1"), undefined),
    "ltr-null": (case_of("prot32-cpl0-flat", "0f00d8"), completes),
    "far-pointer-rex-w": (case_of("prot64-cpl0-flat", "480fb400", b"\x11" * 4, rax=PAGE),
                          lambda o, _: o.exception is None and o.gpr[0] == 0x11111111),
    "call-order": (case_of("prot64-cpl0-flat", "ffd0", rax=1 << 63, rsp=END + 0x100),
                   lambda o, _: o.exception[0] == PF_VECTOR),
    "movnti-prefix": (case_of("prot64-cpl0-flat", "660fc308", rax=PAGE), completes),
    "far-stack-supervisor": (case_of("prot64-cpl3-flat", "cb", rsp=END + 0x100),
                             lambda o, _: o.exception[0] == PF_VECTOR and not o.exception[1] & 4),
    "far-long-wide": (case_of("prot64-cpl0-flat", "ff28", LONG_AND_WIDE, 0x1000, rax=0x1010), completes),
    "pop-segment-fault": (case_of("prot32-cpl0-flat", "07", rsp=END - 2),
                          lambda o, _: o.exception == (PF_VECTOR, 0, END)),
    "pushf-vm": (case_of("vm86-cpl3-flat", "669c", at=0xC000, flags=0x3002, rsp=0x100),
                 lambda o, _: o.pages[0xC][0xFE] & 2),
    "table-base": (case_of("prot64-cpl0-flat", "0f0110", b"\xff\0" + NONCANONICAL, rax=PAGE), completes),
    "double-shift-rip": (case_of("prot64-cpl0-flat", "0fa40d" + RELATIVE + "01"),
                         lambda o, _: o.exception[2] == PAGE - 1),
    "compare-order": (case_of("prot64-cpl0-flat", "a7", rsi=END, rdi=1 << 63),
                      lambda o, _: o.exception[0] == GP_VECTOR),
    "iret-real-stack": (case_of("real-cpl0-cs32", "66cf", b"", 0xC000, rsp=0x400000), completes),
    "iret-rf": (case_of("real-cpl0-flat", "66cf", b"\0" * 8 + b"\2\0\1\0", 0xC000),
                lambda o, _: not o.rflags & X86_EFLAGS_RF),
    "iret-vm86": (case_of("prot32-cpl3-flat", "cf", VM86_FRAME, rsp=PAGE), vm86),
    "iret-vm86, IA-32e mode": (case_of("compat32-cpl0-flat", "cf", VM86_FRAME, rsp=PAGE), vm86),
    "null-ss-rpl": (case_of("prot64-cpl0-flat", "8ed0", rax=3), completes),
    "wrap-4g": (case_of("compat32-cpl0-flat", "8b00", b"", 0xFFFFF000, rax=0xFFFFFFFE),
                lambda o, _: o.exception[2] == 1 << 32),
    "too-long-access": (case_of("prot64-cpl0-flat", "3e" * 11 + "f70011111111", rax=END),
                        lambda o, _: o.exception[0] == PF_VECTOR),
    "movbe-em": (with_cr0(case_of("prot32-cpl0-flat", "0f38f000", rax=PAGE), X86_CR0_EM), undefined),
    "movbe-em, TS": (with_cr0(case_of("prot32-cpl0-flat", "0f38f000", rax=PAGE), X86_CR0_TS),
                     lambda o, _: o.exception == (NM_VECTOR, None, None)),
    "sti-shadow": (case_of("prot64-cpl0-flat", "fb", flags=0x202), lambda o, _: o.interruptibility == 2),
    "prefetchw-register": (case_of("prot64-cpl0-flat", "0f0dc8"), undefined),
    "undefined-early": (case_of("prot64-cpl0-flat", "67" * 10 + "c6afec42cfc6"), undefined),
}
# fmt: on


def test_every_corner_gap_has_a_proof():
    assert {f"unicorn-{name.partition(',')[0]}" for name in PROOFS} == {gap.id for gap in CORNER_GAPS}


@pytest.mark.parametrize("name", PROOFS)
def test_the_gap_exists_and_is_recognised(oracle, name):
    case, behaves = PROOFS[name]
    (outcome,) = oracle.run([case])
    assert behaves(outcome, case)
    assert f"unicorn-{name.partition(',')[0]}" in {gap for _, gap in oracle.unchecked(case, outcome)}


def test_a_return_without_rf_is_judged(oracle):
    case = case_of("real-cpl0-flat", "66cf", b"\0" * 8 + b"\2\0\0\0", 0xC000)
    (outcome,) = oracle.run([case])
    assert (outcome.exception, outcome.rflags, oracle.unchecked(case, outcome)) == (None, 2, ())


def test_every_gap_that_the_oracle_attaches_is_explained():
    attached = {
        value
        for module in (
            refusals_module,
            runner_module,
            native_module,
            prefixes_module,
            selftest_module,
            several_module,
        )
        for name, value in vars(module).items()
        if name.startswith("GAP_")
    }
    assert attached <= set(REASONS)
    assert set(ATTACHED) <= attached

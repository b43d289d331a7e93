"""Hyper-V's hypercalls and MSRs (TLFS 3): decoding, results, flushes, IPIs, what goes to userspace."""

from __future__ import annotations

import struct

import pytest
from support.phys import PhysHooks
from support.vcpus import make_vcpu

from emufuzz.emulator.ctxt import FpuRegisters
from emufuzz.kvm import lapic_regs as r
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.hypercall import kvm_emulate_hypercall
from emufuzz.kvm.hyperv import kvm_hv_hypercall, kvm_hv_hypercall_enabled
from emufuzz.kvm.hyperv_calls import kvm_hv_vcpu_flush_tlb
from emufuzz.kvm.msr import kvm_get_msr, kvm_set_msr
from emufuzz.kvm.regs import kvm_rip_read
from emufuzz.kvm.trace import Trace, format_event

FAST = 1 << 16
VAR = 17
REP, START = 32, 48
SUCCESS, CODE, INPUT, ALIGNMENT, PARAMETER, DENIED, PORT = 0, 2, 3, 4, 5, 8, 17
FLUSH_SPACE, FLUSH_LIST, SPIN, SEND_IPI = 2, 3, 8, 0xB
FLUSH_SPACE_EX, FLUSH_LIST_EX, SEND_IPI_EX = 0x13, 0x14, 0x15
POST, SIGNAL, POST_DEBUG, RETRIEVE_DEBUG, RESET_DEBUG = 0x5C, 0x5D, 0x69, 0x6A, 0x6B
SYNDBG = {"cpuid": {"leaves": [{"function": 0x40000082, "eax": 2}]}}
SYNIC = {"hyperv_synic": True}
GUEST_OS_ID, HYPERCALL, VP_INDEX, RESET = 0x40000000, 0x40000001, 0x40000002, 0x40000003
INPUT_GPA = 0xFF8  # so that input crosses a page


def make(mode="prot64", *, knobs=None, kvm=None, **options):
    knobs = {"hyperv": True, "irqchip": True, **(knobs or {})}
    kvm = {"lapic": {r.APIC_SPIV: 0x1FF}, **(kvm or {})}
    vcpu = make_vcpu(mode, hooks=PhysHooks(), knobs=knobs, kvm=kvm, **options)
    vcpu.hyperv.guest_os_id = 1
    vcpu.vmcs.hw_write(vf.VM_EXIT_INSTRUCTION_LEN, 3)
    vcpu.requests.clear()
    return vcpu


def load(vcpu, param, ingpa=0, outgpa=0):
    vcpu.regs[1], vcpu.regs[2], vcpu.regs[8] = param, ingpa, outgpa


def call(vcpu, param, ingpa=0, outgpa=0):
    """The result of a hypercall that goes on in the guest."""
    load(vcpu, param, ingpa, outgpa)
    rip = kvm_rip_read(vcpu)
    assert kvm_emulate_hypercall(vcpu) == 1
    assert kvm_rip_read(vcpu) == rip + 3
    return vcpu.regs[0]


def arrived(vcpu):
    return {vector for vector in range(256) if vcpu.apic.test_vector(vector, r.APIC_IRR)}


# -- enabling ----------------------------------------------------------------------------------


def test_enabled_by_knob_or_cpuid_and_guest_os_id():
    assert kvm_hv_hypercall_enabled(make())
    vcpu = make_vcpu(kvm={"cpuid": {"leaves": [{"function": 0x40000001, "eax": 0x31237648}]}})
    assert not kvm_hv_hypercall_enabled(vcpu)
    assert kvm_set_msr(vcpu, GUEST_OS_ID, 5) == 0
    assert kvm_hv_hypercall_enabled(vcpu)
    vcpu = make_vcpu()
    assert kvm_set_msr(vcpu, GUEST_OS_ID, 5, host=True) == 0
    assert not kvm_hv_hypercall_enabled(vcpu)


@pytest.mark.parametrize(("mode", "cpl"), [("prot64", 3), ("prot32", 3), ("real", None), ("vm86", None)])
def test_invalid_opcode_above_cpl_0_and_in_real_mode(mode, cpl):
    vcpu = make(mode, cpl=cpl)
    rip = kvm_rip_read(vcpu)
    assert kvm_hv_hypercall(vcpu) == 1
    assert (vcpu.exception.pending, vcpu.exception.vector) == (True, 6)
    assert kvm_rip_read(vcpu) == rip


# -- decoding ----------------------------------------------------------------------------------


def test_registers_of_64_bit_mode():
    vcpu = make()
    vcpu.trace = Trace()
    assert call(vcpu, 3 << START | 2 << REP | 5 << VAR | FAST | 0x99, 0x1234, 0x5678) == CODE
    assert [format_event(event) for event in vcpu.trace.events] == [
        "kvm_hv_hypercall: code 0x99 fast var_cnt 0x5 rep_cnt 0x2 idx 0x3 in 0x1234 out 0x5678",
        "kvm_hv_hypercall_done: result 0x2",
    ]


@pytest.mark.parametrize("mode", ["prot32", "compat32", "prot16"])
def test_registers_of_other_modes(mode):
    vcpu = make(mode)
    vcpu.trace = Trace()
    vcpu.regs[:8] = [0xF << 32 | FLUSH_LIST, 0x22, 0x7, 0x1, 0, 0, 0x44, 0x3]
    kvm_hv_hypercall(vcpu)
    assert format_event(vcpu.trace.events[0]) == (
        "kvm_hv_hypercall: code 0x3 slow var_cnt 0x0 rep_cnt 0x7 idx 0x0 in 0x100000022 out 0x300000044"
    )


def test_result_of_other_modes():
    vcpu = make("prot32")
    vcpu.regs[:8] = [FAST | FLUSH_LIST, 0, 2, 0, 0, 0, 1, 0]
    assert kvm_hv_hypercall(vcpu) == 1
    assert (vcpu.regs[0], vcpu.regs[2]) == (0, 2)


@pytest.mark.parametrize("bit", [27, 31, 44, 47, 60, 63])
def test_reserved_bits(bit):
    assert call(make(), 1 << bit | SPIN) == INPUT


# fmt: off
CODES_CASES = [
    (0x99,                                  CODE),
    (0x99 | 1 << VAR,                       CODE),
    (0x8000,                                CODE),
    (0x8042,                                CODE),
    (0x8001 | FAST,                         PARAMETER),
    (SPIN,                                  SUCCESS),
    (SPIN | 1 << VAR,                       INPUT),
    (SPIN | 1 << REP,                       INPUT),
    (SPIN | 1 << START,                     INPUT),
    (POST,                                  INPUT),     # no SynIC
    (SIGNAL | FAST,                         INPUT),     # neither a port nor a SynIC
    (SIGNAL | FAST | 1 << VAR,              INPUT),
    (POST_DEBUG | FAST,                     PARAMETER),
    (RETRIEVE_DEBUG | FAST,                 PARAMETER),
    (RESET_DEBUG | FAST,                    CODE),
    (POST_DEBUG,                            CODE),
    (FLUSH_LIST | FAST,                     INPUT),     # not repeated
    (FLUSH_LIST | FAST | 1 << REP | 1 << START, INPUT),
    (FLUSH_LIST | FAST | 1 << REP | 1 << VAR, INPUT),
    (FLUSH_LIST | FAST | 1 << REP,          1 << REP),
    (FLUSH_SPACE | FAST,                    SUCCESS),
    (FLUSH_SPACE | FAST | 1 << REP,         INPUT),
    (FLUSH_SPACE | FAST | 1 << VAR,         INPUT),
    (FLUSH_SPACE_EX | FAST,                 SUCCESS),
    (FLUSH_SPACE_EX | FAST | 1 << REP,      INPUT),
    (FLUSH_SPACE_EX | FAST | 1 << VAR,      INPUT),     # more banks than the mask has
    (FLUSH_LIST_EX | FAST,                  INPUT),
    (SEND_IPI | FAST | 1 << VAR,            INPUT),
    (SEND_IPI | FAST | 1 << REP,            INPUT),
    (SEND_IPI_EX | FAST | 1 << REP,         INPUT),
]
# fmt: on


@pytest.mark.parametrize(("param", "expected"), CODES_CASES)
def test_codes(param, expected):
    assert call(make(), param) == expected


# -- userspace ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("param", "knobs", "kvm"),
    [
        (POST, SYNIC, {}),
        (POST | FAST, SYNIC, {}),
        (SIGNAL | FAST, SYNIC, {}),
        (0x8001, {}, {}),
        (0x8041, {}, {}),
        (RESET_DEBUG, {}, SYNDBG),
    ],
)
def test_userspace_does_it(param, knobs, kvm):
    vcpu = make(knobs=knobs, kvm=kvm)
    vcpu.hyperv.syndbg_options = 4
    load(vcpu, param, 0x10, 0x20)
    rip = kvm_rip_read(vcpu)
    assert kvm_hv_hypercall(vcpu) == 0
    assert vcpu.run.exit_reason == "HYPERV"
    assert vcpu.run.data == {"type": "HCALL", "input": param, "params": [0x10, 0x20], "result": 0}
    vcpu.run.data["result"] = 0x12
    assert vcpu.complete_userspace_io(vcpu) == 1
    assert (vcpu.regs[0], kvm_rip_read(vcpu)) == (0x12, rip + 3)


def test_debugger_by_msrs_alone():
    assert call(make(kvm=SYNDBG), RESET_DEBUG) == DENIED


@pytest.mark.parametrize(
    ("knobs", "gpa", "connection", "expected"),
    [
        ({}, 0x1004, 0, ALIGNMENT),
        ({}, 0x1000, 1 << 24, INPUT),
        ({}, 0x1000, 1 << 48, INPUT),
        ({}, 0x1000, 5, INPUT),
        (SYNIC, 0x1000, 1 << 24, INPUT),
        (SYNIC, 0x1000, 5, "exit"),
        (SYNIC, 0x1000, 1 << 32 | 1 << 60, "exit"),  # a flag number, whatever else is wrong
        (SYNIC, 1 << 50, 5, ALIGNMENT),
    ],
)
def test_signal_event_from_memory(knobs, gpa, connection, expected):
    vcpu = make(knobs=knobs)
    vcpu.hooks.phys[0x1000:0x1008] = connection.to_bytes(8, "little")
    if expected == "exit":
        load(vcpu, SIGNAL, gpa, 7)
        assert kvm_hv_hypercall(vcpu) == 0
        assert vcpu.run.data["params"] == [connection, 7]
    else:
        assert call(vcpu, SIGNAL, gpa) == expected


# -- TLB flushes -------------------------------------------------------------------------------


def flush(vcpu, param, numbers):
    """A call with its input in memory: the result, and addresses that were flushed or requests."""
    data = struct.pack(f"<{len(numbers)}Q", *numbers)
    vcpu.hooks.phys[INPUT_GPA : INPUT_GPA + len(data)] = data
    result = call(vcpu, param, INPUT_GPA)
    assert ("HV_TLB_FLUSH" in vcpu.requests) is bool(vcpu.hyperv.tlb_flush_fifo)
    kvm_hv_vcpu_flush_tlb(vcpu)
    assert not vcpu.hyperv.tlb_flush_fifo
    return result, vcpu.hooks.invalidated or sorted(vcpu.requests)


ALL, EVERYTHING = 1, ["TLB_FLUSH_GUEST"]
LIST_1, LIST_2 = 1 << REP, 2 << REP
NONCANONICAL = 1 << 50

# fmt: off
FLUSH_CASES = [
    (FLUSH_SPACE,          [0, 0, 1],                       SUCCESS, EVERYTHING),
    (FLUSH_SPACE,          [0, 0, 2],                       SUCCESS, []),
    (FLUSH_SPACE,          [0, 0, 0],                       SUCCESS, EVERYTHING),  # an empty mask means all
    (FLUSH_SPACE,          [0, ALL, 2],                     SUCCESS, EVERYTHING),
    (FLUSH_LIST | LIST_1,  [0, 0, 1, 0x5000],               LIST_1,  [0x5000]),
    (FLUSH_LIST | LIST_2,  [0, 0, 1, 0x5002, NONCANONICAL], LIST_2,  [0x5000, 0x6000, 0x7000]),
    (FLUSH_LIST | LIST_1,  [0, 0, 2, 0x5000],               LIST_1,  []),
    (FLUSH_LIST | 15 << REP, [0, 0, 1, *range(0, 0xF000, 0x1000)], 15 << REP, [*range(0, 0xF000, 0x1000)]),
    (FLUSH_LIST | 16 << REP, [0, 0, 1],                     16 << REP, EVERYTHING),
    (FLUSH_SPACE_EX,                [0, 0, 1, 0],           SUCCESS, EVERYTHING),
    (FLUSH_SPACE_EX,                [0, 0, 0, 0],           SUCCESS, []),
    (FLUSH_SPACE_EX | 1 << VAR,     [0, 0, 0, 1, 1],        SUCCESS, EVERYTHING),
    (FLUSH_SPACE_EX | 1 << VAR,     [0, 0, 0, 1, 2],        SUCCESS, []),
    (FLUSH_SPACE_EX | 1 << VAR,     [0, 0, 0, 2, 1],        SUCCESS, []),
    (FLUSH_SPACE_EX,                [0, 0, 0, 1],           INPUT,   []),
    (FLUSH_LIST_EX | LIST_1 | 2 << VAR, [0, 0, 0, 3, 1, 0, 0x5000], LIST_1, [0x5000]),
    (FLUSH_LIST_EX | LIST_1 | 1 << VAR, [0, 0, 1, 1, 9, 0x5000],    LIST_1, [0x5000]),
    (FLUSH_LIST_EX | LIST_1,        [0, 0, 0, 0],           LIST_1,  []),
]
# fmt: on


@pytest.mark.parametrize(("param", "numbers", "result", "flushed"), FLUSH_CASES)
def test_flush(param, numbers, result, flushed):
    assert flush(make(), param, numbers) == (result, flushed)


@pytest.mark.parametrize("param", [FLUSH_SPACE, FLUSH_SPACE_EX, FLUSH_LIST | LIST_1])
def test_flush_without_input(param):
    assert call(make(), param, 1 << 40) == INPUT


def test_flush_list_beyond_memory():
    vcpu = make()
    end = len(vcpu.hooks.phys)
    vcpu.hooks.phys[end - 24 :] = struct.pack("<3Q", 0, 0, 1)
    assert call(vcpu, FLUSH_LIST | LIST_1, end - 24) == INPUT
    vcpu.hooks.phys[end - 32 :] = struct.pack("<4Q", 0, 0, 0, 1)
    assert call(vcpu, FLUSH_SPACE_EX | 1 << VAR, end - 32) == INPUT


# fmt: off
FAST_FLUSH_CASES = [
    (FLUSH_SPACE,                            [2],                       SUCCESS,  []),
    (FLUSH_LIST | LIST_2,                    [1, 0x5000, 0x7000],       LIST_2,   [0x5000, 0x7000]),
    (FLUSH_LIST | 11 << REP,                 [1, *[0x5000] * 11],       11 << REP, [0x5000] * 11),
    (FLUSH_LIST | 12 << REP,                 [1],                       INPUT,    []),
    (FLUSH_SPACE_EX | 1 << VAR,              [0, 1, 1],                 SUCCESS,  EVERYTHING),
    (FLUSH_LIST_EX | LIST_1 | 1 << VAR,      [0, 1, 1, 0x5000],         LIST_1,   [0x5000]),
    (FLUSH_SPACE_EX | 11 << VAR,             [0, (1 << 11) - 1],        INPUT,    []),
    (FLUSH_LIST_EX | LIST_1 | 10 << VAR,     [1, (1 << 10) - 1],        INPUT,    []),
]
# fmt: on


@pytest.mark.parametrize(("param", "halves", "result", "flushed"), FAST_FLUSH_CASES)
def test_fast_flush(param, halves, result, flushed):
    vcpu = make()
    vcpu.fpu = FpuRegisters()
    for index, half in enumerate(halves):
        vcpu.fpu.xmm[index // 2] |= half << index % 2 * 64
    assert call(vcpu, FAST | param) == result
    kvm_hv_vcpu_flush_tlb(vcpu)
    assert (vcpu.hooks.invalidated or sorted(vcpu.requests)) == flushed


def test_flushes_add_up_until_there_is_no_room():
    vcpu = make()
    for _ in range(2):
        assert flush_only(vcpu, 8) == 8 << REP
    assert vcpu.hyperv.tlb_flush_fifo == [0x5000] * 8 + [(1 << 64) - 1]
    for _ in range(8):
        flush_only(vcpu, 8)
    assert len(vcpu.hyperv.tlb_flush_fifo) == 16
    kvm_hv_vcpu_flush_tlb(vcpu)
    assert (vcpu.requests, vcpu.hooks.invalidated) == ({"TLB_FLUSH_GUEST"}, [])
    kvm_hv_vcpu_flush_tlb(vcpu)  # nothing is asked for any more
    assert vcpu.requests == {"TLB_FLUSH_GUEST"}


def flush_only(vcpu, count):
    data = struct.pack(f"<3Q{count}Q", 0, 0, 1, *[0x5000] * count)
    vcpu.hooks.phys[: len(data)] = data
    return call(vcpu, FLUSH_LIST | count << REP)


def test_shadow_paging_flushes_everything():
    vcpu = make(knobs={"ept": False})
    assert flush(vcpu, FLUSH_LIST | LIST_1, [0, 0, 1, 0x5000]) == (LIST_1, EVERYTHING)


TRACED = [
    (FLUSH_SPACE, "kvm_hv_flush_tlb: processor_mask 0x1 address_space 0x9 flags 0x1 "),
    (
        FLUSH_SPACE_EX | 1 << VAR,
        "kvm_hv_flush_tlb_ex: valid_bank_mask 0x8 format 0x1 address_space 0x9 flags 0x1 (L2)",
    ),
    (SEND_IPI, "kvm_hv_send_ipi: vector 9 processor_mask 0x1"),
    (SEND_IPI_EX | 1 << VAR, "kvm_hv_send_ipi_ex: vector 9 format 1 valid_bank_mask 0x1"),
]


@pytest.mark.parametrize(("param", "text"), TRACED)
def test_calls_are_traced(param, text):
    vcpu = make(kvm={"guest_mode": "(L2)" in text})
    vcpu.trace = Trace()
    vcpu.hooks.phys[:32] = struct.pack("<4Q", 9, 1, 1, 8)
    call(vcpu, param)
    assert text in map(format_event, vcpu.trace.events)


# -- IPIs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vector", "mask", "result", "arrives"),
    [(0x41, 1, SUCCESS, {0x41}), (0x41, 2, SUCCESS, set()), (0xF, 1, INPUT, set()), (0x100, 1, INPUT, set())],
)
def test_send_ipi(vector, mask, result, arrives):
    vcpu = make()
    assert call(vcpu, SEND_IPI | FAST, vector, mask) == result
    assert arrived(vcpu) == arrives
    vcpu = make()
    vcpu.hooks.phys[INPUT_GPA : INPUT_GPA + 16] = struct.pack("<IIQ", vector, 9, mask)
    assert call(vcpu, SEND_IPI, INPUT_GPA) == result
    assert arrived(vcpu) == arrives


def test_send_ipi_bad_input():
    assert call(make(), SEND_IPI | FAST, 1 << 32 | 0x41, 1) == INPUT
    assert call(make(), SEND_IPI, 1 << 40) == INPUT
    assert call(make(), SEND_IPI_EX, 1 << 40) == INPUT
    vcpu = make()
    vcpu.apic = None
    assert call(vcpu, SEND_IPI | FAST, 0x41, 1) == INPUT


# fmt: off
SEND_IPI_EX_CASES = [
    (0x41, 1, 0, [],       SUCCESS, {0x41}),  # everybody
    (0x41, 0, 0, [],       SUCCESS, set()),
    (0x05, 0, 0, [],       SUCCESS, set()),   # nobody gets an invalid vector
    (0x05, 1, 0, [],       INPUT,   set()),
    (0x41, 0, 1, [1],      SUCCESS, {0x41}),
    (0x41, 0, 1, [2],      SUCCESS, set()),
    (0x41, 0, 2, [1],      SUCCESS, set()),
    (0x41, 0, 3, [1, 0],   SUCCESS, {0x41}),
    (0x41, 0, 3, [1],      INPUT,   set()),
]
# fmt: on


@pytest.mark.parametrize(("vector", "form", "valid", "banks", "result", "arrives"), SEND_IPI_EX_CASES)
def test_send_ipi_ex(vector, form, valid, banks, result, arrives):
    vcpu = make()
    data = struct.pack(f"<IIQQ{len(banks)}Q", vector, 0, form, valid, *banks)
    vcpu.hooks.phys[INPUT_GPA : INPUT_GPA + len(data)] = data
    param = SEND_IPI_EX | len(banks) << VAR
    assert call(vcpu, param, INPUT_GPA) == result
    assert arrived(vcpu) == arrives
    vcpu = make()
    vcpu.fpu = FpuRegisters()
    for index, half in enumerate([valid, *banks]):
        vcpu.fpu.xmm[index // 2] |= half << index % 2 * 64
    assert call(vcpu, FAST | param, vector, form) == result
    assert arrived(vcpu) == arrives


def test_too_many_banks():
    vcpu = make()
    vcpu.hooks.phys[0:24] = struct.pack("<IIQQ", 0x41, 0, 0, (1 << 64) - 1)
    assert call(vcpu, SEND_IPI_EX | 64 << VAR) == SUCCESS  # 64 banks of zeros
    assert call(vcpu, SEND_IPI_EX | 65 << VAR) == INPUT
    end = len(vcpu.hooks.phys)
    vcpu.hooks.phys[end - 24 :] = struct.pack("<IIQQ", 0x41, 0, 0, 1)
    assert call(vcpu, SEND_IPI_EX | 1 << VAR, end - 24) == INPUT


# -- MSRs --------------------------------------------------------------------------------------


def test_hypercall_page():
    vcpu = make()
    assert kvm_set_msr(vcpu, HYPERCALL, 0x2001) == 0
    assert vcpu.hooks.phys[0x2000:0x2005] == b"\x0f\x01\xc1\xc3\0"
    assert kvm_get_msr(vcpu, HYPERCALL) == (0, 0x2001)
    assert kvm_set_msr(vcpu, HYPERCALL, 1 << 40 | 1) == 1
    assert kvm_set_msr(vcpu, HYPERCALL, 1 << 40) == 0  # not enabled, so not looked at
    kvm_set_msr(vcpu, HYPERCALL, 0x2001)
    assert kvm_set_msr(vcpu, GUEST_OS_ID, 0) == 0
    assert kvm_get_msr(vcpu, HYPERCALL) == (0, 0x2000)
    assert kvm_set_msr(vcpu, HYPERCALL, 0x3001) == 0  # ignored without a guest OS ID
    assert kvm_get_msr(vcpu, HYPERCALL) == (0, 0x2000)


# fmt: off
MSR_WRITE_CASES = [
    (VP_INDEX,   0,       1, 0),  # MSR, value, result for the guest, for userspace
    (VP_INDEX,   1,       1, 1),
    (RESET,      0,       0, 0),
    (0x40000020, 5,       1, 0),  # reference counter
    (0x40000070, 0,       0, 0),  # EOI
    (0x40000071, 0x41,    0, 0),  # ICR
    (0x40000071, 1 << 13, 1, 1),
    (0x40000072, 0x20,    0, 0),  # TPR
    (0x40000080, 1,       1, 1),  # SCONTROL
    (0x400000B0, 1,       1, 1),  # a synthetic timer
    (0x400000F1, 1,       1, 1),
    (0x400000FF, 4,       1, 0),  # debugger's options, without CPUID
    (0x40000100, 7,       0, 0),
    (0x40000105, 1 << 63, 0, 0),
    (0x40000106, 7,       0, 0),
    (0x40000107, 7,       0, 0),
    (0x40000108, 7,       1, 0),
    (0x40000108, 0,       0, 0),
    (0x40000118, 2,       1, 1),
    (0x40000118, 1,       0, 0),
]
# fmt: on


@pytest.mark.parametrize(("index", "data", "guest", "host"), MSR_WRITE_CASES)
def test_msr_write(index, data, guest, host):
    assert kvm_set_msr(make(), index, data) == guest
    assert kvm_set_msr(make(), index, data, host=True) == host
    assert kvm_set_msr(make_vcpu(knobs={"ignore_msrs": True}), index, data) == 1


def test_msr_effects():
    vcpu = make()
    kvm_set_msr(vcpu, RESET, 1)
    kvm_set_msr(vcpu, 0x40000105, 1 << 63)
    assert vcpu.requests == {"HV_RESET", "HV_CRASH"}
    assert kvm_get_msr(vcpu, 0x40000105) == (0, 0)
    kvm_set_msr(vcpu, 0x40000105, 3 << 62, host=True)
    assert kvm_get_msr(vcpu, 0x40000105) == (0, 1 << 63)
    kvm_set_msr(vcpu, 0x40000118, 1)
    assert kvm_set_msr(vcpu, 0x40000118, 0) == 1  # the guest cannot take it back
    assert kvm_set_msr(vcpu, 0x40000118, 0, host=True) == 0
    kvm_set_msr(vcpu, 0x40000104, 9)
    assert kvm_get_msr(vcpu, 0x40000104) == (0, 9)
    kvm_set_msr(vcpu, 0x40000072, 0x50)
    assert kvm_get_msr(vcpu, 0x40000072) == (0, 0x50)
    assert kvm_get_msr(vcpu, 0x40000070) == (1, 0)
    vcpu.apic = None
    assert kvm_get_msr(vcpu, 0x40000072) == (1, 0)
    assert kvm_set_msr(vcpu, 0x40000072, 0) == 1


def test_debugger_options():
    vcpu = make(kvm=SYNDBG)
    assert kvm_set_msr(vcpu, 0x400000FF, 4) == 0
    assert kvm_get_msr(vcpu, 0x400000FF) == (0, 4)
    assert kvm_get_msr(make(), 0x400000FF) == (1, 0)


@pytest.mark.parametrize("index", [VP_INDEX, RESET, 0x40000020])
def test_msrs_that_read_zero(index):
    assert kvm_get_msr(make(), index) == (0, 0)
    assert kvm_get_msr(make_vcpu(), index) == (1, 0)
    assert kvm_get_msr(make_vcpu(), index, host=True) == (0, 0)


def test_msrs_that_identify():
    vcpu = make()
    assert kvm_get_msr(vcpu, GUEST_OS_ID) == (0, 1)
    kvm_set_msr(vcpu, 0x40000105, 1)  # no notification
    assert vcpu.requests == set()

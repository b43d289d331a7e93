"""Trace events: what may be emitted, and the lines that trace-cmd would print."""

from __future__ import annotations

import ast
from errno import EFAULT, EINTR
from pathlib import Path

import pytest
from support.machines import path_case, unenterable

import emufuzz
from emufuzz.emulator import x86emul
from emufuzz.kvm.mmu.pferr import RET_PF_FIXED, RET_PF_INVALID, RET_PF_SPURIOUS
from emufuzz.kvm.trace import Trace, TraceEvent, _timestamp, format_event, format_trace
from emufuzz.kvm.trace_format import KVM_EXIT_NUMBERS
from emufuzz.kvm.tracepoints import TRACEPOINTS
from emufuzz.subject.kvm import KvmSubject

INSN = bytes.fromhex("f3a4")
EXIT = {
    "exit_reason": 49, "guest_rip": 0xFFFFFFFF81000000, "info1": 0x181, "info2": 0x80000B0E,
    "intr_info": 0x80000B0E, "error_code": 2,
}  # fmt: skip
EXIT_TEXT = (
    "vcpu 3 reason EPT_MISCONFIG rip 0xffffffff81000000 info1 0x0000000000000181 "
    "info2 0x0000000080000b0e intr_info 0x80000b0e error_code 0x00000002"
)
HV_CALL = {
    "code": 0x8002, "fast": True, "var_cnt": 0, "rep_cnt": 1, "rep_idx": 0, "ingpa": 0x1000, "outgpa": 0
}  # fmt: skip
CPUID = {"function": 0x40000000, "index": 0, "rax": 1, "rbx": 0x4B4D564B, "rcx": 2, "rdx": 3}
INSN_EVENT = {"rip": 0x1000, "csbase": 0, "insn": INSN, "mode": x86emul.X86EMUL_MODE_PROT64, "failed": False}
PIO = {"rw": "write", "port": 0x3F8, "size": 1, "count": 1, "val": 0x41}
MMIO = {"type": "read", "len": 4, "gpa": 0xFEE00030, "val": 0x50014}
GP = {"exception": 13, "has_error": True, "error_code": 0x18, "reinjected": False}
MSR = {"write": False, "ecx": 0x1B, "data": 0xFEE00900, "exception": False}
IPI = {"icr_low": 0xC40F1, "dest_id": 1}
ACCEPT = {"apicid": 0, "dm": 0, "tm": 0, "vec": 0x30}
FAST = {
    "cr2_or_gpa": 0x2000, "error_code": 3, "sptep": 0x8010, "old_spte": 0x25, "new_spte": 0x27,
    "ret": RET_PF_FIXED,
}  # fmt: skip

# One event of every tracepoint, of the vCPU 3.
# fmt: off
GOLDEN = [
    ("kvm_entry", {"rip": 0x7C00, "immediate_exit": False}, "vcpu 3, rip 0x7c00"),
    ("kvm_exit", EXIT, EXIT_TEXT),
    ("kvm_nested_vmexit", EXIT, EXIT_TEXT),
    ("kvm_userspace_exit", {"reason": "MMIO", "errno": 0}, "reason KVM_EXIT_MMIO (6)"),
    ("kvm_hypercall", {"nr": 5, "a0": 0, "a1": 0x10, "a2": 2, "a3": 0xFF},
     "nr 0x5 a0 0x0 a1 0x10 a2 0x2 a3 0xff"),
    ("kvm_hv_hypercall", HV_CALL,
     "code 0x8002 fast var_cnt 0x0 rep_cnt 0x1 idx 0x0 in 0x1000 out 0x0"),
    ("kvm_hv_hypercall_done", {"result": 3}, "result 0x3"),
    ("kvm_hv_flush_tlb", {"processor_mask": 1, "address_space": 0, "flags": 2, "guest_mode": False},
     "processor_mask 0x1 address_space 0x0 flags 0x2 "),
    ("kvm_hv_flush_tlb_ex",
     {"valid_bank_mask": 1, "format": 0, "address_space": 0x5000, "flags": 2, "guest_mode": True},
     "valid_bank_mask 0x1 format 0x0 address_space 0x5000 flags 0x2 (L2)"),
    ("kvm_hv_send_ipi", {"vector": 0x41, "processor_mask": 3}, "vector 41 processor_mask 0x3"),
    ("kvm_hv_send_ipi_ex", {"vector": 0x41, "format": 1, "valid_bank_mask": 3},
     "vector 41 format 1 valid_bank_mask 0x3"),
    ("kvm_cpuid", {**CPUID, "found": True, "used_max_basic": False},
     "func 40000000 idx 0 rax 1 rbx 4b4d564b rcx 2 rdx 3, cpuid entry found"),
    ("kvm_msr", MSR, "msr_read 1b = 0xfee00900"),
    ("kvm_cr", {"rw": "write", "cr": 4, "val": 0x406F8}, "cr_write 4 = 0x406f8"),
    ("kvm_ple_window_update", {"new": 8192, "old": 4096}, "vcpu 3 old 4096 new 8192 (growed)"),
    ("kvm_smm_transition", {"smbase": 0x30000, "entering": True},
     "vcpu 3: entering SMM, smbase 0x30000"),
    ("kvm_fpu", {"load": 1}, "load"),
    ("kvm_emulate_insn", INSN_EVENT, "0:1000:f3 a4 (prot64)"),
    ("kvm_pio", PIO, "pio_write at 0x3f8 size 1 count 1 val 0x41 "),
    ("kvm_mmio", MMIO, "mmio read len 4 gpa 0xfee00030 val 0x50014"),
    ("kvm_fast_mmio", {"gpa": 0xFE003000}, "fast mmio at gpa 0xfe003000"),
    ("vcpu_match_mmio", {"gva": 0xFFFF0000, "gpa": 0xFEE000B0, "write": True, "gpa_match": False},
     "gva 0xffff0000 gpa 0xfee000b0 Write GVA"),
    ("kvm_inj_virq", {"vector": 0x30, "soft": False, "reinjected": False}, "IRQ 0x30"),
    ("kvm_inj_exception", GP, "#GP (0x18)"),
    ("kvm_apic", {"rw": "write", "reg": 0xB0, "val": 0}, "apic_write APIC_EOI = 0x0"),
    ("kvm_apic_ipi", IPI, "dst 1 vec 241 (Fixed|physical|assert|edge|all-but-self)"),
    ("kvm_apic_accept_irq", ACCEPT, "apicid 0 vec 48 (Fixed|edge)"),
    ("kvm_apicv_accept_irq", {**ACCEPT, "dm": 0x100, "tm": 1}, "apicid 0 vec 48 (LowPrio|level)"),
    ("kvm_eoi", {"apicid": 10, "vector": -1}, "apicid a vector -1"),
    ("kvm_pv_eoi", {"apicid": 0, "vector": 0x31}, "apicid 0 vector 49"),
    ("kvm_page_fault", {"guest_rip": 0x1000, "fault_address": 0xFEB00000, "error_code": 0x182},
     "vcpu 3 rip 0x1000 address 0x00000000feb00000 error_code 0x182"),
    ("kvm_mmu_pagetable_walk", {"addr": 0x401000, "pferr": 6}, "addr 401000 pferr 6 W|U"),
    ("kvm_mmu_paging_element", {"pte": 0x2067, "level": 4}, "pte 2067 level 4"),
    ("kvm_mmu_set_accessed_bit", {"gpa": 0x2008}, "gpa 2008"),
    ("kvm_mmu_set_dirty_bit", {"gpa": 0x5010}, "gpa 5010"),
    ("kvm_mmu_walker_error", {"pferr": 0x1B}, "pferr 1b P|W|RSVD|F"),
    ("mark_mmio_spte", {"sptep": 0x8010, "gfn": 0xFEB00, "access": 7, "gen": 0x1A},
     "sptep:0x8010 gfn feb00 access 7 gen 1a"),
    ("check_mmio_spte", {"spte": 0x8DAB00600, "kvm_gen": 0x1A, "spte_gen": 0x1A},
     "spte 8dab00600 kvm_gen 1a spte-gen 1a valid 1"),
    ("handle_mmio_page_fault", {"addr": 0xFEB00010, "gfn": 0xFEB00, "access": 7},
     "addr:feb00010 gfn feb00 access 7"),
    ("fast_page_fault", FAST,
     "vcpu 3 gva 2000 error_code P|W sptep 0x8010 old 0x25 new 27 spurious 0 fixed 1"),
]
# What the same tracepoints say of other values.
VARIANTS = [
    ("kvm_entry", {"rip": 0, "immediate_exit": True}, "vcpu 3, rip 0x0[immediate exit]"),
    ("kvm_hv_hypercall", {**HV_CALL, "fast": False},
     "code 0x8002 slow var_cnt 0x0 rep_cnt 0x1 idx 0x0 in 0x1000 out 0x0"),
    ("kvm_cpuid", {**CPUID, "found": False, "used_max_basic": True},
     "func 40000000 idx 0 rax 1 rbx 4b4d564b rcx 2 rdx 3, cpuid entry not found, used max basic"),
    ("kvm_msr", {**MSR, "write": True, "exception": True}, "msr_write 1b = 0xfee00900 (#GP)"),
    ("kvm_cr", {"rw": "read", "cr": 8, "val": 0}, "cr_read 8 = 0x0"),
    ("kvm_ple_window_update", {"new": 1, "old": 2}, "vcpu 3 old 2 new 1 (shrinked)"),
    ("kvm_smm_transition", {"smbase": 0, "entering": False}, "vcpu 3: leaving SMM, smbase 0x0"),
    ("kvm_fpu", {"load": 0}, "unload"),
    ("kvm_emulate_insn", {**INSN_EVENT, "csbase": 0xF0000, "mode": x86emul.X86EMUL_MODE_REAL,
                          "failed": True}, "f0000:1000:f3 a4 (real) failed"),
    ("kvm_emulate_insn", {**INSN_EVENT, "mode": x86emul.X86EMUL_MODE_VM86}, "0:1000:f3 a4 (0x2)"),
    ("kvm_emulate_insn", {**INSN_EVENT, "mode": x86emul.X86EMUL_MODE_PROT16}, "0:1000:f3 a4 (prot16)"),
    ("kvm_emulate_insn", {**INSN_EVENT, "mode": x86emul.X86EMUL_MODE_PROT32, "insn": b"\x90"},
     "0:1000:90 (prot32)"),
    ("kvm_pio", {**PIO, "rw": "read", "count": 3}, "pio_read at 0x3f8 size 1 count 3 val 0x41 (...)"),
    ("kvm_mmio", {**MMIO, "type": "unsatisfied-read", "val": 0},
     "mmio unsatisfied-read len 4 gpa 0xfee00030 val 0x0"),
    ("kvm_mmio", {**MMIO, "type": "write"}, "mmio write len 4 gpa 0xfee00030 val 0x50014"),
    ("vcpu_match_mmio", {"gva": 0, "gpa": 0x10, "write": False, "gpa_match": True},
     "gva 0x0 gpa 0x10 Read GPA"),
    ("kvm_inj_virq", {"vector": 0x80, "soft": True, "reinjected": True}, "Soft/INTn 0x80 [reinjected]"),
    ("kvm_inj_exception", {"exception": 6, "has_error": False, "error_code": 0, "reinjected": True},
     "#UD [reinjected]"),
    ("kvm_inj_exception", {**GP, "exception": 21}, "0x15 (0x18)"),
    ("kvm_apic", {"rw": "read", "reg": 0x110, "val": 1}, "apic_read 0x110 = 0x1"),
    ("kvm_apic_ipi", {"icr_low": 0x8D00, "dest_id": 0xFF}, "dst ff vec 0 (INIT|logical|de-assert|level|dst)"),
    ("kvm_mmu_pagetable_walk", {"addr": 0, "pferr": 0}, "addr 0 pferr 0 "),
    ("kvm_mmu_walker_error", {"pferr": 0x25}, "pferr 25 P|U|0x20"),
    ("check_mmio_spte", {"spte": 1, "kvm_gen": 2, "spte_gen": 1}, "spte 1 kvm_gen 2 spte-gen 1 valid 0"),
    ("fast_page_fault", {**FAST, "ret": RET_PF_SPURIOUS, "error_code": 0x100000002},
     "vcpu 3 gva 2000 error_code W|0x100000000 sptep 0x8010 old 0x25 new 27 spurious 1 fixed 0"),
    ("fast_page_fault", {**FAST, "ret": RET_PF_INVALID},
     "vcpu 3 gva 2000 error_code P|W sptep 0x8010 old 0x25 new 27 spurious 0 fixed 0"),
]
# fmt: on


def emitted(name, fields):
    trace = Trace()
    trace.emit(name, **fields)
    (event,) = trace.events
    return event


def test_golden_lines_cover_every_tracepoint():
    assert sorted(name for name, _, _ in GOLDEN) == sorted(TRACEPOINTS)


@pytest.mark.parametrize(("name", "fields", "text"), GOLDEN + VARIANTS)
def test_text(name, fields, text):
    assert format_event(emitted(name, fields), vcpu_id=3) == f"{name}: {text}"


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (10, "CPUID"),
        (17, "0x11"),
        (0xFFFF, "0xffff"),
        (1 << 31 | 33, "INVALID_STATE FAILED_VMENTRY"),
        (1 << 26 | 30, "IO_INSTRUCTION 0x4000000"),
        (1 << 31 | 1 << 27 | 34, "MSR_LOAD_FAIL FAILED_VMENTRY 0x8000000"),
    ],
)
def test_exit_reason(reason, text):
    assert f" reason {text} rip " in format_event(emitted("kvm_exit", {**EXIT, "exit_reason": reason}))


@pytest.mark.parametrize(
    ("reason", "errno", "text"),
    [
        ("UNKNOWN", 0, "KVM_EXIT_UNKNOWN (0)"),
        ("X86_WRMSR", 0, "KVM_EXIT_X86_WRMSR (30)"),
        ("X86_BUS_LOCK", 0, "0x21 (33)"),
        ("INTR", -EINTR, "restart (4)"),
        ("UNKNOWN", -EFAULT, "error (14)"),
    ],
)
def test_userspace_exit(reason, errno, text):
    event = emitted("kvm_userspace_exit", {"reason": reason, "errno": errno})
    assert format_event(event) == f"kvm_userspace_exit: reason {text}"


def test_numbers_of_userspace_exits_are_unique():
    assert len(set(KVM_EXIT_NUMBERS.values())) == len(KVM_EXIT_NUMBERS)


def emit_calls():
    """Every `x.emit("name", field=...)` with a literal name in the package: place, name, fields."""
    for path in Path(emufuzz.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if ".emit(" in text else ():
            match node:
                case ast.Call(ast.Attribute(attr="emit"), [ast.Constant(name)], keywords):
                    yield f"{path.name}:{node.lineno}: {name}", name, {item.arg for item in keywords}


def exit_names():
    """The text of every constant KVM_EXIT_* in the package but the kinds of KVM_EXIT_HYPERV."""
    for path in Path(emufuzz.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.AnnAssign(ast.Name(name), value=ast.Constant(str(text))):
                    if name.startswith("KVM_EXIT_") and not name.startswith("KVM_EXIT_HYPERV_"):
                        yield text


def test_every_exit_to_userspace_has_a_number():
    """But the one that is not KVM's: L1 would run."""
    names = set(exit_names())
    assert {"MMIO", "SHUTDOWN", "NESTED_VMEXIT"} <= names
    assert names - KVM_EXIT_NUMBERS.keys() == {"NESTED_VMEXIT"}


def test_an_exit_to_l1_is_none_to_userspace():
    subject = KvmSubject(trace=True)
    case = path_case("invalid-guest-state", "prot32", "90", kvm={"guest_mode": True}, **unenterable())
    (outcome,) = subject.run([case])
    assert outcome.extra["exits"][0]["reason"] == "NESTED_VMEXIT"
    assert "kvm_userspace_exit" not in format_trace(subject.trace.events)


def test_the_package_emits_what_is_declared():
    wrong = [
        place
        for place, name, fields in emit_calls()
        if name not in TRACEPOINTS or fields != TRACEPOINTS[name].fields.keys()
    ]
    assert wrong == []


def test_events_are_kept_in_order_with_raw_fields():
    trace = Trace()
    trace.emit("kvm_fpu", load=1)
    trace.emit("kvm_fast_mmio", gpa=0x1000)
    assert trace.events == [TraceEvent("kvm_fpu", {"load": 1}), TraceEvent("kvm_fast_mmio", {"gpa": 0x1000})]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("kvm_invlpga", {}, "kvm_invlpga: not a tracepoint"),
        ("kvm_cr", {"rw": "read", "cr": 0}, "kvm_cr: fields rw, cr; declared rw, cr, val"),
        ("kvm_fpu", {"load": 1, "cpu": 0}, "kvm_fpu: fields load, cpu; declared load"),
        ("kvm_fast_mmio", {"addr": 0}, "kvm_fast_mmio: fields addr; declared gpa"),
    ],
)
def test_undeclared_events_are_refused(name, fields, message):
    trace = Trace()
    with pytest.raises(KeyError) as caught:
        trace.emit(name, **fields)
    assert caught.value.args == (message,)
    assert trace.events == []


@pytest.mark.parametrize(
    ("name", "fields"), [("kvm_pio", {**PIO, "rw": "in"}), ("kvm_mmio", {**MMIO, "type": 1})]
)
def test_words_are_checked(name, fields):
    with pytest.raises(ValueError, match=r"not one of .*read"):
        format_event(emitted(name, fields))


def test_format_trace_aligns_like_trace_cmd():
    trace = Trace()
    trace.emit("kvm_entry", rip=0x7C00, immediate_exit=False)
    trace.emit("kvm_fast_mmio", gpa=0x1000)
    trace.emit("kvm_cr", rw="read", cr=8, val=0)
    trace.emit("kvm_mmu_set_accessed_bit", gpa=0x2008)
    assert format_trace(trace.events) == [
        "         emufuzz-0     [000]     0.000001: kvm_entry:            vcpu 0, rip 0x7c00",
        "         emufuzz-0     [000]     0.000002: kvm_fast_mmio:        fast mmio at gpa 0x1000",
        "         emufuzz-0     [000]     0.000003: kvm_cr:               cr_read 8 = 0x0",
        "         emufuzz-0     [000]     0.000004: kvm_mmu_set_accessed_bit: gpa 2008",
    ]


def test_format_trace_of_another_vcpu_and_task():
    (line,) = format_trace([emitted("kvm_exit", EXIT)], vcpu_id=3, pid=12345, task="qemu")
    assert line == f"            qemu-12345 [003]     0.000001: kvm_exit:             {EXIT_TEXT}"


@pytest.mark.parametrize(
    ("step", "text"), [(1, "    0.000001"), (999_999, "    0.999999"), (1_000_000, "    1.000000")]
)
def test_steps_carry_into_seconds(step, text):
    assert _timestamp(step) == text


def test_trailing_space_is_for_the_text_only():
    event = emitted("kvm_pio", PIO)
    assert format_event(event).endswith("val 0x41 ")
    assert format_trace([event])[0].endswith("val 0x41")


def test_empty_trace_has_no_lines():
    assert format_trace(Trace().events) == []

"""VM-exit reasons against the numbers and names of SDM Vol. 3D Appendix C."""

from __future__ import annotations

import pytest

from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm import interruptibility

NUMBERS = {
    name.removeprefix("EXIT_REASON_"): value
    for name, value in vars(er).items()
    if name.startswith("EXIT_REASON_") and isinstance(value, int)
}
# Appendix C has no reason with these numbers below 76, or calls them reserved.
ABSENT = {35, 38, 42, 71}


def test_every_basic_reason_has_one_constant():
    assert sorted(NUMBERS.values()) == [number for number in range(76) if number not in ABSENT]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("EXCEPTION_NMI", 0), ("TRIPLE_FAULT", 2), ("INTERRUPT_WINDOW", 7), ("TASK_SWITCH", 9),
        ("CPUID", 10), ("HLT", 12), ("INVLPG", 14), ("RDTSC", 16), ("VMCALL", 18), ("VMON", 27),
        ("CR_ACCESS", 28), ("IO_INSTRUCTION", 30), ("MSR_WRITE", 32), ("INVALID_STATE", 33),
        ("MWAIT_INSTRUCTION", 36), ("PAUSE_INSTRUCTION", 40), ("TPR_BELOW_THRESHOLD", 43),
        ("APIC_ACCESS", 44), ("GDTR_IDTR", 46), ("EPT_VIOLATION", 48), ("EPT_MISCONFIG", 49),
        ("PREEMPTION_TIMER", 52), ("XSETBV", 55), ("APIC_WRITE", 56), ("INVPCID", 58), ("PML_FULL", 62),
        ("XRSTORS", 64), ("UMWAIT", 67), ("BUS_LOCK", 74), ("NOTIFY", 75),
    ],
)  # fmt: skip
def test_numbers_and_printed_names(name, number):
    assert NUMBERS[name] == number
    assert er.EXIT_REASON_NAMES[number] == name


def test_kvm_prints_no_name_for_exits_it_never_takes():
    unnamed = set(NUMBERS.values()) - er.EXIT_REASON_NAMES.keys()
    assert unnamed == {5, 6, 11, 17, 65, 66, 69, 70, 72, 73}
    assert list(er.EXIT_REASON_NAMES) == sorted(er.EXIT_REASON_NAMES)


def test_flags_lie_above_the_basic_reason():
    bits = (
        er.VMX_EXIT_REASONS_BUS_LOCK_DETECTED,
        er.VMX_EXIT_REASONS_ENCLAVE_MODE,
        er.VMX_EXIT_REASONS_FAILED_VMENTRY,
    )
    assert [bit.bit_length() - 1 for bit in bits] == [26, 27, 31]
    assert er.VMX_EXIT_REASONS_BASIC_MASK == 0xFFFF


def test_users_share_the_constants():
    assert interruptibility.EXIT_REASON_EPT_MISCONFIG is er.EXIT_REASON_EPT_MISCONFIG

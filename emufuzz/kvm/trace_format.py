"""How fields of KVM's tracepoints are printed: numbers, symbols, flags, and texts of several fields.

The texts are those of the kernel's own formats in Linux 6.12 (arch/x86/kvm/trace.h, mmu/mmutrace.h,
include/trace/events/kvm.h). A value that has no name is printed as a hexadecimal number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from errno import EINTR
from typing import Any, Final, TypeAlias

from emufuzz.arch.exceptions import EXCEPTION_NAMES, NMI_VECTOR, XM_VECTOR
from emufuzz.emulator.x86emul import (
    X86EMUL_MODE_PROT16,
    X86EMUL_MODE_PROT32,
    X86EMUL_MODE_PROT64,
    X86EMUL_MODE_REAL,
    X86EMUL_MODE_VM86,
)
from emufuzz.kvm.exit_reasons import (
    EXIT_REASON_NAMES,
    VMX_EXIT_REASONS_BASIC_MASK,
    VMX_EXIT_REASONS_FAILED_VMENTRY,
)
from emufuzz.kvm.mmu.pferr import (
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    RET_PF_FIXED,
    RET_PF_SPURIOUS,
)

Fields: TypeAlias = Mapping[str, Any]
Printer: TypeAlias = Callable[[Any], str]

# The KVM API's numbers (KVM_EXIT_*) of the reasons for leaving to userspace.
KVM_EXIT_NUMBERS: Final = {
    "UNKNOWN": 0, "EXCEPTION": 1, "IO": 2, "HYPERCALL": 3, "DEBUG": 4, "HLT": 5, "MMIO": 6,
    "IRQ_WINDOW_OPEN": 7, "SHUTDOWN": 8, "FAIL_ENTRY": 9, "INTR": 10, "SET_TPR": 11, "TPR_ACCESS": 12,
    "NMI": 16, "INTERNAL_ERROR": 17, "SYSTEM_EVENT": 24, "IOAPIC_EOI": 26, "HYPERV": 27,
    "X86_RDMSR": 29, "X86_WRMSR": 30, "DIRTY_RING_FULL": 31, "AP_RESET_HOLD": 32, "X86_BUS_LOCK": 33,
    "XEN": 34, "NOTIFY": 37, "MEMORY_FAULT": 39,
}  # fmt: skip
_LAST_NAMED_EXIT: Final = 30  # later reasons were not added to the tracepoint

_DELIVERY_MODES: Final = ("Fixed", "LowPrio", "SMI", "Res3", "NMI", "INIT", "SIPI", "ExtINT")
_SHORTHANDS: Final = ("dst", "self", "all", "all-but-self")
# fmt: off
_APIC_REGISTERS: Final = {
    0x020: "ID",       0x030: "LVR",    0x080: "TASKPRI", 0x090: "ARBPRI", 0x0A0: "PROCPRI",
    0x0B0: "EOI",      0x0C0: "RRR",    0x0D0: "LDR",     0x0E0: "DFR",    0x0F0: "SPIV",
    0x100: "ISR",      0x180: "TMR",    0x200: "IRR",     0x280: "ESR",    0x300: "ICR",
    0x310: "ICR2",     0x320: "LVTT",   0x330: "LVTTHMR", 0x340: "LVTPC",  0x350: "LVT0",
    0x360: "LVT1",     0x370: "LVTERR", 0x380: "TMICT",   0x390: "TMCCT",  0x3E0: "TDCR",
    0x3F0: "SELF_IPI", 0x400: "EFEAT",  0x410: "ECTRL",
}
# fmt: on
_PFERR_FLAGS: Final = {
    PFERR_PRESENT_MASK: "P",
    PFERR_WRITE_MASK: "W",
    PFERR_USER_MASK: "U",
    PFERR_RSVD_MASK: "RSVD",
    PFERR_FETCH_MASK: "F",
}
_EXIT_FLAGS: Final = {VMX_EXIT_REASONS_FAILED_VMENTRY: "FAILED_VMENTRY"}


def number(spec: str) -> Printer:
    """A number in the notation `spec`, as for the built-in format."""
    return lambda value: format(value, spec)


def choice(true: str, false: str = "") -> Printer:
    """One text for a value that is not 0, another for 0."""
    return lambda value: true if value else false


def word(*words: str) -> Printer:
    """A field that holds one of `words`; anything else is a ValueError."""

    def show(value: str) -> str:
        if value not in words:
            raise ValueError(f"{value!r}: not one of {', '.join(words)}")
        return value

    return show


def symbol(names: Mapping[int, str]) -> Printer:
    """The name of a number."""
    return lambda value: names.get(value) or f"{value:#x}"


def flags(value: int, names: Mapping[int, str], delimiter: str) -> str:
    """The names of the bits that are set, in the table's order, then the other bits as one number."""
    items = [name for bit, name in names.items() if value & bit]
    rest = value & ~sum(names)
    return delimiter.join([*items, f"{rest:#x}"] if rest else items)


DEC: Final = number("d")
HEX: Final = number("x")
HEX0X: Final = number("#x")
HEX0X_8: Final = number("#010x")  # eight digits
HEX0X_16: Final = number("#018x")
READ_WRITE: Final = word("read", "write")
MMIO_TYPE: Final = word("unsatisfied-read", "read", "write")
EXCEPTION: Final = symbol(
    {vector: name for vector, name in EXCEPTION_NAMES.items() if vector not in {NMI_VECTOR, XM_VECTOR}}
)
APIC_REGISTER: Final = symbol({offset: f"APIC_{name}" for offset, name in _APIC_REGISTERS.items()})
# The tracepoint names CR0.PE with EFLAGS.VM "vm16", but what it records for virtual-8086 mode is
# EFLAGS.VM alone: KVM prints that as a number.
EMUL_MODE: Final = symbol(
    {
        X86EMUL_MODE_REAL: "real",
        X86EMUL_MODE_VM86: "0x2",
        X86EMUL_MODE_PROT16: "prot16",
        X86EMUL_MODE_PROT32: "prot32",
        X86EMUL_MODE_PROT64: "prot64",
    }
)
_BASIC_EXIT_REASON: Final = symbol(EXIT_REASON_NAMES)


def hex_bytes(value: bytes) -> str:
    """Bytes as two digits each, with spaces between them."""
    return value.hex(" ")


def pferr(value: int) -> str:
    """A page-fault error code in letters; bits above F together as a number."""
    return flags(value, _PFERR_FLAGS, "|")


def pferr_and_flags(fields: Fields) -> str:
    """A page-fault error code as a number and in letters."""
    return f"{fields['pferr']:x} {pferr(fields['pferr'])}"


def exit_reason(value: int) -> str:
    """A full exit reason: the basic one, then the bits above it."""
    basic = _BASIC_EXIT_REASON(value & VMX_EXIT_REASONS_BASIC_MASK)
    modifiers = flags(value & ~VMX_EXIT_REASONS_BASIC_MASK, _EXIT_FLAGS, " ")
    return f"{basic} {modifiers}" if modifiers else basic


def delivery_mode(value: int) -> str:
    """The delivery mode in bits 10:8 of an interrupt command."""
    return _DELIVERY_MODES[value >> 8 & 7]


def ipi(fields: Fields) -> str:
    """What the low half of an interrupt command asks for (SDM Vol. 3A 11.6.1)."""
    icr = fields["icr_low"]
    words = (
        delivery_mode(icr),
        "logical" if icr & 1 << 11 else "physical",
        "assert" if icr & 1 << 14 else "de-assert",
        "level" if icr & 1 << 15 else "edge",
        _SHORTHANDS[icr >> 18 & 3],
    )
    return f"vec {icr & 0xFF} ({'|'.join(words)})"


def error_code(fields: Fields) -> str:
    """The error code of an exception that has one, in parentheses."""
    return f" ({fields['error_code']:#x})" if fields["has_error"] else ""


def userspace_exit(fields: Fields) -> str:
    """Why KVM_RUN returned: the name of KvmRun.exit_reason, or a negative errno."""
    errno: int = fields["errno"]
    if errno < 0:
        return f"{'restart' if errno == -EINTR else 'error'} ({-errno})"
    reason: str = fields["reason"]
    value = KVM_EXIT_NUMBERS[reason]
    return f"{f'KVM_EXIT_{reason}' if value <= _LAST_NAMED_EXIT else f'{value:#x}'} ({value})"


def fault_result(fields: Fields) -> str:
    """What became of a fault that was to be fixed without the MMU lock: a RET_PF_*."""
    result = fields["ret"]
    return f"spurious {result == RET_PF_SPURIOUS:d} fixed {result == RET_PF_FIXED:d}"


def window_change(fields: Fields) -> str:
    """The direction in which the PLE window went; the spelling is KVM's."""
    return "growed" if fields["old"] < fields["new"] else "shrinked"


def generation_valid(fields: Fields) -> str:
    """1 if an MMIO SPTE is of the memslots' generation."""
    return f"{fields['kvm_gen'] == fields['spte_gen']:d}"


def repeated(fields: Fields) -> str:
    """The mark of string I/O: only the first of its values is in the event."""
    return "(...)" if fields["count"] > 1 else ""

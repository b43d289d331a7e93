"""Every field of the exchange format, declared once: range, size, default form (docs/case-format.md).

The readers, the writers and the JSON Schema are derived from these declarations.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.modes import MODES
from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES
from emufuzz.case.events import EVENT
from emufuzz.case.paths import PATHS
from emufuzz.case.spec import (
    Anything,
    Choice,
    Flag,
    Hex,
    ListOf,
    MapOf,
    Named,
    Nullable,
    Number,
    Object,
    Spec,
    Text,
)

MAX_CODE: Final = 4096  # bytes of `code`
MAX_MEMORY: Final = 16 << 20  # bytes of all pages of a case, and of any one piece of data
MAX_ENTRIES: Final = 65536  # entries of `mem`
MAX_PORT_IN: Final = 1 << 20  # bytes
MAX_DOCUMENT: Final = 64 << 20  # bytes of one JSON document
MAX_COUNT: Final = 0xFFFF  # instructions
MAX_DEVICES: Final = 256
MAX_ACCESS: Final = 8  # bytes of one access to a device

U64: Final = Number(2**64 - 1)
U32: Final = Number(2**32 - 1)
U16: Final = Number(0xFFFF)
U8: Final = Number(0xFF)
SMALL: Final = Number(2**32 - 1, hex=False)


def bits(width: int) -> Number:
    """A small bit field, written as a JSON integer."""
    return Number((1 << width) - 1, hex=False)


# fmt: off
SEGMENT_FIELDS: Final[dict[str, Spec]] = {
    "sel":   U16,
    "base":  U64,
    "limit": U32,
    "type":  bits(4),
    "s":     bits(1),
    "dpl":   bits(2),
    "p":     bits(1),
    "avl":   bits(1),
    "l":     bits(1),
    "db":    bits(1),
    "g":     bits(1),
}
FPU_CONTROL: Final[dict[str, Spec]] = {
    "fcw":   U16,
    "fsw":   U16,
    "ftw":   U8,
    "mxcsr": U32,
}
XMM: Final = Number(2**128 - 1)
MM:  Final = U64

CONTROL_REGISTERS: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "xcr0")
DR_NAMES: Final = tuple(f"dr{i}" for i in range(8))

TABLE_REGISTER: Final = Object({"base": U64, "limit": U16})
SEG:  Final = Object(dict.fromkeys(SREG_NAMES, Object(SEGMENT_FIELDS)))
GPR:  Final = Object(dict.fromkeys(GPR_NAMES, U64))
DR:   Final = Object(dict.fromkeys(DR_NAMES, U64))
MSR:  Final = MapOf(U64, max_key=2**32 - 1)
FPU:  Final = Object({**FPU_CONTROL, "xmm": ListOf(XMM, 16), "mm": ListOf(MM, 8)})
FPU_DELTA: Final = Object({
    **FPU_CONTROL,
    "xmm": MapOf(XMM, max_key=15, hex=False),
    "mm":  MapOf(MM, max_key=7, hex=False),
})

#: State after or before an instruction, shared by Case, Outcome and the vectors' delta.
STATE: Final[dict[str, Spec]] = {
    "gpr":    GPR,
    "rip":    U64,
    "rflags": U64,
    "seg":    SEG,
    "gdtr":   TABLE_REGISTER,
    "idtr":   TABLE_REGISTER,
    **dict.fromkeys(CONTROL_REGISTERS, U64),
    "dr":     DR,
    "msr":    MSR,
}

MEMORY_ENTRY: Final = Object({"addr": U64, "data": Hex(MAX_MEMORY)}, required=("addr",))
MEMORY: Final = ListOf(MEMORY_ENTRY, MAX_ENTRIES)

DEVICE: Final = Object({
    "kind":      Text(("mmio", "pio")),
    "addr":      U64,
    "port":      U16,
    "size":      Number(MAX_MEMORY, min=1, hex=False),
    "reads":     Hex(MAX_PORT_IN),
    "behaviour": Text(("stream", "ram", "float")),
}, required=("kind", "size"))
DEVICES: Final = ListOf(DEVICE, MAX_DEVICES)

#: One access to a device, in an outcome's `device_trace`.
DEVICE_ACCESS: Final = Object({
    "kind":      Text(("mmio", "pio")),
    "addr":      U64,
    "port":      bits(16),
    "size":      Number(MAX_ACCESS, min=1, hex=False),
    "direction": Text(("read", "write")),
    "data":      Hex(MAX_ACCESS),
}, required=("kind", "size", "direction", "data"))
DEVICE_TRACE: Final = ListOf(DEVICE_ACCESS, 1 << 20)

FAULT: Final = Object({
    "vector":     bits(8),
    "error_code": Nullable(SMALL),
    "address":    Nullable(U64),
}, required=("vector",))

CALLBACK: Final = Object({
    "op":     Text(max_length=64),
    "nth":    SMALL,
    "result": Choice({str: Text(max_length=64), int: SMALL}),
    "fault":  Nullable(FAULT),
}, required=("op",))

MEMSLOT: Final = Object({"base": U64, "size": U64, "flags": U32}, required=("base", "size"))

#: KVM_MEM_LOG_DIRTY_PAGES and KVM_MEM_READONLY; without private memory there are no others.
MEMSLOT_FLAGS: Final = 3
#: Bytes that a write must have for an ioeventfd; 0 = any number.
EVENTFD_LENGTHS: Final = (0, 1, 2, 4, 8)

#: An exception that KVM has to deliver; the payload is what it puts into CR2 or DR6 then.
INJECTED: Final = Object({
    "vector":     bits(8),
    "error_code": Nullable(SMALL),
    "payload":    Nullable(U64),
}, required=("vector",))
PENDING: Final = Object({
    **INJECTED.fields,
    "vector":   bits(5),
    "injected": Flag(),
    "nested":   Flag(),
}, required=("vector",))
INTERRUPT: Final = Object({"vector": bits(8), "soft": Flag()}, required=("vector",))
GUEST_DEBUG: Final = Object({"control": U32, "dr": ListOf(U64, 8)}, required=("control",))

CPUID_LEAF: Final = Object(
    dict.fromkeys(("function", "index", "eax", "ebx", "ecx", "edx"), U32), required=("function",)
)
CPUID: Final = Object({
    "leaves":     ListOf(CPUID_LEAF, 256),
    "features":   Named(Flag()),
    "maxphyaddr": Number(52, min=32, hex=False),
})

#: What L1 intercepts while L2 runs.
GUEST_MODE: Final = Object({
    "exception_bitmap":            U32,
    "page_fault_error_code_mask":  U32,
    "page_fault_error_code_match": U32,
    "exit_on_nmi":                 Flag(),
    "exit_on_intr":                Flag(),
    "mtf":                         Flag(),
    "intercepts":                  ListOf(Text(max_length=64), 256),
})

IOEVENTFD: Final = Object({
    "addr":      U64,
    "len":       Number(8, hex=False),
    "port":      Flag(),
    "datamatch": U64,
}, required=("addr",))

#: Text is a list, also if it looks like a number: numbers have one form only.
KNOB: Final = Choice({bool: Flag(), int: Number(2**64 - 1, hex=False), str: Text(max_length=1024)})

#: The machine around the emulator; names of knobs, features and intercepts are the KVM model's.
KVM: Final = Object({
    "knobs":                  Named(KNOB),
    "exit_reason":            bits(16),
    "exit_qualification":     U64,
    "guest_physical_address": U64,
    "instruction_info":       U32,
    "instruction_length":     Number(15, hex=False),
    "vectoring_info":         U32,
    "vectoring_error_code":   U32,
    "interruptibility":       U32,
    "pending":                PENDING,
    "interrupt":              INTERRUPT,
    "nmi":                    Number(2, hex=False),
    "pkru":                   U32,
    "guest_debug":            Choice({int: U32, str: U32, dict: GUEST_DEBUG}),
    "cpuid":                  CPUID,
    "memslots":               ListOf(MEMSLOT, 4096),
    "ioeventfds":             ListOf(IOEVENTFD, 256),
    "lapic":                  MapOf(U32, max_key=0xFFF),
    "guest_mode":             Choice({bool: Flag(), int: Flag(), dict: GUEST_MODE}),
    "smm":                    Flag(),
})

#: Fields of a case that an engine may not know; kept as they were given, but `kvm` as it was read.
EXTRA: Final[dict[str, Spec]] = {
    "phys":      MEMORY,
    "devices":   DEVICES,
    "kvm":       KVM,
    "callbacks": ListOf(CALLBACK, 4096),
}

CASE: Final = Object({
    "id":        Text(),
    "mode":      Text(MODES),
    "code":      Hex(MAX_CODE),
    **STATE,
    "count":     Number(MAX_COUNT, min=1, hex=False),
    "fpu":       FPU,
    "mem":       MEMORY,
    "port_in":   Hex(MAX_PORT_IN),
    "vendor":    Text(("intel", "amd")),
    "emul_type": SMALL,
    "path":      Nullable(Text(PATHS)),
    "single":    bits(1),
    **EXTRA,
}, required=("code",))

#: How an emulation ends (KVM: X86EMUL_*).
RESULTS: Final = (
    "continue", "propagate_fault", "unhandleable", "retry_instr",
    "cmpxchg_failed", "io_needed", "intercepted",
)
UNCHECKED: Final = Object({"field": Text(max_length=64), "gap": Text(max_length=128)},
                          required=("field", "gap"))

RESULT: Final[dict[str, Spec]] = {
    "decode_rc":        Text(("ok", "failed")),
    "rc":               Text(RESULTS),
    "length":           Nullable(Number(15, hex=False)),
    "exception":        Nullable(FAULT),
    "interruptibility": Number(3, hex=False),
    "restarts":         SMALL,
    "mem":              MEMORY,
    "events":           ListOf(EVENT, 1 << 20),
}

#: KVM_RUN returned to userspace: KVM_EXIT_* without its prefix, and what else it left in kvm_run.
KVM_EXIT: Final = Object({"reason": Text(max_length=64)}, required=("reason",), others=Anything())

#: Fields of an outcome that only the KVM model and its exit paths write; kept as they were read.
OUTCOME_EXTRA: Final[dict[str, Spec]] = {
    "exits":            ListOf(KVM_EXIT, 65536),
    "device_trace":     DEVICE_TRACE,
    "injected":         ListOf(INJECTED, 65536),
    "interrupt_shadow": Number(3, hex=False),
    "livelock":         Flag(),
    "no_exit":          Text(max_length=256),
}

OUTCOME: Final = Object({
    "id":        Text(),
    **RESULT,
    **STATE,
    "fpu":       FPU,
    "unchecked": ListOf(UNCHECKED, 256),
    "crash":     Text(max_length=65536, multiline=True),
    "hang":      Flag(),
    **OUTCOME_EXTRA,
})

#: `expect` of a recorded vector: what the instruction changed.
DELTA: Final = Object({**RESULT, **STATE, "fpu": FPU_DELTA})
# fmt: on

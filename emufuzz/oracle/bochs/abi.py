"""The C interface that the extension module of bochscpu-python 0.3.1 exports, through ctypes.

The module's Python classes are slower and show stale flags; its C functions and those of Bochs
itself (a C++ library of one static CPU) are exported, too. Only the child process loads this.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any, Final

from emufuzz.arch.regs import GPR_NAMES
from emufuzz.oracle.base import OracleUnavailableError

_U8, _U16, _U32, _U64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
_POINTER: Final = ctypes.c_void_p

MODULE: Final = "bochscpu._bochscpu"


class SegmentState(ctypes.Structure):
    """A segment register; `attr` is the access-rights word, with AVL, L, D and G in bits 12 to 15."""

    _fields_ = (("valid", ctypes.c_bool), ("sel", _U16), ("base", _U64), ("limit", _U32), ("attr", _U16))


class TableState(ctypes.Structure):
    """GDTR or IDTR."""

    _fields_ = (("base", _U64), ("limit", _U16))


class X87State(ctypes.Structure):
    """A register of the x87 FPU."""

    _fields_ = (("fraction", _U64), ("exponent", _U16))


def _quads(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, _U64) for name in names)


class CpuState(ctypes.Structure):
    """All of the CPU that `bochscpu_cpu_set_state` loads and `bochscpu_cpu_state` saves."""

    _fields_ = (
        *_quads("seed", *GPR_NAMES, "rip", "rflags"),
        *((name, SegmentState) for name in ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")),
        ("gdtr", TableState),
        ("idtr", TableState),
        ("cr0", _U32),
        *_quads("cr2", "cr3"),
        ("cr4", _U32),
        *_quads("cr8", "dr0", "dr1", "dr2", "dr3"),
        *((name, _U32) for name in ("dr6", "dr7", "xcr0")),
        ("zmm", _U64 * 8 * 32),
        *((name, _U16) for name in ("fpcw", "fpsw", "fptw", "fpop")),
        ("fpst", X87State * 8),
        *((name, _U32) for name in ("mxcsr", "mxcsr_mask")),
        ("tsc", _U64),
        ("efer", _U32),
        *_quads("kernel_gs_base", "apic_base", "pat", "sysenter_cs", "sysenter_eip", "sysenter_esp"),
        *_quads("star", "lstar", "cstar", "sfmask", "tsc_aux"),
    )


_HOOKS: Final = (
    "reset", "hlt", "mwait", "cnear_branch_taken", "cnear_branch_not_taken", "ucnear_branch", "far_branch",
    "opcode", "interrupt", "exception", "hw_interrupt", "tlb_cntrl", "cache_cntrl", "prefetch_hint",
    "clflush", "before_execution", "after_execution", "repeat_iteration", "inp", "inp2", "outp", "lin_access",
    "phy_access", "wrmsr", "vmexit",
)  # fmt: skip


class Hooks(ctypes.Structure):
    """What a run calls; the first argument of each is `context`."""

    _fields_ = (("context", _POINTER), *((name, _POINTER) for name in _HOOKS))


ExceptionHook: Final = ctypes.CFUNCTYPE(None, _POINTER, _U32, _U32, _U32)  # context, cpu, vector, error code
ExecutionHook: Final = ctypes.CFUNCTYPE(None, _POINTER, _U32, _POINTER)
HltHook: Final = ctypes.CFUNCTYPE(None, _POINTER, _U32)
MissingPage: Final = ctypes.CFUNCTYPE(None, _U64)
#: Arguments of what patches put in place of Bochs' own functions.
PortIn: Final = ctypes.CFUNCTYPE(_U32, _POINTER, _U16, _U32)
PortOut: Final = ctypes.CFUNCTYPE(None, _POINTER, _U16, _U32, _U32)

# fmt: off
#: Exported function -> (type of its result, types of its arguments).
_FUNCTIONS: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "bochscpu_cpu_new":                         (_POINTER, (_U32,)),
    "bochscpu_cpu_state":                       (None,     (_POINTER, _POINTER)),
    "bochscpu_cpu_set_state":                   (None,     (_POINTER, _POINTER)),
    "bochscpu_cpu_run":                         (_U32,     (_POINTER, _POINTER)),
    "bochscpu_cpu_stop":                        (None,     (_POINTER,)),
    "bochscpu_mem_page_insert":                 (None,     (_U64, _POINTER)),
    "bochscpu_mem_page_remove":                 (None,     (_U64,)),
    "bochscpu_mem_missing_page":                (None,     (_POINTER,)),
    "cpu_set_efer":                             (None,     (_U32, _U32)),
    "cpu_set_eflags":                           (None,     (_U32, _U32)),
    "sim_new_param_bool":                       (_POINTER, (ctypes.c_char_p, _U32)),
    "_ZN8BX_CPU_C5resetEj":                     (None,     (_U32,)),
    "_ZN8BX_CPU_C11force_flagsEv":              (_U32,     ()),
    "_ZN8BX_CPU_C10CheckPDPTREm":               (_U8,      (_U64,)),
    "_ZN8BX_CPU_C22handleFpuMmxModeChangeEv":   (None,     ()),
    "_ZN8BX_CPU_C20interrupts_inhibitedEj":     (_U8,      (_U32,)),
    "_ZN8BX_CPU_C18inhibit_interruptsEj":       (None,     (_U32,)),
    "_Z9handleSMCmj":                           (None,     (_U64, _U32)),
}
# fmt: on


def load() -> ctypes.CDLL:
    """The module as a library, with the types of all functions that are used.

    Raises:
        OracleUnavailableError: it is not there, cannot be loaded, or lacks a function.
    """
    try:
        library = ctypes.CDLL(importlib.import_module(MODULE).__file__ or "")
    except (ImportError, OSError) as error:
        raise OracleUnavailableError(f"bochs: bochscpu-python cannot be loaded: {error}") from None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name, None)
        if function is None:
            raise OracleUnavailableError(f"bochs: bochscpu-python does not export {name}")
        function.restype, function.argtypes = result, arguments
    return library


def address_of(library: ctypes.CDLL, name: str) -> int:
    """Where an exported function lies.

    Raises:
        OracleUnavailableError: there is none of that name.
    """
    function = getattr(library, name, None)
    if function is None:
        raise OracleUnavailableError(f"bochs: bochscpu-python does not export {name}")
    return int(ctypes.cast(function, _POINTER).value or 0)

"""Functions of Bochs that are replaced in this process's memory, and why (docs/oracle-bochs.md).

The module has a CPU but none of the machine around it: functions that reach for devices, timers,
the debugger or the configuration would end the process. The first bytes of each are overwritten
with code of our own, which returns a constant, or jumps to a callback that knows the case.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from typing import Any, Final

from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.bochs.abi import address_of

_RETURN_0: Final = bytes.fromhex("31c0c3")  # xor eax, eax; ret
_RETURN_RAX: Final = struct.Struct("<2sQs")  # mov rax, imm64; ret
_JUMP: Final = struct.Struct("<2sQ2s")  # mov rax, imm64; jmp rax
_PAGE: Final = 4096
_READ_EXECUTE, _ALL = 5, 7

#: Function of Bochs -> what it would do that cannot be done here.
NEUTRALISED: Final = {
    "_ZN8BX_CPU_C24debug_disasm_instructionEm": "disassembles for the debugger",
    "_ZN8BX_CPU_C5debugEm": "prints the CPU's state before an assertion ends the process",
    "_ZN8BX_MEM_C13dbg_fetch_memEP8BX_CPU_CmjPh": "reads memory for the debugger",
    "_ZN15bx_local_apic_c11is_selectedEm": "gives the page of the local APIC registers instead of memory",
    "bx_instr_phy_access": "ends the run that is over, when page-directory pointers are read before the next",
    "_ZN14bx_pc_system_c5ResetEj": "resets the machine after a triple fault",
    "_ZN14bx_pc_system_c16deactivate_timerEj": "stops a timer of the local APIC",
    "_ZN14bx_pc_system_c20activate_timer_ticksEjmb": "starts a timer of the local APIC",
    "_ZN14bx_pc_system_c6invlpgEm": "invalidates the page in all CPUs of the machine",
    "_ZN8BX_CPU_C20handle_unknown_rdmsrEjPm": "lets an MSR that it does not know be read as 0",
    "_ZN8BX_CPU_C20handle_unknown_wrmsrEjm": "lets an MSR that it does not know be written to",
}
PORT_IN: Final = "_ZN12bx_devices_c3inpEtj"
PORT_OUT: Final = "_ZN12bx_devices_c4outpEtjj"
#: Configuration is asked for by name, and there is none: every parameter is this false one.
_CONFIGURATION: Final = "sim_get_param_bool"


def apply_patches(library: ctypes.CDLL, callbacks: Mapping[str, Any]) -> None:
    """Neutralise functions, and put callbacks (ctypes functions; the caller keeps them) in place of others.

    Raises:
        OracleUnavailableError: the module does not export one of them, or its code cannot be changed.
    """
    for name in NEUTRALISED:
        _overwrite(library, name, _RETURN_0)
    parameter = library.sim_new_param_bool(b"emufuzz", 0)
    _overwrite(library, _CONFIGURATION, _RETURN_RAX.pack(b"\x48\xb8", parameter, b"\xc3"))
    for name, callback in callbacks.items():
        target = ctypes.cast(callback, ctypes.c_void_p).value or 0
        _overwrite(library, name, _JUMP.pack(b"\x48\xb8", target, b"\xff\xe0"))


def _overwrite(library: ctypes.CDLL, name: str, code: bytes) -> None:
    address = address_of(library, name)
    start = address & -_PAGE
    size = address + len(code) - start
    process = ctypes.CDLL(None, use_errno=True)
    where = ctypes.c_void_p(start), ctypes.c_size_t(size)
    if process.mprotect(*where, _ALL):
        raise OracleUnavailableError(f"bochs: {name} cannot be patched: errno {ctypes.get_errno()}")
    ctypes.memmove(address, code, len(code))
    process.mprotect(*where, _READ_EXECUTE)

"""Exceptions that instruction handlers raise (emulate.c: emulate_exception, emulate_gp and their kin).

They fill `ctxt.exception` and return X86EMUL_PROPAGATE_FAULT for the handler to return. Whether it
reaches the guest is x86_emulate_insn's business.
"""

from __future__ import annotations

from emufuzz.arch.exceptions import (
    DB_VECTOR,
    DE_VECTOR,
    GP_VECTOR,
    NM_VECTOR,
    SS_VECTOR,
    TS_VECTOR,
    UD_VECTOR,
)
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.x86emul import X86EMUL_PROPAGATE_FAULT, X86EMUL_UNHANDLEABLE


def emulate_exception(ctxt: X86EmulateCtxt, vector: int, error: int, valid: bool) -> int:
    """Raise `vector` (0..31) with error code `error` (counts if `valid`); a higher one kills the VM."""
    if vector > 0x1F:
        ctxt.ops.vm_bugged(ctxt)
        return X86EMUL_UNHANDLEABLE
    exception = ctxt.exception
    exception.vector = vector
    exception.error_code = error
    exception.error_code_valid = valid
    return X86EMUL_PROPAGATE_FAULT


def emulate_db(ctxt: X86EmulateCtxt) -> int:
    """#DB, no error code."""
    return emulate_exception(ctxt, DB_VECTOR, 0, valid=False)


def emulate_gp(ctxt: X86EmulateCtxt, err: int) -> int:
    """#GP with error code `err`."""
    return emulate_exception(ctxt, GP_VECTOR, err, valid=True)


def emulate_ss(ctxt: X86EmulateCtxt, err: int) -> int:
    """#SS with error code `err`."""
    return emulate_exception(ctxt, SS_VECTOR, err, valid=True)


def emulate_ud(ctxt: X86EmulateCtxt) -> int:
    """#UD, no error code."""
    return emulate_exception(ctxt, UD_VECTOR, 0, valid=False)


def emulate_ts(ctxt: X86EmulateCtxt, err: int) -> int:
    """#TS with error code `err`."""
    return emulate_exception(ctxt, TS_VECTOR, err, valid=True)


def emulate_de(ctxt: X86EmulateCtxt) -> int:
    """#DE, no error code."""
    return emulate_exception(ctxt, DE_VECTOR, 0, valid=False)


def emulate_nm(ctxt: X86EmulateCtxt) -> int:
    """#NM, no error code."""
    return emulate_exception(ctxt, NM_VECTOR, 0, valid=False)

"""Callback results from a script: fault injection at any chosen call (field `callbacks` of a case).

An entry `{"op", "nth", "result", "fault"}` answers the `nth` call (1, the default, is the first one of
the case) of callback `op` with `result`; the call is logged, but has no effect. A result of
"continue" or 0 leaves the call alone.

* The memory callbacks, get_msr_with_filter and set_msr_with_filter, fix_hypercall, intercept and
  leave_smm take names of X86EMUL_* results (RESULT_OPS).
* set_cr, set_dr, get_msr, set_xcr, check_rdpmc_early and read_pmc take an int (STATUS_OPS).
* pio_in_emulated and pio_out_emulated take "io_needed": userspace has to do it (PORT_OPS).
* is_canonical_addr, is_smm and the guest_* tests take 0 or 1, the answer (BOOL_OPS).

`fault` is what a callback that is given an exception fills in with "propagate_fault"; without it
that is a #PF at the address asked for, or #UD for intercept and fix_hypercall. `leave_smm` fails
with any result but "continue". A case that scripts `intercept` runs as a nested guest does: the
intercept stages are asked. Calls that a callback makes to others count too: fix_hypercall and a
cmpxchg_emulated that cannot be atomic go through write_emulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from emufuzz.arch.exceptions import PFERR_WRITE, UD_VECTOR
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.emulator.ctxt import X86EmulateCtxt, X86Exception
from emufuzz.emulator.x86emul import (
    X86EMUL_CONTINUE,
    X86EMUL_IO_NEEDED,
    X86EMUL_NAMES,
    X86EMUL_PROPAGATE_FAULT,
    X86EMUL_UNHANDLEABLE,
)
from emufuzz.subject.flat.ops import FlatOps

#: Callbacks that answer with an X86EMUL_* result.
RESULT_OPS: Final = (
    "fetch", "read_std", "write_std", "read_emulated", "write_emulated", "cmpxchg_emulated",
    "get_msr_with_filter", "set_msr_with_filter", "fix_hypercall", "intercept", "leave_smm",
)  # fmt: skip
#: Callbacks that answer with 0 for success.
STATUS_OPS: Final = ("set_cr", "set_dr", "get_msr", "set_xcr", "check_rdpmc_early", "read_pmc")
#: Callbacks that userspace may have to complete.
PORT_OPS: Final = ("pio_in_emulated", "pio_out_emulated")
#: Callbacks that answer yes or no.
BOOL_OPS: Final = (
    "is_canonical_addr", "is_smm", "guest_has_movbe", "guest_has_fxsr", "guest_has_rdpid",
    "guest_cpuid_is_intel_compatible",
)  # fmt: skip


class Script(NamedTuple):
    """One entry of `callbacks`, checked."""

    op: str
    nth: int
    result: int
    fault: tuple[int, int | None, int] | None


def read_script(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Script]]:
    """The entries of `callbacks` as callback -> number of the call -> entry.

    Raises:
        UnsupportedCaseError: an entry that no callback can follow, or two for the same call.
    """
    script: dict[str, dict[int, Script]] = {}
    for index, raw in enumerate(entries):
        try:
            entry = _read_entry(raw)
        except UnsupportedCaseError as error:
            raise UnsupportedCaseError(f"callbacks[{index}].{error}") from None
        calls = script.setdefault(entry.op, {})
        if entry.nth in calls:
            raise UnsupportedCaseError(f"callbacks[{index}].nth: call {entry.nth} is scripted twice")
        calls[entry.nth] = entry
    return script


def _number(value: Any) -> int:
    """A number of a case: an int, or text as the exchange format writes them."""
    return value if isinstance(value, int) else int(value, 0)


def _read_entry(raw: Mapping[str, Any]) -> Script:
    op = raw["op"]
    nth = _number(raw.get("nth", 1))
    if nth < 1:
        raise UnsupportedCaseError("nth: calls are counted from 1")
    return Script(op, nth, _read_result(op, raw.get("result", "continue")), _read_fault(raw.get("fault")))


def _read_result(op: str, result: int | str) -> int:
    if op in RESULT_OPS:
        if result in X86EMUL_NAMES:
            return X86EMUL_NAMES.index(result)
        raise UnsupportedCaseError(f"result: {op} answers one of {', '.join(X86EMUL_NAMES)}")
    if op in PORT_OPS:
        if result in ("continue", "io_needed"):
            return X86EMUL_IO_NEEDED if result == "io_needed" else X86EMUL_CONTINUE
        raise UnsupportedCaseError(f"result: {op} answers continue or io_needed")
    if op not in STATUS_OPS and op not in BOOL_OPS:
        raise UnsupportedCaseError(f"op: {op} is no callback whose result can be chosen")
    if isinstance(result, str) or (op in BOOL_OPS and result not in (0, 1)):
        raise UnsupportedCaseError(f"result: {op} answers {'0 or 1' if op in BOOL_OPS else 'an int'}")
    return result


def _read_fault(raw: Mapping[str, Any] | None) -> tuple[int, int | None, int] | None:
    if raw is None:
        return None
    vector = _number(raw["vector"])
    if vector > 0x1F:
        raise UnsupportedCaseError("fault.vector: exceptions have vectors up to 31")
    error = raw.get("error_code")
    return vector, None if error is None else _number(error), _number(raw.get("address") or 0)


class ScriptedOps(FlatOps):
    """The flat callbacks, some calls of which are answered by a script."""

    __slots__ = ("_calls", "_script", "asks_intercepts")

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self._script = read_script(entries)
        self._calls: dict[str, int] = {}
        self.asks_intercepts: bool = "intercept" in self._script

    def _next(self, op: str) -> Script | None:
        """Count a call of `op`; the entry that answers it, if any."""
        calls = self._script.get(op)
        if calls is None:
            return None
        nth = self._calls[op] = self._calls.get(op, 0) + 1
        return calls.get(nth)

    def _forced(self, op: str, fault: X86Exception | None, addr: int | None, error: int = 0) -> int:
        """The scripted result of this call of `op`, its exception filled in; 0 if it is left alone.

        `addr` and `error` describe the #PF that is the default fault; without an address it is #UD.
        """
        entry = self._next(op)
        if entry is None:
            return X86EMUL_CONTINUE
        if entry.result == X86EMUL_PROPAGATE_FAULT and fault is not None:
            if entry.fault is not None:
                _fill(fault, *entry.fault)
            elif addr is None:
                _fill(fault, UD_VECTOR, None, 0)
            else:
                self._page_fault(fault, addr, error, system=False)
        return entry.result

    def _status(self, op: str) -> int:
        entry = self._next(op)
        return 0 if entry is None else entry.result

    def _answer(self, op: str, usual: bool) -> bool:
        entry = self._next(op)
        return usual if entry is None else bool(entry.result)

    # -- memory ----------------------------------------------------------------------------------

    def fetch(self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception) -> tuple[int, bytes]:
        """X86EmulateOps.fetch."""
        rc = self._forced("fetch", fault, addr)
        if rc == X86EMUL_CONTINUE:
            return super().fetch(ctxt, addr, size, fault)
        self._log("fetch", addr, size)
        return rc, b""

    def read_std(
        self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception | None, system: bool
    ) -> tuple[int, bytes]:
        """X86EmulateOps.read_std."""
        rc = self._forced("read_std", fault, addr)
        if rc == X86EMUL_CONTINUE:
            return super().read_std(ctxt, addr, size, fault, system)
        self._log("read", addr, size, "sys" if system else "std")
        return rc, b""

    def write_std(
        self, ctxt: X86EmulateCtxt, addr: int, data: bytes, fault: X86Exception | None, system: bool
    ) -> int:
        """X86EmulateOps.write_std."""
        rc = self._forced("write_std", fault, addr, PFERR_WRITE)
        if rc == X86EMUL_CONTINUE:
            return super().write_std(ctxt, addr, data, fault, system)
        self._log("write", addr, data, "sys" if system else "std")
        return rc

    def read_emulated(
        self, ctxt: X86EmulateCtxt, addr: int, size: int, fault: X86Exception
    ) -> tuple[int, bytes]:
        """X86EmulateOps.read_emulated."""
        rc = self._forced("read_emulated", fault, addr)
        if rc == X86EMUL_CONTINUE:
            return super().read_emulated(ctxt, addr, size, fault)
        self._log("read", addr, size)
        return rc, b""

    def write_emulated(self, ctxt: X86EmulateCtxt, addr: int, data: bytes, fault: X86Exception) -> int:
        """X86EmulateOps.write_emulated."""
        rc = self._forced("write_emulated", fault, addr, PFERR_WRITE)
        if rc == X86EMUL_CONTINUE:
            return super().write_emulated(ctxt, addr, data, fault)
        self._log("write", addr, data)
        return rc

    def cmpxchg_emulated(
        self, ctxt: X86EmulateCtxt, addr: int, old: bytes, new: bytes, fault: X86Exception
    ) -> int:
        """X86EmulateOps.cmpxchg_emulated."""
        rc = self._forced("cmpxchg_emulated", fault, addr, PFERR_WRITE)
        if rc == X86EMUL_CONTINUE:
            return super().cmpxchg_emulated(ctxt, addr, old, new, fault)
        self._log("cmpxchg", addr, old, new)
        return rc

    # -- control, debug and model-specific registers ---------------------------------------------

    def set_cr(self, ctxt: X86EmulateCtxt, cr: int, val: int) -> int:
        """X86EmulateOps.set_cr."""
        status = self._status("set_cr")
        if not status:
            return super().set_cr(ctxt, cr, val)
        self._log("set_cr", cr, val)
        return status

    def set_dr(self, ctxt: X86EmulateCtxt, dr: int, val: int) -> int:
        """X86EmulateOps.set_dr."""
        status = self._status("set_dr")
        if not status:
            return super().set_dr(ctxt, dr, val)
        self._log("set_dr", dr, val)
        return status

    def set_xcr(self, ctxt: X86EmulateCtxt, index: int, val: int) -> int:
        """X86EmulateOps.set_xcr."""
        status = self._status("set_xcr")
        if not status:
            return super().set_xcr(ctxt, index, val)
        self._log("set_xcr", index, val)
        return status

    def get_msr(self, ctxt: X86EmulateCtxt, index: int) -> tuple[int, int]:
        """X86EmulateOps.get_msr."""
        status = self._status("get_msr")
        return (status, 0) if status else super().get_msr(ctxt, index)

    def get_msr_with_filter(self, ctxt: X86EmulateCtxt, index: int) -> tuple[int, int]:
        """X86EmulateOps.get_msr_with_filter."""
        rc = self._forced("get_msr_with_filter", None, None)
        if rc == X86EMUL_CONTINUE:
            return super().get_msr_with_filter(ctxt, index)
        self._log("get_msr", index)
        return rc, 0

    def set_msr_with_filter(self, ctxt: X86EmulateCtxt, index: int, data: int) -> int:
        """X86EmulateOps.set_msr_with_filter."""
        rc = self._forced("set_msr_with_filter", None, None)
        if rc == X86EMUL_CONTINUE:
            return super().set_msr_with_filter(ctxt, index, data)
        self._log("set_msr", index, data)
        return rc

    def check_rdpmc_early(self, ctxt: X86EmulateCtxt, pmc: int) -> int:
        """X86EmulateOps.check_rdpmc_early."""
        return self._status("check_rdpmc_early") or super().check_rdpmc_early(ctxt, pmc)

    def read_pmc(self, ctxt: X86EmulateCtxt, pmc: int) -> tuple[int, int]:
        """X86EmulateOps.read_pmc."""
        status = self._status("read_pmc")
        if not status:
            return super().read_pmc(ctxt, pmc)
        self._log("rdpmc", pmc)
        return status, 0

    # -- ports -----------------------------------------------------------------------------------

    def pio_in_emulated(self, ctxt: X86EmulateCtxt, size: int, port: int, count: int) -> bytes | None:
        """X86EmulateOps.pio_in_emulated; the case's stream stays where it is when userspace must answer."""
        if not self._forced("pio_in_emulated", None, None):
            return super().pio_in_emulated(ctxt, size, port, count)
        self._log(*(("in", port, size) if count == 1 else ("in", port, size, count)))
        return None

    def pio_out_emulated(self, ctxt: X86EmulateCtxt, size: int, port: int, data: bytes, count: int) -> bool:
        """X86EmulateOps.pio_out_emulated."""
        done = not self._forced("pio_out_emulated", None, None)
        return super().pio_out_emulated(ctxt, size, port, data, count) and done

    # -- everything else -------------------------------------------------------------------------

    def fix_hypercall(self, ctxt: X86EmulateCtxt) -> int:
        """X86EmulateOps.fix_hypercall."""
        rc = self._forced("fix_hypercall", ctxt.exception, None)
        if rc == X86EMUL_CONTINUE:
            return super().fix_hypercall(ctxt)
        self._log("fix_hypercall", self.case.rip)
        return rc

    def intercept(self, ctxt: X86EmulateCtxt, stage: int) -> int:
        """X86EmulateOps.intercept: a nested hypervisor that intercepts only what the script says."""
        return self._forced("intercept", ctxt.exception, None)

    def is_smm(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.is_smm."""
        return self._answer("is_smm", usual=False)

    def leave_smm(self, ctxt: X86EmulateCtxt) -> int:
        """X86EmulateOps.leave_smm: with "continue" the saved state is the current one."""
        entry = self._next("leave_smm")
        return X86EMUL_UNHANDLEABLE if entry is None else entry.result

    def triple_fault(self, ctxt: X86EmulateCtxt) -> None:
        """X86EmulateOps.triple_fault: a request to the vcpu, of which the flat machine has none."""

    def is_canonical_addr(self, ctxt: X86EmulateCtxt, addr: int, flags: int) -> bool:
        """X86EmulateOps.is_canonical_addr."""
        return self._answer("is_canonical_addr", super().is_canonical_addr(ctxt, addr, flags))

    def guest_has_movbe(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.guest_has_movbe."""
        return self._answer("guest_has_movbe", super().guest_has_movbe(ctxt))

    def guest_has_fxsr(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.guest_has_fxsr."""
        return self._answer("guest_has_fxsr", super().guest_has_fxsr(ctxt))

    def guest_has_rdpid(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.guest_has_rdpid."""
        return self._answer("guest_has_rdpid", super().guest_has_rdpid(ctxt))

    def guest_cpuid_is_intel_compatible(self, ctxt: X86EmulateCtxt) -> bool:
        """X86EmulateOps.guest_cpuid_is_intel_compatible."""
        return self._answer("guest_cpuid_is_intel_compatible", super().guest_cpuid_is_intel_compatible(ctxt))


def _fill(fault: X86Exception, vector: int, error_code: int | None, address: int) -> None:
    fault.vector = vector
    fault.error_code_valid = error_code is not None
    fault.error_code = error_code or 0
    fault.nested_page_fault = False
    fault.address = address

"""What became of a case on an exit path, in names that can be counted."""

from __future__ import annotations

from typing import Any, Final

from emufuzz.case.model import Outcome

CRASH: Final = "CRASH"
HANG: Final = "HANG"
NO_EXIT: Final = "NO_EXIT"

# fmt: off
#: Every result, in the order of tables: what the emulator returned, what the guest gets, what
#: userspace was asked, how KVM_RUN ended.
RESULTS: Final = (
    "OK",             # the instruction was done
    "FAILED",         # it could not be emulated: userspace is told, or the guest gets #UD for that
    "RESTART",        # REP went on inside the emulator
    "RETRY",          # the guest does it again, now that nothing is in its way
    "INTERCEPTED",    # an exit to L1 instead of the instruction
    "EXCEPTION",      # an exception waits for the guest, or its delivery has begun
    "PIO_IN", "PIO_OUT", "MMIO_READ", "MMIO_WRITE", "MSR_EXIT", "HYPERCALL",
    "DEBUG", "HLT", "SHUTDOWN", "SET_TPR", "EXCEPTION_EXIT", "INTR", "FAIL_ENTRY", "NOTIFY", "X86_BUS_LOCK",
    "HYPERV", "NESTED_VMEXIT", "UNKNOWN",
    "ERROR_EMULATION", "ERROR_SIMUL_EX", "ERROR_DELIVERY_EV", "ERROR_UNEXPECTED_EXIT_REASON",
    "LOST",           # the emulator stopped at a fault or a device, and nobody heard of it
    "LIVELOCK",       # the guest would exit in the same way for ever
    NO_EXIT, CRASH, HANG,
)
_DIRECTIONS: Final = {"in": "PIO_IN", "out": "PIO_OUT"}
#: KVM_EXIT_INTERNAL_ERROR: suberror -> name.
_ERRORS: Final = {
    1: "ERROR_EMULATION", 2: "ERROR_SIMUL_EX", 3: "ERROR_DELIVERY_EV", 4: "ERROR_UNEXPECTED_EXIT_REASON",
}
_NAMES: Final = {"X86_RDMSR": "MSR_EXIT", "X86_WRMSR": "MSR_EXIT", "EXCEPTION": "EXCEPTION_EXIT"}
# fmt: on


def result_of(outcome: Outcome) -> frozenset[str]:
    """The results of one case; several can be true of it."""
    if outcome.crash:
        return frozenset((CRASH,))
    if outcome.hang:
        return frozenset((HANG,))
    extra = outcome.extra or {}
    if "no_exit" in extra:
        return frozenset((NO_EXIT,))
    exits = extra.get("exits", ())
    found = {exit_name(left) for left in exits}
    if outcome.restarts:
        found.add("RESTART")
    if outcome.exception is not None or extra.get("injected"):
        found.add("EXCEPTION")
    if extra.get("livelock"):
        found.add("LIVELOCK")
    if outcome.rc == "unhandleable":
        found.add("FAILED")
    elif outcome.rc == "retry_instr":
        found.add("RETRY")
    elif outcome.rc == "intercepted":
        found.add("INTERCEPTED")
    elif outcome.rc in ("io_needed", "propagate_fault") and outcome.exception is None and not found:
        found.add("LOST")
    elif outcome.rc == "continue" and not any(name.startswith("ERROR") for name in found):
        found.add("OK")
    return frozenset(found)


def exit_name(left: dict[str, Any]) -> str:
    """The result that an exit to userspace is; `left` is a member of an outcome's `exits`."""
    reason = str(left["reason"])
    if reason == "IO":
        return _DIRECTIONS[left["direction"]]
    if reason == "MMIO":
        return "MMIO_WRITE" if left["is_write"] else "MMIO_READ"
    if reason == "INTERNAL_ERROR":
        return _ERRORS[left["suberror"]]
    return _NAMES.get(reason, reason)

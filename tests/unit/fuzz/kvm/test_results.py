"""Results of exit paths, from outcomes."""

from __future__ import annotations

import pytest

from emufuzz.case.build import build_case
from emufuzz.case.model import Outcome
from emufuzz.fuzz.kvm.results import RESULTS, exit_name, result_of

CASE = build_case("prot32", b"\x90")


def outcome(rc="continue", exception=None, restarts=0, **extra):
    return Outcome(
        "",
        CASE.gpr,
        CASE.rip,
        CASE.rflags,
        CASE.system,
        rc=rc,
        exception=exception,
        restarts=restarts,
        extra=extra,
    )


@pytest.mark.parametrize(
    ("left", "name"),
    [
        ({"reason": "IO", "direction": "in"}, "PIO_IN"),
        ({"reason": "IO", "direction": "out"}, "PIO_OUT"),
        ({"reason": "MMIO", "is_write": True}, "MMIO_WRITE"),
        ({"reason": "MMIO", "is_write": False}, "MMIO_READ"),
        ({"reason": "X86_RDMSR"}, "MSR_EXIT"),
        ({"reason": "X86_WRMSR"}, "MSR_EXIT"),
        ({"reason": "INTERNAL_ERROR", "suberror": 3}, "ERROR_DELIVERY_EV"),
        ({"reason": "EXCEPTION"}, "EXCEPTION_EXIT"),
        ({"reason": "SHUTDOWN"}, "SHUTDOWN"),
    ],
)
def test_exits_to_userspace(left, name):
    assert exit_name(left) == name
    assert name in RESULTS
    assert name in result_of(outcome(exits=[left]))


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (outcome(), {"OK"}),
        (outcome(restarts=3), {"OK", "RESTART"}),
        (outcome("unhandleable"), {"FAILED"}),
        (outcome("retry_instr"), {"RETRY"}),
        (outcome("intercepted"), {"INTERCEPTED"}),
        (outcome("io_needed", livelock=True), {"LIVELOCK"}),
        (outcome("io_needed"), {"LOST"}),
        (outcome("propagate_fault", (13, 0, None)), {"EXCEPTION"}),
        (outcome(injected=[{"vector": 1}]), {"EXCEPTION", "OK"}),
        (outcome("unhandleable", no_exit="why"), {"NO_EXIT"}),
        (outcome(exits=[{"reason": "INTERNAL_ERROR", "suberror": 4}]), {"ERROR_UNEXPECTED_EXIT_REASON"}),
    ],
)
def test_results(made, names):
    assert result_of(made) == names


def test_what_did_not_finish():
    crashed = outcome()
    crashed.crash = "ZeroDivisionError"
    hung = outcome()
    hung.hang = True
    assert result_of(crashed) == {"CRASH"}
    assert result_of(hung) == {"HANG"}

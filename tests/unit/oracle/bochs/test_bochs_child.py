"""The child is contained: its death costs one case, and nothing of what it does reaches the parent."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest

from emufuzz.arch.modes import MODES
from emufuzz.case.build import build_case, cpls_of
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.bochs import BochsOracle
from emufuzz.oracle.bochs import oracle as oracle_module
from emufuzz.oracle.bochs import selftest as selftest_module
from emufuzz.oracle.bochs.child import Child, DeadChildError

INC = build_case("prot64", b"\xff\xc0\xf4", cpl=0)


def _own(bochs, patience=10.0):
    """An oracle of the test's own, without another start-up."""
    oracle = object.__new__(BochsOracle)
    oracle._patience, oracle._child, oracle.starts = patience, None, 0
    return oracle


def test_a_dead_child_costs_the_case_that_killed_it(bochs):
    oracle = _own(bochs)
    oracle.run([INC])
    os.kill(oracle._child.pid, signal.SIGKILL)
    outcomes = oracle.run([INC, INC, INC])
    oracle.close()
    assert outcomes[0].crash == "bochs: killed by signal 9"
    assert [o.gpr[0] for o in outcomes[1:]] == [1, 1]
    assert oracle.starts == 2


def test_a_hanging_child_is_ended(bochs):
    oracle = _own(bochs, patience=0.2)
    oracle.run([INC])
    pid = oracle._child.pid
    os.kill(pid, signal.SIGSTOP)
    hung, fine = oracle.run([INC, INC])
    oracle.close()
    assert (hung.hang, hung.crash) == (True, "")
    assert fine.gpr[0] == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_closed_child_is_gone(bochs):
    child = Child()
    pid = child.pid
    child.close()
    child.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_child_ends_with_its_pipe(bochs):
    child = Child()
    child._process.stdin.close()
    assert child._process.wait(10) == 0
    child._process.stdout.close()


def test_a_child_that_cannot_start_says_so(bochs, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(OracleUnavailableError, match="starting its process"):
        Child()


def test_a_child_without_the_module_says_so(bochs, monkeypatch):
    monkeypatch.setattr("emufuzz.oracle.bochs.child._SERVER", "emufuzz.no_such_module")
    with pytest.raises(OracleUnavailableError, match="does not start: exited with 1"):
        Child()


def test_an_answer_that_does_not_come_is_a_hang(bochs):
    child = Child(0.1)
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(DeadChildError) as caught:
        list(child.run([INC]))
    child.close()
    assert caught.value.hang


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(oracle_module.importlib.metadata, "version", lambda _name: "0.4.0")
    with pytest.raises(OracleUnavailableError, match=r"is 0\.4\.0, not 0\.3\.1"):
        BochsOracle()


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise oracle_module.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(oracle_module.importlib.metadata, "version", missing)
    with pytest.raises(OracleUnavailableError, match=r"install emufuzz\[bochs\]"):
        BochsOracle()


@pytest.mark.parametrize("test", ["modes", "stale_code", "exceptions", "memory", "ports"])
def test_a_failing_self_test_makes_it_unavailable(bochs, monkeypatch, test):
    def failing(_oracle):
        return False

    failing.__name__ = test
    monkeypatch.setattr(selftest_module, test, failing)
    with pytest.raises(OracleUnavailableError, match=test.replace("_", " ")):
        selftest_module.self_test(bochs)


def test_the_parent_does_not_load_the_module(bochs):
    code = (
        "import sys; from emufuzz.oracle.bochs import BochsOracle; BochsOracle().close();"
        "print(any(name.startswith('bochscpu') for name in sys.modules))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert shown.stdout == "False\n"


def _random_bytes(seed: int, count: int):
    rng = random.Random(seed)
    places = [(mode, cpl) for mode in MODES for cpl in cpls_of(mode)]
    bases = [build_case(mode, b"", cpl=cpl, flags=rng.choice((0, 3 << 12))) for mode, cpl in places]
    for _ in range(count):
        base = rng.choice(bases)
        gpr = tuple(rng.choice((0, 0x8000, 0xC800, rng.getrandbits(64))) for _ in range(16))
        width = (1 << 64) - 1 if base.mode == "prot64" else 0xFFFFFFFF
        fields = {name: getattr(base, name) for name in base.__struct_fields__}
        yield type(base)(**{**fields, "code": rng.randbytes(15), "gpr": tuple(v & width for v in gpr)})


def _contained(oracle, seed, count):
    outcomes = []
    cases = list(_random_bytes(seed, count))
    for start in range(0, count, 512):
        outcomes += oracle.run(cases[start : start + 512])
    assert len(outcomes) == count
    assert oracle.run([INC])[0].gpr[0] == 1
    return sum(bool(o.crash or o.hang) for o in outcomes)


def test_random_bytes_are_contained(bochs):
    assert _contained(bochs, 1, 4000) == 0


@pytest.mark.slow
def test_random_bytes_are_contained_200000(bochs):
    assert _contained(bochs, 2, 200_000) == 0

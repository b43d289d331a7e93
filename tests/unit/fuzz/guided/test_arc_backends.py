"""Arcs by sys.settrace and by sys.monitoring are the same."""

from __future__ import annotations

import sys

import pytest

from emufuzz.case.build import build_case
from emufuzz.emulator.decode import x86_decode_insn
from emufuzz.fuzz.guided import arcs
from emufuzz.subject.flat import FlatSubject

ADD, DIV0 = build_case("prot32", b"\x01\xd8\xf4"), build_case("prot32", b"\xf7\xf1\xf4")
DISABLE = object()


class Monitoring:
    """Stands for sys.monitoring (PEP 669) on any Python: settrace calls what hears of functions and lines."""

    def __init__(self, begin, line):
        self.begin, self.line, self.disabled = begin, line, set()

    def trace(self, frame, event, _):
        code = frame.f_code
        if code not in self.disabled:
            said = self.line(code, frame.f_lineno) if event == "line" else None
            said = self.begin(code, 0) if event == "call" else said
            self.disabled |= {code} if said is DISABLE else set()
        return self.trace


def traced(subject, case):
    found = set()
    with arcs._traced(found):
        subject.run((case,))
    return found


@pytest.mark.parametrize("case", [ADD, DIV0], ids=["add", "div0"])
def test_what_hears_of_lines_finds_what_settrace_finds(case):
    subject, found = FlatSubject(events=False), set()
    monitoring = Monitoring(*arcs._listeners(found, DISABLE))
    before = sys.gettrace()
    sys.settrace(monitoring.trace)
    try:
        subject.run((case,))
    finally:
        sys.settrace(before)
    assert len(found) > 100
    assert found == traced(subject, case)
    assert FlatSubject.run.__code__ in monitoring.disabled
    assert x86_decode_insn.__code__ not in monitoring.disabled


def test_the_rest_of_a_long_run_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(arcs, "MOST_LINES", 10)
    found = set()
    begin, line = arcs._listeners(found, DISABLE)
    begin(x86_decode_insn.__code__, 0)
    for number in range(1, 40):
        line(x86_decode_insn.__code__, number)
    assert found == {arcs.arc_number("emulator/decode.py", number, number + 1) for number in range(10)}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring is new in Python 3.12 (PEP 669)")
def test_sys_monitoring_is_used_where_it_is_and_finds_the_same():
    subject = FlatSubject(events=False)
    for _ in range(2):  # what was disabled in a run is heard of in the next one
        found = set()
        with arcs._monitored(found):
            subject.run((ADD,))
        assert sys.monitoring.get_tool(arcs._TOOL) is None
        assert found == traced(subject, ADD) == arcs.arcs_of(subject, ADD)

"""Which fields changed, and who vouches for them."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.case.build import build_case
from emufuzz.case.devices import DeviceAccess, trace_to_obj
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Outcome
from emufuzz.fuzz.changed import Field, changed_fields
from emufuzz.fuzz.generate import Options
from emufuzz.fuzz.kvm.generate import PathOptions
from emufuzz.fuzz.probing import Probe
from emufuzz.fuzz.vouch import FLAT, Counting, classify, count_tasks, tasks_of
from emufuzz.fuzz.vouched import CLASSES, Vouched
from emufuzz.oracle.base import Capabilities
from emufuzz.oracle.rules import RulesOracle
from emufuzz.oracle.verdict import NOBODY, Ruling
from emufuzz.subject.flat import FlatSubject

ADD = build_case("prot64", bytes.fromhex("4801d8"), rax=1, rbx=2)
STORE = build_case("prot64", bytes.fromhex("48890425f88f0000"), rax=0x0102030405060708)
LIMIT = build_case("prot32", b"\xf0\x01\xd8")  # LOCK ADD of registers
OPTIONS = {"emulator": Options(), "kvm": PathOptions()}


class Fake:
    """Answers as the port does, with gaps; takes only cases of one mode if one is given."""

    def __init__(self, name, *, gaps=(), mode="", cost="cheap", wrong=False):
        self.name, self.gaps, self.mode, self.wrong = name, gaps, mode, wrong
        self.capabilities = Capabilities(cost=cost)
        self.ledger = ()
        self.seen = 0

    def check(self, case):
        if self.mode not in {"", case.mode}:
            raise UnsupportedCaseError(f"mode: not 0x{len(case.mode)}")

    def run(self, batch):
        self.seen += len(batch)
        outcomes = FlatSubject(events=False).run(batch)
        for outcome in outcomes:
            outcome.gpr = (outcome.gpr[0] + self.wrong, *outcome.gpr[1:])
        return outcomes

    def unchecked(self, case, outcome):
        return self.gaps

    def close(self):
        self.seen = -1


def _ran(case):
    return FlatSubject(events=False).run([case])[0]


def _names(case, *answers):
    return [field.name for field in changed_fields(case, _ran(case), answers)]


def _count(cases, *oracles):
    return Counting(oracles[0], oracles[1:]).count(cases, [_ran(case) for case in cases])


def test_changed_registers():
    assert sorted(_names(ADD)) == ["rax", "rflags", "rip"]


def test_what_an_oracle_changed_counts_too():
    other = msgspec.structs.replace(_ran(ADD), gpr=(3, 7, *ADD.gpr[2:]))
    assert "rcx" in _names(ADD, other)


def test_memory_is_one_field_per_range():
    outcome = _ran(STORE)
    fields = changed_fields(STORE, outcome)
    assert [field for field in fields if field.name == "mem"] == [Field("mem", 0x8FF8)]


def test_undefined_flags_do_not_count():
    mul = build_case("prot64", bytes.fromhex("0fafc3"), rax=1, rbx=1)
    outcome = _ran(mul)
    other = msgspec.structs.replace(outcome, rflags=outcome.rflags ^ 0x40)  # ZF is undefined
    assert "rflags" not in _names(mul, other)


def test_an_undefined_destination_does_not_count():
    bsf = build_case("prot64", bytes.fromhex("0fbcc3"), rax=5, rbx=0)
    other = msgspec.structs.replace(_ran(bsf), gpr=(7, *bsf.gpr[1:]))
    assert "rax" not in _names(bsf, other)


def test_an_exception_has_its_code_and_address():
    absent = build_case("prot64", bytes.fromhex("8b042500b00000"))
    assert _names(absent) == ["exception", "exception.error_code", "exception.address"]


def test_devices_are_fields_by_address():
    trace = [
        DeviceAccess("pio", 0x60, 1, write=False, data=b"\xff"),
        DeviceAccess("pio", 0x60, 1, write=False, data=b"\xfe"),
        DeviceAccess("pio", 0x60, 1, write=True, data=b"\x00"),
    ]
    extra = {"device_trace": trace_to_obj(trace)}
    outcome = Outcome("", ADD.gpr, ADD.rip, ADD.rflags, ADD.system, extra=extra)
    assert len(changed_fields(ADD, outcome)) == 2


def test_rules_vouch_for_what_they_demand():
    probe = Probe(RulesOracle(), ADD, _ran(ADD), [])
    assert probe.vouches(Field("rip"))
    assert not probe.vouches(Field("rax"))
    assert not probe.vouches(Field("rflags"))


def test_rules_vouch_for_the_exception_that_must_come():
    probe = Probe(RulesOracle(), LIMIT, _ran(LIMIT), [])
    assert _ran(LIMIT).exception == (6, None, None)
    assert probe.vouches(Field("exception"))


def test_rules_vouch_where_they_object():
    wrong = msgspec.structs.replace(_ran(LIMIT), exception=None, rc="continue")
    assert Probe(RulesOracle(), LIMIT, wrong, [_ran(LIMIT)]).vouches(Field("exception"))


def test_rules_that_look_at_half_of_a_register_do_not_vouch():
    smsw = build_case("prot64", bytes.fromhex("0f01e0"), rax=0)  # only CR0[15:0] is demanded
    assert not Probe(RulesOracle(), smsw, _ran(smsw), []).vouches(Field("rax"))


def test_a_gap_leaves_fields_unvouched():
    total = _count([ADD], Fake("a", gaps=(("rflags", "a-flags"),)))
    assert (total.fields.total(), total.unvouched.total()) == (3, 1)
    assert total.table(2)[0] == ("rflags", 1, 1, {"a-flags": 1})
    assert total.share == pytest.approx(1 / 3)


def test_another_oracle_fills_a_gap():
    total = _count([ADD], Fake("a", gaps=(("rflags", "a-flags"),)), Fake("b", gaps=(("gpr", "b-gpr"),)))
    assert total.unvouched.total() == 0
    assert (total.by["a"], total.by["b"]) == (2, 2)
    assert (total.alone["a"], total.alone["b"]) == (1, 1)


def test_rules_fill_a_gap():
    total = _count([ADD], Fake("a", gaps=(("rip", "a-rip"),)), RulesOracle())
    assert (total.unvouched.total(), total.by["rules"]) == (0, 1)


def test_all_fields_of_a_refused_case_are_unvouched():
    total = _count([ADD], Fake("a", mode="real"))
    assert total.classes == {"nobody": 1}
    assert total.unvouched.total() == total.fields.total() == 3
    (row,) = total.table(0)
    assert row == (FLAT, 3, 3, {"a refuses: mode: not ..": 3})


def test_dear_oracles_are_asked_where_nobody_vouches():
    dear = Fake("dear", cost="dear")
    assert _count([ADD, STORE], Fake("a", gaps=(("rflags", "a-flags"),)), dear).unvouched.total() == 0
    assert dear.seen == 1  # STORE changes no flags


def test_dear_oracles_that_object_are_findings():
    dear = Fake("dear", cost="dear", wrong=True)
    total = _count([ADD], Fake("a", gaps=(("all", "a-all"),)), dear)
    assert total.classes == {"finding": 1}


def test_classes():
    done = _ran(ADD)
    assert classify(Ruling("skipped", "kvm-quirk-1"), done) == ("quirk", "kvm-quirk-1")
    assert classify(Ruling("skipped", "unicorn-x"), done) == ("gap", "unicorn-x")
    assert classify(Ruling("skipped", f"{NOBODY}: x 0x12"), done) == ("nobody", f"{NOBODY}: x ..")
    assert classify(Ruling("finding", against=("a", "b")), done) == ("finding", "a, b")


def test_the_cases_are_divided_among_subjects_and_batches():
    tasks = tasks_of(("emulator", "kvm"), 3, 2501, OPTIONS)
    assert [(task.subject, task.number, task.size) for task in tasks] == [
        ("emulator", 0, 1024), ("emulator", 1, 227), ("kvm", 0, 1024), ("kvm", 1, 226)
    ]  # fmt: skip


def test_every_case_is_in_one_class_and_nothing_depends_on_workers():
    tasks = tasks_of(("emulator", "kvm"), 3, 400, OPTIONS)
    runs = []
    for workers in (1, 2):
        total = Vouched()
        for part in count_tasks(tasks, ("rules",), workers):
            total.merge(part)
        runs.append(total)
    assert runs[0] == runs[1]
    assert runs[0].cases == 400
    assert set(runs[0].classes) <= set(CLASSES)
    assert runs[0].fields.total() > runs[0].unvouched.total() > 0
    assert runs[0].causes.total() == runs[0].unvouched.total()

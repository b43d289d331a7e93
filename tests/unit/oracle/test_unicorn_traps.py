"""The traps of Unicorn stay closed, and opening one by hand is noticed."""

from __future__ import annotations

import pytest

from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.unicorn import UnicornOracle, engine, selftest
from emufuzz.oracle.unicorn.code import CodeSlots
from emufuzz.oracle.unicorn.engine import Engine
from emufuzz.oracle.unicorn.layout import probe
from emufuzz.oracle.unicorn.memory import MEMORY_SIZE

TRAPS = (selftest.stale_code, selftest.old_exception, selftest.stale_tlb, selftest.code_page_write)


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_trap_is_closed(oracle, trap):
    assert trap(oracle)


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_trap_is_closed_when_repeated(oracle, trap):
    assert all(trap(oracle) for _ in range(3))


def test_without_fresh_slots_the_stale_code_test_fails(oracle, monkeypatch):
    def damaged(self: CodeSlots, address: int, code: bytes) -> None:
        self.translated[address] = code

    monkeypatch.setattr(CodeSlots, "make_fresh", damaged)
    assert not selftest.stale_code(oracle)
    with pytest.raises(OracleUnavailableError, match="stale code"):
        UnicornOracle()


def test_without_flushes_the_stale_code_test_fails(oracle, monkeypatch):
    monkeypatch.setattr(Engine, "flush_translations", lambda _self: None)
    assert not selftest.stale_code(oracle)


def test_without_tlb_flushes_the_stale_tlb_test_fails(monkeypatch):
    monkeypatch.setattr(Engine, "flush_tlb", lambda _self: None)
    with pytest.raises(OracleUnavailableError, match="stale tlb"):
        UnicornOracle()


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(engine, "UNICORN_VERSION", "9.9.9")
    with pytest.raises(OracleUnavailableError, match=r"only 9\.9\.9 is known"):
        UnicornOracle()


def test_a_moved_field_is_refused(monkeypatch):
    opened = Engine(MEMORY_SIZE)
    save = opened.save

    def moved() -> None:
        save()
        opened.state[8:] = bytes(opened.state[:-8])

    monkeypatch.setattr(opened, "save", moved)
    with pytest.raises(OracleUnavailableError, match="layout is unknown"):
        probe(opened)


def test_cases_do_not_influence_one_another(oracle, case):
    good = case("prot64", "01d8f4", {0: 1, 3: 2}, rip=0x10000)
    bad = case("prot64", "8b06f4", {6: 0x666000}, rip=0x10020)
    outcomes = oracle.run([good, bad, good, bad, good])
    assert [outcome.gpr[0] for outcome in outcomes] == [3, 0, 3, 0, 3]
    assert [outcome.exception for outcome in outcomes] == [None, (14, 0, 0x666000)] * 2 + [None]


def test_stores_are_undone_before_the_next_case(oracle, case):
    store = case("prot64", "8906f4", {0: 0x1122, 6: 0x8000}, rip=0x10040)
    load = case("prot64", "8b06f4", {6: 0x8000}, rip=0x10060)
    stored, loaded = oracle.run([store, load])
    assert stored.pages[8][:4] == b"\x22\x11\0\0"
    assert loaded.gpr[0] == 0x03020100
    assert loaded.pages == {}

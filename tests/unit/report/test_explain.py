from __future__ import annotations

import pytest

from emufuzz.case.model import Case, Memory, Outcome, Segment, System
from emufuzz.report.columns import table
from emufuzz.report.disasm import disassemble, mnemonic
from emufuzz.report.explain import Opinion, explain, summary
from emufuzz.report.fields import disagreements, show_event, show_exception, show_flags
from emufuzz.report.state import state_lines

CODE = Segment(sel=8, limit=0xFFFFFFFF, type=11, s=1, p=1, db=1, g=1)
DATA = Segment(sel=16, limit=0xFFFFFFFF, type=3, s=1, p=1, db=1, g=1)
SYSTEM = System(seg=(DATA, CODE, DATA, DATA, DATA, DATA, Segment(), Segment()), cr0=0x11)


def make_case(**fields: object) -> Case:
    values: dict[str, object] = {
        "id": "demo",
        "mode": "prot32",
        "code": b"\x01\x18",
        "gpr": (0x2000, 0, 0, 5, *(0,) * 12),
        "rip": 0x1000,
        "rflags": 2,
        "system": SYSTEM,
        "mem": Memory(((0x2000, b"\x07" + bytes(20)),)),
    }
    return Case(**{**values, **fields})  # type: ignore[arg-type]


def make_outcome(case: Case, **fields: object) -> Outcome:
    values = {"id": case.id, "gpr": case.gpr, "rip": case.rip + 2, "rflags": 2, "system": case.system}
    return Outcome(**{**values, **fields})  # type: ignore[arg-type]


def page(case: Case, value: int) -> dict[int, bytes]:
    return {2: bytes([value]) + case.mem.pages[2][1:]}


@pytest.mark.parametrize(
    ("mode", "code", "text"),
    [
        ("real", "0118", "add word ptr [bx + si], bx"),
        ("prot32", "0118", "add dword ptr [eax], ebx"),
        ("prot64", "480118", "add qword ptr [rax], rbx"),
    ],
)
def test_bitness_follows_the_mode(mode: str, code: str, text: str) -> None:
    case = make_case(mode=mode, code=bytes.fromhex(code))
    assert mnemonic(case) == text
    assert text in disassemble(case)[0]


def test_bytes_that_cannot_be_disassembled_are_shown() -> None:
    case = make_case(code=b"\x0f\x3a\xff")
    assert "0f 3a ff" in disassemble(case)[0]
    assert mnemonic(case).startswith("db 0f 3a ff")


def test_state_shows_what_is_not_default_and_keeps_the_width() -> None:
    lines = state_lines(make_case(), 60)
    text = "\n".join(lines)
    assert "rax=0x2000" in text
    assert "rcx" not in text
    assert "[0x2000]=07" in text
    assert "\0" not in text
    assert max(map(len, lines)) <= 60


def test_state_shows_the_machine_around_the_emulator() -> None:
    extra = {
        "phys": [{"addr": "0x3000", "data": "ff"}],
        "devices": [
            {"kind": "mmio", "addr": "0x9000", "size": 64, "reads": "00" * 17},
            {"kind": "pio", "port": 96, "size": 1, "behaviour": "float"},
        ],
        "kvm": {
            "memslots": [{"base": "0x1000", "size": "0x2000", "flags": 3}, {"base": 0, "size": 4096}],
            "knobs": {"ept": False, "host_maxphyaddr": 46},
            "guest_mode": {"intercepts": ["io", "desc"], "exception_bitmap": "0x40"},
            "lapic": {0x80: 0x20},
            "ioeventfds": [{"addr": 4096, "port": True}],
            "pending": {"vector": 13, "error_code": None},
            "guest_debug": 3,
        },
        "callbacks": [{"op": "read_std", "result": "io_needed"}],
    }
    lines = state_lines(make_case(path="fep", extra=extra), 80)
    words = {word for line in lines for word in line[8:].split("  ")}
    assert words >= {
        "[0x3000]=ff", f"0x9000+0x40 stream reads={'00' * 16}...", "port 0x60+0x1 float",
        "slot 0x1000+0x2000 log ro", "slot 0x0+0x1000", "knobs.ept=false", "knobs.host_maxphyaddr=0x2e",
        "guest_mode.intercepts=[io desc]", "guest_mode.exception_bitmap=0x40", "lapic.0x80=0x20",
        "ioeventfds=[{addr=0x1000 port=true}]", "pending.vector=0xd", "pending.error_code=none",
        "guest_debug=3", "{op=read_std result=io_needed}", "path=fep",
    }  # fmt: skip
    assert max(map(len, lines)) <= 80


def test_disagreements_name_each_differing_field_once() -> None:
    case = make_case()
    one = make_outcome(case, rflags=0x46, pages=page(case, 12))
    two = make_outcome(case, rflags=0x2, pages=page(case, 13), rip=0x1003)
    rows = {row.name: row for row in disagreements(case, [one, two])}
    assert set(rows) == {"rip", "rflags", "[0x2000]"}
    assert rows["[0x2000]"] == ("[0x2000]", "07", ("0c", "0d"))
    assert rows["rflags"].after == ("0x46 [PF ZF]", "0x2 []")
    assert disagreements(case, [one, one]) == []


def test_events_are_compared_only_between_those_that_have_them() -> None:
    case = make_case()
    logged = make_outcome(case, events=[("read", 0x2000, 4), ("write", 0x2000, b"\x0c")])
    other = make_outcome(case, events=[("read", 0x2000, 4)])
    silent = make_outcome(case)
    assert disagreements(case, [logged, silent]) == []
    [row] = disagreements(case, [logged, other, silent])
    assert row == ("callback 2", "", ("write 0x2000 0c", "(none)", "-"))


def test_explanation_says_who_contradicts_whom() -> None:
    case = make_case()
    subject = make_outcome(case, exception=(13, 0, None), rc="propagate_fault", rip=case.rip)
    oracle = make_outcome(case)
    opinions = [
        Opinion("unicorn", oracle, ("exception", "rip"), ("AF is undefined",)),
        Opinion("recorded", subject, (), counts=False),
    ]
    text = "\n".join(explain(case, "emulator", subject, opinions, 80))
    assert "emulator: raises #GP(0x0)" in text
    assert "unicorn contradicts emulator on exception, rip." in text
    assert "recorded agrees with emulator (for information; it does not decide)." in text
    assert "unicorn: AF is undefined" in text


def test_wide_rows_are_stacked() -> None:
    rows = [("field", "b" * 30, "c" * 30)]
    side = table(["name", "x", "y"], rows, 100)
    stacked = table(["name", "x", "y"], rows, 50)
    assert len(side) == 3
    assert stacked == ["field", "    x  " + "b" * 30, "    y  " + "c" * 30]


def test_phrases() -> None:
    case = make_case()
    assert show_exception((14, 2, 0xC000)) == "#PF(0x2) at 0xc000"
    assert show_flags(0x3002) == "0x3002 [IOPL=3]"
    assert show_event(("cmpxchg", 0x10, b"\x01", b"\x02")) == "cmpxchg 0x10 01 02"
    assert summary(make_outcome(case, rc="unhandleable", reason="no x87")) == "ends as unhandleable (no x87)"
    assert summary(make_outcome(case, crash="KeyError: 1")) == "crashed"
    assert summary(make_outcome(case, hang=True)) == "did not come back"

"""`emufuzz repro` of cases that enter through a path: the KVM model, its exits, its trace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from emufuzz.case.build import build_case
from emufuzz.case.model import Outcome
from emufuzz.cli.main import run
from emufuzz.report import replay
from emufuzz.report.exits import SHOWN, exit_lines
from emufuzz.subject.kvm import KvmSubject

CODE = {"limit": "0xffff", "type": 11, "s": 1, "p": 1}
DATA = {"limit": "0xffff", "type": 3, "s": 1, "p": 1}
#: MOV AX, [9000h] in real mode, where a device is.
MMIO: dict[str, Any] = {
    "id": "mmio", "mode": "real", "path": "ept-violation", "code": "a10090", "rip": "0x6000", "rflags": "0x2",
    "seg": {"cs": CODE, "ds": DATA},
    "devices": [{"kind": "mmio", "addr": "0x9000", "size": 64, "behaviour": "ram", "reads": "0102"}],
}  # fmt: skip
NOP: dict[str, Any] = {"id": "nop", "mode": "real", "code": "90", "rflags": "0x2", "seg": {"cs": CODE}}


@pytest.fixture
def repro(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(case: dict[str, Any], *options: str) -> tuple[int, str]:
        path = tmp_path / "case.json"
        path.write_text(json.dumps(case), "utf-8")
        code = run(["repro", *options, str(path)])
        return code, capsys.readouterr().out

    return call


def test_the_explanation_has_exits_devices_and_unicorns_word(repro: Any) -> None:
    code, out = repro(MMIO)
    assert code == 0
    assert "  kvm: completes\n  unicorn: completes\n\nunicorn agrees with kvm.\n" in out
    assert "left to userspace:\n  KVM_EXIT_MMIO phys_addr=0x9000 len=2 is_write=0\n" in out
    assert "devices:\n  mmio read 0x9000 0102\n" in out
    assert out.endswith("conclusion: all agree\n")
    assert "trace:" not in out


def test_the_trace_is_printed_as_trace_cmd_does(repro: Any) -> None:
    code, out = repro(MMIO, "--trace")
    lines = out.split("trace:\n")[1].split("\n\n")[0].splitlines()
    assert code == 0
    form = re.compile(r" +emufuzz-0 +\[000\] +0\.(\d{6}): ([a-z_]+): +(.*)")
    parts = [found.groups() for found in map(form.fullmatch, lines) if found]
    assert [int(step) for step, _, _ in parts] == list(range(1, len(lines) + 1))
    assert [name for _, name, _ in parts if name != "vcpu_match_mmio"][-5:] == [
        "kvm_emulate_insn", "kvm_mmio", "kvm_userspace_exit", "kvm_mmio", "kvm_entry",
    ]  # fmt: skip
    assert ("kvm_emulate_insn", "0:6000:a1 00 90 (real)") in [(name, text) for _, name, text in parts]
    assert parts[-1][2] == "vcpu 0, rip 0x6003"


def test_a_case_without_path_has_no_trace(repro: Any) -> None:
    code, out = repro(NOP, "--trace")
    assert code == 0
    assert "  emulator: completes\n" in out
    assert "trace:\nno path, so KVM was not entered\n" in out


def test_json_has_the_trace_as_lines(repro: Any) -> None:
    _, out = repro(MMIO, "--trace", "--json")
    result = json.loads(out)
    assert result["outcomes"].keys() == {"kvm", "unicorn"}
    assert result["trace"][-1].endswith("vcpu 0, rip 0x6003")
    assert "trace" not in json.loads(repro(MMIO, "--json")[1])
    assert "trace" not in json.loads(repro(NOP, "--trace", "--json")[1])


def test_an_oracle_that_cannot_judge_says_why(repro: Any) -> None:
    segments = {name: {**DATA, "type": 3} for name in ("es", "ss", "ds", "fs", "gs")}
    case = {
        "id": "inject", "mode": "real", "path": "rmode-inject", "code": "90", "rflags": "0x2",
        "gpr": {"rsp": "0x9000"}, "seg": {"cs": CODE, **segments},
        "mem": [{"addr": "0x0"}, {"addr": "0x8000"}], "kvm": {"pending": {"vector": 0}},
    }  # fmt: skip
    code, out = repro(case)
    why = "path: rmode-inject delivers an event and runs no instruction"
    assert code == 0
    assert f"unicorn does not judge this case: {why}." in out
    assert out.endswith(f"conclusion: nothing to compare, unicorn cannot judge it: {why}\n")
    assert json.loads(repro(case, "--json")[1])["refused"] == {"unicorn": why}


def test_a_case_that_does_not_exit_is_not_called_agreement(repro: Any) -> None:
    code, out = repro({**MMIO, "code": "90"})
    why = "no exit: the instruction accesses nothing that exits"
    assert code == 0
    assert f"  kvm: ends as unhandleable ({why})\n" in out
    assert "unicorn was not compared with kvm." in out
    assert out.endswith(f"conclusion: nothing to compare, subject-unhandleable: {why}\n")


def test_a_machine_that_cannot_be_set_up_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "case.json"
    path.write_text(json.dumps({**MMIO, "kvm": {"lapic": {"0x80": 1}}}), "utf-8")
    assert run(["repro", str(path)]) == 2
    assert capsys.readouterr().err == f"emufuzz: {path}: kvm.lapic: needs the knob irqchip\n"


def test_a_finding_of_a_path_is_replayed_through_it(repro: Any) -> None:
    difference = {"field": "rax", "kind": "gpr", "subject": "0x1", "oracle": "0x2"}
    code, out = repro({"case": MMIO, "differences": [difference]})
    assert code == 0
    assert out.endswith("conclusion: no longer a finding: all agree\n")
    assert "KVM_EXIT_MMIO" in out


def test_a_hang_of_the_model_is_reported(monkeypatch: pytest.MonkeyPatch, repro: Any) -> None:
    def forever(_subject: object, _batch: object) -> list[Outcome]:
        while True:
            pass

    monkeypatch.setattr(KvmSubject, "run", forever)
    monkeypatch.setattr(replay, "HANG_SECONDS", 0.01)
    code, out = repro(MMIO, "--trace")
    assert code == 1
    assert "did not come back" in out


def outcome(**extra: Any) -> Outcome:
    case = build_case("real", b"\x90")
    return Outcome("", case.gpr, 0, 2, case.system, extra=extra or None)


def test_what_the_guest_gets_is_in_words() -> None:
    lines = exit_lines(
        outcome(
            injected=[
                {"vector": 14, "error_code": 2, "payload": "0xb000"},
                {"vector": 6},
                {"vector": 13, "error_code": 0},
            ],
            interrupt_shadow=3,
            livelock=True,
        )
    )
    assert lines == [
        "",
        "for the guest:",
        "  #PF(0x2) payload 0xb000",
        "  #UD",
        "  #GP(0x0)",
        "  interrupts blocked by MOV SS and STI",
        "  resumed at the same instruction for ever",
    ]


def test_exits_show_their_members_and_long_lists_are_cut() -> None:
    failure = {"reason": "INTERNAL_ERROR", "suberror": 1, "info": [48, "0x1000000000"], "insn_bytes": "d900"}
    port = {"kind": "pio", "port": 96, "size": 1, "direction": "write", "data": "01"}
    lines = exit_lines(outcome(exits=[failure], device_trace=[port] * (SHOWN + 5)))
    assert lines[1:3] == [
        "left to userspace:",
        "  KVM_EXIT_INTERNAL_ERROR suberror=1 info=[0x30 0x1000000000] insn_bytes=d900",
    ]
    assert lines[5] == "  pio write 0x60 01"
    assert lines[-1] == "  ... and 5 more"
    assert exit_lines(outcome()) == []

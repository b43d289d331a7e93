"""`emufuzz exec --engine kvm`: lines in, lines out, with what only a path has."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from emufuzz.case.json import case_from_obj, outcome_from_obj
from emufuzz.cli.exec import Executor, open_engine
from emufuzz.cli.main import run

CODE = {"limit": "0xffff", "type": 11, "s": 1, "p": 1}
DATA = {"limit": "0xffff", "type": 3, "s": 1, "p": 1}
#: MOV AX, [9000h] in real mode, where a device is.
MMIO: dict[str, Any] = {
    "id": "mmio", "mode": "real", "path": "ept-violation", "code": "a10090", "rip": "0x6000", "rflags": "0x2",
    "seg": {"cs": CODE, "ds": DATA},
    "devices": [{"kind": "mmio", "addr": "0x9000", "size": 64, "behaviour": "ram", "reads": "0102"}],
}  # fmt: skip


def answers(*cases: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """What comes back for the lines, and whether any of them was bad."""
    executor = Executor(open_engine("kvm", events=False), events=False)
    sink = io.BytesIO()
    source = io.BytesIO(b"".join(json.dumps(case).encode() + b"\n" for case in cases))
    code = executor.pump(source, sink)
    return [json.loads(line) for line in sink.getvalue().splitlines()], code != 0


def test_a_device_is_asked_and_the_instruction_goes_on() -> None:
    [outcome], bad = answers(MMIO)
    assert not bad
    assert (outcome["rc"], outcome["rip"], outcome["gpr"]["rax"]) == ("continue", "0x6003", "0x201")
    assert [item["reason"] for item in outcome["exits"]] == ["MMIO"]
    assert outcome["device_trace"] == [
        {"kind": "mmio", "addr": "0x9000", "size": 2, "direction": "read", "data": "0102"}
    ]


def test_an_exit_that_hardware_does_not_raise_is_an_outcome_that_says_why() -> None:
    case = {**MMIO, "code": "90"}
    [outcome], bad = answers(case)
    assert not bad
    assert outcome["no_exit"] == "the instruction accesses nothing that exits"
    assert (outcome["decode_rc"], outcome["rc"], outcome["rip"]) == ("failed", "unhandleable", "0x6000")
    assert not {"exits", "device_trace", "injected"} & outcome.keys()
    read = outcome_from_obj(outcome, case_from_obj(case))
    assert read.extra == {"no_exit": outcome["no_exit"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "path: the KVM model needs to know how it is entered"),
        (
            {"kvm": {"knobs": {"ept": False, "unrestricted_guest": True}}},
            "kvm.knobs: knob unrestricted_guest needs ept",
        ),
        ({"kvm": {"knobs": {"vpid": 1 << 16}}}, "kvm.knobs: "),
        ({"kvm": {"lapic": {"0x80": 1}}}, "kvm.lapic: needs the knob irqchip"),
        ({"kvm": {"memslots": [{"base": "0x1000", "size": 4096}] * 2}}, "kvm.memslots"),
        ({"kvm": {"cpuid": {"features": {"nonsense": True}}}}, "kvm.cpuid.features: "),
        ({"callbacks": [{"op": "get_dr"}]}, "callbacks"),
    ],
)
def test_a_machine_that_cannot_be_set_up_is_one_line(changes: dict[str, Any], message: str) -> None:
    case = {name: value for name, value in {**MMIO, **changes}.items() if value is not None}
    [answer], bad = answers(case)
    assert bad
    assert answer.keys() == {"line", "error"}
    assert answer["error"].startswith(message)


def test_shadow_paging_needs_tables_of_the_guest() -> None:
    case = {**MMIO, "mode": "prot32", "path": "shadow-pf", "cr0": "0x80000001", "cr3": "0x1000",
            "seg": {"cs": {**CODE, "db": 1}, "ds": DATA}}  # fmt: skip
    [answer], bad = answers(case)
    assert bad
    assert answer["error"].startswith("mem: shadow paging needs the guest's own tables")


def test_there_is_no_log_of_callbacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["exec", "--engine", "kvm", "--events"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "emufuzz: --events: the engine kvm logs no callbacks; emufuzz repro --trace shows its trace\n"
    )

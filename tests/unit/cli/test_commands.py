"""End-to-end runs of the real command line, in a fresh directory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "docs" / "examples" / "tzcnt-runs-as-bsf.json"
EMUFUZZ = [sys.executable, "-c", "from emufuzz.cli.main import main; main()"]
CS = '{"cs":{"limit":"0xffff","type":11,"s":1,"p":1}}'
NOP = f'{{"id":"nop","mode":"real","code":"90","rflags":"0x2","seg":{CS}}}'

Run = Callable[..., subprocess.CompletedProcess[bytes]]


def one_line(done: subprocess.CompletedProcess[bytes], code: int = 2) -> str:
    """The single line on stderr of a run that failed with `code`."""
    text = done.stderr.decode()
    assert (done.returncode, text.count("\n")) == (code, 1), text
    assert text.startswith("emufuzz: ")
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b" \n \n", "empty"),
        (bytes(range(256)) * 8, "not JSON"),
        (b"[1]", "expected a JSON object"),
        (b"[" * 100_000, "not"),
        (b"{}", "code: missing"),
        (b'{"code":5}', "code: "),
        (b'{"code":"90","gpr":{"rax":"0x1ffffffffffffffff"}}', "gpr.rax: "),
        (b'{"code":"90","surprise":1}', "surprise: unknown field"),
        (b'{"code":"90","mode":"prot128"}', "mode: "),
        (b'{"code":"90","path":"io"}', "path: "),
        (b'{"case":{"code":"90"},"expect":5}', "expect"),
        (b'{"case":{"code":"9"},"expect":{}}', "case.code: "),
        (b'{"case":{"code":"90"}}', "differences: "),
        (b'{"case":{"code":"90"},"differences":[{"field":1}]}', "differences: "),
    ],
)
def test_repro_says_in_one_line_what_is_wrong(run: Run, tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    message = one_line(run("repro", "bad.json"))
    assert message.startswith("emufuzz: bad.json")
    assert reason in message


def test_repro_names_missing_files_and_directories(run: Run, tmp_path: Path) -> None:
    assert "gone.json: no such file" in one_line(run("repro", "gone.json"))
    assert "a directory without .json and .jsonl files" in one_line(run("repro", tmp_path))


def test_a_line_of_100_mb_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "huge.json").write_bytes(b'{"code":"' + b"90" * 50_000_000 + b'"}\n')
    assert "huge.json:1: longer than 64 MiB" in one_line(run("repro", "huge.json"))


def test_repro_explains_a_known_quirk(run: Run) -> None:
    done = run("repro", EXAMPLE)
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert "tzcnt eax, ebx" in text
    assert "unicorn contradicts emulator on rax, rflags" in text
    assert "kvm-quirk-06" in text
    assert "\x1b" not in text


def test_repro_judges_vectors_by_the_recording(run: Run, tmp_path: Path) -> None:
    good = {"case": json.loads(NOP), "expect": {"rc": "continue", "length": 1, "rip": "0x1"}}
    lines = [good, {**good, "expect": {**good["expect"], "rip": "0x2"}}]
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    done = run("repro", "--json", "v.jsonl")
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1, done.stderr
    assert [(r["exit"], r["differences"]["recorded"]) for r in results] == [(0, []), (1, ["rip"])]
    assert results[1]["where"] == "v.jsonl:2"


def test_repro_of_findings_tells_same_gone_and_different(run: Run, tmp_path: Path) -> None:
    assert run("fuzz", "--cases", "4096", "--seed-bug", seed_bug(run), "--out", "c").returncode == 1
    path = min((tmp_path / "c" / "findings").iterdir())
    finding = json.loads(path.read_text())
    done = run("repro", path)
    assert done.returncode == 1  # the bug is seeded again
    assert b"the same disagreement as recorded" in done.stdout
    versions = {name: value for name, value in finding["versions"].items() if name != "seed_bug"}
    (tmp_path / "right.json").write_text(json.dumps({**finding, "versions": versions}))
    assert run("repro", "right.json").returncode == 0
    case = dict(json.loads(EXAMPLE.read_text()))
    (tmp_path / "gone.json").write_text(json.dumps({**finding, "case": case}))
    done = run("repro", "gone.json")
    assert done.returncode == 0
    assert b"no longer a finding" in done.stdout


def test_repro_of_directories_in_one_line_each(run: Run, tmp_path: Path) -> None:
    begin = ("fuzz", "--cases", "4096", "--oracles", "unicorn", "--seed-bug", seed_bug(run), "--out", "c")
    assert run(*begin).returncode == 1
    files = sorted(path.name for path in (tmp_path / "c" / "findings").iterdir())
    done = run("repro", "--brief", "c")
    assert done.returncode == 1
    lines = done.stdout.decode().splitlines()
    same = "the same disagreement as recorded"
    assert lines == [*(f"c/findings/{name}: {same}" for name in files), f"{len(files)} in disagreement"]
    (tmp_path / "more" / "below").mkdir(parents=True)
    (tmp_path / "more" / "bad.json").write_text("{")
    (tmp_path / "more" / "below" / "good.json").write_text(EXAMPLE.read_text())
    (tmp_path / "more" / "notes.txt").write_text("no case")
    done = run("repro", "--brief", "more")
    assert done.returncode == 2
    assert done.stdout.decode().splitlines()[-1] == "1 without disagreement, 1 not readable"
    assert len(done.stderr.splitlines()) == 1
    (tmp_path / "empty").mkdir()
    assert "without .json and .jsonl files" in one_line(run("repro", "empty"))


def seed_bug(run: Run) -> str:
    """The name of the first bug that campaigns can seed."""
    return run("fuzz", "--seed-bug", "list").stdout.split()[0].decode()


@pytest.mark.parametrize("engine", ["emulator", "unicorn"])
def test_exec_answers_every_line_in_its_place(run: Run, engine: str) -> None:
    lines = [
        NOP,
        "",
        "junk",
        '{"code":"90","path":"io"}',
        '{"code":"90","path":"task-switch"}',
        NOP.replace("nop", "b"),
    ]
    done = run("exec", "--engine", engine, data="\n".join(lines).encode())
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 2
    assert [answer.get("id", answer.get("line")) for answer in answers] == ["nop", 3, 4, 5, "b"]
    assert answers[0]["rip"] == "0x1"
    assert "events" not in answers[0]
    assert "path" in answers[2]["error"]
    assert "path" in answers[3]["error"]


def test_exec_of_nothing_gives_nothing(run: Run) -> None:
    done = run("exec", "--engine", "emulator")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_exec_bounds_lines(run: Run) -> None:
    done = run("exec", "--engine", "emulator", data=b"x" * 100_000_000 + b"\n" + NOP.encode())
    first, second = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 2
    assert (first["line"], "longer than" in first["error"], second["id"]) == (1, True, "nop")


def test_exec_answers_before_the_input_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [*EMUFUZZ, "exec", "--engine", "emulator"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for name in ("one", "two"):
            process.stdin.write(NOP.replace("nop", name).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == name
        process.stdin.close()
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--modes", "prot128"), "prot128"),
        (("--seconds", "-1"), "-1"),
        (("--seconds", "nan"), "--seconds"),
        (("--cases", "-5"), "-5"),
        (("--seconds", "x"), "--seconds"),
        (("--cases", "10", "--out", "/proc/nowhere"), "/proc/nowhere"),
        (("--cases", "10", "--out", "file/below"), "file"),
        (("--cases", "10", "--out", "file"), "file"),
        (("--frobnicate",), "--frobnicate"),
    ],
)
def test_fuzz_says_in_one_line_what_is_wrong(
    run: Run, tmp_path: Path, args: tuple[str, ...], reason: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert reason in one_line(run("fuzz", *args))


def test_unknown_commands_engines_and_families(run: Run) -> None:
    assert "frob" in one_line(run("frob"))
    assert "frob" in one_line(run("exec", "--engine", "frob"))
    assert "nonsense" in one_line(run("vectors", "check", "--family", "nonsense"))
    assert "gone.zst" in one_line(run("vectors", "check", "gone.zst"))


def test_version_help_and_schema(run: Run) -> None:
    assert run("--version").stdout.startswith(b"emufuzz ")
    for name in ("fuzz", "repro", "exec", "vectors", "schema", "bench"):
        assert name.encode() in run("--help").stdout
    assert json.loads(run("schema", "case").stdout)["title"] == "Case"
    assert set(json.loads(run("schema").stdout)["$defs"]) == {"case", "outcome", "expect"}


def test_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with subprocess.Popen([*EMUFUZZ, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(20) == 141
        assert process.stderr.read() == b""

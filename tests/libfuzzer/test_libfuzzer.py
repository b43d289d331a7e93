"""libFuzzer through atheris: whole runs. They need the extra `atheris`, which .ci/run installs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TARGETS = Path(__file__).parents[2] / "fuzz"
MAIN = "from emufuzz.cli.main import main; main()"
ATHERIS = (
    "fuzz",
    "--oracles",
    "unicorn",
    "--generator",
    "atheris",
    "--workers",
    "1",
    "--out",
    "c",
    "--no-shrink",
)

pytest.importorskip("atheris", reason="the extra atheris is not installed; .ci/run runs these tests with it")


def python(tmp_path, *args, **env):
    return subprocess.run(
        [sys.executable, *args], cwd=tmp_path, capture_output=True, text=True, timeout=550, check=False,
        env={**os.environ, **env},
    )  # fmt: skip


def emufuzz(tmp_path, *args):
    return python(tmp_path, "-c", MAIN, *args)


def test_emulator_and_kvm_are_instrumented(tmp_path):
    code = "import json; from emufuzz.fuzz.libfuzzer.instrument import *; print(json.dumps(instrument()))"
    done = python(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["emufuzz.emulator"] > 150
    assert counts["emufuzz.kvm"] > 400


def test_a_module_that_was_loaded_before_is_an_error(tmp_path):
    code = (
        "import emufuzz.emulator.decode\n"
        "from emufuzz.fuzz.libfuzzer.instrument import *\n"
        "try:\n    instrument()\nexcept InstrumentationError as error:\n    print(error)\n"
    )
    done = python(tmp_path, "-c", code)
    assert done.stdout.startswith("emufuzz.emulator."), done.stderr
    assert "functions is instrumented" in done.stdout


def test_a_campaign_is_accounted_for_and_leaves_a_corpus(tmp_path):
    done = emufuzz(tmp_path, *ATHERIS, "--cases", "600")
    assert done.returncode in {0, 1}, done.stderr
    assert "600 cases = " in done.stdout
    assert "processor time of this run: " in done.stdout
    assert len(list((tmp_path / "c" / "corpus").iterdir())) > 100
    more = emufuzz(
        tmp_path, "fuzz", "--resume", "--cases", "700", "--workers", "1", "--out", "c", "--no-shrink"
    )
    assert "700 cases = " in more.stdout, more.stderr


def test_a_seeded_bug_is_found(tmp_path):
    done = emufuzz(tmp_path, *ATHERIS, "--cases", "700", "--seed-bug", "adc-carry", "--modes", "prot64")
    assert done.returncode == 1, done.stdout + done.stderr
    assert list((tmp_path / "c" / "findings").glob("*-prot64-*.json"))


def test_options_that_do_not_go_with_it_are_refused(tmp_path):
    done = emufuzz(tmp_path, "fuzz", "--cases", "10", "--corpus", "x", "--out", "c")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "emufuzz: --corpus: goes with --generator atheris only\n"
    done = emufuzz(tmp_path, "fuzz", "--generator", "atheris", "--workers", "ray", "--out", "c")
    assert done.returncode == 2
    assert done.stderr.startswith("emufuzz: --workers: libFuzzer runs on this machine only")
    assert not (tmp_path / "c").exists()


def test_ctrl_c_ends_in_order(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *ATHERIS, "--cases", "100000"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not list((tmp_path / "c" / "corpus").glob("*")):
        time.sleep(0.5)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode in {0, 1}, err
    assert "stopped: " in out
    left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True, check=False)
    assert left.stdout == ""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    done = python(folder, str(TARGETS / "make_seeds.py"), str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["fuzz_emulator", "fuzz_kvm", "fuzz_formats"])
def test_targets_run(tmp_path, seeds, name):
    target, corpus = str(TARGETS / f"{name}.py"), str(seeds / name)
    done = python(tmp_path, target, corpus, "-runs=650", "-seed=1", EMUFUZZ_FINDINGS="found")
    assert done.returncode == 0, done.stderr[-3000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None
    assert int(runs[1]) >= 650  # at the least each seed is run
    assert " cov: " in done.stderr


def test_a_finding_of_a_target_is_an_exception(tmp_path, seeds):
    code = (
        "import runpy, sys; from emufuzz.fuzz.libfuzzer.instrument import instrument; instrument()\n"
        "from emufuzz.fuzz.bugs import seeded_bug\n"
        f"sys.argv = ['fuzz_emulator', {str(seeds / 'fuzz_emulator')!r}, '-runs=600']\n"
        "from emufuzz.fuzz.config import CampaignConfig\n"
        "from emufuzz.fuzz.libfuzzer.plain import run_judged\n"
        "with seeded_bug('adc-carry'):\n    run_judged(sys.argv, CampaignConfig())\n"
    )
    done = python(tmp_path, "-c", code)
    assert done.returncode not in {0, 1}
    assert "FindingError: " in done.stdout + done.stderr

"""The files that OSS-Fuzz and ClusterFuzzLite read, as far as they can be looked at without their images."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = sorted((ROOT / "fuzz").glob("fuzz_*.py"))


def fields(path):
    """The fields of a plain YAML file: `key: value` and `key:` with a list of `- value`."""
    found, key = {}, ""
    for line in path.read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if line.startswith("  - "):
            found[key].append(line[4:].strip())
            continue
        key, value = re.fullmatch(r"(\w+):(?: (.+))?", line).groups()
        found[key] = value.strip('"') if value else []
    return found


def test_project_files_name_what_is_required():
    assert fields(ROOT / ".clusterfuzzlite" / "project.yaml") == {"language": "python"}
    project = fields(ROOT / "oss-fuzz" / "project.yaml")
    assert project["language"] == "python"
    assert project["fuzzing_engines"] == ["libfuzzer"]
    assert project["sanitizers"] == ["address", "undefined"]
    assert {"homepage", "main_repo", "primary_contact"} <= project.keys()


@pytest.mark.parametrize("script", ["fuzz/build.sh", "oss-fuzz/build.sh", ".clusterfuzzlite/build.sh"])
def test_build_scripts_are_shell(script):
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("folder", ["oss-fuzz", ".clusterfuzzlite"])
def test_images_hold_the_checkout_where_the_build_looks_for_it(folder):
    lines = (ROOT / folder / "Dockerfile").read_text().splitlines()
    assert lines[0] == "FROM gcr.io/oss-fuzz-base/base-builder-python"
    assert "WORKDIR $SRC/emufuzz" in lines
    assert any(line.endswith("build.sh $SRC/build.sh") for line in lines)
    assert '"$SRC/emufuzz/fuzz/build.sh"' in (ROOT / folder / "build.sh").read_text()


def test_there_are_targets():
    assert [path.stem for path in TARGETS] == ["fuzz_emulator", "fuzz_formats", "fuzz_kvm"]


@pytest.mark.parametrize("target", TARGETS, ids=lambda path: path.stem)
def test_a_target_instruments_before_it_loads_anything(target):
    imports = re.findall(r"^(?:from|import) (\S+)|^(instrument\()", target.read_text(), re.MULTILINE)
    names = [name or "instrument" for name, _ in imports]
    before = names[: names.index("instrument")]
    assert before == ["sys", "emufuzz.fuzz.libfuzzer.instrument"]


def test_the_build_makes_every_target_with_a_stand_in_for_the_image(tmp_path):
    """Runs fuzz/build.sh with stand-ins for pip, the packer and zip."""
    out, bin_ = tmp_path / "out", tmp_path / "bin"
    out.mkdir()
    bin_.mkdir()
    log = tmp_path / "log"
    for name in ("compile_python_fuzzer", "python3", "zip"):
        script = bin_ / name
        seeds = '[ "$1" = fuzz/make_seeds.py ] && mkdir "$2/fuzz_x"'
        script.write_text(f'#!/bin/sh\necho "{name} $@" >> {log}\n{seeds}\nexit 0\n')
        script.chmod(0o755)
    env = {"PATH": f"{bin_}:/usr/bin:/bin", "OUT": str(out)}
    subprocess.run([str(ROOT / "fuzz" / "build.sh")], check=True, env=env, cwd=tmp_path)
    lines = log.read_text().splitlines()
    compiled = [line.split()[1] for line in lines if line.startswith("compile_python_fuzzer")]
    assert compiled == [f"fuzz/{path.name}" for path in TARGETS]
    assert lines[0] == "python3 -m pip install ."
    assert f"zip -q -r {out}/fuzz_x_seed_corpus.zip ." in lines

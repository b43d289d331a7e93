"""Fuzz targets without a campaign, for hosts that run libFuzzer themselves. Loads the emulator.

A finding is an exception, which is what such hosts know. With the environment variable EMUFUZZ_FINDINGS
findings become files in the directory that it names, the first one of each bucket, and the run goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from emufuzz.case.codec import decode_case, encode_case
from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_from_json, case_to_json
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.files import write_atomically
from emufuzz.fuzz.finding import Finding
from emufuzz.fuzz.finding_json import encode, finding_to_obj
from emufuzz.fuzz.libfuzzer.child import MAX_LEN
from emufuzz.fuzz.libfuzzer.instrument import load_atheris
from emufuzz.fuzz.libfuzzer.mutators import Mutators
from emufuzz.fuzz.libfuzzer.target import Target, scope_of
from emufuzz.fuzz.loop import CampaignLoop

FINDINGS_VARIABLE: Final = "EMUFUZZ_FINDINGS"


class FindingError(AssertionError):
    """A case on which the subject and Unicorn disagree, or that one of them does not survive."""


class JudgedTarget:
    """A subject against Unicorn."""

    def __init__(self, config: CampaignConfig, findings: Path | None) -> None:
        setup = config.setup()
        self._findings = findings
        self._versions: dict[str, str] = {}
        self._target = Target(CampaignLoop(setup.make_subject(), setup.make_oracle()), scope_of(setup))
        self.scope = scope_of(setup)
        self._executed = 0

    def __call__(self, data: bytes) -> None:
        """Run the case that `data` stands for.

        Raises:
            FindingError: It is a finding, and findings are not kept in files.
        """
        target = self._target
        target.begin(0)
        target.run(target.decoded(data), self._executed)
        self._executed += 1
        for finding in target.result.findings:
            self._keep(finding)

    def _keep(self, finding: Finding) -> None:
        differences = "; ".join(f"{d.field}: {d.subject} not {d.oracle}" for d in finding.differences[:3])
        if self._findings is None:
            raise FindingError(f"{finding.bucket.name}: {finding.sentence}: {differences}")
        path = self._findings / f"{finding.bucket.name}.json"
        if not path.exists():
            write_atomically(path, encode(finding_to_obj(finding, self._versions)))
        self._target.loop.known |= {finding.bucket}


def check_formats(data: bytes) -> None:
    """Bytes as an encoded case, and as JSON: what is read is written and read again as the same.

    Raises:
        AssertionError: It is not.
    """
    case = decode_case(data)
    if case_from_json(case_to_json(case)) != case:
        raise AssertionError("a decoded case is not the same after a way through JSON")
    if decode_case(encode_case(case)) != case:
        raise AssertionError("a decoded case is not the same after it was encoded")
    try:
        read = case_from_json(data)
    except CaseError:
        return  # most bytes are no JSON of a case; that they are refused, and how, is what is tested
    if decode_case(encode_case(read)) != read:
        raise AssertionError("a case in JSON is not the same after it was encoded")


def run_judged(arguments: list[str], config: CampaignConfig) -> None:
    """Hand the process to libFuzzer, with a subject against Unicorn."""
    where = os.environ.get(FINDINGS_VARIABLE)
    findings = None if where is None else Path(where)
    if findings is not None:
        findings.mkdir(parents=True, exist_ok=True)
    target = JudgedTarget(config, findings)
    mutators = Mutators(target.scope, lambda data, longest: bytes(load_atheris().Mutate(data, longest)))
    run(arguments, target, mutators)


def run(arguments: list[str], target: Callable[[bytes], None], mutators: Mutators | None = None) -> None:
    """Hand the process to libFuzzer; `arguments` are those of its command line, the program's name first."""
    atheris = load_atheris()
    changes = {} if mutators is None else {
        "custom_mutator": mutators.mutate, "custom_crossover": mutators.crossover,
    }  # fmt: skip
    if not any(argument.startswith("-max_len=") for argument in arguments):
        arguments = [*arguments, f"-max_len={MAX_LEN}"]
    atheris.Setup(arguments, target, **changes)
    atheris.Fuzz()

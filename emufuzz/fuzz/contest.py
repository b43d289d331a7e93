"""Generators held against each other: what each reaches in the same time of the processor.

Time is that of this process, as a machine may be busy. What a run reached is counted afterwards, at
nobody's expense: cells, verdicts, seeded bugs, and the arcs of cases that feedback would have looked at and
of some more that were the first of their cell.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import msgspec

from emufuzz.case.model import Case
from emufuzz.emulator.opcode import leaves
from emufuzz.emulator.tables import ONE_BYTE, THREE_BYTE, TWO_BYTE
from emufuzz.fuzz.accounting import BatchResult, Totals, is_implemented
from emufuzz.fuzz.bugs import BUGS, seeded_bug
from emufuzz.fuzz.campaign import Campaign, Limits
from emufuzz.fuzz.cells import CellKey
from emufuzz.fuzz.config import ATHERIS, GUIDED, CampaignConfig, ConfigError
from emufuzz.fuzz.guided.arcs import arcs_of
from emufuzz.fuzz.guided.epochs import epoch_of
from emufuzz.fuzz.guided.feedback import candidates
from emufuzz.fuzz.guided.guide import Guide
from emufuzz.fuzz.kvm.generate import generator_of
from emufuzz.fuzz.libfuzzer.corpus import read_cases
from emufuzz.fuzz.libfuzzer.pool import FuzzerPool
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.schedule import BATCH_SIZE
from emufuzz.fuzz.tasks import Done, Failure, Pool

#: New cells per batch whose first cases are looked at afterwards.
_LOOKED_AT: Final = 32
_QUIRK: Final = "kvm-quirk-"
#: Arcs have smaller numbers than other features.
_ARCS: Final = 1 << 61


class Score(msgspec.Struct):
    """What one run came to.

    Attributes:
        generator, subject, seed: What ran.
        seconds: Time of the processor that generating, running, judging and feedback took.
        cases: How many cases that were.
        covered: (implemented leaf, mode) pairs.
        cells: Cells with implemented leaves.
        arcs: Line arcs of emulator/ and kvm/.
        quirks: Known quirks of KVM that came up.
        reasons: Reasons of skips, quirks among them.
        results: (exit path, result) pairs.
        bugs: Seeded bugs that were found; all of them are there at once.
        findings: Other buckets of findings.
    """

    generator: str
    subject: str
    seed: int
    seconds: float = 0.0
    cases: int = 0
    covered: int = 0
    cells: int = 0
    arcs: int = 0
    quirks: int = 0
    reasons: int = 0
    results: int = 0
    bugs: int = 0
    findings: int = 0


def contest(config: CampaignConfig, seconds: float, *, bugs: bool = False) -> Score:
    """Run one generator for so many seconds of the processor; with `bugs` all seeded bugs are there.

    Raises:
        ConfigError: libFuzzer with seeded bugs.
        OracleUnavailableError: Unicorn, or libFuzzer, cannot work here.
    """
    if bugs and config.generator == ATHERIS:
        raise ConfigError("generator: libFuzzer's processes have one seeded bug at most")
    with ExitStack() as stack:
        for name in BUGS if bugs else ():
            stack.enter_context(seeded_bug(name))
        return _libfuzzer(config, seconds) if config.generator == ATHERIS else _Run(config).run(seconds)


class _Run:
    """One run, in this process."""

    def __init__(self, config: CampaignConfig) -> None:
        self._config = config
        self._setup = config.setup()
        self._loop = CampaignLoop(self._setup.make_subject(), self._setup.make_oracle())
        self._guide = Guide(config.seed, self._setup.options)
        self._totals = Totals()
        self._cells: set[CellKey] = set()
        self._known: set[int] = set()
        self._arcs: set[int] = set()

    def run(self, seconds: float) -> Score:
        """Batches until the time is up, and what they came to."""
        config = self._config
        spent, number = 0.0, 0
        while spent < seconds:
            spent += self._batch(number)
            number += 1
        score = Score(config.generator, config.subject, config.seed, round(spent, 2))
        score.arcs = len(self._arcs | {feature for feature in self._known if feature < _ARCS})
        count_totals(score, self._totals, self._cells)
        self._loop.oracle.close()
        return score

    def _batch(self, number: int) -> float:
        """Seconds of the processor that a batch takes."""
        start = time.process_time()
        cases = self._cases(number)
        result = self._loop.run_batch(number, cases)
        fed = self._config.generator == GUIDED
        if fed:
            known = self._guide.snapshot(epoch_of(number)).known
            result.candidates = candidates(self._loop.subject, cases, result, known)
        spent = time.process_time() - start
        self._look(cases, result)
        start = time.process_time()
        self._totals.merge(result)
        self._cells.update(result.cells)
        if fed:
            self._guide.merge(result, whole=True)
        return spent + time.process_time() - start

    def _cases(self, number: int) -> list[Case]:
        if self._config.generator == GUIDED:
            return self._guide.generator(number).cases(BATCH_SIZE)
        return generator_of(self._setup.seed, number, self._setup.options).cases(BATCH_SIZE)

    def _look(self, cases: list[Case], result: BatchResult) -> None:
        """Arcs, as a campaign that only wants to know them would find them; nobody pays for that."""
        found = candidates(self._loop.subject, cases, result, frozenset(self._known))
        self._known.update(feature for one in found for feature in one.features)
        new = [tally.index for cell, tally in result.cells.items() if cell not in self._cells]
        for index in new[:: max(1, len(new) // _LOOKED_AT)]:
            self._arcs |= arcs_of(self._loop.subject, cases[index])


def count_totals(score: Score, totals: Totals, cells: Iterable[CellKey]) -> None:
    """What a run's accounting says, and the cells that it was in."""
    score.cases, score.covered = totals.cases, totals.covered()
    score.cells = sum(is_implemented(leaf) for leaf, *_ in cells)
    score.quirks = sum(reason.startswith(_QUIRK) for reason in totals.skipped)
    score.reasons, score.results = len(totals.skipped), len(totals.results)
    bugs = _bug_by_leaf()
    score.bugs = len({bugs[bucket.leaf] for bucket in totals.bucket_cases if bucket.leaf in bugs})
    score.findings = sum(bucket.leaf not in bugs for bucket in totals.bucket_cases)


def _libfuzzer(config: CampaignConfig, seconds: float) -> Score:
    """A campaign of one process of libFuzzer, in which nobody pays for importing and instrumenting."""
    setup, cells = config.setup(), set[CellKey]()

    def note(said: Done | Failure) -> None:
        if isinstance(said, Done) and isinstance(said.value, BatchResult):
            cells.update(said.value.cells)

    with TemporaryDirectory(prefix="emufuzz-") as directory:
        pool = FuzzerPool(setup, 1, Path(directory))
        campaign = Campaign(setup, Limits(), pool)
        campaign.on_said = note
        clock = _ChildClock(seconds)
        with suppress(KeyboardInterrupt):
            campaign.run(lambda running: clock.look(pool, running.totals.cases))
        cases = list(read_cases(Path(directory)))
    subject, arcs = setup.make_subject(), set[int]()
    for case in cases:
        arcs |= arcs_of(subject, case)
    score = Score(config.generator, config.subject, config.seed, round(clock.spent, 2), arcs=len(arcs))
    count_totals(score, campaign.totals, cells)
    return score


class _ChildClock:
    """Time of the processor that the pool's processes take, from their first account on."""

    def __init__(self, seconds: float) -> None:
        self._limit = seconds
        self._began: float | None = None
        self._by_pid: dict[str, float] = {}
        self.spent = 0.0

    def look(self, pool: Pool, cases: int) -> None:
        """Stop the campaign with a KeyboardInterrupt when the time is up."""
        for state in pool.states():
            self._by_pid[state.name] = max(self._by_pid.get(state.name, 0.0), _seconds_of(state.name))
        total = sum(self._by_pid.values())
        if self._began is None and cases:
            self._began = total
        if self._began is not None:
            self.spent = total - self._began
        if self.spent >= self._limit:
            raise KeyboardInterrupt


def _seconds_of(pid: str) -> float:
    """User and system time of a process; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _bug_by_leaf() -> dict[str, str]:
    """Leaf -> the seeded bug that it has."""
    by_mnemonic = {mnemonic: name for name, bug in BUGS.items() for mnemonic in bug.mnemonics}
    return {
        opcode.leaf: by_mnemonic[opcode.mnemonic]
        for table in (ONE_BYTE, TWO_BYTE, THREE_BYTE)
        for opcode in leaves(table)
        if opcode.mnemonic in by_mnemonic
    }

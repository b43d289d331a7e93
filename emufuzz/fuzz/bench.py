"""What a case costs: raw Unicorn, the oracle, the emulator, whole campaigns and all oracles, taking turns.

One register state per instruction, so that nothing hides the cost of translation. Each round
takes new cases and times every part on them; the medians over the rounds are reported. Rounds
are short, so that a slow phase of the machine hits all parts alike, and ratios stay true.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from statistics import median
from typing import Any, Final

from emufuzz.case.model import Case
from emufuzz.fuzz.accounting import BatchResult
from emufuzz.fuzz.collector import rare_collections
from emufuzz.fuzz.engines import make_subject
from emufuzz.fuzz.generate import Options, generate_batch
from emufuzz.fuzz.guided.epochs import epoch_of
from emufuzz.fuzz.guided.feedback import candidates
from emufuzz.fuzz.guided.guide import Guide
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.registry import open_oracle
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.oracle.unicorn.prefixes import unicorn_must_not_run
from emufuzz.subject.base import Subject

BATCH: Final = 2048
MIN_ROUNDS: Final = 5
_RATIOS: Final = (
    ("oracle", "raw_emu_start"), ("emulator", "oracle"), ("campaign", "oracle"), ("guided", "unfed"),
    ("guided", "campaign"), ("panel", "campaign"),
)  # fmt: skip
_WARM_UP: Final = 2  # rounds that fill caches and are not counted


class BenchResult:
    """Microseconds per case of each part, one value per round."""

    def __init__(self) -> None:
        self.rounds: dict[str, list[float]] = {
            name: []
            for name in (
                "raw_emu_start", "oracle", "emulator", "generate", "campaign", "panel", "guided", "unfed",
            )
        }  # fmt: skip
        #: Oracles of the panel beside Unicorn.
        self.others: tuple[str, ...] = ()

    def add(self, name: str, seconds: float, cases: int) -> None:
        """Note one measurement."""
        self.rounds[name].append(seconds * 1e6 / cases)

    def medians(self) -> dict[str, float]:
        """The median of each part in microseconds per case."""
        return {name: median(values) for name, values in self.rounds.items()}

    def ratio(self, part: str, base: str) -> float:
        """Median over the rounds of one part's time relative to another's in the same round."""
        pairs = zip(self.rounds[part], self.rounds[base], strict=True)
        return median([a / b for a, b in pairs])

    def to_json(self) -> dict[str, Any]:
        """Medians and ratios, as `emufuzz bench --json` prints them."""
        times = {f"{name}_us": round(value, 3) for name, value in self.medians().items()}
        ratios = {
            f"{part}_over_{base.removesuffix('_emu_start')}": round(self.ratio(part, base), 3)
            for part, base in _RATIOS
        }
        return {
            **times,
            **ratios,
            "panel": list(self.others),
            "rounds": len(self.rounds["oracle"]),
            "cases_per_round": BATCH,
            "states_per_instruction": 1,
        }

    def lines(self) -> list[str]:
        """Medians and ratios for people."""
        times = self.medians()
        what = {
            "raw_emu_start": "uc_emu_start alone, called through ctypes",
            "oracle": "the Unicorn oracle: state in, run, state and memory out",
            "emulator": "the port of KVM's emulator",
            "generate": "generating a case",
            "campaign": "generate + emulator + oracle + compare",
            "panel": f"the same with all oracles: {', '.join(self.others) or 'none'} beside Unicorn",
            "guided": "campaign with a guided generator and its feedback",
            "unfed": "guided without looking for feedback",
        }
        lines = [f"{name:<14} {times[name]:8.2f} us/case  {text}" for name, text in what.items()]
        lines.append("")
        for part, base in _RATIOS:
            lines.append(f"{part} / {base} = {self.ratio(part, base):.2f}")
        rounds = len(self.rounds["oracle"])
        lines.append(f"medians of {rounds} rounds of {BATCH} cases, one state per instruction")
        return lines


def run_bench(seed: int, seconds: float, others: Sequence[str] = ()) -> BenchResult:
    """Measure for about `seconds`, at least MIN_ROUNDS rounds.

    Args:
        seed: Seed of the generated cases.
        seconds: How long.
        others: The oracles that a panel has beside Unicorn.

    Raises:
        OracleUnavailableError: An oracle cannot work here.
    """
    with ExitStack() as stack:
        oracle = stack.enter_context(closing(UnicornOracle()))
        guided = stack.enter_context(closing(UnicornOracle()))  # its many states would fill the caches of one
        panel = [stack.enter_context(closing(open_oracle(name))) for name in others]
        stack.enter_context(rare_collections())
        subject, options = make_subject(), Options(states=1)
        whole = _Whole(subject, oracle, panel, seed, options)
        return _rounds(subject, oracle, whole, _Guided(CampaignLoop(subject, guided), seed, options), seconds)


def _rounds(
    subject: Subject, oracle: UnicornOracle, whole: _Whole, guided: _Guided, seconds: float
) -> BenchResult:
    result = BenchResult()
    result.others = whole.others
    end = time.perf_counter() + seconds
    number = 0
    while number < _WARM_UP + MIN_ROUNDS or time.perf_counter() < end:
        measured = BenchResult() if number < _WARM_UP else result
        gc.collect()  # once: between the parts it would leave nothing in the processor's caches
        batch = _fast_cases(oracle, whole.generated(2 * number))
        result_of = _parts(oracle, subject.run, batch)
        # The order of the parts rotates, so that none always profits from what the one before warmed.
        turn = number % len(result_of)
        for name, measure in [*result_of[turn:], *result_of[:turn]]:
            measured.add(name, measure(), len(batch))
        whole.measure(2 * number + 1, measured)
        guided.measure(number, measured)
        number += 1
    return result


def _fast_cases(oracle: UnicornOracle, cases: Sequence[Case]) -> list[Case]:
    """The cases of which raw starts can be measured: those that Unicorn runs as they are.

    About one in a hundred needs the oracle's exact mode, or is never run; a campaign has them all.
    """
    chosen = []
    for case in cases:
        before = oracle.exact_runs
        if not unicorn_must_not_run(case.code, case.mode):
            oracle.run([case])
            if oracle.exact_runs == before:
                chosen.append(case)
    return chosen


def _parts(
    oracle: UnicornOracle, emulate: Callable[[Sequence[Case]], object], batch: Sequence[Case]
) -> list[tuple[str, Callable[[], float]]]:
    return [
        ("raw_emu_start", lambda: oracle.raw_starts(batch)),
        ("oracle", lambda: _cold_run(oracle, batch)),
        ("emulator", lambda: _timed(lambda: emulate(batch))),
    ]


def _cold_run(oracle: UnicornOracle, batch: Sequence[Case]) -> float:
    """Seconds of the oracle with nothing translated that an earlier part of the round may have left."""
    oracle.forget_translations()
    return _timed(lambda: oracle.run(batch))


class _Whole:
    """Campaigns of one worker, with Unicorn alone and with a panel, batch by batch."""

    def __init__(
        self, subject: Subject, oracle: UnicornOracle, others: Sequence[Oracle], seed: int, options: Options
    ) -> None:
        self._oracle = oracle
        self._campaign = CampaignLoop(subject, oracle)
        self._panel = CampaignLoop(subject, oracle, others=others)
        self.others = tuple(other.name for other in others)
        self._seed = seed
        self._options = options

    def generated(self, number: int) -> list[Case]:
        """The cases of a batch."""
        return generate_batch(self._seed, number, BATCH, self._options)

    def measure(self, number: int, result: BenchResult) -> None:
        """Time a batch from generating it to comparing it: what a worker does per batch."""
        batch: list[Case] = []
        generating = _timed(lambda: batch.extend(self.generated(number)))
        result.add("generate", generating, BATCH)
        for name, loop in ("campaign", self._campaign), ("panel", self._panel):
            self._oracle.forget_translations()
            result.add(name, generating + _timed(partial(loop.run_batch, number, batch)), BATCH)


class _Guided:
    """A guided campaign of one worker, batch by batch."""

    def __init__(self, loop: CampaignLoop, seed: int, options: Options) -> None:
        self._loop = loop
        self._guide = Guide(seed, options)

    def measure(self, number: int, result: BenchResult) -> None:
        """Time a batch with its feedback, and what it takes without; then merge it as the driver does."""
        cases: list[Case] = []
        done: list[BatchResult] = []
        generator, known = self._guide.generator(number), self._guide.snapshot(epoch_of(number)).known
        generating = _timed(lambda: cases.extend(generator.cases(BATCH)))
        running = _timed(lambda: done.append(self._loop.run_batch(number, cases)))
        [batch] = done
        subject = self._loop.subject
        feeding = _timed(lambda: batch.candidates.extend(candidates(subject, cases, batch, known)))
        result.add("unfed", generating + running, BATCH)
        result.add("guided", generating + running + feeding, BATCH)
        self._guide.merge(batch, whole=True)


def _timed(run: Callable[[], object]) -> float:
    """Seconds that `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start

"""What a case costs: raw Unicorn, the oracle, the emulator, whole campaigns, taking turns.

One register state per instruction, so that nothing hides the cost of translation. Each round
takes new cases and times every part on them; the medians over the rounds are reported. Rounds
are short, so that a slow phase of the machine hits all parts alike, and ratios stay true.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Final

from emufuzz.case.model import Case
from emufuzz.fuzz.accounting import BatchResult
from emufuzz.fuzz.engines import make_subject
from emufuzz.fuzz.generate import Options, generate_batch
from emufuzz.fuzz.guided.epochs import epoch_of
from emufuzz.fuzz.guided.feedback import candidates
from emufuzz.fuzz.guided.guide import Guide
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.oracle.unicorn.prefixes import unicorn_must_not_run

BATCH: Final = 2048
MIN_ROUNDS: Final = 5
_RATIOS: Final = (
    ("oracle", "raw_emu_start"), ("emulator", "oracle"), ("campaign", "oracle"), ("guided", "unfed"),
    ("guided", "campaign"),
)  # fmt: skip
_WARM_UP: Final = 2  # rounds that fill caches and are not counted


class BenchResult:
    """Microseconds per case of each part, one value per round."""

    def __init__(self) -> None:
        self.rounds: dict[str, list[float]] = {
            name: []
            for name in ("raw_emu_start", "oracle", "emulator", "generate", "campaign", "guided", "unfed")
        }

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
            "oracle_over_raw": round(self.ratio("oracle", "raw_emu_start"), 3),
            "emulator_over_oracle": round(self.ratio("emulator", "oracle"), 3),
            "campaign_over_oracle": round(self.ratio("campaign", "oracle"), 3),
            "guided_over_unfed": round(self.ratio("guided", "unfed"), 3),
            "guided_over_campaign": round(self.ratio("guided", "campaign"), 3),
        }
        rounds = len(self.rounds["oracle"])
        return {**times, **ratios, "rounds": rounds, "cases_per_round": BATCH, "states_per_instruction": 1}

    def lines(self) -> list[str]:
        """Medians and ratios for people."""
        times = self.medians()
        what = {
            "raw_emu_start": "uc_emu_start alone, called through ctypes",
            "oracle": "the Unicorn oracle: state in, run, state and memory out",
            "emulator": "the port of KVM's emulator",
            "generate": "generating a case",
            "campaign": "generate + emulator + oracle + compare",
            "guided": "the same with a guided generator and its feedback",
            "unfed": "guided without looking for feedback",
        }
        lines = [f"{name:<14} {times[name]:8.2f} us/case  {text}" for name, text in what.items()]
        lines.append("")
        for part, base in _RATIOS:
            lines.append(f"{part} / {base} = {self.ratio(part, base):.2f}")
        rounds = len(self.rounds["oracle"])
        lines.append(f"medians of {rounds} rounds of {BATCH} cases, one state per instruction")
        return lines


def run_bench(seed: int, seconds: float) -> BenchResult:
    """Measure for about `seconds`, at least MIN_ROUNDS rounds.

    Raises:
        OracleUnavailableError: Unicorn cannot work here.
    """
    oracle = UnicornOracle()
    subject = make_subject()
    loop = CampaignLoop(subject, oracle)
    options = Options(states=1)
    guided = _Guided(loop, seed, options)
    result = BenchResult()
    end = time.perf_counter() + seconds
    number = 0
    while number < _WARM_UP + MIN_ROUNDS or time.perf_counter() < end:
        measured = BenchResult() if number < _WARM_UP else result
        batch = _fast_cases(oracle, generate_batch(seed, 2 * number, BATCH, options))
        result_of = _parts(oracle, subject.run, batch)
        # The order of the parts rotates, so that none always profits from what the one before warmed.
        turn = number % len(result_of)
        for name, measure in [*result_of[turn:], *result_of[:turn]]:
            measured.add(name, measure(), len(batch))
        _campaign(loop, seed, 2 * number + 1, options, measured)
        guided.measure(number, measured)
        number += 1
    oracle.close()
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


def _campaign(loop: CampaignLoop, seed: int, number: int, options: Options, result: BenchResult) -> None:
    """A batch of its own, from generating it to comparing it: what a worker does per batch."""
    batch: list[Case] = []
    generating = _timed(lambda: batch.extend(generate_batch(seed, number, BATCH, options)))
    running = _timed(lambda: loop.run_batch(number, batch))
    result.add("generate", generating, BATCH)
    result.add("campaign", generating + running, BATCH)


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
    """Seconds that `run` takes, the garbage of others not included."""
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start

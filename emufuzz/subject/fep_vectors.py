"""The recorded vectors through the forced-emulation path: KVM around the emulator changes nothing else.

A vector's instruction gets KVM's prefix before it and enters through #UD; vectors that were recorded
with EMULTYPE_TRAP_UD enter as such. What comes out must be the recording, as far as the rules of
`emufuzz.subject.fep_rules` do not say what KVM does instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from emufuzz.arch.leaves import FAMILIES, family_of
from emufuzz.case.model import PAGE_SHIFT, Case, Memory, Outcome, code_address, memory_changes
from emufuzz.case.recorded import recorded_differences
from emufuzz.case.vectors import read_vectors
from emufuzz.emulator.x86emul import EMULTYPE_TRAP_UD
from emufuzz.kvm.cpuid import implied_features
from emufuzz.kvm.exit_exception import KVM_EMULATE_PREFIX
from emufuzz.subject.fep_extra import predicted_extra, without_rest
from emufuzz.subject.fep_rules import Prediction, Vector, predict
from emufuzz.subject.flat import FlatSubject
from emufuzz.subject.kvm import KvmSubject
from emufuzz.subject.vectors import NO_LEAF, read_expect

_MASK32: Final = 0xFFFFFFFF
_MASK64: Final = (1 << 64) - 1
_4G: Final = 1 << 32

#: The recording machine has four general and three fixed performance counters.
_KNOBS: Final = {"enable_pmu": True}
_KVM: Final = {"kvm": {"knobs": _KNOBS}}


@dataclass(slots=True)
class FepCount:
    """How a family fares: `rules` counts the rules that explain a difference, `ids` names what none does."""

    total: int = 0
    equal: int = 0
    explained: int = 0
    rules: Counter[str] = field(default_factory=Counter)
    ids: list[str] = field(default_factory=list)

    @property
    def different(self) -> int:
        """Vectors that no rule explains."""
        return len(self.ids)


class FepResult(NamedTuple):
    """One vector through KVM.

    `rules` name what KVM does otherwise than the recorded emulator; `differences` are the fields in
    which the outcome is not what the rules predict.
    """

    vector: Vector
    leaf: str
    outcome: Outcome
    prediction: Prediction
    rules: list[str]
    differences: list[str]


# -- conversion --------------------------------------------------------------------------------------


def fep_vector(case: Case) -> Vector:
    """What the rules need to know of a case: where the prefix lies, and the memory with it."""
    if case.emul_type & EMULTYPE_TRAP_UD:
        return Vector(case, case)
    mask = _MASK64 if case.mode == "prot64" else _MASK32
    code = code_address(case)
    prefix = tuple(code - len(KVM_EMULATE_PREFIX) + i & mask for i in range(len(KVM_EMULATE_PREFIX)))
    entries = tuple((address, KVM_EMULATE_PREFIX[i : i + 1]) for i, address in enumerate(prefix))
    seen = msgspec.structs.replace(case, mem=Memory(case.mem.entries + entries))
    return Vector(case, seen, prefix, tuple(_new_pages(case, prefix)))


def _new_pages(case: Case, prefix: tuple[int, ...]) -> Iterator[int]:
    """The pages of the prefix that the case does not have."""
    first = code_address(case)
    code = range(first >> PAGE_SHIFT, (first + len(case.code) - 1 >> PAGE_SHIFT) + 1)
    for pfn in dict.fromkeys(address >> PAGE_SHIFT for address in prefix):
        if pfn not in case.mem.pages and pfn not in code:
            yield pfn


def _prefix_rip(case: Case) -> int:
    """KVM adds the prefix's length to RIP as a 64-bit number, in every mode."""
    return case.rip - len(KVM_EMULATE_PREFIX) & _MASK64


def forced_case(case: Case, recorded: Outcome) -> Case:
    """The case that enters KVM.

    Its CPUID has the features that the recorded instruction switches on in CR4, as the recording
    machine takes every bit there.
    """
    extra: dict[str, Any] = _KVM
    if recorded.system.cr4 & ~case.system.cr4:
        features = dict.fromkeys(implied_features(recorded.system.cr4), True)
        extra = {"kvm": {"knobs": _KNOBS, "cpuid": {"features": features}}}
    if case.emul_type & EMULTYPE_TRAP_UD:
        return msgspec.structs.replace(case, path="ud", emul_type=0, extra=extra)
    code = KVM_EMULATE_PREFIX + case.code
    forced = msgspec.structs.replace(case, code=code, rip=_prefix_rip(case), path="fep", extra=extra)
    room = _4G - code_address(forced)
    if case.mode == "prot64" or code_address(case) > code_address(forced) or room >= len(code):
        return forced
    mem = Memory((*case.mem.entries, (0, code[room:])))
    return msgspec.structs.replace(forced, code=code[:room], mem=mem)


# -- comparison --------------------------------------------------------------------------------------


def run_fep(path: Path, step: int = 1) -> Iterator[FepResult]:
    """Every `step`-th vector of a file through KVM.

    Raises:
        CaseError: a line of the file is not a vector, or the file cannot be read.
    """
    flat, subject = FlatSubject(events=True), KvmSubject()
    for case, expect in islice(read_vectors(path), 0, None, step):
        (recorded,) = flat.run([case])
        (outcome,) = subject.run([forced_case(case, recorded)])
        result = judge(case, recorded, outcome)
        if recorded_differences(case, recorded, read_expect(path, case, expect)):
            result.differences.append("recording")
        yield result


def judge(case: Case, recorded: Outcome, outcome: Outcome) -> FepResult:
    """Compare what KVM made of a vector with what the recording and the rules say.

    Args:
        case: The recorded case.
        recorded: The outcome of the emulator alone, which equals the recording, with its callbacks.
        outcome: KVM's, of `forced_case`.
    """
    vector = fep_vector(case)
    prediction, rules = predict(vector, recorded)
    return FepResult(
        vector, recorded.leaf, outcome, prediction, rules, fep_differences(vector, outcome, prediction)
    )


def fep_differences(vector: Vector, outcome: Outcome, prediction: Prediction) -> list[str]:
    """Names of the fields in which KVM's outcome is not the predicted one; empty if it is the same.

    Callbacks are not compared, as KVM's are not logged; what they leave is: exits to userspace with
    their data, queued exceptions with their payload, and the interrupt shadow.
    """
    if outcome.crash:
        return ["crash"]
    expected = prediction.outcome
    names = [n for n in recorded_differences(vector.case, outcome, expected) if n not in ("mem", "events")]
    if _memory_differs(vector, outcome, prediction):
        names.append("mem")
    found, predicted = dict(outcome.extra or {}), predicted_extra(vector, prediction)
    found["exits"] = [without_rest(entry, expected.length or 0) for entry in found["exits"]]
    return names + [
        name for name in sorted(found.keys() | predicted) if found.get(name) != predicted.get(name)
    ]


def _memory_differs(vector: Vector, outcome: Outcome, prediction: Prediction) -> bool:
    expected = prediction.outcome
    if not outcome.pages and not expected.pages:
        return False
    return memory_changes(vector.seen, outcome) != memory_changes(prediction.before, expected)


# -- counts ------------------------------------------------------------------------------------------


def check_fep(path: Path, families: frozenset[str], step: int = 1) -> dict[str, FepCount]:
    """Every `step`-th vector of a file through KVM; the counts of those of `families` that occur.

    Raises:
        CaseError: a line of the file is not a vector, or the file cannot be read.
    """
    counts: dict[str, FepCount] = {}
    for result in run_fep(path, step):
        family = family_of(result.leaf) if result.leaf else NO_LEAF
        if family in families:
            _count(counts.setdefault(family, FepCount()), result)
    return {name: counts[name] for name in FAMILIES if name in counts}


def _count(count: FepCount, result: FepResult) -> None:
    count.total += 1
    count.rules.update(result.rules)
    if result.differences:
        count.ids.append(result.vector.case.id)
    elif result.rules:
        count.explained += 1
    else:
        count.equal += 1

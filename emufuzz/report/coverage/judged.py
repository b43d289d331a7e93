"""The oracles' side of coverage: what was not only run but judged, per leaf and oracle."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from emufuzz.fuzz.judging import AGREED, OBJECTS, VOUCHES
from emufuzz.report.coverage.model import Coverage


class Share(NamedTuple):
    """What an oracle judged.

    Attributes:
        cases: Cases about which it was asked.
        agreed, objected: Those on which it agreed, and objected to a field for which it vouches.
        fields: Changed fields in the sample of these cases.
        vouched: Those for which it vouches.
    """

    cases: int
    agreed: int
    objected: int
    fields: int
    vouched: int

    @property
    def judged(self) -> float:
        """The share of cases that it compared to the end, 0 to 1."""
        return (self.agreed + self.objected) / self.cases if self.cases else 0.0

    @property
    def compared(self) -> float:
        """The share of fields for which it vouches, 0 to 1."""
        return self.vouched / self.fields if self.fields else 0.0


class Excuse(NamedTuple):
    """A gap, quirk or other reason for which something was not compared: how many cases, fields, leaves."""

    oracle: str
    reason: str
    cases: int
    fields: int
    leaves: int


def shares(coverage: Coverage, leaf: str | None = None) -> dict[str, Share]:
    """Oracle -> what it judged; of one leaf, or of all."""
    cases: Counter[tuple[str, str]] = Counter()
    fields: Counter[tuple[str, str]] = Counter()
    for counts, total in ((coverage.verdicts, cases), (coverage.fields, fields)):
        for (oracle, of, why), n in counts.items():
            if leaf in (None, of):
                total[oracle, why] += n
                total[oracle, "all of them"] += n
    names = dict.fromkeys((*coverage.oracles, *(oracle for oracle, _ in cases)))
    return {
        name: Share(
            cases[name, "all of them"],
            cases[name, AGREED],
            cases[name, OBJECTS],
            fields[name, "all of them"],
            fields[name, VOUCHES],
        )
        for name in names
    }


def excuses(coverage: Coverage) -> list[Excuse]:
    """Why something was not compared, the most frequent first."""
    cases: Counter[tuple[str, str]] = Counter()
    fields: Counter[tuple[str, str]] = Counter()
    leaves: dict[tuple[str, str], set[str]] = {}
    for counts, total in ((coverage.verdicts, cases), (coverage.fields, fields)):
        for (oracle, leaf, why), n in counts.items():
            if why not in (AGREED, OBJECTS):
                total[oracle, why] += n
                leaves.setdefault((oracle, why), set()).add(leaf)
    order = sorted(leaves, key=lambda key: (-cases[key], -fields[key], key))
    return [Excuse(*key, cases[key], fields[key], len(leaves[key])) for key in order]

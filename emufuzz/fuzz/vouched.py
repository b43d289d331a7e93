"""What is counted about who vouches for what: classes of cases, changed fields, and why nobody does."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

# fmt: off
#: What becomes of a case, in the order of reports.
CLASSES: Final = {
    "agreed":  "every oracle that vouches for a difference agrees",
    "finding": "an oracle objects to a field for which it vouches",
    "gap":     "the only objections fall into gaps of the oracles",
    "quirk":   "a known departure of KVM explains the difference",
    "nobody":  "no oracle takes the case, or none vouches for any of it",
    "refused": "the subject cannot emulate it",
    "left":    "KVM left before the instruction, for an event or a breakpoint: nothing changed",
    "no-exit": "hardware would not exit: nothing was tested",
    "undefined": "the SDM leaves undefined what happens at all",
}
# fmt: on


@dataclass(slots=True)
class Vouched:
    """What was counted.

    Attributes:
        classes: How many cases became what (CLASSES).
        reasons: (class, reason) -> cases that are neither agreed nor findings.
        fields: (path, leaf, kind of field) -> fields that changed.
        unvouched: The same -> fields for which nobody vouches.
        causes: (path, leaf, kind of field, why nobody does) -> fields.
        undefined: Kind of field -> fields that do not count, as the SDM leaves them undefined.
        by: Oracle -> fields for which it vouches; rules only count where no engine does.
        alone: Oracle -> fields for which only it vouches, of the oracles that were asked.
        asked: Oracle -> cases that it took.
    """

    classes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    fields: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    unvouched: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    causes: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    undefined: Counter[str] = field(default_factory=Counter)
    by: Counter[str] = field(default_factory=Counter)
    alone: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def merge(self, other: Vouched) -> None:
        """Add what was counted elsewhere."""
        for name in self.__slots__:
            getattr(self, name).update(getattr(other, name))

    @property
    def cases(self) -> int:
        """All cases."""
        return self.classes.total()

    @property
    def share(self) -> float:
        """The share of changed fields for which nobody vouches, 0 to 1."""
        return self.unvouched.total() / max(self.fields.total(), 1)

    def table(self, part: int) -> list[tuple[str, int, int, dict[str, int]]]:
        """Rows of (name, fields, unvouched ones, why -> fields), the worst first.

        Args:
            part: 0 for paths, 1 for leaves, 2 for kinds of fields.
        """
        fields, unvouched = _grouped(self.fields, part), _grouped(self.unvouched, part)
        causes: dict[str, Counter[str]] = {}
        for key, count in self.causes.items():
            causes.setdefault(key[part], Counter())[key[3]] += count
        order = sorted(fields, key=lambda name: (-unvouched[name], -fields[name], name))
        return [
            (name, fields[name], unvouched[name], dict(_ranked(causes.get(name, Counter()))))
            for name in order
        ]


def _grouped(counts: Counter[tuple[str, str, str]], part: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for key, count in counts.items():
        found[key[part]] += count
    return found


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent first, then by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))

"""Why cases were skipped: what kind of reason each is, and which oracle it is about.

Campaigns count reasons as texts. What they say of themselves is read from them here, nothing is added:
ids of quirks begin with `kvm-`, ids of gaps with the name of their oracle, refusals with who refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from emufuzz.oracle.registry import PREFIXES
from emufuzz.oracle.verdict import NOBODY

QUIRK: Final = "quirk"  # a known deviation of KVM
GAP: Final = "gap"  # a known weakness of an oracle
REFUSED: Final = "refused"  # the subject does not emulate it
BEYOND: Final = "beyond"  # an oracle, or all of them, cannot judge it
BROKEN: Final = "broken"  # an oracle crashed or hung
NO_EXIT: Final = "no exit"  # hardware would not have entered KVM

_ENDS: Final = ("-crash", "-hang")


class Skip(NamedTuple):
    """A reason for which cases were skipped.

    Attributes:
        reason: As the campaign counts it: the id of a quirk or of gaps, or words.
        kind: One of QUIRK, GAP, REFUSED, BEYOND, BROKEN and NO_EXIT.
        oracle: The oracle that it is about; empty if none, or if that is not known.
        cases: How many cases.
    """

    reason: str
    kind: str
    oracle: str
    cases: int


class Health(NamedTuple):
    """How an oracle does, as far as the reasons say.

    Attributes:
        name: As the campaign names it.
        version: What the run recorded of it.
        compared: Cases that it was compared on; None if it is one of several, which share them.
        gaps: Cases skipped as it does not vouch for what differs.
        beyond: Cases skipped as it cannot take them.
        broken: Cases on which it crashed or hung.

    Counts are None for oracles with an argument (`cmd:...`), whose reasons do not tell whose they are.
    """

    name: str
    version: str
    compared: int | None
    gaps: int | None
    beyond: int | None
    broken: int | None


def kind_of(reason: str, oracles: Sequence[str]) -> tuple[str, str]:
    """The kind of a reason, and the oracle it is about.

    Args:
        reason: The reason.
        oracles: Names of the campaign's oracles.
    """
    if reason.startswith("no exit:"):
        return NO_EXIT, ""
    if reason.startswith("subject-"):
        return REFUSED, ""
    if reason.startswith(NOBODY):
        return BEYOND, ""
    if reason.startswith("kvm-"):
        return QUIRK, ""
    owner = next((name for name in oracles if reason.startswith((f"{name}-", f"{name}: "))), "")
    if reason.startswith(f"{owner}: "):
        return BEYOND, owner
    return (BROKEN if reason.endswith(_ENDS) else GAP), owner


def skips_of(skipped: Mapping[str, int], oracles: Sequence[str]) -> tuple[Skip, ...]:
    """The reasons with their kinds, the most frequent first."""
    ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return tuple(Skip(reason, *kind_of(reason, oracles), cases) for reason, cases in ordered)


def health_of(
    oracles: Sequence[str], versions: Mapping[str, str], skips: Sequence[Skip], compared: int
) -> tuple[Health, ...]:
    """How each oracle does.

    Args:
        oracles: Names of the campaign's oracles.
        versions: What the run recorded of them.
        skips: Why cases were skipped.
        compared: Cases that were compared with any of them.
    """
    alone = len(oracles) == 1
    return tuple(
        _health(name, versions.get(name, ""), skips, compared if alone else None) for name in oracles
    )


def _health(name: str, version: str, skips: Sequence[Skip], compared: int | None) -> Health:
    if name.startswith(tuple(PREFIXES)):
        return Health(name, version, compared, None, None, None)
    mine = [skip for skip in skips if skip.oracle == name]
    counts = [sum(skip.cases for skip in mine if skip.kind == kind) for kind in (GAP, BEYOND, BROKEN)]
    return Health(name, version, compared, *counts)

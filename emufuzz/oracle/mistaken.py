"""Cases whose instruction KVM takes for another one: whether the subject did all of what that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import msgspec

from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, Case, Outcome, code_address
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.native_view import forced_prefix, judge_case
from emufuzz.oracle.operands import place_of
from emufuzz.oracle.quirks import ALL_QUIRKS

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Verdict

#: compare.judge.
Judge = Callable[[Case, Outcome, Outcome, Oracle], "Verdict"]

_INSTEAD: Final = tuple((quirk, quirk.instead) for quirk in ALL_QUIRKS if quirk.instead is not None)
_ELSEWHERE: Final = tuple((quirk, quirk.elsewhere) for quirk in ALL_QUIRKS if quirk.elsewhere is not None)
#: Operands elsewhere are a guess: that it is wrong means nothing.
_GUESSED: Final = frozenset(quirk.id for quirk, _ in _ELSEWHERE)
_FINDING: Final = "finding"


def stand_ins(case: Case, subject: Outcome) -> Iterator[tuple[str, Case, Outcome]]:
    """What KVM takes the instruction for, or its operands, for each quirk that may be at work.

    Yields: the quirk's id, the case with that instruction, the subject's outcome as if it had run that.
    """
    for quirk, instead in _INSTEAD:
        if quirk.leaves is None or subject.leaf in quirk.leaves:
            code = instead(judge_case(case))
            if code is not None:
                other = msgspec.structs.replace(case, code=forced_prefix(case) + code)
                yield quirk.id, other, _with_code(case, other, subject)
    for quirk, elsewhere in _ELSEWHERE if case.path is not None else ():
        for other, ours in elsewhere(case, subject):
            yield quirk.id, other, ours


def _with_code(case: Case, other: Case, subject: Outcome) -> Outcome:
    """The outcome with the other code in a page that the instruction has changed, as far as it is there."""
    pages = dict(subject.pages)
    for i, (old, new) in enumerate(zip(case.code, other.code, strict=True)):
        place = place_of(case, code_address(case) + i)
        page = None if place is None else pages.get(place >> PAGE_SHIFT)
        if old != new and page is not None and place is not None and page[place & PAGE_MASK] == old:
            at = place & PAGE_MASK
            pages[place >> PAGE_SHIFT] = page[:at] + bytes((new,)) + page[at + 1 :]
    return subject if pages == subject.pages else msgspec.structs.replace(subject, pages=pages)


def mistaken(case: Case, subject: Outcome, oracle: Oracle, judge: Judge) -> str | None:
    """The quirk by which the subject did what the oracle does with the other instruction.

    None if there is no such instruction, empty if the subject did something else.
    """
    found = None
    for name, other, ours in stand_ins(case, subject):
        try:
            oracle.check(other)
        except UnsupportedCaseError:
            continue
        (outcome,) = oracle.run((other,))
        if judge(other, ours, outcome, oracle).kind != _FINDING:
            return name
        found = found if name in _GUESSED else ""
    return found

"""`emufuzz findings list`: which findings, in which order, as a table or as JSON lines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, Self

from emufuzz.arch.modes import MODES
from emufuzz.cli.errors import InputError
from emufuzz.cli.names import chosen_names
from emufuzz.fuzz.finding import ALONE, FAILED, SPLIT, Finding
from emufuzz.fuzz.finding_json import digest
from emufuzz.fuzz.shrink import non_default_fields
from emufuzz.fuzz.store import StoreView
from emufuzz.fuzz.store.records import STATES
from emufuzz.fuzz.triage.loaded import Loaded, load_all
from emufuzz.oracle.compare import KINDS
from emufuzz.oracle.native_view import without_harness
from emufuzz.report.columns import table
from emufuzz.report.disasm import mnemonic
from emufuzz.report.plain import printable

VERDICTS: Final = (ALONE, SPLIT, FAILED)
#: Characters of an instruction, of fields and of a sentence that a table shows.
_INSTRUCTION: Final = 40
_FIELDS: Final = 60
_SENTENCE: Final = 100

# fmt: off
#: `--sort` -> what comes first; findings that are equal in it stay in their order.
ORDERS: Final[dict[str, Callable[[Loaded], Any]]] = {
    "number": lambda one: (one.record.batch, one.record.position),
    "cases":  lambda one: -one.record.cases,
    "name":   lambda one: one.name,
    "state":  lambda one: STATES.index(one.record.state),
    "leaf":   lambda one: one.record.bucket.leaf,
}
# fmt: on


class Chosen(NamedTuple):
    """Which findings; an empty set or text takes all."""

    states: frozenset[str]
    leaf: str
    modes: frozenset[str]
    place: str
    kinds: frozenset[str]
    verdicts: frozenset[str]

    @classmethod
    def of(cls, state: str, leaf: str, mode: str, place: str, kind: str, verdict: str) -> Self:
        """What the options say; InputError if one names what there is not."""
        return cls(
            _some("--state", "state", state, STATES),
            leaf,
            _some("--mode", "mode", mode, MODES),
            place,
            _some("--kind", "kind", kind, KINDS),
            _some("--verdict", "verdict", verdict, VERDICTS),
        )

    def takes(self, one: Loaded) -> bool:
        """Whether a finding is among them."""
        bucket = one.record.bucket
        exact = self.leaf in {"", bucket.leaf} and self.place in {"", bucket.place}
        return exact and all(
            not wanted or value in wanted
            for wanted, value in (
                (self.states, one.record.state),
                (self.modes, one.finding.case.mode),
                (self.kinds, bucket.kind),
                (self.verdicts, bucket.verdict),
            )
        )


def _some(option: str, what: str, text: str, known: tuple[str, ...]) -> frozenset[str]:
    return frozenset(chosen_names(option, what, text, known)) if text else frozenset()


def listed(view: StoreView, chosen: Chosen, sort: str) -> list[Loaded]:
    """The findings in their order.

    Raises:
        InputError: There is no such order.
        StoreError: A finding is damaged.
    """
    if sort not in ORDERS:
        raise InputError("--sort", f"unknown order {sort!r}, known are {', '.join(ORDERS)}")
    return sorted((one for one in load_all(view) if chosen.takes(one)), key=ORDERS[sort])


def instruction_of(finding: Finding) -> str:
    """The instruction that is emulated: behind the prefix of forced emulation if the case has it."""
    return mnemonic(without_harness(finding.case))


def json_line(one: Loaded) -> str:
    """A finding as an object on one line."""
    return json.dumps(digested(one))


def digested(one: Loaded) -> dict[str, Any]:
    """What a list says of a finding, as JSON values."""
    record, finding = one.record, one.finding
    return {
        "name": one.name,
        "state": record.state,
        "reason": record.reason,
        "note": record.note,
        "cases": record.cases,
        **record.bucket._asdict(),
        "mode": finding.case.mode,
        "path": finding.case.path,
        "batch": record.batch,
        "index": record.position,
        "instruction": instruction_of(finding),
        "fields": list(non_default_fields(finding.case)),
        "sentence": finding.sentence,
        "shrunk": record.shrunk is not None,
        "digest": digest(one.document),
    }


def table_lines(rows: Sequence[Loaded]) -> Iterator[str]:
    """The findings for people: a table, stacked where it is too wide."""
    if not rows:
        yield "no findings"
        return
    headers = ("name", "state", "cases", "instruction", "fields", "sentence")
    yield from table(headers, [_cells(one) for one in rows], shutil.get_terminal_size((100, 24)).columns)


def _cells(one: Loaded) -> tuple[str, ...]:
    record, finding = one.record, one.finding
    return (
        one.name,
        record.state,
        f"{record.cases:,}",
        _short(instruction_of(finding), _INSTRUCTION),
        _short(", ".join(non_default_fields(finding.case)), _FIELDS),
        _short(finding.sentence, _SENTENCE),
    )


def _short(text: str, length: int) -> str:
    """The beginning of a text from a file, on one line."""
    shown = printable(text[: length + 1])
    return shown if len(shown) <= length else shown[: length - 3] + "..."

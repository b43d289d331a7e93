"""`emufuzz repro`: replay a case, a recorded vector or a finding, and explain what differs by whose word."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import typer

from emufuzz.case.delta import expect_to_outcome
from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_from_obj, outcome_to_obj
from emufuzz.case.model import Case, Outcome
from emufuzz.case.recorded import recorded_differences
from emufuzz.cli.documents import Document, files_of, read_documents
from emufuzz.cli.errors import (
    EXIT_BAD_INPUT,
    EXIT_CHANGED,
    EXIT_DISAGREE,
    EXIT_OK,
    EXIT_UNAVAILABLE,
    InputError,
    at,
    exit_code,
    reported,
)
from emufuzz.cli.names import oracles_beside, refuse_programs
from emufuzz.cli.progress import CountLine
from emufuzz.cli.recorded import recorded_bug, recorded_oracles, recorded_program
from emufuzz.fuzz.bugs import seeded_bug
from emufuzz.fuzz.engines import PROGRAM, is_subject, subject_maker
from emufuzz.fuzz.finding_json import differences_from_obj
from emufuzz.oracle.compare import FINDING, SKIPPED, Difference, Verdict
from emufuzz.oracle.verdict import Opinion as OracleOpinion
from emufuzz.report.columns import output_width
from emufuzz.report.exits import exit_lines
from emufuzz.report.explain import Opinion, explain
from emufuzz.report.plain import printable
from emufuzz.report.replay import Replay, Replayer, difference_keys, explained, reason_text
from emufuzz.subject.base import Subject

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

RECORDED = "recorded"
#: What an exit code says of a file or case.
_MEANING: Final = {
    EXIT_OK: "without disagreement",
    EXIT_DISAGREE: "in disagreement",
    EXIT_BAD_INPUT: "not readable",
    EXIT_CHANGED: "in another disagreement than recorded",
    EXIT_UNAVAILABLE: "without an oracle",
}


class Result(NamedTuple):
    """What became of one document: its exit code, and why in a sentence."""

    where: str
    case: Case
    subject: Outcome
    opinions: list[Opinion]
    code: int
    conclusion: str
    refused: str = ""  # why the oracle has no opinion


@app.command("repro")
def repro(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Cases, vector lines or findings; directories of them, campaigns too; - for stdin."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per case.")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Also KVM's tracepoints, if there is a path.")
    ] = False,
    oracles: Annotated[
        str, typer.Option(help="Comma-separated oracles beside unicorn; those of the finding by default.")
    ] = "",
    subject: Annotated[
        str, typer.Option(help="cmd:PROGRAM, for findings of campaigns with that subject.")
    ] = "",
    brief: Annotated[bool, typer.Option("--brief", help="One line per case, and counts at the end.")] = False,
) -> int:
    """Replay cases and explain where the emulator and the oracles differ.

    A case with a path goes through the KVM model: its exits, what it asked of devices and what it
    injects are shown too.

    Exit code, the highest of all cases: 0 = all agree, 1 = a disagreement (of a finding: the recorded
    one), 2 = bad input, 3 = another disagreement than the recorded one, 4 = an oracle is missing.
    """
    replayer = Replayer(_program(subject))
    others = oracles_beside(oracles)
    codes: Counter[int] = Counter()

    def note(code: int) -> None:
        codes[code] += 1

    def replay(file: Path) -> None:
        for document in read_documents(file):
            result = replay_document(document, replayer, others)
            if codes and not (as_json or brief):
                print()
            _show(result, replayer, as_json=as_json, trace=trace, brief=brief)
            note(result.code)
            line.add()

    with CountLine(printing=True) as line:
        for path in files:
            with reported(note):
                for file in files_of(path):
                    with reported(note):
                        replay(file)
    if brief and not as_json:
        print(", ".join(f"{count:,} {_MEANING[code]}" for code, count in sorted(codes.items())))
    return max(codes, default=EXIT_OK)


def _program(name: str) -> Subject | None:
    """The program that `--subject` names; None without it.

    Raises:
        InputError: It is no program.
        OracleUnavailableError: It does not start.
    """
    if not name:
        return None
    if not name.startswith(PROGRAM) or not is_subject(name):
        raise InputError(
            "--subject", f"{name!r} is no {PROGRAM}PROGRAM; a case itself tells apart the others"
        )
    return subject_maker(name)()


def replay_document(document: Document, replayer: Replayer, others: tuple[str, ...]) -> Result:
    """Run a document of any kind; errors are raised with the place of the document.

    Args:
        document: A case, a vector line or a finding.
        replayer: The engines.
        others: Names of oracles beside Unicorn; without any, those of the finding.

    Raises:
        InputError: The document is none, or cannot be run.
        OracleUnavailableError: An oracle cannot work here.
    """
    value = document.value
    with at(document.where):
        if "expect" in value:
            return _vector(document, replayer)
        if "case" in value:
            return _finding(document, replayer, others)
        return _bare(document, replayer, others)


def _bare(document: Document, replayer: Replayer, others: tuple[str, ...]) -> Result:
    replay = replayer.replay(case_from_obj(document.value), others)
    code = EXIT_DISAGREE if _verdict(replay).kind == FINDING else EXIT_OK
    return _result(document.where, replay, code, _said(replay, replayer))


def _vector(document: Document, replayer: Replayer) -> Result:
    """A vector is judged by what was recorded; Unicorn's view is shown where there is one."""
    value = document.value
    if unknown := value.keys() - {"case", "expect"}:
        raise CaseError(f"{min(unknown)}: unknown field")
    case = _part("case", case_from_obj, value.get("case"))
    expected = _part("expect", lambda expect: expect_to_outcome(case, expect), value["expect"])
    subject = replayer.run_subject(case)
    names = recorded_differences(case, subject, expected)
    opinions = [Opinion(RECORDED, expected, tuple(names)), *_second_opinion(case, replayer)]
    if names:
        conclusion = f"the {replayer.subject_name(case)} does not do what was recorded: {', '.join(names)}"
    else:
        conclusion = f"the {replayer.subject_name(case)} does exactly what was recorded"
    return Result(document.where, case, subject, opinions, EXIT_DISAGREE if names else EXIT_OK, conclusion)


def _second_opinion(case: Case, replayer: Replayer) -> list[Opinion]:
    """Unicorn's view of a recorded vector, for information; none where it cannot take the case."""
    try:
        replay = replayer.replay(case)
    except Exception as error:
        if exit_code(error) is None:
            raise
        return []
    opinion = _opinion(replay)
    return [] if opinion is None else [opinion._replace(counts=False)]


def _verdict(replay: Replay) -> Verdict:
    """What all oracles say together, or the first one alone."""
    ruling = replay.ruling
    return replay.verdict if ruling is None else Verdict(ruling.kind, ruling.reason, ruling.differences)


def _said(replay: Replay, replayer: Replayer) -> str:
    """The verdict in words."""
    if replay.ruling is None or replay.ruling.kind == SKIPPED:
        return _conclusion(_verdict(replay))
    return replay.ruling.sentence(replayer.subject_name(replay.case))


def _finding(document: Document, replayer: Replayer, others: tuple[str, ...]) -> Result:
    value = document.value
    recorded = _part("differences", differences_from_obj, value.get("differences"))
    case = _part("case", case_from_obj, value["case"])
    if replayer.program is None:
        refuse_programs((recorded_program(document),), document.where, what="subject")
    with seeded_bug(recorded_bug(value)):
        replay = replayer.replay(case, others or recorded_oracles(document))
    verdict = _verdict(replay)
    if verdict.kind != FINDING:
        return _result(document.where, replay, EXIT_OK, f"no longer a finding: {_said(replay, replayer)}")
    if difference_keys(verdict.differences) == difference_keys(recorded):
        who = "" if replay.ruling is None else f": {_said(replay, replayer)}"
        return _result(document.where, replay, EXIT_DISAGREE, f"the same disagreement as recorded{who}")
    was = ", ".join(dict.fromkeys(_name(d) for d in recorded)) or "none"
    text = f"a different disagreement than the recorded one, which was on: {was}"
    return _result(document.where, replay, EXIT_CHANGED, text)


def _part(name: str, read: Any, value: Any) -> Any:
    """Read a part of a document; errors name the part before the field in it."""
    try:
        return read(value)
    except CaseError as error:
        separator = "." if ":" in str(error) else ": "
        raise CaseError(f"{name}{separator}{error}") from None


def _name(difference: Difference) -> str:
    """A difference's field as readers see it."""
    return difference.field if difference.at is None else f"[{difference.at:#x}]"


def _conclusion(verdict: Verdict) -> str:
    if verdict.kind == FINDING:
        return "a disagreement that no known quirk or gap explains"
    if explained(verdict):
        return f"a known difference, {reason_text(verdict.reason)}"
    if verdict.reason:
        return f"nothing to compare, {verdict.reason}"
    return "all agree"


def _result(where: str, replay: Replay, code: int, conclusion: str) -> Result:
    opinion = _opinion(replay)
    opinions = [] if opinion is None else [opinion]
    opinions += [_other(view, replay) for view in replay.others]
    return Result(where, replay.case, replay.subject, opinions, code, conclusion, replay.refused)


def _opinion(replay: Replay) -> Opinion | None:
    """Unicorn's opinion of a replayed case; None if it crashed or cannot take the case."""
    if replay.oracle is None:
        return None
    names = tuple(dict.fromkeys(_name(d) for d in replay.verdict.differences))
    notes = tuple(f"{field}, {reason_text(gap)}" for field, gap in replay.unchecked)
    compared = replay.verdict.kind != SKIPPED or explained(replay.verdict)
    return Opinion("unicorn", replay.oracle, names, notes, compared=compared)


def _other(view: OracleOpinion, replay: Replay) -> Opinion:
    """A further oracle's opinion, for readers."""
    names = tuple(dict.fromkeys(_name(d) for d in view.verdict.differences))
    notes = tuple(f"{field}, {reason_text(gap)}" for field, gap in view.unchecked)
    if view.outcome is replay.subject:  # rules have no outcome of their own
        notes += tuple(f"{_name(d)}: {d.oracle}" for d in view.verdict.differences)
    if view.verdict.kind == SKIPPED and view.verdict.reason:
        notes = (f"explained by {reason_text(view.verdict.reason)}", *notes)
    compared = view.verdict.kind != SKIPPED or explained(view.verdict)
    return Opinion(view.oracle, view.outcome, names, notes, compared=compared)


def _show(result: Result, replayer: Replayer, *, as_json: bool, trace: bool, brief: bool) -> None:
    """Print a result, in one line if `brief`."""
    if brief and not as_json:
        print(f"{printable(result.where)}: {printable(result.conclusion)}")
    else:
        _print(result, replayer, as_json=as_json, trace=trace)


def _print(result: Result, replayer: Replayer, *, as_json: bool, trace: bool) -> None:
    if as_json:
        lines = replayer.trace(result.case) if trace else None
        obj = _as_json(result, replayer.subject_name(result.case))
        print(json.dumps(obj | ({} if lines is None else {"trace": lines})))
        return
    print("\n".join([result.where, *result_lines(result, replayer, trace=trace)]))


def result_lines(result: Result, replayer: Replayer, *, trace: bool = False) -> list[str]:
    """What became of a document, for people; `replayer` is the one that ran it, just now."""
    name = replayer.subject_name(result.case)
    shown = explain(result.case, name, result.subject, result.opinions, output_width())
    if result.refused:
        shown += [f"unicorn does not judge this case: {result.refused}."]
    shown += exit_lines(result.subject)
    if trace:
        shown += ["", "trace:", *(replayer.trace(result.case) or ["no path, so KVM was not entered"])]
    return [*shown, "", f"conclusion: {result.conclusion}"]


def _as_json(result: Result, name: str) -> dict[str, Any]:
    return {
        "where": result.where,
        "id": result.case.id,
        "leaf": result.subject.leaf,
        "exit": result.code,
        "conclusion": result.conclusion,
        "outcomes": {
            name: outcome_to_obj(result.case, result.subject),
            **{o.name: outcome_to_obj(result.case, o.outcome) for o in result.opinions},
        },
        "differences": {o.name: list(o.differences) for o in result.opinions},
        "notes": {o.name: list(o.notes) for o in result.opinions},
        **({"refused": {"unicorn": result.refused}} if result.refused else {}),
    }

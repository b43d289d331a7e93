"""`emufuzz repro`: replay a case, a recorded vector or a finding, and explain what differs by whose word."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from emufuzz.case.delta import expect_to_outcome
from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_from_obj, outcome_to_obj
from emufuzz.case.model import Case, Outcome
from emufuzz.case.recorded import recorded_differences
from emufuzz.cli.documents import Document, read_documents
from emufuzz.cli.errors import EXIT_CHANGED, EXIT_DISAGREE, EXIT_OK, InputError, exit_code, one_line
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.compare import FINDING, Difference, Verdict
from emufuzz.report.columns import output_width
from emufuzz.report.explain import Opinion, explain
from emufuzz.report.replay import Replay, Replayer, difference_keys, explained, reason_text

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

RECORDED = "recorded"


class Result(NamedTuple):
    """What became of one document: its exit code, and why in a sentence."""

    where: str
    case: Case
    subject: Outcome
    opinions: list[Opinion]
    code: int
    conclusion: str


@app.command("repro")
def repro(
    files: Annotated[list[Path], typer.Argument(help="Cases, vector lines or findings; - for stdin.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per case.")] = False,
) -> int:
    """Replay cases and explain where the emulator and the oracles differ.

    Exit code, the highest of all cases: 0 = all agree, 1 = a disagreement (of a finding: the recorded
    one), 2 = bad input, 3 = another disagreement than the recorded one, 4 = an oracle is missing.
    """
    replayer = Replayer()
    code = EXIT_OK
    shown = False
    for path in files:
        try:
            for document in read_documents(path):
                result = _replay(document, replayer)
                if shown and not as_json:
                    print()
                _print(result, replayer, as_json=as_json)
                shown = True
                code = max(code, result.code)
        except BrokenPipeError:
            raise
        except Exception as error:
            failed = exit_code(error)
            if failed is None:
                raise
            print(f"emufuzz: {one_line(error)}", file=sys.stderr)
            code = max(code, failed)
    return code


def _replay(document: Document, replayer: Replayer) -> Result:
    """Run a document of any kind; errors are raised with the place of the document."""
    value = document.value
    try:
        if "expect" in value:
            return _vector(document, replayer)
        if "case" in value:
            return _finding(document, replayer)
        return _bare(document, replayer)
    except OracleUnavailableError as error:
        raise OracleUnavailableError(f"{document.where}: {error}") from error
    except InputError:
        raise
    except Exception as error:
        if exit_code(error) is None:
            raise
        raise InputError(document.where, one_line(error)) from error


def _bare(document: Document, replayer: Replayer) -> Result:
    replay = replayer.replay(case_from_obj(document.value))
    code = EXIT_DISAGREE if replay.verdict.kind == FINDING else EXIT_OK
    return _result(document.where, replay, code, _conclusion(replay.verdict))


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
        conclusion = f"the {replayer.subject_name} does not do what was recorded: {', '.join(names)}"
    else:
        conclusion = f"the {replayer.subject_name} does exactly what was recorded"
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


def _finding(document: Document, replayer: Replayer) -> Result:
    value = document.value
    recorded = _part("differences", _recorded_differences, value.get("differences"))
    replay = replayer.replay(_part("case", case_from_obj, value["case"]))
    verdict = replay.verdict
    if verdict.kind != FINDING:
        return _result(document.where, replay, EXIT_OK, f"no longer a finding: {_conclusion(verdict)}")
    if difference_keys(verdict.differences) == difference_keys(recorded):
        return _result(document.where, replay, EXIT_DISAGREE, "the same disagreement as recorded")
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


def _recorded_differences(value: Any) -> tuple[Difference, ...]:
    if not isinstance(value, list):
        raise CaseError("expected an array, as in a finding" if value is not None else "missing")
    return tuple(_recorded_difference(item) for item in value)


def _recorded_difference(item: Any) -> Difference:
    if not isinstance(item, dict):
        raise CaseError("expected objects")
    at = item.get("at")
    try:
        field, kind, subject, oracle = (_text(item[name]) for name in ("field", "kind", "subject", "oracle"))
        return Difference(field, kind, subject, oracle, None if at is None else int(at, 0))
    except (TypeError, ValueError, KeyError):
        raise CaseError("expected field, kind, subject and oracle as strings, and at as an address") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


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
    return Result(where, replay.case, replay.subject, opinions, code, conclusion)


def _opinion(replay: Replay) -> Opinion | None:
    """Unicorn's opinion of a replayed case; None if it crashed."""
    if replay.oracle is None:
        return None
    names = tuple(dict.fromkeys(_name(d) for d in replay.verdict.differences))
    notes = tuple(f"{field}, {reason_text(gap)}" for field, gap in replay.unchecked)
    return Opinion("unicorn", replay.oracle, names, notes)


def _print(result: Result, replayer: Replayer, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_as_json(result, replayer.subject_name)))
        return
    print(f"{result.where}")
    lines = explain(result.case, replayer.subject_name, result.subject, result.opinions, output_width())
    print("\n".join([*lines, "", f"conclusion: {result.conclusion}"]))


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
    }

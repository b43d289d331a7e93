"""Triage as commands use it: on demand, and at the end of a run of `emufuzz fuzz`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from emufuzz.cli.errors import InputError
from emufuzz.cli.names import FIRST_ORACLE, oracles_beside, refuse_programs
from emufuzz.fuzz.campaign import Campaign
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.store import Store, StoreError
from emufuzz.fuzz.store.marker import StoreMarker
from emufuzz.fuzz.tasks import Setup
from emufuzz.fuzz.triage import (
    FILTERS,
    ProcessJudge,
    Summary,
    UnknownFilterError,
    chosen_filters,
    marks_of,
    triage,
)
from emufuzz.report.plain import printable


def filters_of(text: str) -> tuple[str, ...]:
    """The filters that `--filters` names; all without it.

    Raises:
        InputError: There is no filter of some name.
    """
    try:
        return chosen_filters(text) if text else tuple(FILTERS)
    except UnknownFilterError as error:
        raise InputError("--filters", str(error)) from error


def marks_in(directories: Sequence[Path]) -> dict[str, str]:
    """The marks of the campaigns that `--known` names.

    Raises:
        InputError: One is no campaign.
    """
    try:
        return marks_of(directories)
    except StoreError as error:
        raise InputError("--known", str(error)) from error


def judge_again(
    store: StoreMarker, filters: Sequence[str], marks: Mapping[str, str], oracles: str
) -> Summary:
    """Judge all findings of a campaign with the present code.

    Args:
        store: The campaign.
        filters: Names of filters.
        marks: From `marks_in`.
        oracles: What `--oracles` says.

    Raises:
        InputError: An oracle of the campaign is a program, and `oracles` does not name it.
        StoreError: The campaign is damaged, or cannot be written.
        OracleUnavailableError: An oracle of the campaign cannot work here.
    """
    config = store.config()
    _check_oracles(config, oracles, str(store.directory))
    judge = ProcessJudge(config.setup())
    try:
        return triage(store, filters, judge, marks, again=True)
    finally:
        judge.close()


def _check_oracles(config: CampaignConfig, oracles: str, where: str) -> None:
    """A campaign's file may come from anybody: it does not decide which programs run."""
    if not oracles:
        refuse_programs(config.oracles, where)
    elif (FIRST_ORACLE, *oracles_beside(oracles)) != config.oracles:
        raise InputError("--oracles", f"the campaign has {','.join(config.oracles)}")


def judge_new(store: Store, setup: Setup, marks: Mapping[str, str]) -> Summary:
    """Triage at the end of a run: what is new, through all filters.

    Args:
        store: The campaign, whose driver this is.
        setup: What its workers worked with.
        marks: From `marks_in`.

    Raises:
        StoreError: The campaign cannot be written.
        OracleUnavailableError: An oracle does not work any more.
    """
    marker = StoreMarker(store.directory)
    judge = ProcessJudge(setup)
    try:
        return triage(marker, tuple(FILTERS), judge, marks)
    finally:
        judge.close()
        marker.close()


def sort_out(
    campaign: Campaign, store: Store, setup: Setup, marks: Mapping[str, str], *, as_json: bool
) -> str:
    """Triage at the end of a run: what filters explain is not new to the campaign any more.

    Args:
        campaign: The campaign, which has ended.
        store: Where it is kept.
        setup: What its workers worked with.
        marks: From `marks_in`.
        as_json: Say it at once, as JSON.

    Returns:
        What is to be said of it at the end; empty if there is nothing.
    """
    summary = judge_new(store, setup, marks)
    still = set(summary.new)
    campaign.new = [finding for finding in campaign.new if finding.bucket.name in still]
    if as_json:
        print(json_of(summary), flush=True)
    if as_json or not summary.judged:
        return ""
    return "".join(f"{printable(line)}\n" for line in summary.lines())


def json_of(summary: Summary) -> str:
    """A summary as one JSON object on one line; `event` tells it from others in logs."""
    return json.dumps(
        {
            "event": "triage",
            "judged": summary.judged,
            "marked_by_hand": summary.kept,
            "by_filter": summary.by_filter,
            "explained": [
                {"name": name, "state": state, "reason": reason} for name, state, reason in summary.explained
            ],
            "new": summary.new,
        }
    )

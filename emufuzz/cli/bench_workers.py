"""`emufuzz bench --workers`: campaigns of one worker and of several, as lines or as JSON."""

from __future__ import annotations

import json

import msgspec

from emufuzz.cli.errors import EXIT_OK, InputError
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.scaling import EARLY, Measured, scaling
from emufuzz.fuzz.store import StoreError


def report(config: CampaignConfig, workers: int, cases: int, rounds: int, *, as_json: bool) -> int:
    """Measure and print.

    Raises:
        InputError: There is no room for the campaigns.
        OracleUnavailableError: An oracle cannot work here.
    """
    try:
        found = scaling(config, workers, cases, rounds)
    except StoreError as error:
        raise InputError("", str(error)) from error
    if as_json:
        said = {"speedup": round(found.speedup, 3), "growth": round(found.growth, 4)}
        print(json.dumps(said | msgspec.to_builtins(found)))
        return EXIT_OK
    for pair in zip(found.one, found.several, strict=True):
        for each in pair:
            print(_line(each))
    print(f"{workers} workers / 1 worker = {found.speedup:.2f} (median of {rounds} pairs)")
    print(f"memory grew by {found.growth:.1%} at the most")
    return EXIT_OK


def _line(each: Measured) -> str:
    memory = f"{each.early_mib:>6,.0f} MiB at {EARLY:.0%}, {each.late_mib:>6,.0f} MiB at the end"
    return f"{each.workers:>3} workers {each.rate:>9,.0f} cases/s  {memory} of {each.cases:,} cases"

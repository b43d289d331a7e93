"""Campaign directories with findings that a test makes up."""

from __future__ import annotations

import msgspec

from emufuzz.case.build import build_case
from emufuzz.fuzz.accounting import BatchResult
from emufuzz.fuzz.cells import Tally
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.finding import ALONE, Finding
from emufuzz.fuzz.store import Store
from emufuzz.oracle.compare import Difference

VERSIONS = {"subject": "emulator", "oracle": "unicorn", "emufuzz": "0"}
ADC = b"\x11\xd8"


def made_up(leaf="11", mode="prot32", kind="gpr", code=ADC, batch=0, index=0, verdict=ALONE, **changes):
    """A finding; `changes` are fields of its case."""
    difference = Difference("rax", kind, "0x1", "0x2")
    case = msgspec.structs.replace(build_case(mode, code, rax=1, id=f"s1-b{batch}-{index}"), **changes)
    return Finding(leaf, kind, verdict, batch, index, case, (difference,), sentence="emulator is alone")


def result_with(number, findings=(), agreed=10, skipped=(("unicorn-x", 3),)):
    """What became of a batch."""
    found = BatchResult(number, agreed + sum(n for _, n in skipped) + len(findings), agreed, dict(skipped))
    found.cells = {("11", "prot32", 0, "ok", ""): Tally(found.cases, len(findings))}
    for finding in findings:
        found.add(finding)
    return found


def merge(store, number, findings=(), first=0, seconds=1.0, **more):
    """Merge a batch into a store as a driver does, so many seconds after its run has begun."""
    result = result_with(number, findings, **more)
    fresh = store.totals().merge(result)
    store.merge(result, first, result.cases, fresh, seconds)
    return fresh


def new_store(directory, config=None, budget=None):
    """A campaign that is running."""
    store = Store.create(directory, config or CampaignConfig(), budget)
    store.begin("local:1", VERSIONS)
    return store

"""Triage: filters, composed by name, that say which findings need nobody's attention (docs/triage.md)."""

from __future__ import annotations

from emufuzz.fuzz.triage.judgement import Judge, Judgement, PanelJudge
from emufuzz.fuzz.triage.marked import marks_of
from emufuzz.fuzz.triage.process import ProcessJudge
from emufuzz.fuzz.triage.registry import FILTERS, UnknownFilterError, chosen_filters
from emufuzz.fuzz.triage.run import Summary, triage

__all__ = [
    "FILTERS",
    "Judge",
    "Judgement",
    "PanelJudge",
    "ProcessJudge",
    "Summary",
    "UnknownFilterError",
    "chosen_filters",
    "marks_of",
    "triage",
]

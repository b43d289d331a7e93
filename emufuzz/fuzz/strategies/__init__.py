"""Hypothesis strategies for x86 instructions, machine states and cases (docs/hypothesis.md).

They need Hypothesis: `pip install emufuzz[hypothesis]`. Examples shrink to what is plain: to the first of
the modes and leaves asked for, without prefixes, registers and memory 0, segments flat, CPL 0.
"""

from __future__ import annotations

from emufuzz.fuzz.strategies.cases import cases, phys_cases
from emufuzz.fuzz.strategies.instructions import instructions
from emufuzz.fuzz.strategies.paths import PATHS_OF_STRATEGIES, path_cases
from emufuzz.fuzz.strategies.states import State, states, systems
from emufuzz.fuzz.strategies.values import addresses, words

__all__ = [
    "PATHS_OF_STRATEGIES",
    "State",
    "addresses",
    "cases",
    "instructions",
    "path_cases",
    "phys_cases",
    "states",
    "systems",
    "words",
]

"""What the SDM demands, as small declared rules over cases and outcomes (docs/oracle-rules.md)."""

from __future__ import annotations

from emufuzz.oracle.rules.oracle import RulesOracle
from emufuzz.oracle.rules.rule import Rule, Violation
from emufuzz.oracle.rules.table import RULES

__all__ = ["RULES", "Rule", "RulesOracle", "Violation"]

"""Structure-aware mutation and crossover of cases (docs/guidance.md).

`mutate` and `crossover` give valid cases: ones that the exchange format can hold, in a state that a
processor can be in, if their parents are. One module per dimension of a case changes that dimension.
"""

from emufuzz.fuzz.mutate.base import Scope
from emufuzz.fuzz.mutate.cross import crossover
from emufuzz.fuzz.mutate.mutate import mutate, vary_code, vary_machine, vary_registers

__all__ = ["Scope", "crossover", "mutate", "vary_code", "vary_machine", "vary_registers"]

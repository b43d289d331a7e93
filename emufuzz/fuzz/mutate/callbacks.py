"""Results of the emulator's callbacks: which call fails, and how (docs/case-format.md, Callbacks)."""

from __future__ import annotations

from random import Random
from typing import Any, Final

from emufuzz.case.fields import RESULTS
from emufuzz.case.model import Case
from emufuzz.fuzz.mutate.base import Scope, with_extra
from emufuzz.subject.flat.scripted import BOOL_OPS, PORT_OPS, RESULT_OPS, STATUS_OPS

_MOST: Final = 4
_FAULTS: Final[tuple[dict[str, Any] | None, ...]] = (
    None, None, {"vector": 14, "error_code": 2, "address": "0x8ff8"}, {"vector": 13, "error_code": 0},
    {"vector": 12, "error_code": 0}, {"vector": 6},
)  # fmt: skip


def other_callbacks(case: Case, rng: Random, scope: Scope) -> Case | None:
    """One call more that is answered by the script, or one less; not on exit paths, where KVM answers."""
    if not scope.callbacks or case.path is not None:
        return None
    script = list((case.extra or {}).get("callbacks", ()))
    if script and rng.random() < 0.4:
        del script[rng.randrange(len(script))]
    if len(script) < _MOST:
        new = _answer(rng)
        script = [old for old in script if (old["op"], old.get("nth", 1)) != (new["op"], new.get("nth", 1))]
        script.append(new)
    return with_extra(case, "callbacks", script)


def _answer(rng: Random) -> dict[str, Any]:
    """One entry that a callback can follow."""
    kind = rng.randrange(8)
    if kind == 0:
        entry: dict[str, Any] = {"op": rng.choice(STATUS_OPS), "result": 1}
    elif kind == 1:
        entry = {"op": rng.choice(BOOL_OPS), "result": rng.getrandbits(1)}
    elif kind == 2:
        entry = {"op": rng.choice(PORT_OPS), "result": "io_needed"}
    else:
        entry = {"op": rng.choice(RESULT_OPS), "result": rng.choice(RESULTS[1:])}
        fault = rng.choice(_FAULTS)
        if entry["result"] == "propagate_fault" and fault is not None:
            entry["fault"] = fault
    if rng.random() < 0.4:
        entry["nth"] = rng.randrange(2, 4)
    return entry

"""The fuzz target: an encoded case through subject, oracles and comparison. Loads the emulator.

What libFuzzer makes may be any case. One that the campaign is not about is brought into its scope if that
takes little, else skipped under a reason; every execution is accounted for as one case.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from emufuzz.case.check import check_system
from emufuzz.case.codec import decode_case
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case
from emufuzz.fuzz.accounting import BatchResult
from emufuzz.fuzz.cells import Tally, cpl_of
from emufuzz.fuzz.kvm.generate import PathOptions
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.mutate import Scope
from emufuzz.fuzz.mutate.base import agreed
from emufuzz.fuzz.tasks import Setup

#: The path whose cases have states that no VM entry accepts.
_INVALID: Final = "invalid-guest-state"
#: Instructions of a case; more only take time.
_MOST_INSTRUCTIONS: Final = 8
#: Iterations that REP may ask for.
_MOST_REPEATS: Final = 256
_RCX: Final = 1
_NUMBER: Final = re.compile(r"0x[0-9a-f]+|\d+")


def scope_of(setup: Setup) -> Scope:
    """What the cases of a campaign may be."""
    options = setup.options
    return Scope(options.modes, options.paths if isinstance(options, PathOptions) else ())


class Target:
    """Runs encoded cases, and keeps the account of those that were not reported yet."""

    def __init__(self, loop: CampaignLoop, scope: Scope) -> None:
        self.loop = loop
        self._scope = scope
        self.result = BatchResult(0)

    def begin(self, number: int) -> None:
        """Begin a new account, for cases of batch `number`."""
        self.result = BatchResult(number)

    def run(self, case: Case, index: int) -> None:
        """Run a case that `fitted` gave, the one at place `index` of its batch."""
        result = self.result
        result.cases += 1
        reason = self.refusal(case)
        if reason:
            result.skipped[reason] = result.skipped.get(reason, 0) + 1
            key = "", case.mode, cpl_of(case), "unhandleable", case.path or ""
            tally = result.cells.setdefault(key, Tally(0, 0, index, case.code))
            tally.cases += 1
            return
        self.loop.merge(result, self.loop.run_carefully(result.number, (case,), frozenset(), index))

    def decoded(self, data: bytes) -> Case:
        """The case that bytes stand for, brought into the campaign's scope where that takes little."""
        return fitted(decode_case(data), self._scope)

    def refusal(self, case: Case) -> str:
        """Why a case is none of this campaign; empty if it is."""
        if case.mode not in self._scope.modes:
            return f"mode: {case.mode} is not asked for"
        if case.path is None or case.path != _INVALID:
            problems = check_system(case.system, case.rflags)
            if problems:
                return f"state: no processor can be in it: {problems[0]}"
        try:
            self.loop.subject.check(case)
            if case.path is None:
                self.loop.oracle.check(case)
        except UnsupportedCaseError as error:
            return _NUMBER.sub("..", f"{self.loop.subject.name}: {error}")
        except Exception:  # noqa: BLE001 - a check that fails is a finding, which running the case makes
            return ""
        return ""


def fitted(case: Case, scope: Scope) -> Case:
    """The case on one of the scope's paths, or on none, and without what only takes time."""
    path, extra = case.path, case.extra
    if not scope.paths:
        path, extra = None, None
    elif path not in scope.paths:
        path = scope.paths[sum(case.code) % len(scope.paths)]
    if extra is not None and "callbacks" in extra:
        extra = {name: value for name, value in extra.items() if name != "callbacks"} or None
    gpr = case.gpr
    if gpr[_RCX] & 0xFFFF > _MOST_REPEATS or gpr[_RCX] >> 16:
        gpr = _fewer_repeats(case)
    fit = msgspec.structs.replace(
        case,
        path=path,
        extra=extra,
        gpr=gpr,
        count=1 + (case.count - 1) % _MOST_INSTRUCTIONS,
        emul_type=0,
        single=0,
        vendor="intel",
    )
    return agreed(fit)


def _fewer_repeats(case: Case) -> tuple[int, ...]:
    """Registers with few iterations for a repeated string instruction; as they are for others."""
    if not {0xF2, 0xF3} & set(case.code) or not _STRINGS & set(case.code):
        return case.gpr
    count = case.gpr[_RCX] % _MOST_REPEATS
    return (*case.gpr[:_RCX], count, *case.gpr[_RCX + 1 :])


#: Opcodes of INS, OUTS, MOVS, CMPS, STOS, LODS, SCAS.
_STRINGS: Final = frozenset((*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0)))

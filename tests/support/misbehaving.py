"""Oracles for tests of workers: one that agrees with everything; others lie, hang, die or eat memory.

Worker processes import them by name; which case is the victim is part of the class.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from emufuzz.fuzz.generate import Options
from emufuzz.fuzz.tasks import Setup
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.subject.flat import FlatSubject

#: Where AnswersTheSecondTime leaves its mark; worker processes inherit it.
MARK = "EMUFUZZ_TEST_MARK"


class Twin:
    """An oracle that is the subject again."""

    ledger = ()
    name = "twin"

    def __init__(self):
        self._subject = FlatSubject(events=False)

    def check(self, case):
        pass

    def run(self, batch):
        return self._subject.run(batch)

    def unchecked(self, case, outcome):
        return ()

    def fingerprint(self):
        return {"oracle": self.name, "twin": "1"}

    def close(self):
        pass


class Liar(Twin):
    """Wrong about RBX in all cases of real mode."""

    def run(self, batch):
        outcomes = super().run(batch)
        for case, outcome in zip(batch, outcomes, strict=True):
            if case.mode == "real":
                gpr = list(outcome.gpr)
                gpr[3] ^= 1
                outcome.gpr = tuple(gpr)
        return outcomes


class Victim(Twin):
    """Does something else than answer when its victim is in the batch."""

    victim = "s1-b0-300"

    def run(self, batch):
        if any(case.id == self.victim for case in batch):
            self.misbehave()
        return super().run(batch)


class Raises(Victim):
    def misbehave(self):
        raise ValueError("victim")


class Dies(Victim):
    def misbehave(self):
        os._exit(3)


class Hangs(Victim):
    def misbehave(self):
        time.sleep(600)


class Eats(Victim):
    """Takes a gigabyte, a little at a time, and keeps it."""

    def misbehave(self):
        eaten = []
        for _ in range(64):
            eaten.append(b"\1" * (16 << 20))
            time.sleep(0.02)
        time.sleep(600)


class AnswersTheSecondTime(Victim):
    """Dies on its victim once."""

    def misbehave(self):
        mark = Path(os.environ[MARK])
        if not mark.exists():
            mark.touch()
            os._exit(3)


class NeverStarts(Twin):
    def __init__(self):
        os._exit(7)


class StartsAtSecondTry(Twin):
    """Ends the first process that makes one; the file named by MARK tells the second one so."""

    def __init__(self):
        mark = Path(os.environ[MARK])
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().__init__()


class CannotWorkHere(Twin):
    def __init__(self):
        raise OracleUnavailableError("twin: not on this machine")


class StartsSlowly(Twin):
    def __init__(self):
        time.sleep(1)
        super().__init__()


def subject():
    return FlatSubject(events=False)


def setup_with(oracle, **more):
    """Workers' setup with an oracle of this module."""
    return Setup(1, Options(), subject, oracle, **more)

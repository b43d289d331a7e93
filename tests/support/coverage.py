"""Campaign directories with cells, made without workers: the subject itself is the oracle, and lies."""

from __future__ import annotations

from emufuzz.fuzz.accounting import Totals
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.kvm.generate import PathOptions, generator_of
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.store import Store
from emufuzz.subject.flat import FlatSubject
from emufuzz.subject.kvm import KvmSubject

PATHS = ("ept-violation", "io-string", "fep")


class Liar:
    """An oracle that is the subject again, wrong about RBX in real mode, with a gap about RFLAGS."""

    ledger = ()
    name = "liar"

    def __init__(self, make):
        self._subject = make()

    def check(self, case):
        pass

    def run(self, batch):
        outcomes = self._subject.run(batch)
        for case, outcome in zip(batch, outcomes, strict=True):
            if case.mode == "real":
                gpr = list(outcome.gpr)
                gpr[3] ^= 1
                outcome.gpr = tuple(gpr)
        return outcomes

    def unchecked(self, case, outcome):
        return (("rflags", "liar-flags"),)


def flat():
    return FlatSubject(events=False)


def make_campaign(directory, *, batches=2, size=1024, subject="emulator", modes=None):
    """A campaign of some batches, 1.5 seconds each, and half a second in the end; gives its totals."""
    kvm = subject == "kvm"
    config = CampaignConfig(
        subject=subject, paths=PATHS if kvm else (), **({"modes": modes} if modes else {})
    )
    options = config.setup().options
    assert isinstance(options, PathOptions) == kvm
    make = KvmSubject if kvm else flat
    loop, totals = CampaignLoop(make(), Liar(make)), Totals()
    store = Store.create(directory, config, batches * size)
    store.begin("local:1", {"subject": subject, "oracle": "liar"})
    for number in range(batches):
        result = loop.run_batch(number, generator_of(config.seed, number, options).cases(size))
        store.merge(result, 0, size, totals.merge(result), 1.5 * (number + 1))
    store.finish("done", 1.5 * batches + 0.5)
    store.close()
    return totals

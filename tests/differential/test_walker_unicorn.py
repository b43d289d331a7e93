"""KVM's guest page walker against Unicorn's on random tables: faults, frames, accessed and dirty bits.

Every kind of disagreement has a name here, an exact condition, and a verdict:

* `pdpte-at-cr3-load`: a present PDPTE with reserved bits. KVM is right: PAE paging checks the four
  PDPTEs when they are loaded, and MOV to CR3 gets a #GP (SDM Vol. 3A 4.4.1). Unicorn reads the one
  it needs at each walk and raises a #PF for it.
* `fetch-bit-without-pae`: 32-bit paging with EFER.NXE. Unicorn is right: the I/D bit of the error
  code needs CR4.SMEP or both CR4.PAE and EFER.NXE (SDM Vol. 3A 4.7). KVM looks at EFER.NXE alone.
* `pse36-width`: bits 20:17 of a 4 MiB page. Unicorn is right: they are bits 39:36 of the address
  when MAXPHYADDR allows (SDM Vol. 3A Table 4-4). KVM always has 36 bits and calls them reserved.
* `accessed-before-fault`: Unicorn sets A in the entries above the one that faults, KVM writes
  nothing when the access faults. The SDM (Vol. 3A 4.8) lets a processor do either.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from support.page_walks import MODES, Result, Trial, Walkers, random_trial

from emufuzz.arch.cr import EFER_NX, X86_CR4_PSE, X86_CR4_SMEP
from emufuzz.kvm.mmu.pferr import PFERR_FETCH_MASK, PFERR_RSVD_MASK, PT_ACCESSED_MASK

_PS = 1 << 7
_PSE36_ABOVE_36 = 0xF << 17


@pytest.fixture(scope="module")
def walkers():
    opened = Walkers()
    yield opened
    opened.close()


def _pse36_trial(trial: Trial) -> Trial | None:
    """The trial with a 4 MiB page below 64 GiB, if its page is above."""
    address, entry = trial.entries[0]
    if trial.mode != "2-level" or not trial.cr4 & X86_CR4_PSE or not entry & _PS:
        return None
    if not entry & _PSE36_ABOVE_36:
        return None
    return replace(trial, entries=[(address, entry & ~_PSE36_ABOVE_36), *trial.entries[1:]])


def _explain(walkers: Walkers, trial: Trial, ours: Result, theirs: Result) -> set[str]:
    """Names of the disagreements; an assertion fails on one that has no name."""
    names: set[str] = set()
    if ours.refused:
        return {"pdpte-at-cr3-load"}
    low = _pse36_trial(trial)
    if low is not None and ours.error is not None and ours.error & PFERR_RSVD_MASK:
        # With the high address bits cleared, KVM must agree with what Unicorn did with them set.
        names.add("pse36-width")
        high = trial.entries[0][1] & _PSE36_ABOVE_36
        ours = walkers.run(low)[0]
        ours.entries[0] |= high
        ours.gfn = theirs.gfn if theirs.error is None else None
    error = ours.error
    fetch_bit = error is not None and trial.mode == "2-level" and trial.efer & EFER_NX
    if fetch_bit and error & PFERR_FETCH_MASK and not trial.cr4 & X86_CR4_SMEP:
        names.add("fetch-bit-without-pae")
        error &= ~PFERR_FETCH_MASK
    assert error == theirs.error, (trial, ours, theirs)
    if ours.gfn is not None and theirs.gfn is not None:
        assert ours.gfn == theirs.gfn, (trial, ours, theirs)
    if ours.entries != theirs.entries:
        assert error is not None, (trial, ours, theirs)
        changed = [
            i for i, pair in enumerate(zip(ours.entries, theirs.entries, strict=True)) if pair[0] != pair[1]
        ]
        assert all(theirs.entries[i] == ours.entries[i] | PT_ACCESSED_MASK for i in changed), (trial, theirs)
        names.add("accessed-before-fault")
    return names


def _compare(walkers: Walkers, seed: int, trials: int) -> Counter[str]:
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    for number in range(trials):
        mode = MODES[number % len(MODES)]
        trial = random_trial(rng, mode)
        ours, theirs = walkers.run(trial)
        names = _explain(walkers, trial, ours, theirs) if ours != theirs else set()
        seen.update(names)
        seen[
            f"{mode} {'fault' if ours.error is not None else 'refused' if ours.refused else 'translated'}"
        ] += 1
    return seen


KINDS = {"pdpte-at-cr3-load", "fetch-bit-without-pae", "pse36-width", "accessed-before-fault"}


def _assert_everything_occurred(seen: Counter[str], trials: int) -> None:
    assert set(seen) >= KINDS
    outcomes = {name: count for name, count in seen.items() if name not in KINDS}
    assert sum(outcomes.values()) == trials
    for mode in MODES:
        assert outcomes[f"{mode} translated"] > trials // 20
        assert outcomes[f"{mode} fault"] > trials // 20


def test_walks_agree_with_unicorn(walkers):
    _assert_everything_occurred(_compare(walkers, seed=2024, trials=12_000), 12_000)


def documented() -> dict[str, int]:
    """Disagreement -> tables, from docs/kvm-model.md."""
    text = (Path(__file__).parents[2] / "docs" / "kvm-model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d,]+) \|", text, re.MULTILINE)
    return {name: int(count.replace(",", "")) for name, count in rows if name in KINDS}


def test_the_document_knows_every_kind():
    assert set(documented()) == KINDS


@pytest.mark.slow
def test_walks_agree_with_unicorn_on_200000_tables(walkers):
    seen = _compare(walkers, seed=6, trials=200_000)
    _assert_everything_occurred(seen, 200_000)
    assert {name: seen[name] for name in KINDS} == documented()

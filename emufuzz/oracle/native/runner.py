"""Runs cases in children, a batch at a time."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

from emufuzz.arch.regs import VCPU_REGS_RCX
from emufuzz.case.model import PAGE_SHIFT, PAGE_SIZE, ZERO_PAGE, Case, Memory, Outcome, Segment, System
from emufuzz.oracle.native.child import PATIENCE, Child, DeadChildError
from emufuzz.oracle.native.layout import (
    COMMON_FPU,
    COMMON_FS_BASE,
    COMMON_SELECTORS,
    COMMON_STAMP,
    FPU_SIZE,
    IN_CODE,
    IN_SIZE,
    IN_WORDS,
    MAX_CODE,
    MAX_PAGES,
    RECORDS,
    SELECTORS_SIZE,
    USER_END,
)
from emufuzz.oracle.native.outcomes import HOST_FLAGS, OWN_FLAGS, Reader
from emufuzz.oracle.native.run import Run, make_run
from emufuzz.oracle.native.space import Pages, Setup

#: SYSCALL, SYSENTER and INT 0x80 would reach the host's kernel.
GAP_SYSTEM_CALL: Final = "native-system-call"

#: So many cases of one System and Memory share a child whose pages of code are there for all of them.
SHARED_FROM: Final = 8
#: Pages of the aligned block that comes with a page of code.
BLOCK: Final = 16
_MAX_CHILDREN: Final = 32
_CACHED: Final = 1024
_NOTHING: Final = bytes(MAX_CODE)
_BASES: Final = struct.Struct("<QQ")
_WORD: Final = struct.Struct("<Q")

_Key = tuple[frozenset[int], tuple[Segment | None, ...], bool]


class NativeRunner:
    """Keeps children and what it knows of Systems and Memories."""

    def __init__(self, patience: float = PATIENCE) -> None:
        """Start nothing yet.

        Args:
            patience: seconds without progress after which a child is ended.
        """
        self._patience = patience
        self._children: OrderedDict[_Key, Child] = OrderedDict()
        self._loaded: dict[Child, tuple[Setup, Memory]] = {}
        self._setups: dict[tuple[int, str], Setup] = {}
        self._memories: dict[int, tuple[Memory, Pages]] = {}
        self._stamp = 0
        self.starts = 0

    def setup(self, system: System, mode: str) -> Setup:
        """The Setup of a System; UnsupportedCaseError if there is none."""
        known = self._setups.get((id(system), mode))
        if known is None:
            if len(self._setups) >= _CACHED:
                self._setups.clear()
            known = self._setups[id(system), mode] = Setup(system, mode)
        return known

    def pages(self, memory: Memory) -> Pages:
        """The Pages of a Memory; UnsupportedCaseError if they are too many."""
        known = self._memories.get(id(memory))
        if known is None:
            if len(self._memories) >= _CACHED:
                self._memories.clear()
            known = self._memories[id(memory)] = (memory, Pages(memory))
        return known[1]

    def plan(self, place: int, case: Case) -> Run:
        """How a case would be run; UnsupportedCaseError if it cannot be."""
        return make_run(place, case, self.setup(case.system, case.mode), self.pages(case.mem), OWN_FLAGS)

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """Run cases; the outcomes come in the same order."""
        groups: dict[tuple[int, int, str], list[Run]] = {}
        outcomes: dict[int, Outcome] = {}
        key: tuple[int, int, str] | None = None
        for place, case in enumerate(batch):
            if key != (now := (id(case.system), id(case.mem), case.mode)):
                key, group = now, groups.setdefault(now, [])
                setup, pages = self.setup(case.system, case.mode), self.pages(case.mem)
            run = make_run(place, case, setup, pages, OWN_FLAGS)
            if run.plan.system_call:
                outcomes[place] = _not_run(case)
            else:
                group.append(run)
        for runs in groups.values():
            self._run_group(runs, outcomes)
        return [outcomes[place] for place in range(len(batch))]

    def _run_group(self, runs: list[Run], outcomes: dict[int, Outcome]) -> None:
        """Run cases of one System and Memory."""
        shared = len(runs) >= SHARED_FROM
        for start in range(0, len(runs), RECORDS):
            part = runs[start : start + RECORDS]
            if shared:
                part = self._run_shared(part, outcomes)
            for run in part:
                self._run_alone(run, outcomes)

    def _run_shared(self, runs: list[Run], outcomes: dict[int, Outcome]) -> list[Run]:
        """Run cases in one child; those that must be run alone are left over."""
        needed = {page for run in runs for page in run.code_pages}
        case = runs[0].case
        setup, pages = self.setup(case.system, case.mode), self.pages(case.mem)
        child = self._shared_child(setup, pages, needed)
        left = [run for run in runs if run.behind in child.index]
        runs = [run for run in runs if run.behind not in child.index]
        while runs:
            child = self._shared_child(setup, pages, needed)
            runs, dirty = self._run_records(child, runs, outcomes, pages)
            left += dirty
        return left

    def _run_alone(self, run: Run, outcomes: dict[int, Outcome]) -> None:
        """Run a case in a child with its own pages and no others."""
        case = run.case
        setup, pages = self.setup(case.system, case.mode), self.pages(case.mem)
        child = self._child((pages.mapped | {*run.code_pages}, setup.ldt, True))
        self._run_records(child, [run], outcomes, pages)

    def _run_records(
        self, child: Child, runs: list[Run], outcomes: dict[int, Outcome], pages: Pages
    ) -> tuple[list[Run], list[Run]]:
        """Run cases; left are those behind one that ended the child, and those that must be run alone."""
        case = runs[0].case
        setup = self.setup(case.system, case.mode)
        self._load(child, setup, case.mem)
        self._pack(child, runs, pages)
        finished, failure = len(runs), None
        try:
            child.run(len(runs), self._patience)
        except DeadChildError as error:
            if not error.known and len(runs) > 1:
                self._forget(child)
                return [], runs
            failure = error
            finished = min(child.current, len(runs) - 1)
        reader, alone = Reader(child, setup, pages), []
        for number, run in enumerate(runs[:finished]):
            outcome = reader.outcome(number, run)
            if outcome is None:
                alone.append(run)
            else:
                outcomes[run.place] = outcome
        if failure is not None:
            outcomes[runs[finished].place] = _ended(runs[finished].case, failure)
            self._forget(child)
        elif self._spoiled(child, pages):
            self._forget(child)
            return [], runs
        return runs[finished + 1 :], alone

    def _load(self, child: Child, setup: Setup, memory: Memory) -> None:
        """Give a child what the cases have in common."""
        self._stamp += 1
        shared, arena, place = child.memory, child.arena, child.arena.common
        _WORD.pack_into(shared, place + COMMON_STAMP, self._stamp)
        known = self._loaded.get(child)
        if known is None or known[0] is not setup:
            shared[place + COMMON_SELECTORS : place + COMMON_SELECTORS + SELECTORS_SIZE] = setup.selectors
            _BASES.pack_into(shared, place + COMMON_FS_BASE, *setup.bases)
            shared[place + COMMON_FPU : place + COMMON_FPU + FPU_SIZE] = setup.fpu
        if known is None or known[1] is not memory:
            for index, number in enumerate(child.layout.pages):
                page = memory.pages.get(number, ZERO_PAGE)
                for area in (arena.pristine, arena.live):
                    shared[area + index * PAGE_SIZE : area + (index + 1) * PAGE_SIZE] = page
        self._loaded[child] = (setup, memory)

    def _pack(self, child: Child, runs: list[Run], pages: Pages) -> None:
        """Write the records."""
        shared, place, index = child.memory, child.arena.records_in, child.index
        watched = pages.mapped.union(*(run.code_pages for run in runs))
        mask = sum(1 << index[page] for page in watched)
        for run in runs:
            case, laid = run.case, run.laid
            gpr = case.gpr
            if run.left:
                gpr = (gpr[0], gpr[VCPU_REGS_RCX] - run.left, *gpr[2:])
            IN_WORDS.pack_into(
                shared, place, *gpr, case.rip, run.flags | HOST_FLAGS, run.address, len(laid), mask
            )
            under = _NOTHING
            if not pages.mapped.isdisjoint(run.code_pages):
                under = _under(case.mem, run.address)
            record = run.plan.record if laid is run.plan.laid else laid.ljust(MAX_CODE, b"\0")
            shared[place + IN_CODE : place + IN_CODE + 2 * MAX_CODE] = record + under
            place += IN_SIZE

    def _spoiled(self, child: Child, pages: Pages) -> bool:
        """Whether a case has written to a page that is not even there for the code of another one."""
        shared, place = child.memory, child.arena.live
        return any(
            shared[place + index * PAGE_SIZE : place + (index + 1) * PAGE_SIZE] != ZERO_PAGE
            for number, index in child.index.items()
            if number not in pages.mapped
        )

    def _shared_child(self, setup: Setup, pages: Pages, needed: set[int]) -> Child:
        """A child with the pages of a Memory, and with those of code, in blocks."""
        key = (pages.mapped, setup.ldt, False)
        known = self._children.get(key)
        if known is not None and needed <= known.index.keys():
            return self._child(key)
        extra = _blocks(needed - pages.mapped, pages)
        if known is not None:
            together = extra | known.index.keys()
            extra = together if len(together) <= MAX_PAGES else extra
            self._forget(known)
        if len(pages.mapped | extra) > MAX_PAGES:
            extra = needed
        return self._child(key, extra)

    def _child(self, key: _Key, extra: Iterable[int] = ()) -> Child:
        child = self._children.get(key)
        if child is None:
            while len(self._children) >= _MAX_CHILDREN:
                self._forget(next(iter(self._children.values())))
            self.starts += 1
            child = self._children[key] = Child(sorted({*key[0], *extra}), key[1])
        self._children.move_to_end(key)
        return child

    def _forget(self, child: Child) -> None:
        """End a child."""
        for key in [key for key, known in self._children.items() if known is child]:
            del self._children[key]
        self._loaded.pop(child, None)
        child.close()

    def children(self) -> list[Child]:
        """The children that are there."""
        return [*self._children.values()]

    def close(self) -> None:
        """End all children."""
        for child in self.children():
            self._forget(child)


def _blocks(code: set[int], pages: Pages) -> set[int]:
    """Pages of code with all of the aligned block around each, unless the Memory has pages in it."""
    found = set(code)
    for page in code:
        block = range(page & -BLOCK, (page & -BLOCK) + BLOCK)
        if pages.mapped.isdisjoint(block) and block[0] and block[-1] < USER_END >> PAGE_SHIFT:
            found.update(block)
    return found


def _under(memory: Memory, address: int) -> bytes:
    """What a Memory has where code is laid: MAX_CODE bytes."""
    pages, offset = memory.pages, address & PAGE_SIZE - 1
    first = pages.get(address >> PAGE_SHIFT, ZERO_PAGE)[offset : offset + MAX_CODE]
    return first + pages.get((address >> PAGE_SHIFT) + 1, ZERO_PAGE)[: MAX_CODE - len(first)]


def _not_run(case: Case) -> Outcome:
    unchecked = (("all", GAP_SYSTEM_CALL),)
    return Outcome(case.id, case.gpr, case.rip, case.rflags, case.system, unchecked=unchecked)


def _ended(case: Case, failure: DeadChildError) -> Outcome:
    """The outcome of the case that ended its child."""
    outcome = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system)
    if failure.hang:
        outcome.hang = True
    else:
        outcome.crash = f"native: {failure}"
    return outcome

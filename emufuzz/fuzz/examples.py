"""Cases of a campaign, generated again from where they are: it keeps places, not cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter

from emufuzz.case.model import Case
from emufuzz.fuzz.config import ATHERIS, CampaignConfig
from emufuzz.fuzz.generate import Generator
from emufuzz.fuzz.guided.generate import GuidedGenerator
from emufuzz.fuzz.guided.guide import Guide, Kept
from emufuzz.fuzz.kvm.generate import generator_of
from emufuzz.fuzz.store import StoreView
from emufuzz.fuzz.store.corpus import corpus_of


class ExampleError(LookupError):
    """A place at which the campaign has no case, or none that can be generated; the message names it."""


def example_case(view: StoreView, batch: int, index: int) -> Case:
    """The case at a place of a campaign.

    Raises:
        ExampleError: The campaign has not come to this place.
    """
    merged = "SELECT 1 FROM batches WHERE number = ? AND ? >= first AND ? < first + cases"
    if not view.rows(merged, (batch, index, index)):
        raise ExampleError(f"{view.directory}: no case {index} of batch {batch} was run")
    config = view.config()
    return generated_case(config, batch, index, _kept(view, config))


def example_cases(view: StoreView, places: Iterable[tuple[int, int]]) -> Iterator[tuple[str, Case]]:
    """The cases at several places as (`BATCH:PLACE`, case), in order; each batch is generated once."""
    config = view.config()
    generator = _generators(config, _kept(view, config))
    for batch, group in groupby(sorted(set(places)), key=itemgetter(0)):
        indices = [index for _, index in group]
        cases = generator(batch).cases(indices[-1] + 1)
        yield from ((f"{batch}:{index}", cases[index]) for index in indices)


def generated_case(config: CampaignConfig, batch: int, index: int, kept: Kept | None = None) -> Case:
    """The case that a configuration gives at a place; a guided one with the corpus that is kept of it."""
    return _generators(config, kept)(batch).cases(index + 1)[index]


def _kept(view: StoreView, config: CampaignConfig) -> Kept | None:
    return corpus_of(view) if config.setup().guided else None


def _generators(config: CampaignConfig, kept: Kept | None) -> Callable[[int], Generator | GuidedGenerator]:
    """What gives the generator of each batch."""
    if config.generator == ATHERIS:
        raise ExampleError("cases that libFuzzer made cannot be generated again")
    setup = config.setup()
    if setup.guided:
        return Guide(setup.seed, setup.options, kept).generator
    return lambda batch: generator_of(setup.seed, batch, setup.options)

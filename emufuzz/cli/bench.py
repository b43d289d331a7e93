"""`emufuzz bench`: what a case costs in each part of a campaign, measured side by side."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from emufuzz.cli.errors import EXIT_OK, InputError
from emufuzz.cli.names import default_oracles

if TYPE_CHECKING:
    from emufuzz.fuzz.config import CampaignConfig

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

FULL_SECONDS = 60.0
QUICK_SECONDS = 15.0


@app.command("bench")
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Finish in under 30 seconds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the generated cases.")] = 1,
    generators: Annotated[
        str | None, typer.Option(help="Comma-separated generators to hold against each other instead.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="With --generators: seeds, from --seed on.")] = 3,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=1e6, help="With --generators: processor time per run.")
    ] = FULL_SECONDS,
    subject: Annotated[
        str, typer.Option(help="With --generators and --workers: emulator or kvm.")
    ] = "emulator",
    bugs: Annotated[bool, typer.Option("--bugs", help="With --generators: with all seeded bugs.")] = False,
    workers: Annotated[
        int, typer.Option(min=0, max=256, help="Hold campaigns of N workers against those of one instead.")
    ] = 0,
    cases: Annotated[int, typer.Option(min=4096, help="With --workers: cases of each campaign.")] = 100_000,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="With --workers: pairs of campaigns.")] = 5,
) -> int:
    """Measure raw Unicorn, the oracle, the emulator and a whole campaign on the same generated cases.

    One register state per instruction, so every case pays for its translation. The parts take turns
    within one run, and medians are given: trust the ratios, absolute times depend on the machine.
    With --generators each generator runs for the same processor time, and what it reached is counted.
    With --workers whole campaigns take turns; also given is by how much their memory has grown.
    """
    if workers:
        from emufuzz.cli.bench_workers import report

        return report(config_of(seed, subject), workers, cases, rounds, as_json=as_json)
    if generators is not None:
        seeds_of = range(seed, seed + seeds)
        return _contest(_names(generators), seeds_of, seconds, subject, bugs=bugs, as_json=as_json)
    from emufuzz.fuzz.bench import run_bench

    result = run_bench(seed, QUICK_SECONDS if quick else FULL_SECONDS, default_oracles()[1:])
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        print("\n".join(result.lines()))
    return EXIT_OK


def _names(text: str) -> list[str]:
    from emufuzz.cli.campaigns import names

    return names(text)


def _contest(
    generators: list[str], seeds: range, seconds: float, subject: str, *, bugs: bool, as_json: bool
) -> int:
    """A line per generator and seed, as soon as it is there."""
    import msgspec

    from emufuzz.fuzz.config import ATHERIS
    from emufuzz.fuzz.contest import Score, contest

    if bugs and ATHERIS in generators:
        raise InputError("--bugs", "libFuzzer's processes have one seeded bug at most")
    if not as_json:
        print("  ".join(f"{name:>10}" for name in Score.__struct_fields__))
    for seed in seeds:
        for generator in generators:
            score = contest(config_of(seed, subject, generator), seconds, bugs=bugs)
            if as_json:
                print(msgspec.json.encode(score).decode(), flush=True)
            else:
                print("  ".join(f"{value:>10}" for value in msgspec.structs.astuple(score)), flush=True)
    return EXIT_OK


def config_of(seed: int, subject: str, generator: str = "structured") -> CampaignConfig:
    """A campaign of all modes, and of all paths if there are any.

    Raises:
        InputError: There is no such subject or generator.
    """
    from emufuzz.case.paths import PATHS
    from emufuzz.fuzz.config import CampaignConfig, ConfigError

    paths = PATHS if subject == "kvm" else ()
    config = CampaignConfig(seed=seed, subject=subject, paths=paths, generator=generator)
    try:
        config.check()
    except ConfigError as error:
        field, _, reason = str(error).partition(": ")
        raise InputError(f"--{field}", reason) from error
    return config

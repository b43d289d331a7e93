"""`emufuzz bench`: what a case costs in each part of a campaign, measured side by side."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from emufuzz.cli.errors import EXIT_OK

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

FULL_SECONDS = 60.0
QUICK_SECONDS = 15.0


@app.command("bench")
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Finish in under 30 seconds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the generated cases.")] = 1,
) -> int:
    """Measure raw Unicorn, the oracle, the emulator and a whole campaign on the same generated cases.

    One register state per instruction, so every case pays for its translation. The parts take turns
    within one run, and medians are given: trust the ratios, absolute times depend on the machine.
    """
    from emufuzz.fuzz.bench import run_bench

    result = run_bench(seed, QUICK_SECONDS if quick else FULL_SECONDS)
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        print("\n".join(result.lines()))
    return EXIT_OK

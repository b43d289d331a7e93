"""`emufuzz fuzz`: generate cases, compare the emulator with an oracle, keep what they disagree on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emufuzz.arch.modes import MODES
from emufuzz.cli.errors import EXIT_DISAGREE, EXIT_OK, InputError

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

DEFAULT_SECONDS = 60.0
DEFAULT_OUT = Path("emufuzz-out")


@app.command("fuzz")
def fuzz(
    seconds: Annotated[float | None, typer.Option(help="Stop after so many seconds.")] = None,
    cases: Annotated[int | None, typer.Option(help="Stop after so many cases.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the generated cases.")] = 1,
    modes: Annotated[str, typer.Option(help="Comma-separated CPU modes.")] = ",".join(MODES),
    out: Annotated[Path, typer.Option(help="Campaign directory.")] = DEFAULT_OUT,
    workers: Annotated[int, typer.Option(help="Worker processes; the findings do not depend on it.")] = 1,
    states: Annotated[int, typer.Option(help="Register states per instruction.")] = 1,
    seed_bug: Annotated[str, typer.Option(help="Break a handler on purpose (a name, or `list`).")] = "",
) -> int:
    """Fuzz the emulator against Unicorn: 60 seconds unless --seconds or --cases says otherwise.

    Findings go to OUT/findings, one file per (leaf, mode, kind of difference). One that OUT already
    has is known and not reported again. Exit code: 0 = no new findings, 1 = new findings, 2 = bad
    input.
    """
    from emufuzz.cli.screen import Screen
    from emufuzz.fuzz.bugs import BUGS
    from emufuzz.fuzz.campaign import Campaign, Limits
    from emufuzz.fuzz.engines import campaign_versions, make_oracle, make_subject
    from emufuzz.fuzz.generate import Options
    from emufuzz.fuzz.store import Store, StoreError
    from emufuzz.fuzz.workers import Setup

    if seed_bug == "list":
        for name, bug in BUGS.items():
            print(f"{name:12} {bug.family:8} {bug.what}")
        return EXIT_OK
    chosen = _modes(modes)
    _check(seconds, cases, workers, states)
    if seed_bug and seed_bug not in BUGS:
        raise InputError("--seed-bug", f"no bug {seed_bug!r}, known are {', '.join(BUGS)}")
    if seconds is None and cases is None:
        seconds = DEFAULT_SECONDS
    try:
        ran = campaign_versions() | ({"seed_bug": seed_bug} if seed_bug else {})
        store = Store(out, ran)
        store.begin(
            {"seed": seed, "cases": cases, "modes": list(chosen), "states": states, "seed_bug": seed_bug}
        )
    except StoreError as error:
        raise InputError("--out", str(error)) from error
    setup = Setup(seed, Options(chosen, states), make_subject, make_oracle, seed_bug)
    campaign = Campaign(setup, Limits(cases, seconds), store, workers=workers)
    screen = Screen(campaign, store, chosen, workers, Limits(cases, seconds))
    interrupted = False
    with screen:
        try:
            campaign.run(screen.update)
        except KeyboardInterrupt:
            interrupted = True
        except StoreError as error:
            raise InputError("--out", f"{error}; the campaign stopped, earlier findings are kept") from error
    try:
        store.finish(campaign.totals.summary())
    except StoreError as error:
        raise InputError("--out", str(error)) from error
    screen.summary(interrupted=interrupted)
    return EXIT_DISAGREE if campaign.totals.new else EXIT_OK


def _modes(text: str) -> tuple[str, ...]:
    """The modes named by the option, in the order of MODES."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in MODES:
            raise InputError("--modes", f"unknown mode {name!r}, known are {', '.join(MODES)}")
    if not names:
        raise InputError("--modes", "names no mode")
    return tuple(mode for mode in MODES if mode in names)


def _check(seconds: float | None, cases: int | None, workers: int, states: int) -> None:
    if seconds is not None and not 0 < seconds < 1e9:
        raise InputError("--seconds", f"must be positive, got {seconds:g}")
    if cases is not None and cases <= 0:
        raise InputError("--cases", f"must be positive, got {cases}")
    if not 1 <= workers <= 256:
        raise InputError("--workers", f"must be 1 to 256, got {workers}")
    if not 1 <= states <= 64:
        raise InputError("--states", f"must be 1 to 64, got {states}")

"""`emufuzz fuzz`: generate cases, compare the emulator with oracles, keep what they disagree on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emufuzz.cli.errors import EXIT_DISAGREE, EXIT_OK, InputError

if TYPE_CHECKING:
    from emufuzz.cli.screen import Screen
    from emufuzz.fuzz.campaign import Campaign
    from emufuzz.fuzz.config import CampaignConfig
    from emufuzz.fuzz.store import Store
    from emufuzz.fuzz.tasks import Pool, Setup

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

DEFAULT_SECONDS = 60.0
DEFAULT_OUT = Path("emufuzz-out")
_MAX_CASES = 1 << 48
_KEPT = "the campaign stopped, what it had is kept"


@app.command("fuzz")
def fuzz(
    seconds: Annotated[float | None, typer.Option(help="Stop after so many seconds.")] = None,
    cases: Annotated[
        int | None, typer.Option(help="Stop at so many cases, those of earlier runs included.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**64 - 1, help="Seed of the generated cases; 1 by default.")
    ] = None,
    subject: Annotated[
        str | None,
        typer.Option(help="What is under test: emulator (default), kvm around it, or cmd:PROGRAM."),
    ] = None,
    paths: Annotated[
        str | None, typer.Option(help="Comma-separated exit paths into KVM; all by default.")
    ] = None,
    modes: Annotated[str | None, typer.Option(help="Comma-separated CPU modes; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Campaign directory.")] = DEFAULT_OUT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the campaign in OUT.")] = False,
    workers: Annotated[
        str,
        typer.Option(
            help="Who does the work: local:N processes (default: all cores), or ray[:ADDRESS]. "
            "The findings do not depend on it."
        ),
    ] = "local",
    states: Annotated[int | None, typer.Option(help="Register states per instruction; 1 by default.")] = None,
    oracles: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated oracles, unicorn among them (`emufuzz oracles` lists them); by default "
            "all that work here. `unicorn` alone is fastest."
        ),
    ] = None,
    generator: Annotated[
        str | None,
        typer.Option(
            help="Where cases come from: structured (default), the opcode tables; guided, also from "
            "what earlier cases reached (docs/guidance.md); or atheris, libFuzzer (docs/atheris.md)."
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Directory of encoded cases that libFuzzer starts from and adds to; OUT/corpus."),
    ] = None,
    shrink: Annotated[bool, typer.Option(help="Shrink what is found.")] = True,
    known: Annotated[
        list[Path] | None, typer.Option(help="Campaign whose marks count here, too; may be repeated.")
    ] = None,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log to standard output as JSON, one object per line.")
    ] = False,
    seed_bug: Annotated[
        str | None, typer.Option(help="Break a handler on purpose (a name, or `list`).")
    ] = None,
) -> int:
    """Fuzz the emulator, or KVM around it, against oracles: 60 seconds without --seconds and --cases.

    With --subject kvm cases enter through VM exits, those of --paths. Everything is kept in OUT: in
    campaign.sqlite, and each finding as JSON in OUT/findings, one per (leaf, mode, path, kind of
    difference, verdict). A campaign that was stopped or killed goes on with --resume; --cases then
    may raise its budget. Exit code: 0 = no new findings, 1 = new findings, 2 = bad input.
    """
    if seed_bug == "list":
        return _list_bugs()
    from emufuzz.cli.campaigns import Asked, create_campaign, new_config, resume_campaign
    from emufuzz.cli.triaging import marks_in

    _check(seconds, cases)
    marks = marks_in(known or [])
    asked = Asked(seed, subject, modes, states, paths, oracles, seed_bug, generator)
    store = run = None
    if resume:
        config, store = resume_campaign(out, asked, cases)
    else:
        config = new_config(asked)
    try:
        run = _Run(config, workers, marks, _corpus(config, out, corpus))
        if store is None:
            store = create_campaign(out, config, cases)
            _name_unasked(config, oracles)
        return run(store, seconds, shrink=shrink, log_json=log_json)
    finally:
        if store is not None:
            store.close()
        elif run is not None:
            run.discard()


def _name_unasked(config: CampaignConfig, asked: str | None) -> None:
    """Say which oracles a new campaign goes without, unless they were named."""
    from emufuzz.oracle.registry import ORACLES

    unasked = [name for name in ORACLES if name not in config.oracles]
    if unasked and asked is None:
        print(f"emufuzz: not available: {', '.join(unasked)} (`emufuzz oracles` says why)", file=sys.stderr)


def _list_bugs() -> int:
    from emufuzz.fuzz.bugs import known_bugs

    for name, (family, what) in known_bugs().items():
        print(f"{name:24} {family:8} {what}")
    return EXIT_OK


class _Run:
    """One run of a campaign: everything that can be refused is, before anything is written."""

    def __init__(
        self, config: CampaignConfig, workers: str, marks: dict[str, str], corpus: Path | None
    ) -> None:
        self._setup = config.setup()
        self._marks = marks
        self._workers = workers
        self._versions = _versions(config)
        self._pool = _pool(workers, self._setup, corpus)

    def discard(self) -> None:
        """End what was made for a run that does not come about."""
        self._pool.kill()

    def __call__(self, store: Store, seconds: float | None, *, shrink: bool, log_json: bool) -> int:
        """Run to the limits; gives the exit code."""
        from emufuzz.cli.screen import Screen
        from emufuzz.cli.triaging import sort_out
        from emufuzz.fuzz.campaign import Campaign, Limits
        from emufuzz.fuzz.libfuzzer.pool import FuzzerPool
        from emufuzz.fuzz.schedule import ScheduleError
        from emufuzz.fuzz.shrink import Limits as ShrinkLimits
        from emufuzz.fuzz.store import StoreError
        from emufuzz.oracle.base import OracleUnavailableError

        try:
            budget = store.budget()
            if budget is None and seconds is None:
                seconds = DEFAULT_SECONDS
            store.begin(self._workers, self._versions)
            limits = Limits(budget, seconds)
            if isinstance(self._pool, FuzzerPool):
                self._pool.seconds = seconds
            campaign = Campaign(self._setup, limits, self._pool, store, ShrinkLimits() if shrink else None)
            screen = Screen(campaign, store, limits, as_json=log_json)
            interrupted = _interrupted(campaign, screen)
            sorted_out = sort_out(campaign, store, self._setup, self._marks, as_json=log_json)
            screen.summary(interrupted=interrupted)
            print(sorted_out, end="")
            if not log_json:
                print(f"processor time of this run: {processor_seconds():,.1f} s")
        except StoreError as error:
            raise InputError("--out", f"{error}; {_KEPT}") from error
        except ScheduleError as error:
            if error.reason == "error":
                raise  # an exception of our own code: a bug, with its traceback
            raise OracleUnavailableError(f"workers: {error}; {_KEPT}") from error
        return EXIT_DISAGREE if campaign.new else EXIT_OK


def _interrupted(campaign: Campaign, screen: Screen) -> bool:
    """Run to the end; True if somebody stopped it."""
    with screen:
        try:
            campaign.run(screen.update)
        except KeyboardInterrupt:
            return True
    return False


def _versions(config: CampaignConfig) -> dict[str, str]:
    """What the campaign's findings are recorded with."""
    from emufuzz.fuzz.engines import campaign_versions

    ran = campaign_versions(config.subject, config.oracles[1:])
    return ran | ({"seed_bug": config.bug} if config.bug else {})


def _corpus(config: CampaignConfig, out: Path, corpus: Path | None) -> Path | None:
    """Where libFuzzer's corpus is; None for other generators, which have none in files."""
    from emufuzz.fuzz.config import ATHERIS

    if config.generator != ATHERIS:
        if corpus is not None:
            raise InputError("--corpus", f"goes with --generator {ATHERIS} only")
        return None
    directory = corpus or out / "corpus"
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise InputError("--corpus", f"{directory}: not a directory")
    return directory


def processor_seconds() -> float:
    """Seconds of processor time that this process and those that it has waited for took."""
    import resource

    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _pool(workers: str, setup: Setup, corpus: Path | None) -> Pool:
    """The workers that `--workers` names, or with a corpus, so many processes of libFuzzer."""
    from emufuzz.fuzz.workers.choose import WorkersError, make_fuzzer_pool, make_pool

    try:
        return make_pool(workers, setup) if corpus is None else make_fuzzer_pool(workers, setup, corpus)
    except WorkersError as error:
        raise InputError("--workers", str(error)) from error


def _check(seconds: float | None, cases: int | None) -> None:
    if seconds is not None and not 0 < seconds < 1e9:
        raise InputError("--seconds", f"must be positive, got {seconds:g}")
    if cases is not None and not 0 < cases <= _MAX_CASES:
        raise InputError("--cases", f"must be 1 to {_MAX_CASES}, got {cases}")

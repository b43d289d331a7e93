"""Campaigns as command lines name them: made new from options, or opened to go on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from emufuzz.arch.modes import MODES
from emufuzz.case.paths import PATHS
from emufuzz.cli.errors import InputError
from emufuzz.cli.names import default_oracles, refuse_programs
from emufuzz.fuzz.config import FIRST_ORACLE, CampaignConfig, ConfigError, in_order
from emufuzz.fuzz.store import Store, StoreError


class Asked(NamedTuple):
    """The options that make a campaign what it is; None where there was none."""

    seed: int | None
    subject: str | None
    modes: str | None
    states: int | None
    paths: str | None
    oracles: str | None
    bug: str | None
    generator: str | None = None


def new_config(asked: Asked) -> CampaignConfig:
    """The campaign that options describe; with all oracles that work here, unless they are named.

    Raises:
        InputError: An option cannot be.
    """
    try:
        config = _config(asked, CampaignConfig())
        if asked.oracles is not None:
            return config
        return msgspec.structs.replace(config, oracles=default_oracles())
    except ConfigError as error:
        raise _as_input(error) from error


def create_campaign(out: Path, config: CampaignConfig, cases: int | None) -> Store:
    """A new campaign directory, open for its driver.

    Raises:
        InputError: There is something already, or it cannot be written.
    """
    try:
        return Store.create(out, config, cases)
    except StoreError as error:
        raise InputError("--out", str(error)) from error


def resume_campaign(out: Path, asked: Asked, cases: int | None) -> tuple[CampaignConfig, Store]:
    """A campaign that was begun, open for its driver; `cases` may raise its budget.

    Raises:
        InputError: There is none, it is another one than the options say, or nothing is left to do.
    """
    try:
        store = Store(out)
    except StoreError as error:
        raise InputError("--out", str(error)) from error
    try:
        config = store.config()
        if asked.oracles is None:
            refuse_programs(config.oracles, str(out))
        if asked.subject is None:
            refuse_programs((config.subject,), str(out), what="subject")
        _check_same(config, _config(asked, config))
        _check_budget(store, cases)
    except ConfigError as error:
        store.close()
        raise _as_input(error) from error
    except StoreError as error:
        store.close()
        raise InputError("--out", str(error)) from error
    except InputError:
        store.close()
        raise
    return config, store


def _check_same(config: CampaignConfig, wanted: CampaignConfig) -> None:
    """A campaign goes on as what it is."""
    for field in config.__struct_fields__:
        mine, theirs = getattr(config, field), getattr(wanted, field)
        if mine != theirs:
            option = "--seed-bug" if field == "bug" else f"--{field}"
            raise InputError(option, f"the campaign has {_shown(mine)}, not {_shown(theirs)}")


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value) or "none"


def _check_budget(store: Store, cases: int | None) -> None:
    """Set a new budget, which is no less than what was done."""
    done = store.totals().cases
    if cases is not None and cases < done:
        raise InputError("--cases", f"the campaign has {done:,} cases already")
    budget = store.budget()
    if cases is None and budget is not None and done >= budget and not store.unshrunk():
        raise InputError(
            "--resume",
            f"{store.directory}: all of its {budget:,} cases are done; --cases N raises the budget",
        )
    if cases is not None:
        store.set_budget(cases)


def _config(asked: Asked, base: CampaignConfig) -> CampaignConfig:
    """A configuration with what was asked for, and `base` for the rest."""
    subject = base.subject if asked.subject is None else asked.subject
    every_path = PATHS if subject == "kvm" else ()
    paths = base.paths or every_path
    config = msgspec.structs.replace(
        base,
        seed=base.seed if asked.seed is None else asked.seed,
        subject=subject,
        modes=base.modes if asked.modes is None else in_order(names(asked.modes), MODES, "modes", "mode"),
        states=base.states if asked.states is None else asked.states,
        paths=paths if asked.paths is None else in_order(names(asked.paths), PATHS, "paths", "path"),
        oracles=base.oracles if asked.oracles is None else _oracles(asked.oracles),
        bug=base.bug if asked.bug is None else asked.bug,
        generator=base.generator if asked.generator is None else asked.generator,
    )
    config.check()
    return config


def _oracles(text: str) -> tuple[str, ...]:
    """Oracles with Unicorn first, each once."""
    chosen = names(text)
    if FIRST_ORACLE not in chosen:
        raise ConfigError(f"oracles: {FIRST_ORACLE} has to be among them")
    return (FIRST_ORACLE, *dict.fromkeys(name for name in chosen if name != FIRST_ORACLE))


def names(text: str) -> list[str]:
    """The names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _as_input(error: ConfigError) -> InputError:
    field, _, reason = str(error).partition(": ")
    return InputError(f"--{field}", reason)

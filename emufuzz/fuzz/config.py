"""What a campaign is: everything that decides what it finds, and nothing else."""

from __future__ import annotations

from typing import Final

import msgspec

from emufuzz.arch.modes import MODES
from emufuzz.case.paths import PATHS
from emufuzz.fuzz.bugs import known_bugs
from emufuzz.fuzz.engines import PROGRAM, SUBJECTS, is_subject, make_oracle, subject_maker
from emufuzz.fuzz.generate import Options
from emufuzz.fuzz.kvm.generate import PathOptions, possible_paths
from emufuzz.fuzz.tasks import Setup
from emufuzz.oracle.registry import UnknownOracleError, check_name

FIRST_ORACLE: Final = "unicorn"
MAX_STATES: Final = 64
#: Where cases come from: the opcode tables alone, or also from what earlier cases reached.
STRUCTURED: Final = "structured"
GUIDED: Final = "guided"
#: libFuzzer makes them, in processes of its own; the one generator that a seed does not determine.
ATHERIS: Final = "atheris"
GENERATORS: Final = (STRUCTURED, GUIDED, ATHERIS)
#: Bytes of JSON above which a configuration is none.
_MAX_JSON: Final = 1 << 16


class ConfigError(ValueError):
    """A configuration that cannot be; the message names the field and the reason."""


class CampaignConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What decides what a campaign finds.

    Attributes:
        seed: 0..2^64-1.
        subject: One of SUBJECTS, or `cmd:` and a command line.
        modes: Some of MODES, in their order.
        states: Register states per instruction, 1..64.
        paths: Exit paths, in the order of PATHS; empty unless the subject is `kvm`.
        oracles: Names of oracles, Unicorn first.
        bug: A seeded bug, or empty.
        generator: One of GENERATORS.
    """

    seed: int = 1
    subject: str = "emulator"
    modes: tuple[str, ...] = MODES
    states: int = 1
    paths: tuple[str, ...] = ()
    oracles: tuple[str, ...] = (FIRST_ORACLE,)
    bug: str = ""
    generator: str = STRUCTURED

    def check(self) -> None:
        """Raise ConfigError unless every field can be."""
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed: must be 0 to 2^64-1, got {self.seed}")
        if not is_subject(self.subject):
            known = ", ".join((*SUBJECTS, f"{PROGRAM}PROGRAM"))
            raise ConfigError(f"subject: unknown subject {self.subject!r}, known are {known}")
        if not 1 <= self.states <= MAX_STATES:
            raise ConfigError(f"states: must be 1 to {MAX_STATES}, got {self.states}")
        _check_names("modes", "mode", self.modes, MODES)
        if self.bug and self.subject.startswith(PROGRAM):
            raise ConfigError("seed-bug: it breaks the emulator, which is not under test")
        if self.bug and self.bug not in known_bugs():
            raise ConfigError(f"seed-bug: no bug {self.bug!r}, known are {', '.join(known_bugs())}")
        if self.generator not in GENERATORS:
            raise ConfigError(f"generator: unknown {self.generator!r}, known are {', '.join(GENERATORS)}")
        self._check_paths()
        self._check_oracles()

    def _check_paths(self) -> None:
        if self.subject != "kvm":
            if self.paths:
                raise ConfigError("paths: only --subject kvm has exit paths")
            return
        _check_names("paths", "path", self.paths, PATHS)
        if not possible_paths(self.paths, self.modes):
            raise ConfigError(f"paths: none of them exists in the modes {', '.join(self.modes)}")

    def _check_oracles(self) -> None:
        if self.oracles[:1] != (FIRST_ORACLE,):
            raise ConfigError(f"oracles: {FIRST_ORACLE} has to be among them")
        try:
            for name in self.oracles:
                check_name(name)
        except UnknownOracleError as error:
            raise ConfigError(f"oracles: {error}") from error

    def setup(self) -> Setup:
        """What workers need for it."""
        options = Options(self.modes, self.states)
        if self.subject == "kvm":
            options = PathOptions(self.modes, self.states, possible_paths(self.paths, self.modes))
        subject, others = subject_maker(self.subject), self.oracles[1:]
        guided = self.generator == GUIDED
        return Setup(self.seed, options, subject, make_oracle, self.bug, others, guided)

    def to_json(self) -> str:
        """The configuration as JSON, keys in a fixed order."""
        return msgspec.json.encode(self).decode()


def config_of(text: str) -> CampaignConfig:
    """A configuration from JSON that may come from anywhere.

    Raises:
        ConfigError: It is none.
    """
    if len(text) > _MAX_JSON:
        raise ConfigError(f"configuration: {len(text)} bytes of JSON, at most {_MAX_JSON} are taken")
    try:
        config = msgspec.json.decode(text, type=CampaignConfig)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ConfigError(f"configuration: {error}") from error
    config.check()
    return config


def in_order(names: list[str], known: tuple[str, ...], field: str, what: str) -> tuple[str, ...]:
    """Names from a command line, checked, in the order of the known ones."""
    _check_names(field, what, tuple(names), known)
    return tuple(name for name in known if name in names)


def _check_names(field: str, what: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{field}: unknown {what} {name!r}, known are {', '.join(known)}")
    if not names:
        raise ConfigError(f"{field}: names no {what}")

"""The `emufuzz` command: finds the module of a subcommand, and turns errors into one line.

A subcommand lives in `emufuzz.cli.<name>` as a `typer.Typer` called `app`, whose functions
return the exit code. Its module is imported only when it is called, so that `emufuzz repro`
does not pay for the libraries of `emufuzz fuzz`.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Final

import typer
import typer.core

from emufuzz import __version__
from emufuzz.cli.errors import (
    EXIT_BAD_INPUT,
    EXIT_BROKEN_PIPE,
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_OK,
    exit_code,
    one_line,
)

COMMANDS: Final = (
    "fuzz",
    "status",
    "coverage",
    "repro",
    "shrink",
    "findings",
    "corpus",
    "exec",
    "vectors",
    "schema",
    "bench",
    "handlers",
    "oracles",
    "vouch",
)

#: What typer raises for a wrong command line (ClickException; its module differs between versions).
UsageError: Final[Any] = typer.BadParameter.__mro__[2]


class LazyGroup(typer.core.TyperGroup):
    """A command group that imports a subcommand when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - signature of the base class
        """All subcommands, in the order of the README."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - signature of the base class
        """The subcommand of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"emufuzz.cli.{cmd_name}")
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command


app = typer.Typer(
    name="emufuzz",
    cls=LazyGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def emufuzz(
    ctx: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Fuzz x86 instruction emulators against oracles that know what the instruction should do."""
    if version:
        typer.echo(f"emufuzz {__version__}")
        raise typer.Exit(EXIT_OK)
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(EXIT_BAD_INPUT)


def main() -> None:
    """Entry point of the console script."""
    code = run(sys.argv[1:])
    if code == EXIT_BROKEN_PIPE:
        # The interpreter flushes stdout once more on its way out; nobody reads it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors are reported on stderr."""
    try:
        code = _invoke(list(args))
        sys.stdout.flush()
    except typer.Exit as exc:
        return exc.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except Exception as exc:  # noqa: BLE001 - the last frame: every error becomes an exit code here
        return _report(exc)
    return code


def _invoke(args: list[str]) -> int:
    command = typer.main.get_command(app)
    with command.make_context("emufuzz", args) as ctx:
        return int(command.invoke(ctx) or EXIT_OK)


def _report(exc: Exception) -> int:
    """Say what went wrong: one line for the user's errors, the whole traceback for ours."""
    if isinstance(exc, UsageError):
        print(f"emufuzz: {_usage(exc)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    code = exit_code(exc)
    if code is None:
        traceback.print_exception(exc)
        print("emufuzz: internal error, please report the traceback above", file=sys.stderr)
        return EXIT_BUG
    print(f"emufuzz: {one_line(exc)}", file=sys.stderr)
    return code


def _usage(exc: Any) -> str:
    """A wrong command line in one line, with the help that lists the right ones."""
    message = " ".join(str(exc.format_message()).split()).rstrip(".")
    path = exc.ctx.command_path if exc.ctx is not None else "emufuzz"
    return f"{message} (see {path} --help)"

"""`emufuzz status`: what a campaign has done so far, also while it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emufuzz.cli.errors import EXIT_OK, InputError

if TYPE_CHECKING:
    from emufuzz.cli.campaign_status import Status

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command("status")
def status(
    directory: Annotated[Path, typer.Argument(help="Campaign directory.", show_default=False)],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON (docs/status.md).")] = False,
) -> int:
    """Show what a campaign has done: cases, why some were skipped, findings, coverage, runs, growth.

    Works while the campaign runs, and after it was killed; nothing is changed. Exit code: 0, or 2 if
    there is no campaign, or it is damaged.
    """
    found = _read(directory)
    if as_json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        from emufuzz.cli.campaign_status import status_lines
        from emufuzz.cli.screen.text import bars_for

        for line in status_lines(found, bars_for(sys.stdout)):
            print(line)
    return EXIT_OK


def _read(directory: Path) -> Status:
    from emufuzz.cli.campaign_status import read_status
    from emufuzz.fuzz.store import StoreError

    try:
        return read_status(directory)
    except StoreError as error:
        raise InputError("", str(error)) from error

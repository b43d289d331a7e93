"""`emufuzz schema`: the JSON Schema of the exchange format."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from emufuzz.cli.errors import EXIT_OK

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

"""`emufuzz schema`: the JSON Schema of the exchange format."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from emufuzz.cli.errors import EXIT_OK

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


class SchemaName(StrEnum):
    """What there is a schema of."""

    CASE = "case"
    OUTCOME = "outcome"
    EXPECT = "expect"


@app.command("schema")
def schema(
    name: Annotated[SchemaName | None, typer.Argument(help="Only this one; default: all of them.")] = None,
) -> int:
    """Print the JSON Schema (draft 2020-12) of a Case, an Outcome, or a vector's `expect`.

    Without a name: one object with all three under `$defs`.
    """
    from emufuzz.case.schema import case_schema, delta_schema, outcome_schema

    makers = {
        SchemaName.CASE: case_schema,
        SchemaName.OUTCOME: outcome_schema,
        SchemaName.EXPECT: delta_schema,
    }
    value = makers[name]() if name else {"$defs": {str(key): make() for key, make in makers.items()}}
    print(json.dumps(value, indent=2))
    return EXIT_OK

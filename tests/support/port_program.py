"""The port as an external program; with the argument `broken` INC and DEC leave AF wrong."""

from __future__ import annotations

import json
import sys

from emufuzz.arch.rflags import X86_EFLAGS_AF
from emufuzz.case.json import case_from_json, outcome_to_json
from emufuzz.subject.flat import FlatSubject

BROKEN = {"fe/0", "fe/1", "ff/0", "ff/1"}


def main() -> None:
    subject = FlatSubject(events=False)
    sys.stdout.write(json.dumps({"emufuzz": 1, "name": "port", "version": "1"}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        case = case_from_json(line.encode())
        [outcome] = subject.run([case])
        if "broken" in sys.argv and outcome.leaf in BROKEN and outcome.exception is None:
            outcome.rflags ^= X86_EFLAGS_AF
        if outcome.rc == "unhandleable":
            sys.stdout.write(json.dumps({"id": case.id, "unsupported": outcome.reason}) + "\n")
        else:
            sys.stdout.write(outcome_to_json(case, outcome).decode() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""A program that speaks the protocol of docs/command.md, with faults on demand (first argument)."""

from __future__ import annotations

import json
import subprocess
import sys
import time


def _say(value: object) -> None:
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


def main() -> None:
    fault = sys.argv[1] if len(sys.argv) > 1 else ""
    if fault == "silent":
        time.sleep(60)
    hello = {"emufuzz": 1, "name": "sample", "version": "7", "modes": ["real", "prot64"]}
    if fault == "bad-hello":
        hello["surprise"] = 1
    _say(hello)
    for line in sys.stdin:
        case = json.loads(line)
        if fault and case["id"] == "bad":
            if fault == "die":
                sys.exit(3)
            if fault == "hang":
                time.sleep(60)
            if fault == "garbage":
                sys.stdout.write("{\n")
                sys.stdout.flush()
                continue
            if fault == "unsupported":
                _say({"unsupported": "no such thing"})
                continue
            if fault == "skip":
                continue
            if fault == "twice":
                _say({"id": case["id"]})
            if fault == "child":
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
                sys.stderr.write(f"{child.pid}\n")
                sys.stderr.flush()
                time.sleep(60)
        _say({"id": case["id"], "rip": hex(int(case["rip"], 16) + len(case["code"]) // 2)})


if __name__ == "__main__":
    main()

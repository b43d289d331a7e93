"""A tiny emulator for `--engine cmd:`, `--oracles cmd:` and `--subject cmd:`: INC and DEC of EAX to EDI.

It knows 64-bit mode's FF /0 and FF /1 with a 32-bit register, and refuses everything else.
"""

import json
import sys

NAMES = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"]
CF, PF, AF, ZF, SF, OF = 0x1, 0x4, 0x10, 0x40, 0x80, 0x800


def run(case: dict) -> dict:
    """One answer to one case: only what changes needs to be said."""
    code = bytes.fromhex(case["code"])
    if len(code) < 2 or code[0] != 0xFF or code[1] >> 4 != 0xC:
        return {"id": case["id"], "unsupported": "neither INC nor DEC of a 32-bit register"}
    down, name = code[1] >> 3 & 1, NAMES[code[1] & 7]
    before = int(case.get("gpr", {}).get(name, "0x0"), 16) & 0xFFFFFFFF
    after = before + (-1 if down else 1) & 0xFFFFFFFF
    flags = int(case.get("rflags", "0x2"), 16) & ~(PF | AF | ZF | SF | OF)
    flags |= PF if (after & 0xFF).bit_count() % 2 == 0 else 0
    flags |= AF if (before & 15) == (0 if down else 15) else 0
    flags |= ZF if after == 0 else 0
    flags |= SF if after >> 31 else 0
    flags |= OF if before == (0x80000000 if down else 0x7FFFFFFF) else 0
    rip = int(case["rip"], 16) + 2
    return {"id": case["id"], "length": 2, "rip": hex(rip), "rflags": hex(flags), "gpr": {name: hex(after)}}


def say(value: dict) -> None:
    """One JSON object on one line, at once."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


say({"emufuzz": 1, "name": "incdec", "version": "1.0", "modes": ["prot64"]})
for line in sys.stdin:
    say(run(json.loads(line)))

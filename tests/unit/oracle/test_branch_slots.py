"""A branch into another code slot must not leave a stale translation there."""

from __future__ import annotations

import msgspec

from emufuzz.case.arena import ARENA_BASE
from emufuzz.fuzz.environments import environments
from emufuzz.fuzz.generate import generate_batch
from emufuzz.oracle.unicorn import UnicornOracle

TARGET = ARENA_BASE + 0x400


def case_at(code, rip):
    env = environments(1, "prot64")[0]
    template = generate_batch(1, 0, 1)[0]
    return msgspec.structs.replace(
        template, mode="prot64", code=code, rip=rip, rflags=2, system=env.system, mem=env.mem, gpr=(0,) * 16
    )


def test_code_placed_where_a_branch_ended_is_what_runs():
    oracle = UnicornOracle()
    outcomes = oracle.run(
        [
            case_at(b"\xe9\xfb\x03\x00\x00\xf4", ARENA_BASE),  # jmp TARGET
            case_at(b"\x48\xff\xc0\xf4", TARGET),  # inc rax
        ]
    )
    assert outcomes[0].rip == TARGET
    assert outcomes[1].gpr[0] == 1
    assert outcomes[1].rip == TARGET + 3

# ruff: noqa: INP001 - a script, not a package
"""Write docs/oracle-rules.md (`python docs/generate_oracle_rules.py`) from the rules and the tables here."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from emufuzz.oracle.rules.rule import COMPLETED, EVENTS, FAULT, FAULTED, UNCAUSED
from emufuzz.oracle.rules.table import RULES, SUBJECTS

TARGET: Final = Path(__file__).parent / "oracle-rules.md"

INTRODUCTION: Final = """\
<!-- Written by docs/generate_oracle_rules.py: change the rules or the tables of that script. -->
# The oracle of rules

`emufuzz/oracle/rules/` holds what the SDM demands of one instruction, as declared rules over a case and an
outcome. The instruction is the one that iced decodes from the case's bytes; nothing of the port is asked.
What KVM does on purpose is not in the rules: quirks (`emufuzz/oracle/quirks`) excuse it.

A rule has an id, a citation, the instructions it is about, and what it demands:

| kind | demands |
|---|---|
| fault | an exception, with its error code and address, if the state is such |
| completed | something of what an instruction leaves behind that ran to its end |
| faulted | something of what one leaves behind that faulted |
| uncaused | that there is a reason for an exception that no rule demands |
| events | something of the accesses on the way: callbacks, device trace, injected exceptions |
| any | something of every outcome |

Exceptions have a phase: fetch, decode, privilege, access,
value (what is known once operands are read). Of two that
are due the one of the earlier phase must come; within a phase the SDM leaves the choice to the processor, and
either is right (Vol. 3A Table 6-2). `RulesOracle.run` gives the exception where only one can come,
and vouches for
nothing elsewhere; `RulesOracle.review` judges an outcome,
`RulesOracle.differences` gives the same as differences.

Nothing is demanded where the SDM leaves it open: accesses across the end of a 4 GiB segment, limits that no
descriptor can hold, 66 in front of near branches in 64-bit mode,
an override of a null segment in 64-bit mode, page
faults that the guest's own tables decide, #UD of instructions that a processor need not have.

Not modelled are gates, task switches, IRET and INT outside real mode, VERR, LAR and their kin,
ENTER's frame, BOUND's
bounds, #MF and #XM, paging rights, code and data breakpoints.
"""

#: Rule -> (leaves, vectors of tests/data/vectors that break it, quirk or where it is written, what KVM does).
# fmt: off
KVM: Final = {
    "ud-control-register": ("0f20 0f22", 464, "quirk 30",
                            "privilege is checked before the register's number"),
    "ud-opcode": ("0f01 0fae 0fc3.mem", 106, "decoder rule no-prefix-allowed",
                  "66, F2 and F3 are ignored where no prefix may stand"),
    "event-read-operand": ("0f00/0 0f00/1 63.mode64", 105, "quirks 15, 42",
                           "SLDT and STR read their destination, MOVSXD 4 bytes with a 16-bit operand"),
    "fault-shadow": ("17 8e", 94, "quirk 17", "the MOV SS shadow is set although the load faults"),
    "gp-segment-type": ("read-modify-write", 64, "new",
                        "whether a segment is writable is looked at after the read: an absent page is #PF"),
    "event-before-decode-fault": ("8e", 62, "quirk 16", "MOV Sreg reads memory before #UD"),
    "gp-io-bitmap": ("6c 6d 6e 6f e6 ec ed ee ef", 55, "quirk 45",
                     "the bitmap's second byte may lie beyond the limit of the TSS"),
    "event-read-once": ("0f01/2.mem 0f01/3.mem", 53, "new, beside quirk 43",
                        "LGDT and LIDT read the first bytes of their operand twice"),
    "shadow-sti": ("fb", 50, "quirk 18", "STI blocks interrupts although IF was set"),
    "event-port": ("e4 e5 ec ed", 32, "quirk 46", "IN with a REP prefix reads many elements"),
    "ud-non-temporal-register": ("0fe7.pfx_66", 30, "quirk 41", "MOVNTDQ takes a register"),
    "ud-debug-extensions": ("0f21 0f23", 29, "quirks 30, 33", "privilege and high bits come before CR4.DE"),
    "ud-debug-register": ("0f21 0f23", 16, "quirks 30, 33", "privilege and high bits come before the number"),
    "ud-segment-number": ("8e", 14, "quirk 16",
                          "the source is read before the register's number is looked at"),
    "gp-ltr-type": ("0f00/3", 14, "quirk 37", "LTR takes a 16-bit TSS in IA-32e mode"),
    "ud-mov-to-cs": ("8e", 13, "quirk 16", "the source is read before the register's number is looked at"),
    "fault-memory": ("any write", 9, "kvm-page-split-write", "the first page of a split write has changed"),
    "ud-monitor": ("0f01/1.mod3.rm=0 0f01/1.mod3.rm=1", 11, "quirk 30",
                   "privilege is #GP, which comes first"),
    "gp-system-in-ldt": ("0f00/3", 10, "kvm-ltr-ti-error-code", "the error code is 0"),
    "gp-canonical": ("any access", 8, "quirk 1", "only the first byte must be canonical"),
    "gp-msr-canonical": ("0f30", 7, "the flat machine", "SYSENTER_ESP and SYSENTER_EIP take any value"),
    "gp-dr6-dr7-high": ("0f23", 7, "quirk 32", "a bad value for DR4 is ignored"),
    "fault-fpu": ("0f7f.pfx_no", 4, "new",
                  "MOVQ from MMX to memory marks all x87 registers as valid, then faults"),
    "gp-vm86-flags": ("9c", 4, "quirk 20", "PUSHF in virtual-8086 mode ignores IOPL"),
    "ud-cause": ("8c 8e", 4, "kvm-rex-r-segment-register", "REX.R makes the number 8 to 15"),
    "gp-umip": ("0f00/0 0f00/1", 3, "quirk 15", "the destination is read first"),
    "ud-xcr": ("0f01/2.mod3.rm=1", 2, "quirk 30", "privilege is checked before CR4.OSXSAVE"),
    "gp-load-data-type": ("8e", 1, "kvm-rex-r-segment-register", "REX.R makes the number 8 to 15"),
    "pf-data": ("a5", 1, "quirk 1", "an access across the canonical end is #PF at its end"),
    "gp-cr0-high": ("0f22", 1, "quirk 31", "bits 63:32 are dropped"),
}
# fmt: on

JUDGES: Final = """\
Unicorn, Bochs and AMD's processors (asked through the native oracle) break rules as well, but nowhere
except where their ledgers say that they do not vouch for the field (`emufuzz oracles NAME`). That is held
by 200,000 generated cases for each of them, of all modes and levels that it takes:
`pytest -m slow tests/differential/test_rules_oracles.py`."""

_SAYS: Final = {
    FAULT: "fault",
    COMPLETED: "completed",
    FAULTED: "faulted",
    UNCAUSED: "uncaused",
    EVENTS: "events",
}


def rule_tables() -> str:
    """Every rule, by subject."""
    parts = []
    for subject, rules in SUBJECTS.items():
        rows = [f"| {r.id} | {_SAYS.get(r.kind, 'any')} | {r.demand} | {r.citation} |" for r in rules]
        head = f"### {subject}: {len(rules)}\n\n| rule | kind | demand | source |\n|---|---|---|---|"
        parts.append("\n".join((head, *rows)))
    return "\n\n".join(parts)


def contradictions() -> str:
    """Where KVM breaks rules."""
    rows = [
        f"| {rule} | {leaves} | {count} | {quirk} | {what} |"
        for rule, (leaves, count, quirk, what) in KVM.items()
    ]
    return "\n".join(
        (
            "| rule | leaves | vectors | written as | what KVM does |",
            "|---|---|---|---|---|",
            *rows,
            "",
            JUDGES,
        )
    )


def document() -> str:
    """The whole page."""
    return (
        f"{INTRODUCTION}\n## The {len(RULES)} rules\n\n{rule_tables()}\n\n## Who breaks them\n\n"
        "Of the recorded vectors (Linux 6.12) these break a rule; there are no others "
        "(`tests/differential/test_rules_oracles.py`). Numbers of quirks are those of docs/porting.md.\n\n"
        f"{contradictions()}\n"
    )


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")

"""The leaves of KVM's opcode tables (Linux 6.12): their ids, columns and families.

`opcodes.csv` beside this module lists them in opcode order, one row per slot that the decoder can
reach. A leaf's id (`f7/6`, `0f2b.pfx_66.mem`) names it in cases, coverage and findings.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources
from typing import Final, NamedTuple

STATUS_IMPL: Final = "impl"  # has a handler
STATUS_SWITCH: Final = "impl(switch)"  # executed in the opcode switch of x86_emulate_insn
STATUS_DECODE_ONLY: Final = "decode-only(EMULATION_FAILED at exec)"
STATUS_UNDEFINED: Final = "undefined(#UD)"
STATUS_NOTIMPL: Final = "notimpl"


#: Condition codes 0..15 as they end mnemonics (SDM Vol. 1 Appendix B).
CONDITION_CODES: Final = (
    "o", "no", "b", "nb", "z", "nz", "be", "nbe", "s", "ns", "p", "np", "l", "nl", "le", "nle",
)  # fmt: skip


class LeafRow(NamedTuple):
    """One row of the opcode tables; texts in KVM's vocabulary, `flags` its flag words."""

    leaf: str
    map: str
    opcode: int
    selector: str
    mnemonic: str
    src: str
    src2: str
    dst: str
    flags: frozenset[str]
    handler: str
    check_perm: str
    intercept: str
    status: str

    @property
    def implemented(self) -> bool:
        """KVM can execute it."""
        return self.status in {STATUS_IMPL, STATUS_SWITCH}


def _conditions(before: str, after: str = "") -> tuple[str, ...]:
    return tuple(before + code + after for code in CONDITION_CODES)


# Family -> mnemonics, as opcodes.csv spells them. "notimpl" and "undefined" come from the status.
# fmt: off
_FAMILIES: Final = {
    "alu":       ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp", "test", "inc", "dec", "neg",
                  "not", "cbw/cwde/cdqe", "cwd/cdq/cqo"),
    "mov":       ("mov", "movzx r,r/m8", "movzx r,r/m16", "movsx r,r/m8", "movsx r,r/m16", "movsxd",
                  "movnti", "lea", "xlat", "mov r/m,sreg"),
    "stack":     ("push", "pop", "push cs", "push ds", "push es", "push fs", "push gs", "push ss",
                  "pusha", "popa", "pushf", "popf", "enter", "leave"),
    "shift":     ("rol", "ror", "rcl", "rcr", "shl", "shr", "sar", "shld", "shrd"),
    "muldiv":    ("mul", "imul", "imul r,r/m,imm", "div", "idiv"),
    "bits":      ("bt", "bts", "btr", "btc", "bsf", "bsr", "bswap", "movbe",
                  *_conditions("set"), *_conditions("cmov")),
    "bcd":       ("aam", "aad", "das"),
    "branch":    (*_conditions("j"), *_conditions("j", " near"), "jcxz/jecxz/jrcxz", "jmp rel8",
                  "jmp rel16/32", "jmp r/m", "call rel", "call r/m", "ret", "ret imm16", "loop",
                  "loope", "loopne"),
    "string":    ("movsb", "movsw/d/q", "cmpsb", "cmpsw/d/q", "stosb", "stosw/d/q", "lodsb",
                  "lodsw/d/q", "scasb", "scasw/d/q"),
    "flagop":    ("clc", "stc", "cmc", "cld", "std", "cli", "sti", "sahf", "lahf", "salc"),
    "xchg":      ("xchg", "xchg rAX,r", "nop/pause/xchg r8", "cmpxchg", "cmpxchg8b/cmpxchg16b", "xadd"),
    "hint":      ("nop", "prefetch(w) group", "prefetchh group / nop", "reserved nop",
                  "reserved nop (incl. endbr/rdssp space)"),
    "farbranch": ("call far imm", "call far m", "jmp far imm", "jmp far m", "retf", "retf imm16", "int3",
                  "int imm8", "into", "iret", "icebp/int1"),
    "segment":   ("pop ds", "pop es", "pop fs", "pop gs", "pop ss", "mov sreg,r/m16", "lds", "les",
                  "lfs", "lgs", "lss"),
    "system":    ("sldt", "str", "lldt", "ltr", "sgdt", "sidt", "lgdt", "lidt", "smsw", "lmsw", "clts",
                  "invlpg", "invd", "wbinvd", "clflush", "clflushopt", "hlt", "mov r,cr", "mov r,dr",
                  "mov cr,r", "mov dr,r", "rdmsr", "wrmsr", "rdtsc", "rdtscp", "rdpmc", "rdpid", "cpuid",
                  "syscall", "sysenter", "sysexit", "rsm", "xsetbv", "monitor", "mwait"),
    "virt":      ("vmcall", "vmmcall", "vmrun", "vmload", "vmsave", "stgi", "clgi", "skinit", "invlpga"),
    "io":        ("in", "out", "insb", "insw/d", "outsb", "outsw/d"),
    "fpu":       ("fninit", "fnstcw", "fnstsw m16", "fxsave", "fxrstor"),
    "sse":       ("movups", "movupd", "movaps", "movapd", "movntps", "movntpd", "movdqa", "movdqu",
                  "movntdq", "movq mm"),
}
# fmt: on
_FAMILY_OF_MNEMONIC: Final = {name: family for family, names in _FAMILIES.items() for name in names}

#: All families; the last two hold the leaves that KVM's tables do not implement or declare #UD.
FAMILIES: Final = (*_FAMILIES, "notimpl", "undefined")


@cache
def leaf_rows() -> tuple[LeafRow, ...]:
    """All leaves in opcode order."""
    text = resources.files("emufuzz.arch").joinpath("opcodes.csv").read_text("utf-8")
    return tuple(_row(columns) for columns in csv.DictReader(text.splitlines()))


def _row(columns: dict[str, str]) -> LeafRow:
    flags = frozenset(columns["flags"].split("|")) - {""}
    return LeafRow(**{**columns, "opcode": int(columns["opcode"], 16), "flags": flags})  # type: ignore[arg-type] # columns are text


def _family(row: LeafRow) -> str:
    if row.status == STATUS_NOTIMPL:
        return "notimpl"
    if row.status == STATUS_UNDEFINED:
        return "undefined"
    return _FAMILY_OF_MNEMONIC[row.mnemonic]


#: Leaf id -> row.
LEAVES: Final = {row.leaf: row for row in leaf_rows()}
_FAMILY_OF_LEAF: Final = {row.leaf: _family(row) for row in leaf_rows()}


def family_of(leaf: str) -> str:
    """The family of a leaf id; KeyError for an unknown one."""
    return _FAMILY_OF_LEAF[leaf]


def leaves_of(family: str) -> tuple[str, ...]:
    """The leaf ids of a family, in opcode order; empty for an unknown family."""
    return tuple(leaf for leaf, name in _FAMILY_OF_LEAF.items() if name == family)

"""A known quirk or gap excuses itself alone: another break of the same instruction is still a finding.

Gaps that take the whole outcome away are held by the case next to them: the same leaf just outside of
the gap's condition. Gaps of single fields are held by damage to another field of the very same case.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from emufuzz.arch.regs import VCPU_REGS_RBX, VCPU_SREG_ES
from emufuzz.arch.rflags import X86_EFLAGS_ID
from emufuzz.case.build import DATA_BASE, STACK_TOP, build_case, build_system
from emufuzz.case.model import ZERO_PAGE, case_pages
from emufuzz.case.segments import segment_data
from emufuzz.emulator.ctxt import reg_read, reg_write
from emufuzz.emulator.faults import emulate_de
from emufuzz.emulator.opcode import leaves
from emufuzz.emulator.tables import ONE_BYTE, THREE_BYTE, TWO_BYTE
from emufuzz.emulator.x86emul import X86EMUL_CONTINUE, X86EMUL_PROPAGATE_FAULT
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.compare import AGREE, FINDING, SKIPPED, judge
from emufuzz.oracle.native import NativeOracle
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.flat import FlatSubject
from tests.unit.oracle.test_machine_quirks import CASES as MACHINE_CASES
from tests.unit.oracle.test_machine_quirks import Silent
from tests.unit.oracle.test_quirks import CASES as QUIRK_CASES
from tests.unit.oracle.test_quirks import judge_of

NON_CANONICAL = 0x8000_0000_0000
ABSENT = 0xB000


@pytest.fixture(scope="module")
def subject():
    return FlatSubject(events=False)


@pytest.fixture(scope="module")
def unicorn():
    oracle = UnicornOracle()
    yield oracle
    oracle.close()


def verdict_of(subject, oracle, case, damage=None):
    (ours,) = subject.run([case])
    (theirs,) = oracle.run([case])
    assert not ours.crash
    if damage is not None:
        damage(case, ours)
    return judge(case, ours, theirs, oracle)


# A handler that does something else wrong


def other_register(ctxt):
    reg_write(ctxt, VCPU_REGS_RBX, reg_read(ctxt, VCPU_REGS_RBX) ^ 0x1000)
    return X86EMUL_CONTINUE


def other_flag(ctxt):
    ctxt.eflags ^= X86_EFLAGS_ID
    return X86EMUL_CONTINUE


def other_length(ctxt):
    ctxt.next_eip += 1
    return X86EMUL_CONTINUE


BREAKS = (other_register, other_flag, other_length, emulate_de)


@contextmanager
def broken(leaf, break_it):
    """The handler of a leaf goes wrong once it is done, or raises another exception than its own."""
    (opcode,) = [o for table in (ONE_BYTE, TWO_BYTE, THREE_BYTE) for o in leaves(table) if o.leaf == leaf]
    right = opcode.execute

    def em_broken(ctxt):
        rc = right(ctxt)
        if rc == X86EMUL_CONTINUE:
            return break_it(ctxt)
        return emulate_de(ctxt) if rc == X86EMUL_PROPAGATE_FAULT else rc

    object.__setattr__(opcode, "execute", em_broken)
    try:
        yield
    finally:
        object.__setattr__(opcode, "execute", right)


# Damage to an outcome


def flip_register(_case, outcome):
    outcome.gpr = (*outcome.gpr[:VCPU_REGS_RBX], outcome.gpr[VCPU_REGS_RBX] ^ 0x1000, *outcome.gpr[4:])


def flip_flag(_case, outcome):
    outcome.rflags ^= X86_EFLAGS_ID


def move_on(_case, outcome):
    outcome.rip += 1


def write_elsewhere(case, outcome):
    number = DATA_BASE >> 12
    page = outcome.pages.get(number) or case_pages(case).get(number, ZERO_PAGE)
    outcome.pages = {**outcome.pages, number: page[:0x800] + bytes((page[0x800] ^ 0x55,)) + page[0x801:]}


def flip_vector(_case, outcome):
    fpu = outcome.system.fpu
    fpu = msgspec.structs.replace(fpu, xmm=(*fpu.xmm[:7], fpu.xmm[7] ^ 1, *fpu.xmm[8:]))
    outcome.system = msgspec.structs.replace(outcome.system, fpu=fpu)


def load_segment(_case, outcome):
    seg = list(outcome.system.seg)
    seg[VCPU_SREG_ES] = msgspec.structs.replace(seg[VCPU_SREG_ES], base=seg[VCPU_SREG_ES].base ^ 0x1000)
    outcome.system = msgspec.structs.replace(outcome.system, seg=tuple(seg))


def other_fault(_case, outcome):
    outcome.rc, outcome.exception = "propagate_fault", (0, None, None)


def other_place(_case, outcome):
    vector, code, address = outcome.exception
    outcome.exception = (vector, code, address ^ 0x1000)


DAMAGES = (flip_register, flip_flag, move_on, write_elsewhere, flip_vector, load_segment, other_fault)


# Quirks


#: Quirks that show before the handler runs: its breaks cannot show.
NOT_REACHED = {
    "kvm-prefixed-xsetbv",
    "kvm-quirk-01-canonical-straddle",
    "kvm-quirk-16-segment-source-first",
    "kvm-rep-zero-count",
}
#: What a quirk itself leaves open.
PART_OF_IT = {
    ("kvm-quirk-01-canonical-straddle", write_elsewhere),  # what is written before the fault
    ("kvm-quirk-41-movntdq-register", flip_vector),  # the register that it loads
}


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda break_it: break_it.__name__)
@pytest.mark.parametrize("quirk", sorted(QUIRK_CASES.keys() - NOT_REACHED))
def test_a_quirk_excuses_no_other_break_of_its_handler(subject, unicorn, quirk, break_it):
    case, oracle = QUIRK_CASES[quirk], judge_of(quirk, unicorn)
    (right,) = subject.run([case])
    assert verdict_of(subject, oracle, case).reason == quirk
    with broken(right.leaf, break_it):
        (wrong,) = subject.run([case])
        found = verdict_of(subject, oracle, case)
    if wrong == right:  # the write behind the handler faults all the same
        assert right.exception is not None
    else:
        assert found.kind == FINDING, found.reason


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("quirk", QUIRK_CASES)
def test_a_quirk_excuses_nothing_else_in_the_outcome(subject, unicorn, quirk, damage):
    found = verdict_of(subject, judge_of(quirk, unicorn), QUIRK_CASES[quirk], damage)
    assert (found.kind == FINDING) == ((quirk, damage) not in PART_OF_IT), found.reason


def test_quirks_that_are_not_reached_are_few():
    assert QUIRK_CASES.keys() > NOT_REACHED
    assert len(QUIRK_CASES) - len(NOT_REACHED) >= 10


#: Quirks of devices, paging and exit paths that are about an exception, or where the run goes on: what else
#: they leave of the outcome is up to the exit path.
EXCEPTIONS_ALONE = {
    "kvm-cpuid-features",
    "kvm-debug-registers-later",
    "kvm-pse36-width",
    "kvm-quirk-48-port-read-ahead",
    "kvm-quirk-54-mmio-pops",
    "kvm-quirk-55-unchecked-write",
    "kvm-quirk-62-undefined-fetch",
    "kvm-repeat-fresh-walk",
    "kvm-repeat-without-fetch",
    "kvm-trap-ud",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("quirk", sorted(MACHINE_CASES.keys() - EXCEPTIONS_ALONE))
def test_a_quirk_of_the_machine_excuses_nothing_else(quirk, damage):
    case, ours, theirs = MACHINE_CASES[quirk]
    assert judge(case, ours, theirs, Silent()).reason == quirk
    damaged = msgspec.structs.replace(ours)
    damage(case, damaged)
    assert judge(case, damaged, theirs, Silent()).kind == FINDING


# Gaps


@dataclass(frozen=True)
class Edge:
    """An instruction inside of a gap, and the same leaf just outside of it."""

    gap: str
    mode: str
    inside: str
    outside: str
    gpr: dict[str, int] = field(default_factory=dict)
    out_gpr: dict[str, int] | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    out_changes: dict[str, Any] | None = None
    cpl: int | None = None

    def build(self, *, inside):
        gpr, changes = self.gpr, self.changes
        if not inside:
            gpr = self.gpr if self.out_gpr is None else self.out_gpr
            changes = self.changes if self.out_changes is None else self.out_changes
        system = build_system(self.mode, self.cpl, **changes)
        code = bytes.fromhex(self.inside if inside else self.outside)
        flags = 0x3000 if self.mode == "vm86" else 0
        return build_case(self.mode, code, system=system, flags=flags, data=DATA, **gpr)


#: Far return: a target in the code page, and zeros for segments.
DATA = {STACK_TOP: (0x6100).to_bytes(8, "little")}
AT = {"rsi": DATA_BASE}
SHORT = {"ds": segment_data(0x28, bits=32, limit=DATA_BASE + 1)}
BASED = {"ds": msgspec.structs.replace(segment_data(0x28, bits=64), base=0x100)}
#: RIP-relative: from CODE_BASE + 8 to DATA_BASE.
RELATIVE = (DATA_BASE - 0x6008).to_bytes(4, "little").hex()

# fmt: off
EDGES = (
    Edge("segment-limit",       "prot32", "8b06", "8b06", AT, changes=SHORT, out_changes={}),
    Edge("noncanonical-stack",  "prot64", "50", "50", {"rsp": NON_CANONICAL + 8}, {}),
    Edge("noncanonical-branch", "prot64", "ffe0", "ffe0", {"rax": NON_CANONICAL}, {"rax": 0x6100}),
    Edge("lock-invalid",        "prot32", "f08906", "8906", AT),
    Edge("lock-neg-flags",      "prot32", "f0f71e", "f71e", AT),
    Edge("seg-prefix-pair",     "prot64", "652e8b06", "2e658b06", AT),
    Edge("alignment",           "prot64", "0f2806", "0f2806", {"rsi": DATA_BASE + 1}, AT),
    Edge("66-near-branch",      "prot64", "66eb10", "eb10"),
    Edge("ret-imm-signed",      "prot64", "c2f0ff", "c2f07f"),
    Edge("shld16-count",        "prot32", "660fa4d81f", "660fa4d80f", {"rbx": 5}),
    Edge("bsf32-upper",         "prot64", "0fbcc1", "0fbcc1", {}, {"rcx": 8}),
    Edge("cmpxchg32-upper",     "prot64", "0fb1d1", "480fb1d1", {"rax": 5}),
    Edge("rmw-pf-error-code",   "prot32", "0106", "0106", {"rsi": ABSENT}, AT),
    Edge("segment-base64",      "prot64", "3e8a06", "8a06", AT, changes=BASED),
    Edge("rex-lahf-sahf",       "prot64", "409f", "9f"),
    Edge("rex-r-c6-c7",         "prot64", "44c6c01f", "40c6c01f"),
    Edge("push-segment-width",  "prot32", "0e", "660e"),
    Edge("vector-load-partial", "prot64", "0f1006", "0f1006", {"rsi": ABSENT - 8}, AT),
    Edge("vector-store-partial", "prot64", "0f1106", "0f1106", {"rsi": ABSENT - 8}, AT),
    Edge("movnti-prefix",       "prot64", "660fc306", "0fc306", AT),
    Edge("double-shift-rip",    "prot64", "0fa405" + RELATIVE + "01", "0fa40601", AT),
    Edge("enter-frame",         "prot64", "66c8000000", "c8000000"),
    Edge("pushf-vm",            "vm86",   "669c", "9c"),
    Edge("popa-partial",        "prot32", "61", "61", {"rsp": 0xCFF8}, {}),
)
# fmt: on


def gaps_of(oracle, case):
    (outcome,) = oracle.run([case])
    return {gap.removeprefix("unicorn-") for _, gap in oracle.unchecked(case, outcome)}


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.gap)
def test_a_break_of_the_same_leaf_outside_of_a_gap_is_found(subject, unicorn, edge):
    inside, outside = edge.build(inside=True), edge.build(inside=False)
    assert edge.gap in gaps_of(unicorn, inside)
    assert edge.gap not in gaps_of(unicorn, outside)
    (within,), (right,) = subject.run([inside]), subject.run([outside])
    assert within.leaf == right.leaf
    assert verdict_of(subject, unicorn, outside).kind == AGREE
    for break_it in BREAKS:
        with broken(right.leaf, break_it):
            assert verdict_of(subject, unicorn, outside).kind == FINDING, break_it


# fmt: off
#: Gaps of single fields -> damage that lies outside of them.
ELSEWHERE = {
    "lock-neg-flags":       (flip_register, move_on, write_elsewhere, flip_vector, load_segment, other_fault),
    "ret-imm-signed":       (flip_flag, move_on, write_elsewhere, flip_vector, load_segment, other_fault),
    "shld16-count":         (move_on, flip_vector, load_segment, other_fault),
    "bsf32-upper":          (flip_flag, move_on, write_elsewhere, flip_vector, load_segment, other_fault),
    "cmpxchg32-upper":      (flip_flag, move_on, write_elsewhere, flip_vector, load_segment, other_fault),
    "rmw-pf-error-code":    (flip_register, flip_flag, move_on, write_elsewhere, other_fault, other_place),
    "rex-lahf-sahf":        (move_on, write_elsewhere, flip_vector, load_segment, other_fault),
    "push-segment-width":   (flip_register, flip_flag, move_on, flip_vector, load_segment),
    "vector-load-partial":  (flip_register, flip_flag, move_on, write_elsewhere, other_fault, other_place),
    "vector-store-partial": (flip_register, flip_flag, move_on, flip_vector, other_fault, other_place),
    "enter-frame":          (flip_register, flip_flag, move_on, write_elsewhere, flip_vector, other_fault),
    "pushf-vm":             (flip_register, flip_flag, move_on, flip_vector, load_segment, other_fault),
    "popa-partial":         (flip_flag, move_on, write_elsewhere, flip_vector, other_fault),
}
# fmt: on


@pytest.mark.parametrize(
    ("gap", "damage"),
    [(gap, damage) for gap, damages in ELSEWHERE.items() for damage in damages],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_gap_of_some_fields_covers_no_others(subject, unicorn, gap, damage):
    (edge,) = [edge for edge in EDGES if edge.gap == gap]
    case = edge.build(inside=True)
    assert gap in gaps_of(unicorn, case)
    assert verdict_of(subject, unicorn, case).kind in {AGREE, SKIPPED}
    assert verdict_of(subject, unicorn, case, damage).kind == FINDING


# fmt: off
#: The same for the native oracle: gap -> code at CPL 3, damage outside of its fields.
NATIVE = {
    "flags-image": ("9c", (flip_register, flip_flag, move_on, flip_vector, load_segment, other_fault)),
    "selector":    ("8cc8", (flip_flag, move_on, flip_vector, load_segment, other_fault)),
    "rep-loop":    ("f3e010", (flip_register, flip_flag, write_elsewhere, flip_vector, other_fault)),
    "fpu-image":   ("0fae06", (flip_register, flip_flag, move_on, flip_vector, load_segment, other_fault)),
}
# fmt: on


@pytest.fixture(scope="module")
def native():
    try:
        oracle = NativeOracle()
    except OracleUnavailableError as reason:
        pytest.skip(str(reason))
    yield oracle
    oracle.close()


@pytest.mark.parametrize("gap", NATIVE)
def test_a_gap_of_the_native_oracle_covers_no_others(subject, native, gap):
    code, damages = NATIVE[gap]
    case = build_case("prot32", bytes.fromhex(code), cpl=3, **AT)
    (outcome,) = native.run([case])
    assert f"native-{gap}" in {name for _, name in native.unchecked(case, outcome)}
    assert verdict_of(subject, native, case).kind in {AGREE, SKIPPED}
    for damage in damages:
        assert verdict_of(subject, native, case, damage).kind == FINDING, damage


def test_there_are_enough_of_both():
    assert len(EDGES) >= 20
    assert len(ELSEWHERE) >= 10

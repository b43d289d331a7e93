"""Software interrupts in real mode: KVM's frame, vector and order are recognised, and nothing beside them."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.case.build import build_case, build_system
from emufuzz.case.model import TableRegister
from emufuzz.oracle.compare import compare
from emufuzz.oracle.quirks import explaining_quirk
from emufuzz.subject.flat import FlatSubject

QUIRK = "kvm-quirk-22-69-real-interrupt"
TABLE = 0x8000 + 0x400
ENTRIES = {0x8000 + at: bytes((at & 0xFF, at >> 8 & 0xFF)) * 2 for at in range(0, 0x800, 4)}


def make(code, base=TABLE, **options):
    system = msgspec.structs.replace(build_system("real"), idtr=TableRegister(base=base, limit=0x3FF))
    data = {0x8000: b"".join(ENTRIES.values()), 0: bytes(0x1000)}
    return build_case(
        "real", bytes.fromhex(code) + b"\xf4", system=system, data=data, **{"rsp": 0x800} | options
    )


def run(case):
    (outcome,) = FlatSubject(events=False).run([case])
    outcome.gpr = tuple(outcome.gpr)
    return outcome


def as_processor(case, outcome):
    """An outcome of another case, as one of this one."""
    system = msgspec.structs.replace(outcome.system, idtr=case.system.idtr)
    return msgspec.structs.replace(outcome, system=system)


def explained(case, ours, theirs):
    differences = compare(case, ours, theirs)
    assert differences
    return explaining_quirk(case, ours, theirs, differences)


# fmt: off
#: The case, and one in which KVM does what a processor does with the first.
CASES = {
    "wide-frame":    (make("66cd10"), make("2ecd10")),
    "wide-int3":     (make("66cc"), make("2ecc")),
    "signed-vector": (make("cd90"), make("cd90", base=TABLE + 0x400)),
    "both":          (make("66cdff"), make("2ecdff", base=TABLE + 0x400)),
}
# fmt: on


@pytest.mark.parametrize("name", CASES)
def test_the_outcome_of_kvm_is_explained(name):
    case, other = CASES[name]
    ours, theirs = run(case), run(other)
    assert ours.exception is None
    assert theirs.exception is None
    assert explained(case, ours, as_processor(case, theirs)) == QUIRK


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("field", ["rip", "rflags", "rsp", "rbx", "frame", "beside", "cs"])
def test_another_break_is_not(name, field):
    case, other = CASES[name]
    ours, theirs = run(case), run(other)
    broken = damaged(ours, field)
    assert explained(case, broken, as_processor(case, theirs)) is None


def damaged(outcome, field):
    gpr, pages = list(outcome.gpr), {number: bytearray(page) for number, page in outcome.pages.items()}
    seg = list(outcome.system.seg)
    changes = {}
    if field in {"rip", "rflags"}:
        changes[field] = getattr(outcome, field) ^ 0x80
    elif field in {"rsp", "rbx"}:
        gpr[4 if field == "rsp" else 3] ^= 0x40
    elif field == "cs":
        seg[1] = msgspec.structs.replace(seg[1], sel=seg[1].sel ^ 1)
    else:
        stack = next(iter(pages))
        pages[stack][0x7FE if field == "frame" else 0x900] ^= 0x11
    return msgspec.structs.replace(
        outcome,
        gpr=tuple(gpr),
        pages={number: bytes(page) for number, page in pages.items()},
        system=msgspec.structs.replace(outcome.system, seg=tuple(seg)),
        **changes,
    )


@pytest.mark.parametrize(
    ("rsp", "fault"), [(0x1006, (14, 2, 0x1002)), (0xF003, (14, 2, 0xEFFF)), (1, (12, 0, None))]
)
def test_the_stack_may_end_within_the_wide_frame(rsp, fault):
    case = msgspec.structs.replace(make("66cd10", rsp=rsp), id="case")
    ours = run(case)
    assert ours.exception == fault
    theirs = as_processor(case, run(make("2ecd10")))
    assert explained(case, ours, theirs) == QUIRK
    assert explained(case, msgspec.structs.replace(ours, rip=ours.rip + 1), theirs) is None


def test_the_frame_goes_on_at_the_end_of_4_gib():
    case = make("66cc", rsp=2)
    seg = list(case.system.seg)
    seg[2] = msgspec.structs.replace(seg[2], base=0xC000, limit=0xFFFFFFFF, db=1, g=1)
    case = msgspec.structs.replace(case, system=msgspec.structs.replace(case.system, seg=tuple(seg)))
    ours = run(case)
    assert ours.exception == (14, 2, 0xBFFE)
    theirs = msgspec.structs.replace(ours, exception=(12, 0, None))
    assert explained(case, ours, theirs) == QUIRK


def test_a_plain_frame_with_a_plain_vector_is_no_quirk():
    case = make("cd10")
    ours = run(case)
    theirs = msgspec.structs.replace(ours, rip=ours.rip + 4)
    assert explained(case, ours, theirs) is None


def test_a_frame_over_the_end_of_4_gib_goes_on_at_its_beginning():
    """Its first bytes are behind address 0, and not there."""
    case = make("66ce", flags=0x800)
    seg = list(case.system.seg)
    seg[2] = msgspec.structs.replace(seg[2], base=0xC000, limit=0xFFFFFFFF, db=1, g=1)
    case = msgspec.structs.replace(case, system=msgspec.structs.replace(case.system, seg=tuple(seg)))
    case = msgspec.structs.replace(case, gpr=(*case.gpr[:4], 0xFFFFFFFD, *case.gpr[5:]))
    ours = run(case)
    assert ours.exception == (14, 2, 0xBFF9)
    theirs = msgspec.structs.replace(ours, exception=(14, 2, 0xBFFB))
    assert explained(case, ours, theirs) == QUIRK
    assert explained(case, msgspec.structs.replace(ours, exception=(14, 2, 0xBFF8)), theirs) is None

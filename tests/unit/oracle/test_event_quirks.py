"""What KVM's emulator accesses beyond the instruction's operands is known, and nothing beside it."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.arch.regs import GPR_NAMES
from emufuzz.case.build import DATA_BASE, build_case, build_system
from emufuzz.case.segments import segment_data
from emufuzz.fuzz.panel import Panel
from emufuzz.oracle.compare import AGREE, FINDING, SKIPPED
from emufuzz.oracle.quirks import ALL_QUIRKS, EVENT_QUIRKS
from emufuzz.oracle.rules import RulesOracle
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.flat import FlatSubject

STORES, SOURCE = "kvm-quirk-14-15-selector-accesses", "kvm-quirk-16-source-accesses"
MOVSXD, TABLE, PORTS = (
    "kvm-quirk-42-movsxd-accesses", "kvm-quirk-43-table-accesses", "kvm-quirk-46-port-accesses"
)  # fmt: skip


@pytest.fixture(scope="module")
def panel():
    oracle = UnicornOracle()
    yield Panel(oracle, [RulesOracle()])
    oracle.close()


@pytest.fixture(scope="module")
def subject():
    return FlatSubject(events=True)


def case(mode, code, rsi=DATA_BASE, **options):
    return build_case(mode, bytes.fromhex(code), rsi=rsi, **options)


SHORT_DS = {"ds": segment_data(0x28, bits=32, limit=DATA_BASE + 3)}
# fmt: off
CASES = {
    "sldt":                   (STORES, case("prot32", "0f0006")),
    "sldt, 16 bits":          (STORES, case("prot32", "660f0006")),
    "str":                    (STORES, case("prot64", "0f000e")),
    "str, faults":            (STORES, case("prot64", "0f000e", rsi=0x700000)),
    "mov to ds, bad":         (SOURCE, case("prot32", "8e3e")),
    "mov to cs":              (SOURCE, case("prot64", "8e0e")),
    "movsxd":                 (MOVSXD, case("prot64", "666306")),
    "lgdt":                   (TABLE,  case("prot32", "0f0116")),
    "lidt, 16 bits":          (TABLE,  case("prot16", "0f011c")),
    "lgdt, 64 bits":          (TABLE,  case("prot64", "0f0116")),
    "lgdt, 64 bits with 66":  (TABLE,  case("prot64", "660f0116")),
    "in":                     (PORTS,  case("prot32", "f3ec", rcx=5, rdx=0x60)),
    "in, many":               (PORTS,  case("prot64", "f2ed", rcx=1 << 31, rdx=0x60)),
    "in, 16 bits":            (PORTS,  case("prot16", "f3e560", rcx=0x1_0002)),
}
# fmt: on


def ruling(panel, case, outcome):
    ((found, _),) = panel.rule([case], [outcome], panel.first.run([case]))
    return found


def test_every_quirk_has_cases():
    assert {quirk for quirk, _ in CASES.values()} == {quirk.id for quirk in EVENT_QUIRKS}
    assert len({quirk.id for quirk in ALL_QUIRKS}) == len(ALL_QUIRKS)


@pytest.mark.parametrize("name", CASES)
def test_the_accesses_are_explained(panel, subject, name):
    quirk, case = CASES[name]
    (ours,) = subject.run([case])
    found = ruling(panel, case, ours)
    assert (found.kind, found.reason) == (SKIPPED, quirk), found.differences


@pytest.mark.parametrize("name", CASES)
def test_without_a_log_there_is_nothing_to_explain(panel, name):
    _, case = CASES[name]
    (ours,) = FlatSubject(events=False).run([case])
    assert ruling(panel, case, ours).kind == AGREE


def further(event):
    return lambda events: (*events, event)


def moved(events):
    """The first access is 4 bytes further on."""
    at = next(i for i, event in enumerate(events) if event[0] in {"read", "in"})
    event = events[at]
    return (*events[:at], (event[0], event[1] + 4, *event[2:]), *events[at + 1 :])


def doubled(events):
    at = next(i for i, event in enumerate(events) if event[0] in {"read", "in"})
    return (*events[: at + 1], *events[at:])


@pytest.mark.parametrize(
    "damage", [further(("read", DATA_BASE + 0x40, 2)), further(("out", 0x60, b"\0")), moved, doubled]
)
@pytest.mark.parametrize("name", CASES)
def test_other_accesses_are_findings(panel, subject, name, damage):
    _, case = CASES[name]
    (ours,) = subject.run([case])
    damaged = msgspec.structs.replace(ours, events=damage(tuple(ours.events)))
    assert ruling(panel, case, damaged).kind == FINDING


#: For none of their registers Unicorn vouches (gap `table-base`), and rules have no values.
OPEN = {("lgdt, 64 bits", "gpr"), ("lgdt, 64 bits with 66", "gpr")}


@pytest.mark.parametrize(
    ("name", "field"),
    [(n, f) for n in CASES for f in ("gpr", "rip", "exception") if (n, f) not in OPEN],
)
def test_another_departure_is_a_finding(panel, subject, name, field):
    _, case = CASES[name]
    (ours,) = subject.run([case])
    changes = {
        "gpr": {"gpr": tuple(v ^ (n == GPR_NAMES.index("rdi")) for n, v in enumerate(ours.gpr))},
        "rip": {"rip": ours.rip + 1},
        "exception": {"exception": (0, None, None), "rc": "propagate_fault"},
    }
    assert ruling(panel, case, msgspec.structs.replace(ours, **changes[field])).kind == FINDING


# fmt: off
#: Instructions like those, which access what they should.
NEAR = {
    "smsw":                   case("prot32", "0f0126"),
    "mov from ds":            case("prot32", "8c1e"),
    "movsxd, 32 bits":        case("prot64", "6306"),
    "sgdt":                   case("prot32", "0f0106"),
    "in without rep":         case("prot32", "ec", rcx=5, rdx=0x60),
}
# fmt: on


@pytest.mark.parametrize("name", NEAR)
def test_the_same_accesses_elsewhere_are_findings(panel, subject, name):
    """A byte read once more."""
    (ours,) = subject.run([NEAR[name]])
    assert ruling(panel, NEAR[name], ours).kind == AGREE
    damaged = msgspec.structs.replace(ours, events=(*ours.events, ("read", DATA_BASE + 0x40, 2)))
    assert ruling(panel, NEAR[name], damaged).kind == FINDING


def test_accesses_beside_another_quirk(panel, subject):
    """REX.R makes MOV to DS one to a register that does not exist: #UD, once the source is read."""
    wrong = case("prot64", "448e1e")
    (ours,) = subject.run([wrong])
    found = ruling(panel, wrong, ours)
    views = dict(found.views)
    assert found.kind == SKIPPED
    assert views["rules"] == f"kvm-rex-r-segment-register+{SOURCE}"
    damaged = msgspec.structs.replace(ours, events=(*ours.events, ("read", DATA_BASE + 0x40, 2)))
    assert ruling(panel, wrong, damaged).kind == FINDING


def test_a_limit_that_the_segment_refuses_has_no_further_access(panel, subject):
    """LGDT whose base lies beyond the segment: the limit was read."""
    limited = case("prot32", "0f0116", system=build_system("prot32", **SHORT_DS))
    (ours,) = subject.run([limited])
    assert ours.exception == (13, 0, None)
    assert ruling(panel, limited, ours).kind == SKIPPED

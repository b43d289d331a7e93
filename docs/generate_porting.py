# ruff: noqa: INP001 - a script, not a package
"""Write docs/porting.md (`python docs/generate_porting.py`) from the emulator and docs/porting_tables.py.

Markers `KVM deviation:` in comments and docstrings of emufuzz/emulator become the list of deviations;
tests whose names begin with test_quirk_NN belong to quirk NN.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[1]
EMULATOR: Final = ROOT / "emufuzz/emulator"
KVM: Final = ROOT / "emufuzz/kvm"
TESTS: Final = (ROOT / "tests/unit/emulator", ROOT / "tests/unit/kvm")
QUIRK_TEST: Final = re.compile(r"^def (test_quirk(?:_\d\d|s(?:_\d\d)+)_\w+)", re.MULTILINE)
TARGET: Final = ROOT / "docs/porting.md"
MARKER: Final = "KVM deviation:"
REFERENCE: Final = re.compile(r"(SDM|APM) Vol\. [1-3][A-D]?")

sys.path.insert(0, str(ROOT / "docs"))
import porting_tables as tables  # noqa: E402 - found only behind the line above

INTRODUCTION: Final = """\
<!-- Written by docs/generate_porting.py: change the emulator's markers or docs/porting_tables.py. -->
# How the port follows emulate.c

`emufuzz/emulator/` is a port of `arch/x86/kvm/emulate.c` of Linux 6.12. It computes what that file
computes, in the same order and with the same callbacks, mistakes included: it is the thing under
test. What surrounds the emulator in KVM is not here (`emufuzz/kvm/`).

## Conventions

* **Names** are KVM's where Python allows: functions keep theirs, `__x` becomes `_x` or joins `x`,
  structures are CapWords (`x86_emulate_ctxt` is `X86EmulateCtxt`). `_eip` is `next_eip`, `_regs` is
  `regs`. Cases of the opcode switch at the end of `x86_emulate_insn`, which have no name in C, are
  `sw_*`. Instruction handlers lie in `insn/`, one module per chapter of the manual.
* **Results** are X86EMUL_* ints that are returned, never Python exceptions, so the order of side effects
  is the order of the lines. A function that yields a value of zero or more returns a failure as the
  negative X86EMUL_* result: `if value < 0: return -value`. A callback that yields data returns
  (result, data). Fetch functions leave a failure in `ctxt.rc`.
* **Faults** are put into `ctxt.exception` by `emulate_gp` and its kin, which return
  X86EMUL_PROPAGATE_FAULT.
* **Values** are unsigned ints cut to their size where C's types cut them: addresses to 64 bits by
  `& MASK64`, operands when they are written back. SSE registers are ints of 128 bits.
* **Operands** name a register by number and shift, where C has a pointer. `goto done` and
  `goto writeback` are early returns; `goto cannot_emulate` is X86EMUL_UNHANDLEABLE with
  `ctxt.fail_reason`, which only reports read.
* **Tables** are rows in KVM's vocabulary (`tables/`), resolved when they are imported: the flags of a
  chain of groups are merged, each operand kind has its decoder.
* **Flags** come from the host CPU in C (fastops); here from `eflags*.py`, undefined bits as measured on
  the machine that recorded the vectors.

## Results that KVM does not look at

After any result of a callback but X86EMUL_CONTINUE no GPR is committed, the call is the last one
and memory holds what was written before it. Exceptions: set_dr (a refusal is 1, only negative
results count), pio_out_emulated and get_msr are ignored everywhere; set_cr in CLTS, LMSW and the
end of a task switch; write_std for the busy bits of a task switch; read_std of the I/O bitmap
becomes #GP(0); leave_smm becomes a request for a shutdown. A CALL far whose push fails loads the
old CS again. RIP and RFLAGS are the caller's to commit. The flat subject does so only after
X86EMUL_CONTINUE; x86.c takes changed RFLAGS over after X86EMUL_RETRY_INSTR and
X86EMUL_CMPXCHG_FAILED too, although the instruction will run again (quirk 51, in the KVM model).
"""


class Definition(NamedTuple):
    """A function, class or table of the emulator and the lines it spans."""

    name: str
    module: str
    first: int
    last: int


class Deviation(NamedTuple):
    """A marker: where it is and what it says."""

    module: str
    line: int
    owner: str
    text: str
    context: str


def modules() -> list[Path]:
    """The emulator's modules, tables included."""
    return sorted(EMULATOR.rglob("*.py"))


def definitions(path: Path) -> list[Definition]:
    """What a module defines: functions, methods, classes, and the tables that are assigned to names."""
    name = path.relative_to(EMULATOR).as_posix()
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(Definition(node.name, name, node.lineno, node.end_lineno or node.lineno))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found.append(Definition(node.target.id, name, node.lineno, node.end_lineno or node.lineno))
    return found


def index() -> dict[str, list[Definition]]:
    """Name -> its definitions in the emulator; the interface of the callbacks is apart (`ops.py` last)."""
    by_name: dict[str, list[Definition]] = defaultdict(list)
    for path in modules():
        for definition in definitions(path):
            by_name[definition.name].append(definition)
    by_name["DescStruct"] = [Definition("DescStruct", "../arch/descriptors.py", 1, 1)]
    for found in by_name.values():
        found.sort(key=lambda definition: definition.module == "ops.py")
    return by_name


def paragraph(lines: list[str], start: int) -> str:
    """The marker's text: the rest of its line and what follows up to the end of comment or paragraph."""
    comment = lines[start].lstrip().startswith("#")
    words = []
    for line in lines[start:]:
        text = line.strip()
        if comment and not text.startswith("#"):
            break
        text = text.lstrip("# ")
        ends = '"""' in text.replace('"""' + MARKER, MARKER)
        words.append(text.replace('"""', "").strip())
        if not text or ends:
            break
    return " ".join(words).partition(MARKER)[2].strip()


def deviations() -> Iterator[Deviation]:
    """All markers, in the order of modules and lines."""
    for path in modules():
        lines = path.read_text("utf-8").splitlines()
        found = definitions(path)
        for number, line in enumerate(lines, 1):
            if MARKER not in line:
                continue
            owners = [d for d in found if d.first <= number <= d.last]
            owner = max(owners, key=lambda d: d.first) if owners else _next(found, number)
            context = "\n".join(lines[owner.first - 1 : owner.last])
            text = paragraph(lines, number - 1)
            yield Deviation(owner.module, number, owner.name, text, context)


def _next(found: list[Definition], line: int) -> Definition:
    """The definition that a comment before it belongs to."""
    return min((d for d in found if d.first > line), key=lambda d: d.first)


def reference(deviation: Deviation) -> str:
    """Where the manual says what KVM does differently: in the marker, else in the docstring around it."""
    if REFERENCE.search(deviation.text):
        return ""
    inside = re.search(r"\(((?:SDM|APM) Vol\.[^)]*)\)", deviation.context)
    return f" ({' '.join(inside[1].split())})" if inside else ""


def function_rows(by_name: dict[str, list[Definition]]) -> Iterator[str]:
    """The map from C to Python, part by part.

    Raises:
        KeyError: a name that the emulator does not define.
    """
    for title, names in tables.FUNCTIONS.items():
        yield f"\n### {title}\n\n| emulate.c | port |\n|---|---|"
        for name in names.split():
            if name in tables.DISSOLVED:
                yield f"| `{name}` | {tables.DISSOLVED[name]} |"
                continue
            places = [by_name[python][0] for python in tables.RENAMED.get(name, name).split()]
            texts = [f"`{place.module}`: `{place.name}`" for place in places]
            yield f"| `{name}` | {', '.join(texts)} |"


def quirks_of(test: str) -> list[int]:
    """The numbers in a test's name: one after test_quirk_, any number of them after test_quirks_."""
    numbers = re.match(r"test_quirk(?:_(\d\d)|s((?:_\d\d)+))_", test)
    return [int(n) for n in (numbers[1] or numbers[2][1:]).split("_")] if numbers else []


def quirk_tests() -> dict[int, dict[str, list[str]]]:
    """Quirk -> test module -> the tests that pin it there."""
    found: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(path for folder in TESTS for path in folder.glob("test_*.py")):
        for name in QUIRK_TEST.findall(path.read_text("utf-8")):
            for number in quirks_of(name):
                found[number][f"{path.parent.name}/{path.name}"].append(name)
    return found


def model_place(place: str) -> str:
    """`module:function` of the KVM model, as the table shows it.

    Raises:
        KeyError: there is no such function.
    """
    module, _, name = place.partition(":")
    tree = ast.parse((KVM / module).read_text("utf-8"))
    if not any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree)):
        raise KeyError(place)
    return f"`kvm/{module}`: `{name}`"


def quirk_rows() -> Iterator[str]:
    """The numbered quirks, where each one is, and the tests behind it.

    Raises:
        KeyError: a place that the KVM model does not define, or a quirk without a test.
    """
    tests = dict(quirk_tests())
    for quirk in tables.QUIRKS:
        places = [f"`{place}`" for place in quirk.places.split()]
        places += [model_place(place) for place in quirk.model.split()]
        behind = "<br>".join(f"`{module}`: {_names(names)}" for module, names in tests[quirk.number].items())
        yield f"| {quirk.number} | {quirk.what} | {', '.join(places)} | {behind} |"


def _names(tests: list[str]) -> str:
    more = f" and {len(tests) - 1} more" if len(tests) > 1 else ""
    return f"`{tests[0]}`{more}"


def deviation_lines() -> Iterator[str]:
    """All markers as a list, module by module."""
    module = ""
    for deviation in deviations():
        if deviation.module != module:
            module = deviation.module
            yield f"\n### {module}\n"
        yield f"* `{deviation.owner}`: {deviation.text}{reference(deviation)}"


def render() -> str:
    """The whole document."""
    by_name = index()
    parts = [
        INTRODUCTION,
        "## Function by function",
        *function_rows(by_name),
        "\n## Quirks\n",
        "Where KVM and the processor differ, numbered. What lies in the emulator is tested on it alone",
        "(`tests/unit/emulator`, one test for each). What needs KVM around it (devices, userspace, interrupt",
        "shadows, breakpoints, task switches, L1) is tested through real exits (`tests/unit/kvm`, modules",
        "`test_harness_quirks_*.py`), whose docstrings say what hardware does.\n",
        "| # | quirk | place | tests |\n|---|---|---|---|",
        *quirk_rows(),
        "\n## Deviations from the hardware\n\nThe code's own markers.",
        *deviation_lines(),
        "\n## Other decoders\n",
        "Lengths are compared with capstone and iced-x86 on encodings of all implemented leaves",
        "(`tests/differential/test_decoder_lengths.py`). All disagreements are of these kinds:\n",
        "| rule | who is right | what |\n|---|---|---|",
        *(f"| {rule} | {right} | {what} |" for rule, (right, what) in tables.DECODER_DISAGREEMENTS.items()),
        "\n## Branches that are never taken\n",
        "The vectors and tests take every branch of `emufuzz/emulator/` but these (`coverage run --branch",
        "--source=emufuzz/emulator -m pytest tests/{vectors,tables,property,unit/emulator}`):\n",
        *(f"* `{name}`: {why}" for name, why in tables.UNREACHABLE.items()),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render(), "utf-8")

"""Instruction lengths: the port, capstone and iced-x86 on encodings of every implemented leaf.

Every kind of disagreement has a rule here that recognises it, and a row in the table of
docs/porting_tables.py that says who is right. An encoding that no rule explains fails the test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from random import Random
from typing import NamedTuple

import capstone
import iced_x86
import pytest
from support.random_cases import encode

from emufuzz.arch.descriptors import DescStruct
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.decode import init_decode_cache, x86_decode_insn
from emufuzz.emulator.flags import No64
from emufuzz.emulator.ops import SegmentState
from emufuzz.emulator.x86emul import (
    EMULATION_OK,
    X86EMUL_MODE_PROT16,
    X86EMUL_MODE_PROT32,
    X86EMUL_MODE_PROT64,
)
from emufuzz.fuzz.forms import Form, forms

IP = 0x1000
MODES = {16: X86EMUL_MODE_PROT16, 32: X86EMUL_MODE_PROT32, 64: X86EMUL_MODE_PROT64}
CAPSTONE = {bits: capstone.Cs(capstone.CS_ARCH_X86, getattr(capstone, f"CS_MODE_{bits}")) for bits in MODES}
#: Length counts here, not whether the instruction would fault.
ICED_OPTIONS = iced_x86.DecoderOptions.NO_INVALID_CHECK
IMPLEMENTED = [form for form in forms() if form.implemented]


class Verdict(NamedTuple):
    """An encoding and its length to each decoder; 0 = it is no instruction."""

    form: Form
    bits: int
    code: bytes
    ours: int
    cs: int
    iced: int

    @property
    def prefixes(self) -> frozenset[int]:
        """The bytes before the opcode, of which the last may be a REX prefix."""
        start = self.code.index(self.form.opcode)
        return frozenset(self.code[:start])

    @property
    def mod3(self) -> bool:
        at = self.code.index(self.form.opcode) + len(self.form.opcode)
        return self.form.has_modrm and self.code[at] >= 0xC0


class Registers:
    """As little of a vcpu as decoding asks for."""

    def __init__(self) -> None:
        desc = DescStruct(0, 0xFFFFF, 11, s=1, p=1, g=1)
        self.cs = SegmentState(usable=True, selector=8, desc=desc, base3=0)

    def get_segment(self, ctxt: X86EmulateCtxt, seg: int) -> SegmentState:
        return self.cs

    def read_gpr(self, ctxt: X86EmulateCtxt, reg: int) -> int:
        return 0


def port_length(ctxt: X86EmulateCtxt, form: Form, bits: int, code: bytes) -> int:
    """Length to the port; 0 if it does not decode, or as another leaf than meant."""
    ctxt.mode = MODES[bits]
    ctxt.eip = IP
    init_decode_cache(ctxt)
    if x86_decode_insn(ctxt, code) != EMULATION_OK or ctxt.opcode.leaf != form.leaf:
        return 0
    return ctxt.fetch_pos


def capstone_length(bits: int, code: bytes) -> int:
    return next((size for _, size, _, _ in CAPSTONE[bits].disasm_lite(code, IP, 1)), 0)


def iced_length(bits: int, code: bytes) -> int:
    insn = iced_x86.Decoder(bits, code, ICED_OPTIONS, ip=IP).decode()
    return 0 if insn.is_invalid else insn.len


REPEATS = {0xF2, 0xF3}
NO_PREFIX = ("0f01/0.mod3.rm=1", "0f01/2.mod3.rm=1", "0fae/0.mem", "0fae/1.mem", "0fc3.mem")
FAR_POINTER = ("0fb2", "0fb4", "0fb5", "ff/3", "ff/5")
both_refuse: Callable[[Verdict], bool] = lambda v: not v.cs and not v.iced  # noqa: E731 - reads as the rules do
capstone_refuses: Callable[[Verdict], bool] = lambda v: not v.cs and v.iced == v.ours  # noqa: E731 - as above

#: Rule -> whether it explains a disagreement. The first that does counts.
RULES: dict[str, Callable[[Verdict], bool]] = {
    "not-in-64-bit-mode": lambda v: both_refuse(v) and v.bits == 64 and bool(v.form.d & No64),
    "far-pointer-in-a-register": lambda v: both_refuse(v) and v.form.leaf in FAR_POINTER and v.mod3,
    "segment-register-6-or-7": lambda v: both_refuse(v) and v.form.leaf in ("8c", "8e"),
    "movntdq-register-form": lambda v: both_refuse(v) and v.form.leaf == "0fe7.pfx_66" and v.mod3,
    "no-prefix-allowed": lambda v: (
        not v.iced and v.form.leaf in NO_PREFIX and bool(v.prefixes & {0x66, *REPEATS})
    ),
    "lock": lambda v: capstone_refuses(v) and 0xF0 in v.prefixes,
    "capstone-repeat": lambda v: capstone_refuses(v) and bool(v.prefixes & REPEATS),
    "capstone-reserved-nop": lambda v: capstone_refuses(v) and v.form.leaf in ("0f0d", "0f18"),
    "capstone-movsxd": lambda v: capstone_refuses(v) and v.form.leaf == "63.mode64",
    "capstone-jcc-66": lambda v: (
        v.iced == v.ours == v.cs + 2 and v.bits == 64 and v.form.leaf in ("0f80", "0f81")
    ),
    "capstone-ret-66-rex-w": lambda v: v.iced == v.ours == v.cs - 2 and v.bits == 64 and v.form.leaf == "c2",
}


def table() -> dict[str, tuple[str, str]]:
    """The documented disagreements: rule -> (who is right, what it is)."""
    path = Path(__file__).parents[2] / "docs/porting_tables.py"
    spec = spec_from_file_location("porting_tables", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DECODER_DISAGREEMENTS


def compare(seed: int, count: int) -> tuple[set[str], Counter[str], list[str]]:
    """Compare `count` encodings: leaves with an agreement, disagreements by rule, unexplained ones."""
    rng = Random(seed)
    ctxt = X86EmulateCtxt(Registers())
    agreed: set[str] = set()
    explained: Counter[str] = Counter()
    unexplained = []
    number = compared = 0
    while compared < count:
        form = IMPLEMENTED[number % len(IMPLEMENTED)]
        number += 1
        bits = rng.choice((16, 32, 64) if form.mode64 is None else (64,) if form.mode64 else (16, 32))
        code = encode(rng, form)
        ours = port_length(ctxt, form, bits, code)
        if not ours:
            continue
        compared += 1
        verdict = Verdict(form, bits, code, ours, capstone_length(bits, code), iced_length(bits, code))
        if verdict.cs == verdict.iced == ours:
            agreed.add(form.leaf)
            continue
        rule = next((name for name, explains in RULES.items() if explains(verdict)), None)
        if rule is None:
            lengths = f"{ours}, capstone {verdict.cs}, iced-x86 {verdict.iced}"
            unexplained.append(f"{form.leaf} {bits} bits {code.hex()}: {lengths}")
        else:
            explained[rule] += 1
    return agreed, explained, unexplained


def test_every_rule_is_documented():
    assert list(table()) == list(RULES)


def test_lengths_agree():
    agreed, _, unexplained = compare(seed=1, count=10_000)
    assert unexplained == []
    assert agreed == {form.leaf for form in IMPLEMENTED}


@pytest.mark.slow
def test_lengths_of_a_million_encodings():
    agreed, explained, unexplained = compare(seed=2, count=1_000_000)
    assert unexplained == []
    assert agreed == {form.leaf for form in IMPLEMENTED}
    assert set(explained) == set(RULES)

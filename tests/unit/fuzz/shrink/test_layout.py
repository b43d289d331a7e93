"""Where the parts of an instruction lie, and which address it means."""

from __future__ import annotations

import iced_x86
import msgspec
import pytest

from emufuzz.case.build import build_case
from emufuzz.fuzz.generate import Options
from emufuzz.fuzz.kvm.generate import generator_of
from emufuzz.fuzz.shrink.layout import effective_address, layout_of


def bits(case):
    return 64 if case.mode == "prot64" else 32 if case.system.seg[1].db else 16


def layout(mode, code):
    return layout_of(build_case(mode, bytes.fromhex(code)))


@pytest.mark.parametrize(("mode", "code", "places"), [
    #                                      start opcode modrm sib disp imm ad rex
    ("prot32", "11d8",                    (0, 0, 1, -1, 2, 2, 4, 0)),
    ("prot32", "8b4510",                  (0, 0, 1, -1, 2, 3, 4, 0)),
    ("prot32", "c7442410aabbccdd",        (0, 0, 1, 2, 3, 4, 4, 0)),
    ("prot64", "f0480fc10c25 78563412",   (0, 2, 4, 5, 6, 10, 8, 0x48)),
    ("prot64", "676689050010 0000",       (0, 2, 3, -1, 4, 8, 4, 0)),
    ("real",   "c7060010aabb",            (0, 0, 1, -1, 2, 4, 2, 0)),
    ("real",   "67c7050010 0000aabb",     (0, 1, 2, -1, 3, 7, 4, 0)),
    ("prot64", "0f38f00425 00800000",     (0, 0, 3, 4, 5, 9, 8, 0)),
    ("prot32", "b8 78563412",             (0, 0, -1, -1, 1, 1, 4, 0)),
])  # fmt: skip
def test_parts_of_an_instruction(mode, code, places):
    assert tuple(layout(mode, code)) == places


@pytest.mark.parametrize("code", ["", "66", "0f", "8b", "8b45", "8b04", "8b8410203040", "c705001000"])
def test_an_instruction_that_ends_before_its_immediate_has_no_layout(code):
    assert layout("prot32", code) is None


def test_a_rex_prefix_that_is_not_the_last_one_counts_for_nothing():
    assert layout("prot64", "4866 8bc0").rex == 0
    assert layout("prot64", "6648 8bc0").rex == 0x48


REGISTERS = tuple(0x0123456789ABCDEF * n & (1 << 64) - 1 for n in range(1, 17))
#: Displacements that are relative to these are addresses already.
NO_REGISTERS = {iced_x86.Register.NONE, iced_x86.Register.RIP, iced_x86.Register.EIP}


def _address(decoded, case):
    """The effective address as another decoder reads it."""

    def register(which):
        return 0 if which in NO_REGISTERS else case.gpr[iced_x86.RegisterExt.number(which)]

    index = register(decoded.memory_index) * decoded.memory_index_scale
    total = register(decoded.memory_base) + index + decoded.memory_displacement
    return total & (1 << 8 * layout_of(case).ad_bytes) - 1


def test_addresses_are_those_that_another_decoder_reads():
    checked = set()
    for generated in generator_of(3, 0, Options()).cases(2048):
        parts = layout_of(generated)
        if parts is None or not parts.is_memory(generated.code):
            continue
        case = msgspec.structs.replace(generated, gpr=REGISTERS)
        decoded = iced_x86.Decoder(bits(case), case.code, ip=case.rip).decode()
        if iced_x86.OpKind.MEMORY not in [decoded.op_kind(i) for i in range(decoded.op_count)]:
            continue
        alone = msgspec.structs.replace(case, code=case.code[: decoded.len])
        assert effective_address(alone, parts) == _address(decoded, alone), (case.mode, case.code.hex())
        checked.add((case.mode, parts.ad_bytes, parts.sib >= 0))
    assert len(checked) > 12

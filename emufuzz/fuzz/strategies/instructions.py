"""Strategies for instructions, encoded from the opcode tables."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final, TypeAlias

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from emufuzz.arch.leaves import LEAVES
from emufuzz.arch.modes import MODES
from emufuzz.case.build import CODE_BITS
from emufuzz.emulator.flags import Lock, MemAbs, NoMod, String
from emufuzz.fuzz.corpus.legal import legal_pairs
from emufuzz.fuzz.encode import SEGMENT_PREFIXES, effect_of
from emufuzz.fuzz.forms import MOD_ANY, MOD_MEMORY, MOD_REGISTER, Form, forms
from emufuzz.fuzz.strategies.values import words

Draw: TypeAlias = Callable[[SearchStrategy[Any]], Any]

_MANDATORY: Final = {"66": 0x66, "f2": 0xF2, "f3": 0xF3}
_LONGEST: Final = 15
#: ModRM.rm that is a register alone, by the size of addresses (SDM Vol. 2A 2.1.5).
_PLAIN: Final = {16: (4, 5, 7), 32: (0, 1, 2, 3, 6, 7), 64: (0, 1, 2, 3, 6, 7)}


def instructions(
    mode: str | None = None, leaves: Collection[str] | None = None, *, prefixes: bool = True
) -> SearchStrategy[bytes]:
    """Encoded instructions, each of one of the leaves of the opcode tables.

    Args:
        mode: The mode they are for, one of emufuzz.arch.modes.MODES; None for any.
        leaves: Ids of leaves, as in emufuzz/arch/opcodes.csv; by default all that KVM implements and
            that are legal in the mode.
        prefixes: Also with prefixes that are not needed: sizes, segments, REP, REX; LOCK where it is legal.

    Raises:
        ValueError: There is no such mode or leaf, or none of the leaves can be reached in the mode.
    """
    if mode is None:
        found = [each for each in MODES if _chosen(each, leaves)]
        if not found:
            raise ValueError("none of the leaves can be reached in any mode")
        return st.sampled_from(found).flatmap(lambda one: instructions(one, leaves, prefixes=prefixes))
    return _encoded(mode, _some(mode, leaves), prefixes=prefixes)


def aimed_instructions(mode: str, leaves: Collection[str], address: int) -> SearchStrategy[bytes]:
    """Instructions whose operand in memory is where any register but RSP points, or at the address.

    No prefixes but those that the leaves need; operands of ModRM are in memory.
    """
    return _encoded(mode, _some(mode, leaves), prefixes=False, address=address)


def _some(mode: str, leaves: Collection[str] | None) -> list[Form]:
    chosen = _chosen(mode, leaves)
    if not chosen:
        raise ValueError(f"none of the leaves can be reached in {mode}")
    return chosen


def _chosen(mode: str, leaves: Collection[str] | None) -> list[Form]:
    """The forms of the leaves that can occur in the mode, in the order of the tables."""
    if mode not in MODES:
        raise ValueError(f"{mode} is not one of {', '.join(MODES)}")
    for leaf in leaves or ():
        if leaf not in LEAVES:
            raise ValueError(f"there is no leaf {leaf}")
    usable = [form for form in forms() if form.mode64 in (None, mode == "prot64")]
    if leaves is not None:
        return [form for form in usable if form.leaf in leaves]
    return [form for form in usable if (form.leaf, mode) in legal_pairs()]


@st.composite
def _encoded(
    draw: Draw, mode: str, chosen: list[Form], *, prefixes: bool, address: int | None = None
) -> bytes:
    form = draw(st.sampled_from(chosen))
    bits = CODE_BITS.get(mode, 16)
    aimed = None if address is None else _PLAIN[bits]
    modrm = _modrm(draw, form, aimed) if form.has_modrm else -1
    run = _prefixes(draw, form, bits, modrm) if prefixes else b""
    run = bytes(byte for byte in (_MANDATORY.get(form.prefix),) if byte) + run
    size = effect_of(bits, run)
    code = run + form.opcode
    if modrm >= 0:
        code += bytes((modrm,)) + _address(draw, modrm, size.ad_bytes)
    op_bytes = form.operand_bytes(size.op_bytes, bits)
    immediate = form.immediate_bytes(op_bytes, size.ad_bytes)
    if form.d & MemAbs and address is not None:
        code += address.to_bytes(immediate, "little")
    elif immediate:
        code += draw(words(8 * immediate)).to_bytes(immediate, "little")
    return bytes(code[:_LONGEST])


def _prefixes(draw: Draw, form: Form, bits: int, modrm: int) -> bytes:
    """Prefixes that leave the leaf as it is; REX comes last."""
    allowed = [*SEGMENT_PREFIXES, 0x67]
    if not form.prefix:
        allowed += [0x66]
    if form.d & String:
        allowed += [0xF2, 0xF3]
    if form.d & Lock and modrm < 0xC0:
        allowed += [0xF0]
    run = bytes(draw(st.lists(st.sampled_from(allowed), max_size=2, unique=True)))
    if bits == 64 and draw(st.booleans()):
        run += bytes((0x40 | draw(st.integers(0, 15)),))
    return run


def _modrm(draw: Draw, form: Form, aimed: tuple[int, ...] | None) -> int:
    """ModRM; of `aimed` ones the memory operand is one of these, without displacement."""
    mods = {MOD_ANY: (3, 0, 1, 2), MOD_MEMORY: (0, 1, 2), MOD_REGISTER: (3,)}[form.mod]
    if aimed is not None and form.mod != MOD_REGISTER and form.rm < 0:
        reg = form.reg if form.reg >= 0 else draw(st.integers(0, 7))
        return int(reg << 3 | draw(st.sampled_from(aimed)))
    if form.d & NoMod:
        mods = (3,)
    mod = draw(st.sampled_from(mods))
    reg = form.reg if form.reg >= 0 else draw(st.integers(0, 7))
    rm = form.rm if form.rm >= 0 else draw(st.integers(0, 7))
    return int(mod << 6 | reg << 3 | rm)


def _address(draw: Draw, modrm: int, ad_bytes: int) -> bytes:
    """SIB and displacement (SDM Vol. 2A 2.1.5)."""
    mod, rm = modrm >> 6, modrm & 7
    if mod == 3:
        return b""
    sib = draw(st.binary(min_size=1, max_size=1)) if ad_bytes > 2 and rm == 4 else b""
    if ad_bytes == 2:
        size = {0: 2 if rm == 6 else 0, 1: 1, 2: 2}[mod]
    else:
        bare = rm == 5 or (sib != b"" and sib[0] & 7 == 5)
        size = {0: 4 if bare else 0, 1: 1, 2: 4}[mod]
    return sib + (draw(words(8 * size)).to_bytes(size, "little") if size else b"")

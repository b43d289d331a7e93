"""The vocabulary of the flag-effects table: words, flags, references, and their parser.

A template gives one word per status flag; a reference names a template and overrides single flags:
`ARITH|CF=tm`. An unknown template, flag or word is an error. Nothing else is a fact here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from emufuzz.arch.rflags import FLAG_NAMES

#: Columns of a template.
STATUS_FLAGS: Final = ("OF", "SF", "ZF", "AF", "PF", "CF")
#: Flag name -> its bits in RFLAGS.
FLAG_BITS: Final = {name: bits for bits, name in FLAG_NAMES.items()}

# What makes a flag undefined; the masked count is the one that the CPU uses (5 or 6 bits).
NEVER: Final = "never"
ALWAYS: Final = "always"
COUNT_ABOVE_1: Final = "masked count > 1"
COUNT_FROM_WIDTH: Final = "masked count >= operand width"
COUNT_ABOVE_WIDTH: Final = "masked count > operand width"


@dataclass(frozen=True, slots=True)
class Word:
    """What a word of the vocabulary says about a flag.

    `effect` is "keep", "modify", "clear", "set" or "undefined"; a modified flag may still be
    undefined under the condition `undefined_if`.
    """

    effect: str
    undefined_if: str
    meaning: str


# fmt: off
#: Words for one flag. A `t` before another word, or alone, says that the flag is tested as well.
WORDS: Final = {
    "-":  Word("keep",      NEVER,             "left alone"),
    "m":  Word("modify",    NEVER,             "set according to the result"),
    "0":  Word("clear",     NEVER,             "cleared"),
    "1":  Word("set",       NEVER,             "set"),
    "u":  Word("undefined", ALWAYS,            "undefined (for shifts: unless the masked count is 0)"),
    "m1": Word("modify",    COUNT_ABOVE_1,     "set according to the result by 1 bit, else undefined"),
    "mw": Word("modify",    COUNT_FROM_WIDTH,  "the last bit shifted out, undefined from the width on"),
    "ms": Word("modify",    COUNT_ABOVE_WIDTH, "set according to the result, undefined above the width"),
}
# fmt: on


class EffectsError(ValueError):
    """The table does not keep to its vocabulary."""


@dataclass(frozen=True, slots=True)
class Effects:
    """Flag effects of an instruction: masks of RFLAGS bits, and what they depend on.

    `undefined` is the worst case over all operands; `conditional` lists (mask, condition) of flags
    that are undefined only under a condition. `by_count` says that a masked count of 0 makes the
    whole instruction leave all flags alone. `undefined_result` is the condition under which the
    destination is undefined, `source` where the SDM says so.
    """

    template: str
    source: str
    by_count: bool
    undefined_result: str
    tested: int
    modified: int
    cleared: int
    set: int
    undefined: int
    conditional: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Template:
    """One word per flag, `words` by flag name; the rest as in Effects."""

    words: Mapping[str, str]
    source: str
    by_count: bool = False
    undefined_result: str = NEVER


def split_word(word: str) -> tuple[bool, Word]:
    """(tested, what the word says); EffectsError for an unknown word."""
    tested = word.startswith("t")
    plain = word[1:] if tested else word
    if tested and not plain:
        plain = "-"
    if plain not in WORDS:
        raise EffectsError(f"unknown flag word {word!r}, expecting one of {' '.join(WORDS)}, or t with one")
    return tested, WORDS[plain]


def parse_flags(text: str) -> dict[str, str]:
    """`CF=tm DF=0` as {flag: word}; EffectsError for an unknown flag or word."""
    words = {}
    for item in text.split():
        flag, equals, word = item.partition("=")
        if not equals or flag not in FLAG_BITS:
            raise EffectsError(
                f"unknown flag in {item!r}, expecting FLAG=word with one of {' '.join(FLAG_BITS)}"
            )
        split_word(word)
        words[flag] = word
    return words


def template(
    columns: str, source: str, *, others: str = "", by_count: bool = False, undefined_result: str = NEVER
) -> Template:
    """A template from its six columns (OF SF ZF AF PF CF) and `others`, written as FLAG=word."""
    words = columns.split()
    if len(words) != len(STATUS_FLAGS):
        raise EffectsError(
            f"{columns!r} has {len(words)} words, expecting one each for {' '.join(STATUS_FLAGS)}"
        )
    for word in words:
        split_word(word)
    by_flag = {**dict(zip(STATUS_FLAGS, words, strict=True)), **parse_flags(others)}
    return Template(by_flag, source, by_count, undefined_result)


def resolve(reference: str, templates: Mapping[str, Template]) -> Effects:
    """The effects that a reference stands for."""
    name, _, overrides = reference.partition("|")
    if name not in templates:
        raise EffectsError(f"unknown template {name!r}, expecting one of {' '.join(templates)}")
    base = templates[name]
    masks = dict.fromkeys(("tested", "keep", "modify", "clear", "set", "undefined"), 0)
    conditional: dict[str, int] = {}
    for flag, text in {**base.words, **parse_flags(overrides)}.items():
        bits = FLAG_BITS[flag]
        tested, word = split_word(text)
        if tested:
            masks["tested"] |= bits
        masks[word.effect] |= bits
        if word.undefined_if not in {NEVER, ALWAYS}:
            conditional[word.undefined_if] = conditional.get(word.undefined_if, 0) | bits
    return Effects(
        template=name,
        source=base.source,
        by_count=base.by_count,
        undefined_result=base.undefined_result,
        tested=masks["tested"],
        modified=masks["modify"],
        cleared=masks["clear"],
        set=masks["set"],
        undefined=masks["undefined"] | sum(conditional.values()),
        conditional=tuple((bits, condition) for condition, bits in conditional.items()),
    )

"""The vocabulary of the flag-effects table: everything that is not in it is an error."""

from __future__ import annotations

import pytest

from emufuzz.arch import effects_table
from emufuzz.arch.effects_words import (
    COUNT_ABOVE_1,
    FLAG_BITS,
    STATUS_FLAGS,
    EffectsError,
    parse_flags,
    resolve,
    split_word,
    template,
)

CF, PF, AF, ZF, SF, DF, OF = (FLAG_BITS[name] for name in ("CF", "PF", "AF", "ZF", "SF", "DF", "OF"))
TEMPLATES = {"X": template("m1 m 0 u - 1", "somewhere", by_count=True)}


def test_a_template_is_one_word_per_flag():
    effects = resolve("X", TEMPLATES)
    assert effects.modified == OF | SF
    assert effects.cleared == ZF
    assert effects.set == CF
    assert effects.undefined == AF | OF
    assert effects.conditional == ((OF, COUNT_ABOVE_1),)
    assert effects.tested == 0
    assert effects.by_count


def test_an_override_changes_one_flag():
    effects = resolve("X|CF=tm DF=t", TEMPLATES)
    assert effects.tested == CF | DF
    assert effects.modified == OF | SF | CF
    assert effects.set == 0


def test_t_is_a_prefix_and_a_word():
    assert split_word("t") == (True, split_word("-")[1])
    assert split_word("tm") == (True, split_word("m")[1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: template("m m m m m x", ""), "unknown flag word 'x'"),
        (lambda: template("m m m", ""), "3 words"),
        (lambda: parse_flags("QF=m"), "unknown flag in 'QF=m'"),
        (lambda: parse_flags("CF"), "unknown flag in 'CF'"),
        (lambda: parse_flags("CF=tx"), "unknown flag word 'tx'"),
        (lambda: resolve("Y", TEMPLATES), "unknown template 'Y'"),
        (lambda: resolve("X|CF=z", TEMPLATES), "unknown flag word 'z'"),
    ],
)
def test_unknown_words_are_errors(build, message):
    with pytest.raises(EffectsError, match=message):
        build()


def test_a_mnemonic_with_two_references_is_an_error():
    with pytest.raises(EffectsError, match="two references"):
        effects_table._enter({"add": "ARITH"}, "add", "LOGIC")


def test_unknown_words_of_a_profile_are_errors(monkeypatch):
    monkeypatch.setitem(effects_table.PROFILES, "bad", {"MUL": "SF=sometimes"})
    with pytest.raises(EffectsError, match="profile bad, template MUL"):
        effects_table.profile_words("bad", "MUL")


def test_every_template_is_used_and_cites_the_manual():
    used = {reference.partition("|")[0] for reference in effects_table.references().values()}
    assert used == set(effects_table.TEMPLATES)
    assert all(t.source.startswith("Vol. ") for t in effects_table.TEMPLATES.values())


@pytest.mark.parametrize("profile", sorted(effects_table.PROFILES))
def test_a_profile_names_a_value_for_every_undefined_flag_and_no_other(profile):
    for reference in effects_table.references().values():
        effects = resolve(reference, effects_table.TEMPLATES)
        words = effects_table.profile_words(profile, effects.template)
        for flag in STATUS_FLAGS:
            if effects.undefined & FLAG_BITS[flag]:
                assert flag in words, (reference, flag)
    for name in effects_table.PROFILES[profile]:
        possible = 0
        for reference in effects_table.references().values():
            if reference.partition("|")[0] == name:
                possible |= resolve(reference, effects_table.TEMPLATES).undefined
        assert all(possible & FLAG_BITS[flag] for flag in effects_table.profile_words(profile, name))


def test_rules_of_undefined_results_are_declared():
    for profile in effects_table.RESULT_PROFILES.values():
        assert set(profile.values()) <= set(effects_table.RULES)

"""What workers say that they run."""

from __future__ import annotations

import pytest
from support.misbehaving import CannotWorkHere, Twin, setup_with

from emufuzz.fuzz.workers.versions import difference, running_here, sources
from emufuzz.oracle.base import OracleUnavailableError


def test_what_runs_here_names_package_python_subject_oracle_and_sources():
    here = running_here(setup_with(Twin))
    assert here.keys() == {"emufuzz", "python", "subject", "oracle", "twin", "sources"}
    assert here["oracle"] == "twin"


def test_further_oracles_are_named_as_well(tmp_path):
    here = running_here(setup_with(Twin, others=("unicorn",)))
    assert here["unicorn"].startswith("2.")
    assert here["oracle"] == "twin"


def test_an_oracle_that_cannot_work_says_so():
    with pytest.raises(OracleUnavailableError, match="not on this machine"):
        running_here(setup_with(CannotWorkHere))


def test_the_sources_have_one_digest(monkeypatch, tmp_path):
    import emufuzz

    package = tmp_path / "emufuzz"
    package.mkdir()
    file = package / "__init__.py"
    monkeypatch.setattr(emufuzz, "__file__", str(file))
    digests = []
    for text in ("a = 1", "a = 1", "a = 2"):
        file.write_text(text)
        sources.cache_clear()
        digests.append(sources()["sources"])
    sources.cache_clear()
    assert digests[0] == digests[1] != digests[2]
    assert all(len(digest) == 12 for digest in digests)


@pytest.mark.parametrize(("there", "here", "sentence"), [
    ({"a": "1"},           {"a": "1"},           ""),
    ({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, "b 2 there, b 3 here"),
    ({},                   {"a": "1"},           "a none there, a 1 here"),
    ({"a": "1"},           {},                   "a 1 there, a none here"),
])  # fmt: skip
def test_a_difference_names_both(there, here, sentence):
    assert difference(there, here) == sentence

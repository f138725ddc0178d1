"""Noise in the sentences of queries: what it changes, and what it leaves alone."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping

import numpy as np
import pytest

from tvilfm.captioning.colors import find_colors
from tvilfm.config import noise_level
from tvilfm.config.evaluate import ATTRIBUTE_NOISE, CAPTION_NOISE
from tvilfm.datasets.synthetic.people import draw_people
from tvilfm.datasets.synthetic.sentences import write_sentence
from tvilfm.evaluation import text_noise
from tvilfm.evaluation.text_noise import UNSAID, noisy_texts

PEOPLE = {person.pid: person.attributes for person in draw_people(60, seed=3)}
PIDS = list(PEOPLE)
NAMES = [f"cam3/{pid}.jpg" for pid in PIDS]
TEXTS = [write_sentence(attributes, np.random.default_rng(pid)) for pid, attributes in PEOPLE.items()]


def noisy(noise: str, *, seed: int = 0) -> list[str]:
    return noisy_texts(noise, TEXTS, PIDS, NAMES, seed=seed, attributes=PEOPLE)


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences are the attributes that they name, as Python writes a dictionary."""
    monkeypatch.setattr(text_noise, "write_sentence", lambda believed, rng: repr(believed))


ALL = [
    kind if level is None else f"{kind}-{max(2, level)}" for kind, level in (CAPTION_NOISE | ATTRIBUTE_NOISE).items()
]


@pytest.mark.parametrize("noise", ALL)
def test_a_query_has_its_own_draw_which_the_seed_decides(noise: str) -> None:
    assert noisy(noise) == noisy(noise) != TEXTS
    if noise not in ("no-colours", "other-person"):
        backwards = noisy_texts(noise, TEXTS[::-1], PIDS[::-1], NAMES[::-1], seed=0, attributes=PEOPLE)
        assert backwards[::-1] == noisy(noise)
        assert noisy(noise) != noisy(noise, seed=1)


def changed_words(before: str, after: str) -> set[int]:
    pairs = zip(before.split(), after.split(), strict=True)
    return {place for place, (old, new) in enumerate(pairs) if old != new}


@pytest.mark.parametrize(("kind", "most"), [("typos", 3), ("colours", 2)])
def test_a_higher_level_changes_what_a_lower_one_changes_and_more(kind: str, most: int) -> None:
    changes = [
        [changed_words(text, other) for text, other in zip(TEXTS, noisy(f"{kind}-{level}"), strict=True)]
        for level in range(1, most + 1)
    ]
    for level, of_level in enumerate(changes, start=1):
        # An article may change with the colour that follows it.
        assert max(map(len, of_level)) <= (2 * level if kind == "colours" else level)
        if kind == "typos":
            assert {len(of_text) for of_text in of_level} == {level}
    for low, high in itertools.pairwise(changes):
        assert all(a <= b for a, b in zip(low, high, strict=True)) and low != high


def test_colours_are_confused_or_left_out_and_nothing_else() -> None:
    for text, other, without in zip(TEXTS, noisy("colours-1"), noisy("no-colours"), strict=True):
        before, after = find_colors(text), find_colors(other)
        assert len(before) == len(after) and sum(a != b for a, b in zip(before, after, strict=True)) == 1
        assert before and not find_colors(without)
    (orange,) = noisy_texts("colours-1", ["wearing A Red coat"], [1], ["x"], seed=0)
    assert orange in ("wearing An orange coat", "wearing A pink coat")


def test_clauses_are_parts_of_the_sentence_in_their_order() -> None:
    for text, short, longer in zip(TEXTS, noisy("clauses-1"), noisy("clauses-2"), strict=True):
        first, *others = longer.split(", ")
        assert short in text and all(part in text for part in (first, *others))
        assert [text.index(part) for part in (first, *others)] == sorted(text.index(part) for part in (first, *others))
        assert len(short) < len(longer) < len(text)


def test_a_sentence_about_another_person_is_one_of_the_queries() -> None:
    of = dict(zip(TEXTS, PIDS, strict=True))
    assert all(of[text] != pid for text, pid in zip(noisy("other-person"), PIDS, strict=True))
    assert noisy_texts("other-person", ["a man"], [1], ["x"], seed=0) == ["a person"]


def said(noise: str) -> list[dict[str, str]]:
    return [ast.literal_eval(text) for text in noisy(noise)]


def sayable(attributes: Mapping[str, str]) -> dict[str, str]:
    bag = attributes["bag"] not in UNSAID
    return {n: v for n, v in attributes.items() if v not in UNSAID and (bag or n != "bag_colour")}


@pytest.mark.usefixtures("believed")
def test_attributes_are_named_missing_or_wrong_as_often_as_said() -> None:
    for level in (1, 3):
        for truth, named, missing, wrong in zip(
            PEOPLE.values(), said(f"named-{level}"), said(f"missing-{level}"), said(f"wrong-{level}"), strict=True
        ):
            every = sayable(truth)
            assert len(named) == level and named.items() <= every.items()
            assert len(missing) == len(every) - level and missing.items() <= every.items()
            assert wrong.keys() == every.keys() and len(wrong.items() - every.items()) == level
            assert all("bag" in one or "bag_colour" not in one for one in (named, missing, wrong))
            assert not set(UNSAID) & set(wrong.values())
    assert said("missing-0") == [sayable(truth) for truth in PEOPLE.values()]
    assert {len(one) for one in said("missing-99")} == {1}


@pytest.mark.parametrize(
    "noise", ["typo-1", "typos", "typos-0", "typos-", "typos-1.5", "chatter-2", "named-0", "-1", ""]
)
def test_noise_that_does_not_exist_is_refused_with_what_does(noise: str) -> None:
    with pytest.raises(ValueError, match=r"^text_noise: expected no-colours, colours-N, .*, got "):
        noise_level(noise)

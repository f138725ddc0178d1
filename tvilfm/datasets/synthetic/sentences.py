"""Sentences about a rendered person, with the errors of a captioner."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from tvilfm.datasets.synthetic.people import COLOUR_ATTRIBUTES, SHAPE_ATTRIBUTES, Person
from tvilfm.datasets.synthetic.rendering import Rendering

SYNONYMS: dict[str, tuple[str, ...]] = {
    "man": ("man", "guy", "male", "boy"),
    "woman": ("woman", "lady", "female", "girl"),
    "short": ("short", "cropped"),
    "long": ("long", "long open", "lengthy"),
    "t-shirt": ("t-shirt", "tee", "short sleeved shirt"),
    "shirt": ("shirt", "full sleeves shirt", "long sleeved top"),
    "jacket": ("jacket", "open jacket", "zipped jacket"),
    "coat": ("coat", "long coat", "overcoat"),
    "striped": ("striped", "stripy"),
    "checked": ("checked", "checkered", "plaid"),
    "trousers": ("trousers", "pants", "full length pants"),
    "shorts": ("shorts", "short pants"),
    "skirt": ("skirt", "knee length skirt"),
    "backpack": ("backpack", "rucksack", "bag on the back"),
    "handbag": ("handbag", "purse", "bag in the hand"),
    "cap": ("cap", "baseball cap", "hat"),
    "gray": ("gray", "grey"),
    "purple": ("purple", "violet"),
}
CONFUSED_COLOURS: dict[str, tuple[str, ...]] = {
    "black": ("gray", "brown"),
    "white": ("gray", "yellow"),
    "gray": ("white", "black"),
    "red": ("pink", "orange"),
    "blue": ("purple", "black"),
    "green": ("black", "blue"),
    "yellow": ("orange", "white"),
    "purple": ("blue", "pink"),
    "pink": ("red", "white"),
    "orange": ("red", "yellow"),
    "brown": ("black", "red"),
    "blonde": ("brown", "gray"),
}
# How free sentences begin the phrase about a part.
_SINGULAR = ("top", "bag", "hat")
_VERBS: dict[str, tuple[str, ...]] = {
    "hair": ("has", "shows"),
    "top": ("wears", "has on", "is dressed in"),
    "bottom": ("wears", "has on", "is dressed in"),
    "shoes": ("wears", "has on", "walks in"),
    "bag": ("carries", "holds", "has"),
    "hat": ("wears", "has on"),
}
_PREPOSITIONS: dict[str, tuple[str, ...]] = {
    "hair": ("with",),
    "top": ("in", "with", "wearing"),
    "bottom": ("in", "with", "wearing"),
    "shoes": ("in", "with", "wearing"),
    "bag": ("with", "carrying", "holding"),
    "hat": ("with", "in", "wearing"),
}
FILLERS = ("clearly ", "basically ", "existing ", "certainly ", "very modern ")


def observe(person: Person, rendering: Rendering, rng: np.random.Generator, *, infrared: bool) -> dict[str, str]:
    """Return the attributes that a captioner reports: some are missing, some are wrong; no colours in infrared."""
    missed, wrong = (0.25, 0.12) if infrared else (0.25, 0.10)
    believed: dict[str, str] = {}
    for name, value in person.attributes.items():
        if name not in rendering.seen or (infrared and name in COLOUR_ATTRIBUTES):
            continue
        if name != "sex" and rng.random() < missed:
            continue
        if rng.random() < wrong:
            others = (
                CONFUSED_COLOURS[value]
                if name in COLOUR_ATTRIBUTES
                else [other for other in SHAPE_ATTRIBUTES[name] if other != value]
            )
            value = others[rng.integers(len(others))]
        believed[name] = value
    return believed


def write_sentence(believed: dict[str, str], rng: np.random.Generator) -> str:
    """Return a sentence about the reported attributes, in the style of the published captions."""
    word = partial(_word, rng=rng)

    def phrase(*names: str, last: str) -> str:
        words = [word(believed[name]) for name in names if name in believed and believed[name] != "plain"]
        filler = FILLERS[rng.integers(len(FILLERS))] if rng.random() < 0.08 else ""
        return " ".join([f"{filler}{' '.join(words)}".strip(), last]).strip()

    hair = phrase("hair", "hair_colour", last="hair") if {"hair", "hair_colour"} & set(believed) else ""
    top = phrase("top_colour", "pattern", last=word(believed["top"]) if "top" in believed else "top")
    bottom = phrase("bottom_colour", last=word(believed["bottom"]) if "bottom" in believed else "bottoms")
    shoes = phrase("shoe_colour", last=("shoes", "footwear")[rng.integers(2)]) if "shoe_colour" in believed else ""
    carried = believed.get("bag", "none")
    bag = phrase("bag_colour", last=word(carried)) if carried != "none" else ""
    hat = word(believed["hat"]) if believed.get("hat", "none") != "none" else ""

    wears = ("wearing", "sporting", "dressed in")[rng.integers(3)]
    joins = ("with", "paired with", "and")[rng.integers(3)]
    sentence = f"a {word(believed['sex']) if 'sex' in believed else 'person'}"
    sentence += f" with {hair}," if hair else ""
    sentence += f" {wears} {_article(top)} {joins} {bottom}"
    sentence += f", {joins} {shoes}" if shoes else ""
    sentence += f", carrying {_article(bag)}" if bag else ""
    sentence += f", {('wearing', 'with')[rng.integers(2)]} a {hat} on the head" if hat else ""
    return sentence + "."


def write_rephrase(believed: dict[str, str], rng: np.random.Generator, *, infrared: bool) -> str:
    """Return another sentence about the reported attributes, as a language model or a person would say it.

    Of a visible image, half of the sentences have the form of the captions; the others have a free form and order, and
    half of these name only some of the attributes. A model that is trained on them reads free sentences better
    (`benchmarks/results/free_sentences.md`). Infrared sentences are subtracted in fusion, so they stay complete.
    """
    if infrared or rng.random() < 0.5:
        return write_sentence(believed, rng)
    return write_freely(believed, rng, some=bool(rng.random() < 0.5))


def write_freely(believed: dict[str, str], rng: np.random.Generator, *, some: bool) -> str:
    """Return a sentence in free form and order: notes, a list of clauses, or "in" and "with".

    Args:
        believed: the reported attributes.
        rng: random numbers.
        some: name only some of the attributes.
    """
    nouns = _nouns(believed, rng)
    parts = [list(nouns)[place] for place in rng.permutation(len(nouns))]
    if some and parts:
        parts = parts[: int(rng.integers(1, len(parts) + 1))]
    person = _word(believed["sex"], rng) if "sex" in believed and rng.random() < 0.8 else "person"
    form = rng.integers(3)
    if form == 0:  # notes
        notes = [nouns[part] for part in parts]
        if person != "person" or not notes:
            notes.insert(int(rng.integers(len(notes) + 1)), person)
        return _pick((", ", " and ", " "), rng).join(notes) + "."
    phrases = [_article(nouns[part]) if part in _SINGULAR else nouns[part] for part in parts]
    words = _VERBS if form == 1 else _PREPOSITIONS
    clauses = [f"{_pick(words[part], rng)} {phrase}" for part, phrase in zip(parts, phrases, strict=True)]
    join = _pick((", ", " and ") if form == 1 else (" ", ", ", " and "), rng)
    who = " who " if form == 1 else " "
    return f"a {person}{who if clauses else ''}{join.join(clauses)}."


def _nouns(believed: dict[str, str], rng: np.random.Generator) -> dict[str, str]:
    """Return part -> its words: `red coat`, `coat in red` or `coat coloured red`."""
    word = partial(_word, rng=rng)

    def noun(thing: str, *names: str) -> str:
        said = [word(believed[name]) for name in names if believed.get(name, "plain") != "plain"]
        colour = said.pop(0) if names[0] in believed else ""
        form = rng.integers(4) if colour else 0
        if form < 2:
            return " ".join([colour, *said, thing]).strip()
        return " ".join([*said, thing, ("in", "coloured")[form - 2], colour])

    nouns = {}
    if {"hair", "hair_colour"} & set(believed):
        said = [word(believed[name]) for name in ("hair", "hair_colour") if name in believed]
        nouns["hair"] = " ".join([*(said if rng.random() < 0.5 else said[::-1]), "hair"])
    if {"top", "top_colour", "pattern"} & set(believed):
        nouns["top"] = noun(word(believed.get("top", "top")), "top_colour", "pattern")
    if {"bottom", "bottom_colour"} & set(believed):
        nouns["bottom"] = noun(word(believed.get("bottom", "bottoms")), "bottom_colour")
    if "shoe_colour" in believed:
        nouns["shoes"] = noun(_pick(("shoes", "footwear"), rng), "shoe_colour")
    if believed.get("bag", "none") != "none":
        nouns["bag"] = noun(word(believed["bag"]), "bag_colour")
    if believed.get("hat", "none") != "none":
        nouns["hat"] = word(believed["hat"])
    return nouns


def _word(value: str, rng: np.random.Generator) -> str:
    return _pick(SYNONYMS.get(value, (value,)), rng)


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _article(noun_phrase: str) -> str:
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"

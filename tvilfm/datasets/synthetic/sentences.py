"""Sentences about a rendered person, with the errors of a captioner."""

from __future__ import annotations

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

    def word(value: str) -> str:
        options = SYNONYMS.get(value, (value,))
        return options[rng.integers(len(options))]

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


def _article(noun_phrase: str) -> str:
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"

"""Change the sentences of queries as witnesses do who remember less, or say it in another way (`evaluate.text_noise`).

Kinds that work on any caption change its words. Kinds that work on attributes need to know what is true about a person,
which only the synthetic benchmark says; they write a new sentence in the wording of its captions. Each query has its
own random numbers. A higher level of a kind changes the words or attributes that a lower level changes, and more
(`clauses` and `named`: a lower one). The wording of a sentence from attributes is drawn anew for each level.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tvilfm.captioning.colors import indefinite_article, remove_colors
from tvilfm.config import noise_level
from tvilfm.datasets.synthetic.people import ATTRIBUTES
from tvilfm.datasets.synthetic.sentences import CONFUSED_COLOURS, write_sentence

Attributes = Mapping[str, str]
UNSAID = ("none", "plain")  # values of attributes that no sentence names

_CONFUSED: Mapping[str, tuple[str, ...]] = CONFUSED_COLOURS | {
    "grey": ("white", "black"),
    "navy": ("black", "blue"),
    "beige": ("white", "brown"),
    "cream": ("white", "yellow"),
    "silver": ("gray", "white"),
    "khaki": ("green", "brown"),
    "maroon": ("red", "brown"),
    "violet": ("blue", "pink"),
    "turquoise": ("blue", "green"),
}
# What a witness may say where captioners have one usual word.
_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "man": ("gentleman", "fellow"),
    "guy": ("gentleman", "fellow"),
    "male": ("gentleman", "fellow"),
    "boy": ("lad", "youngster"),
    "woman": ("gal", "madam"),
    "lady": ("gal", "madam"),
    "female": ("gal", "madam"),
    "girl": ("lass", "youngster"),
    "t-shirt": ("tank top", "jersey"),
    "shirt": ("blouse", "jersey"),
    "jacket": ("windbreaker", "anorak"),
    "coat": ("parka", "trench coat"),
    "trousers": ("slacks", "chinos"),
    "pants": ("slacks", "chinos"),
    "jeans": ("denims",),
    "shorts": ("bermudas",),
    "backpack": ("knapsack", "daypack"),
    "rucksack": ("knapsack", "daypack"),
    "handbag": ("tote", "clutch"),
    "purse": ("tote", "clutch"),
    "cap": ("headgear", "visor"),
    "shoes": ("trainers", "boots"),
    "footwear": ("trainers", "boots"),
    "striped": ("banded",),
    "checked": ("tartan",),
    "red": ("crimson", "scarlet"),
    "blue": ("navy", "azure"),
    "green": ("olive", "emerald"),
    "yellow": ("mustard", "lemon"),
    "purple": ("lilac", "plum"),
    "pink": ("rosy", "salmon"),
    "orange": ("amber", "tangerine"),
    "brown": ("chestnut", "tan"),
    "black": ("ebony", "charcoal"),
    "white": ("ivory", "cream"),
    "gray": ("silver", "ash"),
    "grey": ("silver", "ash"),
    "blonde": ("fair", "golden"),
}
_CLAUSE = re.compile(
    r"\s*[,;.]\s+|\s+(?=(?:with|wearing|sporting|carrying|holding|paired|matched|dressed|along|has|who|and)\b)"
)
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_CHATTER = (
    "I think I saw them yesterday evening near the station, it was getting dark: {} Sorry, I do not know more.",
    "Hello, you asked for this. {} They were walking fast, and I only looked for a moment.",
)


def noisy_texts(
    noise: str,
    texts: Sequence[str],
    pids: Sequence[int],
    names: Sequence[str],
    *,
    seed: int,
    attributes: Mapping[int, Attributes] | None = None,
) -> list[str]:
    """Return the sentences of queries with one kind of noise.

    Args:
        noise: kind and level, as in `evaluate.text_noise`.
        texts: sentences of the queries.
        pids: identities of the queries.
        names: name of each query, which selects its random numbers.
        seed: seed of all draws.
        attributes: pid -> attribute -> true value; required by the kinds of `ATTRIBUTE_NOISE`.

    Returns:
        One sentence per query. A sentence without anything to change stays as it is.
    """
    kind, level = noise_level(noise)
    rngs = [np.random.default_rng([seed, 13, zlib.crc32(f"{kind}/{name}".encode())]) for name in names]
    if kind == "other-person":
        return [_of_somebody_else(pid, texts, pids, rng) for pid, rng in zip(pids, rngs, strict=True)]
    if kind in _ON_WORDS:
        return [_ON_WORDS[kind](text, level, rng) for text, rng in zip(texts, rngs, strict=True)]
    assert attributes is not None, f"{noise} without attributes"
    return [_ON_ATTRIBUTES[kind](attributes[pid], level, rng) for pid, rng in zip(pids, rngs, strict=True)]


def _of_somebody_else(pid: int, texts: Sequence[str], pids: Sequence[int], rng: np.random.Generator) -> str:
    others = [text for text, other in zip(texts, pids, strict=True) if other != pid]
    return others[rng.integers(len(others))] if others else "a person"


def _without_colours(text: str, level: int, rng: np.random.Generator) -> str:
    return remove_colors(text) or "a person"


def _exchanged(text: str, level: int, rng: np.random.Generator, words: Mapping[str, tuple[str, ...]]) -> str:
    """Replace the first `level` words, in a random order, that have others; articles follow."""
    pattern = re.compile(
        rf"(?<![\w-])(?P<article>an?\s+)?(?P<word>{'|'.join(sorted(map(re.escape, words), key=len, reverse=True))})"
        r"(?![\w-])",
        re.IGNORECASE,
    )
    found = list(pattern.finditer(text))
    others = [words[match["word"].lower()] for match in found]
    new = [options[rng.integers(len(options))] for options in others]
    for place in sorted(rng.permutation(len(found))[:level].tolist(), reverse=True):
        match, word = found[place], new[place]
        article = f"{indefinite_article(word, capital=match['article'][0] == 'A')} " if match["article"] else ""
        text = text[: match.start()] + article + word + text[match.end() :]
    return text


def _with_typos(text: str, level: int, rng: np.random.Generator) -> str:
    words = list(re.finditer(r"[A-Za-z]{4,}", text))
    typed = [_typed(match[0], rng) for match in words]
    for place in sorted(rng.permutation(len(words))[:level].tolist(), reverse=True):
        text = text[: words[place].start()] + typed[place] + text[words[place].end() :]
    return text


def _typed(word: str, rng: np.random.Generator) -> str:
    """Return a word with a typing error after its first letter; it always differs from the word."""
    place = int(rng.integers(1, len(word) - 1))
    letter, following = word[place], word[place + 1]
    row = next(row for row in _KEYS if letter.lower() in row)
    at = row.index(letter.lower())
    forms = [
        word[:place] + word[place + 1 :],
        word[:place] + letter + word[place:],
        word[:place] + row[at + 1 if at + 1 < len(row) else at - 1] + word[place + 1 :],
    ]
    if letter != following:
        forms.append(word[:place] + following + letter + word[place + 2 :])
    return forms[rng.integers(len(forms))]


def _clauses(text: str, level: int, rng: np.random.Generator) -> str:
    """Keep `level` clauses, in their order."""
    clauses = [clause for clause in _CLAUSE.split(text.strip().rstrip(".")) if re.search(r"\w", clause)]
    kept = sorted(rng.permutation(len(clauses))[:level].tolist())
    return ", ".join(clauses[place] for place in kept) or text


def _in_chatter(text: str, level: int, rng: np.random.Generator) -> str:
    return _CHATTER[rng.integers(len(_CHATTER))].format(text)


def _named(attributes: Attributes, rng: np.random.Generator) -> list[str]:
    """Return the attributes that a sentence can name, in a random order; a bag comes before its colour."""
    names = [name for name in ATTRIBUTES if attributes[name] not in UNSAID]
    if attributes["bag"] in UNSAID:
        names.remove("bag_colour")
    order = [names[place] for place in rng.permutation(len(names))]
    if "bag_colour" in order:
        places = sorted((order.index("bag"), order.index("bag_colour")))
        order[places[0]], order[places[1]] = "bag", "bag_colour"
    return order


def _naming(attributes: Attributes, level: int, rng: np.random.Generator) -> str:
    named = _named(attributes, rng)[:level]
    return write_sentence({name: attributes[name] for name in named}, rng)


def _missing(attributes: Attributes, level: int, rng: np.random.Generator) -> str:
    order = _named(attributes, rng)
    named = order[: max(1, len(order) - level)]
    return write_sentence({name: attributes[name] for name in named}, rng)


def _wrong(attributes: Attributes, level: int, rng: np.random.Generator) -> str:
    said = {name: attributes[name] for name in _named(attributes, rng)}
    others = {name: [v for v in ATTRIBUTES[name] if v != value and v not in UNSAID] for name, value in said.items()}
    new = {name: values[rng.integers(len(values))] for name, values in others.items() if values}
    said |= dict(list(new.items())[:level])
    return write_sentence(said, rng)


_ON_WORDS: Mapping[str, Callable[[str, int, np.random.Generator], str]] = {
    "no-colours": _without_colours,
    "colours": lambda text, level, rng: _exchanged(text, level, rng, _CONFUSED),
    "synonyms": lambda text, level, rng: _exchanged(text, level, rng, _SYNONYMS),
    "typos": _with_typos,
    "clauses": _clauses,
    "chatter": _in_chatter,
}
_ON_ATTRIBUTES: Mapping[str, Callable[[Attributes, int, np.random.Generator], str]] = {
    "named": _naming,
    "missing": _missing,
    "wrong": _wrong,
}

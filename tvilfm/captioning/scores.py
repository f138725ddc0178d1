"""Score captions: whether they name what the image shows, and how similar they are to a reference.

The attributes of every person in the synthetic benchmark are known, so its captions can be scored exactly. For real
images, only the similarity to other captions can be measured (BLEU, CIDEr).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tvilfm.captioning.colors import find_colors
from tvilfm.datasets.synthetic.people import ATTRIBUTES, COLOUR_ATTRIBUTES, RGB, SHAPE_ATTRIBUTES
from tvilfm.datasets.synthetic.sentences import SYNONYMS

UNSPOKEN = ("plain", "none")  # values that sentences do not mention
GARMENTS = ("top", "pattern", "bottom")
# Nouns of `write_sentence` that name a part without naming an attribute of it.
BARE_NOUNS = {"hair": "hair", "top": "top", "bottoms": "bottom", "shoes": "shoe", "footwear": "shoe"}
# Attributes whose words are adjectives -> part that the following noun names.
ADJECTIVES = {"hair": "hair", "pattern": "top"}


def _vocabulary() -> dict[tuple[str, ...], tuple[str, str]]:
    """Return the mapping from words to (attribute, value); the attribute of a colour depends on its noun."""
    values = [("colour", value) for value in RGB]
    values += [(name, value) for name, options in SHAPE_ATTRIBUTES.items() for value in options]
    spoken = {
        tuple(words.split()): (name, value)
        for name, value in values
        if value not in UNSPOKEN
        for words in SYNONYMS.get(value, (value,))
    }
    return spoken | {(noun,): ("part", part) for noun, part in BARE_NOUNS.items()}


VOCABULARY = _vocabulary()
LONGEST = max(len(words) for words in VOCABULARY)


def named_attributes(sentence: str) -> dict[str, str]:
    """Return the attributes of a person that a sentence names.

    The longest known phrase is used ("short sleeved shirt" is not short hair). Colours and other adjectives belong to
    the next noun.

    Args:
        sentence: sentence in the benchmark's words.

    Returns:
        Attribute -> value, with the names and values of `synthetic.ATTRIBUTES`.
    """
    words = tuple(re.findall(r"[\w-]+", sentence.lower()))
    attributes: dict[str, str] = {}
    adjectives: dict[str, str] = {}
    start = 0
    while start < len(words):
        sizes = range(min(LONGEST, len(words) - start), 0, -1)
        size = next((size for size in sizes if words[start : start + size] in VOCABULARY), 0)
        if size:
            name, value = VOCABULARY[words[start : start + size]]
            if name == "colour" or name in ADJECTIVES:
                adjectives[name] = value
            else:
                part = value if name == "part" else name
                if name != "part":
                    attributes[name] = value
                attributes |= {name: value for name, value in adjectives.items() if ADJECTIVES.get(name) == part}
                if f"{part}_colour" in COLOUR_ATTRIBUTES and "colour" in adjectives:
                    attributes[f"{part}_colour"] = adjectives["colour"]
                adjectives = {}
        start += size or 1
    return attributes


@dataclass(frozen=True, kw_only=True)
class AttributeScore:
    """The scores of captions on one attribute.

    Attributes:
        accuracy: share of correct values among the sentences that name a value, 0-1; 0 if none does.
        named: share of sentences that name a value, among the people who have a value to name, 0-1.
    """

    accuracy: float
    named: float


@dataclass(frozen=True, kw_only=True)
class Marks:
    """The scores of a captioner on held-out images.

    Attributes:
        pictures: number of images.
        loss: cross-entropy of the reference sentences, nats per token.
        bleu4: 0-1.
        cider: 0-10.
        colour_words: share of generated sentences with a colour word, 0-1; should be 0 for infrared.
        attributes: scores of `attribute_scores` on the synthetic benchmark; else empty.
    """

    pictures: int
    loss: float
    bleu4: float
    cider: float
    colour_words: float
    attributes: dict[str, AttributeScore]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2))

    @staticmethod
    def read(path: Path) -> Marks:
        values = json.loads(path.read_text())
        attributes = {name: AttributeScore(**score) for name, score in values.pop("attributes").items()}
        return Marks(**values, attributes=attributes)

    def lines(self) -> list[str]:
        """Return the scores as lines for the terminal."""
        return [
            f"{self.pictures} validation images: loss {self.loss:.3f}, BLEU-4 {self.bleu4:.3f}, "
            f"CIDEr {self.cider:.2f}, {self.colour_words:.1%} of sentences with a colour word",
            *(
                f"{name.replace('_', ' '):<14} {score.accuracy:6.1%} correct, named in {score.named:.1%}"
                for name, score in self.attributes.items()
            ),
        ]


def attribute_scores(
    sentences: Sequence[str], truths: Sequence[Mapping[str, str]], modality: str
) -> dict[str, AttributeScore]:
    """Score sentences against the true attributes of the people in the images.

    Naming something that the person does not have (a bag, a hat, stripes) counts as wrong. Omitting an attribute only
    lowers `named`, because a captioner that writes its most likely sentence omits what half of its training sentences
    omit.

    Args:
        sentences: one sentence per image.
        truths: attributes of the person in each image.
        modality: visible: all attributes; infrared: attributes other than colours.

    Returns:
        Attribute -> score, and the means `garments` (top, pattern, bottom) and `colours` (visible only).
    """
    spoken = [named_attributes(sentence) for sentence in sentences]
    scores: dict[str, AttributeScore] = {}
    for name in ATTRIBUTES if modality == "visible" else SHAPE_ATTRIBUTES:
        right = [
            words[name] == _truth(truth, name) for words, truth in zip(spoken, truths, strict=True) if name in words
        ]
        named = [name in words for words, truth in zip(spoken, truths, strict=True) if _truth(truth, name)]
        scores[name] = AttributeScore(accuracy=_share(right), named=_share(named))
    means = {"garments": GARMENTS} | ({"colours": tuple(COLOUR_ATTRIBUTES)} if modality == "visible" else {})
    for mean, names in means.items():
        scores[mean] = AttributeScore(
            accuracy=sum(scores[name].accuracy for name in names) / len(names),
            named=sum(scores[name].named for name in names) / len(names),
        )
    return scores


def _truth(truth: Mapping[str, str], name: str) -> str | None:
    """Return the value that a sentence can name; None for an unspoken value and for the colour of a missing bag."""
    value = truth["bag"] if name == "bag_colour" and truth["bag"] in UNSPOKEN else truth[name]
    return None if value in UNSPOKEN else value


def _share(cases: Sequence[bool]) -> float:
    return sum(cases) / len(cases) if cases else 0.0


def colour_share(sentences: Sequence[str]) -> float:
    """Return the share of sentences with a colour word, 0-1; it should be 0 for infrared."""
    return _share([bool(find_colors(sentence)) for sentence in sentences])


def language_scores(sentences: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return BLEU-4 and CIDEr against one reference per sentence, ignoring punctuation and case.

    Args:
        sentences: one sentence per image.
        references: one reference per image.

    Returns:
        `bleu4` 0-1, `cider` 0-10.
    """
    # The library's tokenizer requires Java; splitting into words is enough for captions.
    given = {i: [_words(sentence)] for i, sentence in enumerate(sentences)}
    expected = {i: [_words(reference)] for i, reference in enumerate(references)}
    # Imported here because only the fine-tuning of captioners needs these scorers.
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    bleu, _ = Bleu(4).compute_score(expected, given, verbose=0)
    cider, _ = Cider().compute_score(expected, given)
    return {"bleu4": float(bleu[3]), "cider": float(cider)}


def _words(sentence: str) -> str:
    return " ".join(re.findall(r"[\w-]+", sentence.lower()))

"""Rephrasing: prompts for a language model, and checks of its answers.

A caption that is said in other words makes the text encoder look at the meaning (METHOD 4 and 5). A language model adds
things, though: chatter, a second person, a colour that nobody saw. So every answer is cleaned, checked against its
caption, asked for again with another seed, and given up after a few tries: then the caption stays, and is counted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tvilfm.captioning.colors import find_colors

_ANSWER = "Answer with the new description only, in one or two sentences and at most {max_words} words."
PROMPTS = {
    "visible": "Say this description of a person in other words. Keep the person, every garment, every colour and "
    f"everything that is carried or worn, and add nothing. {_ANSWER}",
    "infrared": "Say this description of a person, seen by an infrared camera, in other words. Keep the person, every "
    f"garment and everything that is carried or worn, add nothing, and never name a colour. {_ANSWER}",
}

_THOUGHT = re.compile(r".*</think>|<think>.*", re.DOTALL)  # some endpoints leave the first tag out
_CHATTER = re.compile(
    r"(?:sure(?: thing)?|certainly|of course|okay|ok|absolutely)[,.!:]\s*"
    r"|(?:sure|certainly|here|note|user|assistant"
    r"|(?:(?:the|a|my) )?(?:(?:new|rephrased|revised) )?(?:description|version|caption|answer))\b[^:.!]{0,80}:\s*",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^(?:[-*•]|\(?\d{1,2}[.)])\s+")
_QUOTES = "\"'`*\u201c\u201d\u2018\u2019\u00ab\u00bb "


class Rephraser(Protocol):
    """Rephrases sentences: a transformers model, an endpoint or rules (`tvilfm.captioning.engines`)."""

    def rephrase(self, texts: Sequence[str], modalities: Sequence[str], *, seed: int) -> list[str]:
        """Return one raw answer per text; with the same texts, modalities and seed, the same answers if the engine can.

        Args:
            texts: captions.
            modalities: visible or infrared, of each.
            seed: of sampling.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Rephrase:
    """The result for one caption.

    Attributes:
        text: the caption in other words; None = the caption stays.
        refused: why the last answer was refused; None = it was not.
        tries: answers asked for.
    """

    text: str | None
    refused: str | None
    tries: int


def messages(text: str, modality: str, *, max_words: int) -> list[dict[str, str]]:
    """Return the messages that ask a chat model for a rephrase.

    Args:
        text: a caption.
        modality: visible or infrared.
        max_words: that the answer may have.
    """
    task = PROMPTS[modality].format(max_words=max_words)
    return [{"role": "user", "content": f"{task}\n\nDescription: {text}"}]


def completion_prompt(text: str, modality: str, *, max_words: int) -> str:
    """Return the prompt for a model without a chat template, which continues the text."""
    (message,) = messages(text, modality, max_words=max_words)
    return f"{message['content']}\nNew description:"


def prompt_hash() -> str:
    """Return a hash of the prompts."""
    return hashlib.sha256("\0".join(PROMPTS.values()).encode()).hexdigest()[:12]


def clean(answer: str) -> str:
    """Return the sentence in a model's answer, without thoughts, chatter ("Sure, here is ..."), bullets and quotes.

    The first line that is no chatter counts; what follows is another version or a remark.

    Args:
        answer: as the model wrote it.

    Returns:
        One line with single spaces; empty where there is nothing else.
    """
    for line in _THOUGHT.sub("", answer).splitlines():
        line = _BULLET.sub("", line.strip(_QUOTES), count=1)
        while chatter := _CHATTER.match(line):
            line = line[chatter.end() :]
        line = " ".join(line.split()).strip(_QUOTES)
        if line and not line.endswith(":"):
            return line
    return ""


def validate(text: str, rephrase: str, *, modality: str, max_words: int) -> str | None:
    """Return why a rephrase is refused, or None.

    A colour that the caption does not name is refused in both modalities: invented in visible, impossible in infrared.
    Words that only speak of colour ("colourful") are let through in visible texts. A rephrase that has the caption's
    own words is refused too: it is none.

    Args:
        text: the caption.
        rephrase: cleaned.
        modality: visible or infrared.
        max_words: longest rephrase.

    Returns:
        None when it is valid, else one of: empty, too long, new colour, same words.
    """
    if not re.search(r"\w", rephrase):
        return "empty"
    if len(rephrase.split()) > max_words:
        return "too long"
    new = set(find_colors(rephrase)) - set(find_colors(text))
    if any(modality == "infrared" or "color" not in color for color in new):
        return "new colour"
    if _words(rephrase) == _words(text):
        return "same words"
    return None


def rephrase_all(
    rephraser: Rephraser, texts: Sequence[str], modalities: Sequence[str], *, seed: int, retries: int, max_words: int
) -> list[Rephrase]:
    """Rephrase captions; a refused answer is retried with another seed.

    Args:
        rephraser: the engine.
        texts: captions.
        modalities: visible or infrared, of each.
        seed: of the first try; further seeds follow from it.
        retries: further tries at a refused one.
        max_words: longest rephrase.

    Returns:
        One a caption, in order.
    """
    found: dict[int, Rephrase] = {}
    for attempt in range(1 + retries):
        pending = [i for i in range(len(texts)) if i not in found or found[i].refused]
        if not pending:
            break
        answers = rephraser.rephrase(
            [texts[i] for i in pending], [modalities[i] for i in pending], seed=seed_of(seed, attempt)
        )
        for i, answer in zip(pending, answers, strict=True):
            found[i] = judge(texts[i], answer, modalities[i], max_words=max_words, tries=attempt + 1)
    return [found[i] for i in range(len(texts))]


def judge(text: str, answer: str, modality: str, *, max_words: int, tries: int) -> Rephrase:
    """Clean an answer, and accept or refuse it."""
    rephrase = clean(answer)
    refused = validate(text, rephrase, modality=modality, max_words=max_words)
    return Rephrase(text=None if refused else rephrase, refused=refused, tries=tries)


def seed_of(*numbers: int) -> int:
    """Return a seed from numbers, below 2^31, which is the limit of endpoints."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())

"""Rephrase captions: prompts for a language model, and checks of its answers.

Rephrased captions make the text encoder learn the meaning instead of the wording (METHOD 4 and 5). However, a language
model can add chatter, a second person or an invented colour. Therefore, every answer is cleaned and checked against its
caption. A rejected answer is retried with another seed. After a few attempts, the original caption is kept and the
failure is counted.
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

_THOUGHT = re.compile(r".*</think>|<think>.*", re.DOTALL)  # some endpoints omit the opening tag
_CHATTER = re.compile(
    r"(?:sure(?: thing)?|certainly|of course|okay|ok|absolutely)[,.!:]\s*"
    r"|(?:sure|certainly|here|note|user|assistant"
    r"|(?:(?:the|a|my) )?(?:(?:new|rephrased|revised) )?(?:description|version|caption|answer))\b[^:.!]{0,80}:\s*",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^(?:[-*•]|\(?\d{1,2}[.)])\s+")
_QUOTES = "\"'`*\u201c\u201d\u2018\u2019\u00ab\u00bb "


class Rephraser(Protocol):
    """Engine that rephrases sentences: a transformers model, an endpoint or rules (`tvilfm.captioning.engines`)."""

    def rephrase(self, texts: Sequence[str], modalities: Sequence[str], *, seed: int) -> list[str]:
        """Return one raw answer per text.

        If the engine supports it, the same texts, modalities and seed give the same answers.

        Args:
            texts: captions.
            modalities: modality of each caption, visible or infrared.
            seed: seed of sampling.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Rephrase:
    """The result for one caption.

    Attributes:
        text: the rephrased caption; None = the original caption is kept.
        refused: reason why the last answer was rejected; None = it was accepted.
        tries: number of requested answers.
    """

    text: str | None
    refused: str | None
    tries: int


def messages(text: str, modality: str, *, max_words: int) -> list[dict[str, str]]:
    """Return the messages that ask a chat model for a rephrase.

    Args:
        text: caption.
        modality: visible or infrared.
        max_words: maximum number of words in the answer.
    """
    task = PROMPTS[modality].format(max_words=max_words)
    return [{"role": "user", "content": f"{task}\n\nDescription: {text}"}]


def completion_prompt(text: str, modality: str, *, max_words: int) -> str:
    """Return the prompt for a model without a chat template, which continues the prompt."""
    (message,) = messages(text, modality, max_words=max_words)
    return f"{message['content']}\nNew description:"


def prompt_hash() -> str:
    """Return a hash of the prompts."""
    return hashlib.sha256("\0".join(PROMPTS.values()).encode()).hexdigest()[:12]


def clean(answer: str) -> str:
    """Return the sentence in a model's answer, without thoughts, chatter ("Sure, here is ..."), bullets and quotes.

    The first line that is not chatter is used; later lines are other versions or remarks.

    Args:
        answer: raw answer of the model.

    Returns:
        One line with single spaces; empty if the answer has no such line.
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
    """Return the reason to reject a rephrase, or None if it is valid.

    A colour that the caption does not name is rejected: it is invented in a visible caption and impossible in an
    infrared one. Visible rephrases may contain words about colour that name none ("colourful"). A rephrase with the
    same words as the caption is also rejected.

    Args:
        text: caption.
        rephrase: cleaned rephrase.
        modality: visible or infrared.
        max_words: maximum number of words in the rephrase.

    Returns:
        One of: empty, too long, new colour, same words; None if the rephrase is valid.
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
    """Rephrase captions; a rejected answer is retried with another seed.

    Args:
        rephraser: engine.
        texts: captions.
        modalities: modality of each caption, visible or infrared.
        seed: seed of the first attempt; the seeds of retries are derived from it.
        retries: maximum number of retries of a rejected answer.
        max_words: maximum number of words in a rephrase.

    Returns:
        One result per caption, in order.
    """
    results: dict[int, Rephrase] = {}
    for attempt in range(1 + retries):
        pending = [i for i in range(len(texts)) if i not in results or results[i].refused]
        if not pending:
            break
        answers = rephraser.rephrase(
            [texts[i] for i in pending], [modalities[i] for i in pending], seed=seed_of(seed, attempt)
        )
        for i, answer in zip(pending, answers, strict=True):
            results[i] = judge(texts[i], answer, modalities[i], max_words=max_words, tries=attempt + 1)
    return [results[i] for i in range(len(texts))]


def judge(text: str, answer: str, modality: str, *, max_words: int, tries: int) -> Rephrase:
    """Clean an answer, and accept or reject it."""
    rephrase = clean(answer)
    refused = validate(text, rephrase, modality=modality, max_words=max_words)
    return Rephrase(text=None if refused else rephrase, refused=refused, tries=tries)


def seed_of(*numbers: int) -> int:
    """Return a seed derived from numbers; it is below 2^31, the limit of endpoints."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())

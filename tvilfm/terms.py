"""The nouns that several folders share, each defined once."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal, get_args

Modality = Literal["visible", "infrared"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)

# A query is asked by its image alone (infrared or visible), by a sentence, by both fused, or by their ensemble.
QUERIES: tuple[str, ...] = ("infrared", "visible", "text", "fusion", "ensemble")
PARTS = ("infrared", "text", "fusion")  # what the ensemble sums

# Where a query's sentence comes from (docs/method.md, section 6); "none" asks without a sentence.
TextSource = Literal["witness", "witness-heldout", "own", "human", "none"]
TEXT_SOURCES: tuple[str, ...] = get_args(TextSource)
# What votes in a search, each with a score threshold of its own: one modality, or all three, where fusion subtracts a
# text or nothing.
VOTES: tuple[str, ...] = ("infrared", "text", "ensemble", "ensemble-unfiltered")
FilterTextSource = Literal["given", "captioner", "none"]  # of the text that fusion subtracts

Split = Literal["test", "val"]  # identities that are evaluated
METRICS: tuple[str, ...] = ("rank1", "rank5", "rank10", "mAP", "mINP")

SearchKind = Literal["exact", "index", "scan"]
# How pixels of more than 8 bits become 8 bits (`data/depth.py`): the full range, each image's percentiles, or a window.
DepthRange = Literal["percentiles"] | tuple[float, float] | None
Record = dict[str, float | int | str]  # one step or epoch of a training stage

MAX_ID = 512  # characters
NOBODY = r"^-[0-9]+$"  # text of an identity that marks images of nobody


def is_id(id: str) -> bool:
    """Return whether a gallery row can have this id: printable, and not longer than `MAX_ID`."""
    return 0 < len(id) <= MAX_ID and id.isprintable()


def is_name(text: str) -> bool:
    """Return whether a gallery row can have this person or camera: an id without spaces around it."""
    return is_id(text) and text == text.strip()


def is_nobody(person: str) -> bool:
    """Return whether the text of an identity marks images of nobody, as `-1` in Market-1501."""
    return re.search(NOBODY, person) is not None


def is_blank(text: str) -> bool:
    """Return whether text shows nothing: spaces, control characters and zero-width characters only."""
    return all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in text)

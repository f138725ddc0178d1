"""Tokenization with CLIP's vocabulary.

Captions are not padded to CLIP's 77 tokens. The text tower is causal and its output is read at the end-of-text token,
so padding after that token cannot change a feature and only costs time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

from torch import Tensor

from tvilfm.data.open_clip import open_clip_module

CONTEXT = 77  # tokens that the text tower reads, with the start and the end of the text


@cache
def _tokenizer() -> Any:
    return open_clip_module("tokenizer").SimpleTokenizer()


def tokenize(texts: Sequence[str], *, pad_to_context: bool = False) -> Tensor:
    """Return the token ids of a batch of sentences, padded to the longest sentence.

    Args:
        texts: sentences; like in CLIP, tokens after the 75th are dropped and the end-of-text token is kept.
        pad_to_context: pad to CLIP's 77 tokens like the released code; same features, more work.

    Returns:
        (B, L) int64, zero after the end-of-text token.

    Raises:
        ValueError: `texts` is empty.
    """
    if not texts:
        raise ValueError("texts: expected at least one sentence, got none.")
    tokens_BL = cast(Tensor, _tokenizer()(list(texts)))
    if pad_to_context:
        return tokens_BL
    return tokens_BL[:, : int(tokens_BL.argmax(dim=1).max()) + 1]


def count_tokens(texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of every sentence, with start and end; those above `CONTEXT` are not read."""
    return [len(_tokenizer().encode(text)) + 2 for text in texts]


def is_cut(text: str) -> bool:
    """Return whether the text tower does not read the end of a sentence."""
    # A token has at least one byte, so most sentences need no tokenizer.
    return len(text.encode()) > CONTEXT - 2 and count_tokens([text])[0] > CONTEXT

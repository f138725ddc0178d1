"""Tokenization with CLIP's vocabulary.

Captions keep their real length: the text tower is causal and reads out at the end-of-text token, so nothing behind
that token can change a feature; padding every caption to CLIP's 77 only costs time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

from torch import Tensor


@cache
def _tokenizer() -> Any:
    # Imported here: open_clip takes seconds to import, which a process without text need not spend.
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def tokenize(texts: Sequence[str], *, pad_to_context: bool = False) -> Tensor:
    """Return the token ids of a batch of sentences, cut to the longest.

    Args:
        texts: sentences; longer ones than 75 tokens are cut as CLIP cuts them (end-of-text kept).
        pad_to_context: pad to CLIP's 77 as the released code does; same features, more work.

    Returns:
        (B, L) int64, zero after the end-of-text token.

    Raises:
        ValueError: when there is no text.
    """
    if not texts:
        raise ValueError("texts: expected at least one sentence, got none.")
    tokens_BL = cast(Tensor, _tokenizer()(list(texts)))
    if pad_to_context:
        return tokens_BL
    return tokens_BL[:, : int(tokens_BL.argmax(dim=1).max()) + 1]

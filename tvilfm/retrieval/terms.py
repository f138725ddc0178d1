"""What the retrieval and the service's messages both name, for clients that have neither torch nor Lance to load."""

from __future__ import annotations

from typing import Literal

MAX_ID = 512  # characters
FilterTextSource = Literal["given", "captioner", "none"]
SearchKind = Literal["exact", "index", "scan"]


def is_id(id: str) -> bool:
    """Whether a row can bear it, and a request name the row by it."""
    return 0 < len(id) <= MAX_ID and id.isprintable()

"""State dicts inside other containers, with the prefixes that wrappers of a network put before all keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WRAPPERS = ("state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # added by DistributedDataParallel and torch.compile


def unwrapped(held: Any) -> tuple[Any, list[str]]:
    """Return the state dict that a file holds, without such prefixes, and a sentence about each change."""
    notes = []
    for key in WRAPPERS:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
            notes.append(f"the state dict was read from {key!r}.")
            break
    removed = ""
    while isinstance(held, Mapping) and held:
        prefix = next((prefix for prefix in PREFIXES if all(str(key).startswith(prefix) for key in held)), None)
        if prefix is None:
            break
        held = {str(key).removeprefix(prefix): value for key, value in held.items()}
        removed += prefix
    if removed:
        notes.append(f"the prefix {removed!r} was removed from the keys.")
    return held, notes

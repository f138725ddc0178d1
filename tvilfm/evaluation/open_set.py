"""The errors of score thresholds in open-set search, as part of the results. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class OpenSet:
    """The errors of thresholds on the score of one set of voting modalities.

    Attributes:
        thresholds: ascending.
        false_accepts: for each threshold, share of queries without their person that still have a hit.
        false_rejects: for each threshold, share of queries whose person has no hit.
        gallery_people: mean number of people in the searched galleries.
        fitted: threshold that was fitted on validation identities; None = there are none.
        fitted_false_accepts, fitted_false_rejects: its two errors on the identities of this table.

    Raises:
        ValueError: the curves differ in length, or an error is not a fraction.
    """

    thresholds: tuple[float, ...]
    false_accepts: tuple[float, ...]
    false_rejects: tuple[float, ...]
    gallery_people: float
    fitted: float | None = None
    fitted_false_accepts: float | None = None
    fitted_false_rejects: float | None = None

    def __post_init__(self) -> None:
        for name in ("thresholds", "false_accepts", "false_rejects"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        lengths = {len(self.thresholds), len(self.false_accepts), len(self.false_rejects)}
        if len(lengths) != 1:
            raise ValueError(f"open_set: expected curves of one length, got {sorted(lengths)}. Evaluate again.")
        errors = [*self.false_accepts, *self.false_rejects, self.fitted_false_accepts, self.fitted_false_rejects]
        wrong = [error for error in errors if error is not None and not 0 <= error <= 1]
        if wrong:
            raise ValueError(f"open_set: expected errors from 0 to 1, got {wrong[0]}. Evaluate again.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OpenSet:
        """Build it from the result of `to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a value is out of range.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"open_set: expected other keys, got {sorted(data)} ({error}). Evaluate again.") from None

"""What a check of a dataset found: counts and faults."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SHOWN = 3  # places that an error names


@dataclass(frozen=True, kw_only=True)
class Count:
    """A counted number, and the expected number (None if there is none).

    Expected are the published numbers of identities, images and cameras (None for a rendered dataset, which has an
    attributes.json), and one caption per image.
    """

    what: str
    found: int
    expected: int | None = None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault of a dataset.

    Attributes:
        what: description of the fault.
        where: every affected file, identity or key.
        fix: what to do.
        serious: False if a run works in spite of the fault.
    """

    what: str
    where: tuple[str, ...]
    fix: str
    serious: bool = True


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of a check; `sound` if there is no serious fault."""

    counts: tuple[Count, ...]
    faults: tuple[Fault, ...]

    @property
    def sound(self) -> bool:
        return not any(fault.serious for fault in self.faults)


def require_none(faults: Iterable[Fault]) -> None:
    """Raise an error for the serious faults.

    Raises:
        ValueError: there are some; the message has one line per fault.
    """
    lines = []
    for fault in faults:
        if fault.serious:
            more = f" and {len(fault.where) - SHOWN} more" if len(fault.where) > SHOWN else ""
            lines.append(f"{fault.what} ({', '.join(fault.where[:SHOWN])}{more}). {fault.fix}")
    if lines:
        raise ValueError("data: expected a dataset that can be trained and evaluated, got:\n" + "\n".join(lines))

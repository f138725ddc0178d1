"""A ranking of images, as lines of text, CSV or JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Found:
    """One row of the ranking.

    Attributes:
        rank: from 1.
        path: relative to the folder.
        score: similarity; higher is closer.
        shares: modality -> its contribution to the score.
    """

    rank: int
    path: str
    score: float
    shares: Mapping[str, float]


def printable(name: str) -> str:
    """Return a file name that is safe to print: control characters and undecodable bytes are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)


def table_lines(ranking: Sequence[Found]) -> list[str]:
    """Return the ranking as lines of aligned text, starting with a header."""
    shares = list(ranking[0].shares)
    width = max(len("path"), *(len(printable(row.path)) for row in ranking))
    lines = [f"{'rank':>4}  {'path':<{width}}  {'score':>7}" + "".join(f"  {name:>8}" for name in shares)]
    for row in ranking:
        parts = "".join(f"  {row.shares[name]:>8.4f}" for name in shares)
        lines.append(f"{row.rank:>4}  {printable(row.path):<{width}}  {row.score:>7.4f}{parts}")
    return lines


def write_csv(ranking: Sequence[Found], path: Path) -> None:
    """Write the columns `rank`, `path` and `score`, and one column `share_<modality>` per modality."""
    shares = list(ranking[0].shares)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "path", "score", *(f"share_{name}" for name in shares)])
        for row in ranking:
            writer.writerow([row.rank, printable(row.path), row.score, *(row.shares[name] for name in shares)])


def write_json(ranking: Sequence[Found], path: Path) -> None:
    """Write a list with one object per row."""
    rows = [{"rank": row.rank, "path": row.path, "score": row.score, "shares": dict(row.shares)} for row in ranking]
    path.write_text(json.dumps(rows, indent=2) + "\n")

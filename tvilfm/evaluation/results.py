"""The results of a run, stored as `results.json` and validated when created or read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvilfm.evaluation.open_set import OpenSet
from tvilfm.place import write_whole
from tvilfm.terms import METRICS, QUERIES, TEXT_SOURCES, VOTES, Split

RESULTS_FILES: dict[Split, str] = {"test": "results.json", "val": "validation.json"}  # in a run folder and a stage's


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One line of a results table: means over trials with their standard deviations, as fractions.

    Args:
        query: one of `QUERIES`, e.g. "fusion".
        text_source: origin of the query text: "witness", "witness-heldout", "own" or "none".
        protocol: e.g. "sysu_mm01/all/single".
        rank1, rank5, rank10, mAP, mINP: fractions 0-1.
        std: the same five names -> standard deviation over trials, fractions.
        num_trials: number of trials, >= 1.

    Raises:
        ValueError: a name is unknown, a metric is not a fraction, or `std` does not name the five metrics.
    """

    query: str
    text_source: str
    protocol: str
    rank1: float
    rank5: float
    rank10: float
    mAP: float
    mINP: float
    std: Mapping[str, float]
    num_trials: int

    def __post_init__(self) -> None:
        expect(self.query in QUERIES, "row.query", f"one of {list(QUERIES)}", self.query, "Rename the query.")
        expect(
            self.text_source in TEXT_SOURCES,
            "row.text_source",
            f"one of {list(TEXT_SOURCES)}",
            self.text_source,
            "Name the origin of the query text.",
        )
        expect(self.num_trials >= 1, "row.num_trials", ">= 1", self.num_trials, "Evaluate at least one trial.")
        expect(
            set(self.std) == set(METRICS),
            "row.std",
            f"the keys {list(METRICS)}",
            sorted(self.std),
            "Pass one standard deviation per metric (0 for a single trial).",
        )
        for metric in METRICS:
            _expect_fraction(f"row.{metric}", getattr(self, metric))
            _expect_fraction(f"row.std.{metric}", self.std[metric])

    def metric(self, name: str) -> float:
        """Return the mean of one of `METRICS` as a fraction."""
        return float(getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON types; NumPy scalars become Python numbers."""
        return {
            "query": self.query,
            "text_source": self.text_source,
            "protocol": self.protocol,
            **{metric: self.metric(metric) for metric in METRICS},
            "std": {metric: float(self.std[metric]) for metric in METRICS},
            "num_trials": int(self.num_trials),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ResultRow:
        """Build a row from the result of `to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a value is out of range.
        """
        expected = {"query", "text_source", "protocol", *METRICS, "std", "num_trials"}
        expect(
            set(data) == expected,
            "row",
            f"the keys {sorted(expected)}",
            sorted(data),
            "Write results.json again.",
        )
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class Results:
    """All results of one run, and the choice of the headline table; stored as results.json.

    Args:
        dataset: e.g. "synthetic", "sysu_mm01", "regdb", "llcm".
        default_text_source: text source of the headline table.
        default_protocol: protocol of the headline table; at least one row must have it.
        chance: protocol -> expected rank-1 of a random ranking, a fraction.
        rows: one `ResultRow` per query, text source and protocol; at least one.
        open_set: one of `VOTES` -> the errors of its score thresholds, for the default protocol and text source.
        text_noise: kind of noise -> rows of text, fusion and ensemble for the default protocol and text source.

    Raises:
        ValueError: there are no rows, two rows for the same case, an unknown text source, a default protocol without
            rows, or noise in another protocol or text source.
    """

    dataset: str
    default_text_source: str
    default_protocol: str
    rows: Sequence[ResultRow]
    chance: Mapping[str, float] = field(default_factory=dict)
    open_set: Mapping[str, OpenSet] = field(default_factory=dict)
    text_noise: Mapping[str, Sequence[ResultRow]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        expect(len(self.rows) > 0, "results.rows", "at least one row", 0, "Evaluate at least one query modality.")
        expect(
            self.default_text_source in TEXT_SOURCES,
            "results.default_text_source",
            f"one of {list(TEXT_SOURCES)}",
            self.default_text_source,
            "Name a known text source.",
        )
        expect(
            self.default_protocol in self.protocols,
            "results.default_protocol",
            f"one of {list(self.protocols)}",
            self.default_protocol,
            "Choose a protocol that was evaluated.",
        )
        cases = [(row.query, row.text_source, row.protocol) for row in self.rows]
        repeated = sorted({case for case in cases if cases.count(case) > 1})
        expect(
            not repeated,
            "results.rows",
            "one row per (query, text source, protocol)",
            repeated,
            "Average the trials first.",
        )
        default = {(self.default_protocol, self.default_text_source)}
        for noise, of_noise in self.text_noise.items():
            found = {(row.protocol, row.text_source) for row in of_noise}
            expect(found == default, f"results.text_noise[{noise!r}]", f"rows of {default}", found, "Evaluate again.")
        unknown = sorted(set(self.open_set) - set(VOTES))
        expect(not unknown, "results.open_set", f"keys among {list(VOTES)}", unknown, "Evaluate again.")
        for protocol, value in self.chance.items():
            _expect_fraction(f"results.chance[{protocol!r}]", value)

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols in the order of their first row."""
        return tuple(dict.fromkeys(row.protocol for row in self.rows))

    @property
    def default_rows(self) -> tuple[ResultRow, ...]:
        """The headline rows, in the order of `QUERIES`.

        An infrared query has no text, so its row (text source "none") is included beside the rows of the default
        source.
        """
        chosen = []
        for query in QUERIES:
            by_source = {
                row.text_source: row
                for row in self.rows
                if row.query == query and row.protocol == self.default_protocol
            }
            row = by_source.get(self.default_text_source, by_source.get("none"))
            if row is not None:
                chosen.append(row)
        return tuple(chosen)

    def to_dict(self) -> dict[str, Any]:
        """Return the results as plain JSON types."""
        return {
            "dataset": self.dataset,
            "default_text_source": self.default_text_source,
            "default_protocol": self.default_protocol,
            "chance": {protocol: float(value) for protocol, value in self.chance.items()},
            "rows": [row.to_dict() for row in self.rows],
            "open_set": {name: of_name.to_dict() for name, of_name in self.open_set.items()},
            "text_noise": {noise: [row.to_dict() for row in rows] for noise, rows in self.text_noise.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Results:
        """Build the results from the result of `to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a value is out of range.
        """
        data = {"text_noise": {}, "open_set": {}, **data}  # results of 0.1.0 have none
        expected = {"dataset", "default_text_source", "default_protocol", "chance", "rows", "open_set", "text_noise"}
        expect(
            set(data) == expected,
            "results",
            f"the keys {sorted(expected)}",
            sorted(data),
            "Write results.json again.",
        )
        rows = [ResultRow.from_dict(row) for row in data["rows"]]
        noisy = {
            noise: [ResultRow.from_dict(row) for row in of_noise] for noise, of_noise in data["text_noise"].items()
        }
        open_set = {name: OpenSet.from_dict(of_name) for name, of_name in data["open_set"].items()}
        return cls(**{**data, "rows": rows, "open_set": open_set, "text_noise": noisy})

    def write(self, path: Path) -> None:
        """Write results.json atomically; floats are unchanged when read again."""
        write_whole(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file of `write`.

        Raises:
            ValueError: the file is not JSON, or has another layout.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected JSON, got {error}. Run the evaluation again.") from error
        expect(
            isinstance(data, dict),
            str(path),
            "a JSON object",
            type(data).__name__,
            "Run the evaluation again.",
        )
        return cls.from_dict(data)


def expect(holds: bool, name: str, expected: str, got: object, action: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got}. {action}")


def _expect_fraction(name: str, value: float) -> None:
    expect(
        math.isfinite(value) and 0 <= value <= 1 + 1e-6,
        name,
        "a fraction in 0-1",
        value,
        "Divide percentages by 100.",
    )

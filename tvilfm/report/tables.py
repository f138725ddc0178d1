"""The numbers of a run: what results.json holds, how they are worded, and the tables made from them.

One `ResultRow` is one line of the paper's tables: a query modality, the source of the query text, a
protocol, and five metrics as means over trials. `Results` is all rows of a run and is what results.json
stores. The page, the terminal and the Markdown table all print through `metric_cell`, so the same figure
never appears with two roundings.

Fractions 0-1 everywhere; percent only in the strings made here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tvilfm.place import write_whole

QUERIES: tuple[str, ...] = ("infrared", "visible", "text", "fusion", "ensemble")
TEXT_SOURCES: tuple[str, ...] = ("witness", "witness-heldout", "own", "none")
METRICS: tuple[str, ...] = ("rank1", "rank5", "rank10", "mAP", "mINP")

QUERY_LABELS: Mapping[str, str] = {
    "infrared": "infrared alone",
    "visible": "visible alone",
    "text": "text alone",
    "fusion": "infrared + text (fusion)",
    "ensemble": "ensemble (MER)",
}
METRIC_LABELS: Mapping[str, str] = {
    "rank1": "rank-1",
    "rank5": "rank-5",
    "rank10": "rank-10",
    "mAP": "mAP",
    "mINP": "mINP",
}
TEXT_SOURCE_MEANINGS: Mapping[str, str] = {
    "witness": (
        "a visible-light caption of the query's true identity, drawn at random with the ground truth. It measures "
        "what a witness description adds, not what can be read from the infrared image alone. This is the "
        "published protocol."
    ),
    "witness-heldout": (
        "a visible-light caption of the query's true identity, taken from a camera that is not in the gallery. It "
        "is still chosen with the ground truth: a witness description, but never the caption of a gallery image."
    ),
    "own": (
        "the caption generated from the query image itself. No ground truth is used, so it measures what the system "
        "can do with the infrared image and nothing else."
    ),
    "none": "no text; the infrared image is the whole query.",
}

# How a sentence names the text that fusion used.
_TEXT_WORDS: Mapping[str, str] = {
    "witness": "a witness description",
    "witness-heldout": "a witness description from a camera outside the gallery",
    "own": "the image's own caption",
    "none": "a text",
}
_MOVES: Mapping[int, str] = {1: "higher", 0: "no change", -1: "lower"}

PUBLISHED_LABEL = "published, single run, test-selected"

# Two fractions closer than this print the same with two decimals of a percent.
_SAME = 5e-5


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One line of a results table: means over trials, as fractions, with their standard deviations.

    Args:
        query: "infrared", "text", "fusion" or "ensemble".
        text_source: "witness", "witness-heldout", "own" or "none"; where the query text came from.
        protocol: e.g. "sysu_mm01/all/single".
        rank1, rank5, rank10, mAP, mINP: fractions 0-1.
        std: the same five names -> standard deviation over trials, fractions.
        num_trials: how many trials the mean is over, >= 1.

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
        _expect(self.query in QUERIES, "row.query", f"one of {list(QUERIES)}", self.query, "Rename the query.")
        _expect(
            self.text_source in TEXT_SOURCES,
            "row.text_source",
            f"one of {list(TEXT_SOURCES)}",
            self.text_source,
            "Name where the query text came from.",
        )
        _expect(self.num_trials >= 1, "row.num_trials", ">= 1", self.num_trials, "Evaluate at least one trial.")
        _expect(
            set(self.std) == set(METRICS),
            "row.std",
            f"the keys {list(METRICS)}",
            sorted(self.std),
            "Give one standard deviation a metric (0 for a single trial).",
        )
        for metric in METRICS:
            _expect_fraction(f"row.{metric}", getattr(self, metric))
            _expect_fraction(f"row.std.{metric}", self.std[metric])

    def metric(self, name: str) -> float:
        """Return the mean of one of `METRICS`, a fraction."""
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
        """Build a row from what `to_dict` returned.

        Raises:
            ValueError: a key is missing or unknown, or a value is out of range.
        """
        expected = {"query", "text_source", "protocol", *METRICS, "std", "num_trials"}
        _expect(
            set(data) == expected,
            "row",
            f"the keys {sorted(expected)}",
            sorted(data),
            "Write results.json again.",
        )
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Every number of one run, and which of them is shown first; stored as results.json.

    Args:
        dataset: e.g. "synthetic", "sysu_mm01", "regdb", "llcm".
        default_text_source: the text source of the headline table.
        default_protocol: the protocol of the headline table; some row must have it.
        chance: protocol -> expected rank-1 of a random ranking, a fraction.
        rows: one `ResultRow` per query, text source and protocol; at least one.

    Raises:
        ValueError: no rows, two rows for the same case, an unknown text source, or a default protocol
        without rows.
    """

    dataset: str
    default_text_source: str
    default_protocol: str
    rows: Sequence[ResultRow]
    chance: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        _expect(len(self.rows) > 0, "results.rows", "at least one row", 0, "Evaluate at least one query modality.")
        _expect(
            self.default_text_source in TEXT_SOURCES,
            "results.default_text_source",
            f"one of {list(TEXT_SOURCES)}",
            self.default_text_source,
            "Name a known text source.",
        )
        _expect(
            self.default_protocol in self.protocols,
            "results.default_protocol",
            f"one of {list(self.protocols)}",
            self.default_protocol,
            "Choose a protocol that was evaluated.",
        )
        cases = [(row.query, row.text_source, row.protocol) for row in self.rows]
        repeated = sorted({case for case in cases if cases.count(case) > 1})
        _expect(
            not repeated,
            "results.rows",
            "one row per (query, text source, protocol)",
            repeated,
            "Average the trials first.",
        )
        for protocol, value in self.chance.items():
            _expect_fraction(f"results.chance[{protocol!r}]", value)

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols in the order of their first row."""
        return tuple(dict.fromkeys(row.protocol for row in self.rows))

    @property
    def default_rows(self) -> tuple[ResultRow, ...]:
        """The headline rows, in the order of `QUERIES`.

        An infrared query has no text, so its row (text source "none") stands beside the rows of the default
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
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Results:
        """Build the results from what `to_dict` returned.

        Raises:
            ValueError: a key is missing or unknown, or a value is out of range.
        """
        expected = {"dataset", "default_text_source", "default_protocol", "chance", "rows"}
        _expect(
            set(data) == expected,
            "results",
            f"the keys {sorted(expected)}",
            sorted(data),
            "Write results.json again.",
        )
        return cls(**{**data, "rows": [ResultRow.from_dict(row) for row in data["rows"]]})

    def write(self, path: Path) -> None:
        """Write results.json atomically; floats survive the round trip unchanged."""
        write_whole(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `write` wrote.

        Raises:
            ValueError: the file is not JSON, or not of this layout.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected JSON, got {error}. Run the evaluation again.") from error
        _expect(
            isinstance(data, dict),
            str(path),
            "a JSON object",
            type(data).__name__,
            "Run the evaluation again.",
        )
        return cls.from_dict(data)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One or more sentences that compare infrared, fusion and ensemble, and a word for their outcome.

    Args:
        outcome: "holds" (infrared < fusion < ensemble in rank-1 and mAP), "partly", "fails" (fusion is not
        above
            infrared in rank-1) or "incomplete" (the comparison lacks rows).
        sentence: plain text, percent with two decimals.
    """

    outcome: Literal["holds", "partly", "fails", "incomplete"]
    sentence: str


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A published number to stand beside ours.

    Args:
        setting: the published protocol in words.
        method: the published method or ablation.
        query: which of our query modalities it compares with.
        rank1, mAP, mINP: fractions, None where not reported.
        rank1_std: standard deviation of rank-1 over training seeds, None for a single run.
        note: how the number came about.
    """

    setting: str
    method: str
    query: str
    rank1: float
    mAP: float | None = None
    mINP: float | None = None
    rank1_std: float | None = None
    note: str = PUBLISHED_LABEL


def percent(fraction: float) -> str:
    """Print a fraction as percent with two decimals and no sign: 0.849 -> "84.90"."""
    return f"{100 * fraction:.2f}"


def metric_cell(row: ResultRow, metric: str) -> str:
    """Print "mean ± std" of one metric in percent; a single trial has no spread, so none is printed."""
    mean = percent(row.metric(metric))
    return mean if row.num_trials == 1 else f"{mean} ± {percent(row.std[metric])}"


def text_source_sentence(results: Results) -> str:
    """Say in one or two sentences what the query text of the headline rows is, or that there is none."""
    sources = {row.text_source for row in results.default_rows}
    source = results.default_text_source if results.default_text_source in sources else "none"
    return f"Query text “{source}”: {TEXT_SOURCE_MEANINGS[source]}"


def spread_sentence(rows: Sequence[ResultRow]) -> str:
    """Say what the ± of these rows is over, or that there is none."""
    trials = sorted({row.num_trials for row in rows})
    if trials == [1]:
        return "One trial: no spread is given."
    counts = " or ".join(str(count) for count in trials)
    return f"± is the standard deviation over {counts} trials of the protocol, not over training seeds."


def chance_sentence(results: Results) -> str | None:
    """Say the expected rank-1 of a random ranking under the default protocol; None where it is not known."""
    value = results.chance.get(results.default_protocol)
    return None if value is None else f"Chance: a random ranking has an expected rank-1 of {percent(value)}%."


def verdict(results: Results) -> Verdict:
    """Say whether infrared < fusion < ensemble on the headline rows, from the numbers alone.

    The order is judged on rank-1 and mAP as printed (two decimals of a percent). A step that is smaller
    than the spread between trials, and a text that does as well alone, are said too: both change what the
    order means.
    """
    rows = {row.query: row for row in results.default_rows}
    infrared, fusion, ensemble = rows.get("infrared"), rows.get("fusion"), rows.get("ensemble")
    chance = results.chance.get(results.default_protocol)
    chance_words = "" if chance is None else f" Chance is {percent(chance)}%."

    if infrared is None or fusion is None:
        if set(rows) == {"infrared"}:
            what = "Only infrared queries were evaluated, so this run says nothing about text"
        else:
            missing = [QUERY_LABELS[query] for query in ("infrared", "fusion", "ensemble") if query not in rows]
            what = f"The comparison is incomplete, without numbers for {_join(missing)}"
        found = _join([f"{percent(row.rank1)}% with {QUERY_LABELS[row.query]}" for row in rows.values()])
        found_words = f": rank-1 is {found}." if found else " under the default protocol and text source."
        return Verdict(outcome="incomplete", sentence=what + found_words + chance_words)

    steps = [(infrared, fusion)] + ([(fusion, ensemble)] if ensemble is not None else [])
    rank1_moves = [_direction(low, high, "rank1") for low, high in steps]
    mAP_moves = [_direction(low, high, "mAP") for low, high in steps]
    # Where every step is up, "rises" says so once; otherwise each step says its own direction.
    rising = all(move > 0 for move in rank1_moves)
    than = ("than infrared", "than fusion")
    signs = ["" if rising else f" ({_MOVES[m]}{f' {t}' if m else ''})" for m, t in zip(rank1_moves, than, strict=False)]
    sentence = (
        f"on people never seen in training, rank-1 {'rises' if rising else 'goes'} from "
        f"{percent(infrared.rank1)}% with infrared alone to {percent(fusion.rank1)}% when "
        f"{_TEXT_WORDS[fusion.text_source]} is fused in{signs[0]}"
    )
    if ensemble is not None:
        sentence += f", and to {percent(ensemble.rank1)}% with the ensemble{signs[1]}"

    outcome: Literal["holds", "partly", "fails", "incomplete"]
    if rank1_moves[0] <= 0:
        outcome, opening = "fails", "The paper's claim does not hold in this run: "
    elif not rising or min(mAP_moves) <= 0:
        outcome, opening = "partly", "The paper's claim holds only in part: "
    elif ensemble is None:
        outcome, opening = "incomplete", "Text helps, and the ensemble was not evaluated: "
    else:
        outcome, opening = "holds", "The paper's claim holds in this run: "
    sentence = f"{opening}{sentence}.{chance_words}"

    for (low, high), rank1_move, mAP_move in zip(steps, rank1_moves, mAP_moves, strict=True):
        if mAP_move != rank1_move:
            sentence += (
                f" mAP moves otherwise: {percent(low.mAP)}% with {QUERY_LABELS[low.query]}, "
                f"{percent(high.mAP)}% with {QUERY_LABELS[high.query]} ({_MOVES[mAP_move]})."
            )
    for low, high in steps:
        gain, spread = high.rank1 - low.rank1, max(low.std["rank1"], high.std["rank1"])
        if _SAME <= gain < spread and min(low.num_trials, high.num_trials) > 1:
            sentence += (
                f" The step to {QUERY_LABELS[high.query]} ({percent(gain)} points) is smaller than the "
                f"standard deviation over trials ({percent(spread)})."
            )
    text = rows.get("text")
    if text is not None and text.rank1 >= fusion.rank1:
        sentence += f" The text alone already reaches {percent(text.rank1)}%, so it may carry the result by itself."
    return Verdict(outcome=outcome, sentence=sentence)


def terminal_table(results: Results) -> RenderableType:
    """Return the headline table for a terminal, with the verdict, chance and what the query text is.

    It fits 80 columns: the standard deviation stands under its mean, and the text source, one for all rows with
    text, in the sentence below.

    Returns:
        A rich renderable: a table of the headline rows, percent with two decimals, mean ± std over trials.
    """
    table = Table(title=f"{results.dataset}, {results.default_protocol} (percent)", title_justify="left")
    table.add_column("query", no_wrap=True)
    for metric in METRICS:
        table.add_column(METRIC_LABELS[metric], justify="right", no_wrap=True)
    for row in results.default_rows:
        cells = [metric_cell(row, metric).replace(" ± ", "\n± ") for metric in METRICS]
        table.add_row(QUERY_LABELS[row.query], *cells)
    lines = [
        verdict(results).sentence,
        chance_sentence(results),
        text_source_sentence(results),
        spread_sentence(results.default_rows),
    ]
    return Group(table, *(Text(line) for line in lines if line is not None))


def markdown_table(results: Results) -> str:
    """Return every row as a Markdown table (percent), the headline rows first, then chance and the text source."""
    header = ["protocol", "query", "text", *(METRIC_LABELS[metric] for metric in METRICS), "trials"]
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "|".join(["---"] * 3 + ["---:"] * (len(METRICS) + 1)) + "|",
    ]
    first = results.default_rows
    for row in [*first, *(row for row in results.rows if row not in first)]:
        cells = [row.protocol, QUERY_LABELS[row.query], row.text_source]
        cells += [metric_cell(row, metric) for metric in METRICS] + [str(row.num_trials)]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"Chance rank-1, {name}: {percent(value)}%" for name, value in results.chance.items()]
    return "\n".join([*lines, text_source_sentence(results)]) + "\n"


def published_rows(dataset: str) -> tuple[PublishedRow, ...]:
    """Return the published numbers to compare with; empty for any data set that nobody else has measured.

    Source: METHOD.md section 9 (Hu, Yang, Ye, NeurIPS 2024; an independent re-run of the released code;
    others).
    """
    fused, indoor = "infrared + text", "indoor search, single-shot"
    sysu, regdb, llcm = "all search, single-shot", "10 splits", "one gallery image per camera"
    rerun = "independent re-run of the released code, mean ± standard deviation of 4 seeds"
    other = "other methods, as reported"
    rows: dict[str, tuple[PublishedRow, ...]] = {
        "sysu_mm01": (
            _published(sysu, "TVI-LFM, infrared only", "infrared", 69.89, 66.74, 53.34),
            _published(sysu, f"baseline, {fused}", "fusion", 72.52, 69.15, 55.93),
            _published(sysu, "baseline + SFF", "fusion", 77.00, 73.73, 61.50),
            _published(sysu, "baseline + SFF + MJL", "fusion", 83.97, 80.40, 69.46),
            _published(sysu, "baseline + SFF + MJL + LLM", "fusion", 84.17, 80.72, 70.02),
            _published(sysu, "baseline + SFF + MJL + MER", "ensemble", 84.88, 81.32, 70.57),
            _published(sysu, "TVI-LFM, all parts", "ensemble", 84.90, 81.47, 70.85),
            _published(indoor, "TVI-LFM, all parts", "ensemble", 89.06, 90.78, 88.39),
            _published(sysu, "TVI-LFM re-run, without MER", "fusion", 81.42, 77.29, 64.86, rerun, 0.40),
            _published(sysu, "TVI-LFM re-run, with MER", "ensemble", 81.16, 77.23, 64.86, rerun, 0.69),
            _published(sysu, "YYDS, human text", "fusion", 85.54, 81.64, 70.51, other),
            _published(sysu, "BIT (CVPR 2026), image only", "infrared", 80.53, 79.76, None, other),
            _published(sysu, "IDKL, image only", "infrared", 81.42, 79.85, None, other),
        ),
        "regdb": (
            _published(regdb, "TVI-LFM, infrared only", "infrared", 89.51, 83.51, 69.65),
            _published(regdb, "TVI-LFM, all parts", "ensemble", 91.38, 85.92, 72.73),
        ),
        "llcm": (
            _published(llcm, "TVI-LFM, infrared only", "infrared", 53.53, 59.77, 56.40),
            _published(llcm, f"baseline, {fused}", "fusion", 52.63, 58.82, 55.43),
            _published(llcm, "baseline + SFF", "fusion", 54.73, 60.95, 57.64),
            _published(llcm, "baseline + SFF + MJL", "fusion", 56.76, 63.58, 60.35),
            _published(llcm, "baseline + SFF + MJL + LLM", "fusion", 57.13, 64.06, 60.72),
            _published(llcm, "baseline + SFF + MJL + MER", "ensemble", 57.09, 63.87, 60.62),
            _published(llcm, "TVI-LFM, all parts", "ensemble", 58.19, 65.08, 61.83),
            _published(llcm, "YYDS, human text", "fusion", 58.22, 65.09, None, other),
            _published("NIR to VIS", "BIT (CVPR 2026), image only", "infrared", 66.7, None, None, other),
        ),
    }
    return rows.get(dataset, ())


def _published(
    setting: str,
    method: str,
    query: str,
    rank1: float,
    mAP: float | None,
    mINP: float | None,
    note: str = PUBLISHED_LABEL,
    rank1_std: float | None = None,
) -> PublishedRow:
    """Build a `PublishedRow` from the percentages printed in the paper."""
    return PublishedRow(
        setting=setting,
        method=method,
        query=query,
        rank1=rank1 / 100,
        mAP=None if mAP is None else mAP / 100,
        mINP=None if mINP is None else mINP / 100,
        rank1_std=None if rank1_std is None else rank1_std / 100,
        note=note,
    )


def _direction(low: ResultRow, high: ResultRow, metric: str) -> int:
    """Return 1, 0 or -1 as `high` is above, equal to (as printed) or below `low`."""
    gain = high.metric(metric) - low.metric(metric)
    return 0 if abs(gain) < _SAME else (1 if gain > 0 else -1)


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def _expect(holds: bool, name: str, expected: str, got: object, action: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got}. {action}")


def _expect_fraction(name: str, value: float) -> None:
    _expect(
        math.isfinite(value) and 0 <= value <= 1 + 1e-6,
        name,
        "a fraction in 0-1",
        value,
        "Divide percentages by 100.",
    )

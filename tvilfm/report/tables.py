"""Format results as labels, sentences, and tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tvilfm.evaluation.results import ResultRow, Results
from tvilfm.terms import METRICS

QUERY_LABELS: Mapping[str, str] = {
    "infrared": "infrared alone",
    "visible": "visible alone",
    "text": "text alone",
    "fusion": "infrared + text (fusion)",
    "ensemble": "ensemble (MER)",
}
VOTES_LABELS: Mapping[str, str] = {
    "infrared": "infrared alone",
    "text": "text alone",
    "ensemble": "ensemble",
    "ensemble-unfiltered": "ensemble, nothing subtracted",
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
        "a visible-light caption of the query's true identity, chosen at random using the ground truth. It measures "
        "what a witness description adds, not what the infrared image alone shows. This is the published protocol."
    ),
    "witness-heldout": (
        "a visible-light caption of the query's true identity, from a camera that is not in the gallery. It is also "
        "chosen using the ground truth: a witness description, but never the caption of a gallery image."
    ),
    "own": (
        "the caption generated from the query image itself. No ground truth is used, so it measures what the system "
        "achieves with the infrared image and nothing else."
    ),
    "human": (
        "a sentence that a person wrote about the query's true identity, from data.human_texts. It measures what the "
        "words of a real witness add. There is one sentence per identity, chosen using the ground truth."
    ),
    "none": "no text; the query is only the infrared image.",
}
# Names of the text that fusion used, for use in sentences.
_TEXT_WORDS: Mapping[str, str] = {
    "witness": "a witness description",
    "witness-heldout": "a witness description from a camera outside the gallery",
    "own": "the image's own caption",
    "human": "a person's own description",
    "none": "a text",
}
_MOVES: Mapping[int, str] = {1: "higher", 0: "no change", -1: "lower"}
# Fractions that differ by less than this count as equal: they print alike with two decimals of a percent.
_SAME = 5e-5


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The comparison of infrared, fusion and ensemble: an outcome and one or more sentences.

    Args:
        outcome: "holds" (infrared < fusion < ensemble in rank-1 and mAP), "partly", "fails" (fusion is not above
            infrared in rank-1) or "incomplete" (rows are missing).
        sentence: plain text, percent with two decimals.
    """

    outcome: Literal["holds", "partly", "fails", "incomplete"]
    sentence: str


def percent(fraction: float) -> str:
    """Format a fraction as percent with two decimals and no percent sign: 0.849 -> "84.90"."""
    return f"{100 * fraction:.2f}"


def metric_cell(row: ResultRow, metric: str) -> str:
    """Format one metric in percent as "mean ± std", or as "mean" for a single trial."""
    mean = percent(row.metric(metric))
    return mean if row.num_trials == 1 else f"{mean} ± {percent(row.std[metric])}"


def text_source_sentence(results: Results) -> str:
    """Return sentences that explain the query text of the headline rows, or say that there is none."""
    sources = {row.text_source for row in results.default_rows}
    source = results.default_text_source if results.default_text_source in sources else "none"
    return f"Query text “{source}”: {TEXT_SOURCE_MEANINGS[source]}"


def spread_sentence(rows: Sequence[ResultRow]) -> str:
    """Return a sentence that explains the ± of these rows, or says that there is none."""
    trials = sorted({row.num_trials for row in rows})
    if trials == [1]:
        return "One trial, so no standard deviation is shown."
    counts = " or ".join(str(count) for count in trials)
    return f"± is the standard deviation over {counts} trials of the protocol, not over training seeds."


def chance_sentence(results: Results) -> str | None:
    """Return a sentence with the expected rank-1 of a random ranking (default protocol); None if it is unknown."""
    value = results.chance.get(results.default_protocol)
    return None if value is None else f"Chance: a random ranking has an expected rank-1 of {percent(value)}%."


def verdict(results: Results) -> Verdict:
    """Judge whether infrared < fusion < ensemble holds on the headline rows.

    The order is judged on rank-1 and mAP as printed (two decimals of a percent). If no query is better than chance, the
    order says nothing. The sentences also mention steps that are smaller than the standard deviation over trials, and
    text that reaches fusion's result alone, because both change what the order means.
    """
    rows = {row.query: row for row in results.default_rows}
    infrared, fusion, ensemble = rows.get("infrared"), rows.get("fusion"), rows.get("ensemble")
    chance = results.chance.get(results.default_protocol)
    chance_words = "" if chance is None else f" Chance is {percent(chance)}%."

    if infrared is None or fusion is None:
        return _incomplete(rows, chance_words)

    steps = [(infrared, fusion)] + ([(fusion, ensemble)] if ensemble is not None else [])
    rank1_moves = [_direction(low, high, "rank1") for low, high in steps]
    mAP_moves = [_direction(low, high, "mAP") for low, high in steps]
    # If every step goes up, "rises" is said once; otherwise each step states its own direction.
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
    if not any(_beats_chance(row, chance) for row in rows.values()):
        outcome, opening = "incomplete", "No query is better than chance, so this run says nothing about the claim: "
    elif rank1_moves[0] <= 0:
        outcome, opening = "fails", "The paper's claim does not hold in this run: "
    elif not rising or min(mAP_moves) <= 0:
        outcome, opening = "partly", "The paper's claim holds only in part: "
    elif ensemble is None:
        outcome, opening = "incomplete", "Text helps, but the ensemble was not evaluated: "
    else:
        outcome, opening = "holds", "The paper's claim holds in this run: "
    caveats = _other_moves(steps, rank1_moves, mAP_moves) + _small_steps(steps)
    text = rows.get("text")
    if text is not None and text.rank1 >= fusion.rank1:
        caveats += _text_alone(text, chance)
    return Verdict(outcome=outcome, sentence=f"{opening}{sentence}.{chance_words}{caveats}")


def _incomplete(rows: Mapping[str, ResultRow], chance_words: str) -> Verdict:
    """Return the verdict of a run without infrared or fusion queries."""
    if set(rows) == {"infrared"}:
        what = "Only infrared queries were evaluated, so this run says nothing about text"
    else:
        missing = [QUERY_LABELS[query] for query in ("infrared", "fusion", "ensemble") if query not in rows]
        what = f"The comparison is incomplete, without numbers for {join(missing)}"
    values = join([f"{percent(row.rank1)}% with {QUERY_LABELS[row.query]}" for row in rows.values()])
    value_words = f": rank-1 is {values}." if values else " under the default protocol and text source."
    return Verdict(outcome="incomplete", sentence=what + value_words + chance_words)


def _other_moves(
    steps: Sequence[tuple[ResultRow, ResultRow]], rank1_moves: Sequence[int], mAP_moves: Sequence[int]
) -> str:
    """Return a sentence for each step whose mAP moves in another direction than rank-1."""
    return "".join(
        f" mAP changes differently: {percent(low.mAP)}% with {QUERY_LABELS[low.query]}, "
        f"{percent(high.mAP)}% with {QUERY_LABELS[high.query]} ({_MOVES[mAP_move]})."
        for (low, high), rank1_move, mAP_move in zip(steps, rank1_moves, mAP_moves, strict=True)
        if mAP_move != rank1_move
    )


def _beats_chance(row: ResultRow, chance: float | None) -> bool:
    """Return whether rank-1 is above chance by more than the standard deviation over trials."""
    return chance is None or row.rank1 - chance > max(_SAME, row.std["rank1"])


def _small_steps(steps: Sequence[tuple[ResultRow, ResultRow]]) -> str:
    """Return a sentence for each rise of rank-1 that is smaller than the standard deviation over trials."""
    sentences = ""
    for low, high in steps:
        gain, spread = high.rank1 - low.rank1, max(low.std["rank1"], high.std["rank1"])
        if _SAME <= gain < spread and min(low.num_trials, high.num_trials) > 1:
            sentences += (
                f" The step to {QUERY_LABELS[high.query]} ({percent(gain)} points) is smaller than the "
                f"standard deviation over trials ({percent(spread)})."
            )
    return sentences


def _text_alone(text: ResultRow, chance: float | None) -> str:
    if _beats_chance(text, chance):
        return f" The text alone already reaches {percent(text.rank1)}%, so it may carry the result by itself."
    return f" The text alone reaches {percent(text.rank1)}%, which is no better than chance."


def terminal_table(results: Results) -> RenderableType:
    """Return the headline table for a terminal, followed by the verdict, chance and the query text.

    The table fits 80 columns: the standard deviation is printed below its mean, and the text source, which all rows
    with text share, is given in a sentence below the table.

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
    """Return all rows as a Markdown table (percent), headline rows first, followed by chance and the text source."""
    header = ["protocol", "query", "text", *(METRIC_LABELS[metric] for metric in METRICS), "trials"]
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "|".join(["---"] * 3 + ["---:"] * (len(METRICS) + 1)) + "|",
    ]
    first = results.default_rows
    rows = [(row, row.text_source) for row in [*first, *(row for row in results.rows if row not in first)]]
    rows += [(row, f"{row.text_source}, {noise}") for noise, of_noise in results.text_noise.items() for row in of_noise]
    for row, text in rows:
        cells = [row.protocol, QUERY_LABELS[row.query], text]
        cells += [metric_cell(row, metric) for metric in METRICS] + [str(row.num_trials)]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"Chance rank-1, {name}: {percent(value)}%" for name, value in results.chance.items()]
    return "\n".join([*lines, text_source_sentence(results)]) + "\n"


def _direction(low: ResultRow, high: ResultRow, metric: str) -> int:
    """Return 1, 0 or -1 if `high` is above, equal to (as printed) or below `low`."""
    gain = high.metric(metric) - low.metric(metric)
    return 0 if abs(gain) < _SAME else (1 if gain > 0 else -1)


def rises(low: ResultRow, high: ResultRow, metric: str) -> bool:
    """Return whether a metric of `high` is above that of `low`, as printed."""
    return _direction(low, high, metric) > 0


def join(words: Sequence[str]) -> str:
    """Return words as a list in a sentence: `a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""

"""What the results say about `evaluate.text_noise`: how good must the witness be?"""

from __future__ import annotations

from collections.abc import Mapping

from tvilfm.config import noise_level
from tvilfm.evaluation.results import ResultRow, Results
from tvilfm.report.tables import join, percent, rises

_LABELS: Mapping[str, tuple[str, str]] = {  # for level 1 or none, and for other levels
    "no-colours": ("no colour words", ""),
    "colours": ("1 colour confused", "{} colours confused"),
    "synonyms": ("1 unusual word", "{} unusual words"),
    "typos": ("1 typing error", "{} typing errors"),
    "clauses": ("only 1 clause", "only {} clauses"),
    "chatter": ("small talk around it", ""),
    "other-person": ("about another person", ""),
    "named": ("only 1 attribute named", "only {} attributes named"),
    "missing": ("1 attribute missing", "{} attributes missing"),
    "wrong": ("1 attribute wrong", "{} attributes wrong"),
}
_FEWER_IS_WORSE = ("clauses", "named")


def noise_label(noise: str) -> str:
    """Return the words for one kind of noise with its level, such as `2 typing errors`."""
    kind, level = noise_level(noise)
    if (kind, level) == ("missing", 0):
        return "every attribute right"
    one, more = _LABELS[kind]
    return more.format(level) if more and level != 1 else one


def noise_rows(results: Results) -> dict[str, dict[str, ResultRow]]:
    """Return label -> query -> row: first the default table's texts without noise, then each kind of noise."""
    plain = {row.query: row for row in results.default_rows if row.text_source != "none"}
    by_label = {noise_label(noise): {row.query: row for row in rows} for noise, rows in results.text_noise.items()}
    return {f"as “{results.default_text_source}” says": plain, **by_label}


def noise_answer(results: Results) -> str | None:
    """Return sentences that say from which noise on infrared alone is better than the ensemble.

    The comparison is of mean rank-1 as printed. A kind with levels counts as worse from the first level on at which the
    ensemble is below infrared alone at this and every worse level that was evaluated.

    Returns:
        None if no noise was evaluated, or no infrared query.
    """
    infrared = next((row for row in results.default_rows if row.query == "infrared"), None)
    if infrared is None or not results.text_noise:
        return None
    levels: dict[str, dict[int, ResultRow]] = {}
    for noise, rows in results.text_noise.items():
        kind, level = noise_level(noise)
        levels.setdefault(kind, {})[level] = next(row for row in rows if row.query == "ensemble")
    below: list[str] = []
    above: list[str] = []
    for kind, by_level in levels.items():
        worst_first = sorted(by_level, reverse=kind not in _FEWER_IS_WORSE)
        worse = []
        for level in worst_first:
            if not rises(by_level[level], infrared, "rank1"):
                break
            worse.append(level)
        noise = f"{kind}-{(worse or worst_first)[-1 if worse else 0]}" if _LABELS[kind][1] else kind
        row = by_level[noise_level(noise)[1]]
        words = f"{noise_label(noise)} ({percent(row.rank1)}%)"
        (below if worse else above).append(words)
    answer = f"Infrared alone has a rank-1 of {percent(infrared.rank1)}%."
    if below:
        answer += f" It is better than the ensemble from these points on: {join(below)}."
    else:
        answer += " The ensemble is at least as good with every noise that was evaluated."
    if below and above:
        answer += f" The ensemble is at least as good with all other noise, at its worst {join(above)}."
    return answer

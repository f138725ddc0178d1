"""What a sweep found: from its trials to a table of settings beside the paper's, and to the page.

Settings are compared under the same seeds: the difference between two of them is a mean over seeds of differences, and
its interval that of the paired t-test. Only finished trials count in a mean; the others are listed with the reason.

Fractions 0-1 everywhere; percent only in the strings made here.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tvilfm.place import write_whole
from tvilfm.report import figures, tables
from tvilfm.report.figures import ParallelAxis, TrialCurve
from tvilfm.report.page import DATASET_LABELS, markup, page_template
from tvilfm.report.tables import METRIC_LABELS, QUERY_LABELS, PublishedRow, percent
from tvilfm.sweeps.space import Parameter, Space, word

SHOWN = ("rank1", "mAP", "mINP")
COMPARED = ("rank1", "mAP")
MINUS = "\N{MINUS SIGN}"
CONFIDENCE = 0.95
# Fewer trials than this say nothing about which parameter matters.
IMPORTANCE_TRIALS = 8


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial of a sweep, as `trials.jsonl` holds it.

    Attributes:
        name: unique in the sweep.
        setting: row name or parameter values in words; trials of one setting differ in their seed.
        values: parameter -> value; empty for rows.
        seed: of the run.
        query: which query of the results `metrics` are of.
        status: done; stopped (early, by the scheduler); failed.
        reason: of a failure, in one line.
        metrics: rank1, mAP, mINP of test identities and val_rank1, val_mAP of validation identities, fractions, as
            far as there are; of a stopped trial its last validation.
        chosen: what the trial itself chose: ensemble weights of the free sweep.
        learning: records of its epochs, see `figures.learning_chart`.
    """

    name: str
    setting: str
    values: Mapping[str, Any] = field(default_factory=dict)
    seed: int
    query: str
    status: Literal["done", "stopped", "failed"]
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    chosen: Mapping[str, float] = field(default_factory=dict)
    learning: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean over seeds of one setting's metric minus the reference's, with a 95 % interval (None with one seed)."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class SettingSummary:
    """One line of the table.

    Attributes:
        setting, values, query: as in its trials.
        metrics: name -> values of finished trials, by seed.
        differences: name -> difference to the reference over the seeds that both finished; none for the reference.
        unfinished: trials that did not finish: seed, status and reason.
        published: the row of the paper that it stands beside.
    """

    setting: str
    values: Mapping[str, Any]
    query: str
    metrics: Mapping[str, Mapping[int, float]]
    differences: Mapping[str, Difference]
    unfinished: tuple[str, ...]
    published: PublishedRow | None


@dataclass(frozen=True, kw_only=True)
class SweepData:
    """Everything a sweep's report shows.

    Attributes:
        space: what was varied.
        records: every trial.
        dataset: as in `data.name`.
        facts: of the sweep in the order to show, e.g. protocol, text source, versions, time.
        config_yaml: the config that every trial began with.
    """

    space: Space
    records: Sequence[TrialRecord]
    dataset: str
    facts: Mapping[str, str] = field(default_factory=dict)
    config_yaml: str = ""


def read_trials(path: Path) -> list[TrialRecord]:
    """Read `trials.jsonl`, one record a line."""
    return [TrialRecord(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Mean difference over the seeds that both have, with the interval of the paired t-test.

    Args:
        values, reference: seed -> metric.

    Returns:
        The difference; without an interval for one seed; None without a seed in common.

    Source: Student's paired t, two-sided, 95 %. Differs: none known.
    """
    from scipy.stats import t  # half a second that only a report pays

    gaps = [values[seed] - reference[seed] for seed in sorted(values) if seed in reference]
    if not gaps:
        return None
    mean = statistics.fmean(gaps)
    if len(gaps) == 1:
        return Difference(mean=mean, low=None, high=None)
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return Difference(mean=mean, low=mean - half, high=mean + half)


def summarise(data: SweepData) -> list[SettingSummary]:
    """The table's lines: rows in the order of the space, parameter settings best first by the space's metric."""
    space = data.space
    by_setting: dict[str, list[TrialRecord]] = {name: [] for name in space.rows}
    for record in data.records:
        by_setting.setdefault(record.setting, []).append(record)
    names = list(by_setting)
    if not space.rows:
        names.sort(key=lambda name: -_mean(_values(by_setting[name], space.metric)))
    reference = by_setting[space.reference or names[0]] if names else []
    published = {row.method: row for row in reversed(_published(data.dataset))}  # of equals the first one stays
    summaries = []
    for name in names:
        records = by_setting[name]
        metrics = {metric: _values(records, metric) for metric in dict.fromkeys((*SHOWN, space.metric))}
        differences = {
            metric: paired_difference(metrics[metric], _values(reference, metric))
            for metric in COMPARED
            if records is not reference
        }
        method = space.rows[name].published if name in space.rows else None
        summaries.append(
            SettingSummary(
                setting=name,
                values=records[0].values if records else {},
                query=records[0].query if records else space.rows[name].query,
                metrics=metrics,
                differences={metric: gap for metric, gap in differences.items() if gap is not None},
                unfinished=tuple(_ending(record) for record in records if record.status != "done"),
                published=published.get(method) if method is not None else None,
            )
        )
    return summaries


def verdict_sentence(data: SweepData) -> str:
    """Say what the table shows: which settings differ from the reference beyond chance, or which one is best."""
    summaries = summarise(data)
    space, label = data.space, _metric_label(data.space.metric)
    best = max(summaries, key=lambda one: _mean(one.metrics[space.metric]), default=None)
    if best is None or not best.metrics[space.metric]:
        return "No trial finished."
    if space.reference is None:
        return f"Best {label}: {_spread(best.metrics[space.metric])} with {best.setting}."
    reference = next(one for one in summaries if one.setting == space.reference)
    sides: dict[str, list[str]] = {"below": [], "above": [], "not told apart from": []}
    for one in summaries:
        gap = one.differences.get("mAP")
        if gap is not None and gap.low is not None and gap.high is not None:
            side = "below" if gap.high < 0 else "above" if gap.low > 0 else "not told apart from"
            sides[side].append(one.setting)
    found = [f"{side} it: {', '.join(names)}" for side, names in sides.items() if names]
    return (
        f"Row “{reference.setting}” reaches mAP {_spread(reference.metrics['mAP'])}. By the 95 % interval of the "
        f"paired difference in mAP, {'; '.join(found) if found else 'nothing can be said with one seed'}."
    )


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as every format prints them; the first columns name the setting, the last says what its seeds came to."""

    header: list[str]
    rows: list[list[str]]
    num_names: int

    def is_number(self, column: int) -> bool:
        """Whether a column is set flush right."""
        return self.num_names <= column < len(self.header) - 1


def settings_table(data: SweepData) -> Table:
    """The table of settings, percent: rows with their query, or a column for each parameter."""
    space, summaries = data.space, summarise(data)
    # The validation metric chose a setting; of rows, which nobody chooses, the paper's three are shown.
    shown = SHOWN if space.rows else tuple(dict.fromkeys((space.metric, *SHOWN)))
    names = ["row", "query"] if space.rows else [_title(key) for key in space.parameters]
    with_gaps = len(space.seeds) > 1
    with_paper = any(one.published for one in summaries)
    header = [*names, *(_metric_label(metric) for metric in shown)]
    header += [f"Δ {METRIC_LABELS[metric]} [95 %]" for metric in COMPARED] if with_gaps else []
    header += ["paper: " + ", ".join(METRIC_LABELS[metric] for metric in SHOWN)] if with_paper else []
    rows = []
    for one in summaries:
        row = [one.setting, one.query] if space.rows else [word(value) for value in one.values.values()]
        row += [_spread(one.metrics[metric]) for metric in shown]
        row += [_gap(one.differences.get(metric)) for metric in COMPARED] if with_gaps else []
        if with_paper:
            row.append("" if one.published is None else _paper(one.published))
        done = len(one.metrics[space.metric])
        rows.append([*row, "; ".join([*([f"{done} done"] if done else []), *one.unfinished])])
    return Table(header=[*header, "trials"], rows=rows, num_names=len(names))


def markdown_table(data: SweepData) -> str:
    """The table as Markdown, with the sentence that says what its columns are."""
    table = settings_table(data)
    marks = ["---:" if table.is_number(column) else "---" for column in range(len(table.header))]
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        for cells in (table.header, marks, *table.rows)
    ]
    return "\n".join([*lines, "", table_sentence(data)]) + "\n"


def latex_table(data: SweepData) -> str:
    """The table as LaTeX with booktabs rules, ready to be pasted."""
    table = settings_table(data)
    columns = "".join("r" if table.is_number(column) else "l" for column in range(len(table.header)))
    header, *body = (" & ".join(_latex(cell) for cell in cells) + r" \\" for cells in (table.header, *table.rows))
    lines = [
        f"% {data.space.description}",
        f"% {table_sentence(data)}",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
    ]
    return "\n".join([*lines, header, "\\midrule", *body, "\\bottomrule", "\\end{tabular}"]) + "\n"


def csv_table(data: SweepData) -> str:
    """The table as CSV with full precision: fractions, one column a number."""
    metrics = tuple(dict.fromkeys((*SHOWN, data.space.metric)))
    parameters = list(data.space.parameters)
    header = ["setting", "query", *parameters]
    header += [f"{metric}_{part}" for metric in metrics for part in ("mean", "sd", "seeds")]
    header += [f"{metric}_difference{part}" for metric in COMPARED for part in ("", "_low", "_high")]
    header += [f"paper_{metric}" for metric in SHOWN] + ["not_finished"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for one in summarise(data):
        row: list[Any] = [one.setting, one.query, *(one.values[key] for key in parameters)]
        for metric in metrics:
            values = list(one.metrics[metric].values())
            row += [statistics.fmean(values) if values else "", _std(values) if len(values) > 1 else "", len(values)]
        for metric in COMPARED:
            gap = one.differences.get(metric)
            row += ["", "", ""] if gap is None else [gap.mean, gap.low, gap.high]
        row += ["" if one.published is None else getattr(one.published, metric) for metric in SHOWN]
        writer.writerow([*row, "; ".join(one.unfinished)])
    return buffer.getvalue()


def table_sentence(data: SweepData) -> str:
    """Say what ±, Δ and the paper's columns of the table are."""
    space = data.space
    sentence = f"Percent, training seed {space.seeds[0]}."
    if len(space.seeds) > 1:
        reference = "the best setting" if space.reference is None else f"row “{space.reference}”"
        sentence = (
            f"Percent, mean ± standard deviation over training seeds {', '.join(map(str, space.seeds))}. Δ: mean "
            f"difference to {reference} over the same seeds, with the 95 % interval of the paired t-test."
        )
    published = next((one.published for one in summarise(data) if one.published), None)
    if published is not None:
        dataset = DATASET_LABELS[_published_dataset(data.dataset)]
        sentence += f" Paper: {dataset}, {published.setting}, {published.note}."
    return sentence


def parameter_importance(space: Space, records: Sequence[TrialRecord]) -> dict[str, float]:
    """How much of the metric each parameter decides, as shares that sum to 1, the largest first.

    A random forest learns the metric from the parameters; a parameter matters as much as its fit loses when that
    parameter's values are exchanged between trials.

    Args:
        space: names parameters and metric.
        records: trials; those without the metric are left out.

    Returns:
        Parameter -> share; empty with fewer than 8 trials, one parameter, or where nothing matters.

    Source: Breiman, Random Forests, Machine Learning 2001. Differs: the fit is judged on the trials it has seen, as
        there are too few to keep some apart.
    """
    from sklearn.ensemble import RandomForestRegressor  # a second that only a sweep's report pays
    from sklearn.inspection import permutation_importance

    scored = [record for record in records if space.metric in record.metrics and record.values]
    if len(scored) < IMPORTANCE_TRIALS or len(space.parameters) < 2:
        return {}
    places = np.array(
        [[_place(space.parameters[key], record.values[key]) for key in space.parameters] for record in scored]
    )
    scores = np.array([record.metrics[space.metric] for record in scored])
    forest = RandomForestRegressor(n_estimators=200, random_state=0).fit(places, scores)
    found = permutation_importance(forest, places, scores, n_repeats=20, random_state=0).importances_mean.clip(min=0)
    if not found.any():
        return {}
    shares = dict(zip(space.parameters, (found / found.sum()).tolist(), strict=True))
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def write_sweep_report(data: SweepData, folder: Path) -> None:
    """Write `table.md`, `table.csv`, `table.tex` and the page `index.html`, each atomically."""
    write_whole(folder / "table.md", markdown_table(data))
    write_whole(folder / "table.csv", csv_table(data))
    write_whole(folder / "table.tex", latex_table(data))
    write_whole(folder / "index.html", render_sweep(data))


def render_sweep(data: SweepData) -> str:
    """Return the page as HTML text; every text of a setting, reason, config or fact is escaped."""
    space = data.space
    importance = parameter_importance(space, data.records)
    return page_template("sweep.html.j2").render(
        space=space,
        dataset=DATASET_LABELS.get(data.dataset, data.dataset),
        metric=_metric_label(space.metric),
        query=QUERY_LABELS[space.query],
        verdict=verdict_sentence(data),
        colors=figures.QUERY_COLORS,
        table=settings_table(data),
        table_sentence=table_sentence(data),
        parallel=markup(_parallel(space, data.records)),
        importance=markup(figures.importance_chart(importance) if importance else None),
        learning=markup(_learning(space, data.records)),
        trials=[_trial_row(space, record) for record in data.records],
        with_chosen=any(record.chosen for record in data.records),
        markdown=markdown_table(data),
        latex=latex_table(data),
        csv=csv_table(data),
        facts=data.facts,
        config_yaml=data.config_yaml,
    )


def _values(records: Sequence[TrialRecord], metric: str) -> dict[int, float]:
    """Seed -> metric of the finished trials."""
    done = [record for record in records if record.status == "done" and metric in record.metrics]
    return {record.seed: record.metrics[metric] for record in done}


def _mean(values: Mapping[int, float]) -> float:
    """The mean; below everything where there is nothing, so that it sorts last."""
    return statistics.fmean(values.values()) if values else -1.0


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _ending(record: TrialRecord) -> str:
    return f"seed {record.seed} {record.status}" + (f": {record.reason}" if record.reason else "")


def _published_dataset(dataset: str) -> str:
    """Whose published numbers stand beside a data set's; SYSU-MM01's beside one that nobody else has measured."""
    return dataset if tables.published_rows(dataset) else "sysu_mm01"


def _published(dataset: str) -> tuple[PublishedRow, ...]:
    return tables.published_rows(_published_dataset(dataset))


def _metric_label(metric: str) -> str:
    name = METRIC_LABELS[metric.removeprefix("val_")]
    return f"validation {name}" if metric.startswith("val_") else name


def _title(key: str) -> str:
    """A parameter's short name, which may be broken into lines."""
    return key.rpartition(".")[2].replace("_", " ")


def _spread(values: Mapping[int, float]) -> str:
    if not values:
        return ""
    mean = percent(_mean(values))
    return mean if len(values) == 1 else f"{mean} ± {percent(_std(list(values.values())))}"


def _signed(value: float) -> str:
    return (MINUS if value < 0 else "+") + percent(abs(value))


def _gap(gap: Difference | None) -> str:
    if gap is None:
        return ""
    if gap.low is None or gap.high is None:
        return _signed(gap.mean)
    return f"{_signed(gap.mean)} [{_signed(gap.low)}, {_signed(gap.high)}]"


def _paper(row: PublishedRow) -> str:
    values = [getattr(row, metric) for metric in SHOWN]
    return ", ".join("" if value is None else percent(value) for value in values)


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    special |= {"±": r"$\pm$", MINUS: "$-$", "Δ": r"$\Delta$", "<": r"\textless{}", ">": r"\textgreater{}"}
    return "".join(special.get(sign, sign) for sign in text)


def _place(parameter: Parameter, value: Any) -> float:
    """A value as a number: itself (its logarithm on a logarithmic range), or its place in the list of options."""
    if parameter.range is None:
        return float(parameter.options.index(value))
    return math.log(value) if parameter.range[0] == "loguniform" else float(value)


def _axis(title: str, parameter: Parameter) -> tuple[ParallelAxis, float, float]:
    """An axis of the parallel coordinates, and the places of its two ends."""
    if parameter.range is None:
        names = [word(value) for value in parameter.options]
        top = max(1, len(names) - 1)
        return ParallelAxis(title, [(place / top, name) for place, name in enumerate(names)]), 0.0, float(top)
    low, high = (_place(parameter, bound) for bound in parameter.range[1:])
    ends = [(0.0, word(parameter.range[1])), (1.0, word(parameter.range[2]))]
    return ParallelAxis(title, ends), low, high


def _parallel(space: Space, records: Sequence[TrialRecord]) -> str | None:
    scored = [record for record in records if space.metric in record.metrics and record.values]
    if len(scored) < 2:
        return None
    axes = {key: _axis(_title(key), parameter) for key, parameter in space.parameters.items()}
    lines = np.array(
        [
            [
                (_place(space.parameters[key], record.values[key]) - low) / (high - low)
                for key, (_, low, high) in axes.items()
            ]
            for record in scored
        ]
    )
    return figures.parallel_chart(
        [axis for axis, _, _ in axes.values()],
        lines,
        np.array([record.metrics[space.metric] for record in scored]),
        metric=_metric_label(space.metric),
        stopped=np.array([record.status == "stopped" for record in scored]),
    )


def _learning(space: Space, records: Sequence[TrialRecord]) -> str | None:
    """Curves of every training; of rows that read another query of the same training, the first stands for all."""
    seen: list[dict[str, Any]] = []
    trained = []
    for name, row in space.rows.items():
        if row.overrides not in seen:
            seen.append(row.overrides)
            trained.append(name)
    curves = [
        TrialCurve(record.setting, record.status, record.metrics.get(space.metric), record.learning)
        for record in records
        if record.setting in trained or not space.rows
    ]
    metric = space.metric if space.metric.startswith("val_") else "val_mAP"
    return figures.trial_chart(curves, metric=metric)


def _trial_row(space: Space, record: TrialRecord) -> dict[str, Any]:
    epochs: dict[str, int] = {}
    for one in record.learning:
        epochs[str(one["stage"])] = int(one["epoch"]) + 1
    value = record.metrics.get(space.metric)
    return {
        "name": record.name,
        "setting": record.setting,
        "seed": record.seed,
        "status": record.status,
        "reason": record.reason,
        "epochs": ", ".join(f"{stage} {count}" for stage, count in epochs.items()),
        "metric": "" if value is None else percent(value),
        "chosen": ", ".join(f"{name} {weight:.3g}" for name, weight in record.chosen.items()),
    }

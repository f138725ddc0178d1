"""The report of a sweep: a table of settings with the paper's numbers, and the HTML page.

Metrics are fractions; they are converted to percent only for output.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvilfm.datasets.readers import label_of
from tvilfm.datasets.record import PublishedRow
from tvilfm.place import write_whole
from tvilfm.report.charts.style import QUERY_COLORS
from tvilfm.report.charts.sweeps import ParallelAxis, TrialCurve, importance_chart, parallel_chart, trial_chart
from tvilfm.report.page import markup, page_template
from tvilfm.report.tables import METRIC_LABELS, QUERY_LABELS, percent
from tvilfm.sweeps.results import (
    COMPARED,
    SHOWN,
    Difference,
    SweepData,
    TrialRecord,
    mean_or_last,
    parameter_importance,
    position_of,
    published_dataset,
    summarise,
)
from tvilfm.sweeps.space import Parameter, Space, word

MINUS = "\N{MINUS SIGN}"


def verdict_sentence(data: SweepData) -> str:
    """Return a sentence that says which settings differ significantly from the reference, or which one is best."""
    summaries = summarise(data)
    space, label = data.space, _metric_label(data.space.metric)
    best = max(summaries, key=lambda one: mean_or_last(one.metrics[space.metric]), default=None)
    if best is None or not best.metrics[space.metric]:
        return "No trial finished."
    if space.reference is None:
        return f"Best {label}: {_spread(best.metrics[space.metric])} with {best.setting}."
    reference = next(one for one in summaries if one.setting == space.reference)
    sides: dict[str, list[str]] = {"lower": [], "higher": [], "no clear difference": []}
    for one in summaries:
        gap = one.differences.get("mAP")
        if gap is not None and gap.low is not None and gap.high is not None:
            side = "lower" if gap.high < 0 else "higher" if gap.low > 0 else "no clear difference"
            sides[side].append(one.setting)
    groups = "; ".join(f"{side}: {', '.join(names)}" for side, names in sides.items() if names)
    comparison = (
        f"Compared with it by the 95 % interval of the paired difference in mAP: {groups}."
        if groups
        else "One seed is not enough to compare the other rows with it."
    )
    return f"Row “{reference.setting}” reaches mAP {_spread(reference.metrics['mAP'])}. {comparison}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as printed in every format. The first columns name the setting; the last one shows its trials' status.

    Args:
        header: column titles.
        rows: cells of each setting.
        num_names: number of columns that name the setting.
    """

    header: list[str]
    rows: list[list[str]]
    num_names: int

    def is_number(self, column: int) -> bool:
        """Return whether a column holds numbers and is aligned right."""
        return self.num_names <= column < len(self.header) - 1


def settings_table(data: SweepData) -> Table:
    """Return the table of settings in percent: named rows with their query, or one column per parameter."""
    space, summaries = data.space, summarise(data)
    # A search selects settings by its metric, so this metric comes first. Rows only show the paper's three metrics.
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
    """Return the table as Markdown, followed by a sentence that explains its columns."""
    table = settings_table(data)
    marks = ["---:" if table.is_number(column) else "---" for column in range(len(table.header))]
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        for cells in (table.header, marks, *table.rows)
    ]
    return "\n".join([*lines, "", table_sentence(data)]) + "\n"


def latex_table(data: SweepData) -> str:
    """Return the table as LaTeX with booktabs rules, ready to paste."""
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
    """Return the table as CSV with full precision: fractions, one column per number."""
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
    """Return a sentence that explains ±, Δ and the paper's column of the table."""
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
        dataset = label_of(published_dataset(data.dataset))
        sentence += f" Paper: {dataset}, {published.setting}, {published.note}."
    return sentence


def write_sweep_report(data: SweepData, folder: Path) -> None:
    """Write `table.md`, `table.csv`, `table.tex` and the page `index.html`, each atomically."""
    write_whole(folder / "table.md", markdown_table(data))
    write_whole(folder / "table.csv", csv_table(data))
    write_whole(folder / "table.tex", latex_table(data))
    write_whole(folder / "index.html", render_sweep(data))


def render_sweep(data: SweepData) -> str:
    """Return the page as HTML. Settings, reasons, config and facts are escaped."""
    space = data.space
    importance = parameter_importance(space, data.records)
    return page_template("sweep.html.j2").render(
        space=space,
        dataset=label_of(data.dataset),
        metric=_metric_label(space.metric),
        query=QUERY_LABELS[space.query],
        verdict=verdict_sentence(data),
        colors=QUERY_COLORS,
        table=settings_table(data),
        table_sentence=table_sentence(data),
        parallel=markup(_parallel(space, data.records)),
        importance=markup(importance_chart(importance) if importance else None),
        learning=markup(_learning(space, data.records)),
        trials=[_trial_row(space, record) for record in data.records],
        with_chosen=any(record.chosen for record in data.records),
        markdown=markdown_table(data),
        latex=latex_table(data),
        csv=csv_table(data),
        facts=data.facts,
        config_yaml=data.config_yaml,
    )


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _metric_label(metric: str) -> str:
    name = METRIC_LABELS[metric.removeprefix("val_")]
    return f"validation {name}" if metric.startswith("val_") else name


def _title(key: str) -> str:
    """Return a parameter's short name, with spaces so that it can wrap."""
    return key.rpartition(".")[2].replace("_", " ")


def _spread(values: Mapping[int, float]) -> str:
    if not values:
        return ""
    mean = percent(mean_or_last(values))
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


def _axis(title: str, parameter: Parameter) -> tuple[ParallelAxis, float, float]:
    """Return an axis of the parallel coordinates and the positions of its two ends."""
    if parameter.range is None:
        names = [word(value) for value in parameter.options]
        top = max(1, len(names) - 1)
        return ParallelAxis(title, [(place / top, name) for place, name in enumerate(names)]), 0.0, float(top)
    low, high = (position_of(parameter, bound) for bound in parameter.range[1:])
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
                (position_of(space.parameters[key], record.values[key]) - low) / (high - low)
                for key, (_, low, high) in axes.items()
            ]
            for record in scored
        ]
    )
    return parallel_chart(
        [axis for axis, _, _ in axes.values()],
        lines,
        np.array([record.metrics[space.metric] for record in scored]),
        metric=_metric_label(space.metric),
        stopped=np.array([record.status == "stopped" for record in scored]),
    )


def _learning(space: Space, records: Sequence[TrialRecord]) -> str | None:
    """Return the learning curves. Rows that share a training (they only differ in the query) are drawn once."""
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
    return trial_chart(curves, metric=metric)


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

"""What the trials of a sweep found: records, differences between settings, and which parameters matter.

Settings are compared under the same seeds: the difference between two of them is a mean over seeds of differences, and
its interval that of the paired t-test. Only finished trials count in a mean; the others are listed with the reason.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tvilfm.datasets.published import PublishedRow, published_rows
from tvilfm.sweeps.space import Parameter, Space

SHOWN = ("rank1", "mAP", "mINP")
COMPARED = ("rank1", "mAP")
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
        learning: records of its epochs, see `learning_chart`.
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
    """Read `trials.jsonl`, one record per line."""
    return [TrialRecord(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Return the mean difference over common seeds, with the interval of the paired t-test.

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
    """Return the table's lines: rows in the order of the space, or settings from the best by the space's metric."""
    space = data.space
    by_setting: dict[str, list[TrialRecord]] = {name: [] for name in space.rows}
    for record in data.records:
        by_setting.setdefault(record.setting, []).append(record)
    names = list(by_setting)
    if not space.rows:
        names.sort(key=lambda name: -mean_or_last(_values(by_setting[name], space.metric)))
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


def parameter_importance(space: Space, records: Sequence[TrialRecord]) -> dict[str, float]:
    """Return each parameter's importance for the metric, as shares that sum to 1, largest first.

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
        [[position_of(space.parameters[key], record.values[key]) for key in space.parameters] for record in scored]
    )
    scores = np.array([record.metrics[space.metric] for record in scored])
    forest = RandomForestRegressor(n_estimators=200, random_state=0).fit(places, scores)
    found = permutation_importance(forest, places, scores, n_repeats=20, random_state=0).importances_mean.clip(min=0)
    if not found.any():
        return {}
    shares = dict(zip(space.parameters, (found / found.sum()).tolist(), strict=True))
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _values(records: Sequence[TrialRecord], metric: str) -> dict[int, float]:
    """Return the metric of finished trials by seed."""
    done = [record for record in records if record.status == "done" and metric in record.metrics]
    return {record.seed: record.metrics[metric] for record in done}


def mean_or_last(values: Mapping[int, float]) -> float:
    """Return the mean, or -1 without values, which sorts last."""
    return statistics.fmean(values.values()) if values else -1.0


def _ending(record: TrialRecord) -> str:
    return f"seed {record.seed} {record.status}" + (f": {record.reason}" if record.reason else "")


def published_dataset(dataset: str) -> str:
    """Return the dataset whose published results are shown: the dataset itself, or else SYSU-MM01."""
    return dataset if published_rows(dataset) else "sysu_mm01"


def _published(dataset: str) -> tuple[PublishedRow, ...]:
    return published_rows(published_dataset(dataset))


def position_of(parameter: Parameter, value: Any) -> float:
    """Return a value as a number: itself (its logarithm on a logarithmic range), or its index in the options."""
    if parameter.range is None:
        return float(parameter.options.index(value))
    return math.log(value) if parameter.range[0] == "loguniform" else float(value)

"""The results of a sweep: trial records, differences between settings, and importance of parameters.

Settings are compared under the same seeds. The difference between two settings is the mean of the differences per seed,
with the confidence interval of the paired t-test. Means include only finished trials; the other trials are listed with
the reason.
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

from tvilfm.datasets.readers import published_rows
from tvilfm.datasets.record import PublishedRow
from tvilfm.sweeps.space import Parameter, Space

SHOWN = ("rank1", "mAP", "mINP")
COMPARED = ("rank1", "mAP")
CONFIDENCE = 0.95
# Minimum number of trials for the importance of parameters.
IMPORTANCE_TRIALS = 8


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial of a sweep, as stored in `trials.jsonl`.

    Attributes:
        name: unique in the sweep.
        setting: row name or parameter values as text; trials of one setting differ only in their seed.
        values: parameter -> value; empty for rows.
        seed: seed of the run.
        query: query of the results to which `metrics` belong.
        status: done, stopped (early, by the scheduler) or failed.
        reason: reason of a failure, in one line.
        metrics: available metrics, as fractions: rank1, mAP, mINP of test identities and val_rank1, val_mAP of
            validation identities; for a stopped trial, those of its last validation.
        chosen: ensemble weights that the free sweep of the trial chose.
        learning: records of the trial's epochs; see `learning_chart`.
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
    """Mean over seeds of a setting's metric minus the reference's, with its 95 % interval (None for one seed)."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class SettingSummary:
    """One line of the table.

    Attributes:
        setting, values, query: as in the setting's trials.
        metrics: name -> values of finished trials, by seed.
        differences: name -> difference to the reference over the seeds that both finished; empty for the reference.
        unfinished: seed, status and reason of each trial that did not finish.
        published: row of the paper that is shown beside it.
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
    """The data of a sweep's report.

    Attributes:
        space: search space.
        records: records of all trials.
        dataset: as in `data.name`.
        facts: facts about the sweep in display order, e.g. protocol, text source, versions, time.
        config_yaml: base config of all trials.
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
        The difference, without an interval for one common seed; None without a common seed.

    Source: Student's paired t, two-sided, 95 %. Differs: none known.
    """
    from scipy.stats import t  # imported here: takes half a second, and only reports need it

    gaps = [values[seed] - reference[seed] for seed in sorted(values) if seed in reference]
    if not gaps:
        return None
    mean = statistics.fmean(gaps)
    if len(gaps) == 1:
        return Difference(mean=mean, low=None, high=None)
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return Difference(mean=mean, low=mean - half, high=mean + half)


def summarise(data: SweepData) -> list[SettingSummary]:
    """Return the lines of the table: rows in the order of the space, or settings sorted by the metric, best first."""
    space = data.space
    by_setting: dict[str, list[TrialRecord]] = {name: [] for name in space.rows}
    for record in data.records:
        by_setting.setdefault(record.setting, []).append(record)
    names = list(by_setting)
    if not space.rows:
        names.sort(key=lambda name: -mean_or_last(_values(by_setting[name], space.metric)))
    reference = by_setting[space.reference or names[0]] if names else []
    published = {row.method: row for row in reversed(_published(data.dataset))}  # the first of equal methods is kept
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

    A random forest learns the metric from the parameters. The importance of a parameter is the loss of fit when its
    values are permuted between trials.

    Args:
        space: space with the parameters and the metric.
        records: trials; those without the metric are skipped.

    Returns:
        Parameter -> share; empty for fewer than 8 trials, for one parameter, or if no parameter has an effect.

    Source: Breiman, Random Forests, Machine Learning 2001. Differs: the fit is scored on its training trials, because
        there are too few to hold some out.
    """
    # Imported here: takes a second, and only a sweep's report needs it.
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    scored = [record for record in records if space.metric in record.metrics and record.values]
    if len(scored) < IMPORTANCE_TRIALS or len(space.parameters) < 2:
        return {}
    places = np.array(
        [[position_of(space.parameters[key], record.values[key]) for key in space.parameters] for record in scored]
    )
    scores = np.array([record.metrics[space.metric] for record in scored])
    forest = RandomForestRegressor(n_estimators=200, random_state=0).fit(places, scores)
    losses = permutation_importance(forest, places, scores, n_repeats=20, random_state=0).importances_mean.clip(min=0)
    if not losses.any():
        return {}
    shares = dict(zip(space.parameters, (losses / losses.sum()).tolist(), strict=True))
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _values(records: Sequence[TrialRecord], metric: str) -> dict[int, float]:
    """Return seed -> metric of the finished trials."""
    done = [record for record in records if record.status == "done" and metric in record.metrics]
    return {record.seed: record.metrics[metric] for record in done}


def mean_or_last(values: Mapping[int, float]) -> float:
    """Return the mean of the values; without values, return -1, which sorts last."""
    return statistics.fmean(values.values()) if values else -1.0


def _ending(record: TrialRecord) -> str:
    return f"seed {record.seed} {record.status}" + (f": {record.reason}" if record.reason else "")


def published_dataset(dataset: str) -> str:
    """Return the dataset whose published results are shown: the dataset itself if it has any, else SYSU-MM01."""
    return dataset if published_rows(dataset) else "sysu_mm01"


def _published(dataset: str) -> tuple[PublishedRow, ...]:
    return published_rows(published_dataset(dataset))


def position_of(parameter: Parameter, value: Any) -> float:
    """Return a value as a number: its index in the options, or the value in a range (logarithm for loguniform)."""
    if parameter.range is None:
        return float(parameter.options.index(value))
    return math.log(value) if parameter.range[0] == "loguniform" else float(value)

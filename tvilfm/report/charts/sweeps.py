"""Charts of a sweep: parallel coordinates, parameter importance, and trials over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.lines import Line2D

from tvilfm.report.charts.style import (
    INK,
    LABEL_BOX,
    LEGEND,
    MUTED,
    SETTING_COLORS,
    FloatArray,
    new_figure,
    score_colors,
    svg,
)
from tvilfm.report.tables import METRIC_LABELS, percent


class ParallelAxis(NamedTuple):
    """One parameter of `parallel_chart`.

    Args:
        label: its name.
        ticks: positions, 0-1, and their value labels.
    """

    label: str
    ticks: Sequence[tuple[float, str]]


class TrialCurve(NamedTuple):
    """One trial of `trial_chart`.

    Args:
        setting: name of its setting; trials of one setting share a colour.
        status: done, stopped or failed.
        score: its final metric; None if unknown.
        learning: records with `stage`, `epoch` and validation metrics.
    """

    setting: str
    status: str
    score: float | None
    learning: Sequence[Mapping[str, Any]]


def parallel_chart(
    axes: Sequence[ParallelAxis],
    places_TA: FloatArray,
    scores_T: FloatArray,
    *,
    metric: str,
    stopped: npt.NDArray[np.bool_],
) -> str:
    """Draw every trial of a sweep as a line through its parameter values to its metric.

    Args:
        axes: the parameters.
        places_TA: position of each trial on each axis, 0-1.
        scores_T: metric of each trial, a fraction.
        metric: name of the metric.
        stopped: which trials were stopped early; these are drawn dashed.

    Returns:
        SVG text.
    """
    low, high = float(scores_T.min()), float(scores_T.max())
    heights_T = (scores_T - low) / (high - low) if high > low else np.full(len(scores_T), 0.5)
    last = ParallelAxis(
        f"{metric} (%)", [(0.0, percent(low)), (1.0, percent(high))] if high > low else [(0.5, percent(low))]
    )
    columns = [*axes, last]
    with new_figure(1120, 360) as figure:
        axis = figure.subplots()
        colors = score_colors(heights_T)
        for trial in np.argsort(heights_T):
            best = bool(heights_T[trial] == heights_T.max())
            axis.plot(
                np.arange(len(columns)),
                [*places_TA[trial], heights_T[trial]],
                color=colors[trial],
                linewidth=3 if best else 1.4,
                linestyle="--" if stopped[trial] else "-",
                alpha=1 if best else 0.8,
            )
        for place, column in enumerate(columns):
            axis.plot([place, place], [0, 1], color=MUTED, linewidth=1, zorder=0)
            axis.text(place, 1.09, column.label, ha="center", va="bottom", fontsize=12, fontweight="bold")
            for height, name in column.ticks:
                axis.text(place + 0.02, height, name, va="center", fontsize=11.5, color=INK, bbox=LABEL_BOX)
        axis.set_xlim(-0.05, len(columns) - 0.75)
        axis.set_ylim(-0.06, 1.2)
        axis.set_axis_off()
        return svg(figure, "parallel", f"Parameters and {metric} of every trial")


def importance_chart(shares: Mapping[str, float], *, width: int = 548) -> str:
    """Draw the importance of each parameter for the metric as bars.

    Args:
        shares: parameter -> share, in drawing order.
        width: pixels.

    Returns:
        SVG text.
    """
    with new_figure(width, 60 + 34 * len(shares)) as figure:
        axis = figure.subplots()
        positions = np.arange(len(shares))
        values = 100 * np.array(list(shares.values()))
        axis.barh(positions, values, height=0.58, color="#4b2a84")
        for position, value in enumerate(values):
            axis.text(value + 1.5, position, f"{value:.0f}", va="center", fontsize=12.5, fontweight="bold")
        axis.set_yticks(positions, list(shares))
        axis.tick_params(axis="y", labelcolor=INK, labelsize=12.5)
        axis.tick_params(length=0)
        axis.set_ylim(len(shares) - 0.4, -0.6)
        axis.set_xlim(0, 112)
        axis.set_xticks([0, 25, 50, 75, 100])
        axis.spines["left"].set_visible(False)
        axis.grid(axis="x")
        return svg(figure, "importance", "Importance of each parameter for the metric")


def trial_chart(curves: Sequence[TrialCurve], *, metric: str, width: int = 1120) -> str | None:
    """Draw a validation metric per epoch, one line per trial, with one panel per training stage side by side.

    Up to eight settings have one colour each and a legend. With more settings, darker lines have higher scores. A cross
    marks the end of a trial that was stopped or failed.

    Args:
        curves: the trials.
        metric: key of the learning records, a fraction.
        width: pixels.

    Returns:
        SVG text, or None if no trial has the metric.
    """
    stages: dict[str, list[tuple[TrialCurve, dict[int, float]]]] = {}
    for curve in curves:
        of_stage: dict[str, dict[int, float]] = {}
        for record in curve.learning:
            if metric in record:
                of_stage.setdefault(str(record["stage"]), {})[int(record["epoch"])] = 100 * float(record[metric])
        for stage, values in of_stage.items():
            stages.setdefault(stage, []).append((curve, values))
    if not stages:
        return None
    settings = list(dict.fromkeys(curve.setting for curve in curves))
    few = len(settings) <= len(SETTING_COLORS)
    scores = np.array([np.nan if curve.score is None else curve.score for curve in curves])
    spread = float(np.nanmax(scores) - np.nanmin(scores)) if np.isfinite(scores).any() else 0.0
    places = (scores - np.nanmin(scores)) / spread if spread else np.zeros(len(scores))
    shades = dict(zip(map(id, curves), score_colors(np.nan_to_num(places)), strict=True))
    with new_figure(width, 300 + (18 * -(-len(settings) // 3) if few else 0)) as figure:
        axes = np.atleast_1d(figure.subplots(1, len(stages)))
        for axis, (stage, lines) in zip(axes, stages.items(), strict=True):
            for curve, values in lines:
                color = SETTING_COLORS[settings.index(curve.setting)] if few else shades[id(curve)]
                epochs = sorted(values)
                heights = [values[epoch] for epoch in epochs]
                axis.plot(epochs, heights, color=color, linewidth=1.6, alpha=0.85, label=curve.setting if few else None)
                # The last record of an unfinished trial tells in which stage it ended.
                if curve.status != "done" and str(curve.learning[-1]["stage"]) == stage:
                    axis.plot(epochs[-1:], heights[-1:], marker="x", markersize=7, markeredgewidth=2, color=color)
            axis.set_title(f"{stage}: validation {METRIC_LABELS[metric.removeprefix('val_')]} (%)")
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid()
        if few:
            handles = [
                Line2D([], [], color=color, label=setting)
                for color, setting in zip(SETTING_COLORS, settings, strict=False)
            ]
            figure.legend(handles=handles, loc="outside lower left", ncols=3, **LEGEND)
        return svg(figure, "trials", "Validation metric per epoch of every trial")

"""The comparison of query modalities by rank-1 and mAP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvilfm.evaluation.results import ResultRow
from tvilfm.report.charts.style import INK, MUTED, QUERY_COLORS, new_figure, svg
from tvilfm.report.tables import METRIC_LABELS, QUERY_LABELS, percent


def comparison_chart(rows: Sequence[ResultRow], *, chance: float | None = None, width: int = 548) -> str:
    """Draw rank-1 and mAP of the headline rows as bars with their standard deviation over trials.

    Args:
        rows: one per query modality, in drawing order; at least one.
        chance: expected rank-1 of a random ranking, a fraction; drawn as a dotted line.
        width: pixels.

    Returns:
        SVG text.
    """
    metrics = ("rank1", "mAP")
    with new_figure(width, 84 + 46 * len(rows)) as figure:
        axes = figure.subplots(1, len(metrics), sharey=True)
        positions = np.arange(len(rows))
        for axis, metric in zip(axes, metrics, strict=True):
            means = np.array([100 * row.metric(metric) for row in rows])
            stds = np.array([100 * row.std[metric] if row.num_trials > 1 else 0.0 for row in rows])
            axis.barh(positions, means, height=0.58, color=[QUERY_COLORS[row.query] for row in rows])
            spread = stds > 0
            if spread.any():
                axis.errorbar(
                    means[spread],
                    positions[spread],
                    xerr=stds[spread],
                    fmt="none",
                    ecolor=INK,
                    elinewidth=1.2,
                    capsize=3,
                )
            for position, mean, std in zip(positions, means, stds, strict=True):
                axis.text(mean + std + 2.5, position, f"{mean:.1f}", va="center", fontsize=12.5, fontweight="bold")
            if metric == "rank1" and chance is not None:
                axis.axvline(100 * chance, color=INK, linestyle=":", linewidth=1.2)
                axis.annotate(
                    f"chance {percent(chance)}",
                    (100 * chance, len(rows) - 0.5),
                    xytext=(4, 3),
                    textcoords="offset points",
                    fontsize=11,
                    color=MUTED,
                    va="top",
                )
            axis.set_title(f"{METRIC_LABELS[metric]} (%)")
            axis.set_xlim(0, 118)
            axis.set_ylim(len(rows) - 0.12, -0.5)
            axis.set_xticks([0, 25, 50, 75, 100])
            axis.grid(axis="x")
            axis.spines["left"].set_visible(False)
            axis.tick_params(length=0)
        axes[0].set_yticks(positions, [QUERY_LABELS[row.query] for row in rows])
        axes[0].tick_params(axis="y", labelcolor=INK, labelsize=12.5)
        return svg(figure, "comparison", "Rank-1 and mAP of each query modality, with standard deviation over trials")

"""Rank-1 of text, fusion and ensemble under noise in the sentences, beside infrared alone."""

from __future__ import annotations

import numpy as np

from tvilfm.evaluation.results import Results
from tvilfm.report.charts.style import (
    INK,
    QUERY_COLORS,
    QUERY_MARKERS,
    legend_below,
    new_figure,
    svg,
)
from tvilfm.report.noise import noise_rows
from tvilfm.report.tables import QUERY_LABELS


def noise_chart(results: Results, *, width: int = 760) -> str:
    """Draw rank-1 of each query with text, one line of the chart per kind of noise, in the order of the config.

    Args:
        results: with `text_noise`.
        width: pixels.

    Returns:
        SVG text. A vertical line is infrared alone.
    """
    rows = noise_rows(results)
    infrared = next((row for row in results.default_rows if row.query == "infrared"), None)
    with new_figure(width, 96 + 25 * len(rows)) as figure:
        axis = figure.subplots()
        positions = np.arange(len(rows))
        if infrared is not None:
            axis.axvline(
                100 * infrared.rank1, color=QUERY_COLORS["infrared"], linewidth=2, label=QUERY_LABELS["infrared"]
            )
        for query in ("text", "fusion", "ensemble"):
            values = [100 * by_query[query].rank1 if query in by_query else np.nan for by_query in rows.values()]
            axis.plot(
                values,
                positions,
                color=QUERY_COLORS[query],
                linestyle="none",
                marker=QUERY_MARKERS[query],
                markersize=8,
                markeredgecolor="white",
                label=QUERY_LABELS[query],
            )
        axis.set_yticks(positions, list(rows))
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlim(left=-2)
        axis.set_title("Rank-1 by the sentence's quality (%)")
        axis.grid()
        axis.spines["left"].set_visible(False)
        axis.tick_params(length=0)
        axis.tick_params(axis="y", labelcolor=INK)
        legend_below(figure, axis, columns=4)
        return svg(figure, "noise", "Rank-1 of text, fusion and ensemble by kind of noise, beside infrared alone")

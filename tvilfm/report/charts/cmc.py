"""Cumulative matching characteristics."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tvilfm.report.charts.style import (
    MUTED,
    QUERY_COLORS,
    QUERY_DASHES,
    QUERY_MARKERS,
    FloatArray,
    legend_below,
    new_figure,
    ordered,
    svg,
)
from tvilfm.report.tables import QUERY_LABELS

CMC_RANKS = 20


def cmc_chart(
    cmc: Mapping[str, FloatArray], *, chance: float | None = None, width: int = 548, height: int = 320
) -> str:
    """Draw the cumulative match characteristic at ranks 1-20, one line per query modality.

    Args:
        cmc: query -> fractions at ranks 1, 2, ...; at most the first 20 are drawn.
        chance: expected rank-1 of a random ranking, a fraction. Its curve is min(1, rank * chance). This is exact if
            each identity counts once and all identities have equally many gallery images, else slightly too high.
        width, height: pixels.

    Returns:
        SVG text.
    """
    with new_figure(width, height) as figure:
        axis = figure.subplots()
        for query in ordered(cmc):
            values = 100 * np.asarray(cmc[query], dtype=np.float64)[:CMC_RANKS]
            axis.plot(
                np.arange(1, len(values) + 1),
                values,
                color=QUERY_COLORS[query],
                linestyle=QUERY_DASHES[query],
                marker=QUERY_MARKERS[query],
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.6,
                label=QUERY_LABELS[query],
            )
        if chance is not None:
            ranks = np.arange(1, CMC_RANKS + 1)
            axis.plot(
                ranks,
                100 * np.minimum(1, chance * ranks),
                color=MUTED,
                linestyle=":",
                linewidth=1.5,
                label="chance",
            )
        axis.set_xlim(0.5, CMC_RANKS + 0.5)
        axis.set_ylim(0, 103)
        axis.set_xticks([1, 5, 10, 15, 20])
        axis.set_xlabel("k")
        axis.set_title("CMC: right person among the top k images (%)")
        axis.grid()
        legend_below(figure, axis, columns=3)
        return svg(figure, "cmc", "Cumulative match characteristic, ranks 1 to 20")

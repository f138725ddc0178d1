"""False accepts and false rejects of score thresholds in open-set search."""

from __future__ import annotations

from collections.abc import Mapping

from tvilfm.evaluation.open_set import OpenSet
from tvilfm.report.charts.style import INK, QUERY_COLORS, legend_below, new_figure, svg
from tvilfm.report.tables import VOTES_LABELS

PANEL_WIDTH = 272
FALSE_ACCEPTS, FALSE_REJECTS = QUERY_COLORS["infrared"], QUERY_COLORS["text"]


def open_set_chart(open_set: Mapping[str, OpenSet], *, height: int = 260) -> str:
    """Draw both errors over the threshold, one panel per set of voting modalities, with the fitted threshold.

    Args:
        open_set: as in `Results.open_set`; at least one.
        height: pixels.

    Returns:
        SVG text.
    """
    with new_figure(PANEL_WIDTH * len(open_set), height) as figure:
        panels = figure.subplots(1, len(open_set), sharey=True, squeeze=False)[0]
        for axis, (name, errors) in zip(panels, open_set.items(), strict=True):
            for values, color, dash, label in (
                (errors.false_accepts, FALSE_ACCEPTS, "-", "false accepts"),
                (errors.false_rejects, FALSE_REJECTS, "--", "false rejects"),
            ):
                percents = [100 * value for value in values]
                axis.plot(errors.thresholds, percents, color=color, linestyle=dash, label=label)
            if errors.fitted is not None:
                axis.axvline(errors.fitted, color=INK, linestyle=":", linewidth=1.5, label="fitted on validation")
            axis.set_title(VOTES_LABELS[name], fontsize=11)
            axis.set_xlabel("score")
            axis.set_ylim(0, 103)
            axis.grid()
        panels[0].set_ylabel("%")
        legend_below(figure, panels[0], columns=3)
        return svg(figure, "open-set", "False accepts and false rejects over the score threshold")

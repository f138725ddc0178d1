"""Learning curves of the training stages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvilfm.report.charts.style import INK, LEGEND, new_figure, svg
from tvilfm.report.tables import METRIC_LABELS

_LOSS_WORDS = {"loss", "id", "wrt", "center"}


def learning_chart(records: Sequence[Mapping[str, Any]], *, panel: int = 280) -> str | None:
    """Draw loss terms and validation metrics per epoch, the panels of a stage side by side.

    A loss term is a numeric key that contains the word "loss", "id", "wrt" or "center" (`loss`, `id_loss`, `wrt`,
    `loss/id`). A validation metric is `val_rank1` or `val_mAP`, a fraction. Other keys (rates, times) are not drawn. A
    resumed run repeats epochs: records of the same stage and epoch are merged, and later values win.

    Args:
        records: dicts with `stage`, `epoch` and any of the keys above.
        panel: width of one panel in pixels.

    Returns:
        SVG text, or None if there is nothing to draw.
    """
    panels = _learning_panels(records)
    if not panels:
        return None
    columns = min(4, len(panels))
    num_rows = -(-len(panels) // columns)
    shades = (INK, "#0077bb", "#b35900", "#7a8793", "#a3367a", "#2a8c6b")
    with new_figure(panel * columns, 270 * num_rows) as figure:
        axes = np.atleast_1d(figure.subplots(num_rows, columns)).reshape(-1)
        for axis, (title, series, is_percent) in zip(axes, panels, strict=False):
            for shade, (name, values) in zip(shades, series.items(), strict=False):
                epochs = sorted(values)
                heights = [values[epoch] * (100 if is_percent else 1) for epoch in epochs]
                marker = "o" if len(epochs) < 16 else ""
                axis.plot(epochs, heights, color=shade, linewidth=1.8, marker=marker, markersize=3.5, label=name)
            axis.set_title(title)
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_ylim(bottom=0)
            if is_percent:
                axis.set_ylim(0, 103)
            axis.grid()
            axis.legend(loc="upper left", bbox_to_anchor=(0, -0.24), ncols=2, **LEGEND)
        for axis in axes[len(panels) :]:
            axis.remove()
        return svg(figure, "learning", "Losses and validation metrics per epoch of each training stage")


def _learning_panels(
    records: Sequence[Mapping[str, Any]],
) -> list[tuple[str, dict[str, dict[int, float]], bool]]:
    """Group records into panels: (title, {line name: {epoch: value}}, whether values are fractions)."""
    stages: dict[str, tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]] = {}
    for record in records:
        losses, validation = stages.setdefault(str(record["stage"]), ({}, {}))
        epoch = int(record["epoch"])
        for key, value in record.items():
            if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
                continue
            if key in ("val_rank1", "val_mAP"):
                validation.setdefault(METRIC_LABELS[key[len("val_") :]], {})[epoch] = float(value)
            elif not key.startswith("val_") and _LOSS_WORDS & set(re.split(r"[^a-z]+", key.lower())):
                losses.setdefault(key, {})[epoch] = float(value)
    panels = []
    for stage, (losses, validation) in stages.items():
        if losses:
            panels.append((f"{stage}: loss", losses, False))
        if validation:
            panels.append((f"{stage}: validation (%)", validation, True))
    return panels

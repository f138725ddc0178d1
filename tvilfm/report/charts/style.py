"""The shared style of all charts: colours, fonts, and rendering to self-contained inline SVG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tvilfm.terms import QUERIES

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
IntArray: TypeAlias = npt.NDArray[np.integer[Any]]
# Mostly hues of the colour-blind-safe "vibrant" and Okabe-Ito palettes, chosen to differ in lightness too.
QUERY_COLORS: Mapping[str, str] = {
    "infrared": "#d55e00",
    "visible": "#8a8a00",
    "text": "#2b8cd0",
    "fusion": "#006a55",
    "ensemble": "#4b2a84",
}
QUERY_MARKERS: Mapping[str, str] = {"infrared": "^", "visible": "v", "text": "s", "fusion": "D", "ensemble": "P"}
QUERY_DASHES: Mapping[str, str] = {"infrared": "-", "visible": "-", "text": "--", "fusion": "-", "ensemble": "-"}
INK, MUTED, RULE = "#1f2328", "#656d76", "#d5dae0"
# Eight hues that differ in lightness too, for the first eight settings of a sweep.
SETTING_COLORS = ("#1f2328", "#d55e00", "#0077bb", "#8a8a00", "#006a55", "#a3367a", "#7a8793", "#4b2a84")
STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 12,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.color": RULE,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "text.color": INK,
    "grid.color": "#eceff2",
    "legend.frameon": False,
    "legend.fontsize": 12,
    "lines.linewidth": 2,
    "savefig.facecolor": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
}
LEGEND: Mapping[str, Any] = {
    "borderaxespad": 0.6,
    "borderpad": 0.1,
    "handlelength": 1.1,
    "handletextpad": 0.5,
    "columnspacing": 1.2,
    "labelspacing": 0.3,
    "labelcolor": INK,
}
LABEL_BOX: Mapping[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}


@contextmanager
def new_figure(width: int, height: int) -> Iterator[Figure]:
    """Yield a figure of `width` x `height` SVG units in the page's style."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, height / 72))
        figure.set_layout_engine("constrained", w_pad=8 / 72, h_pad=3 / 72)
        yield figure


def svg(figure: Figure, name: str, description: str) -> str:
    """Render a figure as inline SVG: ids prefixed with `name`, no XML prolog, no metadata, size in pixels."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=144)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="([\d.]+)pt"', r'\1 width="\2"', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="([\d.]+)pt"', r'\1 height="\2"', text, count=1)
    label = html.escape(description, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def score_colors(places: FloatArray) -> list[tuple[float, ...]]:
    """Return colours from light (low) to dark (high), without the lightest tones, which are invisible on white."""
    colors = matplotlib.colormaps["viridis_r"](0.12 + 0.88 * np.asarray(places, dtype=np.float64))
    return [tuple(color) for color in colors.tolist()]


def legend_below(figure: Figure, axis: Axes, *, columns: int) -> None:
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=columns,
        **{**LEGEND, "handlelength": 2.2},
    )


def ordered(by_query: Mapping[str, object]) -> list[str]:
    return [query for query in QUERIES if query in by_query]


def inside(position: float, edges: FloatArray) -> float:
    """Clip the position of a centred label so that it stays clear of both ends of an axis."""
    margin = 0.18 * (edges[-1] - edges[0])
    return float(np.clip(position, edges[0] + margin, edges[-1] - margin))

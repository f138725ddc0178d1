"""The charts of the result page, each as one self-contained inline SVG string.

Every chart is a function from arrays to SVG, drawn on its own `matplotlib.figure.Figure`: pyplot and its
global figures are never used. Sizes are CSS pixels (one SVG unit = one pixel), so a 12-unit label is a
12-pixel label on the page. Text stays text and takes the page's font. A query modality has the same colour
and marker in every chart.

Shape suffixes: Q query rows, G gallery rows, N rows of both, D feature.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from tvilfm.report.tables import METRIC_LABELS, QUERIES, QUERY_LABELS, ResultRow, percent

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
IntArray: TypeAlias = npt.NDArray[np.integer[Any]]

# Four of the colour-blind-safe "vibrant" and Okabe-Ito hues, chosen to differ in lightness too.
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
CMC_RANKS = 20
TSNE_IDENTITIES = 20
TSNE_IMAGES_PER_SIDE = 12
# Beyond this many points in one chart the points become one bitmap inside the SVG.
VECTOR_POINTS = 2000
DISTANCE_PAIRS = 4_000_000
_LOSS_WORDS = {"loss", "id", "wrt", "center"}
# Eight hues that differ in lightness too, in the order of the first eight settings of a sweep.
_SETTING_COLORS = ("#1f2328", "#d55e00", "#0077bb", "#8a8a00", "#006a55", "#a3367a", "#7a8793", "#4b2a84")

_STYLE: Any = {
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


class RetrievalFeatures(NamedTuple):
    """What one query modality searched with, and what it searched in.

    Args:
        query_QD: float32, unit vectors.
        query_pids: int, Q.
        gallery_GD: float32, unit vectors (visible images).
        gallery_pids: int, G.
    """

    query_QD: FloatArray
    query_pids: IntArray
    gallery_GD: FloatArray
    gallery_pids: IntArray


class ParallelAxis(NamedTuple):
    """One parameter of `parallel_chart`.

    Args:
        label: its name.
        ticks: places, 0-1, and the values that stand there.
    """

    label: str
    ticks: Sequence[tuple[float, str]]


class TrialCurve(NamedTuple):
    """One trial of `trial_chart`.

    Args:
        setting: what it tried; trials of one setting share a colour.
        status: done, stopped or failed.
        score: what it came to; None where unknown.
        learning: records with `stage`, `epoch` and validation metrics.
    """

    setting: str
    status: str
    score: float | None
    learning: Sequence[Mapping[str, Any]]


def comparison_chart(rows: Sequence[ResultRow], *, chance: float | None = None, width: int = 548) -> str:
    """Draw rank-1 and mAP of the headline rows as bars with their standard deviation over trials.

    Args:
        rows: one a query modality, in the order to draw; at least one.
        chance: expected rank-1 of a random ranking, a fraction; a dotted line.
        width: pixels.

    Returns:
        SVG text.
    """
    metrics = ("rank1", "mAP")
    with _figure(width, 84 + 46 * len(rows)) as figure:
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
        return _svg(figure, "comparison", "Rank-1 and mAP of each query modality, with standard deviation over trials")


def cmc_chart(
    cmc: Mapping[str, FloatArray], *, chance: float | None = None, width: int = 548, height: int = 320
) -> str:
    """Draw the cumulative match characteristic at ranks 1-20, one line a query modality.

    Args:
        cmc: query -> fractions at ranks 1, 2, ...; at most the first 20 are drawn.
        chance: expected rank-1 of a random ranking, a fraction. Its curve is min(1, rank * chance): exact where
            each identity counts once and all have as many gallery images, else slightly too high.
        width, height: pixels.

    Returns:
        SVG text.
    """
    with _figure(width, height) as figure:
        axis = figure.subplots()
        for query in _ordered(cmc):
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
        axis.set_title("CMC: right person among the first k found (%)")
        axis.grid()
        _legend_below(figure, axis, columns=3)
        return _svg(figure, "cmc", "Cumulative match characteristic, ranks 1 to 20")


def tsne_chart(features: Mapping[str, RetrievalFeatures], *, seed: int = 0, panel: int = 280) -> str | None:
    """Draw queries and visible gallery of up to 20 identities in two dimensions, one panel a query modality.

    Colour is identity, shape is modality; a thin line joins a query to the middle of its identity's gallery
    images. The same identities are drawn in every panel. t-SNE keeps neighbourhoods, not distances: compare
    the mixing of shapes inside a colour, not the gaps between colours.

    Args:
        features: query modality -> unit vectors and identities of both sides.
        seed: of the choice of identities and images and of t-SNE.
        panel: width of one panel in pixels.

    Returns:
        SVG text, or None where no identity is in every panel or a panel would have fewer than 6 points.

    Source: the paper, figure 4.
    """
    queries = _ordered(features)
    shared: set[int] | None = None
    for query in queries:
        _, query_pids, _, gallery_pids = features[query]
        both = set(query_pids.tolist()) & set(gallery_pids.tolist())
        shared = both if shared is None else shared & both
    if not shared:
        return None
    generator = np.random.default_rng(seed)
    pids = np.sort(generator.permutation(np.array(sorted(shared)))[:TSNE_IDENTITIES])

    panels = []
    for query in queries:
        query_QD, query_pids, gallery_GD, gallery_pids = features[query]
        query_index = _pick(query_pids, pids, generator)
        gallery_index = _pick(gallery_pids, pids, generator)
        points_ND = np.concatenate([query_QD[query_index], gallery_GD[gallery_index]])
        if len(points_ND) < 6:
            return None
        embedded = _embed(points_ND, seed)
        labels = np.concatenate([query_pids[query_index], gallery_pids[gallery_index]])
        panels.append((query, embedded, labels, len(query_index)))

    colors = _identity_colors(len(pids))
    raster = sum(len(labels) for _, _, labels, _ in panels) > VECTOR_POINTS
    with _figure(panel * len(queries), panel + 30) as figure:
        axes = np.atleast_1d(figure.subplots(1, len(queries)))
        for axis, (query, embedded, labels, num_queries) in zip(axes, panels, strict=True):
            for color, pid in zip(colors, pids, strict=True):
                mine = labels == pid
                query_points = embedded[:num_queries][mine[:num_queries]]
                gallery_points = embedded[num_queries:][mine[num_queries:]]
                middle = np.median(gallery_points, axis=0)
                axis.add_collection(
                    LineCollection(
                        [[point, middle] for point in query_points],
                        colors=[color],
                        linewidths=0.6,
                        alpha=0.35,
                        rasterized=raster,
                    )
                )
                axis.scatter(
                    *gallery_points.T,
                    s=26,
                    marker="o",
                    facecolor="white",
                    edgecolor=color,
                    linewidth=1.3,
                    zorder=2,
                    rasterized=raster,
                )
                axis.scatter(
                    *query_points.T,
                    s=26,
                    marker=QUERY_MARKERS[query],
                    color=color,
                    linewidth=0,
                    alpha=0.9,
                    zorder=3,
                    rasterized=raster,
                )
            axis.set_title(QUERY_LABELS[query], color=QUERY_COLORS[query])
            axis.set_xticks([])
            axis.set_yticks([])
            axis.margins(0.05)
            for spine in axis.spines.values():
                spine.set_visible(True)
            shape: dict[str, Any] = {"color": MUTED, "linestyle": "none", "markersize": 6}
            handles = [
                Line2D([], [], marker=QUERY_MARKERS[query], label="query", **shape),
                Line2D([], [], marker="o", markerfacecolor="white", label="visible gallery", **shape),
            ]
            axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 0), ncols=2, **_LEGEND)
        return _svg(
            figure,
            "tsne",
            f"t-SNE of queries and gallery of {len(pids)} identities, one panel a query modality",
        )


def distance_chart(features: Mapping[str, RetrievalFeatures], *, seed: int = 0, panel: int = 280) -> str | None:
    """Draw the cosine distances of query-gallery pairs of one person and of different people, with their gap delta.

    All pairs are used, without a protocol's camera rule; a random part of the queries where there are more
    than four million pairs.

    Args:
        features: query modality -> unit vectors and identities of both sides.
        seed: of the choice of queries.
        panel: width of one panel in pixels.

    Returns:
        SVG text, or None where no modality has both kinds of pairs.

    Source: the paper, figure 4.
    """
    panels = []
    for query in _ordered(features):
        same, different = pair_distances(features[query], seed=seed)
        if len(same) and len(different):
            panels.append((query, same, different))
    if not panels:
        return None
    low = min(float(np.quantile(same, 0.001)) for _, same, _ in panels)
    high = max(float(np.quantile(different, 0.9999)) for _, _, different in panels)
    high = max(high, max(float(np.quantile(same, 0.9999)) for _, same, _ in panels))
    edges = np.linspace(low, max(high, low + 1e-3), 61)
    with _figure(panel * len(panels), 270) as figure:
        axes = np.atleast_1d(figure.subplots(1, len(panels), sharex=True))
        for axis, (query, same, different) in zip(axes, panels, strict=True):
            color = QUERY_COLORS[query]
            top = 0.0
            for values, shade, alpha in ((different, "#8b949e", 0.35), (same, color, 0.45)):
                density, _ = np.histogram(values, bins=edges, density=True)
                axis.stairs(density, edges, fill=True, color=shade, alpha=alpha, linewidth=0)
                axis.stairs(density, edges, color=shade, linewidth=1.4)
                top = max(top, float(density.max()))
            near, far = float(same.mean()), float(different.mean())
            for mean, shade in ((near, color), (far, MUTED)):
                axis.plot([mean, mean], [0, 1.12 * top], color=shade, linestyle="--", linewidth=1.5)
            axis.annotate(
                "",
                (far, 1.12 * top),
                (near, 1.12 * top),
                arrowprops={"arrowstyle": "<->", "color": INK, "linewidth": 1, "shrinkA": 0, "shrinkB": 0},
            )
            axis.text(
                _inside((near + far) / 2, edges),
                1.17 * top,
                f"δ = {far - near:.3f}",
                ha="center",
                va="bottom",
                fontsize=12.5,
                fontweight="bold",
            )
            axis.set_title(QUERY_LABELS[query], color=color)
            axis.set_xlim(edges[0], edges[-1])
            axis.set_ylim(0, 1.36 * top)
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
            axis.set_xlabel("cosine distance")
            handles = [
                Patch(facecolor=color, alpha=0.6, label=f"same person, mean {near:.3f}"),
                Patch(facecolor="#8b949e", alpha=0.5, label=f"different people, mean {far:.3f}"),
            ]
            axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.24), ncols=1, **_LEGEND)
        return _svg(
            figure,
            "distances",
            "Distances of same-person and different-person pairs, one panel a query modality",
        )


def learning_chart(records: Sequence[Mapping[str, Any]], *, panel: int = 280) -> str | None:
    """Draw loss terms and validation metrics per epoch, the panels of a stage side by side.

    A loss term is a numeric key with "loss", "id", "wrt" or "center" among its words (`loss`, `id_loss`, `wrt`,
    `loss/id`); a validation metric is `val_rank1` or `val_mAP`, a fraction. Other keys (rates, times) are
    not drawn. Two records of one stage and epoch are merged, the later one winning: a resumed run repeats
    epochs.

    Args:
        records: dicts with `stage`, `epoch` and any of the above.
        panel: width of one panel in pixels.

    Returns:
        SVG text, or None where there is nothing to draw.
    """
    panels = _learning_panels(records)
    if not panels:
        return None
    columns = min(4, len(panels))
    num_rows = -(-len(panels) // columns)
    shades = (INK, "#0077bb", "#b35900", "#7a8793", "#a3367a", "#2a8c6b")
    with _figure(panel * columns, 270 * num_rows) as figure:
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
            axis.legend(loc="upper left", bbox_to_anchor=(0, -0.24), ncols=2, **_LEGEND)
        for axis in axes[len(panels) :]:
            axis.remove()
        return _svg(figure, "learning", "Losses and validation metrics per epoch of each training stage")


def parallel_chart(
    axes: Sequence[ParallelAxis],
    places_TA: FloatArray,
    scores_T: FloatArray,
    *,
    metric: str,
    stopped: npt.NDArray[np.bool_],
) -> str:
    """Draw every trial of a sweep as a line over its parameters' values, ending at its metric.

    Args:
        axes: the parameters.
        places_TA: where each trial crosses each axis, 0-1.
        scores_T: its metric, a fraction.
        metric: name of the metric.
        stopped: which trials were stopped early; drawn dashed.

    Returns:
        SVG text.
    """
    low, high = float(scores_T.min()), float(scores_T.max())
    heights_T = (scores_T - low) / (high - low) if high > low else np.full(len(scores_T), 0.5)
    last = ParallelAxis(
        f"{metric} (%)", [(0.0, percent(low)), (1.0, percent(high))] if high > low else [(0.5, percent(low))]
    )
    columns = [*axes, last]
    with _figure(1120, 360) as figure:
        axis = figure.subplots()
        colors = _score_colors(heights_T)
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
                axis.text(place + 0.02, height, name, va="center", fontsize=11.5, color=INK, bbox=_LABEL_BOX)
        axis.set_xlim(-0.05, len(columns) - 0.75)
        axis.set_ylim(-0.06, 1.2)
        axis.set_axis_off()
        return _svg(figure, "parallel", f"Parameters of every trial, and its {metric}")


def importance_chart(shares: Mapping[str, float], *, width: int = 548) -> str:
    """Draw the share of the metric that each parameter decides, as bars.

    Args:
        shares: parameter -> share, in the order to draw.
        width: pixels.

    Returns:
        SVG text.
    """
    with _figure(width, 60 + 34 * len(shares)) as figure:
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
        return _svg(figure, "importance", "Share of the metric that each parameter decides")


def trial_chart(curves: Sequence[TrialCurve], *, metric: str, width: int = 1120) -> str | None:
    """Draw a validation metric per epoch, a line a trial, the panels of the training stages side by side.

    Up to eight settings have a colour each and a legend; of more, a lighter line ended lower. A cross ends a trial
    that was stopped or failed.

    Args:
        curves: the trials.
        metric: key of the learning records, a fraction.
        width: pixels.

    Returns:
        SVG text, or None where no trial has the metric.
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
    few = len(settings) <= len(_SETTING_COLORS)
    scores = np.array([np.nan if curve.score is None else curve.score for curve in curves])
    spread = float(np.nanmax(scores) - np.nanmin(scores)) if np.isfinite(scores).any() else 0.0
    places = (scores - np.nanmin(scores)) / spread if spread else np.zeros(len(scores))
    shades = dict(zip(map(id, curves), _score_colors(np.nan_to_num(places)), strict=True))
    with _figure(width, 300 + (18 * -(-len(settings) // 3) if few else 0)) as figure:
        axes = np.atleast_1d(figure.subplots(1, len(stages)))
        for axis, (stage, lines) in zip(axes, stages.items(), strict=True):
            for curve, values in lines:
                color = _SETTING_COLORS[settings.index(curve.setting)] if few else shades[id(curve)]
                epochs = sorted(values)
                heights = [values[epoch] for epoch in epochs]
                axis.plot(epochs, heights, color=color, linewidth=1.6, alpha=0.85, label=curve.setting if few else None)
                # A trial that never came to the next stage ended in this one.
                if curve.status != "done" and str(curve.learning[-1]["stage"]) == stage:
                    axis.plot(epochs[-1:], heights[-1:], marker="x", markersize=7, markeredgewidth=2, color=color)
            axis.set_title(f"{stage}: validation {METRIC_LABELS[metric.removeprefix('val_')]} (%)")
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid()
        if few:
            handles = [
                Line2D([], [], color=color, label=setting)
                for color, setting in zip(_SETTING_COLORS, settings, strict=False)
            ]
            figure.legend(handles=handles, loc="outside lower left", ncols=3, **_LEGEND)
        return _svg(figure, "trials", "Validation metric per epoch of every trial")


def pair_distances(features: RetrievalFeatures, *, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """Return the cosine distances (1 - similarity) of same-person pairs and of different-person pairs.

    Args:
        features: unit vectors and identities of both sides.
        seed: of the choice of queries where all pairs would be more than four million.
    """
    query_QD, query_pids, gallery_GD, gallery_pids = features
    most = max(1, DISTANCE_PAIRS // max(1, len(gallery_pids)))
    if len(query_pids) > most:
        chosen = np.random.default_rng(seed).permutation(len(query_pids))[:most]
        query_QD, query_pids = query_QD[chosen], query_pids[chosen]
    distance_QG = 1 - query_QD @ gallery_GD.T
    same_QG = query_pids[:, None] == gallery_pids[None, :]
    return distance_QG[same_QG], distance_QG[~same_QG]


_LEGEND: Mapping[str, Any] = {
    "borderaxespad": 0.6,
    "borderpad": 0.1,
    "handlelength": 1.1,
    "handletextpad": 0.5,
    "columnspacing": 1.2,
    "labelspacing": 0.3,
    "labelcolor": INK,
}


_LABEL_BOX: Mapping[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}


@contextmanager
def _figure(width: int, height: int) -> Iterator[Figure]:
    """Give a figure of `width` x `height` SVG units in the page's style; use it inside the `with`."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72))
        figure.set_layout_engine("constrained", w_pad=8 / 72, h_pad=3 / 72)
        yield figure


def _svg(figure: Figure, name: str, description: str) -> str:
    """Render to SVG for inlining: ids made unique by `name`, no XML prolog, no metadata, sized in pixels."""
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


def _score_colors(places: FloatArray) -> list[tuple[float, ...]]:
    """From light to dark as a score rises; the lightest tones of the map are lost on white."""
    colors = matplotlib.colormaps["viridis_r"](0.12 + 0.88 * np.asarray(places, dtype=np.float64))
    return [tuple(color) for color in colors.tolist()]


def _legend_below(figure: Figure, axis: Axes, *, columns: int) -> None:
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=columns,
        **{**_LEGEND, "handlelength": 2.2},
    )


def _ordered(by_query: Mapping[str, object]) -> list[str]:
    return [query for query in QUERIES if query in by_query]


def _pick(all_pids: IntArray, pids: IntArray, generator: np.random.Generator) -> IntArray:
    """Choose up to `TSNE_IMAGES_PER_SIDE` rows of each identity."""
    rows = [generator.permutation(np.flatnonzero(all_pids == pid))[:TSNE_IMAGES_PER_SIDE] for pid in pids]
    return np.concatenate(rows)


def _embed(points_ND: FloatArray, seed: int) -> FloatArray:
    # Imported here: it takes a second, and only this chart needs it.
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # it ships no types

    # scikit-learn wants perplexity < number of points; a third leaves each point a neighbourhood of its own.
    perplexity = min(30.0, max(2.0, (len(points_ND) - 1) / 3))
    model = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed, learning_rate="auto")
    # A few hundred points: waiting threads cost more than they do, many times more on a busy machine.
    with threadpool_limits(1):
        embedded: FloatArray = model.fit_transform(np.ascontiguousarray(points_ND, dtype=np.float32))
    return embedded


def _identity_colors(count: int) -> list[tuple[float, float, float]]:
    """Spread hues evenly and alternate three lightnesses, so that neighbours differ in both."""
    import colorsys

    lightness = (0.36, 0.62, 0.48)
    return [colorsys.hls_to_rgb(index / max(1, count), lightness[index % 3], 0.72) for index in range(count)]


def _inside(position: float, edges: FloatArray) -> float:
    """Keep a centred label clear of both ends of an axis."""
    margin = 0.18 * (edges[-1] - edges[0])
    return float(np.clip(position, edges[0] + margin, edges[-1] - margin))


def _learning_panels(
    records: Sequence[Mapping[str, Any]],
) -> list[tuple[str, dict[str, dict[int, float]], bool]]:
    """Sort records into (title, {line name: {epoch: value}}, values are fractions) panels."""
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

"""Charts of retrieval features: t-SNE, and distances of same-person and different-person pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from tvilfm.report.charts.style import (
    INK,
    LEGEND,
    MUTED,
    QUERY_COLORS,
    QUERY_MARKERS,
    FloatArray,
    IntArray,
    inside,
    new_figure,
    ordered,
    svg,
)
from tvilfm.report.tables import QUERY_LABELS

TSNE_IDENTITIES = 20
TSNE_IMAGES_PER_SIDE = 12
# With more points than this in one chart, the points are drawn as a bitmap inside the SVG.
VECTOR_POINTS = 2000
DISTANCE_PAIRS = 4_000_000


class RetrievalFeatures(NamedTuple):
    """Query and gallery features of one query modality.

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


def tsne_chart(features: Mapping[str, RetrievalFeatures], *, seed: int = 0, panel: int = 280) -> str | None:
    """Draw queries and visible gallery of up to 20 identities in two dimensions, one panel per query modality.

    Colour shows the identity, shape the modality. A thin line joins each query to the centre of its identity's gallery
    images. All panels show the same identities. t-SNE preserves neighbourhoods, not distances: compare how the shapes
    of one colour mix, not the gaps between colours.

    Args:
        features: query modality -> unit vectors and identities of both sides.
        seed: seed of t-SNE and of the choice of identities and images.
        panel: width of one panel in pixels.

    Returns:
        SVG text, or None if no identity is in every panel or a panel would have fewer than 6 points.

    Source: the paper, figure 4.
    """
    generator = np.random.default_rng(seed)
    pids = _shared_identities(features, generator)
    if pids is None:
        return None
    panels = []
    for query in ordered(features):
        query_QD, query_pids, gallery_GD, gallery_pids = features[query]
        query_index = _pick(query_pids, pids, generator)
        gallery_index = _pick(gallery_pids, pids, generator)
        points_ND = np.concatenate([query_QD[query_index], gallery_GD[gallery_index]])
        if len(points_ND) < 6:
            return None
        embedded = _embed(points_ND, seed)
        labels = np.concatenate([query_pids[query_index], gallery_pids[gallery_index]])
        panels.append((query, embedded, labels, len(query_index)))

    raster = sum(len(labels) for _, _, labels, _ in panels) > VECTOR_POINTS
    with new_figure(panel * len(panels), panel + 30) as figure:
        axes = np.atleast_1d(figure.subplots(1, len(panels)))
        for axis, (query, embedded, labels, num_queries) in zip(axes, panels, strict=True):
            for color, pid in zip(_identity_colors(len(pids)), pids, strict=True):
                mine = labels == pid
                query_points = embedded[:num_queries][mine[:num_queries]]
                gallery_points = embedded[num_queries:][mine[num_queries:]]
                _draw_identity(axis, query, query_points, gallery_points, color, raster=raster)
            _finish_embedding(axis, query)
        return svg(
            figure,
            "tsne",
            f"t-SNE of queries and gallery of {len(pids)} identities, one panel per query modality",
        )


def _shared_identities(
    features: Mapping[str, RetrievalFeatures], generator: np.random.Generator
) -> npt.NDArray[np.int64] | None:
    """Return up to 20 identities that are in every panel on both sides, in order; None if there is none."""
    sides = (pids for _, query_pids, _, gallery_pids in features.values() for pids in (query_pids, gallery_pids))
    shared = set.intersection(*(set(pids.tolist()) for pids in sides)) if features else set()
    if not shared:
        return None
    return np.sort(generator.permutation(np.array(sorted(shared)))[:TSNE_IDENTITIES])


def _draw_identity(
    axis: Axes, query: str, query_points: FloatArray, gallery_points: FloatArray, color: Any, *, raster: bool
) -> None:
    """Draw the points of one identity, and lines from its queries to the middle of its gallery images."""
    middle = np.median(gallery_points, axis=0)
    lines = [[point, middle] for point in query_points]
    axis.add_collection(LineCollection(lines, colors=[color], linewidths=0.6, alpha=0.35, rasterized=raster))
    ring: dict[str, Any] = {"marker": "o", "facecolor": "white", "edgecolor": color, "linewidth": 1.3, "zorder": 2}
    axis.scatter(gallery_points[:, 0], gallery_points[:, 1], s=26, rasterized=raster, **ring)
    disc: dict[str, Any] = {"marker": QUERY_MARKERS[query], "color": color, "linewidth": 0, "alpha": 0.9, "zorder": 3}
    axis.scatter(query_points[:, 0], query_points[:, 1], s=26, rasterized=raster, **disc)


def _finish_embedding(axis: Axes, query: str) -> None:
    """Add title, frame and legend to a panel whose axes have no unit."""
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
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 0), ncols=2, **LEGEND)


def distance_chart(features: Mapping[str, RetrievalFeatures], *, seed: int = 0, panel: int = 280) -> str | None:
    """Draw the cosine distances of same-person and different-person query-gallery pairs, with the gap of their means.

    All pairs are used, without the camera rule of a protocol. If there are more than four million pairs, a random part
    of the queries is used.

    Args:
        features: query modality -> unit vectors and identities of both sides.
        seed: seed of the choice of queries.
        panel: width of one panel in pixels.

    Returns:
        SVG text, or None if no modality has both kinds of pairs.

    Source: the paper, figure 4.
    """
    panels = []
    for query in ordered(features):
        same, different = pair_distances(features[query], seed=seed)
        if len(same) and len(different):
            panels.append((query, same, different))
    if not panels:
        return None
    low = min(float(np.quantile(same, 0.001)) for _, same, _ in panels)
    high = max(float(np.quantile(different, 0.9999)) for _, _, different in panels)
    high = max(high, max(float(np.quantile(same, 0.9999)) for _, same, _ in panels))
    edges = np.linspace(low, max(high, low + 1e-3), 61)
    with new_figure(panel * len(panels), 270) as figure:
        axes = np.atleast_1d(figure.subplots(1, len(panels), sharex=True))
        for axis, (query, same, different) in zip(axes, panels, strict=True):
            _draw_distances(axis, query, same, different, edges)
        return svg(
            figure,
            "distances",
            "Distances of same-person and different-person pairs, one panel per query modality",
        )


def _draw_distances(axis: Axes, query: str, same: FloatArray, different: FloatArray, edges: FloatArray) -> None:
    """Draw both histograms of a panel, their means, and the gap of the means."""
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
        inside((near + far) / 2, edges),
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
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.24), ncols=1, **LEGEND)


def pair_distances(features: RetrievalFeatures, *, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """Return the cosine distances (1 - similarity) of same-person pairs and of different-person pairs.

    Args:
        features: unit vectors and identities of both sides.
        seed: seed of the choice of queries if there are more than four million pairs.
    """
    query_QD, query_pids, gallery_GD, gallery_pids = features
    most = max(1, DISTANCE_PAIRS // max(1, len(gallery_pids)))
    if len(query_pids) > most:
        chosen = np.random.default_rng(seed).permutation(len(query_pids))[:most]
        query_QD, query_pids = query_QD[chosen], query_pids[chosen]
    distance_QG = 1 - query_QD @ gallery_GD.T
    same_QG = query_pids[:, None] == gallery_pids[None, :]
    return distance_QG[same_QG], distance_QG[~same_QG]


def _pick(all_pids: IntArray, pids: IntArray, generator: np.random.Generator) -> IntArray:
    """Choose up to `TSNE_IMAGES_PER_SIDE` rows of each identity."""
    rows = [generator.permutation(np.flatnonzero(all_pids == pid))[:TSNE_IMAGES_PER_SIDE] for pid in pids]
    return np.concatenate(rows)


def _embed(points_ND: FloatArray, seed: int) -> FloatArray:
    # Imported here because the import takes a second and only this chart needs it.
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # it ships no types

    # scikit-learn requires perplexity < number of points; a third keeps neighbourhoods local.
    perplexity = min(30.0, max(2.0, (len(points_ND) - 1) / 3))
    model = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed, learning_rate="auto")
    # For a few hundred points, thread synchronisation costs more than it gains, especially on a busy machine.
    with threadpool_limits(1):
        embedded: FloatArray = model.fit_transform(np.ascontiguousarray(points_ND, dtype=np.float32))
    return embedded


def _identity_colors(count: int) -> list[tuple[float, float, float]]:
    """Return evenly spread hues with three alternating lightnesses, so that neighbours differ in both."""
    import colorsys

    lightness = (0.36, 0.62, 0.48)
    return [colorsys.hls_to_rgb(index / max(1, count), lightness[index % 3], 0.72) for index in range(count)]

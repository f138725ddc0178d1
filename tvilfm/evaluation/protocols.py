"""Test protocols of the benchmarks: query images, gallery images, and query texts.

A protocol consists of data and a seeded draw. Both work on the manifest, so the same protocol runs on the test
identities or, with `split="val"`, on the validation identities that select the checkpoint. Every draw uses its own
generator, seeded by the trial, and draws the same images as the released code. The global generator is not used.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tvilfm.config import WitnessDraw
from tvilfm.data.captions import BY_IDENTITY, identity_map
from tvilfm.data.manifest import column
from tvilfm.data.splits import TEST_SPLITS
from tvilfm.datasets.sysu_mm01 import PERMUTATIONS_FILE, permutations
from tvilfm.evaluation.metrics import MetricRule
from tvilfm.terms import Modality, Split


@dataclass(frozen=True)
class Protocol:
    """One test protocol of one benchmark.

    Attributes:
        name: as in `get_protocol`.
        dataset: benchmark whose rules the metrics follow; the `protocol` of `ranking_metrics`.
        query_modality: modality of the queries.
        gallery_modality: modality of the gallery.
        query_cameras: cameras of the queries, ascending; None for all.
        gallery_cameras: cameras of the gallery, ascending; None for all.
        images_per_camera: number of gallery images drawn per identity and camera; None for all, without a draw.
        num_trials: number of drawn galleries; a result is the mean over them.
        official: whether to use the galleries of the dataset authors' `rand_perm_cam.mat` instead of drawing them from
            the trial's seed.
    """

    name: str
    dataset: MetricRule
    query_modality: Modality
    gallery_modality: Modality
    query_cameras: tuple[int, ...] | None
    gallery_cameras: tuple[int, ...] | None
    images_per_camera: int | None
    num_trials: int
    official: bool = False


def get_protocol(name: str) -> Protocol:
    """Return a protocol by name.

    Known protocols are `sysu_mm01/{all,indoor}/{single,multi}`, the same with the galleries of the dataset authors'
    evaluation kit as `sysu_mm01/official/{all,indoor}/{single,multi}`, `regdb/{infrared-visible,visible-infrared}`,
    `llcm/{infrared-visible,visible-infrared}` and `folder/infrared-visible`. A pair of modalities means query-gallery.

    Args:
        name: one of the above.

    Returns:
        The protocol.

    Raises:
        ValueError: the name is unknown; the message lists the known names.

    Source: SYSU-MM01: Wu et al., ICCV 2017. RegDB: Nguyen et al., Sensors 2017, with the ten splits of Ye et al.,
        AAAI 2018. LLCM: Zhang and Wang, CVPR 2023; its near-infrared test images have no camera 3.
    Differs: RegDB visible-infrared. In released TVI-LFM, the text is on the infrared side, so the gallery is
        text-enhanced; here, only queries can have a text.
    """
    known = {protocol.name: protocol for protocol in _protocols()}
    if name not in known:
        raise ValueError(f"protocol: expected one of {', '.join(known)}, got {name!r}. Choose a known one.")
    return known[name]


def select_query(manifest: pa.Table, protocol: Protocol, *, split: Split = "test") -> pa.Table:
    """Return the query rows in the order of the released code: by identity, camera and file; for RegDB, as listed.

    Args:
        manifest: rows with `image`, `pid`, `camid`, `modality`, `split`.
        protocol: protocol that selects the queries.
        split: test identities, or validation identities by the same rules.

    Returns:
        Rows of the manifest.

    Raises:
        ValueError: no row matches.

    Source: METHOD 8; released `process_query_sysu`, `process_query_llcm`, `process_test_regdb`.
    Differs: none known.
    """
    splits = ("test", "query") if split == "test" else (split,)
    rows = _rows(manifest, protocol.query_modality, protocol.query_cameras, splits)
    if protocol.dataset != "regdb":
        rows.sort(key=_identity_camera_file)
    return _taken(manifest, rows, "query", protocol, split)


def select_gallery(manifest: pa.Table, protocol: Protocol, *, trial: int, split: Split = "test") -> pa.Table:
    """Return the gallery rows of one trial, in the order drawn.

    Official galleries: by camera, then by identity, with images in the order of `rand_perm_cam.mat` for the trial.
    Other galleries: by identity, then by camera, with one `random.choice` over the sorted files of each camera that
    shows the identity, from a generator seeded by the trial. Multi-shot draws ten files without replacement, or all
    files if there are fewer.

    Args:
        manifest: rows with `image`, `pid`, `camid`, `modality`, `split`.
        protocol: protocol that selects the gallery.
        trial: 0 to `protocol.num_trials` - 1; also the seed.
        split: test identities, or validation identities by the same rules.

    Returns:
        Rows of the manifest.

    Raises:
        ValueError: the trial is out of range, no row matches, or the file of official galleries is missing.

    Source: METHOD 8; released `process_gallery_sysu` (AGW and its descendants) and `process_gallery_llcm` (DEEN).
        Both seed by trial and loop over zero-padded identities, then over camera folders in listed order: 1, 2,
        4, 5 or 1, 2 for SYSU-MM01, 1 to 9 for LLCM visible, the same without 3 for LLCM near-infrared.
    Differs: multi-shot, which the released code draws from numpy's unseeded generator; our draw is reproducible.
    """
    if not 0 <= trial < protocol.num_trials:
        raise ValueError(
            f"trial: expected 0 to {protocol.num_trials - 1} for {protocol.name}, got {trial}. Choose one of these."
        )
    splits = ("test", "gallery") if split == "test" else (split,)
    rows = _rows(manifest, protocol.gallery_modality, protocol.gallery_cameras, splits)
    if protocol.images_per_camera is None:
        return _taken(manifest, rows, "gallery", protocol, split)
    if protocol.official:
        return _taken(manifest, _official_rows(manifest, rows, protocol, trial), "gallery", protocol, split)
    groups: dict[tuple[int, int], list[_Row]] = defaultdict(list)
    for row in sorted(rows, key=_identity_camera_file):
        groups[row.pid, row.camid].append(row)
    draw = random.Random(trial)
    drawn: list[_Row] = []
    for group in groups.values():
        if protocol.images_per_camera == 1:
            drawn.append(draw.choice(group))
        else:
            drawn.extend(draw.sample(group, min(protocol.images_per_camera, len(group))))
    return _taken(manifest, drawn, "gallery", protocol, split)


def witness_captions(
    manifest: pa.Table,
    captions: pa.Table,
    query: pa.Table,
    protocol: Protocol,
    *,
    seed: int,
    held_out: bool,
    split: Split = "test",
    draw: WitnessDraw = "seeded",
) -> list[str | None]:
    """Draw a text for each query, as a witness would describe the person: a visible caption of the true identity.

    The text is chosen with the ground truth, so every result names its text source. With `held_out`, only captions of
    cameras that the gallery does not use are drawn, so that no text describes a gallery image. If the gallery uses
    every visible camera, there are no such captions.

    Args:
        manifest: rows with `image`, `pid`, `camid`, `modality`, `split`.
        captions: rows with `image`, `caption` and `captioner`.
        query: rows from `select_query`.
        protocol: protocol whose gallery cameras are held out.
        seed: seed of the draw; there is one draw per query, in query order.
        held_out: whether to draw for `witness-heldout` instead of `witness`.
        split: split of the identities in `query`.
        draw: `released` draws as the released code does: from `numpy.random.RandomState(1)`, regardless of the seed,
            and from the lists of `id_caption_map_*.json` if the captions include them. Held-out draws are always
            `seeded`.

    Returns:
        One text per query; None if `held_out` leaves no caption.

    Raises:
        ValueError: without `held_out`, an identity has no visible caption.

    Source: METHOD 6.
    Differs: `seeded` follows the run's seed and draws from sorted captions.
    """
    pool = _witness_pool(manifest, captions, protocol, held_out=held_out, split=split)
    choose: Callable[[list[str]], str] = random.Random(seed).choice
    if draw == "released" and not held_out:
        pool |= identity_map(captions)
        state = np.random.RandomState(1)

        def choose(sentences: list[str]) -> str:
            return sentences[state.choice(len(sentences))]

    drawn: list[str | None] = []
    for pid in query["pid"].to_pylist():
        if pid in pool:
            drawn.append(choose(pool[pid]))
        elif held_out:
            drawn.append(None)
        else:
            raise ValueError(
                f"captions: expected a visible {split} caption of every query identity, got none of identity "
                f"{pid}. Caption its visible images."
            )
    return drawn


def _witness_pool(
    manifest: pa.Table, captions: pa.Table, protocol: Protocol, *, held_out: bool, split: Split
) -> dict[int, list[str]]:
    """Return the sorted visible captions of each identity; with `held_out`, those of cameras outside the gallery."""
    caption_of = {
        image: text
        for image, text, captioner in zip(
            *(captions[name].to_pylist() for name in ("image", "caption", "captioner")), strict=True
        )
        if not (held_out and captioner == BY_IDENTITY)  # the camera of such a caption is unknown
    }
    texts: dict[int, set[str]] = defaultdict(set)
    gallery_cameras = protocol.gallery_cameras
    for row in _rows(manifest, "visible", None, TEST_SPLITS if split == "test" else (split,)):
        shown = gallery_cameras is None or row.camid in gallery_cameras
        if row.image in caption_of and not (held_out and shown):
            texts[row.pid].add(caption_of[row.image])
    return {pid: sorted(unique) for pid, unique in texts.items()}


def ignored_gallery(protocol: Protocol, query_pid: int, query_camid: int, gallery: pa.Table) -> npt.NDArray[np.bool_]:
    """Return which gallery images are ignored for one query.

    Args:
        protocol: protocol whose rule applies.
        query_pid, query_camid: identity and camera of the query.
        gallery: rows from `select_gallery`.

    Returns:
        One bool per gallery row.

    Source: METHOD 8. Differs: none known.
    """
    camids = column(gallery, "camid")
    ignored: npt.NDArray[np.bool_] = np.zeros(gallery.num_rows, dtype=bool)
    if protocol.dataset == "sysu_mm01":
        ignored = (camids == 2) & (query_camid == 3)
    elif protocol.dataset in ("llcm", "market1501"):
        ignored = (column(gallery, "pid") == query_pid) & (camids == query_camid)
    return ignored


def chance_level(query: pa.Table, gallery: pa.Table, protocol: Protocol) -> float:
    """Return the expected rank-1 of a random order of the gallery.

    The first image of a random order is a true match with probability (kept matches) / (kept images). This also holds
    for the deduplicated CMC, because the first identity is that of the first image.

    Args:
        query: rows from `select_query`.
        gallery: rows from `select_gallery`.
        protocol: protocol that defines the ignored gallery images of a query.

    Returns:
        Fraction 0-1, mean over queries with a match.

    Raises:
        ValueError: no query has a match.

    Source: expectation over uniform permutations.
    Differs: none known.
    """
    chances = [count / kept for count, kept in matches(query, gallery, protocol) if count]
    if not chances:
        raise ValueError(
            "query: expected at least one identity that is in the gallery, got none. "
            "Take query and gallery from the same split."
        )
    return sum(chances) / len(chances)


def matches(query: pa.Table, gallery: pa.Table, protocol: Protocol) -> list[tuple[int, int]]:
    """Return per query how many gallery images are matches, and how many are not ignored (`ignored_gallery`)."""
    pid_camids = Counter(zip(gallery["pid"].to_pylist(), gallery["camid"].to_pylist(), strict=True))
    pids = Counter(gallery["pid"].to_pylist())
    camids = Counter(gallery["camid"].to_pylist())
    counts = []
    for pid, camid in zip(query["pid"].to_pylist(), query["camid"].to_pylist(), strict=True):
        found, kept = pids[pid], gallery.num_rows
        if protocol.dataset == "sysu_mm01" and camid == 3:
            found, kept = found - pid_camids[pid, 2], kept - camids[2]
        elif protocol.dataset in ("llcm", "market1501"):
            found, kept = found - pid_camids[pid, camid], kept - pid_camids[pid, camid]
        counts.append((found, kept))
    return counts


@dataclass(frozen=True)
class _Row:
    index: int
    image: str
    pid: int
    camid: int


def _protocols() -> list[Protocol]:
    known = [
        Protocol(f"sysu_mm01/{mode}/{shot}", "sysu_mm01", "infrared", "visible", (3, 6), cameras, images, num_trials=10)
        for mode, cameras in (("all", (1, 2, 4, 5)), ("indoor", (1, 2)))
        for shot, images in (("single", 1), ("multi", 10))
    ]
    known += [
        replace(protocol, name=protocol.name.replace("sysu_mm01/", "sysu_mm01/official/"), official=True)
        for protocol in known
    ]
    pairs: tuple[tuple[Modality, Modality], ...] = (("infrared", "visible"), ("visible", "infrared"))
    for query, gallery in pairs:
        known.append(Protocol(f"regdb/{query}-{gallery}", "regdb", query, gallery, None, None, None, num_trials=1))
    # There is no published protocol for a user's own images: use every image, and ignore what Market-1501 ignores.
    known.append(
        Protocol("folder/infrared-visible", "market1501", "infrared", "visible", None, None, None, num_trials=1)
    )
    cameras_of: dict[Modality, tuple[int, ...]] = {
        "visible": (1, 2, 3, 4, 5, 6, 7, 8, 9),
        "infrared": (1, 2, 4, 5, 6, 7, 8, 9),
    }
    for query, gallery in pairs:
        name = f"llcm/{query}-{gallery}"
        known.append(Protocol(name, "llcm", query, gallery, cameras_of[query], cameras_of[gallery], 1, num_trials=10))
    return known


def _rows(
    manifest: pa.Table, modality: Modality, cameras: tuple[int, ...] | None, splits: tuple[str, ...]
) -> list[_Row]:
    names = ("image", "pid", "camid", "modality", "split")
    columns: list[list[Any]] = [manifest[name].to_pylist() for name in names]
    return [
        _Row(index, image, pid, camid)
        for index, (image, pid, camid, of, part) in enumerate(zip(*columns, strict=True))
        if of == modality and part in splits and (cameras is None or camid in cameras)
    ]


def _official_rows(manifest: pa.Table, rows: list[_Row], protocol: Protocol, trial: int) -> list[_Row]:
    drawn = permutations(manifest)
    if not drawn:
        raise ValueError(
            f"{protocol.name}: expected {PERMUTATIONS_FILE} of the dataset authors' evaluation kit in exp/, got none. "
            f"Copy it there, or use {protocol.name.replace('official/', '')}."
        )
    named = {(row.camid, row.pid, int(PurePosixPath(row.image).stem)): row for row in rows}
    chosen = []
    for camid, pid in sorted({(row.camid, row.pid) for row in rows}):
        for number in drawn[f"{camid}/{pid}"][trial][: protocol.images_per_camera]:
            if (camid, pid, number) not in named:
                raise ValueError(
                    f"{PERMUTATIONS_FILE}: expected image {number:04d} of identity {pid} in camera {camid}, got no "
                    "such file. Unpack the dataset again; the evaluation kit requires the complete dataset."
                )
            chosen.append(named[camid, pid, number])
    return chosen


def _identity_camera_file(row: _Row) -> tuple[int, int, str]:
    return row.pid, row.camid, row.image


def _taken(manifest: pa.Table, rows: list[_Row], side: str, protocol: Protocol, split: Split) -> pa.Table:
    if not rows:
        raise ValueError(
            f"manifest: expected {split} images for the {side} of {protocol.name}, got none. "
            "Check the dataset, its splits and cameras."
        )
    return manifest.take([row.index for row in rows])

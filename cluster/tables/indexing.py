"""`tvilfm index`: fill a gallery with the test images of a finished run or with other images.

CPU tasks read and decode images. Actors compute raw features and write their own rows to the database, in one
transaction per chunk, so no row passes through the driver. Rows that the gallery already has are skipped, so a killed
job continues where it stopped. The gallery is put in use when all rows are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import ray

from cluster.places.finished import FinishedRun, check_reachable, finished_run, gallery_of
from cluster.progress import counted
from cluster.session import plain_errors, session
from cluster.tables.boxed import Shots, boxed_rows
from cluster.tables.images import list_images, read_pictures, reference
from tvilfm.config import Config
from tvilfm.data.manifest import select
from tvilfm.data.people import people_of
from tvilfm.data.splits import TEST_SPLITS
from tvilfm.data.text_files import decode_text
from tvilfm.evaluation.features import FeatureTable
from tvilfm.evaluation.protocols import get_protocol
from tvilfm.models import TVILFM
from tvilfm.models.encode import encode_pixels
from tvilfm.place import Place
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.rows import TIME, vector_column
from tvilfm.terms import MAX_ID, NOBODY, is_id, is_name

MANIFEST_COLUMNS = ("path", "camera", "id", "person", "time")  # of --manifest; the first two are required
SHOWN_FAULTS = 5
_REPORT = pa.schema([("written", pa.int64()), ("faults", pa.list_(pa.string()))])


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """Result of a job.

    Attributes:
        gallery: the gallery, opened.
        written: rows that this job wrote.
        skipped: rows that the gallery already had.
        faults: why images could not be read, one line per image.
    """

    gallery: Gallery
    written: int
    skipped: int
    faults: Sequence[str]

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        lines = [f"gallery: {self.gallery.count()} images; {self.written} written, {self.skipped} skipped as existing"]
        if self.faults:
            lines.append(f"{len(self.faults)} images could not be read; fix them and run the command again:")
            lines += [f"  {fault}" for fault in self.faults[:SHOWN_FAULTS]]
            lines += ["  ..."] * (len(self.faults) > SHOWN_FAULTS)
        return lines


def index(
    config: Config,
    *,
    images: str | None = None,
    camid: str | None = None,
    manifest: str | None = None,
    boxes: str | None = None,
    fps: float | None = None,
    start: datetime | None = None,
    again: bool = False,
) -> Indexed:
    """Write images of people into the gallery and put it in use.

    Args:
        config: sections `run` (the run), `gallery` (the gallery and its index) and `cluster` (the workers).
        images: folder or URI of images or frames, or with `boxes` also a video; None = the visible test images of the
            run.
        camid: camera that took `images`.
        manifest: Parquet or CSV file with a row per image: `path` below `images` and `camera`, and optionally `id`,
            `person` and `time`; None = all images below `images`.
        boxes: file of boxes of people in the frames of `images`, see `data.boxes.read_boxes`; None = `images` are
            crops.
        fps: frames per second; None = as the video says.
        start: aware time of the first frame; None = unknown.
        again: write rows again that the gallery already has.

    Raises:
        ValueError: the run is not finished, the manifest or the boxes are invalid, or no image can be read.
    """
    run, faults = finished_run(config), list[str]()
    if boxes is None and (fps is not None or start is not None):
        raise ValueError("--boxes: expected boxes beside --fps and --start, got none. Set --boxes, or leave these out.")
    if images is None:
        if manifest is not None or boxes is not None:
            raise ValueError("--images: expected what --manifest or --boxes describes, got none. Set --images.")
        rows, root = _tested(run), str(run.config.data_root.absolute())
    elif boxes is not None:
        if manifest is not None:
            raise ValueError("--boxes: expected either --boxes or --manifest, got both. Leave one out.")
        rows, faults = boxed_rows(images, boxes, Shots(camid=camid, fps=fps, start=start))
        rows, root = _valid(rows), images
    else:
        rows, root = _listed(images, camid) if manifest is None else _described_by(manifest, images), images
    with session(config.cluster), plain_errors():
        check_reachable(config)
        gallery = gallery_of(run, config)
        indexed = _fill(gallery, rows, root, run, config, again=again, faults=faults)
        gallery.publish()
    return indexed


def encode_again(config: Config, old: Gallery, new: Gallery, images: str) -> tuple[Indexed, int]:
    """Encode the images of another model's gallery for the gallery of the run's model, which keeps their facts.

    The run's gallery is put in use if no row of the old one is left behind. A killed job continues where it stopped.

    Args:
        config: as for `index`.
        old: the gallery whose rows refer to the images.
        new: the gallery of the run's model.
        images: folder or URI of the images.

    Returns:
        The result, and the number of rows whose images are elsewhere, which are left behind.

    Raises:
        ValueError: the run is not finished, or no image can be read.
    """
    run, prefix = finished_run(config), reference(Place(images), "")
    rows = old.facts()
    here = pc.fill_null(pc.starts_with(rows["image"], prefix), False)
    left = rows.num_rows - pc.sum(here).as_py()
    rows = rows.filter(here)
    names = pc.utf8_slice_codeunits(rows["image"], len(prefix))
    rows = rows.drop_columns("image").append_column("name", names)
    with session(config.cluster), plain_errors():
        check_reachable(config)
        indexed = _fill(new, rows, images, run, config, again=False, faults=[])
        if not left:
            new.publish()
    return indexed, left


def _fill(
    gallery: Gallery, rows: pa.Table, root: str, run: FinishedRun, config: Config, *, again: bool, faults: list[str]
) -> Indexed:
    """Write the rows that a gallery does not have, or all of them again, and build the index of a large gallery."""
    known = np.zeros(rows.num_rows, dtype=bool) if again else gallery.contains(rows["id"].to_pylist())
    missing = rows.filter(pa.array(~known))
    if "position" not in rows.column_names:
        # Equal scores rank in the order of the rows, however fast each worker is.
        first = gallery.reserve(missing.num_rows)
        missing = missing.append_column("position", pa.array(first + np.arange(missing.num_rows)))
    written, unusable = 0, len(faults)
    with counted("index", "images") as progress:
        for report in _reports(missing, root, run, config, gallery.space_id):
            written += report["written"]
            faults += report["faults"]
            progress.update(written + len(faults) - unusable, missing.num_rows)
    if faults and not written and not known.any():
        raise ValueError(f"--images: expected images, got {len(faults)} invalid files. First: {faults[0]}")
    if gallery.count(config.gallery.exact_limit + 1) > config.gallery.exact_limit and gallery.unindexed():
        with counted("build", "percent") as progress:
            gallery.build_index(
                workers=config.cluster.extract_workers,
                on_progress=lambda share: progress.update(round(100 * share), 100),
            )
    return Indexed(gallery=gallery, written=written, skipped=int(known.sum()), faults=faults)


def _tested(run: FinishedRun) -> pa.Table:
    """Return rows for the visible test images, with raw features, in the order in which the evaluation ranks ties."""
    table = select(pq.read_table(run.here(run.manifest)), split=TEST_SPLITS, modality="visible")
    if get_protocol(run.config.evaluate.protocols[0]).images_per_camera is not None:
        table = table.sort_by([("pid", "ascending"), ("camid", "ascending"), ("image", "ascending")])
    names = table["image"].to_pylist()
    written = people_of(table)
    people = pa.array([written.get(pid, str(pid)) for pid in table["pid"].to_pylist()])
    raw = vector_column(FeatureTable.read(run.here(run.features)).select(names))
    return _rows(names, names, table["camid"].cast(pa.string()), pid=people).append_column("raw", raw)


def _listed(uri: str, camid: str | None) -> pa.Table:
    """Return rows for all images below a folder, whose identities are not known."""
    if camid is None or not is_name(camid):
        raise ValueError(
            f"--camid: expected the camera of --images, got {camid or 'none'}. Set --camid to its name, such as 4 or "
            "entrance-2."
        )
    names = list_images(uri, "visible")["image"].to_pylist()
    return _rows(names, _ids(uri, names), pa.repeat(camid, len(names)))


def _described_by(manifest: str, root: str) -> pa.Table:
    """Return rows for the images of a table.

    Raises:
        ValueError: a column is missing, unknown or of another type, or an id stands in it twice.
    """
    content = Place(manifest).read()
    if manifest.endswith(".parquet"):
        table = pq.read_table(pa.BufferReader(content))
    else:
        texts = pcsv.ConvertOptions(
            column_types=dict.fromkeys(MANIFEST_COLUMNS[:4], pa.string()), null_values=[""], strings_can_be_null=True
        )
        table = pcsv.read_csv(pa.BufferReader(decode_text(content, manifest).encode()), convert_options=texts)
    unknown = sorted(set(table.column_names) - set(MANIFEST_COLUMNS))
    lacking = sorted(set(MANIFEST_COLUMNS[:2]) - set(table.column_names))
    if unknown or lacking:
        raise ValueError(
            f"--manifest: expected the columns path, camera and optionally id, person, time in {manifest}, "
            f"got {table.column_names}."
        )
    columns = {}
    for name in set(MANIFEST_COLUMNS) & set(table.column_names):
        try:
            columns[name] = table[name].cast(TIME).combine_chunks() if name == "time" else _texts(table[name])
        except pa.ArrowException as error:
            raise ValueError(
                f"--manifest: expected {'times' if name == 'time' else 'texts'} in column {name} of {manifest}, "
                f"got: {error}."
            ) from None
    for name in set(columns) - {"person", "time"}:
        if columns[name].null_count:
            row = columns[name].is_valid().index(False).as_py()
            raise ValueError(f"--manifest: expected a {name} in every row of {manifest}, got none in row {row + 1}.")
    names = columns["path"].to_pylist()
    ids = columns["id"].to_pylist() if "id" in columns else _ids(root, names)
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise ValueError(f"--manifest: expected each image once in {manifest}, got {twice} twice. Remove one row.")
    return _rows(names, ids, columns["camera"], pid=columns.get("person"), time=columns.get("time"))


def _texts(column: pa.ChunkedArray) -> pa.Array:
    """Return texts without spaces around them; blank ones are null, and pandas' 7.0 of a column with gaps is `7`."""
    if pa.types.is_floating(column.type):
        column = column.cast(pa.int64())
    texts = pc.utf8_trim_whitespace(column.cast(pa.string()).combine_chunks())
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _rows(names: Sequence[str], ids: Sequence[str], camid: Any, *, pid: Any = None, time: Any = None) -> pa.Table:
    pid = pa.nulls(len(names), pa.string()) if pid is None else pid
    time = pa.nulls(len(names), TIME) if time is None else time
    return _valid(pa.table({"name": list(names), "id": list(ids), "camid": camid, "pid": pid, "time": time}))


def _valid(rows: pa.Table) -> pa.Table:
    """Return rows whose images of nobody have no person.

    Raises:
        ValueError: an id, a person or a camera is too long or not printable.
    """
    for id in rows["id"].to_pylist():
        if not is_id(id):  # the service could neither return it nor delete it
            raise ValueError(
                f"--images: expected paths of at most {MAX_ID} printable characters, got {id[:MAX_ID]!r}. Rename it."
            )
    for name in ("pid", "camid"):
        for text in rows[name].unique().drop_null().to_pylist():
            if not is_name(text):
                raise ValueError(
                    f"--{'manifest' if name == 'pid' else 'camid'}: expected people and cameras of at most {MAX_ID} "
                    f"printable characters, got {text[:MAX_ID]!r}. Rename it."
                )
    people = pc.if_else(pc.match_substring_regex(rows["pid"], NOBODY), pa.scalar(None, pa.string()), rows["pid"])
    return rows.set_column(rows.column_names.index("pid"), "pid", people)


def _ids(root: str, names: Sequence[str]) -> list[str]:
    folder = Place(root)
    return [reference(folder, name) for name in names]


def _reports(rows: pa.Table, root: str, run: FinishedRun, config: Config, space: str) -> Iterator[dict[str, Any]]:
    """Write the rows on workers, and yield what each chunk gave."""
    if not rows.num_rows:
        return
    data, batch = run.config.data, config.evaluate.batch
    read = partial(
        read_pictures,
        root=root,
        size=None if "raw" in rows.column_names else (data.height, data.width),
        thumbnail_height=config.gallery.thumbnail_height,
        depth_range=data.depth_range,
    )
    blocks = [rows.slice(start, batch) for start in range(0, rows.num_rows, batch)]
    reports = (
        ray.data.from_arrow(blocks)
        .map_batches(read, batch_size=None, num_cpus=1)
        .map_batches(
            GalleryFiller,
            fn_constructor_kwargs={"run": run, "config": config, "space": space},
            batch_size=None,
            num_cpus=1,
            num_gpus=config.cluster.gpus_per_worker or None,
            compute=ray.data.ActorPoolStrategy(size=min(config.cluster.extract_workers, len(blocks))),
        )
    )
    yield from reports.iter_rows()


class GalleryFiller:
    """Actor that writes rows to the gallery, from pixels or, for a run's test images, from raw features."""

    def __init__(self, run: FinishedRun, config: Config, space: str) -> None:
        device = "cuda" if config.cluster.gpus_per_worker > 0 else "cpu"
        self._model = TVILFM.from_pretrained(run.here(run.model)).to(device).eval()
        self._gallery = Gallery.open(config.gallery_url, section=config.gallery, space_id=space)

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> pa.Table:
        readable = batch["fault"] == ""
        faults = [str(fault) for fault in batch["fault"][~readable]]
        batch = {name: column[readable] for name, column in batch.items()}
        if readable.any():
            raw = (
                np.stack(list(batch["raw"]))
                if "raw" in batch
                else encode_pixels(self._model, batch["pixels"], "visible")
            )
            columns = {name: pa.array(batch[name]) for name in ("id", "camid", "image", "thumbnail")}
            columns["pid"] = pa.array(batch["pid"], pa.string(), from_pandas=True)  # of a chunk without people: NaN
            columns["time"] = pa.array(batch["time"], TIME, from_pandas=True)
            table = pa.table(columns | {"raw": vector_column(raw)})
            self._gallery.upsert(table, space_id=self._gallery.space_id, position=batch["position"])
        return pa.table({"written": [int(readable.sum())], "faults": [faults]}, schema=_REPORT)

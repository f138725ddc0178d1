"""`tvilfm index`: fill a gallery with the test images of a finished run or with other images.

CPU tasks read and decode images, actors compute vectors, and with lance-ray every task writes its own rows to a new
table. If the table already has rows, its single writer upserts instead, so indexing a second time changes nothing. The
gallery in use is switched when all rows are written.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cluster.places.depot import Depot, runs_depot, stages_depot
from cluster.session import plain_errors, session
from cluster.tables.captioning import list_images
from cluster.tables.images import read_pictures, reference
from tvilfm.config import Config, load_config
from tvilfm.data.manifest import select
from tvilfm.data.splits import TEST_SPLITS
from tvilfm.evaluation.features import IMAGES_FILE, FeatureTable
from tvilfm.evaluation.protocols import get_protocol
from tvilfm.models import TVILFM
from tvilfm.models.encode import encode_pixels
from tvilfm.place import Place
from tvilfm.retrieval.gallery import METRIC, Gallery
from tvilfm.retrieval.rows import table_schema, vector_column
from tvilfm.retrieval.spaces import gallery_vectors, space_id
from tvilfm.terms import MAX_ID, is_id

KEPT = "kept"  # in a run folder: files of a run from another machine, fetched from storage
FEWEST_INDEXED = 512  # rows; a codebook has 256 entries, and each is learned from two rows
SAMPLES = 256  # rows per partition and codebook entry that an index is trained on, if the table has enough


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """The files of a finished run that the service needs.

    Attributes:
        config: config of the run.
        model: folder of `save_pretrained`.
        features: Parquet file with raw features of the test images.
        manifest: Parquet file with the manifest of the dataset.
        captioner: transformers folder of the fine-tuned infrared captioner; None = the run has none.
        stages: folder that contains these files.
        kept: copies of this folder, for machines that lack it; None = there are no copies.
    """

    config: Config
    model: Path
    features: Path
    manifest: Path
    captioner: Path | None
    stages: Path
    kept: Depot | None

    def here(self, part: Path) -> Path:
        """Return the path of a file on this machine, after copying it outside the stages folder if it is missing."""
        if part.exists() or self.kept is None or not part.is_relative_to(self.stages):
            return part
        copy = self.kept.root / part.relative_to(self.stages)
        if not copy.exists():
            self.kept.pull(copy)
        return copy


def finished_run(config: Config) -> FinishedRun:
    """Return the files of a finished run: from its folder or, for a run on another machine, from storage.

    Args:
        config: sections `run` (the run) and `cluster` (`cluster.storage`).

    Raises:
        ValueError: the run is not finished.
    """
    path, runs, stages = config.run.path.absolute(), runs_depot(config), stages_depot(config)
    if runs is not None and stages is not None:
        stages = replace(stages, root=path / KEPT / "stages")
        if not (path / "run.json").is_file():
            with suppress(FileNotFoundError):
                path = _described(path, runs)
    if not (path / "run.json").is_file():
        raise ValueError(f"run.name: expected a finished run in {path}, got none. Run `tvilfm run` first.")
    noted = json.loads((path / "run.json").read_text())["stages"]
    folders = {name: Path(os.path.normpath(config.run.path.absolute() / folder)) for name, folder in noted.items()}
    network = "text" if "text" in folders else "trained"
    run = FinishedRun(
        config=load_config(path / "config.yaml"),
        model=folders[network] / "model",
        features=folders["features"] / IMAGES_FILE,
        manifest=folders["pixels"] / "manifest.parquet",
        captioner=folders["captioner_infrared"] / "captioner" if "captioner_infrared" in folders else None,
        stages=folders[network].parent,
        kept=stages,
    )
    for part in (run.model, run.features, run.manifest):
        with suppress(FileNotFoundError):
            part = run.here(part)
        if not part.exists():
            raise ValueError(f"run.name: expected a finished run in {path}, got no {part}. Finish it with tvilfm run.")
    return run


def _described(path: Path, runs: Depot) -> Path:
    """Fetch the description of a run from storage, even if it was fetched before, because the run may have changed."""
    kept = path / KEPT / "run"
    for name in ("config.yaml", "run.json"):
        replace(runs, uri=runs.uri_of(path), root=kept).pull(kept / name)
    return kept


def index(config: Config, *, images: str | None = None, camid: int | None = None) -> Gallery:
    """Write images of people into the gallery and put it in use.

    Args:
        config: sections `run` (the run), `gallery` (the gallery and its index) and `cluster` (the workers).
        images: folder or URI of images; None = the visible test images of the run.
        camid: number of the camera that took `images`.

    Returns:
        The gallery, opened for reading.

    Raises:
        ValueError: the run is not finished, an image cannot be read, or another process writes to the gallery.
    """
    run = finished_run(config)
    model = TVILFM.from_pretrained(run.here(run.model)).eval()
    data = run.config.data
    space = space_id(model, height=data.height, width=data.width)
    if images is None:
        rows, root = _tested(run), str(run.config.data_root.absolute())
    else:
        if camid is None:
            raise ValueError("--camid: expected the camera of --images, got none. Set --camid to its number.")
        rows, root = _pictures(images, camid), images
    prepared = Gallery.prepare(config.gallery_uri, space_id=space, dim=model.spec.dim)
    with closing(prepared) as gallery, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lance is not fork-safe")  # Ray forks only to start other programs
        with session(config.cluster), plain_errors():
            people = _with_vectors(rows, root, run, config)
            if len(gallery):
                # Ties rank in the order of writing, so the order must not depend on the workers.
                people.context.execution_options.preserve_order = True
                for batch in people.iter_batches(batch_size=None, batch_format="pyarrow"):
                    gallery.upsert(batch, space_id=space)
            else:
                _fill(gallery, people, rows_a_task=math.ceil(rows.num_rows / config.cluster.extract_workers))
            if len(gallery) > config.gallery.exact_limit:
                build_index(gallery, config)
        gallery.publish()
    return Gallery.open(config.gallery_uri)


def _tested(run: FinishedRun) -> pa.Table:
    """Return rows for the visible test images, with raw features, in the order in which the evaluation ranks ties."""
    table = select(pq.read_table(run.here(run.manifest)), split=TEST_SPLITS, modality="visible")
    if get_protocol(run.config.evaluate.protocols[0]).images_per_camera is not None:
        table = table.sort_by([("pid", "ascending"), ("camid", "ascending"), ("image", "ascending")])
    names = table["image"].to_pylist()
    raw = vector_column(FeatureTable.read(run.here(run.features)).select(names))
    return pa.table({"name": names, "id": names, "pid": table["pid"], "camid": table["camid"], "raw": raw})


def _pictures(uri: str, camid: int) -> pa.Table:
    """Return rows for all images below a folder, whose identities are not known."""
    names = list_images(uri, "visible")["image"].to_pylist()
    nobody = pa.nulls(len(names), pa.int64())
    folder = Place(uri)
    ids = [reference(folder, name) for name in names]
    for id in ids:
        if not is_id(id):  # the service could neither return it nor delete it
            raise ValueError(
                f"--images: expected paths of at most {MAX_ID} printable characters, got {id[:MAX_ID]!r}. Rename it."
            )
    return pa.table({"name": names, "id": ids, "pid": nobody, "camid": pa.repeat(camid, len(names))})


def _with_vectors(rows: pa.Table, root: str, run: FinishedRun, config: Config) -> ray.data.Dataset:
    """Return the dataset of the rows to write to the gallery's table, computed from image names."""
    data, batch = run.config.data, config.evaluate.batch
    rows = rows.append_column("position", pa.array(np.arange(rows.num_rows)))
    read = partial(
        read_pictures,
        root=root,
        size=None if "raw" in rows.column_names else (data.height, data.width),
        thumbnail_height=config.gallery.thumbnail_height,
    )
    blocks = [rows.slice(start, batch) for start in range(0, rows.num_rows, batch)]
    return (
        ray.data.from_arrow(blocks)
        .map_batches(read, batch_size=None, num_cpus=1)
        .map_batches(
            GalleryEncoder,
            fn_constructor_kwargs={"run": run, "cuda": config.cluster.gpus_per_worker > 0},
            batch_size=None,
            num_cpus=1,
            num_gpus=config.cluster.gpus_per_worker or None,
            compute=ray.data.ActorPoolStrategy(size=min(config.cluster.extract_workers, len(blocks))),
        )
    )


class GalleryEncoder:
    """Actor that adds the vectors of both spaces to rows that have pixels or, from a run, raw features."""

    def __init__(self, run: FinishedRun, cuda: bool) -> None:
        self._model = TVILFM.from_pretrained(run.here(run.model)).to("cuda" if cuda else "cpu").eval()

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> pa.Table:
        known = "raw" in batch
        raw = np.stack(list(batch["raw"])) if known else encode_pixels(self._model, batch["pixels"], "visible")
        vectors = gallery_vectors(self._model, raw)
        schema = table_schema(self._model.spec.dim, "")
        columns = {name: pa.array(batch[name]) for name in ("id", "pid", "camid", "image", "thumbnail", "position")}
        columns |= {name: vector_column(part) for name, part in vectors.items()}
        columns["time"] = pa.nulls(len(batch["id"]), schema.field("time").type)
        columns["pid"] = pa.array(batch["pid"], from_pandas=True)  # NaN = identity not known
        return pa.table({name: columns[name] for name in schema.names}).cast(schema.remove_metadata())


def _fill(gallery: Gallery, people: ray.data.Dataset, *, rows_a_task: int) -> None:
    """Fill an empty table: every task writes its own rows, in one commit."""
    import lance_ray

    lance_ray.write_lance(
        people,
        gallery.table_uri,
        mode="append",
        schema=gallery.dataset.schema,
        min_rows_per_file=rows_a_task,
        enable_stable_row_ids=True,
    )
    gallery.reload()


def build_index(gallery: Gallery, config: Config, *, workers: bool = True) -> None:
    """Build the search indexes of a large gallery for both vectors of its rows, or add new rows to them.

    Args:
        gallery: gallery opened for writing.
        config: sections `gallery` and `cluster` (the workers).
        workers: build the indexes on workers instead of in this process.

    Raises:
        ValueError: `gallery.sub_vectors` does not divide the dimension.
    """
    section, rows = config.gallery, len(gallery)
    if gallery.dim % section.sub_vectors:
        raise ValueError(
            f"gallery.sub_vectors: expected a divisor of the dimension {gallery.dim}, got {section.sub_vectors}."
        )
    gallery.update_index()
    if rows < FEWEST_INDEXED:
        return  # an exact search is faster
    partitions = section.partitions or math.isqrt(rows)
    how: dict[str, Any] = {
        "index_type": "IVF_PQ",
        "metric": METRIC,
        "num_partitions": partitions,
        "num_sub_vectors": section.sub_vectors,
        "sample_rate": min(SAMPLES, rows // max(SAMPLES, partitions)),
    }
    build: Callable[..., object] = gallery.dataset.create_index
    if workers:
        import lance_ray

        build = partial(lance_ray.create_index, gallery.table_uri, num_workers=config.cluster.extract_workers)
    for column in gallery.unindexed_columns():
        build(column, **how)
    gallery.reload()

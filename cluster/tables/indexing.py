"""`tvilfm index`: fill a gallery, from what a finished run was tested on or from anybody's own pictures.

CPU tasks read and decode, actors bring the vectors, and lance-ray has every task write its own rows into a table that
is new. A table that has rows already is upserted by its single writer instead, so that indexing a second time changes
nothing. The gallery in use is switched over when all is there.
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
from tvilfm.retrieval.gallery import METRIC, Gallery
from tvilfm.retrieval.rows import table_schema, vector_column
from tvilfm.retrieval.spaces import gallery_vectors, space_id
from tvilfm.terms import MAX_ID, is_id

KEPT = "kept"  # in a run folder: what was fetched of a run that another machine made
FEWEST_INDEXED = 512  # rows; a codebook of 256 entries is learnt from two each
SAMPLES = 256  # rows a list and a codebook entry that an index is learnt from, if there are as many


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a service needs of a run whose stages are made.

    Attributes:
        config: the run's own, as it was.
        model: folder of `save_pretrained`.
        features: raw features of its test images, Parquet.
        manifest: of its dataset, Parquet.
        captioner: its fine-tuned infrared captioner, a transformers folder; None = it has none.
        stages: folder that these lie in.
        kept: copies of what lies there, for a machine that lacks it; None = there are none.
    """

    config: Config
    model: Path
    features: Path
    manifest: Path
    captioner: Path | None
    stages: Path
    kept: Depot | None

    def here(self, part: Path) -> Path:
        """A part on this machine: where the run left it, else copied to a place where it does not pass for a stage."""
        if part.exists() or self.kept is None or not part.is_relative_to(self.stages):
            return part
        copy = self.kept.root / part.relative_to(self.stages)
        if not copy.exists():
            self.kept.pull(copy)
        return copy


def finished_run(config: Config) -> FinishedRun:
    """Find a run's results: in its folder, or, where it was not made on this machine, in the storage that keeps it.

    Args:
        config: says which run, `run`, and which storage, `cluster.storage`.

    Raises:
        ValueError: it is not finished.
    """
    path, runs, stages = config.run.path.absolute(), runs_depot(config), stages_depot(config)
    if runs is not None and stages is not None:
        stages = replace(stages, root=path / KEPT / "stages")
        if not (path / "run.json").is_file():
            with suppress(FileNotFoundError):
                path = _described(path, runs)
    if not (path / "run.json").is_file():
        raise ValueError(f"run.name: expected a finished run in {path}, got none. Make it with tvilfm run.")
    noted = json.loads((path / "run.json").read_text())["stages"]
    made = {name: Path(os.path.normpath(config.run.path.absolute() / folder)) for name, folder in noted.items()}
    network = "text" if "text" in made else "trained"
    found = FinishedRun(
        config=load_config(path / "config.yaml"),
        model=made[network] / "model",
        features=made["features"] / IMAGES_FILE,
        manifest=made["pixels"] / "manifest.parquet",
        captioner=made["captioner_infrared"] / "captioner" if "captioner_infrared" in made else None,
        stages=made[network].parent,
        kept=stages,
    )
    for part in (found.model, found.features, found.manifest):
        with suppress(FileNotFoundError):
            part = found.here(part)
        if not part.exists():
            raise ValueError(f"run.name: expected a finished run in {path}, got no {part}. End it with tvilfm run.")
    return found


def _described(path: Path, runs: Depot) -> Path:
    """Fetch what a run says of itself, afresh: it may have been made anew."""
    kept = path / KEPT / "run"
    for name in ("config.yaml", "run.json"):
        replace(runs, uri=runs.uri_of(path), root=kept).pull(kept / name)
    return kept


def index(config: Config, *, images: str | None = None, camid: int | None = None) -> Gallery:
    """Write people into the gallery and put it in use.

    Args:
        config: which run (`run`), which gallery and how (`gallery`), and the workers (`cluster`).
        images: folder or URI of somebody's own pictures; None = the visible test images of the run.
        camid: the camera of those pictures.

    Returns:
        The gallery, for reading.

    Raises:
        ValueError: the run is not finished, a picture cannot be read, or somebody else writes to the gallery.
    """
    run = finished_run(config)
    model = TVILFM.from_pretrained(run.here(run.model)).eval()
    data = run.config.data
    space = space_id(model, height=data.height, width=data.width)
    if images is None:
        rows, root = _tested(run), str(run.config.data_root.absolute())
    else:
        if camid is None:
            raise ValueError("--camid: expected the camera of --images, got none. Give its number.")
        rows, root = _pictures(images, camid), images
    prepared = Gallery.prepare(config.gallery_uri, space_id=space, dim=model.spec.dim)
    with closing(prepared) as gallery, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lance is not fork-safe")  # Ray forks to start other programs alone
        with session(config.cluster), plain_errors():
            people = _with_vectors(rows, root, run, config)
            if len(gallery):
                # Ties rank in the order of writing, so the order has to survive the workers.
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
    """Visible test images with their features, in the order in which the evaluation ranks ties."""
    table = select(pq.read_table(run.here(run.manifest)), split=TEST_SPLITS, modality="visible")
    if get_protocol(run.config.evaluate.protocols[0]).images_per_camera is not None:
        table = table.sort_by([("pid", "ascending"), ("camid", "ascending"), ("image", "ascending")])
    names = table["image"].to_pylist()
    raw = vector_column(FeatureTable.read(run.here(run.features)).select(names))
    return pa.table({"name": names, "id": names, "pid": table["pid"], "camid": table["camid"], "raw": raw})


def _pictures(uri: str, camid: int) -> pa.Table:
    """Every picture below a folder; who it shows is not known."""
    names = list_images(uri, "visible")["image"].to_pylist()
    nobody = pa.nulls(len(names), pa.int64())
    ids = [reference(uri, name) for name in names]
    for id in ids:
        if not is_id(id):  # nobody could ask the service for it, or to erase it
            raise ValueError(
                f"--images: expected paths of at most {MAX_ID} printable characters, got {id[:MAX_ID]!r}. Rename it."
            )
    return pa.table({"name": names, "id": ids, "pid": nobody, "camid": pa.repeat(camid, len(names))})


def _with_vectors(rows: pa.Table, root: str, run: FinishedRun, config: Config) -> ray.data.Dataset:
    """Rows of the gallery's table, from names of pictures."""
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
    """Actor: brings the vectors of both spaces to rows with pixels, or with the features that a run has of them."""

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
        columns["pid"] = pa.array(batch["pid"], from_pandas=True)  # NaN stands for nobody
        return pa.table({name: columns[name] for name in schema.names}).cast(schema.remove_metadata())


def _fill(gallery: Gallery, people: ray.data.Dataset, *, rows_a_task: int) -> None:
    """Write a table that is empty, every task its own rows, in one commit."""
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
    """Build what large galleries are searched by, or have it take up what is new; of both vectors of a row.

    Args:
        gallery: opened for writing.
        config: `gallery`, and the workers (`cluster`).
        workers: build it on workers; else in this process.

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
        return  # looking at all of them is quicker
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

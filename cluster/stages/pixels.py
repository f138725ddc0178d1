"""Decode and resize a dataset once, in parallel on Ray Data, into one memory-mapped array."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cluster.progress import ProgressFile
from cluster.session import plain_errors
from cluster.stages.stage import DATASET, Stage, StageJob
from tvilfm.config import Config, DataSection
from tvilfm.data.pixels import create, decode_files
from tvilfm.terms import DepthRange

BLOCK_IMAGES = 1000


class Pixels(Stage):
    """Decode and resize every image once."""

    name = "pixels"
    keys = ("data.height", "data.width", "data.depth_range")
    unit = "images"

    def inputs(self, config: Config) -> tuple[str, ...]:
        return (DATASET,)

    def make(self, folder: Path, job: StageJob) -> None:
        section = job.config.data
        decode_dataset(folder, job.data_root, job.manifest, section, depth_range=section.depth_range)


def decode_dataset(
    folder: Path, root: Path, manifest: pa.Table, section: DataSection, *, depth_range: DepthRange = None
) -> None:
    """Write `manifest.parquet` and `pixels.npy`, whose rows follow the manifest.

    Each block of `BLOCK_IMAGES` is a task, so that all CPUs decode and a lost worker costs its blocks only. Workers
    decode and the driver writes, so that training processes on this machine can map the pages that it wrote.

    Args:
        folder: output folder.
        root: folder of the dataset.
        manifest: rows to decode.
        section: image size and batch size.
        depth_range: scaling of images above 8 bits.

    Raises:
        ValueError: an image cannot be decoded; the message names it.
    """
    rows = pa.table({"row": pa.array(np.arange(manifest.num_rows)), "image": manifest["image"]})
    blocks = [rows.slice(start, BLOCK_IMAGES) for start in range(0, rows.num_rows, BLOCK_IMAGES)]
    decoded = ray.data.from_arrow(blocks).map_batches(
        partial(
            _decode,
            root=root.absolute(),
            height=section.height,
            width=section.width,
            depth_range=depth_range,
        ),
        batch_size=section.decode_batch,
        num_cpus=1,
    )
    pixels = create(folder / "pixels.npy", manifest.num_rows, height=section.height, width=section.width)
    progress, done = ProgressFile(folder / "progress.json", unit="images"), 0
    with plain_errors():
        for batch in decoded.iter_batches(batch_size=None):
            pixels[batch["row"]] = batch["pixels"]
            done += len(batch["row"])
            progress.update(done, manifest.num_rows)
    pixels.flush()
    pq.write_table(manifest, folder / "manifest.parquet")


def _decode(batch: dict[str, Any], *, root: Path, height: int, width: int, depth_range: DepthRange) -> dict[str, Any]:
    pixels = decode_files(root, batch["image"], height=height, width=width, depth_range=depth_range)
    return {"row": batch["row"], "pixels": pixels}

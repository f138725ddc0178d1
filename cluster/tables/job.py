"""Shared by jobs that fill a growing table: fixed chunks, their order on Ray Data, and one producer per folder.

A job reads which rows its parts already have (`parts.Parts`), cuts the missing ones into chunks at fixed positions, and
hands the chunks to actors, which write one part per chunk. So neither the number of actors nor their speed changes
which rows are processed together, and a killed job continues with the missing rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from tvilfm.config import CaptionerSection, RephraseSection
from tvilfm.place import Place
from tvilfm.terms import MODALITIES

MAX_CHUNKS_PER_TASK = 16  # a million rows in chunks of 32 are 2,000 tasks
MIN_TASKS = 64  # a smaller job is cut into at least this many, so that every worker gets some

S = TypeVar("S", CaptionerSection, RephraseSection)


def check_rows(images: pa.ChunkedArray, modalities: Iterable[str]) -> None:
    """Check the rows of a job: known modalities, and each image once.

    Raises:
        ValueError: they are not.
    """
    unknown = sorted(set(modalities) - set(MODALITIES))
    if unknown:
        raise ValueError(f"modality: expected visible or infrared, got {unknown[0]}. Fix the rows.")
    if pc.count_distinct(images).as_py() != len(images):
        raise ValueError(f"image: expected each image once, got some twice in {len(images)} rows. Drop the copies.")


def fixed_chunks(rows: pa.Table, missing: npt.NDArray[np.bool_], size: int) -> pa.Table:
    """Cut rows into chunks by position, and keep the missing rows of each chunk.

    Args:
        rows: all rows.
        missing: (N,) True for rows to process.
        size: positions per chunk.

    Returns:
        One row per chunk that has missing rows: `start`, its first position, and each column of `rows` as a list.
    """
    places = np.flatnonzero(missing)
    starts, offsets = np.unique(places // size, return_index=True)
    ends = np.append(offsets, len(places)).astype(np.int32)
    taken = rows.take(places)
    lists = {name: pa.ListArray.from_arrays(ends, taken[name].combine_chunks()) for name in rows.column_names}
    return pa.table({"start": starts * size, **lists})


def chunk_dataset(chunks: pa.Table, *, max_per_task: int = MAX_CHUNKS_PER_TASK) -> ray.data.Dataset:
    """Return a dataset of chunks that hands each to the next free worker and reports it as soon as it is done."""
    per_task = max(1, min(max_per_task, chunks.num_rows // MIN_TASKS))
    dataset = ray.data.from_arrow([chunks.slice(start, per_task) for start in range(0, chunks.num_rows, per_task)])
    dataset.context.target_max_block_size = 1  # one chunk per block
    return dataset


def claim_folder(note: Place, producer: Mapping[str, Any], *, expected: str, advice: str) -> None:
    """Write the producer of a folder to a note, or refuse another producer: a table holds the results of only one.

    Args:
        note: JSON file in the folder.
        producer: everything about the producer that decides a result.
        expected, advice: parts of the error message.

    Raises:
        ValueError: the folder holds results of another producer.
    """
    if note.is_file():
        noted = json.loads(note.read())
        differing = [
            f"{key}={producer[key]} instead of {noted.get(key)}" for key in producer if noted.get(key) != producer[key]
        ]
        if differing:
            folder = str(note).rpartition("/")[0]
            raise ValueError(f"{folder}: expected {expected}, got {'; '.join(differing)}. {advice}")
    note.write(json.dumps(dict(producer), indent=2).encode())


def with_absolute_model(section: S) -> S:
    """Return the section with a local model folder as an absolute path, because workers run in other folders."""
    path = Path(section.model)
    return section.model_copy(update={"model": str(path.absolute())}) if path.is_dir() else section

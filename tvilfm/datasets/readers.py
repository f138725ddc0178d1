"""Read any dataset by its name: convert its folder to a manifest."""

from __future__ import annotations

import inspect
from pathlib import Path

import pyarrow as pa

from tvilfm.datasets import folder, llcm, regdb, sysu_mm01
from tvilfm.datasets.record import Dataset, PublishedRow

DATASETS: dict[str, Dataset] = {
    "sysu_mm01": sysu_mm01.DATASET,
    "regdb": regdb.DATASET,
    "llcm": llcm.DATASET,
    # The synthetic benchmark has the layout of SYSU-MM01 on disk, so the same reader reads it.
    "synthetic": Dataset(label="synthetic", read=sysu_mm01.read, caption_folders=sysu_mm01.DATASET.caption_folders),
    "folder": folder.DATASET,
}


def read_dataset(name: str, root: str | Path, **options: object) -> pa.Table:
    """Return the manifest of a dataset folder; no image is opened.

    Args:
        name: a key of `DATASETS`.
        root: folder of the dataset.
        options: options of this dataset's reader: `split` (1 to 10) of regdb, `table` of folder, and `strict` of all
            datasets except those in the layout of SYSU-MM01.

    Returns:
        Table with `image` (path relative to root), `pid`, `camid`, `modality`, `split`.

    Raises:
        ValueError: the name or an option is unknown, or the folder does not contain this dataset.
    """
    if name not in DATASETS:
        raise ValueError(f"data.name: expected one of {sorted(DATASETS)}, got {name!r}.")
    read = DATASETS[name].read
    known = [option for option in inspect.signature(read).parameters if option != "root"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"read_dataset: expected options of {name} among {known}, got {unknown[0]}. Remove it.")
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"data.root: expected the folder of {name}, got {root}, which is not a folder. Check the path."
        )
    return read(root, **options)


def label_of(name: str) -> str:
    """Return a dataset's name for people; an unknown name stays as it is."""
    return DATASETS[name].label if name in DATASETS else name


def published_rows(name: str) -> tuple[PublishedRow, ...]:
    """Return the published results of a dataset; empty if there are none."""
    return DATASETS[name].published if name in DATASETS else ()

"""Read any dataset by its name: convert its folder to a manifest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from tvilfm.datasets import folder, llcm, regdb, sysu_mm01

# The synthetic benchmark has the layout of SYSU-MM01 on disk, so the same reader reads it.
READERS: dict[str, Callable[..., pa.Table]] = {
    "sysu_mm01": sysu_mm01.read,
    "regdb": regdb.read,
    "llcm": llcm.read,
    "synthetic": sysu_mm01.read,
    "folder": folder.read,
}


def read_dataset(name: str, root: str | Path, **options: object) -> pa.Table:
    """Return the manifest of a dataset folder; no image is opened.

    Args:
        name: a key of `READERS`.
        root: folder of the dataset.
        options: options of this dataset's reader: `split` (1 to 10) of regdb, `table` of folder, and `strict` of all
            datasets except those in the layout of SYSU-MM01.

    Returns:
        Table with `image` (path relative to root), `pid`, `camid`, `modality`, `split`.

    Raises:
        ValueError: the name or an option is unknown, or the folder does not contain this dataset.
    """
    if name not in READERS:
        raise ValueError(f"data.name: expected one of {sorted(READERS)}, got {name!r}.")
    known = [option for option in inspect.signature(READERS[name]).parameters if option != "root"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"read_dataset: expected options of {name} among {known}, got {unknown[0]}. Remove it.")
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"data.root: expected the folder of {name}, got {root}, which is not a folder. Check the path."
        )
    return READERS[name](root, **options)

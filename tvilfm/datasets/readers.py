"""Read any dataset by name: a folder becomes a manifest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from tvilfm.datasets import folder, llcm, regdb, sysu_mm01

# The synthetic benchmark is SYSU-MM01's layout on disk, read by the reader of the real dataset.
READERS: dict[str, Callable[..., pa.Table]] = {
    "sysu_mm01": sysu_mm01.read,
    "regdb": regdb.read,
    "llcm": llcm.read,
    "synthetic": sysu_mm01.read,
    "folder": folder.read,
}


def read_dataset(name: str, root: str | Path, **options: object) -> pa.Table:
    """Read a dataset's folder into the manifest table; no image is opened.

    Args:
        name: a key of `READERS`.
        root: the dataset's folder.
        options: what this dataset's reader takes: `split` (1 to 10) for regdb, `table` for folder, and `strict` for
            all but SYSU-MM01's layout.

    Returns:
        Table with `image` (path relative to root), `pid`, `camid`, `modality`, `split`.

    Raises:
        ValueError: unknown name or option, or a folder that is not this dataset.
    """
    if name not in READERS:
        raise ValueError(f"data.name: expected one of {sorted(READERS)}, got {name!r}.")
    known = [option for option in inspect.signature(READERS[name]).parameters if option != "root"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"read_dataset: expected options of {name} among {known}, got {unknown[0]}. Leave it out.")
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data.root: expected the folder of {name}, got {root}, which is no folder. Check the path.")
    return READERS[name](root, **options)

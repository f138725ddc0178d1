"""Feature tables: raw features by key (image path or sentence), in memory and as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tvilfm.place import to_parquet, write_whole

IMAGES_FILE = "images.parquet"  # in a stage's folder: features of the evaluated images


@dataclass(frozen=True, kw_only=True)
class FeatureTable:
    """Raw features, one row per key.

    Attributes:
        keys: unique strings.
        vectors_ND: float32, not normalised.
    """

    keys: tuple[str, ...]
    vectors_ND: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.vectors_ND):
            raise ValueError(f"features: expected {len(self.keys)} vectors, got {len(self.vectors_ND)}.")
        if not np.isfinite(self.vectors_ND).all():
            row = int(np.argmax(~np.isfinite(self.vectors_ND).all(axis=1)))
            raise ValueError(
                f"features: expected finite numbers, got NaN or infinity for {self.keys[row]!r}. "
                "The checkpoint has diverged; choose an earlier one."
            )

    def select(self, keys: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the vectors (len(keys), D) of the keys, in their order.

        Raises:
            KeyError: when a key has no vector.
        """
        return self.vectors_ND[[self._rows[key] for key in keys]]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    def write(self, path: Path) -> None:
        """Write columns `key` and `vector` as Parquet."""
        dim = self.vectors_ND.shape[1]
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(self.vectors_ND.ravel()), dim)
        write_whole(path, to_parquet(pa.table({"key": pa.array(self.keys), "vector": vectors})))

    @classmethod
    def read(cls, path: Path) -> FeatureTable:
        table = pq.read_table(path)
        vectors = table["vector"].combine_chunks()
        dim = vectors.type.list_size
        return cls(
            keys=tuple(table["key"].to_pylist()),
            vectors_ND=np.asarray(vectors.flatten().to_numpy(), dtype=np.float32).reshape(-1, dim),
        )

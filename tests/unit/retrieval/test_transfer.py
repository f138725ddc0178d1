"""Galleries that move to another model without images."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.rows import vector_column, vectors_of
from tvilfm.retrieval.spaces import Heads
from tvilfm.retrieval.transfer import migrate_gallery

DIM = 8


def prepare(url: str, space: str, *, seed: int, encoder: str = "same") -> Gallery:
    current, base = np.random.default_rng(seed).random((2, 4, DIM), dtype=np.float32) + np.float32(0.5)
    heads = Heads(current_4D=current, base_4D=base, eps=1e-5, width=DIM)
    return Gallery.prepare(url, space_id=space, heads=heads, encoder=encoder)


def test_a_new_head_derives_its_vectors_from_raw_features(database: str) -> None:
    old, new = prepare(database, "old-96x48", seed=0), prepare(database, "new-96x48", seed=1)
    old.publish()
    raw_ND = np.random.default_rng(2).standard_normal((4, DIM)).astype(np.float32)
    featured = pa.table({"id": [*"abcd"], "camid": ["1"] * 4, "raw": vector_column(raw_ND)})
    old.upsert(featured, space_id=old.space_id)
    unit = vector_column(np.eye(DIM, dtype=np.float32)[:1])
    vectors_alone = pa.table({"id": ["e"], "camid": ["1"], "vector": unit, "vector_base": unit})
    old.upsert(vectors_alone, space_id=old.space_id)
    new.upsert(featured.slice(0, 1), space_id=new.space_id)  # of a call that was killed

    assert migrate_gallery(old, new) == (3, 1)
    assert new.in_use and not old.in_use and old.count() == 5
    direct = prepare(database, "direct-96x48", seed=1)
    direct.upsert(featured, space_id=direct.space_id)
    for column in ("vector", "vector_base"):
        migrated, expected = (vectors_of(one.changes(None).rows[column]) for one in (new, direct))
        np.testing.assert_array_equal(migrated, expected)
    with pytest.raises(ValueError, match="expected models with the same backbone"):
        migrate_gallery(new, prepare(database, "other-96x48", seed=1, encoder="other"))

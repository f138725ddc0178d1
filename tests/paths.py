"""Folders that tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
REGDB_CAPTIONS = REPOSITORY.parent / "shared" / "data" / "regdb_captions"
"""The published captions of RegDB, beside the checkout. Tests that need them are skipped without them."""

needs_regdb_captions = pytest.mark.skipif(
    not REGDB_CAPTIONS.is_dir(), reason="the published RegDB captions are not on this machine"
)

"""Folders that tests read and write."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
REGDB_CAPTIONS = REPOSITORY.parent / "shared" / "data" / "regdb_captions"
"""The published captions of RegDB, beside the checkout. Tests that need them are skipped without them."""

needs_regdb_captions = pytest.mark.skipif(
    not REGDB_CAPTIONS.is_dir(), reason="the published RegDB captions are not on this machine"
)


def temporary_folder(prefix: str) -> Path:
    """Return a new folder that this process removes when it ends."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder

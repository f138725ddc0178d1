"""Digests of arrays, and of the contents of files, by which a copied dataset is recognized as the same dataset.

Reading all files on every start would take minutes, so digests of files are cached by path, size and modification time.
The cache is an SQLite file outside the dataset, because the dataset may be read-only. It only saves time: if it is
missing or cannot be written, files are read again.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

State = tuple[int, int]  # size, modification time in nanoseconds

DIGEST_SIZE = 16
_TABLE = """
CREATE TABLE IF NOT EXISTS content (
    root BLOB, file BLOB, size INTEGER, mtime_ns INTEGER, digest BLOB, PRIMARY KEY (root, file)
) WITHOUT ROWID
"""


def cache_folder() -> Path:
    """Return the user's cache folder: `TVILFM_CACHE`, by default `~/.cache/tvilfm`."""
    return Path(os.environ.get("TVILFM_CACHE") or Path.home() / ".cache" / "tvilfm")


def digest_of_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Return a hash of named arrays (16 hexadecimal digits); equal digests mean equal names and contents."""
    digest = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()[:16]


def content_digests(root: Path, files: Sequence[str], *, cache: Path | None = None) -> list[bytes]:
    """Return a digest of the content of every file.

    Args:
        root: folder that the file names are relative to.
        files: file names.
        cache: SQLite file; None = `content.sqlite` in `cache_folder()`.

    Returns:
        16 bytes per file (BLAKE2b), in the order of `files`.

    Raises:
        FileNotFoundError: a file is missing.
    """
    cache = cache or cache_folder() / "content.sqlite"
    place = os.fsencode(root.resolve())
    with ThreadPoolExecutor() as pool:
        states = list(pool.map(lambda name: _state(root / name), files))
        known = _read(cache, place)
        digests = {
            name: known[name][1]
            for name, state in zip(files, states, strict=True)
            if name in known and known[name][0] == state
        }
        unknown = [(name, state) for name, state in zip(files, states, strict=True) if name not in digests]
        hashed = list(pool.map(lambda item: _digest(root / item[0]), unknown))
    digests |= {name: digest for (name, _), digest in zip(unknown, hashed, strict=True)}
    if unknown:
        rows = [(place, os.fsencode(name), *state, digests[name]) for name, state in unknown]
        _write(cache, rows)
    return [digests[name] for name in files]


def _state(path: Path) -> State:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_SIZE)).digest()


def _read(cache: Path, root: bytes) -> dict[str, tuple[State, bytes]]:
    if not cache.exists():
        return {}
    # A cache that is locked, damaged or has another layout is ignored.
    with suppress(sqlite3.Error), closing(sqlite3.connect(cache)) as database:
        rows = database.execute("SELECT file, size, mtime_ns, digest FROM content WHERE root = ?", (root,))
        return {os.fsdecode(name): ((size, mtime_ns), digest) for name, size, mtime_ns, digest in rows}
    return {}


def _write(cache: Path, rows: Sequence[tuple[bytes, bytes, int, int, bytes]]) -> None:
    with suppress(OSError, sqlite3.Error):
        cache.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(cache)) as database, database:
            database.execute(_TABLE)
            database.executemany("INSERT OR REPLACE INTO content VALUES (?, ?, ?, ?, ?)", rows)

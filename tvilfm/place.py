"""Common access to local folders and object stores, atomic writing of files, and file locks."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import fs

_PARENT = "_parent"
FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_TEXTS = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "PytorchStreamWriter failed writing file")


@dataclass(frozen=True)
class Place:
    """A file or folder on the local disk or in an object store. `str` returns its URI without keys and options.

    Attributes:
        uri: a local path, or a URI that pyarrow opens: `s3://bucket/folder?endpoint_override=host:port&scheme=http`,
            `gs://bucket/folder`, `file:///folder`. Credentials come from the environment variables of the store.
    """

    uri: str

    @property
    def is_uri(self) -> bool:
        """Whether this is a URI, such as `file://` or `s3://`, and not a path."""
        return "://" in self.uri

    @property
    def is_relative(self) -> bool:
        """Whether this is a path relative to the current folder."""
        return not self.is_uri and not Path(self.uri).is_absolute()

    @property
    def absolute(self) -> str:
        """The URI or the absolute path, for processes in other folders."""
        return self.uri.rstrip("/") if self.is_uri else str(Path(self.uri).absolute())

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._opened[0]

    @property
    def path(self) -> str:
        """The path in `filesystem`."""
        return self._opened[1]

    @property
    def is_local(self) -> bool:
        """Whether this is on a local file system, where file locks work."""
        from pyarrow import fs

        return isinstance(self.filesystem, fs.LocalFileSystem)

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        """The filesystem and the path in it.

        Raises:
            ValueError: pyarrow cannot open the URI.
        """
        # Imported here because the run description needs no filesystem.
        import pyarrow as pa
        from pyarrow import fs

        if _PARENT in vars(self):  # share the connection of the folder; names need no escaping
            folder, name = vars(self)[_PARENT]
            return folder.filesystem, f"{folder.path}/{name}"
        if not self.is_uri:
            return fs.LocalFileSystem(), self.absolute
        try:
            filesystem, path = fs.FileSystem.from_uri(self._opened_uri)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise ValueError(
                f"{self}: expected a local path or a URI such as s3://bucket/folder, got an error: "
                f"{str(error).replace(self.uri, str(self))}. "
                "Check the URI and the store's credentials in the environment."
            ) from None
        return filesystem, path.rstrip("/")

    @property
    def _opened_uri(self) -> str:
        """The URI with an option that writes a small file in one request instead of three, where there is one."""
        if not self.uri.startswith("s3://") or "allow_delayed_open" in self.uri:
            return self.uri
        return f"{self.uri}{'&' if '?' in self.uri else '?'}allow_delayed_open=true"

    def __str__(self) -> str:
        if not self.is_uri:
            return self.uri
        scheme, _, rest = self.uri.partition("://")
        return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"

    def __truediv__(self, name: str) -> Place:
        """Return the file or folder `name` in this folder; options of the URI are kept."""
        folder, mark, options = self.uri.partition("?") if self.is_uri else (self.uri, "", "")
        below = Place(f"{folder.rstrip('/')}/{name}{mark}{options}")
        vars(below)[_PARENT] = self, name
        return below

    def is_file(self) -> bool:
        return bool(self.filesystem.get_file_info(self.path).is_file)

    def read(self) -> bytes:
        """Return the content of the file.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        with self.filesystem.open_input_stream(self.path) as stream:
            content: bytes = stream.read()
        return content

    def write(self, content: pa.Buffer | bytes) -> None:
        """Write the file atomically: readers never see a part of it.

        Local files are written under another name and renamed; in an object store, the file is one upload.
        """
        if self.is_local:
            write_whole(Path(self.path), content, durable=True)
            return
        with self.filesystem.open_output_stream(self.path) as stream:
            stream.write(content)


def write_whole(
    path: Path, content: pa.Buffer | bytes | str, *, durable: bool = False, mode: int | None = None
) -> None:
    """Write a file under a temporary name and rename it: readers see the old file or the new file, never a part.

    Args:
        path: path of the file; missing parent folders are created.
        content: bytes, or text that is stored as UTF-8.
        durable: wait until the content is on disk. Without this, the file may be empty after a power failure.
        mode: permissions; None = default of the process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # tempfile is not used because its files are readable only by their owner.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        if mode is not None:
            partial.touch(mode=mode)
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class FullDiskError(OSError):
    """A full disk; the message names the folder and what is needed."""


@contextmanager
def full_disk_named(folder: Path, what: str, *, need: int | None = None) -> Iterator[None]:
    """Name the folder of a full disk in the block: an error of the system says only that a device has no space left.

    Args:
        folder: where the block writes.
        what: what it writes.
        need: bytes that it writes; None = not known.

    Raises:
        FullDiskError: the disk of the folder, or of temporary files, is full.
    """
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        places = dict.fromkeys([str(existing), tempfile.gettempdir()])
        free = ", ".join(f"{_size(shutil.disk_usage(place).free)} free in {place}" for place in places)
        needed = _size(need) if need else "more space"
        raise FullDiskError(
            errno.ENOSPC,
            f"{folder}: expected {needed} for {what}, got a full disk ({free}). Free space, or set run.dir, "
            "run.stages_dir or TMPDIR to a folder on another disk. Finished work is kept",
        ) from None


def is_full_disk(error: BaseException) -> bool:
    """Return whether an error says that a disk is full; workers and libraries may report this as text only."""
    text = str(error)
    return getattr(error, "errno", None) in FULL or any(part in text for part in FULL_TEXTS)


def _size(bytes: int) -> str:
    return f"{bytes / 1e9:.1f} GB" if bytes >= 1e9 else f"{bytes / 1e6:.0f} MB"


def to_parquet(table: pa.Table) -> pa.Buffer:
    """Return the table as the bytes of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()


def lock(path: Path, *, wait: bool = True) -> IO[bytes]:
    """Take the exclusive lock of a file; it is held until the returned file is closed or the process ends.

    Args:
        path: path of the lock file; the file and its parent folders are created.
        wait: wait if another process holds the lock.

    Raises:
        BlockingIOError: another process holds the lock and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    return file

"""One way to reach local folders and object stores: open a URI, write a file whole, take a lock."""

from __future__ import annotations

import fcntl
import os
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import fs

_PARENT = "_parent"


@dataclass(frozen=True)
class Place:
    """A file or folder on this disk or in an object store. `str` gives it without keys and options.

    Attributes:
        uri: a local path, or a URI that pyarrow opens: `s3://bucket/folder?endpoint_override=host:port&scheme=http`,
            `gs://bucket/folder`, `file:///folder`. Credentials come from the environment, as the store defines them.
    """

    uri: str

    @property
    def is_uri(self) -> bool:
        """Whether it is written as a URI; `file://` is one too."""
        return "://" in self.uri

    @property
    def is_relative(self) -> bool:
        """Whether it is a path that depends on the current folder."""
        return not self.is_uri and not Path(self.uri).is_absolute()

    @property
    def absolute(self) -> str:
        """The URI or path for processes that run in other folders."""
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
        """Whether the operating system's files and locks are used."""
        from pyarrow import fs

        return isinstance(self.filesystem, fs.LocalFileSystem)

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        """The filesystem, and the path in it.

        Raises:
            ValueError: a URI that pyarrow cannot open.
        """
        # Imported here: the run description needs no filesystem.
        import pyarrow as pa
        from pyarrow import fs

        if _PARENT in vars(self):  # one connection for all files of a folder, and names need no escapes
            folder, name = vars(self)[_PARENT]
            return folder.filesystem, f"{folder.path}/{name}"
        if not self.is_uri:
            return fs.LocalFileSystem(), self.absolute
        try:
            filesystem, path = fs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise ValueError(
                f"{self}: expected a local path or a URI such as s3://bucket/folder, got an error: "
                f"{str(error).replace(self.uri, str(self))}. "
                "Check the URI and the store's credentials in the environment."
            ) from None
        return filesystem, path.rstrip("/")

    def __str__(self) -> str:
        if not self.is_uri:
            return self.uri
        scheme, _, rest = self.uri.partition("://")
        return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"

    def __truediv__(self, name: str) -> Place:
        """Return the place below this one; options of the URI are kept."""
        folder, mark, options = self.uri.partition("?") if self.is_uri else (self.uri, "", "")
        below = Place(f"{folder.rstrip('/')}/{name}{mark}{options}")
        vars(below)[_PARENT] = self, name
        return below

    def is_file(self) -> bool:
        return bool(self.filesystem.get_file_info(self.path).is_file)

    def read(self) -> bytes:
        """Return the content of the file.

        Raises:
            FileNotFoundError: it does not exist.
        """
        with self.filesystem.open_input_stream(self.path) as stream:
            content: bytes = stream.read()
        return content

    def write(self, content: pa.Buffer | bytes) -> None:
        """Write the file so that nobody ever sees a part of it: renamed locally, one upload in an object store."""
        if self.is_local:
            write_whole(Path(self.path), content, durable=True)
            return
        with self.filesystem.open_output_stream(self.path) as stream:
            stream.write(content)


def write_whole(
    path: Path, content: pa.Buffer | bytes | str, *, durable: bool = False, mode: int | None = None
) -> None:
    """Write a file beside its target and rename it: a reader sees the old file or the new one, never a part.

    Args:
        path: target; parent folders are made.
        content: bytes, or text that is stored as UTF-8.
        durable: wait until the bytes are on disk. Otherwise a power failure may keep the new name and lose the bytes.
        mode: permissions; None = as the process makes files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by their owner only.
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


def to_parquet(table: pa.Table) -> pa.Buffer:
    """Return the table as the bytes of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()


def lock(path: Path, *, wait: bool = True) -> IO[bytes]:
    """Take the exclusive lock of a file until the returned file is closed; a killed process frees its locks.

    Args:
        path: of the lock file; made with its parent folders.
        wait: for the process that holds it.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    return file

"""Connections to the PostgreSQL database of galleries: pool, retries, schema, and errors in plain words."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from pgvector.psycopg import register_vector
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool

from tvilfm.retrieval.store import Unavailable

MIN_SERVER, MIN_PGVECTOR = 14, (0, 8)
CONNECTIONS = 8  # of one process
CONNECT_S, FIRST_S, PATIENCE_S = 5, 2.0, 10.0  # of a connection, and of the first and the second attempt
PAUSE_S = 0.2  # between attempts to connect
LOCK = 7_235_581  # advisory lock of changes of the schema
INSTALL_PGVECTOR = (
    "Install it on the database server: apt install postgresql-18-pgvector (Debian, Ubuntu), dnf install pgvector_18 "
    "(Fedora, RHEL), brew install pgvector (macOS); managed services have it as an extension"
)

T = TypeVar("T")
Connection = psycopg.Connection[Any]


def is_server(url: str) -> bool:
    """Return whether a `gallery.url` names a server, rather than a folder for an embedded one."""
    return url.startswith(("postgresql://", "postgres://"))


class Database:
    """The database of one process. Create it with `open`.

    Args:
        url: see `open`.
        conninfo: of the running server.
        patient: whether `run` repeats an attempt; False if somebody else can answer.
    """

    def __init__(self, url: str, conninfo: str, *, patient: bool = True) -> None:
        self.url, self._conninfo, self._attempts = url, conninfo, (False, True) if patient else (True,)
        logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # failures are reported by `run`
        self._pool = ConnectionPool(
            conninfo,
            kwargs={"connect_timeout": CONNECT_S},
            min_size=1,
            max_size=CONNECTIONS,
            timeout=PATIENCE_S,
            reconnect_timeout=FIRST_S,  # then it gives up, and the next request makes it try again
            configure=_configure,
            check=ConnectionPool.check_connection,
            open=True,
        )
        self._closed = weakref.finalize(self, self._pool.close)

    @classmethod
    def open(cls, url: str) -> Database:
        """Connect to a database, and create or update its tables.

        Args:
            url: `postgresql://...`, or a folder; its embedded server is started if it is not running.

        Raises:
            ValueError: there is no server, it is too old or lacks pgvector, permissions are missing, or the tables were
                made by a later version of this program.
        """
        conninfo = _started(url)
        try:
            with psycopg.connect(conninfo, connect_timeout=CONNECT_S) as connection:
                _migrate(connection, url)
        except errors.InsufficientPrivilege as error:
            raise ValueError(
                f"gallery.url: expected permission to create tables in {_shown(url)}, got: {_first_line(error)}. "
                "Let the owner of the database run tvilfm index once, or grant it."
            ) from None
        except psycopg.OperationalError as error:
            raise ValueError(
                f"gallery.url: expected a PostgreSQL database at {_shown(url)}, got: {_first_line(error)}. "
                "Start the server, or set PGPASSWORD or PGPASSFILE if it asks for a password."
            ) from None
        return cls(url, conninfo)

    def run(self, work: Callable[[Connection], T]) -> T:
        """Return the result of `work` in one transaction; repeat it once after a lost connection or a deadlock.

        Args:
            work: called with a connection; may be called twice, so it must have no other effects.

        Raises:
            Unavailable: the server does not answer, or has no room left.
            PermissionError: the role lacks a permission.
        """
        for number, is_last in enumerate(self._attempts):
            try:
                with self._direct() if number else self._pool.connection(timeout=FIRST_S) as connection:
                    return work(connection)
            except errors.InsufficientPrivilege as error:
                raise PermissionError(
                    f"gallery.url: expected the permission for this in {_shown(self.url)}, got: {_first_line(error)}. "
                    "Use the role of the owner of the database, or grant it."
                ) from None
            except psycopg.OperationalError as error:  # lost, locked in a circle, or out of room
                if is_last:
                    raise Unavailable(
                        f"gallery: expected an answer from the database, got: {_first_line(error)}. Retry."
                    ) from None
        raise AssertionError("unreachable")

    @contextmanager
    def _direct(self) -> Iterator[Connection]:
        """Provide a connection that is not of the pool, as soon as the server answers; start an embedded server.

        The pool pauses longer and longer between its attempts, also after the server is back. A server that is being
        killed looks alive for a moment, so it is started again until it answers.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                connection = psycopg.connect(self._conninfo, connect_timeout=CONNECT_S)
                break
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(PAUSE_S)
                _started(self.url)
        with connection:
            _configure(connection)
            yield connection

    @contextmanager
    def session(self) -> Iterator[Connection]:
        """Provide a connection outside of transactions, for work that takes long."""
        with self._pool.connection() as connection:
            connection.autocommit = True
            try:
                yield connection
            finally:
                connection.autocommit = False

    @property
    def connections(self) -> tuple[int, int]:
        """The number of connections, and of threads that wait for one."""
        stats = self._pool.get_stats()
        return stats["pool_size"], stats.get("requests_waiting", 0)

    def close(self) -> None:
        """Close the connections; also done at the end of the process."""
        self._closed()


def _started(url: str) -> str:
    """Return the connection string of a server, after starting it if it is embedded."""
    if is_server(url):
        return url
    from tvilfm.retrieval.embedded import start_server

    return start_server(Path(url))


def _configure(connection: Connection) -> None:
    register_vector(connection)
    connection.execute("SET client_min_messages = warning")
    connection.commit()


def _migrate(connection: Connection, url: str) -> None:
    """Create or update the tables; each numbered file in `migrations` is applied once."""
    version = connection.info.server_version // 10_000
    if version < MIN_SERVER:
        raise ValueError(f"gallery.url: expected PostgreSQL {MIN_SERVER} or later at {_shown(url)}, got {version}.")
    connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
    _add_pgvector(connection, url)
    # A role without the right to create tables may use existing ones, so ask first.
    if connection.execute("SELECT to_regclass('schema_version')").fetchone() == (None,):
        connection.execute("CREATE TABLE schema_version (number integer NOT NULL)")
    (current,) = connection.execute("SELECT coalesce(max(number), 0) FROM schema_version").fetchone() or (0,)
    folder = files("tvilfm.retrieval").joinpath("migrations")
    steps = {int(file.name.partition("_")[0]): file for file in folder.iterdir() if file.name.endswith(".sql")}
    if current > max(steps):
        raise ValueError(
            f"gallery.url: expected tables of version {max(steps)} or earlier at {_shown(url)}, got version {current}. "
            "Update tvilfm to the version that the other machines use."
        )
    for number, file in sorted(steps.items()):
        if number > current:
            connection.execute(file.read_text().encode())
            connection.execute("INSERT INTO schema_version (number) VALUES (%s)", (number,))


def _add_pgvector(connection: Connection, url: str) -> None:
    query = "SELECT default_version, installed_version FROM pg_available_extensions WHERE name = 'vector'"
    known = connection.execute(query).fetchone()
    if known is None:
        raise ValueError(f"gallery.url: expected pgvector at {_shown(url)}, got none. {INSTALL_PGVECTOR}.")
    version = known[1] or known[0]
    if tuple(map(int, version.split(".")[:2])) < MIN_PGVECTOR:
        raise ValueError(
            f"gallery.url: expected pgvector {'.'.join(map(str, MIN_PGVECTOR))} or later at {_shown(url)}, got "
            f"{version}. {INSTALL_PGVECTOR}, then run ALTER EXTENSION vector UPDATE."
        )
    if known[1] is None:
        connection.execute("CREATE EXTENSION vector")


def _shown(url: str) -> str:
    """Return the place of a database without a user or a password."""
    if not is_server(url):
        return url
    parts = conninfo_to_dict(url)
    return f"{parts.get('host', 'localhost')}/{parts.get('dbname', '')}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

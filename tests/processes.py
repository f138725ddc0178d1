"""Processes of a test: which belong to one that it kills, and the ports that they listen on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, and so on."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def command_line(pid: int) -> bytes:
    """What a process calls itself; nothing once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill_all(pids: Iterable[int]) -> None:
    """Kill processes, some of which may be gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_server(folder: Path) -> None:
    """Kill the embedded database server of a folder with all its processes."""
    server = int((folder / "postmaster.pid").read_text().split()[0])
    kill_all([server, *descendants(server)])


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that it started, at once."""
    kill_all([process.pid, *descendants(process.pid)])
    process.wait()


def alive(pid: int) -> bool:
    """Running, and not one of the node's two agents, which write nothing of the run and take a minute to leave."""
    try:
        zombie = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return not zombie and b"Agent" not in command_line(pid)
    except OSError:
        return False


def kill(process: subprocess.Popen[str], *, deadline: float) -> None:
    """Kill a driver, and wait for its workers to be gone: the next attempt must not meet one that still writes."""
    children = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline, "processes of the killed run live on"
        time.sleep(0.05)


def until(true: Callable[[], object], deadline_s: float = 120) -> None:
    """Wait until something is true."""
    end = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end, "what was waited for never came"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Ports on which nothing listens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def listens(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something listens on a port."""
    with socket.socket() as one:
        return one.connect_ex((host, port)) == 0

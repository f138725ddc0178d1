"""Jobs of a Ray cluster: connect to its job server, list jobs, follow one, and report its exit status."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import aiohttp
import typer
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.table import Table

from tvilfm.config import ClusterSection

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TAIL_LINES = 20
POLL_S = 0.5
COMMAND_NOT_FOUND, ENDED_BY_INTERRUPT, SIGNALS = 127, 130, 128


def connect(section: ClusterSection) -> JobSubmissionClient:
    """Return a client of the job server of a cluster.

    Raises:
        ConnectionError: no server answers at the address.
        ValueError: the cluster requires a token, and the token is missing or wrong.
    """
    quiet()
    if section.job_address:
        os.environ["RAY_API_SERVER_ADDRESS"] = section.job_address  # takes precedence over the argument
    headers = {}
    if section.token_path is not None:
        headers["Authorization"] = f"Bearer {_token(section.token_path)}"
    else:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS
    try:
        return JobSubmissionClient(address, headers=headers)
    except AuthenticationError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"cluster.token_path: expected the token of the cluster at {address}, got a refusal ({reason}). Save the "
            "token in a file and set cluster.token_path, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
        ) from None
    except (ConnectionError, RuntimeError) as error:
        raise ConnectionError(
            f"cluster.job_address: expected Ray's job server at {address}, got no answer ({error}). Start a cluster "
            "(`ray start --head`, `ray up`, kubectl apply), forward its port 8265 (`ray dashboard cluster.yaml`, "
            "`kubectl port-forward`), or set another address."
        ) from None


def quiet() -> None:
    """Silence Ray's messages about packing and uploading. Errors are raised anyway."""
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)


def _token(path: Path) -> str:
    try:
        return path.expanduser().read_text().strip()
    except OSError as error:
        raise ValueError(
            f"cluster.token_path: expected a file with a token, got {error}. Create it or change the path."
        ) from None


def on_this_machine(address: str) -> bool:
    """Return whether a job server's address belongs to this machine. A forwarded port looks the same."""
    try:
        with socket.socket() as probe:
            probe.bind((socket.gethostbyname(urlparse(address).hostname or ""), 0))
    except OSError:
        return False
    return True


def job(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """Return the details of a job.

    Raises:
        ValueError: no job has this id.
    """
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        raise ValueError(
            f"job: expected the id of a job at {client.get_address()}, got {job_id} ({error}). "
            "`tvilfm jobs list` shows them."
        ) from None


@contextmanager
def answered(job_id: str) -> Iterator[None]:
    """Turn an error of Ray's job client into one message.

    Raises:
        ConnectionError: the client raised an error.
    """
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"job {job_id}: expected an answer of its cluster, got {error}. `tvilfm jobs list` shows its jobs."
        ) from None


def follow(client: JobSubmissionClient, job_id: str) -> int:
    """Print a job's log from its beginning until the job ends.

    Returns:
        Exit status of the job, or 130 after Ctrl-C, which leaves the job running.
    """
    job(client, job_id)
    try:
        asyncio.run(_print_log(client, job_id))
        while not client.get_job_status(job_id).is_terminal():
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        typer.echo(f"\n{job_id} keeps running. {how_to(job_id)}", err=True)
        return ENDED_BY_INTERRUPT
    except (RuntimeError, aiohttp.ClientError, ConnectionError) as error:
        raise ConnectionError(
            f"job {job_id}: expected its log, got {error}. It keeps running. {how_to(job_id)}"
        ) from None
    return report_end(client, job_id, shown=True)


async def _print_log(client: JobSubmissionClient, job_id: str) -> None:
    async for text in client.tail_job_logs(job_id):
        typer.echo(text, nl=False)


def how_to(job_id: str) -> str:
    """Return a hint how to follow a job and how to stop it."""
    return f"Follow: tvilfm jobs logs --follow {job_id}   Stop: tvilfm jobs stop {job_id}"


def report_end(client: JobSubmissionClient, job_id: str, *, shown: bool) -> int:
    """Print the final status of an ended job to standard error.

    Args:
        client: job client of the cluster.
        job_id: id of the job.
        shown: whether the log has been printed already; otherwise print the last lines of a failed job.

    Returns:
        Exit status of the job; 1 if it was stopped or never started.
    """
    details = job(client, job_id)
    status = exit_status(details)
    if details.status == JobStatus.FAILED and not shown:
        try:
            typer.echo("\n".join(client.get_job_logs(job_id).splitlines()[-TAIL_LINES:]), err=True)
        except RuntimeError as error:  # the machine may no longer exist
            typer.echo(f"{job_id}: its log is not available: {error}", err=True)
    if details.status == JobStatus.FAILED and details.driver_exit_code is None:
        typer.echo(details.message, err=True)  # no log: Ray could not start the job
    typer.echo(f"{job_id}: {details.status.value.lower()}, exit status {status}", err=True)
    if status == COMMAND_NOT_FOUND:
        typer.echo(
            "cluster.python: expected a Python on the machines of the cluster, got none of that name. Set "
            "cluster.python=/path/to/python, or start the cluster with Python on the PATH.",
            err=True,
        )
    return status


def exit_status(details: JobDetails) -> int:
    """Return a job's exit status as a shell reports it."""
    if details.driver_exit_code is None:
        return int(details.status != JobStatus.SUCCEEDED)
    return details.driver_exit_code if details.driver_exit_code >= 0 else SIGNALS - details.driver_exit_code


def jobs_rows(client: JobSubmissionClient) -> list[dict[str, Any]]:
    """Return the submitted jobs of a cluster, the newest first: id, status, exit status, start, minutes, command."""
    jobs = [details for details in client.list_jobs() if details.submission_id]
    rows = []
    for details in sorted(jobs, key=lambda details: -(details.start_time or 0)):
        started, ended = (details.start_time or 0) / 1000, (details.end_time or time.time() * 1000) / 1000
        rows.append(
            {
                "job": details.submission_id,
                "status": details.status.value.lower(),
                "exit": exit_status(details) if details.status.is_terminal() else None,
                "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(started)),
                "minutes": round((ended - started) / 60, 1),
                "command": (details.metadata or {}).get("command", details.entrypoint),
            }
        )
    return rows


def jobs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the jobs of `jobs_rows` as a table for a terminal. Ids are never cut."""
    table = Table()
    for name in ("job", "status", "exit", "started", "minutes", "command"):
        table.add_column(
            name,
            overflow="fold",
            no_wrap=name == "job",
            min_width=len(rows[0]["job"]) if rows and name == "job" else None,
        )
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    return table

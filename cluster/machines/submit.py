"""Submit any `tvilfm` command to a Ray cluster: what travels, where its paths lie, and how it ended.

The folder that the command is given in travels as the job's working directory, without data, weights, runs and
caches. What a job writes must not lie there, because Ray throws that folder away: relative paths of the run
description are made absolute before the job is sent, below `cluster.storage` or, on a cluster of this machine, in the
folder itself. The command is parsed here first, with the cluster section of the very description that it will read, so
that a misspelt option or key costs no upload.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import aiohttp
import typer
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.table import Table

from cluster.places.check import absolute_paths, excluded, is_relative, storage_folder
from tvilfm.config import ClusterSection, Config, load_config

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Parameters of commands that name data or results, and those that name files of the program, which travel with it.
DATA_PARAMETERS = (
    *("out", "images", "captions", "gallery", "folder", "run", "file"),
    *("model", "image", "html", "csv", "as_json", "origin"),
)
PROGRAM_PARAMETERS = ("config", "space")
LARGEST_SHOWN = 5
TAIL_LINES = 20
POLL_S = 0.5
COMMAND_NOT_FOUND, ENDED_BY_INTERRUPT, SIGNALS = 127, 130, 128


@dataclass(frozen=True, kw_only=True)
class Command:
    """A `tvilfm` command line, understood.

    Attributes:
        arguments: as given, without `tvilfm`.
        parameters: what its options and arguments came to.
        config: the run description that it will read.
    """

    arguments: tuple[str, ...]
    parameters: Mapping[str, Any]
    config: Config


@dataclass(frozen=True, kw_only=True)
class Package:
    """The files that travel with a job.

    Attributes:
        folder: where they lie.
        excludes: what stays, as gitignore patterns; `.gitignore` counts too.
        sizes: path below the folder -> bytes.
    """

    folder: Path
    excludes: list[str]
    sizes: Mapping[str, int]

    def check(self, command: Command) -> None:
        """Refuse what could not run there.

        Raises:
            ValueError: it is larger than Ray takes, or lacks the description or search space that the command names.
        """
        for name in PROGRAM_PARAMETERS:
            path = str(command.parameters.get(name) or "")
            if path.endswith((".yaml", ".yml")) and is_relative(path) and os.path.normpath(path) not in self.sizes:
                raise ValueError(
                    f"{name}: expected a file that travels with {self.folder}, got {path}. Copy it there, outside data "
                    "and runs and not ignored by git, or give a path that every machine sees."
                )
        if (total := sum(self.sizes.values())) < GCS_STORAGE_MAX_SIZE:
            return
        largest = sorted(self.sizes, key=lambda path: -self.sizes[path])[:LARGEST_SHOWN]
        named = ", ".join(f"{path} ({megabytes(self.sizes[path])})" for path in largest)
        raise ValueError(
            f"{self.folder}: expected less than Ray's {megabytes(GCS_STORAGE_MAX_SIZE)} to send, got "
            f"{megabytes(total)}. Move what is no program, or name it in .gitignore; the largest files: {named}."
        )

    def __str__(self) -> str:
        return f"{len(self.sizes)} files, {megabytes(sum(self.sizes.values()))}"


def parse(app: typer.Typer, arguments: Sequence[str], default_config: Path) -> Command:
    """Understand a command line as the job will.

    Args:
        app: the program.
        arguments: the command line without `tvilfm`.
        default_config: the description that commands read without --config.

    Raises:
        ValueError: no such command, or a description that does not resolve.
        click's UsageError: options that the command does not have.
    """
    command: Any = typer.main.get_command(app)
    names, rest = [], list(arguments)
    while hasattr(command, "commands"):
        name = rest.pop(0) if rest else None
        if name not in command.commands or name in ("submit", "jobs"):
            raise ValueError(
                f"submit: expected a command such as `-- run --size tiny`, got {shlex.join(arguments) or 'none'}. "
                "`tvilfm --help` lists them."
            )
        names.append(str(name))
        command = command.commands[name]
    parameters = command.make_context(" ".join(("tvilfm", *names)), rest).params
    path = Path(parameters.get("config") or default_config)
    overrides = parameters.get("overrides") or []
    if overrides and "=" not in overrides[0]:
        raise ValueError(
            f"submit: expected section.key=value, got {overrides[0]}. The folder of a run is not sent with a job: give "
            "the options that made the run."
        )
    # Commands that read no description may be given in a folder without one.
    there = path if "config" in parameters or path.exists() else None
    config = load_config(there, overrides, size=parameters.get("size"))
    return Command(arguments=tuple(arguments), parameters=parameters, config=config)


def job_paths(command: Command, folder: Path, *, same_machine: bool) -> tuple[str, ...]:
    """Overrides that give the job the paths that its description means.

    Args:
        command: what will run.
        folder: where it was given.
        same_machine: whether the cluster runs on this machine, and so sees that folder.

    Raises:
        ValueError: a relative path that means nothing on the cluster.
    """
    base = storage_folder(command.config)
    if command.config.cluster.storage is None and same_machine:
        base = folder
    for name in DATA_PARAMETERS:
        values = command.parameters.get(name)
        for value in values if isinstance(values, list) else [values]:
            if value is None or not is_relative(str(value)):
                continue
            example = f"{base / str(value)}, or a URI" if base else "a path that every machine sees, or a URI"
            raise ValueError(
                f"{name}: expected an absolute path or a URI, got {value}. A job runs in a folder of its own that "
                f"goes when it ends; say {example}."
            )
    if "overrides" not in command.parameters:
        return ()
    overrides = absolute_paths(command.config, base)
    if command.config.cluster.address is not None:
        overrides.append("cluster.address=null")  # a job belongs to the cluster that it was given to
    return tuple(overrides)


def package_of(folder: Path, config: Config) -> Package:
    """The files of a folder that travel: not what `excluded` names, nor what git ignores."""
    excludes = excluded(config, folder)
    sizes: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(folder))] = path.stat().st_size

    # Ray's own walk, so that what is shown is what is sent.
    _quiet()
    _dir_travel(folder, [_get_excludes(folder, excludes)], note, include_gitignore=True)
    return Package(folder=folder, excludes=excludes, sizes=sizes)


def runtime_env(section: ClusterSection, package: Package) -> dict[str, Any]:
    """What Ray sets up for the job on every machine.

    Raises:
        ValueError: requirements to install, and no pyproject.toml and constraints.txt that say which.
    """
    found: dict[str, Any] = {"working_dir": str(package.folder), "excludes": package.excludes}
    if variables := {name: os.environ[name] for name in section.env if name in os.environ}:
        found["env_vars"] = variables
    if section.install:
        found["pip"] = {"packages": _requirements(package.folder), "pip_check": False}
    return found


def _requirements(folder: Path) -> list[str]:
    missing = [name for name in ("pyproject.toml", "constraints.txt") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"cluster.install: expected {missing[0]} in {folder}, got none. Submit from the repository, or set "
            "cluster.install=false and use an image that has tvilfm."
        )
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    # A cluster's Ray cannot be exchanged under it.
    wanted = [line for line in project["dependencies"] if not line.startswith(("ray[", "ray>", "ray="))]
    return ["--constraint ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt", *wanted]


def connect(section: ClusterSection) -> JobSubmissionClient:
    """The job server of a cluster.

    Raises:
        ConnectionError: nobody answers there.
        ValueError: it asks for a token, and has been given none or another one.
    """
    _quiet()
    if section.job_address:
        os.environ["RAY_API_SERVER_ADDRESS"] = section.job_address  # which Ray would let win over an argument
    headers = {}
    if section.token_path is not None:
        headers["Authorization"] = f"Bearer {_token(section.token_path)}"
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS
    try:
        return JobSubmissionClient(address, headers=headers)
    except AuthenticationError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"cluster.token_path: expected the token of the cluster at {address}, got refused ({reason}). Save the "
            "token in a file and name it, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
        ) from None
    except (ConnectionError, RuntimeError) as error:
        raise ConnectionError(
            f"cluster.job_address: expected Ray's job server at {address}, got no answer ({error}). Start a cluster "
            "(`ray start --head`, `ray up`, kubectl apply), forward its port 8265 (`ray dashboard cluster.yaml`, "
            "`kubectl port-forward`), or set another address."
        ) from None


def _quiet() -> None:
    """Ray's notes on what it packs and uploads; what goes wrong is raised."""
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)


def _token(path: Path) -> str:
    try:
        return path.expanduser().read_text().strip()
    except OSError as error:
        raise ValueError(f"cluster.token_path: expected a file with a token, got {error}. Make or name one.") from None


def on_this_machine(address: str) -> bool:
    """Whether a job server's address is one of this machine's own; a forwarded port looks like one."""
    try:
        with socket.socket() as probe:
            probe.bind((socket.gethostbyname(urlparse(address).hostname or ""), 0))
    except OSError:
        return False
    return True


def submit(client: JobSubmissionClient, command: Command, package: Package, overrides: Sequence[str]) -> str:
    """Send a command; returns the job's id.

    Raises:
        ConnectionError: the job server did not take it.
    """
    section = command.config.cluster
    line = shlex.join((section.python, "-m", "cluster", *command.arguments, *overrides))
    environment = runtime_env(section, package)
    try:
        return client.submit_job(
            entrypoint=line,
            runtime_env=environment,
            metadata={"command": shlex.join(("tvilfm", *command.arguments))},
            entrypoint_num_cpus=section.driver.cpus or None,
            entrypoint_num_gpus=section.driver.gpus or None,
            entrypoint_memory=int(section.driver.memory_gb * 1024**3) or None,
        )
    except (ConnectionError, RuntimeError) as error:
        raise ConnectionError(
            f"submit: expected the job server at {client.get_address()} to take the job, got {error}. Look at "
            "`ray status` and the head's free disk there, then submit again."
        ) from None


def job(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """What is known of a job.

    Raises:
        ValueError: there is none of that id.
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
    """What Ray refuses to say or do of a job, as one message.

    Raises:
        ConnectionError: in place of what its client raises.
    """
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"job {job_id}: expected an answer of its cluster, got {error}. `tvilfm jobs list` shows what it knows."
        ) from None


def follow(client: JobSubmissionClient, job_id: str) -> int:
    """Print a job's log as it grows, from its beginning, until it ends.

    Returns:
        Its exit status, or 130 after Ctrl-C, which leaves the job running.
    """
    job(client, job_id)
    try:
        asyncio.run(_print_log(client, job_id))
        while not client.get_job_status(job_id).is_terminal():
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        typer.echo(f"\n{job_id} goes on. {how_to(job_id)}", err=True)
        return ENDED_BY_INTERRUPT
    except (RuntimeError, aiohttp.ClientError, ConnectionError) as error:
        raise ConnectionError(f"job {job_id}: expected its log, got {error}. It goes on; {how_to(job_id)}") from None
    return report_end(client, job_id, shown=True)


async def _print_log(client: JobSubmissionClient, job_id: str) -> None:
    async for text in client.tail_job_logs(job_id):
        typer.echo(text, nl=False)


def how_to(job_id: str) -> str:
    """How to see a job again and how to stop it."""
    return f"Follow: tvilfm jobs logs --follow {job_id}   Stop: tvilfm jobs stop {job_id}"


def report_end(client: JobSubmissionClient, job_id: str, *, shown: bool) -> int:
    """Say on standard error how an ended job ended.

    Args:
        client: of its cluster.
        job_id: of the job.
        shown: whether its log has been printed; else a failed job's last lines are.

    Returns:
        Its exit status; 1 for a job that was stopped or never started.
    """
    details = job(client, job_id)
    status = exit_status(details)
    if details.status == JobStatus.FAILED and not shown:
        try:
            typer.echo("\n".join(client.get_job_logs(job_id).splitlines()[-TAIL_LINES:]), err=True)
        except RuntimeError as error:  # its machine may be gone
            typer.echo(f"{job_id}: its log cannot be had: {error}", err=True)
    if details.status == JobStatus.FAILED and details.driver_exit_code is None:
        typer.echo(details.message, err=True)  # it has no log: Ray could not start it
    typer.echo(f"{job_id}: {details.status.value.lower()}, exit status {status}", err=True)
    if status == COMMAND_NOT_FOUND:
        typer.echo(
            "cluster.python: expected a Python on the machines of the cluster, got none by that name. Set "
            "cluster.python=/path/to/python, or start the cluster with it on the PATH.",
            err=True,
        )
    return status


def exit_status(details: JobDetails) -> int:
    """A job's exit status as a shell would have it."""
    if details.driver_exit_code is None:
        return int(details.status != JobStatus.SUCCEEDED)
    return details.driver_exit_code if details.driver_exit_code >= 0 else SIGNALS - details.driver_exit_code


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def jobs_table(client: JobSubmissionClient) -> Table:
    """The submitted jobs of a cluster, the last first."""
    table = Table("job", "status", "exit", "started", "minutes", "command")
    jobs = [details for details in client.list_jobs() if details.submission_id]
    for details in sorted(jobs, key=lambda details: -(details.start_time or 0)):
        started, ended = (details.start_time or 0) / 1000, (details.end_time or time.time() * 1000) / 1000
        table.add_row(
            details.submission_id,
            details.status.value.lower(),
            str(exit_status(details)) if details.status.is_terminal() else "",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(started)),
            f"{(ended - started) / 60:.1f}",
            (details.metadata or {}).get("command", details.entrypoint),
        )
    return table

"""Submit any `tvilfm` command to a Ray cluster.

The current folder is sent as the working directory of the job, without data, weights, runs and caches. Ray deletes the
working directory when the job ends, so a job must not write its results there. Relative paths of the run description
are therefore made absolute before the job is sent: below `cluster.storage` or, if the cluster runs on this machine,
below the current folder. The command line and the run description are parsed before the upload, so a misspelt option
or key is reported at once.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes
from ray.job_submission import JobSubmissionClient

from cluster.machines.jobs import quiet
from cluster.places.check import absolute_paths, excluded, storage_folder
from tvilfm.config import ClusterSection, Config, load_config
from tvilfm.place import Place

# Parameters of commands that name data or results, and those that name files sent with the job.
CHECKED = ("run", "train", "evaluate", "tune")  # commands that run stages on a dataset
DATA_PARAMETERS = (
    *("out", "images", "manifest", "boxes", "captions", "gallery", "folder", "run", "file"),
    *("model", "image", "html", "csv", "as_json", "origin", "root"),
)
PROGRAM_PARAMETERS = ("config", "space")
LARGEST_SHOWN = 5
UNASKED_BYTES = 50e6  # of untracked files that are sent without a question


@dataclass(frozen=True, kw_only=True)
class Command:
    """A parsed `tvilfm` command line.

    Attributes:
        arguments: the command line without `tvilfm`.
        parameters: parameter name -> parsed value.
        config: the run description that the command will read.
    """

    arguments: tuple[str, ...]
    parameters: Mapping[str, Any]
    config: Config


@dataclass(frozen=True, kw_only=True)
class Package:
    """The files that are sent with a job.

    Attributes:
        folder: folder of the files.
        excludes: gitignore patterns of files that are not sent, in addition to those of `.gitignore`.
        sizes: path relative to the folder -> bytes.
    """

    folder: Path
    excludes: list[str]
    sizes: Mapping[str, int]

    def check(self, command: Command) -> None:
        """Check that the command can run with these files.

        Raises:
            ValueError: the package is larger than Ray accepts, or lacks the description or search space that the
                command names.
        """
        for name in PROGRAM_PARAMETERS:
            path = str(command.parameters.get(name) or "")
            if (
                path.endswith((".yaml", ".yml"))
                and Place(path).is_relative
                and os.path.normpath(path) not in self.sizes
            ):
                raise ValueError(
                    f"{name}: expected a file that is sent with {self.folder}, got {path}. Copy it into this folder, "
                    "outside data and runs and not ignored by git, or give a path that every machine can read."
                )
        if (total := sum(self.sizes.values())) < GCS_STORAGE_MAX_SIZE:
            return
        largest = sorted(self.sizes, key=lambda path: -self.sizes[path])[:LARGEST_SHOWN]
        named = ", ".join(f"{path} ({megabytes(self.sizes[path])})" for path in largest)
        raise ValueError(
            f"{self.folder}: expected less than Ray's {megabytes(GCS_STORAGE_MAX_SIZE)} to send, got "
            f"{megabytes(total)}. Move files that the job does not need, or list them in .gitignore. Largest: {named}."
        )

    def untracked_bytes(self) -> int:
        """Return the size of the files that git does not track; of all files if the folder is in no repository."""
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=self.folder, capture_output=True, check=False)
        tracked = set(os.fsdecode(listed.stdout).split("\0"))
        return sum(size for path, size in self.sizes.items() if path not in tracked)

    def __str__(self) -> str:
        return f"{len(self.sizes)} files, {megabytes(sum(self.sizes.values()))}"


def parse(app: typer.Typer, arguments: Sequence[str], default_config: Path) -> Command:
    """Parse a command line as the job will parse it.

    Args:
        app: the program.
        arguments: the command line without `tvilfm`.
        default_config: the description that commands read without --config.

    Raises:
        ValueError: the command does not exist, or its description is invalid.
        click's UsageError: an option does not exist.
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
            f"submit: expected section.key=value, got {overrides[0]}. The folder of a run is not sent with a job. Give "
            "the options of the run instead."
        )
    # A command that reads no description may be submitted from a folder without one.
    source = path if "config" in parameters or path.exists() else None
    config = load_config(source, overrides, size=parameters.get("size"))
    return Command(arguments=tuple(arguments), parameters=parameters, config=config)


def check_dataset(command: Command) -> None:
    """Refuse a command that runs stages on a dataset that they could not use, if the dataset is on this machine.

    Raises:
        ValueError: as `require_feasible`.
    """
    # Imported here: most commands need no network code.
    from tvilfm.evaluation.feasibility import require_feasible

    config = command.config
    if command.arguments[0] in CHECKED and config.data.root is not None and config.data.root.is_dir():
        require_feasible(config)


def job_paths(command: Command, folder: Path, *, same_machine: bool) -> tuple[str, ...]:
    """Return overrides that make the relative paths of the run description absolute for the job.

    Args:
        command: the command of the job.
        folder: the folder that it is submitted from.
        same_machine: whether the cluster runs on this machine and can use this folder.

    Raises:
        ValueError: a relative path that cannot be resolved on the cluster.
    """
    base = storage_folder(command.config)
    if command.config.cluster.storage is None and same_machine:
        base = folder
    for name in DATA_PARAMETERS:
        values = command.parameters.get(name)
        for value in values if isinstance(values, list) else [values]:
            if value is None or not Place(str(value)).is_relative:
                continue
            example = f"{base / str(value)}, or a URI" if base else "a path that every machine can read, or a URI"
            raise ValueError(
                f"{name}: expected an absolute path or a URI, got {value}. A job runs in a folder of its own, "
                f"which is deleted when the job ends. Give {example}."
            )
    if "overrides" not in command.parameters:
        return ()
    overrides = absolute_paths(command.config, base)
    if command.config.cluster.address is not None:
        overrides.append("cluster.address=null")  # a job uses the cluster that it runs on
    return tuple(overrides)


def package_of(folder: Path, config: Config) -> Package:
    """Return the files of a folder that are sent with a job: all but those of `excluded` and those that git ignores."""
    excludes = excluded(config, folder)
    sizes: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(folder))] = path.stat().st_size

    # Ray's own function, so that exactly the files that Ray sends are counted.
    quiet()
    _dir_travel(folder, [_get_excludes(folder, excludes)], note, include_gitignore=True)
    return Package(folder=folder, excludes=excludes, sizes=sizes)


def runtime_env(section: ClusterSection, package: Package) -> dict[str, Any]:
    """Return the runtime environment that Ray sets up for the job on every machine.

    Raises:
        ValueError: `cluster.install` is set, but pyproject.toml or constraints.txt is missing.
    """
    environment: dict[str, Any] = {"working_dir": str(package.folder), "excludes": package.excludes}
    if variables := {name: os.environ[name] for name in section.env if name in os.environ}:
        environment["env_vars"] = variables
    if section.install:
        environment["pip"] = {"packages": _requirements(package.folder), "pip_check": False}
    return environment


def _requirements(folder: Path) -> list[str]:
    missing = [name for name in ("pyproject.toml", "constraints.txt") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"cluster.install: expected {missing[0]} in {folder}, got none. Submit from the repository, or set "
            "cluster.install=false and use an image that has tvilfm."
        )
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    # A running cluster keeps its version of Ray.
    requirements = [line for line in project["dependencies"] if not line.startswith(("ray[", "ray>", "ray="))]
    return ["--constraint ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt", *requirements]


def submit(client: JobSubmissionClient, command: Command, package: Package, overrides: Sequence[str]) -> str:
    """Submit a command and return the id of the job.

    Raises:
        ConnectionError: the job server did not accept the job.
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
            f"submit: expected the job server at {client.get_address()} to accept the job, got {error}. Check "
            "`ray status` and the free disk space of the head node, then submit again."
        ) from None


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"

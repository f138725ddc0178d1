"""Options that several commands share, and the run description that they select."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import typer
import yaml

from tvilfm.config import Config, default_description, known_keys, load_config, load_run, run_folder


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def complete_size(incomplete: str) -> list[str]:
    sizes = yaml.safe_load(default_description().read_text()).get("sizes") or {}
    return _starting(sizes, incomplete)


def complete_key(incomplete: str) -> list[str]:
    return _starting((f"{key}=" for key in known_keys()), incomplete)


def complete_space(incomplete: str) -> list[str]:
    return _starting(sorted(Path(file.name).stem for file in files("tune_spaces").iterdir()), incomplete)


def complete_target(incomplete: str) -> list[str]:
    from cluster.machines.render import TARGETS

    return _starting(TARGETS, incomplete)


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="Run description; default: ./ray_config.yaml.", show_default=False)
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        "--size",
        "--recipe",
        help="Recipe of the description's `sizes`: tiny, small, large (synthetic); sysu_mm01, regdb, llcm (settings of "
        "the released scripts).",
        show_default=False,
        autocompletion=complete_size,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN] [SECTION.KEY=VALUE]...",
        help="Folder of a run, whose description is read instead of --config; then overrides with values in YAML.",
        show_default=False,
        autocompletion=complete_key,
    ),
]


def time_of(option: str, text: str, *, sign: Literal[-1, 1]) -> datetime:
    """Return the time of an option: days or hours from now (1) or ago (-1), or a date (UTC unless it has a zone).

    Raises:
        ValueError: the text is neither.
    """
    units = {"d": timedelta(days=1), "h": timedelta(hours=1)}
    try:
        if text[-1:] in units:
            return datetime.now(UTC) + sign * int(text[:-1]) * units[text[-1]]
        time = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ValueError(f"--{option}: expected days (7d), hours (12h) or a date (2026-05-01), got {text}.") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def described(path: Path | None, size: str | None, arguments: list[str] | None) -> Config:
    """Return the run description that the options and arguments of a command select: of a file or of a run's folder."""
    folder = run_folder(arguments or [])
    if folder is None:
        return load_config(path or default_description(), arguments or [], size=size)
    if path or size:
        raise ValueError(
            f"{folder}: expected neither --config nor --size with the folder of a run, which has its own description. "
            "Remove the option."
        )
    return load_run(folder, (arguments or [])[1:])


def checked_storage(config: Config) -> Config:
    """Return the description of a long job after a check that its storage works."""
    from cluster.places.check import check_storage

    if config.cluster.storage is not None:
        check_storage(config.cluster.storage)
    return config

"""Options that several commands share, and the run description that they select."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvilfm.config import Config, default_description, load_config, load_run, run_folder

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
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN] [SECTION.KEY=VALUE]...",
        help="Folder of a run, whose description is read instead of --config; then overrides with values in YAML.",
        show_default=False,
    ),
]


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

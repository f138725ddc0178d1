"""Commands that write and resolve the run description and explain its keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import ConfigOption, Overrides, SizeOption, described
from tvilfm.config import Config, default_description, known_keys, to_yaml, value_at

app = typer.Typer()
config_app = typer.Typer(no_args_is_help=True, help="Show the run description and its keys.")
app.add_typer(config_app, name="config")


@app.command("init")
def init_command() -> None:
    """Write an annotated ray_config.yaml into the current folder for you to edit. An existing file is not changed."""
    target = Path("ray_config.yaml")
    if target.exists():
        raise ValueError(f"{target}: expected a folder without one, got an existing file. Edit it or remove it.")
    target.write_text(default_description().read_text())
    typer.echo(f"{target}: every key with its default and its meaning")


@config_app.command("show")
def config_show(config: ConfigOption = None, size: SizeOption = None, overrides: Overrides = None) -> None:
    """Print the resolved run description as YAML."""
    typer.echo(to_yaml(described(config, size, overrides)), nl=False)


@config_app.command("schema")
def config_schema(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON schema instead of one line per key.")] = False,
) -> None:
    """Print every key with its default and its meaning."""
    if as_json:
        typer.echo(json.dumps(Config.model_json_schema(), indent=2))
        return
    values = Config().model_dump(mode="json")
    for key, description in known_keys().items():
        typer.echo(f"{key} = {json.dumps(value_at(values, key))}  # {description}")

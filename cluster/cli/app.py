"""The `tvilfm` command: it joins all groups of commands and turns errors into an exit status."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any

import typer
import typer.core

from cluster.cli import captions, data, description, gallery, jobs, runs, service
from tvilfm import __version__

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Commands(typer.core.TyperGroup):
    """Group of all commands. An interrupted command prints one sentence and exits with status 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            how = str(stop) or "stopped: finished work is kept; run the same command again to continue"
            typer.echo(how, err=True)
            raise typer.Exit(128 + signal.SIGINT) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="TVI-LFM on Ray: visible-infrared person re-identification with text.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tvilfm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


for group in (runs, captions, service, jobs, description):
    app.add_typer(group.app)
app.add_typer(data.app, name="data")
app.add_typer(gallery.app, name="gallery")


def _bypass_proxy() -> None:
    """Keep requests to this machine away from a proxy: the job server, endpoints and Ray's own services.

    Workers that this command starts inherit the variables.
    """
    for name in ("no_proxy", "NO_PROXY"):  # programs read either
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])


def main() -> None:
    """Run the command. Invalid input ends with one message and exit status 2, without a traceback."""
    _bypass_proxy()
    try:
        app()
    except (ValueError, OSError) as error:
        named = getattr(error, "filename", None) is None and getattr(error, "strerror", None)
        typer.echo(f"error: {named or error}", err=True)  # without "[Errno 28]"
        sys.exit(2)

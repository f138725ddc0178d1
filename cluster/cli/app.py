"""The `tvilfm` command: all groups of commands in one, and how errors end it."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

import typer

from cluster.cli import captions, data, description, jobs, runs, service

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="TVI-LFM on Ray.")
for group in (runs, captions, service, jobs, description):
    app.add_typer(group.app)
app.add_typer(data.app, name="data")


def _guard() -> None:
    """Give a Ray that this command starts a token: its ports run whatever they are sent, for any machine.

    Ray reads it when it is imported. Whoever has set one has settled this; the token that Ray itself keeps in the
    home folder counts without more words, and a cluster that asks for none ignores it.
    """
    settled = any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if settled or "ray" in sys.modules:
        return
    if Path("~/.ray/auth_token").expanduser().exists():
        os.environ["RAY_AUTH_MODE"] = "token"
    elif "RAY_ADDRESS" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def main() -> None:
    """Run the command; a fault of the input ends in one message and status 2, not in a traceback."""
    _guard()
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)

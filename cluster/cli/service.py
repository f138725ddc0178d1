"""Commands of the retrieval service: its gallery, the server, and API keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import ConfigOption, Overrides, SizeOption, described
from tvilfm.service.keys import KeyFile, add_key, remove_key

app = typer.Typer()
keys_app = typer.Typer(no_args_is_help=True, help="API keys of the retrieval service.")
app.add_typer(keys_app, name="keys")

KeysOption = Annotated[Path, typer.Option("--file", help="File of the keys' hashes; serve.keys names it.")]


@app.command("index")
def index_command(
    gallery: Annotated[
        str | None, typer.Option(help="Folder or object store prefix; default gallery.uri.", show_default=False)
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Folder or URI of your own pictures; default the run's test images.", show_default=False),
    ] = None,
    camid: Annotated[
        int | None, typer.Option(help="Camera of --images.", show_default=False, min=0, max=2**31 - 1)
    ] = None,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Write people into a gallery with a finished run's model, and put it in use."""
    from cluster.tables.indexing import index

    where = [] if gallery is None else [f"gallery.uri={json.dumps(gallery)}"]
    made = index(described(config, size, [*(overrides or []), *where]), images=images, camid=camid)
    typer.echo(f"gallery: {made.uri} holds {len(made)} images in space {made.space_id}, version {made.version}")


@app.command("serve")
def serve_command(
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Serve a finished run over HTTP; where no gallery is named or made, its test images are indexed first."""
    from cluster.serve.launch import serve_forever

    serve_forever(described(config, size, overrides), show=show)


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Whose key it is; it stands in the audit trail.")],
    file: KeysOption,
    scope: Annotated[list[str], typer.Option(help="read, write, admin; give several times.")],
) -> None:
    """Make a key and print it, once; the file keeps its hash alone."""
    typer.echo(add_key(file, name, scope))


@keys_app.command("list")
def keys_list(file: KeysOption) -> None:
    """Print names, scopes and ages of the keys."""
    for key in KeyFile(file).read():
        typer.echo(f"{key.name}  {','.join(key.scopes)}  made {key.created:%Y-%m-%d}")


@keys_app.command("remove")
def keys_remove(name: Annotated[str, typer.Argument(help="Of the key.")], file: KeysOption) -> None:
    """Remove a key, of a running service too."""
    remove_key(file, name)

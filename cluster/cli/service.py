"""Commands of the retrieval service: its gallery, the server, and API keys."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import ConfigOption, Overrides, SizeOption, described
from tvilfm.service.keys import KeyFile, add_key, remove_key

app = typer.Typer()
keys_app = typer.Typer(no_args_is_help=True, help="Manage the API keys of the retrieval service.")
app.add_typer(keys_app, name="keys")

KeysOption = Annotated[
    Path, typer.Option("--file", help="File with the hashes of the keys; its path is the value of serve.keys.")
]


@app.command("index")
def index_command(
    gallery: Annotated[
        str | None,
        typer.Option(help="postgresql://HOST/DATABASE, or a folder; default: gallery.url.", show_default=False),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Folder or URI of your own images; default: the run's test images.", show_default=False),
    ] = None,
    camid: Annotated[
        str | None,
        typer.Option(help="Camera that took --images, such as 4 or entrance-2.", show_default=False),
    ] = None,
    manifest: Annotated[
        str | None,
        typer.Option(
            help="Parquet or CSV file that lists the images: path below --images, camera, and optionally id, person "
            "and time.",
            show_default=False,
        ),
    ] = None,
    boxes: Annotated[
        str | None,
        typer.Option(
            help="COCO JSON, MOTChallenge text or CSV: boxes of people in --images, a folder of frames or a video.",
            show_default=False,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames per second of --images; default: as the video says.", show_default=False, min=0.001),
    ] = None,
    start: Annotated[
        datetime | None, typer.Option(help="Time of the first frame of --images (UTC).", show_default=False)
    ] = None,
    again: Annotated[bool, typer.Option(help="Encode and write images again that the gallery already has.")] = False,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Encode images of people with a finished run's model, write them into a gallery, and put it in use."""
    from cluster.tables.indexing import index

    where = [] if gallery is None else [f"gallery.url={json.dumps(gallery)}"]
    described_run = described(config, size, [*(overrides or []), *where])
    result = index(
        described_run,
        images=images,
        camid=camid,
        manifest=manifest,
        boxes=boxes,
        fps=fps,
        start=None if start is None else start.replace(tzinfo=UTC),
        again=again,
    )
    for line in result.lines():
        typer.echo(line)


@app.command("serve")
def serve_command(
    show: Annotated[bool, typer.Option("--open", help="Open the search page in a browser.")] = False,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Serve a finished run over HTTP. If gallery.url is not set and no gallery exists, index its test images first."""
    from cluster.serve.launch import serve_forever
    from cluster.session import address_of, require_free_port

    resolved = described(config, size, overrides)
    if address_of(resolved.cluster) == "local":  # on a cluster, Serve may listen there already
        require_free_port("serve.port", resolved.serve.host, resolved.serve.port)
    serve_forever(resolved, show=show)


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Name of the key's owner, as written to the audit trail.")],
    file: KeysOption,
    scope: Annotated[list[str], typer.Option(help="read, write or admin; may be repeated.")],
) -> None:
    """Create a key and print it. It cannot be printed again, because the file stores only its hash."""
    typer.echo(add_key(file, name, scope))


@keys_app.command("list")
def keys_list(file: KeysOption) -> None:
    """Print the name, scopes and creation date of every key."""
    for key in KeyFile(file).read():
        typer.echo(f"{key.name}  {','.join(key.scopes)}  created {key.created:%Y-%m-%d}")


@keys_app.command("remove")
def keys_remove(name: Annotated[str, typer.Argument(help="Name of the key.")], file: KeysOption) -> None:
    """Remove a key. A running service rejects it too."""
    remove_key(file, name)

"""Commands of the retrieval service: its gallery, the server, API keys, and the audit trail."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.options import ConfigOption, JsonOption, Overrides, SizeOption, described, time_of

if TYPE_CHECKING:
    from tvilfm.service.keys import KeyStore

app = typer.Typer()
keys_app = typer.Typer(no_args_is_help=True, help="Manage the API keys of the retrieval service.")
app.add_typer(keys_app, name="keys")

KeysOption = Annotated[
    Path | None,
    typer.Option(
        "--file",
        help="File with the hashes of the keys, for serve.keys=FILE; default: the gallery's database, for "
        "serve.keys=database.",
        show_default=False,
    ),
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


def _key_store(file: Path | None, config: Path | None, size: str | None, overrides: list[str] | None) -> KeyStore:
    from tvilfm.retrieval.database import Database
    from tvilfm.service.keys import KeyFile, KeyTable

    if file is not None:
        return KeyFile(file)
    return KeyTable(Database.open(described(config, size, overrides).gallery_url))


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Name of the key's owner, as written to the audit trail.")],
    scope: Annotated[list[str], typer.Option(help="read, write or admin; may be repeated.")],
    expires: Annotated[
        str | None, typer.Option(help="Days (90d) or hours (12h) from now, or a date (UTC); default: never.")
    ] = None,
    per_minute: Annotated[
        int | None, typer.Option(help="Maximum searches and writes in a minute; default: no limit.", min=1)
    ] = None,
    file: KeysOption = None,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Create a key and print it. It cannot be printed again, because only its hash is stored."""
    from tvilfm.service.keys import add_key

    until = None if expires is None else time_of("expires", expires, sign=1)
    store = _key_store(file, config, size, overrides)
    typer.echo(add_key(store, name, scope, expires=until, per_minute=per_minute))


@keys_app.command("list")
def keys_list(
    file: KeysOption = None, config: ConfigOption = None, size: SizeOption = None, overrides: Overrides = None
) -> None:
    """Print the name, scopes, creation date, end and limit of every key."""
    for key in _key_store(file, config, size, overrides).read():
        expires = "" if key.expires is None else f"  expires {key.expires.astimezone(UTC):%Y-%m-%d %H:%M}"
        limit = "" if key.per_minute is None else f"  at most {key.per_minute} a minute"
        typer.echo(f"{key.name}  {','.join(key.scopes)}  created {key.created:%Y-%m-%d}{expires}{limit}")


@keys_app.command("remove")
def keys_remove(
    name: Annotated[str, typer.Argument(help="Name of the key.")],
    file: KeysOption = None,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Remove a key. A running service refuses it within a second."""
    _key_store(file, config, size, overrides).remove(name)


@app.command("audit")
def audit_command(
    since: Annotated[
        str | None, typer.Option(help="Days (7d) or hours (12h) ago, or a date (UTC); default: all.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Only what was done with the API key of this name.")] = None,
    person: Annotated[
        str | None,
        typer.Option(
            help="What is stored about this person, whether and when the person was erased, and who saw the person."
        ),
    ] = None,
    in_json: JsonOption = False,
    in_csv: Annotated[bool, typer.Option("--csv", help="Print the entries as CSV instead of a table.")] = False,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Print the audit trail: who searched, wrote, erased or changed keys, and when. Times are in UTC."""
    from cluster.cli.audit import print_as_csv, print_as_json, print_as_text
    from tvilfm.retrieval.audit import person_record, read_entries
    from tvilfm.retrieval.database import Database

    if in_json and in_csv:
        raise ValueError("audit: expected --json or --csv, got both. Give one.")
    start = None if since is None else time_of("since", since, sign=-1)
    database = Database.open(described(config, size, overrides).gallery_url)
    record = None if person is None else person_record(database, person)
    ids = () if record is None else record.ids
    entries = read_entries(database, since=start, key=key, person=person, ids=ids)
    if in_csv:
        print_as_csv(entries)
    elif in_json:
        print_as_json(entries, record)
    else:
        print_as_text(entries, person, record)

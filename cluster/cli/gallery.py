"""Commands of the gallery: describe, check, build the index, erase, copy, and move to a new model."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.options import ConfigOption, Overrides, SizeOption, described

if TYPE_CHECKING:
    from tvilfm.config import Config
    from tvilfm.retrieval.gallery import Gallery

app = typer.Typer(no_args_is_help=True, help="Describe and change a gallery. All commands work while a service runs.")

GOOD_RECALL = 0.95


def _open(config: Config) -> Gallery:
    from tvilfm.retrieval.gallery import Gallery

    return Gallery.open(config.gallery_url, section=config.gallery)


@app.command("stats")
def stats_command(config: ConfigOption = None, size: SizeOption = None, overrides: Overrides = None) -> None:
    """Print the number of images per camera and month, the model, the size on disk, and the oldest image."""
    gallery = _open(described(config, size, overrides))
    facts = gallery.describe()
    search = "both vectors indexed" if facts.indexed else "no index"
    typer.echo(f"space: {gallery.space_id} ({gallery.dim} dimensions, {search})")
    typer.echo(f"images: {facts.rows}, {facts.bytes / 1e6:.1f} MB with indexes")
    typer.echo(f"oldest: {'unknown' if facts.oldest is None else facts.oldest.isoformat()}")
    for camera, count in facts.cameras.items():
        typer.echo(f"camera {camera}: {count}")
    for month, count in facts.months.items():
        typer.echo(f"{month or 'time unknown'}: {count}")


@app.command("check")
def check_command(
    queries: Annotated[int, typer.Option(help="Number of rows that serve as queries.", min=1)] = 100,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Measure how many of the 10 nearest images the index finds, compared with all images."""
    from tvilfm.retrieval.transfer import measure_recall

    gallery = _open(described(config, size, overrides))
    if not gallery.count():
        raise ValueError("gallery: expected images, got an empty gallery. Fill it with tvilfm index.")
    result = measure_recall(gallery, queries=queries)
    for name, share in result.recall.items():
        typer.echo(f"{name}: {share:.3f} of the 10 nearest of {result.rows} images found, {result.queries} queries")
    if min(result.recall.values()) < GOOD_RECALL:
        typer.echo(
            "To find more, raise gallery.ef_search or gallery.refine (slower searches), or raise gallery.m and "
            "gallery.ef_construction and build the index again with tvilfm gallery optimize --again."
        )


@app.command("optimize")
def optimize_command(
    again: Annotated[bool, typer.Option(help="Build existing indexes again, with the current settings.")] = False,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Build the search index of a large gallery. Searches continue; writes wait until the index is built."""
    settings = described(config, size, overrides)
    gallery = _open(settings)
    gallery.build_index(
        workers=settings.cluster.extract_workers,
        again=again,
        on_progress=lambda share: typer.echo(f"index: {100 * share:.0f} %", err=True),
    )
    typer.echo(f"gallery: {gallery.count()} images indexed")


@app.command("delete")
def delete_command(
    id: Annotated[list[str] | None, typer.Option(help="Id of an image; may be repeated.", show_default=False)] = None,
    person: Annotated[str | None, typer.Option(help="Every image of this person.", show_default=False)] = None,
    camera: Annotated[str | None, typer.Option(help="Every image of this camera.", show_default=False)] = None,
    before: Annotated[
        datetime | None, typer.Option(help="Every image taken before this time (UTC).", show_default=False)
    ] = None,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Delete images from the galleries of all models: rows, thumbnails and vectors, with entries in the audit trail."""
    from tvilfm.retrieval.gallery import Gallery

    if sum(one is not None for one in (id, person, camera, before)) != 1:
        raise ValueError("delete: expected one of --id, --person, --camera and --before. Give exactly one.")
    settings = described(config, size, overrides)
    for gallery in Gallery.of_all_models(settings.gallery_url, section=settings.gallery):
        if id is not None:
            change = gallery.delete(id)
        elif person is not None:
            change = gallery.delete_person(person)
        elif camera is not None:
            change = gallery.delete_camera(camera)
        else:
            assert before is not None
            change = gallery.delete_before(before.replace(tzinfo=UTC))
        typer.echo(f"space {gallery.space_id}: {change.count} images deleted, {gallery.count()} left")


@app.command("export")
def export_command(
    file: Annotated[Path, typer.Argument(help="New file: *.parquet, or *.lance (a folder).")],
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Write all rows to a file: features, vectors, thumbnails and facts."""
    from tvilfm.retrieval.transfer import export_gallery

    typer.echo(f"{file}: {export_gallery(_open(described(config, size, overrides)), file)} rows")


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="File that `tvilfm gallery export` wrote for the same model.")],
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Write the rows of an exported file into the gallery of the run's model; existing ids are replaced."""
    from cluster.places.finished import finished_run, gallery_of
    from tvilfm.retrieval.transfer import import_gallery

    settings = described(config, size, overrides)
    gallery = gallery_of(finished_run(settings), settings)
    count = import_gallery(gallery, file)
    gallery.publish()
    typer.echo(f"gallery: {count} rows written, {gallery.count()} in total")


@app.command("migrate")
def migrate_command(
    images: Annotated[
        str | None,
        typer.Option(help="Folder or URI that the rows' images are in; encode them again.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Move the gallery in use to the run's model. Without --images, both models must share a backbone."""
    from cluster.places.finished import finished_run, gallery_of
    from tvilfm.retrieval.transfer import migrate_gallery

    settings = described(config, size, overrides)
    old, new = _open(settings), gallery_of(finished_run(settings), settings)
    if old.space_id == new.space_id:
        raise ValueError(f"gallery: expected a gallery of another model, got {old.space_id}, which is the run's model.")
    if images is not None:
        from cluster.tables.indexing import encode_again

        indexed, left = encode_again(settings, old, new, images)
        typer.echo("\n".join(indexed.lines()))
        if left:
            typer.echo(
                f"{left} rows refer to images that are not below {images}, so space {old.space_id} stays in use. "
                "Run the command again with the --images of the others, or delete these rows."
            )
        return
    written, left = migrate_gallery(old, new)
    typer.echo(f"gallery: {written} rows written to space {new.space_id}, which is in use now")
    if left:
        typer.echo(f"{left} rows have no raw feature and were left in space {old.space_id}; encode their images again")

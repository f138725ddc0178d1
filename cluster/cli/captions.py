"""Commands that fine-tune captioners, caption images and rephrase captions."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Console

from cluster.cli.options import ConfigOption, Overrides, SizeOption, checked_storage, described

app = typer.Typer()


@app.command("caption-train")
def caption_train_command(
    modality: Annotated[
        Literal["visible", "infrared", "both"], typer.Option(help="Modality of the captioner to fine-tune.")
    ] = "both",
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Fine-tune captioners (caption.train) on the training images and their captions, and print their scores."""
    from cluster.run import run
    from tvilfm.captioning.scores import Marks

    outcome = run(
        checked_storage(described(config, size, [*(overrides or []), "caption.source=finetuned"])),
        until="captioner_visible" if modality == "visible" else "captioner_infrared",
        without="captioner_visible" if modality == "infrared" else None,
    )
    for name, folder in outcome.stages.items():
        if name.startswith("captioner_"):
            typer.echo(f"{name}: {folder / 'captioner'}")
            for line in Marks.read(folder / "marks.json").lines():
                typer.echo(f"  {line}")


@app.command("caption")
def caption_command(
    out: Annotated[
        str, typer.Option(help="Folder or URI of captions.parquet and of the parts that a later run resumes from.")
    ],
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder or URI of image files; default: the dataset of the run description.", show_default=False
        ),
    ] = None,
    modality: Annotated[
        Literal["visible", "infrared"] | None, typer.Option(help="Modality of --images.", show_default=False)
    ] = None,
    retry_bad: Annotated[bool, typer.Option("--retry-bad", help="Also retry images in quarantine.")] = False,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Caption images and write a caption table. Images that already have a caption are skipped."""
    from cluster.places.check import check_storage
    from cluster.run import make_synthetic
    from cluster.tables.captioning import caption

    resolved = described(config, size, overrides)
    check_storage(out)
    if images is None:
        make_synthetic(resolved, Console(stderr=True))
    summary = caption(resolved, out=out, images=images, modality=modality, retry_bad=retry_bad)
    for line in summary.lines():
        typer.echo(line)
    summary.check(resolved.caption.max_bad_share)


@app.command("rephrase")
def rephrase_command(
    out: Annotated[
        str, typer.Option(help="Folder or URI of captions.parquet and of the parts that a later run resumes from.")
    ],
    captions: Annotated[
        str | None,
        typer.Option(help="Parquet caption table, path or URI; default: the dataset's captions.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Rephrase every caption of a table (caption.rephrase). Captions that already have a rephrase are skipped."""
    from cluster.places.check import check_storage
    from cluster.tables.rephrasing import rephrase

    check_storage(out)
    for line in rephrase(described(config, size, overrides), out=out, captions=captions).lines():
        typer.echo(line)

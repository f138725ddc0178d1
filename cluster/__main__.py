"""The `tvilfm` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from cluster.data import DEFAULT_CONFIG
from cluster.data import app as data_app
from tvilfm.config import Config, known_keys, load_config, to_yaml, value_at

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="TVI-LFM on Ray.")
config_app = typer.Typer(no_args_is_help=True, help="Look at the run description.")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="Run description; default ./ray_config.yaml.", show_default=False)
]
SizeOption = Annotated[
    str | None, typer.Option("--size", help="Recipe of the file's `sizes`: tiny, small, large.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Overrides, values as YAML.")
]


def _config(path: Path | None, size: str | None, overrides: list[str] | None) -> Config:
    return load_config(path or DEFAULT_CONFIG, overrides or [], size=size)


@app.command("run")
def run_command(config: ConfigOption = None, size: SizeOption = None, overrides: Overrides = None) -> None:
    """Run the whole chain: decode, train both stages, extract, evaluate, report. What is there is not made again."""
    _run(_config(config, size, overrides), until="report")


@app.command("train")
def train_command(
    stage: Annotated[Literal["base", "text"], typer.Option(help="Last stage to train.")] = "text",
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Train up to a stage."""
    _run(_config(config, size, overrides), until=stage)


@app.command("evaluate")
def evaluate_command(config: ConfigOption = None, size: SizeOption = None, overrides: Overrides = None) -> None:
    """Evaluate a run, training what is missing, and print the table."""
    _run(_config(config, size, overrides), until="results")


def _run(config: Config, *, until: str) -> None:
    from cluster.run import run
    from tvilfm.report.tables import terminal_table

    outcome = run(config, until=until)
    console = Console()
    if outcome.results is not None:
        console.print(terminal_table(outcome.results))
    if until == "report":
        console.print(f"report: {outcome.path / 'report' / 'index.html'}", highlight=False)
    else:
        console.print(f"run: {outcome.path}", highlight=False)


@app.command("tune")
def tune_command(
    space: Annotated[str, typer.Argument(help="Name of a space in tune_spaces/, or the path of a YAML file.")],
    name: Annotated[str | None, typer.Option(help="Folder in run.dir; default the space's name.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds in place of the space's, such as 0,1,2.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep of that name.")] = False,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Run a sweep: the trials of a space, its table and its report."""
    from cluster.tune import SPACES, sweep_space
    from tvilfm.tuning import load_space, with_seeds

    path = Path(space) if space.endswith((".yaml", ".yml")) else SPACES / f"{space}.yaml"
    loaded = load_space(path)
    if seeds is not None:
        loaded = with_seeds(loaded, seeds)
    folder = sweep_space(
        loaded,
        name=name or loaded.name,
        config_path=config or DEFAULT_CONFIG,
        overrides=overrides or [],
        size=size,
        resume=resume,
    )
    _report(folder)


@app.command("report")
def report_command(folder: Annotated[Path, typer.Argument(help="Of a sweep, such as runs/ablations.")]) -> None:
    """Write a sweep's tables (Markdown, CSV, LaTeX) and page again from its trials, and print the table."""
    _report(folder)


def _report(folder: Path) -> None:
    from cluster.tune import report_sweep
    from tvilfm.report.sweep import markdown_table

    typer.echo(markdown_table(report_sweep(folder)))
    typer.echo(f"report: {folder / 'report' / 'index.html'}")


@app.command("index")
def index_command(
    gallery: Annotated[
        str | None, typer.Option(help="Folder or object store prefix; default gallery.uri.", show_default=False)
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Folder or URI of your own pictures; default the run's test images.", show_default=False),
    ] = None,
    camid: Annotated[int | None, typer.Option(help="Camera of --images.", show_default=False)] = None,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Write people into a gallery with a finished run's model, and put it in use."""
    from cluster.index import index

    where = [] if gallery is None else [f"gallery.uri={json.dumps(gallery)}"]
    made = index(_config(config, size, [*(overrides or []), *where]), images=images, camid=camid)
    typer.echo(f"gallery: {made.uri} holds {len(made)} images in space {made.space_id}, version {made.version}")


@app.command("caption-train")
def caption_train_command(
    modality: Annotated[
        Literal["visible", "infrared", "both"], typer.Option(help="Whose captioner to fine-tune.")
    ] = "both",
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Fine-tune captioners (caption.train) on the training images and their captions, and print their marks."""
    from cluster.run import run
    from tvilfm.captioning.scores import Marks

    outcome = run(
        _config(config, size, [*(overrides or []), "caption.source=finetuned"]),
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
    out: Annotated[str, typer.Option(help="Folder or URI for captions.parquet, and what the job goes on from.")],
    images: Annotated[
        str | None,
        typer.Option(help="Folder or URI of picture files; default the run description's dataset.", show_default=False),
    ] = None,
    modality: Annotated[
        Literal["visible", "infrared"] | None, typer.Option(help="Of --images.", show_default=False)
    ] = None,
    retry_bad: Annotated[bool, typer.Option("--retry-bad", help="Also try images in quarantine again.")] = False,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Caption images into a table. What is there is not captioned again."""
    from cluster.caption import caption
    from cluster.run import make_synthetic

    resolved = _config(config, size, overrides)
    if images is None:
        make_synthetic(resolved, Console(stderr=True))
    summary = caption(resolved, out=out, images=images, modality=modality, retry_bad=retry_bad)
    for line in summary.lines():
        typer.echo(line)
    summary.check(resolved.caption.max_bad_share)


@app.command("rephrase")
def rephrase_command(
    out: Annotated[str, typer.Option(help="Folder or URI for captions.parquet and what the job keeps to go on from.")],
    captions: Annotated[
        str | None,
        typer.Option(help="Parquet caption table, path or URI; default the dataset's captions.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Say every caption in other words (caption.rephrase). What is there is not asked for again."""
    from cluster.rephrase import rephrase

    for line in rephrase(_config(config, size, overrides), out=out, captions=captions).lines():
        typer.echo(line)


@config_app.command("show")
def config_show(config: ConfigOption = None, size: SizeOption = None, overrides: Overrides = None) -> None:
    """Print the resolved run description."""
    typer.echo(to_yaml(_config(config, size, overrides)), nl=False)


@config_app.command("schema")
def config_schema(
    as_json: Annotated[bool, typer.Option("--json", help="JSON schema in place of one line a key.")] = False,
) -> None:
    """Print every key with its default and what it means."""
    if as_json:
        typer.echo(json.dumps(Config.model_json_schema(), indent=2))
        return
    values = Config().model_dump(mode="json")
    for key, description in known_keys().items():
        typer.echo(f"{key} = {json.dumps(value_at(values, key))}  # {description}")


def main() -> None:
    """Run the command; a fault of the input ends in one message and status 2, not in a traceback."""
    try:
        app()
    except (ValueError, FileExistsError, ConnectionError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
